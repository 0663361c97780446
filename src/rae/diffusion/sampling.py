"""Sampling: time grids, integrators, and `generate`, which turns labels and seeds into images.

Time runs from 1 (noise) to 0 (data). A sampler takes a velocity `(x, t, y) -> v`, guided or not (`guidance.py`), and
is a generator of states: one for every point of the grid, the start included; the last one is the result.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rae.diffusion.flow import Network, shift_time
from rae.diffusion.guidance import CFG, AutoGuidance, inside_interval
from rae.diffusion.model import DiffusionModel

Grid = Literal["points", "calls"]
Diffusion = Literal["sigma", "linear", "decreasing"]
LastStep = Literal["mean", "tweedie", "euler", "none"]


def time_grid(steps: int, shift: float, kind: Grid = "points", last: float = 0.001) -> Tensor:
    """The times at which a sampler stops, decreasing from 1, float32.

    points:  `steps` points, 1 - linspace(0, 1 - last), then shifted: steps - 1 model calls of Euler, ending at
             shift(last) > 0. So were the figures of arXiv 2510.11690 made ("50 steps" are 49 calls).
    calls:   `steps` + 1 points, 1 - linspace(0, 1), then shifted: `steps` model calls of Euler, ending at 0.

    Args:
        steps: at least 2 for "points", 1 for "calls".
        shift: the flow's shift a >= 1.
        kind: see above.
        last: of "points", the unshifted time of the last point.
    """
    if kind not in ("points", "calls"):
        raise ValueError(f"unknown time grid {kind!r}; there are 'points' and 'calls'.")
    if steps < (2 if kind == "points" else 1):
        raise ValueError(f"{steps} steps are too few for the grid {kind!r}: it takes at least {2 - (kind == 'calls')}.")
    end, count = (1 - last, steps) if kind == "points" else (1, steps + 1)
    t = 1 - torch.linspace(0, end, count, dtype=torch.float64, device="cpu")  # not every device has float64
    return shift_time(t, shift).float()


# --- ordinary differential equation ----------------------------------------------------------------------------------


@torch.no_grad()
def euler(velocity: Network, x: Tensor, y: Tensor, times: Tensor) -> Iterator[Tensor]:
    """x <- x + (t' - t) v(x, t): one call per interval.

    Args:
        velocity: `(x, t, y) -> v`.
        x: start [B,C,h,w] at times[0].
        y: labels [B].
        times: grid [T], decreasing.

    Yields:
        The state at every grid point, T in all.
    """
    yield x
    for t, t_next in times.unfold(0, 2, 1).tolist():
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t), y)
        yield x


@torch.no_grad()
def heun(velocity: Network, x: Tensor, y: Tensor, times: Tensor) -> Iterator[Tensor]:
    """x <- x + (t' - t) (v(x, t) + v(x_euler, t')) / 2: two calls per interval. Arguments as `euler`."""
    yield x
    for t, t_next in times.unfold(0, 2, 1).tolist():
        v = velocity(x, x.new_full((len(x),), t), y)
        v_next = velocity(x + (t_next - t) * v, x.new_full((len(x),), t_next), y)
        x = x + (t_next - t) * (v + v_next) / 2
        yield x


# Dormand & Prince (1980), the 5(4) pair: rows of the tableau; the last row is the step itself
_DOPRI5 = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_DOPRI5_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_DOPRI5_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@torch.no_grad()
def dopri5(
    velocity: Network, x: Tensor, y: Tensor, times: Tensor, *, rtol: float = 1e-5, atol: float = 1e-6
) -> Iterator[Tensor]:
    """Adaptive Dormand-Prince 5(4), each sample with steps of its own, so that none depends on its batch.

    A step is accepted where rms(error / (atol + rtol max(|x|, |x'|))) <= 1; the next one is 0.9 error^(-1/5) times as
    long, within [0.2, 10]. Steps end on the grid points. A step costs six calls: its first slope is the last one of the
    step before it, or, after a rejected one, that one's own. Arguments as `euler`.

    At rtol 1e-3, the authors' setting, rounding errors of the start move results by several percent of their spread.
    """
    yield x
    # times and steps are on the CPU: not every device has float64
    times = times.to("cpu", torch.float64)
    step = torch.full((len(x),), 0.01, dtype=torch.float64, device="cpu")
    t = times[0].expand(len(x)).clone()
    slope = velocity(x, _to(x, t), y)
    for end in times[1:].tolist():
        while (active := (t > end).nonzero().flatten()).numel():
            taken, rows = torch.minimum(step[active], t[active] - end), active.to(x.device)
            proposed, slope_there, error = _dopri5_step(
                velocity, x[rows], y[rows], slope[rows], t[active], taken, rtol, atol
            )
            if not (finite := error.isfinite()).all():
                raise FloatingPointError(f"dopri5: the velocity is not finite near t = {t[active][~finite][0]:.4f}.")
            accepted = error <= 1
            growth = (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 10)
            # a step cut short by the grid says nothing against the longer one
            step[active] = torch.where(
                accepted & (taken < step[active]), torch.maximum(step[active], taken * growth), taken * growth
            )
            reached = torch.where(taken >= t[active] - end, end, t[active] - taken)
            t[active] = torch.where(accepted, reached, t[active])
            accepted = accepted.to(x.device)
            x = x.index_put((rows[accepted],), proposed[accepted])
            slope = slope.index_put((rows[accepted],), slope_there[accepted])
        yield x


def _dopri5_step(velocity, x, y, slope, t, step, rtol, atol) -> tuple[Tensor, Tensor, Tensor]:
    """One trial step of every sample: proposed states, their slopes, and [B] their error over the tolerance.

    `slope` is that of x; t and step are float64 [B] on the CPU, as is the error.
    """
    h = _to(x, -step).reshape(-1, *[1] * (x.ndim - 1))
    slopes = [slope]
    for row, node in zip(_DOPRI5, _DOPRI5_NODES):
        proposed = x + h * sum(a * k for a, k in zip(row, slopes))
        slopes.append(velocity(proposed, _to(x, t - node * step), y))
    error = h * sum(e * k for e, k in zip(_DOPRI5_ERROR, slopes))
    scale = atol + rtol * torch.maximum(x.abs(), proposed.abs())
    return proposed, slopes[-1], (error / scale).flatten(1).square().mean(1).sqrt().cpu().double()


def _to(x: Tensor, t: Tensor) -> Tensor:
    return t.to(x.dtype).to(x.device)  # in this order: the device may not have t's type


# --- stochastic differential equation --------------------------------------------------------------------------------


def diffusion_coefficient(form: Diffusion, t: float) -> float:
    """D(t): t for "sigma" and "linear", (cos(pi (1 - t)) + 1)^2 / 4 for "decreasing"."""
    if form in ("sigma", "linear"):
        return t
    if form == "decreasing":
        return 0.25 * (math.cos(math.pi * (1 - t)) + 1) ** 2
    raise ValueError(f"unknown diffusion {form!r}; there are 'sigma', 'linear' and 'decreasing'.")


def score_from_velocity(v: Tensor, x: Tensor, t: float) -> Tensor:
    """The score of the marginal at t: -((1 - t) v + x) / t, for t > 0."""
    return -((1 - t) * v + x) / t


def _drift(v: Tensor, x: Tensor, t: float, form: Diffusion) -> Tensor:
    d = diffusion_coefficient(form, t)
    return v - d * score_from_velocity(v, x, t) if d else v


@torch.no_grad()
def euler_maruyama(
    velocity: Network, x: Tensor, y: Tensor, times: Tensor, noise: Iterator[Tensor], *, form: Diffusion = "sigma"
) -> Iterator[Tensor]:
    """x <- x - (v - D score) dt + sqrt(2 D dt) n, dt = t - t' > 0: one call per step.

    Args:
        velocity, x, y, times: as `euler`.
        noise: standard normal draws [B,C,h,w], one for every step.
        form: of D(t).
    """
    yield x
    for (t, t_next), n in zip(times.unfold(0, 2, 1).tolist(), noise, strict=True):
        dt = t - t_next
        v = velocity(x, x.new_full((len(x),), t), y)
        x = x - _drift(v, x, t, form) * dt + math.sqrt(2 * diffusion_coefficient(form, t) * dt) * n
        yield x


@torch.no_grad()
def heun_sde(
    velocity: Network, x: Tensor, y: Tensor, times: Tensor, noise: Iterator[Tensor], *, form: Diffusion = "sigma"
) -> Iterator[Tensor]:
    """x^ = x + sqrt(2 D dt) n, then Heun's step of the drift: two calls per step. Arguments as `euler_maruyama`."""
    yield x
    for (t, t_next), n in zip(times.unfold(0, 2, 1).tolist(), noise, strict=True):
        dt = t - t_next
        x = x + math.sqrt(2 * diffusion_coefficient(form, t) * dt) * n
        drift = _drift(velocity(x, x.new_full((len(x),), t), y), x, t, form)
        ahead = x - dt * drift
        drift_next = _drift(velocity(ahead, x.new_full((len(x),), t_next), y), ahead, t_next, form)
        x = x - dt * (drift + drift_next) / 2
        yield x


@torch.no_grad()
def last_step(
    velocity: Network, x: Tensor, y: Tensor, t: float, kind: LastStep = "mean", form: Diffusion = "sigma"
) -> Tensor:
    """The noiseless step of an SDE sampler from t to 0.

    mean:     x - (v - D score) t
    euler:    x - v t
    tweedie:  (x + t^2 score) / (1 - t), the posterior mean of the data
    none:     x
    """
    if kind == "none":
        return x
    v = velocity(x, x.new_full((len(x),), t), y)
    if kind == "mean":
        return x - _drift(v, x, t, form) * t
    if kind == "euler":
        return x - v * t
    if kind == "tweedie":
        return (x + t**2 * score_from_velocity(v, x, t)) / (1 - t)
    raise ValueError(f"unknown last step {kind!r}; there are 'mean', 'tweedie', 'euler' and 'none'.")


# --- images from labels and seeds ------------------------------------------------------------------------------------

ODE_SAMPLERS = {"euler": euler, "heun": heun, "dopri5": dopri5}
SDE_SAMPLERS = {"euler-maruyama": euler_maruyama, "heun-sde": heun_sde}


class Samples(NamedTuple):
    """One batch of `generate`: images [B,3,H,W] (not clamped to [0,1]), latents [B,C,h,w], labels and seeds [B]."""

    images: Tensor
    latents: Tensor
    labels: Tensor
    seeds: Tensor


def generate(
    model: DiffusionModel,
    rae,
    labels: Sequence[int] | Sequence[str] | None,
    seeds: Sequence[int],
    *,
    steps: int = 50,
    grid: Grid = "points",
    sampler: str = "euler",
    guidance: CFG | AutoGuidance | None = None,
    batch_size: int = 32,
) -> Iterator[Samples]:
    """Images of the given classes, batch by batch.

    All noise of image i comes from seeds[i] alone, so up to floating-point rounding it does not depend on the batch
    size or on the other images.

    Args:
        model: the diffusion model.
        rae: the autoencoder whose latents the model was trained on; another one is refused.
        labels: one class index or class name per image; None for images of no class (unconditional).
        seeds: one integer per image, in 0 .. 2^32 - 1 (all that torch's generator tells apart).
        steps, grid: see `time_grid`; a stochastic sampler takes "points" only, and ends them at shift(0.04). "dopri5"
            chooses its steps itself and takes the grid's end alone.
        sampler: "euler", "heun", "dopri5" (float32 models only), or, stochastic, "euler-maruyama", "heun-sde" (with a
            noiseless last step).
        guidance: None, `CFG(scale, t_min, t_max)` or `AutoGuidance(weak, scale, t_min, t_max)`.
        batch_size: images at a time.

    Raises:
        ValueError: an argument that does not fit the others; at the call, before anything is computed.
        TypeError: labels or seeds that are no integers, another guidance than these.
    """
    if len(seeds) == 0:
        raise ValueError("no seeds: give one integer per image.")
    model.check_autoencoder(rae)
    _check_guidance(model, rae, guidance, labels)
    if sampler not in ODE_SAMPLERS and sampler not in SDE_SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join([*ODE_SAMPLERS, *SDE_SAMPLERS])}.")
    if sampler in SDE_SAMPLERS and grid != "points":
        raise ValueError(f"sampler {sampler!r} takes the grid 'points' only, not {grid!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: it must be at least 1.")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise ValueError(f"seed {wrong[0]}: seeds are integers in 0 .. 2^32 - 1.")
    y = model.label_indices(labels) if labels is not None else torch.full((len(seeds),), model.null_label)
    if len(y) != len(seeds):
        raise ValueError(f"{len(y)} labels and {len(seeds)} seeds; give one of each per image.")
    velocity = model if guidance is None else guidance.wrap(model)
    # a stochastic sampler stops where its last step begins (0.04 before the shift, as the authors' code)
    times = time_grid(steps, model.flow.shift, grid, **{"last": 0.04} if sampler in SDE_SAMPLERS else {})
    if sampler == "dopri5":
        times = times[[0, -1]]
        _check_precision(model, guidance)
    elif guidance is not None:
        _check_interval(guidance, times[:-1] if sampler == "euler" else times)
    seeds = torch.tensor([operator.index(seed) for seed in seeds], dtype=torch.int64)
    return _generate(model, rae, velocity, sampler, times, y, seeds, batch_size)


def _check_guidance(model: DiffusionModel, rae, guidance: CFG | AutoGuidance | None, labels) -> None:
    if not isinstance(guidance, CFG | AutoGuidance | None):
        raise TypeError(f"guidance {guidance!r} is none; give CFG(scale, ...), AutoGuidance(weak, scale, ...) or None.")
    if isinstance(guidance, AutoGuidance):
        if not isinstance(guidance.weak, DiffusionModel):
            raise TypeError(f"the guiding model is a {type(guidance.weak).__name__}; it must be a DiffusionModel.")
        guidance.weak.check_autoencoder(rae)
        guidance.weak.check_classes(model)
    if isinstance(guidance, CFG) and labels is None:
        raise ValueError("CFG moves away from images of no class, so without labels it does nothing; use AutoGuidance.")
    if model.config.drop_labels == 0 and model.null_label > 0 and (isinstance(guidance, CFG) or labels is None):
        raise ValueError(
            "this model was trained with drop_labels 0, so it never learnt images of no class, which "
            f"{'CFG needs; use AutoGuidance' if labels is not None else 'labels=None asks for; give labels'}, or train "
            "with drop_labels: 0.1."
        )


def _check_precision(model: DiffusionModel, guidance: CFG | AutoGuidance | None) -> None:
    models = [model, guidance.weak] if isinstance(guidance, AutoGuidance) else [model]
    if rounded := [m.dtype for m in models if m.dtype != torch.float32]:
        raise ValueError(
            f"dopri5 with a model in {rounded[0]}: its rounding errors would be taken for the method's own, and steps "
            "shrink without end; load the model with dtype=torch.float32 (--precision fp32), or take euler or heun."
        )


def _check_interval(guidance: CFG | AutoGuidance, times: Tensor) -> None:
    """The interval must hold one of the times at which the model is asked."""
    if not inside_interval(times, guidance).any():
        nearest = min(times.tolist(), key=lambda t: max(guidance.t_min - t, t - guidance.t_max))
        raise ValueError(
            f"none of the {len(times)} times at which the model is asked is in the guidance interval "
            f"[{guidance.t_min}, {guidance.t_max}], so it would do nothing; the nearest is {nearest:.4f}. Widen the "
            "interval or take more steps."
        )


@torch.no_grad()
def _generate(model, rae, velocity, sampler, times, y, seeds, batch_size) -> Iterator[Samples]:
    device = model.device
    for y_batch, seed_batch in zip(y.split(batch_size), seeds.split(batch_size)):
        streams = [torch.Generator().manual_seed(seed) for seed in seed_batch.tolist()]
        x, labels = _draw(model.latent_shape, streams).to(device), y_batch.to(device)
        if sampler in ODE_SAMPLERS:
            *_, z = ODE_SAMPLERS[sampler](velocity, x, labels, times)
        else:
            noise = (_draw(model.latent_shape, streams).to(device) for _ in times[1:])
            *_, z = SDE_SAMPLERS[sampler](velocity, x, labels, times, noise)
            z = last_step(velocity, z, labels, times[-1].item())
        yield Samples(rae.decode(z), z, y_batch, seed_batch)


def _draw(shape: tuple[int, int, int], streams: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])
