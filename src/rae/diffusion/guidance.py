"""Guidance: a velocity made of two. Each kind wraps a model and gives a callable `(x, t, y) -> v` for the samplers.

Inside the interval t_min <= t <= t_max (of shifted times, both ends included) the velocity is

    v_weak + scale (v - v_weak),

outside it is v, and the weak velocity is not even computed there: a step costs what it must (arXiv 2510.11690, App. I).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rae.diffusion.flow import Network
from rae.diffusion.model import DiffusionModel


def drop_labels(y: Tensor, u: Tensor, probability: float, null_label: int) -> Tensor:
    """Labels with the null label where u < probability, so that the model also learns to do without (App. D).

    Args:
        y: labels [B].
        u: uniform draws [B] in [0, 1).
        probability: 0.1 in the paper.
        null_label: K, the model's `null_label`.
    """
    return torch.where(u < probability, null_label, y)


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: the weak velocity is the model's own, without a class.

    One pass over 2B samples inside the interval, over B outside.

    Attributes:
        scale: 1 is unguided.
        t_min, t_max: the interval. The whole of [0, 1] hurts in these latents: use one (App. I).
    """

    scale: float
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check(self.scale, self.t_min, self.t_max)

    def wrap(self, model: DiffusionModel) -> Network:
        """Guide `model`; at scale 1 it is the model itself."""
        if self.scale == 1:
            return model

        def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            inside = inside_interval(t, self)
            null = torch.full_like(y[inside], model.null_label)
            both = model(torch.cat([x, x[inside]]), torch.cat([t, t[inside]]), torch.cat([y, null]))
            v, v_weak = both[: len(x)], both[len(x) :]
            return _extrapolate(v, v_weak, inside, self.scale)

        return velocity


@dataclass(frozen=True)
class AutoGuidance:
    """Guidance by a worse version of the model, smaller or earlier, with the same class (App. I).

    One pass of each model over B samples inside the interval; outside, of the main one alone.

    Attributes:
        weak: the guiding model, in the same latent space.
        scale: 1 is unguided; the paper uses 1.42 at 256 px and 1.5 at 512 px.
        t_min, t_max: the interval.
    """

    weak: DiffusionModel
    scale: float
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check(self.scale, self.t_min, self.t_max)

    def wrap(self, model: DiffusionModel) -> Network:
        """Guide `model` by `weak`; at scale 1 it is the model itself."""
        if self.scale == 1:
            return model

        def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            inside = inside_interval(t, self)
            v = model(x, t, y)
            v_weak = self.weak(x[inside], t[inside], y[inside]) if inside.any() else v[:0]
            return _extrapolate(v, v_weak, inside, self.scale)

        return velocity


def inside_interval(t: Tensor, guidance: CFG | AutoGuidance) -> Tensor:
    """Which of the times t [T] are guided [T]."""
    return (t >= guidance.t_min) & (t <= guidance.t_max)


def _extrapolate(v: Tensor, v_weak: Tensor, inside: Tensor, scale: float) -> Tensor:
    guided = v.clone()
    guided[inside] = v_weak + scale * (v[inside] - v_weak)
    return guided


def _check(scale: float, t_min: float, t_max: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale {scale}: it must be a finite number; 1 is no guidance.")
    if not 0 <= t_min < t_max <= 1:
        raise ValueError(f"guidance interval [{t_min}, {t_max}]: it must satisfy 0 <= t_min < t_max <= 1.")
