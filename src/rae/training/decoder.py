"""Stage 1: a decoder learns to turn the tokens of a frozen encoder back into images (arXiv 2510.11690, Sec. 3, 4.3).

images --Stream--> [0,1] images [B,3,H,W] --Encoder--> tokens [B,N,C] --add_noise--> noisy tokens
       --Decoder--> images [B,3,H,W], compared with the originals
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rae.autoencoder.decoder import DECODERS, Decoder, DecoderConfig
from rae.autoencoder.encoders import Encoder, EncoderConfig, describe_encoder, open_encoder
from rae.autoencoder.latents import LatentStats, SigmaLaw, add_noise, draw_sigma, tokens_to_map
from rae.autoencoder.rae import RAE, load_decoder
from rae.config import Config, ConfigError, Size, parse
from rae.data.images import DataConfig, Images, Stream, loader, open_split, to_unit
from rae.data.order import noise_draws
from rae.training.adversarial import check_adversary
from rae.training.checkpoint import load_optimizers, load_weights, optimizer_tensors, save_training_state
from rae.training.held_out import (
    EvaluationConfig,
    held_out_figures,
    open_features,
    open_judge,
    reconstructions,
    spread,
)
from rae.training.latents import LatentCache, cache_tokens, check_crop, latent_statistics
from rae.training.objective import LossConfig, Objective, Part
from rae.training.optim import (
    OptimConfig,
    build_optimizers,
    ema_warning,
    make_ema,
    parameter_groups,
    set_lr,
    update_ema,
)
from rae.training.run import DTYPES, Run, RunConfig


class EncoderChoice(Config):
    """Which encoder, and the size of its images."""

    name: str  # a row of ENCODERS, a hub id or a folder
    image_size: Size  # (H, W) in pixels, or one number for both
    input_size: Size | None = None  # that the network sees; None = see `load_encoder`
    mean: tuple[float, float, float] | None = None  # normalisation of the network's input; None = the encoder's own
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"  # what it computes in during training


class DecoderChoice(Config):
    """Which decoder; its channels and grid come from the encoder."""

    size: Literal[tuple(DECODERS)] | tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    # a row of DECODERS, or [width, depth, heads, MLP width]
    patch_size: PositiveInt  # pixels per side that a token becomes; twice as many give twice the resolution (Sec. 6.1)
    init: str | None = None  # autoencoder (folder or hub id) whose decoder this one starts from; None = begin anew

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


class DecoderRecipe(Config):
    """Everything that stage 1 is a function of."""

    seed: int = Field(0, ge=0, lt=2**63)
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
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig

    @model_validator(mode="before")
    @classmethod
    def _of_this_stage(cls, data: Any) -> Any:
        if isinstance(data, dict) and "network" in data:
            raise ValueError("this is a recipe of stage 2; `rae train-dit` takes it")
        return data

    @model_validator(mode="after")
    def _images_can_be_kept(self) -> "DecoderRecipe":
        if self.tokens == "memory":
            check_crop("tokens", self.data)
        return self

    @model_validator(mode="after")
    def _images_are_held_out(self) -> "DecoderRecipe":
        if self.evaluation.features and not self.data.held_out:
            raise ValueError(
                f"evaluation.features {self.evaluation.features} is for held-out images, and data.held_out is "
                f"{self.data.held_out}; data.held_out=0.01 keeps a hundredth back"
            )
        return self


def train_decoder(recipe: DecoderRecipe, folder: str | Path, *, tokens: LatentCache | None = None) -> Path:
    """Train a decoder. Called again with the same arguments, it goes on where it was interrupted.

    Args:
        recipe: what to train.
        folder: the run's folder; `RAE.from_pretrained(folder)` loads its newest EMA weights.
        tokens: of the training images, as `cache_tokens` gives them, where several decoders are trained on the same;
            None = encode what `recipe.tokens` says.

    Returns:
        The folder.

    Raises:
        ConfigError, ImageError, TrainingError, CheckpointError: before anything is computed, with what to do; or
            TrainingError where the loss is not finite, CheckpointError where the disk is full.
        SystemExit: Ctrl-C or SIGTERM, after saving.
    """
    # --- validate -----------------------------------------------------------------------------------------------------
    images, held_out = open_split(recipe.data)
    held_out = held_out and spread(held_out, recipe.run.evaluate_images)
    with Run(folder, recipe, epoch=len(images)) as run:
        device = run.accelerator.device
        choice = recipe.encoder
        described = describe_encoder(
            choice.name,
            image_size=choice.image_size,
            input_size=choice.input_size,
            mean=choice.mean,
            std=choice.std,
        )
        config = recipe.decoder.describe(described)
        if recipe.loss.adversarial:
            check_adversary(recipe.loss.adversarial, run, epoch=len(images))
        _check_sizes(described, config)
        if tokens:
            _check_tokens(tokens, recipe, (1 + recipe.data.flip, len(images), math.prod(config.grid), described.width))

        # --- construct ------------------------------------------------------------------------------------------------
        encoder = open_encoder(described).to(device)
        torch.manual_seed(recipe.seed)
        decoder = Decoder(config)
        if recipe.decoder.init and not run.checkpoint:
            _start_from(decoder, recipe.decoder.init, run)
        decoder.to(device)
        ema = make_ema(decoder)
        objective = Objective(recipe.loss, encoder, config.patch_size, run, seed=recipe.seed, epoch=len(images))
        optimizers = build_optimizers(recipe.optim, parameter_groups(decoder))
        learning_rate = run.learning_rate("optim", recipe.optim, epoch=len(images))
        run.warn(ema_warning(recipe.optim.ema, run.total // recipe.run.batch))

        # --- load -----------------------------------------------------------------------------------------------------
        identity = {"images": images.identity, "encoder": encoder.identity()} | objective.identity()
        if run.checkpoint:
            run.resume(identity)
            load_weights(decoder, run.checkpoint / "train/weights.safetensors")
            load_optimizers(optimizers, run.checkpoint / "train/optimizer.safetensors")
            load_weights(ema, run.checkpoint / "model/decoder.safetensors")
            objective.load(run.checkpoint / "train")
        if run.finished:
            return run.conclude()
        extractor = open_features(recipe.evaluation, device) if held_out and run.main else None
        rae = RAE(encoder, ema, _statistics(recipe, encoder, images, run))
        encoder.to(DTYPES[choice.precision])  # after the statistics, which are those of its float32 weights
        network = run.accelerator.prepare(decoder)
        if recipe.run.compile:
            network = torch.compile(network)  # after the EMA was copied: it averages the weights themselves
        stream = Stream(images, recipe.data, config.output_size, recipe.seed)
        resize = config.output_size != described.image_size  # up-sampling decoder: the encoder sees fewer pixels
        if recipe.tokens == "memory" and not tokens:
            tokens = cache_tokens(encoder, images, recipe.data, config.output_size)

        def prepare(batch: dict[str, torch.Tensor]) -> Iterator[Part]:
            """The micro-batches of a step."""
            for image, positions in zip(
                batch["image"].split(run.micro_batch), batch["position"].split(run.micro_batch)
            ):
                image, positions = to_unit(image.to(device)), positions.tolist()
                # [0,1] images [B,3,H,W] -> tokens [B,N,C]
                if tokens:
                    clean = tokens.take(positions, recipe.seed)[0].to(device)
                else:
                    clean = encoder(image, resize=resize)
                noise, u = noise_draws(positions, recipe.seed, clean.shape[1:], device)
                sigma = draw_sigma(recipe.noise.law, recipe.noise.tau, _of_law(recipe.noise.law, u[:, 0]))
                yield Part(image, clean, add_noise(clean, sigma.to(device), noise), positions)

        def save_model(folder: Path) -> None:
            rae.save_pretrained(folder / "model")

        def save(folder: Path) -> None:
            save_model(folder)
            moments = optimizer_tensors(optimizers)
            state = run.state(identity) | {"judges": judges}
            save_training_state(folder / "train", decoder.state_dict(), moments, state)
            objective.save(folder / "train")

        judges = objective.judges()
        run.check_held_out(held_out, recipe.data, config.output_size, by=extractor.identity if extractor else "")
        if held_out and run.main:
            judge = open_judge(recipe.evaluation, extractor, rae, held_out, recipe.data, run.folder, run.leave_out)
            judges |= {"held_out": judge.network}
        run.begin(objective.describe())
        for term, name in judges.items():
            run.note(f"judge of {term}: {name}", **{f"judge_{term}": name})
        for batch in run.watch_broken(stream, loader(stream, run.positions(), recipe.data)):
            # --- single training step ---------------------------------------------------------------------------------
            lr = learning_rate(run.step)
            set_lr(optimizers, lr)
            figures = objective.backward(network, prepare(batch))
            figures["grad_norm"] = run.clip_and_step(decoder, optimizers, recipe.optim.clip)
            update_ema(ema, decoder, recipe.optim.ema)
            figures |= objective.train_adversary(network)
            run.finish_step(**figures)

            # --- once in a while: log, evaluate, save -----------------------------------------------------------------
            if run.due("log"):
                run.tell(adversary=objective.health(run.log(lr=lr)))
            if run.due("evaluate") and run.main:
                if held_out:
                    found = held_out_figures(rae, judge, held_out, recipe.data, run.leave_out)
                    run.judge(best_by=judge.figure, **found)
                run.show(reconstructions(rae, held_out or images, recipe.data))
            if run.due("keep"):
                run.keep(save_model)
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


def _check_tokens(tokens: LatentCache, recipe: DecoderRecipe, wanted: tuple[int, ...]) -> None:
    if recipe.tokens != "memory":
        raise ConfigError(f"tokens are given, and the recipe says tokens: {recipe.tokens}; take tokens: memory.")
    if tuple(tokens.latents.shape) != wanted:
        raise ConfigError(
            f"tokens of shape {list(tokens.latents.shape)} are given, the recipe's images make {list(wanted)} (views, "
            "images, tokens, channels); give those that `cache_tokens` makes of them."
        )


def _start_from(decoder: Decoder, source: str, run: Run) -> None:
    try:
        changes = decoder.start_from(load_decoder(source))
    except ValueError as error:
        raise ConfigError(f"decoder.init: {error}") from error
    run.warn("; ".join([f"the decoder starts from {source}", *changes]))


def _statistics(recipe: DecoderRecipe, encoder: Encoder, images: Images, run: Run) -> LatentStats | None:
    """Exact statistics of the training images' latents; taken once, in float32, and kept in the run's folder."""
    if not recipe.statistics:
        return None
    of = hashlib.sha256(f"{images.identity} {encoder.identity()}".encode()).hexdigest()
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
