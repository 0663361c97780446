"""LPIPS as a distance, against VGG16 as torchvision lays it out; its gradient; the layouts that its weights come in."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.evaluation.lpips import LPIPS

WIDTHS = (6, 7, 8, 9, 10)
COUNTS = (2, 2, 3, 3, 3)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Images [-1,1] in float64."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def torchvision_layers() -> list[nn.Module]:
    """torchvision's `vgg16().features`, narrower: convolutions, ReLUs and poolings one after another, 31 of them."""
    torch.manual_seed(0)
    layers, before = [], 3
    for width, count in zip(WIDTHS, COUNTS):
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            nn.init.uniform_(layers[-2].bias, 0, 0.5)  # so that no pixel is 0 in all channels
            before = width
        layers.append(nn.MaxPool2d(2))
    return layers


def published_heads(weights: list[Tensor]) -> dict[str, Tensor]:
    return {f"lin{stage}.model.1.weight": weight.view(1, -1, 1, 1) for stage, weight in enumerate(weights)}


def published() -> dict[str, Tensor]:
    """Both files' tensors, channels weighted at random."""
    network = nn.Module()
    network.features = nn.Sequential(*torchvision_layers())
    generator = torch.Generator().manual_seed(1)
    return network.state_dict() | published_heads([torch.rand(width, generator=generator) for width in WIDTHS])


@pytest.fixture
def model() -> LPIPS:
    model = LPIPS(WIDTHS)
    model.load_published(published())
    return model.double()


def test_with_equal_weights_it_is_the_cosine_distance_of_vgg16_s_features(model):
    for weight in model.weights:
        weight.fill_(1)
    x, y = seeded(2, 3, 32, 48), seeded(2, 3, 32, 48, seed=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features = [(((image + 1) / 2 - mean) / std) for image in (x, y)]
    expected = torch.zeros(2, dtype=torch.float64)
    for index, layer in enumerate(torchvision_layers()):
        features = [layer.double()(f) for f in features]
        if index in (3, 8, 15, 22, 29):  # the last ReLU of each stage
            assert min(f.sum(1).min() for f in features) > 0
            # |a - b|^2 = 2 - 2 cos of unit vectors
            expected += (2 - 2 * F.cosine_similarity(*features, dim=1)).mean((1, 2))
    torch.testing.assert_close(model(x, y), expected, rtol=1e-6, atol=1e-9)


def test_it_is_a_distance(model):
    x, y = seeded(2, 3, 16, 16), seeded(2, 3, 16, 16, seed=1)
    assert model(x, x).tolist() == [0, 0]
    assert (model(x, y) > 1e-3).all()
    torch.testing.assert_close(model(x, y), model(y, x), rtol=1e-12, atol=0)


def test_each_channel_s_weight_counts_for_itself(model):
    x, y = seeded(1, 3, 16, 16), seeded(1, 3, 16, 16, seed=1)
    whole, parts = model(x, y), []
    weights = [weight.clone() for weight in model.weights]
    for stage, width in enumerate(WIDTHS):
        for channel in range(width):
            for weight in model.weights:
                weight.zero_()
            model.weights[stage][channel] = weights[stage][channel]
            parts.append(model(x, y))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    model.weights[stage][channel] *= 3
    torch.testing.assert_close(model(x, y), 3 * parts[-1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("argument", [0, 1])
def test_gradient_by_finite_differences(model, argument):
    images = [seeded(2, 3, 16, 16), seeded(2, 3, 16, 16, seed=1)]
    images[argument].requires_grad_()
    (gradient,) = torch.autograd.grad(model(*images).sum(), images[argument])
    assert all(parameter.grad is None for parameter in model.parameters())
    for seed in range(5):
        direction, step = seeded(2, 3, 16, 16, seed=10 + seed), 1e-6
        sides = []
        for sign in (-1, 1):
            moved = [image.detach() for image in images]
            moved[argument] = moved[argument] + sign * step * direction
            sides.append(model(*moved).sum())
        assert ((sides[1] - sides[0]) / (2 * step)).item() == pytest.approx(
            (gradient * direction).sum().item(), rel=1e-5
        )


def test_gradient_is_finite_where_no_feature_is_active(model):
    model.convolutions[-1].bias.fill_(-1e3)  # the last stage sees nothing in any image
    x, y = seeded(1, 3, 16, 16).requires_grad_(), seeded(1, 3, 16, 16, seed=1)
    model(x, y).sum().backward()
    assert model.features(x)[-1].abs().max() == 0
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


def test_images_of_a_batch_do_not_meet(model):
    x, y = seeded(3, 3, 16, 24).requires_grad_(), seeded(3, 3, 16, 24, seed=1)
    together = model(x, y)
    alone = torch.cat([model(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(together[1], x)
    assert gradient[[0, 2]].abs().max() == 0 < gradient[1].abs().min()


# --- published layouts


def sliced(*, from_zero: bool) -> dict[str, Tensor]:
    """As the LPIPS packages cut VGG16: five slices, whose layers keep torchvision's numbers or begin at 0."""
    package, layers = nn.Module(), torchvision_layers()
    package.net = nn.Module()
    for number, (start, end) in enumerate([(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)], start=1):
        part = nn.Sequential()
        for index in range(start, end):
            part.add_module(str(index - start if from_zero else index), layers[index])
        setattr(package.net, f"slice{number}", part)
    heads = {name: value for name, value in published().items() if name.startswith("lin")}
    constants = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    again = {name.replace("lin", "lins."): value for name, value in heads.items()}  # of the package's own model
    return package.state_dict() | heads | constants | again


@pytest.mark.parametrize("from_zero", [False, True])
def test_all_layouts_are_the_same_network(model, from_zero):
    other = LPIPS(WIDTHS)
    other.load_published(sliced(from_zero=from_zero))
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, value in other.double().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_vgg16_s_classifier_is_passed_over(model):
    classifier = {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    other = LPIPS(WIDTHS)
    other.load_published(published() | classifier)
    x, y = seeded(1, 3, 16, 16), seeded(1, 3, 16, 16, seed=1)
    assert torch.equal(other.double()(x, y), model(x, y))


@pytest.mark.parametrize("missing", ["features.14.weight", "features.28.bias", "lin4.model.1.weight"])
def test_missing_tensors_are_named(missing):
    tensors = published()
    del tensors[missing]
    with pytest.raises(KeyError, match=r"no tensors for (convolutions|weights).*VGG16's and LPIPS's are both needed"):
        LPIPS(WIDTHS).load_published(tensors)


@pytest.mark.parametrize(
    "unknown", ["features.1.running_mean", "features.1.weight", "lin0.model.0.weight", "net.slice6.0.bias"]
)
def test_unknown_tensors_are_named(unknown):
    with pytest.raises(KeyError, match=f"unknown tensor '{unknown}'"):
        LPIPS(WIDTHS).load_published(published() | {unknown: torch.zeros(6)})
