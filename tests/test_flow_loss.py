"""Held-out loss by time: the trivial predictor against Monte Carlo and least squares, the width bound against the best
low-rank map, the estimator against the loss written out."""

import pytest
import torch
from scipy import integrate

from rae.data.order import noise_draws
from rae.diffusion.dit import DiTConfig, patchify
from rae.diffusion.flow import Flow, interpolate, shift_time
from rae.diffusion.model import DiffusionModel, DiffusionModelConfig
from rae.evaluation.flow_loss import (
    in_bins,
    latent_moments,
    loss_by_time,
    mean_trivial_loss,
    trivial_loss,
    width_bound,
)

ONE = torch.ones(1, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target(prediction: str, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return {"v": noise - x, "x": x, "eps": noise}[prediction]


# --- the trivial predictor -------------------------------------------------------------------------------------------


def test_trivial_loss_of_standardised_latents_is_one_at_both_ends_and_two_in_the_middle():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    expected = 1 / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(trivial_loss(t, ONE), expected.double())
    assert trivial_loss(t, ONE).tolist() == [1.0, 1.6, 2.0, 1.6, 1.0]


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
@pytest.mark.parametrize(("t", "std"), [(0.1, 1.0), (0.5, 0.4), (0.9, 2.5)])
def test_trivial_loss_is_what_least_squares_leaves(t, std, prediction):
    """Whatever the law of the data: here it is far from normal, with a mean of its own."""
    n = 400_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, noise = 3 + std * 12**0.5 * (uniform - 0.5), draw(n, seed=2)
    inputs = torch.stack([(1 - t) * x + t * noise, torch.ones(n, dtype=torch.float64)], dim=1)
    wanted = target(prediction, x, noise)[:, None]
    left = (inputs @ torch.linalg.lstsq(inputs, wanted).solution - wanted).square().mean().item()
    assert trivial_loss(torch.tensor([t]), ONE * std**2, prediction).item() == pytest.approx(left, rel=0.01)


def test_no_function_of_one_number_does_better_on_gaussian_data():
    """The conditional mean of v, estimated in narrow bins of x_t, leaves what the formula says."""
    n, t, std = 400_000, 0.3, 0.6
    x, noise = std * draw(n, seed=3), draw(n, seed=4)
    x_t, v = (1 - t) * x + t * noise, noise - x
    groups = v[x_t.argsort()].view(2000, -1)
    left = groups.var(dim=1).mean().item()
    assert trivial_loss(torch.tensor([t]), ONE * std**2).item() == pytest.approx(left, rel=0.01)


def test_trivial_loss_is_the_mean_over_features():
    t, variance = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 1.0, 2.0])
    apart = torch.stack([trivial_loss(t, v[None]) for v in variance])
    torch.testing.assert_close(trivial_loss(t, variance), apart.mean(0))


@pytest.mark.parametrize("shift", [1.0, 6.928])
def test_mean_trivial_loss_is_the_integral_over_the_law_of_t(shift):
    flow, variance = Flow(shift=shift), torch.tensor([0.5, 1.5])

    def at(u: float) -> float:
        t = shift_time(0.999 * u, shift)
        return sum(s2 / ((1 - t) ** 2 * s2 + t**2) for s2 in (0.5, 1.5)) / 2

    assert mean_trivial_loss(flow, variance) == pytest.approx(integrate.quad(at, 0, 1)[0], rel=1e-6)


def test_mean_trivial_loss_takes_the_flows_law_and_prediction():
    logit, x = Flow(shift=1.0, time_law="logit-normal"), Flow(shift=1.0, prediction="x")
    uniform = mean_trivial_loss(Flow(shift=1.0), ONE)
    assert mean_trivial_loss(logit, ONE) > uniform  # more times in the middle
    t = (torch.arange(10_000) + 0.5) / 10_000 * 0.999
    assert mean_trivial_loss(x, ONE) == pytest.approx((t**2 / ((1 - t) ** 2 + t**2)).mean().item(), rel=1e-4)


# --- Theorem 1 -------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_tokens():
    latents = draw(5, 3, 4, 2)
    for patch in (1, 2):
        tokens = patchify(latents, patch).reshape(-1, 3 * patch**2)
        moments = latent_moments(latents.float(), patch)
        torch.testing.assert_close(moments.mean, tokens.mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(moments.covariance, tokens.T.cov(correction=0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(moments.variance, tokens.var(0, correction=0), atol=1e-6, rtol=1e-6)
    assert latent_moments(draw(1, 3, 1, 1)).variance.tolist() == [0, 0, 0]  # one token will do


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_width_bound_is_what_the_best_map_of_that_rank_leaves(prediction, width):
    """The target itself, projected on its own d principal components about its mean: nothing with d of them is nearer,
    whatever it is computed from."""
    n, count = 6, 100_000
    x = draw(count, n, seed=1) @ draw(n, n, seed=2) * 0.5 + 2
    noise = draw(count, n, seed=3)
    wanted = target(prediction, x, noise)
    centred = wanted - wanted.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    plane = components[:width]
    left = (centred - centred @ plane.T @ plane).square().mean().item()
    bound = width_bound(x.T.cov(correction=0), width, prediction)
    assert bound == pytest.approx(left, rel=0.02)
    other = torch.linalg.qr(draw(n, width, seed=4)).Q.T  # another plane leaves no less
    assert (centred - centred @ other.T @ other).square().mean() >= left


def test_width_bound_of_the_paper():
    """(n - d) / n for one image at least, and nothing for a network that is wide enough."""
    covariance = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0]))
    assert width_bound(covariance, 2) == pytest.approx(2 / 4)  # lambda of noise - x: 3, 2, 1, 1
    assert width_bound(covariance, 1) == pytest.approx((2 + 1 + 1) / 4)
    assert width_bound(covariance, 4) == width_bound(covariance, 9) == 0.0
    assert width_bound(torch.zeros(4, 4), 1) == pytest.approx((4 - 1) / 4)


# --- the estimator ---------------------------------------------------------------------------------------------------

SHAPE = (4, 3, 3)


def model_of(seed: int, prediction: str = "v") -> DiffusionModel:
    torch.manual_seed(seed)
    network = DiTConfig(in_channels=4, grid=(3, 3), width=8, heads=2, depth=1, num_classes=3)
    model = DiffusionModel(DiffusionModelConfig(network=network, flow=Flow(shift=2.0, prediction=prediction)))
    for parameter in model.network.final.parameters():  # a fresh network says 0
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def held_out(count: int, batch: int):
    latents, labels = draw(count, *SHAPE).float(), torch.arange(count) % 3
    for start in range(0, count, batch):
        part = slice(start, min(start + batch, count))
        yield latents[part], labels[part], list(range(count))[part]


def test_loss_under_the_law_of_the_run_is_the_flow_loss_written_out():
    model, online = model_of(0), model_of(1)
    found = loss_by_time(model, held_out(20, 8), count=20, seed=7, online=online)
    ((x, y, images),) = held_out(20, 20)
    noise, u = noise_draws(images, 7, SHAPE)
    for network, loss in ((model, found.loss), (online, found.online)):
        assert loss == pytest.approx(network.flow.loss(network.predict, x, y, model.flow.times(u[:, 0]), noise).mean())
    assert loss_by_time(model, held_out(20, 8), count=20, seed=7).online is None


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
def test_losses_by_time_are_those_at_their_times(prediction):
    model = model_of(0, prediction)
    found = loss_by_time(model, held_out(90, 90), count=90, seed=7)
    ((x, y, images),) = held_out(90, 90)
    noise = torch.cat([noise_draws(images, seed, SHAPE)[0] for seed in (7, 8)])
    x, y = torch.cat([x, x]), torch.cat([y, y])
    x_t = interpolate(x, noise, found.times)
    expected = (model.predict(x_t, found.times, y) - target(prediction, x, noise)).square().mean((1, 2, 3))
    torch.testing.assert_close(found.losses, expected)
    means = in_bins(found.times, found.losses)
    inside = (found.times >= 0.3) & (found.times < 0.4)
    assert means[0.3] == pytest.approx(expected[inside].mean().item(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 7, 16, 80, 101, 256])
def test_times_fill_the_bins_evenly_however_many_images(count):
    found = loss_by_time(model_of(0), held_out(count, 64), count=count, seed=0)
    filled = torch.histc(found.times, 10, 0, 1)
    assert len(found.times) == max(1, -(-160 // count)) * count
    assert filled.min() >= 14
    assert filled.max() - filled.min() <= 3
    assert list(in_bins(found.times, found.losses)) == [b / 10 for b in range(10)]


def test_batches_do_not_change_what_is_found():
    whole, parts = (loss_by_time(model_of(0), held_out(24, batch), count=24, seed=3) for batch in (24, 5))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    expected, found = (in_bins(result.times, result.losses) for result in (whole, parts))
    assert found == pytest.approx(expected, rel=1e-5)


def test_figures_stand_beside_what_they_are_measured_by():
    model = model_of(0)
    latents = torch.cat([batch[0] for batch in held_out(40, 40)])
    moments = latent_moments(latents)
    found = loss_by_time(model, held_out(40, 40), count=40, seed=0)
    figures = found.figures(model.config, moments)
    assert figures["trivial_loss"] == mean_trivial_loss(model.flow, moments.variance)
    assert len([name for name in figures if name.startswith("held_out_loss/0.")]) == 10
    bin_times = found.times[(found.times >= 0.5) & (found.times < 0.6)]
    assert figures["trivial_loss/0.5"] == pytest.approx(trivial_loss(bin_times, moments.variance).mean().item())
    assert "width_bound" not in figures  # 8 wide for 4 channels
    assert "held_out_loss_online" not in figures
    narrow = model.config.network.model_copy(update={"width": 3})
    config = model.config.model_copy(update={"network": narrow})
    assert found.figures(config, moments)["width_bound"] == width_bound(moments.covariance, 3) > 0


def test_the_best_linear_network_reaches_the_trivial_loss_by_time():
    """Gaussian latents and the network that computes the conditional mean: ratio one in every bin."""
    model = model_of(0)

    def optimum(x, t, y, **_):
        t = t.reshape(-1, 1, 1, 1)
        return x * (t - (1 - t)) / ((1 - t) ** 2 + t**2)

    model.network.forward = optimum
    shape = (4, 3, 3)
    latents = draw(4000, *shape, seed=9).float()
    batches = [(latents, torch.zeros(4000, dtype=torch.int64), range(4000))]
    figures = loss_by_time(model, batches, count=4000, seed=1).figures(model.config, latent_moments(latents))
    for low in range(10):
        assert figures[f"held_out_loss/0.{low}"] == pytest.approx(figures[f"trivial_loss/0.{low}"], rel=0.05)
    assert figures["held_out_loss"] == pytest.approx(figures["trivial_loss"], rel=0.02)
