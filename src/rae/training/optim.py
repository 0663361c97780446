"""What moves the weights: AdamW and Muon, the learning-rate schedule, the exponential moving average."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, model_validator
from torch import nn

from rae.config import Config
from rae.training.durations import Duration

Groups = Mapping[str, Sequence[tuple[str, nn.Parameter]]]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _listed(decays: Any) -> Any:
    return (decays,) if isinstance(decays, int | float) else decays


def _distinct(decays: tuple[float, ...]) -> tuple[float, ...]:
    if twice := sorted({decay for decay in decays if decays.count(decay) > 1}):
        raise ValueError(f"{twice[0]} is given {decays.count(twice[0])} times; each average needs a decay of its own")
    return decays


# One number is a list of one.
Decays = Annotated[tuple[Decay, ...], Field(min_length=1), BeforeValidator(_listed), AfterValidator(_distinct)]


class OptimizerConfig(Config):
    """Optimiser, schedule and clipping.

    The learning rate warms up, then goes from `lr` to `final_lr`, which it reaches at `decay_end` and keeps:
    `schedule: linear, warmup: 40ep, warmup_from_zero: false, decay_end: 800ep` is DiT-DH's (arXiv 2510.11690, App. D).
    """

    name: Literal["adamw", "muon"] = "adamw"  # "muon": Muon for the matrices in the blocks, AdamW for the rest
    lr: PositiveFloat
    final_lr: PositiveFloat | None = None  # None = lr
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Duration = "0st"
    warmup_from_zero: bool = True  # false: hold `lr` until the end of the warm-up
    decay_end: Duration = "100%"
    betas: tuple[Decay, Decay] = (0.9, 0.95)  # AdamW's
    momentum: Decay = 0.95  # Muon's
    weight_decay: float = Field(0.0, ge=0)
    clip: PositiveFloat | None = None  # largest norm of all gradients together, 1.0 for DiT-DH; None = no clipping

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerConfig":
        if (self.schedule == "constant") != (self.final_lr in (None, self.lr)):
            raise ValueError(
                f"schedule {self.schedule!r} with lr {self.lr:g} and final_lr {self.final_lr}: give final_lr with "
                '"linear" or "cosine", and none (null) with "constant"'
            )
        return self


class OptimConfig(OptimizerConfig):
    """Those of a model whose weights are averaged."""

    ema: Decay  # decay of the weights' moving average, the weights that are saved


def build_optimizers(config: OptimizerConfig, groups: Groups) -> list[torch.optim.Optimizer]:
    """One optimiser, or Muon and AdamW side by side.

    Args:
        config: see there. Both take the same learning rate: Muon's update is scaled to AdamW's usual size (RMS 0.2,
            arXiv 2502.16982), so one value and one schedule serve both.
        groups: named parameters, "matrices" (2-D, inside the blocks) and "others", as `model.parameter_groups()`.
    """
    # One kernel for all of a step, several times as fast as one operation after another, on a CPU as well.
    adamw = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "adamw":
        return [torch.optim.AdamW([*groups["matrices"], *groups["others"]], **adamw)]
    muon = torch.optim.Muon(
        groups["matrices"],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, torch.optim.AdamW(groups["others"], **adamw)]


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters by how they are optimised: "matrices" inside `blocks`, and all "others"."""
    groups = {"matrices": [], "others": []}
    for name, parameter in model.named_parameters():
        groups["matrices" if "blocks." in name and parameter.ndim == 2 else "others"].append((name, parameter))
    return groups


def lr_factor(
    step: int, *, schedule: str, warmup: int, decay_end: int, final: float = 1.0, warmup_from_zero: bool = True
) -> float:
    """m(k), the learning rate of step k = 0, 1, ... in units of the base rate:

        k < warmup:       (k + 1) / warmup from zero, else 1
        k >= decay_end:   r
        between:          linear  1 - (1 - r) p
                          cosine  r + (1 - r) (1 + cos(pi p)) / 2,    p = (k - warmup) / (decay_end - warmup)

    Args:
        step: k, the number of optimiser steps made before.
        schedule: "constant", "linear" or "cosine".
        warmup, decay_end: in steps; a `decay_end` before `warmup` is taken to be `warmup`.
        final: r, the final rate in units of the base rate; 1 for "constant".
        warmup_from_zero: rise during the warm-up, or stay at 1.
    """
    decay_end = max(decay_end, warmup)
    if step < warmup:
        return (step + 1) / warmup if warmup_from_zero else 1.0
    if schedule == "constant":
        return 1.0
    if step >= decay_end:
        return final
    p = (step - warmup) / (decay_end - warmup)
    if schedule == "linear":
        return 1 - (1 - final) * p
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * p))


def learning_rate(config: OptimizerConfig, start: int, warmup: int, decay_end: int, step: int) -> float:
    """The rate of a run's step k = start, start + 1, ... of an optimiser that makes its first one at `start`.

    Its warm-up is `warmup` steps from there on, its decay ends at step `decay_end` of the run.
    """
    return config.lr * lr_factor(
        step - start,
        schedule=config.schedule,
        warmup=warmup,
        decay_end=decay_end - start,
        final=(config.final_lr or config.lr) / config.lr,
        warmup_from_zero=config.warmup_from_zero,
    )


def schedule_warning(section: str, config: OptimizerConfig, begun: list[int], now: list[int], step: int) -> str | None:
    """What to say where a longer run, or another duration, moves the learning rate of the step to come.

    Args:
        section: of the recipe.
        config: that section.
        begun, now: start, warm-up and end of the decay, in steps, as they were and as they are.
        step: to come.
    """
    before, after = (learning_rate(config, *steps, max(step, steps[0])) for steps in (begun, now))
    if before == after:
        return None
    return (
        f"{section}: warm-up and decay were {begun[1]} and {begun[2]} steps, they are {now[1]} and {now[2]} now: the "
        f"learning rate goes on at {after:.3g}, not {before:.3g}. {section}.warmup={begun[1]}st "
        f"{section}.decay_end={begun[2]}st keep the old ones."
    )


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def make_ema(model: nn.Module) -> nn.Module:
    """A frozen copy of the model to average into.

    Take it before the model is compiled or wrapped: a copy of a compiled module goes on running the original's weights.
    """
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * parameter; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for kept, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


def ema_warning(decay: float, steps: int) -> str | None:
    """What to say of an average that reaches back 1 / (1 - decay) steps in a run of fewer."""
    horizon = 1 / (1 - decay)
    if horizon <= steps:
        return None
    advice = "A lower optim.ema, or a longer run.duration."
    if steps >= 20:
        advice = f"optim.ema={1 - 10 / steps:.6g} would average over a tenth of the run."
    return (
        f"EMA with decay {decay:g} averages over {horizon:,.0f} steps, the run has {steps:,}: {decay**steps:.0%} of "
        f"the saved weights will be those of the start. {advice}"
    )
