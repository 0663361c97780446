"""Stage 1: a decoder learns to turn the tokens of a frozen encoder back into images (arXiv 2510.11690, Sec. 3, 4.3).

images --Stream--> [0,1] images [B,3,H,W] --Encoder--> tokens [B,N,C] --add_noise--> noisy tokens
       --Decoder--> images [B,3,H,W], compared with the originals
"""

import hashlib
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt

from rae.autoencoder.decoder import DECODERS, Decoder, DecoderConfig
from rae.autoencoder.encoders import Encoder, EncoderConfig, describe_encoder, open_encoder
from rae.autoencoder.latents import LatentStats, SigmaLaw, add_noise, draw_sigma, tokens_to_map
from rae.autoencoder.rae import RAE
from rae.config import Config, ConfigError, parse
from rae.data.images import DataConfig, Images, Stream, Views, loader, open_split, to_unit
from rae.data.order import noise_draws
from rae.training.checkpoint import load_training_state, load_weights, save_training_state
from rae.training.display import save_sheet
from rae.training.latents import cache_tokens, latent_statistics
from rae.training.optim import (
    OptimConfig,
    build_optimizers,
    ema_warning,
    make_ema,
    parameter_groups,
    set_lr,
    update_ema,
)
from rae.training.perceptual import feature_distance
from rae.training.run import DTYPES, Run, RunConfig


class EncoderChoice(Config):
    """Which encoder, and the size of its images."""

    name: str  # a row of ENCODERS, a hub id or a folder
    image_size: tuple[PositiveInt, PositiveInt]  # (H, W) in pixels
    input_size: tuple[PositiveInt, PositiveInt] | None = None  # that the network sees; None = see `load_encoder`
    precision: Literal["fp32", "bf16"] = "fp32"  # what it computes in during training


class DecoderChoice(Config):
    """Which decoder; its channels and grid come from the encoder."""

    size: Literal[tuple(DECODERS)] | tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    # a row of DECODERS, or [width, depth, heads, MLP width]
    patch_size: PositiveInt  # pixels per side that a token becomes; twice as many give twice the resolution (Sec. 6.1)

    def describe(self, encoder: EncoderConfig) -> DecoderConfig:
        width, depth, heads, mlp_width = DECODERS[self.size] if isinstance(self.size, str) else self.size
        data = {
            "latent_channels": encoder.width,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_width": mlp_width,
            "patch_size": self.patch_size,
            "grid": tuple(side // encoder.patch_size for side in encoder.input_size),
        }
        return parse(DecoderConfig, data, "the decoder that the recipe describes")


class NoiseConfig(Config):
    """Noise augmentation of the tokens (Sec. 4.3), one sigma for each image."""

    law: SigmaLaw = "uniform"  # tau * U(0,1), the authors' code; "half-normal" |N(0, tau^2)| is the paper's text
    tau: NonNegativeFloat = 0.8  # 0 = no noise


class LossConfig(Config):
    """L1 at the image, weight 1, and what is added to it."""

    perceptual: NonNegativeFloat = 0.0  # weight of the distance in the encoder's own feature space


class DecoderRecipe(Config):
    """Everything that stage 1 is a function of."""

    seed: int = Field(0, ge=0)
    encoder: EncoderChoice
    decoder: DecoderChoice
    data: DataConfig
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    tokens: Literal["online", "memory"] = (
        "online"  # encode at every step, or once and keep (small sets, no random crop)
    )
    statistics: bool = True  # take latent statistics of the training images first and save them with the model
    run: RunConfig


def train_decoder(recipe: DecoderRecipe, folder: str | Path) -> Path:
    """Train a decoder. Called again with the same arguments, it goes on where it was interrupted.

    Args:
        recipe: what to train.
        folder: the run's folder; `RAE.from_pretrained(folder)` loads its newest EMA weights.

    Returns:
        The folder.

    Raises:
        ConfigError, ImageError, TrainingError, CheckpointError: before anything is computed, with what to do; or
            TrainingError where the loss is not finite, CheckpointError where the disk is full.
        SystemExit: Ctrl-C or SIGTERM, after saving.
    """
    # --- validate -----------------------------------------------------------------------------------------------------
    images, held_out = open_split(recipe.data)
    with Run(folder, recipe, epoch=len(images)) as run:
        device = run.accelerator.device
        choice = recipe.encoder
        described = describe_encoder(choice.name, image_size=choice.image_size, input_size=choice.input_size)
        config = recipe.decoder.describe(described)
        _check_sizes(described, config)

        # --- construct ------------------------------------------------------------------------------------------------
        encoder = open_encoder(described).to(device)
        torch.manual_seed(recipe.seed)
        decoder = Decoder(config).to(device)
        dtype, ema = DTYPES[recipe.run.precision], make_ema(decoder)
        optimizers = build_optimizers(recipe.optim, parameter_groups(decoder))
        learning_rate = run.learning_rate("optim", recipe.optim, epoch=len(images))
        run.warn(ema_warning(recipe.optim.ema, run.total // recipe.run.batch))

        # --- load -----------------------------------------------------------------------------------------------------
        identity = {"images": images.identity, "encoder": _identity(encoder)}
        if run.checkpoint:
            run.resume(identity)
            load_training_state(run.checkpoint / "train", decoder, optimizers)
            load_weights(ema, run.checkpoint / "model/decoder.safetensors")
        if run.finished:
            return run.conclude()
        rae = RAE(encoder, ema, _statistics(recipe, encoder, images, run))
        encoder.to(DTYPES[choice.precision])  # after the statistics, which are those of its float32 weights
        network = run.accelerator.prepare(decoder)
        stream = Stream(images, recipe.data, config.output_size, recipe.seed)
        resize = config.output_size != described.image_size  # up-sampling decoder: the encoder sees fewer pixels
        cache = cache_tokens(encoder, images, recipe.data, config.output_size) if recipe.tokens == "memory" else None
        noise_shape = (encoder.grid[0] * encoder.grid[1], encoder.width)

        def save(folder: Path) -> None:
            rae.save_pretrained(folder / "model")
            save_training_state(folder / "train", decoder, optimizers, run.state(identity))

        run.begin()
        for batch in run.watch_broken(stream, loader(stream, run.positions(), recipe.data)):
            # --- single training step ---------------------------------------------------------------------------------
            lr, totals = learning_rate(run.step), torch.zeros(3, device=device)
            set_lr(optimizers, lr)
            parts = zip(batch["image"].split(run.micro_batch), batch["position"].split(run.micro_batch))
            for image, positions in run.accumulate(network, parts):
                image = to_unit(image.to(device))
                # [0,1] images [B,3,H,W] -> tokens [B,N,C]
                if cache:
                    tokens = cache.take(positions.tolist(), recipe.seed)[0].to(device)
                else:
                    tokens = encoder(image, resize=resize)
                noise, u = (draw.to(device) for draw in noise_draws(positions.tolist(), recipe.seed, noise_shape))
                sigma = draw_sigma(recipe.noise.law, recipe.noise.tau, _of_law(recipe.noise.law, u[:, 0]))
                decoded = network(add_noise(tokens, sigma, noise), dtype=dtype)  # in the encoder's normalised units
                l1 = F.l1_loss(encoder.denormalise(decoded), image, reduction="none").mean(dim=(1, 2, 3)).sum()
                perceptual = torch.zeros_like(l1)
                if recipe.loss.perceptual:
                    perceptual = feature_distance(encoder, decoded, tokens).sum()
                loss = l1 + recipe.loss.perceptual * perceptual
                (loss / run.local_batch).backward()
                totals += torch.stack([loss, l1, perceptual]).detach() / run.local_batch
            loss, l1, perceptual = run.average(totals)
            norm = run.step_optimizers(decoder, optimizers)
            update_ema(ema, decoder, recipe.optim.ema)
            run.finish_step(loss=loss, l1=l1, perceptual=perceptual, grad_norm=norm)

            # --- once in a while: log, evaluate, save -----------------------------------------------------------------
            if run.due("log"):
                run.log(lr=lr)
            if run.due("evaluate") and run.main:
                if held_out:
                    run.record(held_out_l1=_held_out_l1(rae, held_out, recipe))
                _save_sheet(rae, held_out or images, recipe, run.folder / f"samples/{run.seen:09d}.png")
            if run.due("save"):
                run.save(save)
        return run.conclude()


def _check_sizes(encoder: EncoderConfig, decoder: DecoderConfig) -> None:
    (height, width), (out_height, out_width) = encoder.image_size, decoder.output_size
    if height * out_width != width * out_height or out_height % height:
        raise ConfigError(
            f"the decoder's {decoder.grid[0]} x {decoder.grid[1]} tokens of {decoder.patch_size} pixels make images of "
            f"{out_height} x {out_width}, the encoder takes {height} x {width}; they must be equal, or a whole "
            f"multiple for an up-sampling decoder. decoder.patch_size={height / decoder.grid[0]:g} makes them equal."
        )


def _identity(encoder: Encoder) -> str:
    """SHA-256 (hex) of what the encoder computes, wherever its files lie."""
    computes = encoder.config.model_dump_json(exclude={"name", "source"})
    return hashlib.sha256(f"{computes} {encoder.checksum()}".encode()).hexdigest()


def _statistics(recipe: DecoderRecipe, encoder: Encoder, images: Images, run: Run) -> LatentStats | None:
    """Exact statistics of the training images' latents; taken once, in float32, and kept in the run's folder."""
    if not recipe.statistics:
        return None
    of = hashlib.sha256(f"{images.identity} {_identity(encoder)}".encode()).hexdigest()
    path = run.folder / f"statistics-{of[:12]}.safetensors"
    if not path.exists():
        stats = latent_statistics(
            lambda x: tokens_to_map(encoder(x), encoder.grid),
            (encoder.width, *encoder.grid),
            images,
            recipe.data,
            encoder.config.image_size,
            batch=run.micro_batch,
            accelerator=run.accelerator,
        )
        if run.main:
            stats.save(path)
        run.accelerator.wait_for_everyone()
    return LatentStats.load(path)


def _of_law(law: SigmaLaw, u: torch.Tensor) -> torch.Tensor:
    """Draws from U[0,1) -> draws of the law's own distribution: |n| of a normal n by its inverse distribution."""
    return u if law == "uniform" else torch.special.ndtri((1 + u.double()) / 2).float()


@torch.no_grad()
def _held_out_l1(rae: RAE, images: Images, recipe: DecoderRecipe) -> float:
    """Mean |reconstruction - image| over held-out images, without noise."""
    count, device, errors = min(len(images), recipe.run.evaluate_images), next(rae.decoder.parameters()).device, []
    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    for batch in loader(Views(images, recipe.data, rae.output_size), chunks, recipe.data):
        image = to_unit(batch["image"].to(device))
        errors.append((_reconstruct(rae, image) - image).abs().mean(dim=(1, 2, 3)))
    return float(torch.cat(errors).mean())


def _save_sheet(rae: RAE, images: Images, recipe: DecoderRecipe, path: Path) -> None:
    """The first eight images, above their reconstructions."""
    views = Views(images, recipe.data, rae.output_size)
    image = to_unit(torch.stack([views[i]["image"] for i in range(min(8, len(images)))]))
    save_sheet([image, _reconstruct(rae, image.to(next(rae.decoder.parameters()).device)).cpu()], path)


@torch.no_grad()
def _reconstruct(rae: RAE, image: torch.Tensor) -> torch.Tensor:
    return rae.decode_tokens(rae.tokens(image, resize=rae.output_size != rae.image_size))
