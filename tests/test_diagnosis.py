"""What a run of stage 2 says of settings that cannot work and of losses that go wrong; of sound ones, nothing."""

import pytest
import torch

from rae import RAE
from rae.config import ConfigError
from rae.diffusion.dit import DiTConfig, DiTDHConfig
from rae.diffusion.flow import Flow
from rae.diffusion.model import DiffusionModelConfig
from rae.evaluation.flow_loss import LatentMoments, latent_moments, mean_trivial_loss, width_bound
from rae.training.diagnosis import channel_distance, check_settings, lag_warning, patience, trivial_warning
from rae.training.optim import OptimizerConfig


def latents(scale: float = 1.0, mean: float = 0.0, channels: int = 16) -> torch.Tensor:
    return mean + scale * torch.randn(8, channels, 4, 4, generator=torch.Generator().manual_seed(0))


def settings(network: dict | None = None, shift: float = 1.0, prediction: str = "v") -> DiffusionModelConfig:
    data = {"in_channels": 16, "grid": (4, 4), "width": 16, "heads": 2, "depth": 1, "num_classes": 3}
    return DiffusionModelConfig(
        network=DiTConfig(**data | (network or {})), flow=Flow(shift=shift, prediction=prediction)
    )


def said(config: DiffusionModelConfig, z: torch.Tensor | None = None, **changes) -> list[str]:
    run = {"standardised": True, "steps": 1000, "warmup": 50}
    optim = OptimizerConfig(**{"lr": 1e-3} | changes.pop("optim", {}))
    z = latents() if z is None else z
    found = check_settings(config, optim, latent_moments(z), len(z), **run | changes)
    return list(found.values())


PUBLISHED = {"in_channels": 768, "grid": (16, 16)}


# --- before the start ------------------------------------------------------------------------------------------------


def test_nothing_is_said_of_sound_settings():
    assert said(settings()) == []
    assert said(settings(), latents(1.2, 0.2)) == []  # other images than those of the statistics, but like them
    published = DiTDHConfig.of_size("XL", **PUBLISHED, num_classes=1000)
    config = DiffusionModelConfig(network=published, flow=Flow.for_latents((768, 16, 16)))
    assert said(config, latents(channels=768), optim={"lr": 2e-4}) == []


@pytest.mark.parametrize(("shift", "effect"), [(1.0, "so little noise"), (100.0, "so much noise")])
def test_a_shift_that_does_not_fit_the_dimension(shift, effect):
    config = DiffusionModelConfig(network=DiTConfig.of_size("B", **PUBLISHED, num_classes=10), flow=Flow(shift=shift))
    (message,) = said(config, latents(channels=768), optim={"lr": 2e-4})
    what, remedy = message.split("\n")
    assert f"shift of the times is {shift:g}" in what
    assert "sqrt(768 x 16 x 16 / 4096) is 6.928" in what
    assert effect in what
    assert remedy == "flow.shift_base=4096 gives 6.928."


def test_latents_that_are_not_standardised():
    scales = torch.linspace(0.1, 5, 16).view(-1, 1, 1)
    (message,) = said(settings(), latents() * scales + 3, standardised=False)
    what, remedy = message.split("\n")
    assert "no latent statistics" in what
    lowest, highest = (float(text) for text in what.split("go from ")[1].split(" and")[0].split(" to "))
    assert (lowest, highest) == (pytest.approx(0.1, rel=0.2), pytest.approx(5, rel=0.2))
    assert "means to 3." in what
    assert "statistics=true" in remedy


@pytest.mark.parametrize(("scale", "mean"), [(2.2, 0.0), (0.3, 0.0), (1.0, 2.0)])
def test_statistics_of_something_else_are_refused(scale, mean):
    with pytest.raises(ConfigError) as refused:
        said(settings(), latents(scale, mean))
    what, remedy = str(refused.value).split("\n")
    power = float(what.split("latents is ")[1].split(",")[0])
    assert power == pytest.approx(scale**2 + mean**2, rel=0.1)
    assert "decoder.init" in remedy
    assert "`rae convert --statistics`" in remedy


@pytest.mark.parametrize(("scale", "mean"), [(1.8, 0.0), (1.0, 1.5), (0.8, 0.9)])
def test_statistics_of_images_unlike_these_are_said(scale, mean):
    (message,) = said(settings(), latents(scale, mean))
    what, remedy = message.split("\n")
    assert float(what.split("distance of ")[1].split(";")[0]) == pytest.approx(mean**2 + (scale - 1) ** 2, rel=0.15)
    assert "leave it so" in remedy


def test_channels_that_are_wrong_in_turn_are_found_though_the_mean_square_is_right():
    swing = torch.ones(16, 1, 1)
    swing[::2], swing[1::2] = 9**-0.5, 0.55**-0.5  # statistics whose variances are 9 and 0.55 times the right ones
    (message,) = said(settings(), latents() * swing)
    assert "statistics do not fit these images" in message
    with pytest.raises(ConfigError, match=r"mean square of the latents is 5\."):
        said(settings(), latents() / swing)


def test_too_few_latents_to_refuse_by_are_a_warning():
    (message,) = said(settings(), latents(scale=3.0)[:7])
    assert "statistics do not fit these images" in message
    with pytest.raises(ConfigError, match="mean square of the latents is"):
        said(settings(), latents(scale=3.0))


def test_train_dit_refuses_foreign_statistics_before_it_trains(runs, refused, tmp_path):
    rae = RAE.from_pretrained(runs / "decoder")
    foreign = RAE(rae.encoder, rae.decoder, (rae.latent_mean, rae.latent_var / 9))
    foreign.save_pretrained(tmp_path / "foreign")
    message = refused("train-dit", runs / "dit.yaml", f"rae={tmp_path / 'foreign'}", "--out", tmp_path / "run")
    assert "the autoencoder's statistics are of another encoder, damaged, or of images" in message
    assert not (tmp_path / "run/log.jsonl").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_distance_is_that_of_normal_distributions():
    moments = LatentMoments(torch.tensor([0.0, 0.5, -1.0]), torch.diag(torch.tensor([1.0, 4.0, 0.0])))
    assert channel_distance(moments) == pytest.approx((0 + (0.25 + 1) + (1 + 1)) / 3)


def test_a_narrow_network_is_told_its_bound():
    config, z = settings({"width": 8, "allow_narrow": True}), latents()
    (message,) = said(config, z)
    what, remedy = message.split("\n")
    moments = latent_moments(z)
    assert "width 8, and tokens have 16 numbers" in what
    assert f"below {width_bound(moments.covariance, 8):.4g} (Theorem 1" in what
    assert f"linear guess has {mean_trivial_loss(config.flow, moments.variance):.4g}" in what
    assert "at least 16" in remedy


def test_a_narrow_trunk_under_a_wide_head_is_sound():
    head = {"head_width": 16, "head_heads": 2, "head_depth": 1}
    network = DiTDHConfig(in_channels=16, grid=(4, 4), width=8, heads=2, depth=1, num_classes=3, **head)
    assert said(DiffusionModelConfig(network=network, flow=Flow(shift=1.0))) == []


def test_steps_as_large_as_the_weights():
    (message,) = said(settings(), optim={"lr": 0.5})
    assert "optim.lr=0.5 moves each weight by as much" in message
    assert "begin at about 0.25" in message
    assert message.endswith("optim.lr=0.01 is a twentieth of that; the paper's is 2e-4.")
    wide = settings({"width": 1024})
    assert said(wide, optim={"lr": 0.02}) != []
    assert said(wide, optim={"lr": 0.005}) == []


def test_a_warm_up_as_long_as_the_run():
    (message,) = said(settings(), optim={"warmup": "2000st"}, warmup=2000)
    assert "is 2,000 steps and the run has 1,000: the learning rate ends at 0.0005 and never reaches 0.001" in message
    assert said(settings(), optim={"warmup": "2000st", "warmup_from_zero": False}, warmup=2000) == []


def test_several_things_at_once_are_all_said():
    narrow = settings({"width": 8, "allow_narrow": True}, shift=5.0)
    assert len(said(narrow, latents(3.0), standardised=False, optim={"lr": 1.0}, warmup=1000)) == 5


# --- while it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup", "rising", "expected"),
    [
        (100_000, 0, True, 1000),
        (100_000, 5000, True, 5000),
        (100_000, 5000, False, 1000),  # DiT-DH's is held: it lasts for half of the run
        (600, 30, True, 300),
        (1, 0, True, 100),
    ],
)
def test_patience_is_the_rise_of_the_rate_and_a_thousand_steps_or_half_the_run(steps, warmup, rising, expected):
    assert patience(OptimizerConfig(lr=1e-3, warmup_from_zero=rising), steps, warmup) == expected


def test_a_loss_that_is_not_below_the_trivial_one():
    assert trivial_warning(1.2, 1.3, step=1000) is None
    what, remedy = trivial_warning(1.31, 1.3, step=1000).split("\n")
    assert "after 1,000 steps the loss is 1.31" in what
    assert "by itself has 1.3" in what
    assert "optim.lr" in remedy
    assert trivial_warning(float("nan"), 1.3, step=1000)
    narrow = trivial_warning(1.31, 1.3, step=1000, bound=1.25)
    assert "too narrow for a loss below 1.25 (Theorem 1)" in narrow


def test_an_average_that_lags_behind():
    assert lag_warning(0.8, 0.9, decay=0.9999, step=5000) is None
    assert lag_warning(0.9, 0.89, decay=0.9999, step=5000) is None
    what, remedy = lag_warning(1.4, 0.9, decay=0.9999, step=5000).split("\n")
    assert "held-out loss is 1.4, that of the weights as they are now 0.9" in what
    assert "reaches back 10,000 steps, 5,000 are made" in what
    assert "optim.ema=0.998" in remedy
    assert "optim.ema" not in lag_warning(1.4, 0.9, decay=0.9, step=5000)  # a short one lags behind a steep descent
