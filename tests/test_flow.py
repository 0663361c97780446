"""Flow: conversions as inverse pairs, the shift, laws of t by quantiles, losses and trajectories in closed form."""

import math

import pytest
import torch
from devices import Float32Device
from scipy import stats

from rae.diffusion.flow import (
    Flow,
    data_from_velocity,
    interpolate,
    noise_from_velocity,
    shift_factor,
    shift_time,
    velocity_from_data,
    velocity_from_noise,
)
from rae.diffusion.sampling import euler, time_grid

SHAPE = (4, 3, 5, 2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pair():
    """Data, noise, times strictly inside (0, 1), and the point on the path."""
    x, noise, t = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2), torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64)
    return x, noise, t, interpolate(x, noise, t)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- path and conversions --------------------------------------------------------------------------------------------


def test_path_ends_at_data_and_noise():
    x, noise = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    assert torch.equal(interpolate(x, noise, torch.zeros(4, dtype=torch.float64)), x)
    assert torch.equal(interpolate(x, noise, torch.ones(4, dtype=torch.float64)), noise)


def test_velocity_is_the_derivative_of_the_path(pair):
    x, noise, t, _ = pair
    ahead, behind = interpolate(x, noise, t + 1e-3), interpolate(x, noise, t - 1e-3)
    close((ahead - behind) / 2e-3, noise - x, 1e-10)


def test_conversions_agree_with_the_path(pair):
    x, noise, t, x_t = pair
    v = noise - x
    close(data_from_velocity(v, x_t, t), x)
    close(noise_from_velocity(v, x_t, t), noise)
    close(velocity_from_data(x, x_t, t), v, 1e-10)
    close(velocity_from_noise(noise, x_t, t), v, 1e-10)


def test_conversions_are_inverse_pairs_for_any_prediction(pair):
    _, _, t, x_t = pair
    v = draw(*SHAPE, seed=7)  # a network's, not that of any path
    close(velocity_from_data(data_from_velocity(v, x_t, t), x_t, t), v, 1e-10)
    close(velocity_from_noise(noise_from_velocity(v, x_t, t), x_t, t), v, 1e-10)
    # the data and the noise that a velocity implies lie on a path through x_t
    close(interpolate(data_from_velocity(v, x_t, t), noise_from_velocity(v, x_t, t), t), x_t)


# --- shift -----------------------------------------------------------------------------------------------------------


def test_shift_identities():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    a = 6.928
    close(shift_time(t, 1.0), t)
    close(shift_time(shift_time(t, a), 1 / a), t)  # inverse
    close(shift_time(shift_time(t, a), 2.0), shift_time(t, 2 * a))  # shifts compose by multiplying
    close(1 - shift_time(t, a), shift_time(1 - t, 1 / a))  # seen from the data's end
    inner = t[1:-1]
    close(torch.logit(shift_time(inner, a)), torch.logit(inner) + math.log(a), 1e-11)
    assert shift_time(t, a)[0] == 0
    assert shift_time(t, a)[-1] == 1
    assert (shift_time(t, a).diff() > 0).all()


@pytest.mark.parametrize(("shape", "a"), [((768, 16, 16), 6.928), ((768, 32, 32), 13.856), ((16, 16, 16), 1.0)])
def test_published_shifts(shape, a):
    assert shift_factor(math.prod(shape)) == pytest.approx(a, abs=5e-4)
    assert Flow.for_latents(shape).shift == pytest.approx(a, abs=5e-4)


def test_small_latents_are_not_shifted_towards_data():
    assert Flow.for_latents((4, 8, 8)).shift == 1.0


@pytest.mark.parametrize("setting", [{"shift": 0.5}, {"shift": 2.0, "t_max": 1.0}, {"shift": 2.0, "logit_std": 0.0}])
def test_values_that_make_no_sense_are_refused(setting):
    with pytest.raises(ValueError, match=r"shift|t_max|logit_std"):
        Flow(**setting)


# --- laws of t -------------------------------------------------------------------------------------------------------

U = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # quantile levels


@pytest.mark.parametrize("shift", [1.0, 6.928, 13.856])
def test_uniform_law(shift):
    t = Flow(shift=shift).times(U).double()
    # the distribution function of t, at the quantile of level u, is u
    unshifted = shift_time(t, 1 / shift)
    close(torch.from_numpy(stats.uniform(0, 0.999).cdf(unshifted)), U, 2e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.8), (1.0, 2.0)])
@pytest.mark.parametrize("t_max", [0.999, 0.9])
def test_logit_normal_law_is_truncated_not_clamped(mean, std, t_max):
    flow = Flow(shift=1.0, time_law="logit-normal", logit_mean=mean, logit_std=std, t_max=t_max)
    t = flow.times(U).double()
    law = stats.truncnorm(-math.inf, (math.log(t_max / (1 - t_max)) - mean) / std, loc=mean, scale=std)
    close(torch.from_numpy(law.cdf(torch.logit(t).numpy())), U, 2e-6)
    assert (t.diff() > 0).all()  # clamping would pile draws up at t_max


@pytest.mark.parametrize("law", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [1.0, 6.928])
def test_times_stay_within_their_limits(law, shift):
    flow = Flow(shift=shift, time_law=law)
    t = flow.times(torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-53], dtype=torch.float64))
    highest = shift_time(torch.tensor(0.999, dtype=torch.float64), shift).float()
    assert t.dtype == torch.float32
    assert t[0] == 0
    assert (t >= 0).all()
    assert (t <= highest).all()
    torch.testing.assert_close(t[-1], highest)


@pytest.mark.parametrize("law", ["uniform", "logit-normal"])
def test_times_on_a_device_without_float64(law):
    flow, u = Flow(shift=6.928, time_law=law), U.float()
    expected = flow.times(u)
    with Float32Device():
        t = flow.times(u.to("lazy"))
        assert t.device.type == "lazy"
        assert torch.equal(t.cpu(), expected)


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
def test_exact_prediction_costs_nothing_and_a_constant_error_its_square(pair, prediction):
    x, noise, t, x_t = pair
    target = {"v": noise - x, "x": x, "eps": noise}[prediction]
    seen = {}

    def network(*given):
        seen["given"] = given
        return target + torch.tensor([0.0, 0.0, 0.5, -2.0], dtype=torch.float64)[:, None, None, None]

    y = torch.arange(4)
    loss = Flow(shift=1.0, prediction=prediction).loss(network, x, y, t, noise)
    close(loss, torch.tensor([0, 0, 0.25, 4.0], dtype=torch.float64))
    close(seen["given"][0], x_t)
    assert torch.equal(seen["given"][1], t)
    assert torch.equal(seen["given"][2], y)


def gaussian_velocity(mean: torch.Tensor, std: torch.Tensor):
    """E[noise - x | x_t] for data N(mean, diag(std^2)): linear in x_t.

    With s_t^2 = (1-t)^2 std^2 + t^2, the posterior of the noise has mean t r and that of the data mean + (1-t) std^2 r,
    where r = (x_t - (1-t) mean) / s_t^2.
    """

    def velocity(x_t, t, y):
        t = t.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype)
        r = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return t * r - mean - (1 - t) * std**2 * r

    return velocity


def test_loss_of_the_optimum_for_gaussian_data_is_the_conditional_variance():
    """Var(noise - x | x_t) = std^2 / ((1-t)^2 std^2 + t^2): what no network gets below."""
    n, std, t = 200_000, 0.7, 0.6
    x, noise = 0.3 + std * draw(n, 1, 1, 1, seed=3), draw(n, 1, 1, 1, seed=4)
    times = torch.full((n,), t, dtype=torch.float64)
    optimum = gaussian_velocity(torch.tensor(0.3), torch.tensor(std))
    loss = Flow(shift=1.0).loss(optimum, x, times, times, noise)
    expected = std**2 / ((1 - t) ** 2 * std**2 + t**2)
    # the squared error of a Gaussian is expected * chi^2_1, so its mean has this standard error; five of them
    assert loss.mean().item() == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / n))
    worse = Flow(shift=1.0).loss(lambda *a: optimum(*a) * 1.1, x, times, times, noise)
    assert worse.mean() > loss.mean()


@pytest.mark.parametrize("d", [0, 2, 5, 6])
def test_one_image_learnt_through_d_of_n_dimensions_keeps_the_loss_of_theorem_1(d):
    """Theorem 1 for one image, here 0: v = noise = x_t / t, and P x_t / t with rank d is the best of its width."""
    n, count = 6, 50_000
    basis = torch.linalg.qr(draw(n, n, seed=5)).Q[:, :d]
    noise, t = draw(count, n, 1, 1, seed=6), torch.linspace(0.1, 0.9, count, dtype=torch.float64)

    def network(x, t, y):
        return torch.einsum("ij,bjhw->bihw", basis @ basis.T, x) / t[:, None, None, None]

    loss = Flow(shift=1.0).loss(network, torch.zeros_like(noise), t, t, noise).mean()
    # the mean of count (n - d) squared normals has this standard error; five of them
    expected = (n - d) / n
    assert loss.item() == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / max(count * (n - d), 1)) + 1e-12)


# --- velocity of every prediction ------------------------------------------------------------------------------------


def predictions_of(velocity):
    """One oracle, as the three kinds of network that could predict it."""
    return {
        "v": velocity,
        "x": lambda x, t, y: data_from_velocity(velocity(x, t, y), x, t),
        "eps": lambda x, t, y: noise_from_velocity(velocity(x, t, y), x, t),
    }


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
def test_every_prediction_of_one_oracle_gives_its_velocity(prediction):
    oracle = gaussian_velocity(draw(3, 5, 2, seed=8), torch.tensor(0.4))
    flow = Flow(shift=6.928, prediction=prediction)
    x, t, y = draw(*SHAPE, seed=9), torch.tensor([0.01, 0.2, 0.9, 0.9998], dtype=torch.float64), torch.zeros(4)
    close(flow.velocity(predictions_of(oracle)[prediction])(x, t, y), oracle(x, t, y), 1e-9)


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
def test_velocity_beyond_the_training_times_is_that_of_the_nearest(prediction):
    """At t = 0 a prediction of x, at t = 1 one of the noise is x_t itself and says nothing of the velocity."""
    oracle = gaussian_velocity(draw(3, 5, 2, seed=8), torch.tensor(0.4))
    flow = Flow(shift=2.0, prediction=prediction)
    x, t, y = draw(*SHAPE, seed=9), torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=torch.float64), torch.zeros(4)
    first, last = shift_time(torch.tensor([0.001, 0.999], dtype=torch.float64), 2.0).tolist()
    nearest = {"v": t, "x": t.clamp(min=first), "eps": t.clamp(max=last)}[prediction]
    close(flow.velocity(predictions_of(oracle)[prediction])(x, t, y), oracle(x, nearest, y), 1e-9)


@pytest.mark.parametrize("kind", ["points", "calls"])
@pytest.mark.parametrize("prediction", ["x", "eps"])
def test_every_prediction_of_one_oracle_gives_the_same_samples(prediction, kind):
    oracle = gaussian_velocity(draw(3, 5, 2, seed=8), torch.tensor(0.4))
    flow = Flow(shift=3.0, prediction=prediction)
    x, y, times = draw(*SHAPE, seed=9), torch.zeros(4), time_grid(20, flow.shift, kind)
    *_, expected = euler(oracle, x, y, times)
    *_, z = euler(flow.velocity(predictions_of(oracle)[prediction]), x, y, times)
    # noise at t = 1 is only asked for at the last training time: the one difference
    close(z, expected, 1e-3 if prediction == "eps" else 1e-6)
