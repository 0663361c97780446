"""The discriminator's parts against linear algebra, torch's own norms and the frozen network run by itself."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tiny import save_encoder
from torch import Tensor, nn

from rae import load_encoder
from rae.training.discriminator import Discriminator, Head, Norm, SpectralConv


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- spectral norm


def spectral(inputs: int, outputs: int, kernel: int, iterations: int = 0) -> SpectralConv:
    torch.manual_seed(0)
    conv = SpectralConv(inputs, outputs, kernel).double()
    for _ in range(iterations):
        conv.iterate()
    return conv


def norm(conv: SpectralConv) -> float:
    return torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item()


@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(5, 7, 1), (4, 6, 3), (6, 1, 1), (3, 3, 9)])
def test_sigma_becomes_the_largest_singular_value(inputs, outputs, kernel):
    def sigma(conv: SpectralConv) -> float:
        """What the weight is divided by, read off the output at an impulse."""
        x = torch.zeros(1, inputs, 2 * kernel, dtype=torch.float64)
        x[0, 0, kernel] = 1
        out = conv(x) - conv.bias.view(1, -1, 1)
        return (conv.weight[:, 0].abs().max() / out.abs().max()).item()

    conv = spectral(inputs, outputs, kernel)
    assert 0.8 * norm(conv) < sigma(conv) <= norm(conv) * (1 + 1e-6)  # as it is made: from below
    conv = spectral(inputs, outputs, kernel, iterations=2000)
    assert sigma(conv) == pytest.approx(norm(conv), rel=1e-9)


def test_one_token_sees_a_map_of_norm_1():
    conv = spectral(5, 7, 1, iterations=2000)
    x, y = seeded(200, 5, 4), seeded(200, 5, 4, seed=1)
    ratio = (conv(x) - conv(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert 0.5 < ratio.max() <= 1 + 1e-9
    _, _, vh = torch.linalg.svd(conv.weight.flatten(1))
    worst = vh[0].view(1, 5, 1)
    assert (conv(worst) - conv(0 * worst)).norm().item() == pytest.approx(1, rel=1e-9)


def test_a_longer_kernel_is_bounded_by_its_root():
    conv = spectral(4, 4, 9, iterations=2000)
    x = seeded(100, 4, 20)
    ratio = (conv(x) - conv(0 * x)).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert ratio.max() <= math.sqrt(9)


def test_convolution_written_out_goes_around_the_end():
    conv, x = spectral(4, 6, 3, iterations=2000), seeded(2, 4, 7)
    weight = conv.weight / norm(conv)
    expected = torch.stack(
        [sum(x[:, :, (n + j - 1) % 7] @ weight[:, :, j].T for j in range(3)) + conv.bias for n in range(7)], dim=2
    )
    torch.testing.assert_close(conv(x), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(conv(x.roll(2, dims=2)), conv(x).roll(2, dims=2), rtol=1e-12, atol=1e-14)


def test_gradient_goes_through_sigma():
    conv, x = spectral(4, 6, 3, iterations=2000), seeded(2, 4, 7)
    target = seeded(2, 6, 7, seed=1)
    (ours,) = torch.autograd.grad((conv(x) * target).sum(), conv.weight)
    weight = conv.weight.detach().requires_grad_()
    normed = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
    out = F.conv1d(torch.cat([x[..., -1:], x, x[..., :1]], dim=2), normed, conv.bias)
    (expected,) = torch.autograd.grad((out * target).sum(), weight)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
    assert (ours * conv.weight).sum().abs() < 1e-9  # the scale of the weight makes no difference


def test_an_iteration_spares_graphs_made_before_it():
    x, gradients = seeded(2, 4, 7), []
    for iterate in (False, True):
        conv = spectral(4, 6, 3)
        out = conv(x)
        if iterate:
            conv.iterate()
        gradients.append(torch.autograd.grad(out.square().sum(), conv.weight)[0])
    assert torch.equal(*gradients)


def test_only_iterations_change_the_state():
    conv = spectral(4, 6, 3)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    for mode in (True, False):
        conv.train(mode)(seeded(2, 4, 7))
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
    conv.iterate()
    assert not torch.equal(conv.u, before["u"])
    assert conv.u.norm().item() == pytest.approx(1)
    assert conv.v.norm().item() == pytest.approx(1)


# --- normalisation


def affine(module: nn.Module) -> nn.Module:
    for parameter, seed in zip((module.weight, module.bias), (5, 6)):
        parameter.data = seeded(*parameter.shape, seed=seed)
    return module


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("sample", nn.InstanceNorm1d(6, eps=1e-6, affine=True)),
        ("batch", nn.BatchNorm1d(6, eps=1e-6, track_running_stats=False)),
    ],
)
def test_norms_are_torch_s(kind, theirs):
    target, results = seeded(3, 6, 11, seed=1), []
    for module in (Norm(6, kind), theirs):
        affine(module.double())
        x = (seeded(3, 6, 11) * 3 + 1).requires_grad_()
        y = module(x)
        results.append((y, *torch.autograd.grad((y * target).sum(), [x, module.weight, module.bias])))
    for mine, expected in zip(*results):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


TWO = """
import os, sys
import torch
from safetensors.torch import load_file, save_file
from rae.training.discriminator import Head

folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
inputs = load_file(f"{folder}/inputs.safetensors")
head = Head(6, 3, "batch").double()
head.load_state_dict({name[5:]: value for name, value in inputs.items() if name.startswith("head.")})
x = inputs["x"].chunk(2)[rank].clone().requires_grad_()
logits = head(x)
# each process knows the loss of its own images only
(logits * inputs["weights"].chunk(2)[rank]).sum().backward()
results = {"logits": logits.detach(), "x": x.grad} | {name: p.grad for name, p in head.named_parameters()}
save_file({name: value.contiguous() for name, value in results.items()}, f"{folder}/{rank}.safetensors")
torch.distributed.barrier()
os._exit(0)  # gloo's threads now and then abort a process that ends at once in the ordinary way
"""


def test_batch_norm_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    head = Head(6, 3, "batch").double()
    for module in (head.norm1, head.norm2):
        affine(module)
    x, weights = seeded(4, 6, 9).requires_grad_(), seeded(4, 9, seed=1)
    inputs = {f"head.{name}": value for name, value in head.state_dict().items()}
    save_file(inputs | {"x": x.detach(), "weights": weights}, tmp_path / "inputs.safetensors")
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO, tmp_path, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))

    logits = head(x)
    (logits * weights).sum().backward()
    torch.testing.assert_close(torch.cat([first["logits"], second["logits"]]), logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), x.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(first[name] + second[name], parameter.grad, rtol=1e-9, atol=1e-11)


# --- the whole of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DINOv2 of three blocks: 16 x 16 px, 4 tokens, width 16, images normalised to [-1,1]."""
    folder = save_encoder(tmp_path_factory.mktemp("encoder"))
    config = transformers.Dinov2Config.from_pretrained(folder, num_hidden_layers=3)
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def frozen(folder):
    return load_encoder(folder, image_size=16, input_size=16)


def discriminator(frozen, **settings) -> Discriminator:
    torch.manual_seed(1)
    return Discriminator(frozen, **{"depths": (0, 1), "kernel": 3} | settings)


def images(*shape: int, seed: int = 0) -> Tensor:
    return seeded(*shape, seed=seed).float().clamp(-1, 1)


def test_features_are_those_of_the_frozen_network(folder, frozen):
    x = images(2, 3, 24, 40)
    network = transformers.Dinov2Model.from_pretrained(folder).eval()
    seen = F.interpolate(x, (16, 16), mode="bilinear", align_corners=False)  # mean and std 0.5: [-1,1] as it is
    with torch.no_grad():
        states = network(seen, output_hidden_states=True).hidden_states
    for mine, block in zip(discriminator(frozen).features(x), (2, 0, 1), strict=True):  # the last one first
        assert mine.shape == (2, 16, 4)
        torch.testing.assert_close(mine, states[block + 1][:, 1:].mT, rtol=1e-4, atol=1e-5)


def test_heads_written_out(frozen):
    model, x = discriminator(frozen), images(2, 3, 16, 16)
    expected = []
    for head, h in zip(model.heads, model.features(x)):
        h = F.leaky_relu(F.instance_norm(head.conv1(h), eps=1e-6), 0.2)
        h = (h + F.leaky_relu(F.instance_norm(head.conv2(h), eps=1e-6), 0.2)) * 0.5**0.5
        expected.append(head.out(h).squeeze(1))
    logits = model(x)
    assert logits.shape == (2, 3 * 4)
    torch.testing.assert_close(logits, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)


def test_the_frozen_network_is_neither_trained_nor_saved(frozen):
    model = discriminator(frozen)
    assert all(name.startswith("heads.") for name in model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == 3 * sum(p.numel() for p in model.heads[0].parameters())
    x = images(2, 3, 16, 16).requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "conv" in name and "weight" in name)
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not frozen.network.training


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (24, 40), (224, 224)])
def test_images_of_any_size_are_judged_one_by_one(frozen, size):
    model, x = discriminator(frozen), images(3, 3, *size)
    logits = model(x)
    assert logits.shape == (3, 12)
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


def test_training_mode_makes_no_difference(frozen):
    for kind in ("sample", "batch"):
        model, x = discriminator(frozen, norm=kind), images(3, 3, 16, 16)
        assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (0, 3)}, r"depths \[0, 3\] of .*, whose blocks are 0 to 2"),
        ({"depths": (-1, 1)}, r"depths \[-1, 1\] of .*, whose blocks are 0 to 2"),
        ({"depths": ()}, r"depths \[\] of"),
        ({"kernel": 4}, "kernel 4 on 4 tokens; take an odd one"),
        ({"kernel": 11}, "kernel 11 on 4 tokens; take an odd one that does not wrap around twice"),
    ],
)
def test_heads_that_cannot_be(frozen, settings, message):
    with pytest.raises(ValueError, match=message):
        discriminator(frozen, **settings)


def test_it_learns_to_tell_images_apart(frozen):
    model = discriminator(frozen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dark, light = images(4, 3, 16, 16) * 0.3 - 0.5, images(4, 3, 16, 16, seed=1) * 0.3 + 0.5
    for _ in range(60):
        model.iterate()
        F.softplus(torch.cat([-model(dark), model(light)])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(dark) > 0).float().mean() > 0.9
    assert (model(light) < 0).float().mean() > 0.9
