"""The latent spaces that the paper compares its own with, and one door to all: SD-VAE's and the pixels themselves.

[0,1] images [B,3,H,W] => posterior mean of a KL autoencoder => latents [B,4,H/8,W/8]      Tables 2 and 10
[0,1] images [B,3,H,W] => 2 x - 1 => latents [B,3,H,W]                                     Table 11

Tables of arXiv 2510.11690. Stage 2 takes any `Autoencoder`; `open_autoencoder` opens one by name.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from rae.autoencoder.rae import RAE
from rae.sources import SourceError, fetch_hub, source_of, weights_sha256

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_BASELINE = re.compile(r"(sd-vae|pixels)([:@].*)?")
_FORM = re.compile(r"(?:sd-vae:(?P<weights>.+)|pixels)@(?P<height>[1-9]\d*)(?:x(?P<width>[1-9]\d*))?")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_REMEDIES = (
    f"Any of these helps: give a local folder with config.json and {_WEIGHTS}, as sd-vae:FOLDER@256; set HF_ENDPOINT "
    "to a mirror that can be reached, or HF_HOME to a cache that has the model."
)


class Autoencoder(Protocol):
    """What training, sampling and `generate` need of an autoencoder: `RAE`, `SDVAE` and `Pixels` are such.

    Attributes:
        decoder: a module with parameters. Images are encoded where they lie; their checksum tells decoders apart.
        latent_shape: (C, h, w) of one latent map.
        image_size: (H, W) of the images that `encode` takes.
        output_size: (H', W') of the images that `decode` gives.
        latent_identity: SHA-256 (hex) of all that decides what latents mean, and so not of the decoder. A diffusion
            model is bound to it.
    """

    decoder: nn.Module

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def output_size(self) -> tuple[int, int]: ...

    @property
    def latent_identity(self) -> str: ...

    def encode(self, images: Tensor) -> Tensor:
        """[0,1] images [B,3,H,W] -> latents [B,C,h,w], without gradient, the same for the same images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> images [B,3,H',W'] around [0,1], not clamped."""

    def to(self, device: torch.device) -> "Autoencoder":
        """Move it, in place."""


def open_autoencoder(name: str | Path) -> Autoencoder:
    """Open an autoencoder by name.

    Args:
        name: one of
            - "sd-vae:WEIGHTS@SIZE": an `AutoencoderKL` of diffusers, from a folder or the hub
              (sd-vae:stabilityai/sd-vae-ft-ema@256);
            - "pixels@SIZE": the pixels themselves (pixels@256);
            - anything that `RAE.from_pretrained` takes: a folder, a run or a hub id.
            SIZE is a side in pixels or height x width (192x256).

    Raises:
        ValueError: a name that is nearly one of these; a size that the autoencoder cannot have.
        SourceError: weights that cannot be had, or diffusers is not installed.
        Besides, what `RAE.from_pretrained` raises.
    """
    if not is_baseline(name):
        return RAE.from_pretrained(name)
    if not (form := _FORM.fullmatch(str(name))):
        kind = _BASELINE.fullmatch(str(name))[1]
        raise ValueError(
            f"{str(name)!r} names no autoencoder: write pixels@SIZE or sd-vae:FOLDER_OR_HUB_ID@SIZE, where SIZE is a "
            f"side in pixels (256) or height x width (192x256); ./{name} if the folder {kind} is meant."
        )
    size = int(form["height"]), int(form["width"] or form["height"])
    return open_sd_vae(form["weights"], size) if form["weights"] else Pixels(size)


def is_baseline(name: str | Path) -> bool:
    """Whether a name is that of SD-VAE or of the pixels, not of an RAE."""
    return bool(_BASELINE.fullmatch(str(name)))


# --- pixels ----------------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """encode: z = 2 x - 1;  decode: x = (z + 1) / 2: images as their own latents, in [-1,1] (Table 11).

    A DiT takes them in patches: network.patch_size 16 makes tokens of 768 numbers, as many as DINOv2-B's.

    Args:
        image_size: (H, W) in pixels.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = self.output_size = image_size
        self.latent_shape = (3, *image_size)
        self.latent_identity = _identity(kind="pixels", image_size=image_size)
        self.decoder = _Affine(0.5, 0.5)

    def encode(self, images: Tensor) -> Tensor:
        """[0,1] images [B,3,H,W] -> latents of the same shape, in [-1,1]."""
        _check(images, self.latent_shape, "images")
        return 2 * images - 1

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,3,H,W] -> images around [0,1], not clamped."""
        _check(latents, self.latent_shape, "latents")
        return self.decoder(latents)


class _Affine(nn.Module):
    """scale * z + shift; frozen parameters, so that device and checksum are found as those of any decoder."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.tensor(x), requires_grad=False) for x in (scale, shift))

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * z + self.shift


# --- SD-VAE ----------------------------------------------------------------------------------------------------------


class SDVAE(nn.Module):
    """encode: z = (mu(2 x - 1) - b) s;  decode: x = (D(z / s + b) + 1) / 2, with scaling_factor s and shift_factor b.

    mu is the mean of the posterior N(mu, sigma^2). The code of DiT draws from it instead; the paper does not say. The
    mean needs no seed, so an image has one latent, encoded online or kept, whatever the order of training.

    Args:
        vae: an `AutoencoderKL` of diffusers; made frozen.
        image_size: (H, W) in pixels, multiples of the factor by which the VAE shrinks images (8).

    Attributes:
        encoder, decoder: its two halves, each with its 1 x 1 convolution.
        latent_identity: SHA-256 (hex) of the encoder, the factors and the image size. The decoder is not in it:
            sd-vae-ft-ema and sd-vae-ft-mse are said to be other decoders for the same latents.

    Raises:
        ValueError: a size that does not fit, or a VAE that scales each channel by itself (`latents_mean`).
    """

    def __init__(self, vae: "AutoencoderKL", image_size: tuple[int, int]) -> None:
        super().__init__()
        config = vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if any(side % factor for side in image_size):
            raise ValueError(f"images of {image_size} for a VAE that shrinks {factor} times; take multiples of it.")
        if config.latents_mean is not None or config.latents_std is not None:
            raise ValueError(
                "a VAE with latents_mean and latents_std in its config.json: those are not applied here, so its "
                "latents would be scaled wrongly; take one with scaling_factor alone."
            )
        self.encoder = nn.Sequential(vae.encoder, vae.quant_conv or nn.Identity())
        self.decoder = nn.Sequential(vae.post_quant_conv or nn.Identity(), vae.decoder)
        self.requires_grad_(False)
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0
        self.image_size = self.output_size = image_size
        self.latent_shape = (config.latent_channels, *(side // factor for side in image_size))
        self.latent_identity = _identity(
            kind="sd-vae",
            image_size=image_size,
            encoder=weights_sha256(self.encoder.state_dict().values()),
            **{key: config[key] for key in ("scaling_factor", "shift_factor", "act_fn", "norm_num_groups")},
        )

    def encode(self, images: Tensor) -> Tensor:
        """[0,1] images [B,3,H,W] -> latents [B,C,H/8,W/8]."""
        _check(images, (3, *self.image_size), "images")
        mean, _ = self.encoder(2 * images - 1).chunk(2, dim=1)  # the other half is the logarithm of the variance
        return (mean - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,H/8,W/8] -> images [B,3,H,W] around [0,1], not clamped."""
        _check(latents, self.latent_shape, "latents")
        return (self.decoder(latents / self.scale + self.shift) + 1) / 2


def open_sd_vae(folder_or_hub_id: str, image_size: tuple[int, int]) -> SDVAE:
    """Load an `AutoencoderKL` that diffusers saved: SD-VAE and its kind.

    Args:
        folder_or_hub_id: with config.json and diffusion_pytorch_model.safetensors in it.
        image_size: see `SDVAE`.

    Raises:
        SourceError: diffusers is not installed; not found; another class; weights that are damaged or do not fit.
        ValueError: as `SDVAE`.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise SourceError(f"sd-vae:{folder_or_hub_id} needs diffusers: pip install 'rae[diffusers]'.") from error
    kind, _, name = source_of(folder_or_hub_id).partition(":")
    folder = fetch_hub(name, ["config.json", _WEIGHTS], _REMEDIES) if kind == "hub" else Path(name)
    _check_class(folder)
    try:
        vae, report = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"{folder / _WEIGHTS} cannot be loaded ({error}). {_REMEDIES}") from error
    # diffusers fills in what is missing at random, and tells so in passing
    if wrong := {problem: keys for problem, keys in report.items() if keys}:
        raise SourceError(f"{folder / _WEIGHTS} does not fit its config.json: {wrong}. {_REMEDIES}")
    return SDVAE(vae, image_size)


def _check_class(folder: Path) -> None:
    try:
        found = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{folder} holds no model of diffusers (config.json: {error!r}). {_REMEDIES}") from error
    if found != "AutoencoderKL":
        raise SourceError(f"{folder} holds a {found} of diffusers; what is needed here is an AutoencoderKL.")


# ---------------------------------------------------------------------------------------------------------------------


def _check(images: Tensor, shape: tuple[int, int, int], what: str) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        raise ValueError(f"{what} of shape {list(images.shape)} given to an autoencoder of {['B', *shape]}.")


def _identity(**geometry: Any) -> str:
    return hashlib.sha256(json.dumps(geometry, sort_keys=True).encode()).hexdigest()
