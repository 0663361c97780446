"""PSNR against its definition, SSIM against scikit-image."""

import pytest
import skimage.metrics
import torch
import torch.nn.functional as F
from devices import Float32Device

from rae.evaluation.reconstruction import SIGMA, WINDOW, _blur, psnr, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    references = torch.rand(2, 3, 21, 34, generator=generator)
    noise = torch.randn(2, 3, 21, 34, generator=generator) * torch.tensor([0.02, 0.2]).view(2, 1, 1, 1)
    return (references + noise).clamp(0, 1), references


def test_psnr_of_a_constant_offset():
    references = torch.full((2, 3, 4, 4), 0.5)
    images = references + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(images, references), torch.tensor([20.0, 40.0]).double(), rtol=1e-5, atol=0)
    assert psnr(references, references).tolist() == [100.0, 100.0]


def test_ssim_agrees_with_scikit_image(pair):
    expected = [
        skimage.metrics.structural_similarity(
            x.double().numpy(),
            y.double().numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=0,
        )
        for x, y in zip(*pair)
    ]
    assert ssim(*pair).tolist() == pytest.approx(expected, rel=1e-10)
    assert ssim(pair[1], pair[1]).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_the_window_is_a_convolution():
    x = torch.rand(5, 2, 3, 21, 34, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    offsets = torch.arange(WINDOW, dtype=torch.float64) - 5
    line = (-offsets.square() / (2 * SIGMA**2)).exp()
    window = line[:, None] * line / line.sum() ** 2
    expected = F.conv2d(x.flatten(0, 2)[:, None], window[None, None])
    torch.testing.assert_close(_blur(x), expected.view(5, 2, 3, 11, 24), rtol=0, atol=1e-15)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_cannot_be_compared_is_refused(metric, pair):
    images, references = pair
    with pytest.raises(ValueError, match="clamp a decoder's output"):
        metric(images * 1.5, references)
    with pytest.raises(ValueError, match="of one shape"):
        metric(images[:1], references)


def test_ssim_needs_room_for_its_window(pair):
    with pytest.raises(ValueError, match="11 x 11 pixels, the images are 8 x 34"):
        ssim(*(x[:, :, :8] for x in pair))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_device_needs_no_float64(metric, pair):
    expected = metric(*pair)
    with Float32Device():
        assert torch.equal(metric(*(x.to("lazy") for x in pair)).cpu(), expected)
