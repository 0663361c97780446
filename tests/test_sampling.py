"""Samplers against equations with known solutions; `generate` image by image."""

import math
from itertools import pairwise

import pytest
import torch
from devices import Float32Device

from rae.diffusion.dit import DiTConfig
from rae.diffusion.flow import Flow, shift_time
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.model import DiffusionModel, DiffusionModelConfig
from rae.diffusion.sampling import (
    ODE_SAMPLERS,
    SDE_SAMPLERS,
    diffusion_coefficient,
    dopri5,
    euler,
    euler_maruyama,
    generate,
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


# --- generate --------------------------------------------------------------------------------------------------------

NAMES = ("cat", "dog", "bird")
LATENTS = (4, 2, 3)


class Autoencoder(torch.nn.Module):
    """What `generate` asks of an RAE, with a decoder that has trainable weights."""

    latent_shape, latent_identity = LATENTS, "a" * 64

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 4))

    def decode(self, z):
        return torch.einsum("ic,bchw->bihw", self.weight, z)


def small_model(seed=0, *, classes=3, names=NAMES, identity="a" * 64, latents=LATENTS, **flow) -> DiffusionModel:
    channels, *grid = latents
    network = DiTConfig(in_channels=channels, grid=tuple(grid), width=16, heads=2, depth=1, num_classes=classes)
    config = DiffusionModelConfig(
        network=network, flow=Flow(shift=1.5, **flow), latent_identity=identity, class_names=names
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = DiffusionModel(config)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def autoencoder():
    return Autoencoder()


@pytest.fixture
def model():
    return small_model()


def collect(batches):
    return tuple(torch.cat(part) for part in zip(*batches))


@pytest.mark.parametrize("sampler", [*ODE_SAMPLERS, *SDE_SAMPLERS])
@pytest.mark.parametrize("guidance", [None, "cfg", "autoguidance"])
def test_an_image_depends_on_its_seed_and_label_only(model, autoencoder, sampler, guidance):
    guide = {None: None, "cfg": CFG(2.0, 0.1, 0.9), "autoguidance": AutoGuidance(small_model(1), 1.5)}[guidance]
    settings = {"steps": 5, "sampler": sampler, "guidance": guide}
    labels, seeds = [0, 2, 1, 1, 0], [11, 7, 7, 2**32 - 1, 0]
    images, latents, y, s = collect(generate(model, autoencoder, labels, seeds, batch_size=5, **settings))
    assert images.shape == (5, 3, 2, 3)
    assert latents.shape == (5, *LATENTS)
    assert (y.tolist(), s.tolist()) == (labels, seeds)
    assert images.isfinite().all()
    order = [3, 1, 4, 0, 2]
    batches = list(
        generate(model, autoencoder, [labels[i] for i in order], [seeds[i] for i in order], batch_size=2, **settings)
    )
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    other_images, other_latents, *_ = collect(batches)
    # rounding differs with the batch; in dopri5 it may decide on another step, within the sampler's tolerance
    tolerance = 0.01 if sampler == "dopri5" else 1e-4
    torch.testing.assert_close(other_latents, latents[order], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(other_images, images[order], rtol=tolerance, atol=tolerance)
    assert not torch.isclose(images[1], images[2], atol=1e-3).all()  # same seed, another class
    assert not torch.isclose(images[2], images[3], atol=1e-3).all()  # same class, another seed


def test_generate_is_what_its_parts_are(model, autoencoder):
    (batch,) = generate(model, autoencoder, [1, 2], [5, 6], steps=4, grid="calls", guidance=CFG(2.0))
    x = torch.stack([torch.randn(LATENTS, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    *_, z = euler(CFG(2.0).wrap(model), x, torch.tensor([1, 2]), time_grid(4, 1.5, "calls"))
    torch.testing.assert_close(batch.latents, z)
    torch.testing.assert_close(batch.images, autoencoder.decode(z).detach())


def test_dopri5_takes_the_end_of_the_grid_alone(model, autoencoder, monkeypatch):
    seen, calls = [], []
    monkeypatch.setitem(ODE_SAMPLERS, "dopri5", lambda *args: seen.append(args[3].tolist()) or dopri5(*args))
    monkeypatch.setattr(model.network, "forward", counted(model.network.forward)[0])
    forward = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda *a, **k: calls.append(1) or forward(*a[:3]))
    (few,) = generate(model, autoencoder, [1], [5], steps=2, sampler="dopri5")
    used, calls[:] = len(calls), []
    (many,) = generate(model, autoencoder, [1], [5], steps=50, sampler="dopri5")
    assert torch.equal(few.latents, many.latents)
    assert seen == [[1.0, time_grid(50, 1.5)[-1].item()]] * 2
    assert len(calls) == used


@pytest.mark.parametrize("sampler", ["euler", "heun", *SDE_SAMPLERS])
@pytest.mark.parametrize("prediction", ["v", "x"])
def test_a_device_needs_no_float64(autoencoder, sampler, prediction):
    settings = {"steps": 4, "sampler": sampler, "guidance": CFG(1.5, 0.1, 0.9)}
    model = small_model(prediction=prediction)
    (expected,) = generate(model, autoencoder, [0, 2], [0, 1], **settings)
    with Float32Device():
        model, autoencoder = model.to("lazy"), autoencoder.to("lazy")
        (batch,) = generate(model, autoencoder, [0, 2], [0, 1], **settings)
        assert batch.latents.device.type == "lazy"
        torch.testing.assert_close(batch.latents.cpu(), expected.latents, rtol=0.01, atol=0.01)  # other kernels


def test_generate_touches_no_global_state(model, autoencoder):
    state = torch.get_rng_state()
    batches = generate(model, autoencoder, [0, 1], [0, 1], steps=3, sampler="euler-maruyama", batch_size=1)
    first = next(batches)
    assert torch.is_grad_enabled()
    assert not first.images.requires_grad
    assert not next(batches).latents.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_names_of_classes_and_of_none(model, autoencoder):
    by_name = collect(generate(model, autoencoder, ["dog", "cat"], [0, 1], steps=3))
    by_index = collect(generate(model, autoencoder, [1, 0], range(2), steps=3))
    assert all(torch.equal(a, b) for a, b in zip(by_name, by_index))
    without = collect(generate(model, autoencoder, None, range(2), steps=3))
    assert without[2].tolist() == [3, 3]
    assert not torch.allclose(without[0], by_index[0])


def test_an_unconditional_model(autoencoder):
    model = small_model(classes=0, names=None)
    weak = AutoGuidance(small_model(1, classes=0, names=None), 1.5)
    images, *_ = collect(generate(model, autoencoder, None, range(3), steps=3, guidance=weak))
    assert images.isfinite().all()
    with pytest.raises(ValueError, match=r"unconditional.*labels=None"):
        generate(model, autoencoder, [0], [0])


@pytest.mark.parametrize(
    ("labels", "seeds", "settings", "message"),
    [
        ([3], [0], {}, r"class 3.*0\.\.2"),
        ([-1], [0], {}, r"class -1.*0\.\.2"),
        (["dgo"], [0], {}, "'dgo'.*did you mean 'dog'"),
        ("dog", [0, 1, 2], {}, "'dog' is one string"),
        ([0, 1], [0], {}, "2 labels and 1 seeds"),
        ([0], [-1], {}, "seed -1"),
        ([0], [2**32], {}, "seed 4294967296"),  # torch's generator takes it for 0
        ([0], [0], {"sampler": "eular"}, "'eular'.*euler, heun, dopri5, euler-maruyama, heun-sde"),
        ([0], [0], {"grid": "call"}, "'call'"),
        ([0], [0], {"grid": "calls", "sampler": "heun-sde"}, "'heun-sde'.*'points'.*'calls'"),
        ([0], [0], {"steps": 1}, "1 steps"),
        ([0], [0], {"batch_size": 0}, "batch_size 0"),
        (None, [0], {"guidance": CFG(2.0)}, "CFG.*AutoGuidance"),
        ([], [], {}, "no seeds"),
        # 4 points, shifted by 1.5, are 1, 0.75, 0.43 and 0.0015; Euler does not ask at the last one
        ([0], [0], {"steps": 4, "guidance": CFG(2.0, 0.5, 0.7)}, r"none of the 3 times.*\[0.5, 0.7\].*0.75"),
        ([0], [0], {"steps": 4, "guidance": CFG(2.0, 0.0, 0.4)}, r"none of the 3 times.*\[0.0, 0.4\].*0.4293"),
        ([0], [0], {"steps": 4, "sampler": "heun", "guidance": CFG(2.0, 0.1, 0.4)}, "none of the 4 times"),
        ([0], [0], {"steps": 4, "guidance": AutoGuidance(None, 2.0, 0.5, 0.7)}, "NoneType.*must be a DiffusionModel"),
        ([0], [0], {"guidance": 2.0}, r"guidance 2.0 is none; give CFG\(scale"),
        ([0], [0], {"guidance": 0}, "guidance 0 is none"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_the_call(model, autoencoder, labels, seeds, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        generate(model, autoencoder, labels, seeds, **settings)  # before any batch is asked for


def test_an_interval_that_holds_one_time_is_taken(model, autoencoder):
    plain, *others = (
        next(generate(model, autoencoder, [0], [0], steps=4, sampler=sampler, guidance=guidance)).latents
        for sampler in ("heun", "dopri5")
        for guidance in (None, CFG(3.0, 0.0, 0.4), CFG(3.0, 0.5, 0.7))
        if (sampler, guidance) != ("heun", CFG(3.0, 0.5, 0.7))
    )
    assert not any(torch.equal(plain, other) for other in others)


def test_dopri5_refuses_models_that_round(model, autoencoder):
    rounded = small_model()
    rounded.dtype = torch.bfloat16
    for arguments in ((rounded, None), (model, AutoGuidance(rounded, 1.5))):
        with pytest.raises(ValueError, match=r"dopri5 with a model in torch.bfloat16.*dtype=torch.float32"):
            generate(arguments[0], autoencoder, [0], [0], sampler="dopri5", guidance=arguments[1])


def test_a_model_that_never_learnt_to_do_without_labels(autoencoder):
    def with_drop_labels(p, **settings):
        model = small_model(**settings)
        model.config = model.config.model_copy(update={"drop_labels": p})
        return model

    model = with_drop_labels(0.0)
    with pytest.raises(ValueError, match=r"drop_labels 0.*CFG needs; use AutoGuidance"):
        generate(model, autoencoder, [0], [0], guidance=CFG(2.0))
    with pytest.raises(ValueError, match=r"drop_labels 0.*give labels"):
        generate(model, autoencoder, None, [0])
    generate(model, autoencoder, [0], [0], guidance=AutoGuidance(small_model(1), 2.0))
    for p in (None, 0.1):
        generate(with_drop_labels(p), autoencoder, [0], [0], guidance=CFG(2.0))
    generate(with_drop_labels(0.0, classes=0, names=None), autoencoder, None, [0])


@pytest.mark.parametrize("arguments", [([1.5], [0]), ([0], [0.5])])
def test_labels_and_seeds_are_integers(model, autoencoder, arguments):
    with pytest.raises(TypeError, match="integer"):
        generate(model, autoencoder, *arguments)


@pytest.mark.parametrize("what", ["model", "weak"])
def test_another_latent_space_is_refused(model, autoencoder, what):
    for stranger, message in (
        (small_model(identity="b" * 64), "bbbbbbbbbbbb.*aaaaaaaaaaaa"),
        (small_model(latents=(4, 3, 2)), r"\(4, 2, 3\).*\(4, 3, 2\)"),
    ):
        arguments = (stranger, None) if what == "model" else (model, AutoGuidance(stranger, 1.5))
        with pytest.raises(ValueError, match=message):
            generate(arguments[0], autoencoder, [0], [0], guidance=arguments[1])


@pytest.mark.parametrize(
    ("weak", "message"),
    [
        ({"classes": 5, "names": None}, "5 classes.* 3"),
        ({"names": ("cat", "bird", "dog")}, "'bird'.*'dog'"),
    ],
)
def test_a_guiding_model_of_other_classes_is_refused(model, autoencoder, weak, message):
    with pytest.raises(ValueError, match=message):
        generate(model, autoencoder, [0], [0], guidance=AutoGuidance(small_model(**weak), 1.5))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5"])
@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
@pytest.mark.parametrize("grid", ["points", "calls"])
def test_every_prediction_ends_finite_on_either_grid(autoencoder, sampler, prediction, grid):
    model = small_model(prediction=prediction)
    images, *_ = collect(generate(model, autoencoder, [0, 1], [0, 1], steps=4, grid=grid, sampler=sampler))
    assert images.isfinite().all()
