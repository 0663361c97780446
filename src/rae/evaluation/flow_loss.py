"""The flow's loss on held-out latents by time, between what is trivial and what a width cannot get below.

    trivial predictor    the best one that is linear in x_t, each feature by itself        `trivial_loss`
    width bound          Theorem 1, for a network narrower than its tokens                 `width_bound`

A loss near the trivial one means that the network has learnt nothing of how features and tokens hang together. All
losses here are means over elements in the units of the network's own prediction, as `Flow.loss` gives them and as they
stand in a run's log: with v = noise - x, an error of x is t times, an error of the noise 1 - t times that of v.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rae.data.order import noise_draws
from rae.diffusion.dit import patchify
from rae.diffusion.flow import Flow, shift_time
from rae.diffusion.model import DiffusionModel, DiffusionModelConfig
from rae.evaluation.frechet import Moments

Prediction = Literal["v", "x", "eps"]
Batch = tuple[Tensor, Tensor, Sequence[int]]  # latents [b,C,h,w], labels [b], numbers of the images

BINS = 10  # of equal width, over [0, 1]
LEAST = 16  # evaluations in a bin, where there are fewer than 160 images
GOLDEN = (math.sqrt(5) - 1) / 2


class LatentMoments(NamedTuple):
    """First and second moments of tokens, float64 on the CPU.

    Attributes:
        mean: [n], n = C p^2 numbers in a token of p x p latent pixels.
        covariance: [n,n], of these latents themselves (divided by their number).
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """[n], of each feature over images and positions."""
        return self.covariance.diagonal()


def latent_moments(latents: Tensor, patch_size: int = 1) -> LatentMoments:
    """Moments of the tokens of latents [B,C,h,w], every position of every image a sample: a few images are enough."""
    tokens = patchify(latents, patch_size).flatten(0, 1)  # -> [B N, n]
    moments = Moments(tokens.shape[1])
    moments.update(tokens)
    return LatentMoments(moments.mean, moments.m2 / moments.count)


# --- what the loss is measured by ------------------------------------------------------------------------------------


def trivial_loss(t: Tensor, variance: Tensor, prediction: Prediction = "v") -> Tensor:
    """w s^2 / ((1-t)^2 s^2 + t^2), w = 1 (v), t^2 (x), (1-t)^2 (eps): the loss of the best linear predictor.

    x has mean m and variance s^2, the noise 0 and 1, x_t = (1-t) x + t noise and v = noise - x, so

        Var(v) = 1 + s^2,    Var(x_t) = (1-t)^2 s^2 + t^2 = D,    Cov(v, x_t) = t - (1-t) s^2.

    The best a + b x_t leaves Var(v) - Cov^2 / D; over D its numerator is s^2 ((1-t) + t)^2 = s^2. For s = 1 that is
    1 / ((1-t)^2 + t^2), 1 at both ends and 2 in the middle; always to predict E[v] leaves 1 + s^2. For Gaussian x with
    independent features nothing is better. The mean m does not matter.

    Args:
        t: shifted times [k] in [0, 1]; above 0 where a variance is 0.
        variance: s^2 of each feature [n].
        prediction: what the network puts out.

    Returns:
        [k] float64, the mean over features.
    """
    t, s2 = t.double()[:, None], variance.double()
    weight = {"v": torch.ones_like(t), "x": t.square(), "eps": (1 - t).square()}[prediction]
    return (weight * s2 / ((1 - t).square() * s2 + t.square())).mean(1)


def mean_trivial_loss(flow: Flow, variance: Tensor, points: int = 4096) -> float:
    """E over t of `trivial_loss`, t by the flow's own law, shift included: what a training loss must fall below.

    By the midpoint rule over the quantiles of t.

    Args:
        flow: law of t and prediction.
        variance: s^2 of each feature [n]; standardised latents have 1.
        points: of the rule.
    """
    t = flow.times((torch.arange(points, dtype=torch.float64) + 0.5) / points)
    return trivial_loss(t, variance, flow.prediction).mean().item()


def width_bound(covariance: Tensor, width: int, prediction: Prediction = "v") -> float:
    """(1/n) sum_{i>d} mu_i: what a network of width d < n that ends in a linear layer cannot get below at any time.

    mu_1 >= mu_2 >= ... are the eigenvalues of the target's covariance, lambda_i those of the tokens': for v they are
    those of Cov(noise - x), lambda_i + 1 (arXiv 2510.11690, Theorem 1); the same argument gives lambda_i for x and 1
    for eps. The outputs lie in a plane of d dimensions, and the best one leaves the d largest out. 0 for d >= n.

    Args:
        covariance: of the tokens [n,n].
        width: d of the stream that the output is read from (`DiTConfig.output_width`: of DiT-DH, the head's).
        prediction: what the network puts out.
    """
    n = len(covariance)
    if width >= n:
        return 0.0
    data, noise = {"v": (1, 1), "x": (1, 0), "eps": (0, 1)}[prediction]
    smallest = torch.linalg.eigvalsh(covariance.double())[: n - width].clamp(min=0)  # in ascending order
    return (data * smallest + noise).sum().item() / n


# --- held-out loss ---------------------------------------------------------------------------------------------------


class HeldOutLoss(NamedTuple):
    """Losses over held-out images.

    Attributes:
        loss: the mean, with times by the run's own law.
        online: the same of the weights that are not averaged; None where they were not given.
        times: [k] in [0, 1], spread evenly.
        losses: [k], at these times.
    """

    loss: float
    online: float | None
    times: Tensor
    losses: Tensor

    def figures(self, config: DiffusionModelConfig, moments: LatentMoments) -> dict[str, float]:
        """For the log: `held_out_loss` and what it is measured by, and "held_out_loss/0.3" over t in [0.3, 0.4).

        Args:
            config: of the model.
            moments: of latents like these.
        """
        flow = config.flow
        trivial = mean_trivial_loss(flow, moments.variance)
        bound = width_bound(moments.covariance, config.network.output_width, flow.prediction)
        figures = {"held_out_loss": self.loss, "held_out_loss_online": self.online, "trivial_loss": trivial}
        figures |= {"width_bound": bound or None}
        lines = {
            "held_out_loss": self.losses,
            "trivial_loss": trivial_loss(self.times, moments.variance, flow.prediction),
        }
        for name, values in lines.items():
            figures |= {f"{name}/{low:.1f}": mean for low, mean in in_bins(self.times, values).items()}
        return {name: value for name, value in figures.items() if value is not None}


def in_bins(times: Tensor, values: Tensor) -> dict[float, float]:
    """Lower edge of a bin => mean of the values [k] whose times [k] are in it; bins without any are left out."""
    which = (times.double() * BINS).long().clamp(max=BINS - 1)
    return {b / BINS: values[which == b].double().mean().item() for b in which.unique().tolist()}


@torch.no_grad()
def loss_by_time(
    model: DiffusionModel, batches: Iterable[Batch], *, count: int, seed: int, online: DiffusionModel | None = None
) -> HeldOutLoss:
    """The flow's loss on held-out latents, as training draws its times, and once more with times spread evenly.

    A shifted law puts few times near the data, so its own draws would leave bins empty. Image k is also evaluated at
    t = frac((k + 1/2) (sqrt(5) - 1) / 2), which fills equal bins equally whatever the number of images; fewer than 160
    are evaluated at several such times. To spread the images over the bins, and not to put each of them into every one,
    makes the whole curve cost as much as the one figure, and rest on all images. Noise and times belong to the image
    and the seed, so that two evaluations of a run differ by the weights alone.

    Args:
        model: the averaged weights.
        batches: labels are the null label where none is to be given; none is dropped.
        count: images to come.
        seed: of noise and times.
        online: the weights before averaging, to be judged beside them by the same draws.
    """
    flow, rounds = model.flow, math.ceil(BINS * LEAST / count)
    last = shift_time(flow.t_max, flow.shift)  # no later than in training
    own, theirs, times, losses = [], [], [], []
    for latents, labels, images in batches:
        noise, u = (draw.to(latents.device) for draw in noise_draws(images, seed, latents.shape[1:]))
        t = flow.times(u[:, 0])
        own.append(flow.loss(model.predict, latents, labels, t, noise))
        if online is not None:
            theirs.append(flow.loss(online.predict, latents, labels, t, noise))
        for number in range(rounds):
            if number:  # another time of the same image, with other noise
                noise = noise_draws(images, seed + number, latents.shape[1:])[0].to(latents.device)
            places = [((image * rounds + number + 0.5) * GOLDEN) % 1 for image in images]
            t = torch.tensor(places).clamp(max=last).to(latents)
            losses.append(flow.loss(model.predict, latents, labels, t, noise))
            times.append(t)
    mean, of_online = (float(torch.cat(values).mean()) if values else None for values in (own, theirs))
    return HeldOutLoss(mean, of_online, torch.cat(times).cpu(), torch.cat(losses).cpu())
