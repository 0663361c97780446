"""The Inception of FID against torch-fidelity's, resizing by hand, and what it makes of images.

`golden_features/inception.safetensors` holds what torch-fidelity 0.4.0 put out, on a CPU in float32: "features" and
"logits" are "2048" and "logits_unbiased" of its FeatureExtractorInceptionV3 for "images" (uint8), with the weights of
`drawn` loaded from a file; "spatial" is what left Mixed_6d.branch1x1, its first 7 channels in the order row, column,
channel; "resized_N" is interpolate_bilinear_2d_like_tensorflow1x(images, size=(N, N), align_corners=False).
"""

import copy
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rae.evaluation.inception import BLOCKS, Block, Inception, resize_bilinear

GOLDEN = Path(__file__).parent / "golden_features"


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights by name, of the size that keeps signals alive, from bits that NumPy promises to leave as they are.

    u = (PCG64(CRC-32 of the name) >> 40) / 2^24; weights and variances of batch norms are 0.5 + u, biases and means
    (u - 0.5) / 2, all others (2 u - 1) sqrt(6 / fan-in).
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape)) >> np.uint64(40)
    u = torch.from_numpy(bits.astype(np.float32) / 2**24).view(shape)
    if name.endswith(("bn.weight", "running_var")):
        return 0.5 + u
    if name.endswith(("bn.bias", "running_mean")):
        return (u - 0.5) / 2
    return (2 * u - 1) * (6 / math.prod(shape[1:])) ** 0.5


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inception.safetensors")


@pytest.fixture(scope="module")
def inception() -> Inception:
    """With the weights of `drawn`, loaded as published files are: some have no `num_batches_tracked`."""
    model = Inception()
    state = {n: drawn(n, v.shape) for n, v in model.state_dict().items() if "num_batches_tracked" not in n}
    model.load_state_dict(state)
    return model


def test_features_are_torch_fidelity_s(inception, golden):
    found = inception.train()(golden["images"])  # frozen: training changes nothing
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    assert {name: list(value.shape) for name, value in found.items()} == {
        "features": [2, 2048],
        "spatial": [2, 2023],
        "logits": [2, 1008],
    }
    for name, value in found.items():
        torch.testing.assert_close(value, golden[name], rtol=1e-4, atol=1e-5 * golden[name].abs().max().item())


def test_a_copy_has_weights_of_its_own():
    block = Block(8, BLOCKS["Mixed_7c"]).eval()
    other, x = copy.deepcopy(block).requires_grad_(False), torch.ones(1, 8, 8, 8)
    for parameter in other.parameters():
        parameter.zero_()
    assert other(x).abs().max() == 0
    assert (block(x).amax((0, 2, 3)) > 0).any(dim=0)


def test_resizing_is_tensorflow_1_s(golden):
    for size in (17, 41):
        assert torch.equal(resize_bilinear(golden["images"].float(), size), golden[f"resized_{size}"])


def test_resizing_by_hand():
    row = torch.tensor([0.0, 30.0, 90.0])
    # positions 0, 0.6, 1.2, 1.8, 2.4: the last lies beyond the last pixel, whose value stays
    expected = torch.tensor([0.0, 18.0, 42.0, 78.0, 90.0])
    torch.testing.assert_close(resize_bilinear(row.view(1, 1, 1, 3), 5)[0, 0], expected.expand(5, 5))
    torch.testing.assert_close(resize_bilinear(row.view(1, 1, 3, 1), 5)[0, 0], expected[:, None].expand(5, 5))
    # every second pixel, not the mean of two: there is no antialias, and the first one does not move
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_bilinear(x, 4), x[:, :, ::2, ::2])
    assert torch.equal(resize_bilinear(x, 8), x)


def test_an_affine_ramp_stays_one():
    ramp = torch.arange(12, dtype=torch.float64).view(1, 1, 1, 12).expand(1, 1, 12, 12)
    expected = (torch.arange(30) * 0.4).clamp(max=11).double()
    torch.testing.assert_close(resize_bilinear(ramp, 30)[0, 0], expected.expand(30, 30), rtol=0, atol=1e-6)
