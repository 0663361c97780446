"""What `rae flops` was given, described without weights: a recipe, a run or a saved model, and all that it names."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rae.autoencoder.baselines import is_baseline
from rae.autoencoder.decoder import DecoderConfig
from rae.autoencoder.encoders import EncoderConfig
from rae.autoencoder.rae import RAEConfig
from rae.commands.autoencoder_of import places_of
from rae.commands.cost_training import DECODER, ENCODER, FROZEN, HEADS, LPIPS
from rae.config import ConfigError, load_recipe, parse, read_json
from rae.data.image_set import ImageError
from rae.data.images import DataConfig, open_split
from rae.diffusion.model import DiffusionModelConfig
from rae.evaluation import flops
from rae.evaluation.flops import Cost
from rae.folders import find_folder, saved_kind
from rae.sources import fetch_hub, source_of
from rae.training.decoder import DecoderRecipe
from rae.training.dit_recipe import DiTRecipe, describe_model

IMAGENET = 1_281_167, 1_000  # training images, classes
_SD_VAES = ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse")


@dataclass(frozen=True)
class Space:
    """An autoencoder by its shapes; what `describe_model` asks of one."""

    latent_shape: tuple[int, int, int]
    parts: dict[str, Cost]
    decoder: DecoderConfig | None = None
    latent_identity: None = None  # which only weights have


@dataclass(frozen=True)
class Subject:
    """What is counted.

    Attributes:
        name: as it was given.
        recipe: None of a saved model, which tells nothing of training.
        parts: its networks.
        space: None of a saved diffusion model, which does not tell its autoencoder.
        model: of stage 2.
        images: of an epoch.
        notes: what was assumed, in words.
    """

    name: str
    recipe: DecoderRecipe | DiTRecipe | None
    parts: dict[str, Cost]
    space: Space | None
    model: DiffusionModelConfig | None
    images: int | None
    notes: tuple[str, ...]


def open_subject(name: str, overrides: Sequence[str], images: int | None, classes: int | None) -> Subject:
    """Read what `name` says.

    Args:
        name: a recipe of either stage, the folder of a run, a saved autoencoder or diffusion model.
        overrides: of a recipe's keys, as the training commands take them.
        images, classes: of the training images; None = as they are.

    Raises:
        ConfigError: no such thing; a recipe that does not fit; images, or an autoencoder, that are not here.
        SourceError: an encoder that is not in the table, and whose configuration cannot be had.
    """
    path = Path(name).expanduser()
    path = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path
    if path.is_dir() or saved_kind(path):  # which `run/best` has, a file
        return _saved(name, overrides)
    recipe = load_recipe(_schema(path), path, overrides)
    images, classes, notes = _data(recipe.data, images, classes)
    if isinstance(recipe, DecoderRecipe):
        space = _space_of_recipe(recipe)
        return Subject(name, recipe, space.parts | _judges(recipe, space), space, None, images, tuple(notes))
    space, said = _find_space(recipe.rae, path)
    names = [str(i) for i in range(classes)] if classes and not recipe.network.unconditional else None
    model = describe_model(recipe, space, names)
    parts = space.parts | flops.dit(model.network)
    return Subject(name, recipe, parts, space, model, images, (*notes, *said))


def _schema(path: Path) -> type[DecoderRecipe] | type[DiTRecipe]:
    """Of a file that may not be a recipe at all, which `load_recipe` tells better."""
    if not path.is_file():
        return DecoderRecipe
    try:
        sections = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError):
        return DecoderRecipe
    return DiTRecipe if isinstance(sections, dict) and "network" in sections else DecoderRecipe


def _saved(name: str, overrides: Sequence[str]) -> Subject:
    kind = saved_kind(name)
    if kind not in ("autoencoder", "diffusion model"):
        raise ConfigError(f"{name} is neither a recipe, nor the folder of a run or of a saved model.")
    if overrides:
        raise ConfigError(f"{overrides[0]} changes a recipe, {name} is a saved model; give its recipe in its place.")
    if kind == "autoencoder":
        space = _space_of_model(name)
        return Subject(name, None, space.parts, space, None, None, ())
    path = find_folder(name, "a diffusion model") / "config.json"
    data = json.loads(path.read_bytes())
    model = parse(DiffusionModelConfig, {key: data[key] for key in DiffusionModelConfig.model_fields}, str(path))
    notes = (f"{name} does not tell its autoencoder, which is left out",)
    return Subject(name, None, flops.dit(model.network), None, model, None, notes)


def _data(data: DataConfig, images: int | None, classes: int | None) -> tuple[int, int, list[str]]:
    """Number of training images and classes, of the source if it is here."""
    if images is not None and classes is not None:
        return images, classes, []
    if "imagenet" in data.source and not Path(data.source).expanduser().exists():
        note = f"{data.source} is not here: counted as ImageNet, {IMAGENET[0]:,} images of {IMAGENET[1]:,} classes"
        known, notes = IMAGENET, [note + "; --images and --classes say otherwise"]
    else:
        try:
            if data.source.startswith(("hf:", "hf-stream:")):
                raise ImageError(f"{data.source} is the hub's, which is not asked.")
            found, _ = open_split(data)
        except ImageError as error:
            raise ConfigError(f"data.source: {error} To count without the images: --images N --classes K.") from error
        known, notes = (len(found), len(found.class_names or ())), []
    return known[0] if images is None else images, known[1] if classes is None else classes, notes


# --- autoencoders ----------------------------------------------------------------------------------------------------


def _space_of_recipe(recipe: DecoderRecipe) -> Space:
    choice = recipe.encoder
    encoder, cost = flops.encoder(choice.name, **choice.model_dump(include={"image_size", "input_size", "mean", "std"}))
    return _space(encoder, cost, recipe.decoder.describe(encoder))


def _space(encoder: EncoderConfig, cost: Cost, decoder: DecoderConfig) -> Space:
    grid = (side // encoder.patch_size for side in encoder.input_size)
    return Space((encoder.width, *grid), {ENCODER: cost, DECODER: flops.decoder(decoder)}, decoder)


def _space_of_model(name: str | Path) -> Space:
    folder = find_folder(name, "an autoencoder")
    config = read_json(RAEConfig, folder / "config.json")
    told = config.encoder
    settings = {"image_size": told.image_size, "input_size": told.input_size, "mean": told.mean, "std": told.std}
    source = str(folder / "encoder") if config.encoder_included else told.name
    return _space(told, flops.encoder(source, **settings)[1], config.decoder)


def _judges(recipe: DecoderRecipe, space: Space) -> dict[str, Cost]:
    """The networks that judge a decoder."""
    loss, parts = recipe.loss, {}
    if loss.perceptual and loss.perceptual.kind == "lpips":
        parts[LPIPS] = flops.lpips(space.decoder.output_size)
    if loss.adversarial:
        own = loss.adversarial.discriminator
        name = "dino-small-8" if own.features.endswith(".pth") else own.features
        config, parts[FROZEN] = flops.encoder(name, image_size=own.input_size, input_size=own.input_size)
        parts[HEADS] = flops.discriminator_heads(config, own.depths, own.kernel)
    return parts


def _find_space(name: str, recipe: Path) -> tuple[Space, list[str]]:
    """The autoencoder of a recipe of stage 2: a baseline, a folder, or what a recipe of stage 1 makes."""
    if is_baseline(name):
        return _baseline(name), []
    for place in places_of(name, recipe):
        if (place / "recipe.yaml").is_file():
            return _space_of_recipe(load_recipe(DecoderRecipe, place / "recipe.yaml")), []
        return _space_of_model(place), []
    file = name if name.endswith(".yaml") else f"{Path(name).name}.yaml"
    for path in (Path(file), recipe.parent / file, *sorted(recipe.parent.parent.glob(f"*/{file}"))):
        if path.is_file():
            said = [] if path == Path(name) else [f"{name} is not here: counted as {path} describes it"]
            return _space_of_recipe(load_recipe(DecoderRecipe, path)), said
    raise ConfigError(
        f"{recipe}: rae {name!r} is not here, and no recipe of that name is beside this one; give rae=FOLDER (a run or "
        "a saved autoencoder) or rae=RECIPE.yaml (of stage 1)."
    )


def _baseline(name: str) -> Space:
    found = re.fullmatch(r"(?:sd-vae:(.+)|pixels)@(\d+)(?:x(\d+))?", name)
    if not found:
        raise ConfigError(f"rae {name!r} names no autoencoder: write pixels@SIZE or sd-vae:FOLDER_OR_HUB_ID@SIZE.")
    weights, size = found[1], (int(found[2]), int(found[3] or found[2]))
    if not weights:
        return Space((3, *size), {})
    config = flops.SD_VAE if weights.removeprefix("hub:") in _SD_VAES else _vae_config(weights)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return Space((config["latent_channels"], *(side // factor for side in size)), flops.sd_vae(config, size))


def _vae_config(weights: str) -> dict:
    kind, _, place = source_of(weights).partition(":")
    remedy = f"Give a local folder, or {_SD_VAES[0]}, whose shape is known."
    folder = fetch_hub(place, ["config.json"], remedy) if kind == "hub" else Path(place)
    return json.loads((folder / "config.json").read_bytes())
