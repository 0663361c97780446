"""[0,1] images => tokens: frozen, pretrained vision transformers behind one table (arXiv 2510.11690, Sec. 3).

images [B,3,H,W] => resized to the network's input, (x - mean) / std => ViT => final LayerNorm without its affine
parameters => prefix tokens dropped => tokens [B,N,C]
"""

import contextlib
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from safetensors import SafetensorError
from torch import Tensor, nn

from rae.autoencoder.families import ENCODERS, FAMILIES
from rae.config import Config, Size, parse
from rae.sources import REMEDIES, SourceError, fetch, source_of, weights_sha256


class EncoderConfig(Config):
    """Everything needed to build an encoder again.

    Args:
        name: row of `ENCODERS`, hub id or folder, as it was asked for.
        source: `folder:...`, `hub:...` or `wheel:...`.
        family: key of `FAMILIES`.
        width, depth, heads: of the transformer; width is C, the channels of a token.
        patch_size: pixels per side of a token, at the network's input.
        prefix_tokens: class and register tokens, dropped from the output.
        norm_eps: eps of the final LayerNorm.
        mean, std: normalisation of the input, per channel.
        image_size: (H, W) of the images that the encoder takes.
        input_size: (h, w) that the network sees; multiples of the patch size.
    """

    name: str
    source: str
    family: str
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    patch_size: PositiveInt
    prefix_tokens: int
    norm_eps: PositiveFloat
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    image_size: Size
    input_size: Size


class Encoder(nn.Module):
    """tokens = LayerNorm(ViT((images - mean) / std)) without the class and register tokens.

    The network is frozen and always in evaluation mode. It computes in the type of its parameters (float32, until
    `encoder.to(torch.bfloat16)`); preprocessing, the final LayerNorm and the tokens are float32. `load_encoder` makes
    one.

    Attributes:
        config: what it is and where it comes from.
        width: C, channels of a token.
        patch_size: pixels per side of a token, at the network's input.
        grid: (h, w) of the tokens.
        mean, std: normalisation of the input, three numbers each.
    """

    def __init__(self, network: nn.Module, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.patch_size = config.patch_size
        self.grid = config.input_size[0] // config.patch_size, config.input_size[1] // config.patch_size
        self.mean, self.std = config.mean, config.std
        # The final LayerNorm is applied in `features`, without the affine parameters that this one has.
        setattr(network, FAMILIES[config.family].norm, nn.Identity())
        self.network = network.eval().requires_grad_(False)
        self._checksum = weights_sha256(network.state_dict().values())

    def checksum(self) -> str:
        """SHA-256 (hex) of the float32 weights as they were loaded, without the unused final affine parameters."""
        return self._checksum

    def identity(self) -> str:
        """SHA-256 (hex) of all that it computes with, wherever its files lie."""
        settings = self.config.model_dump_json(exclude={"name", "source"})
        return hashlib.sha256(f"{settings} {self.checksum()}".encode()).hexdigest()

    def train(self, mode: bool = True) -> "Encoder":
        """Does not reach the network: it is frozen, and some networks draw random numbers in training mode."""
        super().train(mode)
        self.network.eval()
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """(images - mean) / std, per channel of [B,3,H,W]."""
        return (images - _per_channel(self.mean, images)) / _per_channel(self.std, images)

    def denormalise(self, x: Tensor) -> Tensor:
        """x * std + mean: inverse of `normalise`; not clamped."""
        return x * _per_channel(self.std, x) + _per_channel(self.mean, x)

    def preprocess(self, images: Tensor, *, resize: bool = False) -> Tensor:
        """[0,1] images -> network input: bicubic resize (a = -0.75, no antialias, no clamp), then (x - mean) / std.

        Args:
            images: [B,3,H,W], floating point in [0,1], of `config.image_size`.
            resize: take images of any size; they are resized to `config.input_size`, aspect ratio not kept.

        Returns:
            [B,3,h,w] of `config.input_size`, float32.

        Raises:
            TypeError: no tensor, or not floating point.
            ValueError: another shape, another size, no image at all, or values outside [0,1].
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images are a {type(images).__name__}; load_images makes tensors of picture files.")
        if not images.is_floating_point():
            raise TypeError(
                f"images are {images.dtype}; the encoder takes floats in [0,1]: divide 8-bit images by 255."
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {list(images.shape)}; the encoder takes [B, 3, H, W].")
        size = tuple(images.shape[2:])
        if size != self.config.image_size and not resize:
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels given to an encoder of {self.config.image_size[0]} x "
                f"{self.config.image_size[1]}; crop them to it, pass resize=True, or load it with another image_size."
            )
        if not images.numel():
            raise ValueError(f"images of shape {list(images.shape)} hold no pixels; the encoder takes one or more.")
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(
                f"images have values in [{low.item():g}, {high.item():g}]; the encoder takes [0,1]: "
                "clamp decoded images, divide 8-bit ones by 255, bring [-1,1] to (x + 1) / 2."
            )
        x = images.float()
        if size != self.config.input_size:
            x = F.interpolate(x, self.config.input_size, mode="bicubic", align_corners=False)
        return self.normalise(x)

    def features(self, x: Tensor) -> Tensor:
        """Network input [B,3,h,w] -> tokens [B,N,C], differentiable in x (for losses in the encoder's feature space).

        Args:
            x: normalised images of `config.input_size` (`preprocess`, or a decoder's output resized).

        Raises:
            ValueError: another size.
        """
        hidden = self._tokens(run_network(self.network, self.config, x).last_hidden_state)
        return F.layer_norm(hidden, (self.width,), eps=self.config.norm_eps)

    def hidden_states(self, x: Tensor, *, blocks: Sequence[int]) -> list[Tensor]:
        """Network input as in `features` -> [B,N,C] after each of these blocks (from 0), before any final norm."""
        states = run_network(self.network, self.config, x, output_hidden_states=True).hidden_states
        return [self._tokens(states[block + 1]) for block in blocks]

    def _tokens(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.config.prefix_tokens :].float()

    @torch.no_grad()
    def forward(self, images: Tensor, *, resize: bool = False) -> Tensor:
        """[0,1] images [B,3,H,W] -> tokens [B,N,C], float32, row-major; arguments and errors as in `preprocess`."""
        return self.features(self.preprocess(images, resize=resize))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network in the transformers layout; `open_encoder(config, folder)` reads it back.

        Raises:
            ValueError: the weights are no longer those that were loaded: they were rounded by `.to(...)`.
        """
        if weights_sha256(self.network.state_dict().values()) != self._checksum:
            raise ValueError(
                f"the weights of encoder {self.config.name} were rounded by .to({self.network.dtype}) since they were "
                "loaded and cannot be saved; load the encoder again and save it in float32."
            )
        with _quiet():
            self.network.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_encoder(
    name_or_path: str | Path,
    *,
    image_size: int | tuple[int, int],
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Encoder:
    """Load a frozen encoder.

    Args:
        name_or_path: a row of `ENCODERS`, a hub id, or a local folder in the transformers layout.
        image_size: side, or (H, W), of the images in pixels.
        input_size: side, or (h, w), of what the network sees. Default: with patches of 14 and image sides that are
            multiples of 16, 14/16 of the image (256 -> 224 px, so that decoder patches of 16 give the image's size
            back); otherwise the image size, which must then be a multiple of the patch size.
        mean, std: normalisation of the input, three numbers each. Default: that of the table, or of the model's
            preprocessor_config.json.

    Raises:
        ValueError: sizes that do not fit the patch size.
        SourceError: unknown name, weights that cannot be had, a damaged or a foreign file.
    """
    return open_encoder(
        describe_encoder(name_or_path, image_size=image_size, input_size=input_size, mean=mean, std=std)
    )


def describe_encoder(
    name_or_path: str | Path,
    *,
    image_size: int | tuple[int, int],
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    folder: str | Path | None = None,
) -> EncoderConfig:
    """The configuration of an encoder, without its weights; arguments and errors as in `load_encoder`.

    Args:
        folder: where its files are, if not where the name says.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean={mean} and std={std} given; give both of them, or neither.")
    name = str(name_or_path)
    row = ENCODERS.get(name)
    image_size = _pair(image_size)
    if row:  # a size that cannot be used is found before anything is downloaded
        _input_size(image_size, input_size, row.patch_size)
    elif not Path(name).expanduser().is_dir() and "/" not in name:
        nearest = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise SourceError(
            f"no encoder {name!r}{hint} Known by name: {', '.join(ENCODERS)}; or give a hub id or a folder."
        )
    if folder:
        source = f"folder:{Path(folder).expanduser().resolve()}"
    else:
        source = row.source if row else source_of(name)
    folder = fetch(source, weights=False)
    family, shape = _read_shape(folder)
    if row:
        _compare(f"{folder} is not {name}", shape, row._asdict())
    if mean is None:
        mean, std = row.normalisation if row else _read_normalisation(folder)
    data = {
        "name": name,
        "source": source,
        "family": family,
        "mean": mean,
        "std": std,
        "image_size": image_size,
        "input_size": _input_size(image_size, input_size, shape["patch_size"]),
    }
    return parse(EncoderConfig, data | shape, f"the encoder in {folder}")


def open_encoder(config: EncoderConfig, folder: str | Path | None = None) -> Encoder:
    """Build an encoder from its configuration; arguments and errors as in `load_network`."""
    return Encoder(load_network(config, folder, affine=False), config)


def load_network(config: EncoderConfig, folder: str | Path | None = None, *, affine: bool) -> nn.Module:
    """The network of transformers by itself, float32, with its own final LayerNorm; `run_network` runs it.

    Args:
        config: as from `describe_encoder`, or saved.
        folder: where the weights are, if not where `config.source` says.
        affine: whether the affine parameters of the final LayerNorm are needed; what an `Encoder` saved lacks them.

    Raises:
        SourceError: weights that cannot be had, are damaged, do not fit the configuration, or lack or add keys.
    """
    import transformers

    folder = fetch(f"folder:{folder}" if folder else config.source, weights=True)
    name, shape = _read_shape(folder)
    _compare(f"{folder} is not {config.name}", shape | {"family": name}, config.model_dump())
    family = FAMILIES[name]
    try:
        with _quiet():
            network, report = getattr(transformers, family.model).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **family.settings
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise SourceError(
            f"the weights in {folder} cannot be read ({error}); the file is damaged or foreign."
        ) from error
    missing, own = set(report["missing_keys"]), {f"{family.norm}.weight", f"{family.norm}.bias"}
    if affine and missing == own:
        raise SourceError(
            f"the encoder in {folder} is without the affine parameters of its final LayerNorm, as autoencoders keep "
            f"theirs: give the one that it was made of{f', {config.name}' * (config.name in ENCODERS)}."
        )
    missing -= own
    unexpected = {key for key in report["unexpected_keys"] if not re.match(family.ignored, key)}
    if missing or unexpected:
        raise SourceError(
            f"the weights in {folder} are not those of a {family.model}: {len(missing)} missing {sorted(missing)[:5]}, "
            f"{len(unexpected)} unexpected {sorted(unexpected)[:5]}. {REMEDIES}"
        )
    return network


def run_network(network: nn.Module, config: EncoderConfig, x: Tensor, **arguments: Any) -> Any:
    """The network's output in its own form, computed in the type of its parameters; tokens are row-major.

    Args:
        network: of `load_network`.
        config: the same.
        x: normalised images [B,3,h,w] of `config.input_size`.
        arguments: of the network's `forward`.

    Raises:
        ValueError: another size.
    """
    if tuple(x.shape[2:]) != config.input_size:
        raise ValueError(f"network input of {list(x.shape)}; this encoder sees {config.input_size} pixels.")
    if FAMILIES[config.family].ask:
        arguments["interpolate_pos_encoding"] = True
    if config.family == "vit_mae":
        # MAE orders its tokens by sorting this; whole numbers in float32 keep them row-major, in any compute type.
        count = math.prod(config.input_size) // config.patch_size**2
        arguments["noise"] = torch.arange(count, dtype=torch.float32, device=x.device).expand(len(x), -1)
    return network(x.to(network.dtype), **arguments)


def _read_shape(folder: Path) -> tuple[str, dict[str, Any]]:
    """Family and geometry of the network in a folder, from its config.json."""
    import transformers

    try:
        family = str(json.loads((folder / "config.json").read_bytes())["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{folder / 'config.json'} is not a configuration of transformers ({error!r}).") from error
    if family not in FAMILIES:
        raise SourceError(
            f"{folder} holds a model of type {family!r}; encoders are plain ViTs of the types {', '.join(FAMILIES)} "
            "(a new one is a row in rae/autoencoder/families.py)."
        )
    row = FAMILIES[family]
    try:
        with _quiet():
            config = getattr(transformers, row.model).config_class.from_pretrained(folder)
    except Exception as error:  # those of transformers have no common base
        raise SourceError(f"{folder / 'config.json'} is not that of a {row.model}: {error}") from error
    if not isinstance(config.patch_size, int) or config.patch_size < 1:
        raise SourceError(
            f"{folder / 'config.json'} has the patch size {config.patch_size}; patches are square, of so many pixels."
        )
    return family, {
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "patch_size": config.patch_size,
        "prefix_tokens": row.class_tokens + (config.num_register_tokens if row.registers else 0),
        "norm_eps": config.layer_norm_eps,
    }


def _read_normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    path = folder / "preprocessor_config.json"
    remedy = (
        'write {"image_mean": [r, g, b], "image_std": [r, g, b]} into it, or give encoder.mean=[r,g,b] '
        "encoder.std=[r,g,b] in the recipe, mean=(r, g, b) and std=(r, g, b) in Python."
    )
    if not path.is_file():
        raise SourceError(f"{path} is missing, so mean and std of the input are unknown; {remedy}")
    try:
        found = json.loads(path.read_bytes())
        return found["image_mean"], found["image_std"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} does not tell image_mean and image_std ({error!r}); {remedy}") from error


def _compare(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wrong = [
        f"{key} is {found[key]}, not {wanted[key]}" for key in found if key in wanted and found[key] != wanted[key]
    ]
    if wrong:
        raise SourceError(f"{what}: {'; '.join(wrong)}.")


def _input_size(image_size: tuple[int, int], input_size: int | tuple[int, int] | None, patch: int) -> tuple[int, int]:
    if input_size is None and patch == 14 and not any(side % 16 for side in image_size):
        return image_size[0] // 16 * 14, image_size[1] // 16 * 14
    size = image_size if input_size is None else _pair(input_size)
    if any(side % patch for side in size):
        nearest = [max(round(side / patch), 1) * patch for side in size]
        raise ValueError(
            f"the network would see {size[0]} x {size[1]} pixels, not a multiple of its patch size {patch}; "
            f"an input size of {nearest[0]} x {nearest[1]} would be (input_size, --input-size), or change the images'."
        )
    return size


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(3, 1, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and load reports off: what they would say is checked, and raised, here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
