"""`generate`: what an image depends on, names of classes, and which arguments it refuses at the call."""

import pytest
import torch
from devices import Float32Device

from rae.diffusion.dit import DiTConfig
from rae.diffusion.flow import Flow
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.model import DiffusionModel, DiffusionModelConfig
from rae.diffusion.sampling import ODE_SAMPLERS, SDE_SAMPLERS, dopri5, euler, generate, time_grid

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
    forward = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
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
