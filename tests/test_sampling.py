"""Time grids, and samplers against equations with known solutions."""

import math
from itertools import pairwise

import pytest
import torch
from devices import Float32Device

from rae.diffusion.flow import shift_time
from rae.diffusion.sampling import (
    ODE_SAMPLERS,
    SDE_SAMPLERS,
    diffusion_coefficient,
    dopri5,
    euler,
    euler_maruyama,
    heun,
    heun_sde,
    last_step,
    score_from_velocity,
    time_grid,
)

MEAN, STD = 0.5, 0.6  # of the Gaussian data below


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(t):
    """Standard deviation of x_t for data N(MEAN, STD^2)."""
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def gaussian_velocity(x, t, y):
    """E[noise - x | x_t] for data N(MEAN, STD^2)."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return ((t - (1 - t) * STD**2) / spread(t) ** 2) * (x - (1 - t) * MEAN) - MEAN


def gaussian_solution(x, t):
    """Where the ODE carries x from time 1 to t: (x_t - mean_t) / spread_t stays what it is."""
    return (1 - t) * MEAN + spread(t) * x


def counted(velocity):
    calls = []

    def count(x, t, y):
        calls.append(t.clone())
        return velocity(x, t, y)

    return count, calls


def run(sampler, *args, **settings):
    return list(sampler(*args, **settings))


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 6.928])
def test_the_two_grids(shift):
    points, calls = time_grid(50, shift, "points"), time_grid(50, shift, "calls")
    assert (len(points), len(calls)) == (50, 51)
    assert points[0] == calls[0] == 1
    assert calls[-1] == 0
    torch.testing.assert_close(points[-1], shift_time(torch.tensor(0.001), shift))
    for grid in (points, calls):
        assert (grid.diff() < 0).all()
        steps = shift_time(grid.double(), 1 / shift).diff()  # even before the shift
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-3, atol=1e-6)


def test_published_last_point():
    assert time_grid(50, math.sqrt(48), "points")[-1].item() == pytest.approx(0.0069, abs=5e-5)
    assert time_grid(50, 1.0, "points", last=0.04)[-1].item() == pytest.approx(0.04)


@pytest.mark.parametrize(("steps", "kind"), [(1, "points"), (0, "calls"), (-3, "calls"), (50, "point")])
def test_grids_that_make_no_sense_are_refused(steps, kind):
    with pytest.raises(ValueError, match="grid"):
        time_grid(steps, 1.0, kind)


@pytest.mark.parametrize(("sampler", "per_step"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize(("kind", "steps"), [("points", 49), ("calls", 50)])
def test_states_and_calls(sampler, per_step, kind, steps):
    velocity, calls = counted(gaussian_velocity)
    times = time_grid(50, 6.928, kind)
    states = run(sampler, velocity, normal(2, 3), torch.zeros(2), times)
    assert len(states) == len(times) == steps + 1
    assert len(calls) == per_step * steps
    assert torch.equal(states[0], normal(2, 3))
    asked = torch.stack(calls)[:, 0].float()
    torch.testing.assert_close(asked, torch.stack([times[:-1], times[1:]], 1)[:, :per_step].flatten())


# --- ordinary differential equation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(sampler, order):
    x, errors = normal(4, 5), []
    for steps in (80, 160, 320):
        *_, z = sampler(gaussian_velocity, x, torch.zeros(4), time_grid(steps, 2.0, "calls").double())
        errors.append((z - gaussian_solution(x, 0.0)).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.15)


def test_dopri5_reaches_its_tolerance_at_every_point_of_the_grid():
    x, times = normal(4, 5), time_grid(7, 3.0, "calls").double()
    errors = {}
    for rtol in (1e-3, 1e-6, 1e-9):
        states = run(dopri5, gaussian_velocity, x, torch.zeros(4), times, rtol=rtol, atol=rtol)
        assert len(states) == len(times)
        errors[rtol] = max((z - gaussian_solution(x, t.item())).abs().max().item() for z, t in zip(states, times))
        assert errors[rtol] < 20 * rtol
    assert errors[1e-9] < errors[1e-6] < errors[1e-3]


def test_dopri5_is_of_fifth_order():
    """One trial step of length h from t = 0.9: the error falls by 2^6 with h, that of a fifth-order method."""
    from rae.diffusion.sampling import _dopri5_step

    x, t = normal(1, 5), torch.tensor([0.9], dtype=torch.float64)
    start = gaussian_solution(x, 0.9)
    errors = []
    for h in (0.1, 0.05):
        slope = gaussian_velocity(start, t, None)
        z, slope_there, _ = _dopri5_step(gaussian_velocity, start, t, slope, t, t.new_tensor([h]), 1e-5, 1e-5)
        torch.testing.assert_close(slope_there, gaussian_velocity(z, t - h, None))
        errors.append((z - gaussian_solution(x, 0.9 - h)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(6, abs=0.7)


def test_dopri5_samples_do_not_see_each_other():
    """A stiff neighbour takes more steps of its own and changes nothing for the others."""

    def velocity(x, t, y):
        return gaussian_velocity(x, t, y) + y[:, None] * torch.sin(40 * y[:, None] * t[:, None])

    x, y, times = normal(4, 5), torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64), time_grid(5, 2.0).double()
    *_, together = dopri5(velocity, x, y, times)
    for i in range(4):
        *_, alone = dopri5(velocity, x[i : i + 1], y[i : i + 1], times)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-13, atol=1e-13)


def test_dopri5_spends_calls_where_they_are_needed():
    calls = {}
    for frequency in (0.0, 60.0):
        velocity, calls[frequency] = counted(lambda x, t, y, f=frequency: torch.cos(f * t)[:, None] + 0 * x)
        *_, z = dopri5(velocity, torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1), torch.tensor([1.0, 0.0]))
        expected = -math.sin(frequency) / frequency if frequency else -1.0
        assert z.item() == pytest.approx(expected, abs=1e-4)
    assert len(calls[60.0]) > 3 * len(calls[0.0])


def test_dopri5_asks_six_times_a_step_and_never_twice_at_one_point():
    asked = []

    def velocity(x, t, y):
        asked.append((t.item(), x.flatten().tolist()))
        return torch.sin(60 * t)[:, None] * gaussian_velocity(x, t, y)  # some steps are rejected

    x, times = normal(1, 3), torch.tensor([1.0, 0.6, 0.0])
    list(dopri5(velocity, x, torch.zeros(1), times, rtol=1e-6))
    assert len(asked) % 6 == 1
    points = [(t, *x) for t, x in asked]
    assert len(points) == len(set(points)) > 100


def test_dopri5_on_a_device_without_float64():
    x, y = normal(3, 5).float(), torch.zeros(3)
    *_, expected = dopri5(gaussian_velocity, x, y, time_grid(3, 1.5))
    with Float32Device():
        *_, z = dopri5(gaussian_velocity, x.to("lazy"), y.to("lazy"), time_grid(3, 1.5))
        torch.testing.assert_close(z.cpu(), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dopri5_stops_at_a_velocity_that_is_not_finite(bad):
    def velocity(x, t, y):
        # the second sample's velocity breaks below t = 0.5
        return torch.where((t < 0.5)[:, None] & (y == 1)[:, None], bad, gaussian_velocity(x, t, y))

    with pytest.raises(FloatingPointError, match=r"not finite near t = 0\.[56]"):
        run(dopri5, velocity, normal(2, 3), torch.tensor([0, 1]), time_grid(3, 1.0, "calls"))


def test_samplers_build_no_graph():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    for sampler in (euler, heun, dopri5):
        *_, z = sampler(lambda x, t, y: weight * x, normal(2, 3), torch.zeros(2), torch.tensor([1.0, 0.5, 0.0]))
        assert not z.requires_grad
        assert torch.is_grad_enabled()


# --- Gaussian data ---------------------------------------------------------------------------------------------------


def assert_gaussian(z, mean, std, bias=0.0):
    """Mean and standard deviation of draws within five standard errors, and the sampler's own error `bias`."""
    n = z.numel()
    assert z.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(n) + bias)
    assert z.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * n) + bias)


@pytest.mark.parametrize(("sampler", "bias"), [("euler", 0.01), ("heun", 1e-3), ("dopri5", 1e-4)])
def test_ode_samples_gaussian_data(sampler, bias):
    times = time_grid(100, 2.0, "calls")
    *_, z = ODE_SAMPLERS[sampler](gaussian_velocity, normal(20_000, 1), torch.zeros(20_000), times)
    assert_gaussian(z, MEAN, STD, bias)


@pytest.mark.parametrize("form", ["sigma", "linear", "decreasing"])
@pytest.mark.parametrize("sampler", ["euler-maruyama", "heun-sde"])
def test_sde_keeps_every_marginal_of_gaussian_data(sampler, form):
    count, times = 20_000, time_grid(100, 1.0, "points", last=0.04)
    noise = (normal(count, 1, seed=k + 1) for k in range(99))
    states = run(
        SDE_SAMPLERS[sampler], gaussian_velocity, normal(count, 1), torch.zeros(count), times, noise, form=form
    )
    for k in (25, 50, 75, 99):
        t = times[k].item()
        assert_gaussian(states[k], (1 - t) * MEAN, spread(t), bias=0.015)
    # randomness came in on the way: the same start ends elsewhere than the ODE takes it
    assert (states[-1] - gaussian_solution(states[0], 0.04)).std() > 0.1
    z = last_step(gaussian_velocity, states[-1], torch.zeros(count), 0.04, form=form)
    assert_gaussian(z, MEAN, STD, bias=0.02)


def test_sde_without_diffusion_is_the_ode(monkeypatch):
    monkeypatch.setattr("rae.diffusion.sampling.diffusion_coefficient", lambda form, t: 0.0)
    x, y, times = normal(3, 4), torch.zeros(3), time_grid(10, 2.0)
    for stochastic, plain in ((euler_maruyama, euler), (heun_sde, heun)):
        noise = (normal(3, 4, seed=k) for k in range(9))
        states = zip(stochastic(gaussian_velocity, x, y, times, noise), plain(gaussian_velocity, x, y, times))
        for a, b in states:
            torch.testing.assert_close(a, b)


def test_score_is_that_of_the_marginal():
    x = normal(6, 1)
    for t in (0.1, 0.5, 1.0):
        v = gaussian_velocity(x, x.new_full((6,), t), None)
        torch.testing.assert_close(score_from_velocity(v, x, t), -(x - (1 - t) * MEAN) / spread(t) ** 2)


def test_last_steps():
    x, t, y = normal(4, 3), 0.04, torch.zeros(4)
    v = gaussian_velocity(x, x.new_full((4,), t), y)
    score = -(x - (1 - t) * MEAN) / spread(t) ** 2
    expected = {
        "none": x,
        "euler": x - v * t,
        "mean": x - (v - t * score) * t,
        "tweedie": MEAN + (1 - t) * STD**2 / spread(t) ** 2 * (x - (1 - t) * MEAN),  # E[x | x_t]
    }
    for kind, z in expected.items():
        torch.testing.assert_close(last_step(gaussian_velocity, x, y, t, kind), z)
    with pytest.raises(ValueError, match=r"'Mean'.*'mean'"):
        last_step(gaussian_velocity, x, y, t, "Mean")


def test_diffusion_coefficients():
    assert diffusion_coefficient("sigma", 0.3) == diffusion_coefficient("linear", 0.3) == 0.3
    assert [diffusion_coefficient("decreasing", t) for t in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.25, 1])
    with pytest.raises(ValueError, match=r"'SBDM'.*'sigma'"):
        diffusion_coefficient("SBDM", 0.5)


@pytest.mark.parametrize("sampler", [euler_maruyama, heun_sde])
def test_too_little_noise_does_not_end_a_sampler_early(sampler):
    with pytest.raises(ValueError, match="zip"):
        run(sampler, gaussian_velocity, normal(2, 3), torch.zeros(2), time_grid(5, 1.0), iter([normal(2, 3)] * 3))
