"""What stage 2 says of itself: settings that cannot work, before it starts; a run that goes wrong, while it runs.

Each message is two lines: what is the matter, with both values, and what to do. `rae doctor RUN` says the same of the
run's folder afterwards. A discriminator's health is in adversarial.py.
"""

import math
from typing import NamedTuple

from rae.config import ConfigError
from rae.diffusion.flow import shift_factor
from rae.diffusion.model import DiffusionModelConfig
from rae.evaluation.flow_loss import HeldOutLoss, LatentMoments, mean_trivial_loss, width_bound
from rae.training.dit_recipe import DiTOptimConfig
from rae.training.optim import OptimizerConfig

LOOK = 64  # latents that settings are judged by
SOON, PATIENCE = 100, 1000  # steps, fewest and usual, before a loss is judged
LAG = 1.1  # times the online weights' held-out loss: an average that has this much lags behind
LARGE_STEP = 0.3  # of a weight's first size
OTHER_IMAGES = 0.2  # `channel_distance` of latents from which statistics are said to be of other images
FEW = 8  # images from which on statistics are refused; a single one can have a mean square of 5.5 by right ones
FOREIGN = 4  # times or part of the mean square that latents should have: their size is off by two


def check_settings(
    config: DiffusionModelConfig,
    optim: OptimizerConfig,
    moments: LatentMoments,
    images: int,
    *,
    standardised: bool | None,
    steps: int,
    warmup: int,
) -> dict[str, str]:
    """What is wrong with the settings of a run that is about to start, by name.

    Args:
        config: of the model.
        optim: how it is trained.
        moments: of some latents, `LOOK` of them where there are as many images.
        images: how many these are.
        standardised: whether the autoencoder has latent statistics; None for one that has no use for them.
        steps: of the whole run.
        warmup: steps of the warm-up.

    Raises:
        ConfigError: the autoencoder's statistics are foreign (`channel_distance`), by `FEW` images or more; nothing
            else ends a run.
    """
    found = {
        "shift": _shift(config),
        "statistics": None if standardised is None else _statistics(moments, images, standardised),
        "width": _width(config, moments),
        "learning_rate": _learning_rate(config, optim),
        "warmup": _warmup(optim, steps, warmup),
    }
    return {name: message for name, message in found.items() if message}


def patience(optim: OptimizerConfig, steps: int, warmup: int) -> int:
    """Steps after which the training loss must be below the trivial predictor's: 1,000 or half of a shorter run, never
    fewer than 100, and not before the end of a warm-up in which the learning rate rises."""
    rising = warmup if optim.warmup_from_zero else 0
    return max(rising, min(PATIENCE, steps // 2), SOON)


def trivial_warning(loss: float, trivial: float, *, step: int, bound: float = 0.0) -> str | None:
    """What to say of a mean loss after `patience` steps; None if it is below that of the trivial predictor.

    Args:
        loss: mean over the last steps.
        trivial: `mean_trivial_loss` of the run's flow and latents.
        step: steps made.
        bound: `width_bound`, 0 for a network that is wide enough.
    """
    if loss < trivial:
        return None
    remedy = (
        "Lower optim.lr or lengthen optim.warmup if the loss has risen or stands still, raise optim.lr if it falls too "
        "slowly to see; make sure that the autoencoder has statistics."
    )
    if bound:
        remedy = (
            f"The network is too narrow for a loss below {bound:.4g} (Theorem 1): use a wider one, or dit-dh, whose "
            f"head alone must be wide. {remedy}"
        )
    return (
        f"after {step:,} steps the loss is {loss:.4g}, and a linear guess that looks at each number of the latents by "
        f"itself has {trivial:.4g}: samples will be noise.\n{remedy}"
    )


def lag_warning(average: float, online: float, *, decay: float, step: int) -> str | None:
    """What to say, after `patience` steps, of averaged weights that are far worse than the weights they average.

    Args:
        average, online: held-out loss of both, by the same draws.
        decay: of the average.
        step: steps made.
    """
    if average < LAG * online:
        return None
    horizon = 1 / (1 - decay)
    advice = "It catches up as training slows down."
    if horizon > step / 10 and step >= 20:
        advice = f"It catches up with more steps; optim.ema={1 - 10 / step:.4g} would have by now, in a new run."
    return (
        f"the averaged weights lag behind: their held-out loss is {average:.4g}, that of the weights as they are now "
        f"{online:.4g}. EMA with decay {decay:g} reaches back {horizon:,.0f} steps, {step:,} are made.\n{advice} What "
        "is saved, sampled and shown in samples/ is the average."
    )


class Health(NamedTuple):
    """What a run's losses are judged by while it trains.

    Attributes:
        trivial: `mean_trivial_loss` of its flow and latents.
        bound: `width_bound` of its network, 0 where that is wide enough.
        judged_from: step, by `patience`.
        decay: of the average that is the model.
    """

    trivial: float
    bound: float
    judged_from: int
    decay: float

    @classmethod
    def of(
        cls, config: DiffusionModelConfig, optim: DiTOptimConfig, moments: LatentMoments, *, steps: int, warmup: int
    ) -> "Health":
        """Arguments as of `check_settings`."""
        trivial = mean_trivial_loss(config.flow, moments.variance)
        bound = width_bound(moments.covariance, config.network.output_width, config.flow.prediction)
        return cls(trivial, bound, patience(optim, steps, warmup), optim.ema[0])

    def of_loss(self, loss: float, step: int) -> str | None:
        """`trivial_warning` of the training loss, once its time has come."""
        if step < self.judged_from:
            return None
        return trivial_warning(loss, self.trivial, step=step, bound=self.bound)

    def of_average(self, found: HeldOutLoss, step: int) -> str | None:
        """`lag_warning` of both held-out losses, once their time has come."""
        if step < self.judged_from:
            return None
        return lag_warning(found.loss, found.online, decay=self.decay, step=step)


# --- settings --------------------------------------------------------------------------------------------------------


def _shift(config: DiffusionModelConfig) -> str | None:
    channels, (height, width) = config.network.in_channels, config.network.grid
    numbers, shift = channels * height * width, config.flow.shift
    wanted = max(1.0, shift_factor(numbers))
    if wanted / 2 <= shift <= wanted * 2:
        return None
    if shift < wanted:
        effect = "most training times leave so little noise that an image of so many numbers can still be made out"
    else:
        effect = "most training times leave so much noise that nothing can be made out"
    return (
        f"the shift of the times is {shift:.4g}, sqrt({channels} x {height} x {width} / 4096) is {wanted:.4g}: "
        f"{effect} (arXiv 2510.11690, Sec. 4.2; Table 4: gFID 23.08 without the shift, 4.81 with it).\n"
        f"flow.shift_base=4096 gives {wanted:.4g}."
    )


def channel_distance(moments: LatentMoments) -> float:
    """mean over c of m_c^2 + (s_c - 1)^2: W2^2 between the normal distribution of each channel and N(0, 1).

    m_c and s_c^2 are the channel's mean and variance, over images and positions, of latents that should be
    standardised. Beside the mean square, mean of m_c^2 + s_c^2, it tells channels that are too large from others that
    are too small. Measured on DINOv2-S of [384,8,8], on sets of 400 digits, 95 photographs and 465 drawings:

        statistics                                     distance       mean square
        of 64 of the images, or of 64 others like them 0.01 - 0.07    0.8 - 1.3
        ... of one class alone, 17 to 43 images        0.05 - 0.4     0.8 - 1.4
        ... of 9 others, worst of 40 draws             0.23 - 0.36    0.8 - 1.7
        ... of a single one, worst of 100              1.8 - 3.4      0.4 - 5.5
        of photographs or drawings, for each other,
            for digits, for pictures of clothes        0.2 - 0.6      0.7 - 2.0
        ... for text, for plain areas, for noise       1.0 - 2.7      0.6 - 3.1
        of digits, for any other images                2.5 - 18       5.6 - 20
        variances 9 and 0.55 times the right ones      0.28 - 0.31    0.8 - 1.1
        channels in another order                      3.6 - 25       4.2 - 28
        of the same network with random matrices       1.7 - 79       2.6 - 90
        random                                         12 - 28        16 - 35

    So a distance above `OTHER_IMAGES` is said, and only a mean square beyond `FOREIGN` or its inverse is refused:
    statistics of natural images pass for all images that were tried, those of white digits on black for no others. Of
    six pairs of latents and statistics of different weights (biases and norms were shared) two are below it.
    """
    return (moments.mean.square() + (moments.variance.sqrt() - 1).square()).mean().item()


def _statistics(moments: LatentMoments, images: int, standardised: bool) -> str | None:
    mean, std = moments.mean.abs().max(), moments.variance.sqrt()
    if not standardised:
        return (
            "the autoencoder has no latent statistics, so its latents are not standardised: standard deviations of "
            f"their channels go from {std.min():.3g} to {std.max():.3g} and means to {mean:.3g}, "
            "in place of 1 and 0.\n`rae train-decoder` with statistics=true, or `rae convert --statistics`, gives it."
        )
    remedy = (
        "`rae train-decoder` on these images takes theirs, and decoder.init starts from the decoder that is there; one "
        "of the authors takes those of `rae stats`, by `rae convert --statistics`."
    )
    power = (moments.variance + moments.mean.square()).mean().item()
    if not 1 / FOREIGN <= power <= FOREIGN and images >= FEW:
        raise ConfigError(
            f"the mean square of the latents is {power:.3g}, in place of 1 ({1 / FOREIGN:g} to {FOREIGN:g} is taken): "
            "the autoencoder's statistics are of another encoder, damaged, or of images that have nothing in common "
            f"with these.\n{remedy}"
        )
    if (distance := channel_distance(moments)) > OTHER_IMAGES:
        return (
            f"the autoencoder's statistics do not fit these images: standard deviations of the latents' channels go "
            f"from {std.min():.3g} to {std.max():.3g} and means to {mean:.3g}, in place of 1 and 0, a mean square "
            f"distance of {distance:.3g}; statistics of like images leave less than {OTHER_IMAGES:g}.\nTo fine-tune a "
            f"model that was trained with them, leave it so. {remedy}"
        )
    return None


def _width(config: DiffusionModelConfig, moments: LatentMoments) -> str | None:
    d, n, flow = config.network.output_width, config.network.token_dim, config.flow
    if d >= n:
        return None
    bound = width_bound(moments.covariance, d, flow.prediction)
    trivial = mean_trivial_loss(flow, moments.variance)
    return (
        f"the output is read from a stream of width {d}, and tokens have {n} numbers: no training takes the loss "
        f"below {bound:.4g} (Theorem 1, for these latents), and a linear guess has {trivial:.4g}.\nA width of at least "
        f"{n}, or network.kind=dit-dh with a head that wide; network.allow_narrow=true is for experiments."
    )


def _learning_rate(config: DiffusionModelConfig, optim: OptimizerConfig) -> str | None:
    # The first step of Adam moves every weight by lr, whatever its gradient, and later ones by not much less; weights
    # of a square layer begin with a root mean square of 1 / sqrt(width).
    size = 1 / math.sqrt(max(config.network.width, config.network.output_width))
    if optim.lr <= LARGE_STEP * size:
        return None
    return (
        f"optim.lr={optim.lr:g} moves each weight by as much in one step, and weights of this network begin at about "
        f"{size:.2g}: it is likely to diverge.\noptim.lr={size / 20:.1g} is a twentieth of that; the paper's is 2e-4."
    )


def _warmup(optim: OptimizerConfig, steps: int, warmup: int) -> str | None:
    if not optim.warmup_from_zero or warmup < steps:
        return None
    return (
        f"optim.warmup {optim.warmup} is {warmup:,} steps and the run has {steps:,}: the learning rate ends at "
        f"{optim.lr * steps / warmup:.2g} and never reaches {optim.lr:g}.\noptim.warmup=5% leaves it the time."
    )
