"""Guidance: its formula, where it acts, and that a step passes as many samples through the networks as it must."""

import pytest
import torch

from rae.diffusion.guidance import CFG, AutoGuidance, drop_labels


class Counted:
    """An analytic velocity that counts the samples passed through it; every sample's depends on its x, t and y."""

    null_label = 10

    def __init__(self, slope: float = 1.0):
        self.slope, self.calls = slope, []

    def __call__(self, x, t, y):
        self.calls.append(len(x))
        return self.slope * x * (1 + y.to(x))[:, None, None, None] + t[:, None, None, None]


@pytest.fixture
def batch():
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.tensor([3, 0, 7, 2])


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def null(y):
    return torch.full_like(y, Counted.null_label)


EVERYWHERE = times(0.0, 0.3, 0.7, 1.0)


def test_cfg_formula(batch):
    x, y = batch
    v, v_null = Counted()(x, EVERYWHERE, y), Counted()(x, EVERYWHERE, null(y))
    torch.testing.assert_close(CFG(2.5).wrap(Counted())(x, EVERYWHERE, y), v_null + 2.5 * (v - v_null))


def test_autoguidance_formula_keeps_the_class(batch):
    x, y = batch
    v, v_weak = Counted()(x, EVERYWHERE, y), Counted(0.5)(x, EVERYWHERE, y)
    guided = AutoGuidance(Counted(0.5), 1.42).wrap(Counted())(x, EVERYWHERE, y)
    torch.testing.assert_close(guided, v_weak + 1.42 * (v - v_weak))


def test_scales_zero_and_one(batch):
    x, y = batch
    v, v_null, v_weak = (
        Counted()(x, EVERYWHERE, y),
        Counted()(x, EVERYWHERE, null(y)),
        Counted(0.5)(x, EVERYWHERE, y),
    )
    for guidance in (CFG(1.0), AutoGuidance(Counted(0.5), 1.0)):  # at 1 it is the model itself, at its cost
        model = Counted()
        assert torch.equal(guidance.wrap(model)(x, EVERYWHERE, y), v)
        assert model.calls == [4]
    torch.testing.assert_close(CFG(0.0).wrap(Counted())(x, EVERYWHERE, y), v_null)
    torch.testing.assert_close(AutoGuidance(Counted(0.5), 0.0).wrap(Counted())(x, EVERYWHERE, y), v_weak)


@pytest.mark.parametrize(
    ("t", "inside"),
    [
        (times(0.5, 0.5, 0.5, 0.5), 4),
        (times(0.95, 0.95, 0.95, 0.95), 0),
        (times(0.05, 0.1, 0.9, 0.95), 2),  # one time per sample, both ends included
    ],
)
def test_a_step_costs_what_it_must(batch, t, inside):
    x, y = batch
    model = Counted()
    CFG(2.0, 0.1, 0.9).wrap(model)(x, t, y)
    assert model.calls == [4 + inside]  # one pass over both
    main, weak = Counted(), Counted(0.5)
    AutoGuidance(weak, 2.0, 0.1, 0.9).wrap(main)(x, t, y)
    assert main.calls == [4]
    assert sum(weak.calls) == inside


@pytest.mark.parametrize("kind", ["cfg", "autoguidance"])
def test_every_sample_is_guided_by_its_own_time(batch, kind):
    x, y = batch
    t = times(0.95, 0.5, 0.05, 0.2)
    guidance = CFG(3.0, 0.1, 0.9) if kind == "cfg" else AutoGuidance(Counted(0.5), 3.0, 0.1, 0.9)
    mixed = guidance.wrap(Counted())(x, t, y)
    for i in range(4):
        torch.testing.assert_close(mixed[i : i + 1], guidance.wrap(Counted())(x[i : i + 1], t[i : i + 1], y[i : i + 1]))
    v = Counted()(x, t, y)
    assert torch.equal(mixed[[0, 2]], v[[0, 2]])
    assert not torch.isclose(mixed[[1, 3]], v[[1, 3]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [(0.1, 0.9), (0.3, 0.7), (0.0, 1.0)])
def test_both_ends_of_the_interval_are_guided_in_either_precision(dtype, ends):
    x, y = torch.ones(2, 1, 1, 1, dtype=dtype), torch.tensor([1, 1])
    t = torch.tensor(ends, dtype=dtype)
    guided = CFG(2.0, *ends).wrap(Counted())(x, t, y)
    assert (guided != Counted()(x, t, y)).all()
    beyond = torch.tensor([ends[0] - 1e-3, ends[1] + 1e-3], dtype=dtype)
    assert torch.equal(CFG(2.0, *ends).wrap(Counted())(x, beyond, y), Counted()(x, beyond, y))


def test_guidance_leaves_its_inputs_and_the_models_output_alone(batch):
    x, y = batch
    kept = {"x": x.clone(), "y": y.clone(), "t": EVERYWHERE.clone()}
    out = Counted()(x, EVERYWHERE, y)
    fixed = out.clone()
    AutoGuidance(Counted(0.5), 2.0).wrap(lambda *_: out)(x, EVERYWHERE, y)
    assert torch.equal(out, fixed)
    CFG(2.0).wrap(Counted())(x, EVERYWHERE, y)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), (x, y, EVERYWHERE)))


@pytest.mark.parametrize("ends", [(0.9, 0.1), (0.5, 0.5), (-0.1, 0.9), (0.1, 1.1), (float("nan"), 1.0)])
def test_intervals_that_make_no_sense_are_refused(ends):
    for make in (lambda: CFG(2.0, *ends), lambda: AutoGuidance(Counted(), 2.0, *ends)):
        with pytest.raises(ValueError, match="0 <= t_min < t_max <= 1"):
            make()


def test_drop_labels():
    y, u = torch.arange(5), torch.tensor([0.0, 0.05, 0.1, 0.5, 0.99])
    assert drop_labels(y, u, 0.1, 10).tolist() == [10, 10, 2, 3, 4]
    assert torch.equal(drop_labels(y, u, 0.0, 10), y)
    assert drop_labels(y, u, 1.0, 10).tolist() == [10] * 5
    assert drop_labels(y, u, 0.1, 10).dtype == torch.int64
    assert y.tolist() == [0, 1, 2, 3, 4]


def test_labels_are_dropped_as_often_as_asked():
    n = 100_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    share = (drop_labels(torch.zeros(n, dtype=torch.int64), u, 0.1, 10) == 10).double().mean().item()
    assert share == pytest.approx(0.1, abs=5 * (0.09 / n) ** 0.5)
