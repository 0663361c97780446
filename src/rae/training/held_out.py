"""How well stage 1 reconstructs held-out images: L1, PSNR, SSIM, and a distance that chooses the best checkpoint.

originals       --Judge.features--> mean and covariance, taken once and kept in the run's folder
reconstructions --Judge.features--> mean and covariance, at every evaluation => Frechet distance
"""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.autoencoder.rae import RAE
from rae.config import Config, ConfigError
from rae.data.images import DataConfig, Images, Views, readable, subset, to_bytes, to_unit
from rae.evaluation.features import INCEPTION, Extractor, open_extractor
from rae.evaluation.frechet import Moments, Normal, distance_between, normal
from rae.evaluation.reconstruction import WINDOW, psnr, ssim
from rae.folders import aside
from rae.sources import SourceError
from rae.training.run_folder import TrainingError

BATCH = 64  # images at a time


class EvaluationConfig(Config):
    """Which features the distance between held-out images and their reconstructions is taken in."""

    features: str | None = None  # inception: rFID; or a row of ENCODERS, a hub id, a folder; None = the run's encoder
    weights: str | None = None  # Inception's file, or the encoder's folder, where the name does not say

    @model_validator(mode="after")
    def _weights_are_of_features(self) -> "EvaluationConfig":
        if self.weights and not self.features:
            raise ValueError(f"weights {self.weights} are of features, which are not given; features=inception")
        return self

    @property
    def figure(self) -> str:
        """What the log calls the distance: held_out_fd in the run's own encoder, held_out_rfid, held_out_fd_NAME."""
        if self.features is None:
            return "held_out_fd"
        return "held_out_rfid" if self.features == INCEPTION else f"held_out_fd_{PurePath(self.features).name}"


class Judge(NamedTuple):
    """What compares held-out images with their reconstructions.

    Attributes:
        figure: `EvaluationConfig.figure`.
        network: that it asks, for the log and for checkpoints.
        features: [0,1] images [B,3,H,W] -> [B,d].
        originals: the distribution of these images' features; None of fewer than two, which have none.
    """

    figure: str
    network: str
    features: Callable[[Tensor], Tensor]
    originals: Normal | None


def open_features(config: EvaluationConfig, device: torch.device) -> Extractor | None:
    """The network that the recipe names, None for the run's own encoder.

    Raises:
        SourceError: its weights cannot be had, with what to take instead.
        ConfigError: an encoder that cannot see images of the size that it is given.
    """
    if config.features is None:
        return None
    try:
        return open_extractor(config.features, weights=config.weights).to(device)
    except SourceError as error:
        raise SourceError(
            f"evaluation.features: {error} In a recipe the file, or folder, is evaluation.weights; without "
            "evaluation.features the distance is that of the run's own encoder (held_out_fd)."
        ) from error
    except ValueError as error:
        raise ConfigError(f"evaluation.features: {error}") from error


def spread(images: Images, most: int) -> Images:
    """`most` of the images, or all: evenly spread over them, since sources list theirs class by class."""
    if len(images) <= most:
        return images
    return subset(images, [i * len(images) // most for i in range(most)])


def open_judge(
    config: EvaluationConfig,
    extractor: Extractor | None,
    rae: RAE,
    images: Images,
    data: DataConfig,
    folder: Path,
    left_out: Callable[[str], object],
) -> Judge:
    """The judge of a run; features of the originals are taken now, unless its folder has them already.

    Args:
        config: of the recipe; `extractor` is what `open_features` made of it.
        rae: the run's own, its encoder as it computes in training.
        images, data: the held-out ones, and how they are read.
        folder: of the run.
        left_out: is told the name of every image that cannot be read.

    Raises:
        TrainingError: what the folder has is damaged.
    """

    def of_extractor(x: Tensor) -> Tensor:
        return extractor(to_bytes(x))["features"]  # of 8 bits, as `rae evaluate` finds them in files

    def of_encoder(x: Tensor) -> Tensor:
        return rae.tokens(x, resize=rae.output_size != rae.image_size).mean(1)

    features = of_extractor if extractor else of_encoder
    by = extractor.identity if extractor else f"{rae.encoder.identity()} {next(rae.encoder.parameters()).dtype}"
    network = f"{extractor.name} ({by[:12]})" if extractor else f"mean tokens of the encoder, {rae.encoder.config.name}"
    of = hashlib.sha256(f"{len(images)} {images.identity} {rae.output_size} {by}".encode()).hexdigest()
    path = folder / f"held-out-{of[:12]}.safetensors"
    if not path.exists():
        device, moments = next(rae.decoder.parameters()).device, None
        with torch.no_grad():
            for batch in readable(images, data, rae.output_size, range(len(images)), batch=BATCH, left_out=left_out):
                found = features(to_unit(batch["image"].to(device)))
                moments = moments or Moments(found.shape[1])
                moments.update(found)
        if moments is None or moments.count < 2:
            return Judge(config.figure, network, features, None)
        with aside(path) as hidden:
            save_file({"mean": moments.mean, "covariance": moments.covariance}, hidden)
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read ({error}). Remove it: it is made anew.") from error
    return Judge(config.figure, network, features, normal(kept["mean"], kept["covariance"]))


@torch.no_grad()
def held_out_figures(
    rae: RAE, judge: Judge, images: Images, data: DataConfig, left_out: Callable[[str], object]
) -> dict[str, float]:
    """How well held-out images are reconstructed, without noise; arguments as of `open_judge`.

    held_out_l1 (not clamped), held_out_psnr and held_out_ssim of clamped images, and the judge's Frechet distance
    between originals and reconstructions: with few images it is biased upwards, by the same for every step of a run.
    """
    device, figures, moments = next(rae.decoder.parameters()).device, {"l1": [], "psnr": [], "ssim": []}, None
    for batch in readable(images, data, rae.output_size, range(len(images)), batch=BATCH, left_out=left_out):
        image = to_unit(batch["image"].to(device))
        decoded = _reconstruct(rae, image)
        shown = decoded.clamp(0, 1)
        figures["l1"].append((decoded - image).abs().mean(dim=(1, 2, 3)))
        figures["psnr"].append(psnr(shown, image))
        if min(rae.output_size) >= WINDOW:
            figures["ssim"].append(ssim(shown, image))
        features = judge.features(shown)
        moments = moments or Moments(features.shape[1])
        moments.update(features)
    means = {f"held_out_{name}": float(torch.cat(values).mean()) for name, values in figures.items() if values}
    if judge.originals:
        means[judge.figure] = distance_between(judge.originals, normal(moments.mean, moments.covariance))
    return means


def reconstructions(rae: RAE, images: Images, data: DataConfig) -> list[Tensor]:
    """Rows of a sheet, [0,1] images [B,3,H,W]: eight of the images, and their reconstructions."""
    shown = spread(images, 8)
    views = Views(shown, data, rae.output_size)
    image = to_unit(torch.stack([views[i]["image"] for i in range(len(shown))]))
    return [image, _reconstruct(rae, image.to(next(rae.decoder.parameters()).device)).cpu()]


@torch.no_grad()
def _reconstruct(rae: RAE, image: Tensor) -> Tensor:
    return rae.decode_tokens(rae.tokens(image, resize=rae.output_size != rae.image_size))
