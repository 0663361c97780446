"""A small KL autoencoder, trained here on the images that the others see: the latents of Tables 1d, 2 and 10 in small.

    loss = mean |x - D(z)| + beta * mean KL(N(mu, s^2) || N(0, 1)),    z = mu + s n,  (mu, s) = E(x),  n ~ N(0, I)

The network is diffusers' AutoencoderKL, so that `sd-vae:FOLDER@SIZE` opens what is saved. Unlike SD-VAE's, its loss has
no LPIPS and no discriminator; nor has that of the small world's decoders, beside which it stands.
"""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from rae.config import Config, Size
from rae.data.images import to_unit
from rae.data.order import batch_positions, image_index
from rae.experiments import world
from rae.experiments.frame import Config as Protocol
from rae.experiments.frame import Place, draws, seed_of
from rae.folders import aside, fsync, fsync_all
from rae.processes import process_state
from rae.training.display import progress

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


# What a study's protocol takes over, besides that of the small world.
VAE: Protocol = {
    "vae_margin": 2,  # pixels by which edges are continued on every side: 28 do not shrink to 4 x 4 tokens, 32 do
    "vae_widths": [16, 32, 64],  # 8 x 8 latents of 32 x 32 pixels
    "vae_beta": 1e-3,
    "vae_steps": 1500,
    "vae_batch": 16,
    "vae_lr": 2e-3,
}
QUICK: Protocol = {"vae_steps": 4, "vae_widths": [8, 8, 8]}  # what the quick form of a study takes over


class VAERecipe(Config):
    """Everything that a KL autoencoder is a function of, but for the images."""

    seed: int = Field(0, ge=0, lt=2**63)
    image_size: Size  # of the images, multiples of the factor by which they shrink
    widths: tuple[PositiveInt, ...]  # channels at full resolution, at a half, at a quarter, ...
    layers: PositiveInt = 1  # residual blocks at each resolution; the decoder has one more
    groups: PositiveInt = 8  # of the group norms
    latent_channels: PositiveInt = 4
    beta: float = Field(ge=0)  # weight of KL, in nats for each number of the latents
    lr: PositiveFloat
    batch: PositiveInt = 32
    steps: PositiveInt

    @property
    def factor(self) -> int:
        """By how much sides shrink."""
        return 2 ** (len(self.widths) - 1)


def build_vae(recipe: VAERecipe) -> "AutoencoderKL":
    """The network of a recipe, with weights of its seed."""
    from diffusers import AutoencoderKL

    if any(side % recipe.factor for side in recipe.image_size):
        raise ValueError(
            f"images of {recipe.image_size} for {len(recipe.widths)} widths; multiples of {recipe.factor}."
        )
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("vae", recipe.seed, "weights"))
        return AutoencoderKL(
            **{name: kind * len(recipe.widths) for name, kind in kinds.items()},
            block_out_channels=recipe.widths,
            layers_per_block=recipe.layers,
            norm_num_groups=recipe.groups,
            latent_channels=recipe.latent_channels,
            sample_size=max(recipe.image_size),
        )


def vae_loss(vae: "AutoencoderKL", x: Tensor, noise: Tensor, beta: float) -> tuple[Tensor, dict[str, float]]:
    """mean |x - D(mu + s n)| + beta * mean (mu^2 + s^2 - 1 - log s^2) / 2, and what it consists of.

    Args:
        vae: the network.
        x: images [B,3,H,W] in [-1,1].
        noise: n [B,C,h,w].
        beta: weight of the second mean, over all numbers of the latents.
    """
    posterior = vae.encode(x).latent_dist
    rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
    l1, kl = (rebuilt - x).abs().mean(), posterior.kl().sum() / noise.numel()
    return l1 + beta * kl, {"l1": l1.item(), "kl": kl.item()}


def train_vae(recipe: VAERecipe, images: Tensor, folder: str | Path) -> Path:
    """Train one, and write it whole as diffusers does, its log beside it; where it stands already, nothing is done.

    Adam, its rate rising over the first 5 % of the steps and falling to 0 as a cosine; no average of weights. Scale and
    shift in its config.json, the same for all channels, bring the latents of the first images to mean 0 and variance 1.

    Args:
        recipe: what to train.
        images: uint8 [N,3,H,W] of `recipe.image_size`.
        folder: for it alone.

    Returns:
        The folder, which `open_autoencoder(f"sd-vae:{folder}@{side}")` opens.

    Raises:
        ValueError: images of another size; a folder of another recipe.
        FloatingPointError: a loss that is not finite.
    """
    folder, about = Path(folder), recipe.model_dump(mode="json")
    if tuple(images.shape[1:]) != (3, *recipe.image_size) or images.dtype != torch.uint8:
        raise ValueError(
            f"{images.dtype} images {list(images.shape)} for a VAE of {recipe.image_size}; crop them to it."
        )
    if (folder / "recipe.json").exists():
        if (found := json.loads((folder / "recipe.json").read_text())) != about:
            raise ValueError(f"{folder} holds a VAE of another recipe: {found}, not {about}; give another folder.")
        return folder
    vae = build_vae(recipe).to(process_state().device)
    log = _fit(vae, recipe, images)
    mean, std = _moments(vae, images[:4096])
    vae.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    hidden = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(hidden, ignore_errors=True)
    vae.save_pretrained(hidden)
    (hidden / "log.json").write_text(json.dumps(log) + "\n")
    (hidden / "recipe.json").write_text(json.dumps(about) + "\n")
    fsync_all(hidden)
    hidden.rename(folder)
    fsync(folder.parent)
    return folder


def side_of(config: Protocol) -> int:
    """Pixels per side of the images that the VAE sees."""
    return config["image_size"] + 2 * config["vae_margin"]


def with_margin(images: Tensor, margin: int) -> Tensor:
    """uint8 [N,3,H,W] -> [N,3,H+2m,W+2m]: the pixels at the edge, continued; [..., m:-m, m:-m] takes it off again."""
    return F.pad(images.float(), (margin,) * 4, mode="replicate").byte()


def data(config: Protocol, place: Place) -> world.Data:
    """The small world's images, with margins."""
    folder = world.folder_of("data-margin", config, (*world.DATA, "vae_margin"), place)
    files = world.Data(folder / "train.npz", folder / "held_out.npz", folder / "classes.json")
    if not files.class_names.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for part, file in (("train", files.train), ("held_out", files.held_out)):
            images, labels = world.pictures(config, place, part)
            wider = with_margin(images, config["vae_margin"]).permute(0, 2, 3, 1)
            with aside(file) as hidden, hidden.open("wb") as stream:
                np.savez(stream, arr_0=wider.numpy(), arr_1=labels.numpy())
        with aside(files.class_names) as hidden:
            hidden.write_text(world.data(config, place).class_names.read_text())
    return files


def vae_of(config: Protocol, seed: int, place: Place) -> str:
    """The VAE of the small world's training images, as `open_autoencoder` takes it; trained where it is not yet.

    Args:
        config: `world.WORLD` and `VAE`.
        seed: of its weights, order and noise.
        place: where it lies.
    """
    side = side_of(config)
    settings = {name: config[f"vae_{name}"] for name in ("widths", "beta", "steps", "batch", "lr")}
    folder = world.folder_of("vae", config, (*world.DATA, *VAE), place, seed=seed)
    if not folder.exists():
        images = with_margin(world.pictures(config, place, "train")[0], config["vae_margin"])
        train_vae(VAERecipe(seed=seed, image_size=side, **settings), images, folder)
    return f"sd-vae:{folder}@{side}"


def _fit(vae: "AutoencoderKL", recipe: VAERecipe, images: Tensor) -> list[dict[str, float]]:
    """In place; a line of the log for every hundredth of the steps."""
    shape = (recipe.latent_channels, *(side // recipe.factor for side in recipe.image_size))
    optimiser = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, recipe.steps))
    log, every = [], max(1, recipe.steps // 100)
    with progress("KL autoencoder", recipe.steps * recipe.batch) as advance:
        for step, positions in enumerate(batch_positions(0, recipe.steps * recipe.batch, recipe.batch)):
            index = [image_index(p, len(images), recipe.seed) for p in positions]
            x = 2 * to_unit(images[index].to(vae.device)) - 1
            noise = torch.randn(len(x), *shape, generator=draws("vae", recipe.seed, step)).to(vae.device)
            loss, figures = vae_loss(vae, x, noise, recipe.beta)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}; a lower lr than {recipe.lr:g}.")
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            advance(positions.stop, f"L1 {figures['l1']:.4f}, KL {figures['kl']:.2f}")
            if step % every == 0 or step == recipe.steps - 1:
                log.append({"step": step, **figures})
    return log


def _rate(step: int, steps: int) -> float:
    """Part of the learning rate in step 0, 1, ..., that the schedule gives."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def _moments(vae: "AutoencoderKL", images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the posterior's means, over all numbers of the latents."""
    parts = [vae.encode(2 * to_unit(part.to(vae.device)) - 1).latent_dist.mean.cpu() for part in images.split(64)]
    latents = torch.cat(parts).double()
    return latents.mean().item(), latents.std().item()
