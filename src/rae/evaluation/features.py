"""What sets of images are compared by: images -> feature vectors, by the Inception of FID or by any encoder.

uint8 images [B,3,H,W] of any size --Extractor--> {"features": [B,d] float32, ...}

An encoder is asked as Stein et al. 2023 (arXiv 2306.04675; github.com/layer6ai-labs/dgm-eval) ask DINOv2: Pillow's
bicubic resize to 224 x 224 => / 255 => (x - mean) / std => ViT => final LayerNorm => class token. So `dinov2-large`
gives the FD-DINOv2 that they publish.
"""

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rae.autoencoder.encoders import EncoderConfig, describe_encoder, load_network, run_network
from rae.autoencoder.families import FAMILIES
from rae.data.images import to_unit
from rae.evaluation.inception import DIM, SIZE
from rae.evaluation.pretrained import load_inception
from rae.sources import SourceError, weights_sha256

INCEPTION = "inception"
ENCODER_SIZE = 224  # pixels per side, of Stein et al.; a multiple of every patch size in `ENCODERS`


class Extractor(nn.Module):
    """Images -> features: a frozen network, and what is done to images before it. `open_extractor` makes one.

    The features of an image do not depend on its company in a batch beyond float rounding, nor on the precision that
    the process asks for: everything is float32.

    Attributes:
        name: as it was asked for.
        dim: d, of "features".
        identity: SHA-256 (hex) of the weights and of everything else that decides the numbers, wherever files lie.
            Features of different identities cannot be compared.
    """

    def __init__(self, name: str, dim: int, network: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.dim, self._settings = name, dim, settings
        self.identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Extractor":
        """Does not reach the network, which is frozen."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """What decides the numbers, and the identity that is made of it; plain data."""
        return self._settings | {"identity": self.identity}

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images -> features.

        Args:
            images: uint8 [B,3,H,W], of any size, on the extractor's device.

        Returns:
            float32: "features" [B,d]; of "inception" also "spatial" [B,2023] and "logits" [B,1008], without the bias.

        Raises:
            TypeError: no tensor, or not uint8; or the network was brought to another precision.
            ValueError: another shape.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise TypeError(
                f"images are {getattr(images, 'dtype', type(images).__name__)}; {self.name} takes a tensor of 8-bit "
                "images (torch.uint8): rae.data.images.to_bytes makes them of images in [0,1]."
            )
        if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"images of shape {list(images.shape)}; {self.name} takes [B, 3, H, W], one or more.")
        if (dtype := next(self.parameters()).dtype) != torch.float32:
            raise TypeError(f"{self.name} was brought to {dtype}; features are compared in float32: open it again.")
        with _full_precision(images.device):
            return self.network(images)


def open_extractor(name: str, *, weights: str | Path | None = None, input_size: int | None = None) -> Extractor:
    """Open what makes features of images.

    Args:
        name: "inception" (`rae.evaluation.inception`); or an encoder: a row of `ENCODERS`, a hub id, a local folder.
        weights: where they are, if not where the name says: Inception's file, the encoder's folder.
        input_size: pixels per side that an encoder sees. Default: 224. A smaller one is quicker (112: a quarter of the
            tokens), and gives figures of another scale.

    Raises:
        ValueError: an input size that does not fit.
        SourceError: unknown name, weights that cannot be had, a damaged or a foreign file.
    """
    if name == INCEPTION:
        return _inception(weights, input_size)
    if difflib.get_close_matches(name, [INCEPTION], cutoff=0.75):
        raise SourceError(f"no extractor {name!r}; did you mean {INCEPTION!r}?")
    size = ENCODER_SIZE if input_size is None else input_size
    return _encoder(describe_encoder(name, image_size=size, input_size=size, folder=weights))


# What follows in words is part of the identity: another wording is another extractor to every reference that was kept.


def _inception(weights: str | Path | None, input_size: int | None) -> Extractor:
    if input_size not in (None, SIZE):
        raise ValueError(f"input_size={input_size} for {INCEPTION}: the network of FID sees {SIZE} pixels per side.")
    network = load_inception(weights)
    settings = {
        "network": "Inception-v3 of 2015-12-05, TensorFlow's graph",
        "weights": weights_sha256(network.state_dict().values()),
        "input_size": [SIZE, SIZE],
        "resize": "bilinear as in TensorFlow 1: nothing aligned, no antialias; aspect ratio not kept",
        "normalisation": "(x - 128) / 128",
        "features": "pool_3; mixed_6/conv, first 7 channels; logits without bias",
    }
    return Extractor(INCEPTION, DIM, network, settings)


def _encoder(config: EncoderConfig) -> Extractor:
    network = load_network(config, affine=True)
    shape = config.model_dump(exclude={"name", "source", "mean", "std", "image_size", "input_size"})
    # What the shape does not say: the activation, the frequencies of rotary positions.
    shape |= {key: value for key, value in network.config.to_dict().items() if key in ("hidden_act", "rope_theta")}
    token = "class token" if FAMILIES[config.family].class_tokens else "mean of the patch tokens"
    settings = {
        "network": shape,
        "weights": weights_sha256(network.state_dict().values()),
        "input_size": list(config.input_size),
        "resize": "bicubic as in Pillow: a = -0.5, antialiased, to 8 bits; aspect ratio not kept",
        "normalisation": {"mean": list(config.mean), "std": list(config.std)},
        "positions": f"as in {'DINOv2' if config.family == 'dinov2' else 'transformers'}'s code",
        "features": f"{token} after the final LayerNorm with its affine parameters",
    }
    return Extractor(config.name, config.width, _Encoder(network, config), settings)


class _Encoder(nn.Module):
    """uint8 images -> {"features": class token, or the mean of the patch tokens where there is none}."""

    def __init__(self, network: nn.Module, config: EncoderConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1))
        if config.family == "dinov2":
            embeddings = network.embeddings
            table = _dinov2_positions(embeddings.position_embeddings.data, config.input_size[0] // config.patch_size)
            embeddings.position_embeddings = nn.Parameter(table)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = to_unit(resize_bicubic(images, self.config.input_size[0]))
        x = (x - self.mean) / self.std
        hidden = run_network(self.network, self.config, x).last_hidden_state
        if FAMILIES[self.config.family].class_tokens:
            return {"features": hidden[:, 0]}
        return {"features": hidden[:, self.config.prefix_tokens :].mean(1)}


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """Pillow's bicubic resize, bit for bit, for Pillow does it: a = -0.5, antialiased, rounded to 8 bits.

    Args:
        images: uint8 [B,3,H,W], on any device.
        size: pixels per side of the result; the aspect ratio is not kept.
    """
    if images.shape[2:] == (size, size):
        return images
    pictures = (Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    resized = np.stack([picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures])
    return torch.from_numpy(resized).permute(0, 3, 1, 2).to(images.device)


def _dinov2_positions(table: Tensor, side: int) -> Tensor:
    """Position table [1,1+M^2,d] -> [1,1+side^2,d], sampled at steps of M / (side + 0.1), not M / side.

    DINOv2's own code, which the published figures were made with, keeps the 0.1 that once guarded against rounding;
    transformers has left it out.
    """
    own = round((table.shape[1] - 1) ** 0.5)
    if own == side:
        return table
    patches = table[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, scale_factor=(side + 0.1) / own, mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).mT], dim=1)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bfloat16 inside products, whatever the process has asked for."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    products += torch.backends.cudnn.conv, torch.backends.cudnn.rnn  # torch wants both of these alike
    asked = [product.fp32_precision for product in products]
    plain = torch.amp.is_autocast_available(device.type)
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False) if plain else contextlib.nullcontext():
            yield
    finally:
        for product, precision in zip(products, asked):
            product.fp32_precision = precision
