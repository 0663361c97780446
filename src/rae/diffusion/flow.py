"""Flow matching: the path from data to noise, the law of the training times, the shift, the loss.

Conventions (arXiv 2510.11690, Sec. 4): `x` is data at t = 0, `noise` is N(0, I) at t = 1, and

    x_t = (1 - t) x + t noise,        v = d x_t / d t = noise - x.

A network here is any callable `(x_t [B,C,h,w], t [B], y [B]) -> [B,C,h,w]`; this file knows nothing of its inside.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import pydantic
import torch
from torch import Tensor

from rae.config import Config

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
T = TypeVar("T", Tensor, float)


def shift_factor(m: int, n: int = 4096) -> float:
    """a = sqrt(m / n): how much noisier times must be for latents of m numbers than for a base of n (Sec. 4.2)."""
    return math.sqrt(m / n)


def shift_time(t: T, a: float) -> T:
    """t' = a t / (1 + (a - 1) t), the dimension-dependent shift of Sec. 4.2; a = 1 changes nothing."""
    return a * t / (1 + (a - 1) * t)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise, with one time per sample.

    Args:
        x: data [B,C,h,w].
        noise: [B,C,h,w].
        t: [B] in [0, 1].
    """
    t = _per_sample(t, x)
    return (1 - t) * x + t * noise


def velocity_from_data(x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x) / t, for t > 0."""
    return (x_t - x) / _per_sample(t, x)


def velocity_from_noise(noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (noise - x_t) / (1 - t), for t < 1."""
    return (noise - x_t) / (1 - _per_sample(t, noise))


def data_from_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x = x_t - t v, the inverse of `velocity_from_data`."""
    return x_t - _per_sample(t, v) * v


def noise_from_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """noise = x_t + (1 - t) v, the inverse of `velocity_from_noise`."""
    return x_t + (1 - _per_sample(t, v)) * v


class Flow(Config):
    """What a network predicts, and at which times it is trained.

    Attributes:
        prediction: what the network puts out: the velocity "v" (the paper), the data "x", or the noise "eps".
        time_law: law of t before the shift: "uniform" (the paper) or "logit-normal" (the authors' later code).
        logit_mean, logit_std: parameters of the logit-normal law.
        shift: the factor a of `shift_time`, for training times and for the sampler's grid; at least 1.
        t_max: times before the shift are limited to [0, t_max].
    """

    prediction: Literal["v", "x", "eps"] = "v"
    time_law: Literal["uniform", "logit-normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = pydantic.Field(1.0, gt=0)
    shift: float = pydantic.Field(ge=1)
    t_max: float = pydantic.Field(0.999, gt=0, lt=1)

    @classmethod
    def for_latents(cls, shape: tuple[int, int, int], base: int = 4096, **settings) -> "Flow":
        """The flow for latents of a shape (C, h, w), with a = max(1, sqrt(C h w / base)) (Sec. 4.2).

        Latents of fewer numbers than `base` are not shifted: a below 1 would spend the training times near the data.
        """
        return cls(shift=max(1.0, shift_factor(math.prod(shape), base)), **settings)

    def times(self, u: Tensor) -> Tensor:
        """Uniform draws -> shifted training times, by the inverse distribution function.

        uniform:       t = t_max u
        logit-normal:  t = sigmoid(mu + s z),  Phi(z) = u Phi((logit(t_max) - mu) / s),  so truncated to [0, t_max]

        Args:
            u: [B] in [0, 1).

        Returns:
            t [B] in [0, 1], float32.
        """
        device = u.device
        u = u.to(device if device.type in ("cpu", "cuda") else "cpu", torch.float64)  # which not every device has
        if self.time_law == "uniform":
            t = self.t_max * u
        else:
            highest = (math.log(self.t_max / (1 - self.t_max)) - self.logit_mean) / self.logit_std
            z = torch.special.ndtri(u * torch.special.ndtr(torch.tensor(highest, dtype=u.dtype, device=u.device)))
            t = torch.sigmoid(self.logit_mean + self.logit_std * z).clamp(0, self.t_max)
        return shift_time(t, self.shift).float().to(device)

    def loss(self, network: Network, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """mean over (C, h, w) of (network(x_t, t, y) - target)^2, with target v, x or noise by `prediction` (Eq. 2).

        Args:
            network: predicts `prediction`.
            x: clean latents [B,C,h,w].
            y: labels [B]; dropped ones already replaced by the null label.
            t: shifted times [B], as `times` gives them.
            noise: [B,C,h,w].

        Returns:
            The loss of each sample, [B].
        """
        target = {"v": noise - x, "x": x, "eps": noise}[self.prediction]
        return (network(interpolate(x, noise, t), t, y) - target).square().flatten(1).mean(1)

    def velocity(self, network: Network) -> Network:
        """The network's prediction turned into a velocity, which is all that samplers and guidance see.

        At t = 0 the data, at t = 1 the noise is x_t itself and its prediction says nothing of the velocity. So an x
        prediction is asked for at t >= shift(1 - t_max), a noise prediction at t <= shift(t_max), the last training
        time: the velocity beyond is taken to be the one there.
        """
        if self.prediction == "v":
            return network
        first, last = (shift_time(t, self.shift) for t in (1 - self.t_max, self.t_max))

        def from_data(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            t = t.clamp(min=first)
            return velocity_from_data(network(x, t, y), x, t)

        def from_noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            t = t.clamp(max=last)
            return velocity_from_noise(network(x, t, y), x, t)

        return from_data if self.prediction == "x" else from_noise


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (like.ndim - 1))
