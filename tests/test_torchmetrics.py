"""Our figures beside torchmetrics' on the same inputs: how far they agree, and why where they do not.

torchmetrics has no precision, recall, density and coverage, no errors and no class agreement; its LPIPS takes
torchvision, and its FID, KID and Inception Score take features here, by an identity in the place of a network.
"""

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from rae.evaluation.frechet import distance_between, normal_of
from rae.evaluation.inception_score import inception_score
from rae.evaluation.kernel_distance import kernel_distance, subset_distance
from rae.evaluation.reconstruction import psnr, ssim

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features in buffer:UserWarning")


class Features(nn.Identity):
    """Features -> the same features: torchmetrics asks a network how many there are."""

    num_features = 24


def rows(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Features [count,24] float64, with standard deviations from 1 to 1/24."""
    x = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / torch.arange(1, 25) + shift


def theirs(metric, x: Tensor, y: Tensor):
    for part in y.split(50):
        metric.update(part, real=True)
    for part in x.split(50):
        metric.update(part, real=False)
    return metric.compute()


# --- Frechet distance ------------------------------------------------------------------------------------------------


def frechet(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Ours, theirs."""
    return distance_between(normal_of(x), normal_of(y)), theirs(FrechetInceptionDistance(Features()), x, y).item()


def test_frechet_distance():
    ours, other = frechet(rows(300, 1), rows(200, 2, 0.1))
    assert other == pytest.approx(ours, rel=1e-9)


def test_frechet_distance_of_float32_is_theirs_rounded():
    """They sum in float64 as we do, and give the result in the precision of the features."""
    ours, other = frechet(rows(300, 1).float(), rows(200, 2, 0.1).float())
    assert other == pytest.approx(ours, rel=1e-7)


def test_frechet_distance_of_fewer_images_than_features():
    """Eigenvalues of S_1 S_2 that are 0 come out of theirs as rounding of either sign, whose roots count."""
    x = rows(12, 1)
    ours, other = frechet(x, x)
    assert ours < 1e-14 < abs(other) < 1e-5
    ours, other = frechet(x, rows(10, 2, 0.1))
    assert 1e-12 < abs(other / ours - 1) < 1e-6


def test_frechet_distance_far_from_the_origin():
    """Their covariance is a difference of sums of squares: a mean of 1e5 takes ten of its sixteen digits."""
    expected, _ = frechet(rows(300, 1), rows(200, 2))
    ours, other = frechet(rows(300, 1, 1e5), rows(200, 2, 1e5))
    assert ours == pytest.approx(expected, rel=1e-8)
    assert abs(other / expected - 1) > 1e-6


# --- kernel distance -------------------------------------------------------------------------------------------------


def test_kernel_distance():
    """One subset of all images, in whatever order."""
    x, y = rows(60, 1), rows(60, 2, 0.1)
    mean, _ = theirs(KernelInceptionDistance(Features(), subsets=1, subset_size=60), x, y)
    assert mean.item() == pytest.approx(kernel_distance(x, y).value, rel=1e-9)


def test_kernel_distance_of_float32():
    """Theirs is in float32: of kernels of about 1, whose means cancel to 1e-2, it loses what is below 1e-7."""
    x, y = rows(60, 1).float(), rows(60, 2, 0.1).float()
    mean, _ = theirs(KernelInceptionDistance(Features(), subsets=1, subset_size=60), x, y)
    assert mean.item() == pytest.approx(kernel_distance(x, y).value, abs=1e-6)


def test_kernel_distance_over_subsets():
    """Theirs of the same draws: mean, and standard deviation with 1/n; the mean tends to that of all images."""
    x, y = rows(60, 1), rows(80, 2, 0.1)
    torch.manual_seed(0)
    mean, std = theirs(KernelInceptionDistance(Features(), subsets=100, subset_size=30), x, y)
    ours = subset_distance(x, y, subsets=100, size=30)
    error = (2 * (std.item() ** 2) / 100) ** 0.5
    assert mean.item() == pytest.approx(ours.mean, abs=4 * error)
    assert std.item() == pytest.approx(ours.std, rel=0.4)
    assert mean.item() == pytest.approx(kernel_distance(x, y).value, abs=4 * error)


# --- Inception Score -------------------------------------------------------------------------------------------------


def logits(count: int) -> Tensor:
    return 2 * torch.randn(count, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("splits", [2, 10])
def test_inception_score_in_splits(splits):
    """Theirs mixes the images by torch's generator before it splits them; ours takes them in the order given."""
    x = logits(200)
    metric = InceptionScore(nn.Identity(), splits=splits)
    metric.update(x)
    torch.manual_seed(0)
    mean, _ = metric.compute()
    torch.manual_seed(0)
    mixed = x[torch.randperm(200)]
    assert mean.item() == pytest.approx(inception_score(mixed, split=200 // splits).value, rel=1e-12)
    assert mean.item() != pytest.approx(inception_score(x, split=200 // splits).value, rel=1e-6)


@pytest.mark.filterwarnings(r"ignore:std\(\)")
def test_inception_score_of_all_images():
    metric = InceptionScore(nn.Identity(), splits=1)
    metric.update(logits(200))
    assert metric.compute()[0].item() == pytest.approx(inception_score(logits(200), split=None).value, rel=1e-12)


# --- PSNR, SSIM ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Images [2,3,21,34] in [0,1] float64, the second with ten times the noise of the first, and what they are of."""
    generator = torch.Generator().manual_seed(0)
    references = torch.rand(2, 3, 21, 34, generator=generator, dtype=torch.float64)
    noise = torch.randn(references.shape, generator=generator) * torch.tensor([0.02, 0.2]).view(2, 1, 1, 1)
    return (references + noise).clamp(0, 1), references


def their_psnr(images: Tensor, references: Tensor, **settings) -> Tensor:
    return peak_signal_noise_ratio(images, references, data_range=1.0, **settings)


def test_psnr_of_each_image(pair):
    found = their_psnr(*pair, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(found, psnr(*pair), rtol=1e-6, atol=0)  # their log(10) is a float32


def test_psnr_of_a_batch(pair):
    """Unless it is told otherwise, theirs is of the mean error of the batch, where the worst image rules."""
    pooled = -10 * (pair[0] - pair[1]).square().mean().log10()
    assert their_psnr(*pair).item() == pytest.approx(pooled.item(), rel=1e-6)
    assert their_psnr(*pair) < psnr(*pair).mean() - 5


def test_psnr_of_equal_images(pair):
    assert their_psnr(pair[1], pair[1]) == float("inf")
    assert psnr(pair[1], pair[1]).tolist() == [100, 100]


def test_ssim_where_the_window_fits(pair):
    """Their map is of every pixel, by reflection beyond the border; ours is its mean 5 pixels away from there."""
    whole, each = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none", return_full_image=True)
    torch.testing.assert_close(each[..., 5:-5, 5:-5].mean((1, 2, 3)), ssim(*pair), rtol=1e-12, atol=0)
    torch.testing.assert_close(each.mean((1, 2, 3)), whole, rtol=1e-12, atol=0)
    assert ((whole - ssim(*pair)).abs() > 1e-5).all()


def test_ssim_of_float32(pair):
    """Variances as differences of moments, in float32: 1e-7 over c2 = 9e-4, where there is no structure."""
    pair = [x.float() for x in pair]
    _, each = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none", return_full_image=True)
    torch.testing.assert_close(each[..., 5:-5, 5:-5].double().mean((1, 2, 3)), ssim(*pair), rtol=0, atol=1e-5)
