"""Schedules against their formulas, EMA against its closed form, Muon and AdamW against torch, durations as a table."""

import math
import re

import pytest
import torch
from torch import nn

from rae.config import ConfigError, parse
from rae.training.dit_recipe import DiTOptimConfig
from rae.training.durations import exact_images, in_images, steps
from rae.training.optim import (
    OptimConfig,
    build_optimizers,
    ema_warning,
    lr_factor,
    make_ema,
    parameter_groups,
    set_lr,
    update_ema,
)


@pytest.mark.parametrize(
    ("duration", "images"),
    [
        ("3st", 30),
        ("2ep", 70),  # an epoch of 37 images: 74 -> seven batches
        ("0.5ep", 10),
        ("5%", 50),
        ("12.5%", 120),
        ("100%", 1000),
        ("99img", 90),
        ("1kimg", 1000),
        ("1.5Mimg", 1_500_000),
        ("0st", 0),
    ],
)
def test_durations(duration, images):
    assert in_images(duration, batch=10, epoch=37, total=1000) == images


@pytest.mark.parametrize(("batch", "epoch"), [(10, 37), (512, 1_281_167), (7, 7), (64, 10)])
@pytest.mark.parametrize("every", ["1ep", "0.25ep", "3st", "10%", "99img", "0.1st"])
def test_what_is_done_every_so_often_falls_on_the_first_step_at_or_past_each(every, batch, epoch):
    total = 40 * batch
    interval = max(exact_images(every, batch=batch, epoch=epoch, total=total), batch)
    due = [step for step in range(1, 41) if step * batch // interval > (step - 1) * batch // interval]
    assert [*steps(interval, batch=batch, total=total)] == due
    assert len(due) == total // interval
    assert all(0 <= step * batch - k * interval < batch for k, step in enumerate(due, start=1))


def test_a_quarter_of_an_epoch_is_a_part_of_one():
    """... though it is no whole number of batches: rounded, 2,502 and 625 steps have none in common in a run."""
    whole, quarter = (
        {*steps(exact_images(every, batch=512, epoch=1_281_167), batch=512, total=512 * 40_036)}
        for every in ("1ep", "0.25ep")
    )
    assert len(whole) == 15
    assert whole < quarter


@pytest.mark.parametrize("text", [80, "80", "ep", "-1ep", "80 ep", "1e3st", "5percent"])
def test_duration_without_a_unit_is_refused(text):
    with pytest.raises(ConfigError, match="a number with a unit"):
        parse(OptimConfig, {"lr": 1.0, "ema": 0.9, "warmup": text}, "recipe")


def test_schedules_follow_their_formulas():
    r = 0.1
    for step in range(60):
        p = min(max(step - 10, 0) / 40, 1)
        common = {"warmup": 10, "decay_end": 50, "final": r}
        linear = lr_factor(step, schedule="linear", warmup_from_zero=False, **common)
        cosine = lr_factor(step, schedule="cosine", **common)
        assert linear == pytest.approx(1 - 0.9 * p, abs=1e-15)
        rising = (step + 1) / 10 if step < 10 else None
        assert cosine == pytest.approx(rising or r + 0.45 * (1 + math.cos(math.pi * p)), abs=1e-15)
        assert lr_factor(step, schedule="constant", warmup=10, decay_end=50) == pytest.approx(min((step + 1) / 10, 1))
    assert [lr_factor(k, schedule="linear", warmup=4, decay_end=2, final=0.5) for k in (3, 4)] == [1.0, 0.5]


def test_a_schedule_that_contradicts_its_rates_is_refused():
    with pytest.raises(ConfigError, match=r"none \(null\) with"):
        parse(OptimConfig, {"lr": 1e-3, "final_lr": 1e-4, "ema": 0.9}, "recipe")
    with pytest.raises(ConfigError, match="give final_lr"):
        parse(OptimConfig, {"lr": 1e-3, "schedule": "cosine", "ema": 0.9}, "recipe")


def test_ema_is_the_weighted_sum_of_all_weights():
    model, decay, history = nn.BatchNorm1d(3).double(), 0.8, []
    ema = make_ema(model)
    start = model.weight.detach().clone()
    for step in range(7):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
            model.running_mean.fill_(step)
        history.append(model.weight.detach().clone())
        update_ema(ema, model, decay)
    # ema_n = decay^n start + (1 - decay) sum_k decay^(n-1-k) w_k
    expected = decay**7 * start + (1 - decay) * sum(decay ** (6 - k) * w for k, w in enumerate(history))
    torch.testing.assert_close(ema.weight, expected, rtol=1e-14, atol=0)
    assert ema.running_mean.tolist() == [6.0] * 3
    assert not ema.weight.requires_grad
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(ema(x), (x - 6) / math.sqrt(1 + model.eps) * expected)  # it runs what it holds


def test_ema_longer_than_the_run_is_said():
    assert ema_warning(0.99, 100) is None
    assert "averages over 10,000 steps, the run has 1,000: 90% of the" in ema_warning(0.9999, 1000)


@pytest.mark.parametrize(
    ("decays", "message"),
    [([], "at least 1 item"), ([0.9, 0.5, 0.9], "0.9 is given 2 times"), ([0.9, 1.0], "less than 1")],
)
def test_averages_of_which_one_would_take_the_other_s_place_are_refused(decays, message):
    with pytest.raises(ConfigError, match=message):
        parse(DiTOptimConfig, {"lr": 1.0, "ema": decays}, "recipe")
    assert DiTOptimConfig(lr=1, ema=0.9) == DiTOptimConfig(lr=1, ema=[0.9])


@pytest.mark.parametrize("steps", [1, 10, 19, 20, 300, 1_000_000])
def test_the_ema_that_is_advised_can_be_taken(steps):
    warning = ema_warning(1 - 1e-9, steps)
    if steps < 20:
        assert "A lower optim.ema, or a longer run.duration" in warning
    else:
        advised = float(re.search(r"optim\.ema=(\S+) ", warning)[1])
        assert 1 / (1 - OptimConfig(lr=1, ema=advised).ema) == pytest.approx(steps / 10, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("betas", [0.9, 1.5]), ("betas", [-0.1, 0.9]), ("betas", [0.9, 1]), ("momentum", -1), ("momentum", 1), ("ema", 1)],
)
def test_decays_outside_0_to_1_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"{key}(\.\d)?: Input should be (less|greater) than (or equal to )?[01] "):
        parse(OptimConfig, {"lr": 1.0, "ema": 0.9} | {key: value}, "recipe")


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_every_parameter_is_in_one_group():
    model = Blocks()
    groups = parameter_groups(model)
    assert [name for name, _ in groups["matrices"]] == ["blocks.0.weight", "blocks.1.weight"]
    assert sorted(n for g in groups.values() for n, _ in g) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_do_what_torch_does(name):
    torch.manual_seed(0)
    ours, theirs = Blocks().double(), Blocks().double()
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(name=name, lr=0.1, ema=0.9, weight_decay=0.01, betas=(0.8, 0.7))
    optimizers = build_optimizers(config, parameter_groups(ours))
    matrices = [block.weight for block in theirs.blocks]
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW(
        rest if name == "muon" else theirs.parameters(), lr=0.05, betas=(0.8, 0.7), weight_decay=0.01
    )
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            x, y = torch.ones(2, 6, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
            (model(x).square().sum() + model.embed(y).square().sum()).backward()
        set_lr(optimizers, 0.05)
        for optimizer in [*optimizers, adamw, *([muon] if name == "muon" else [])]:
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # ours is one kernel, which rounds in another order
