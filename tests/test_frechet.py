"""The Frechet distance against closed forms, against a general matrix root, and its streaming moments."""

import pytest
import scipy.linalg
import torch

from rae.evaluation.frechet import Moments, frechet_distance


def random_covariance(dim: int, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return root @ root.T / dim


def moments_of(features: torch.Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


def between(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_one_dimension_is_difference_of_means_and_deviations():
    mean1, mean2 = torch.tensor([1.0]), torch.tensor([4.0])
    var1, var2 = torch.tensor([[4.0]]), torch.tensor([[25.0]])
    assert frechet_distance(mean1, var1, mean2, var2) == pytest.approx((1 - 4) ** 2 + (2 - 5) ** 2, rel=1e-12)


def test_commuting_covariances(generator):
    # one eigenbasis, eigenvalues a and b: the distance is sum (sqrt a - sqrt b)^2
    basis = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q
    a, b = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    mean = torch.zeros(7)
    got = frechet_distance(mean, basis * a @ basis.T, mean, basis * b @ basis.T)
    assert got == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-10)


def test_agrees_with_a_general_matrix_root(generator):
    cov1, cov2 = random_covariance(12, generator), random_covariance(12, generator)
    mean1, mean2 = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    root = torch.from_numpy(scipy.linalg.sqrtm((cov1 @ cov2).numpy())).real
    expected = (mean1 - mean2).square().sum() + (cov1 + cov2 - 2 * root).trace()
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), rel=1e-10)


def test_equal_sets_have_no_distance_even_with_fewer_vectors_than_dimensions(generator):
    features = moments_of(torch.randn(20, 64, generator=generator))
    assert between(features, features) < 1e-10


def test_low_rank_sets_in_orthogonal_subspaces(generator):
    # ranges that do not meet: the root vanishes, what is left is the traces and the means
    a, b = torch.zeros(2, 9, 40, dtype=torch.float64)
    a[:, :20] = torch.randn(9, 20, generator=generator)
    b[:, 20:] = torch.randn(9, 20, generator=generator)
    a, b = moments_of(a), moments_of(b)
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert between(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_streamed_and_merged_moments_equal_those_of_the_whole(generator):
    features = 1e3 + torch.randn(101, 5, generator=generator, dtype=torch.float64)  # a mean that would cancel
    first, second = Moments(5), Moments(5)
    for batch in features[:60].split(7):
        first.update(batch)
    for batch in features[60:].split(40):
        second.update(batch)
    second.merge(first)
    assert second.count == 101
    torch.testing.assert_close(second.mean, features.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(second.covariance, features.T.cov(), rtol=1e-9, atol=1e-12)


def test_errors_carry_the_numbers():
    moments = Moments(4)
    with pytest.raises(ValueError, match=r"\[B, 4\] here, got \[2, 3\]"):
        moments.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"of 1 of 2 images are not finite \(first: 1\)"):
        moments.update(torch.tensor([[0.0] * 4, [float("nan")] * 4]))
    with pytest.raises(ValueError, match="has 0"):
        _ = moments.covariance
    with pytest.raises(ValueError, match="dimension 3 into 4"):
        moments.merge(Moments(3))
    with pytest.raises(ValueError, match=r"cov1 \[d,d\] of one d are needed, got \[2\] and \[3, 3\]"):
        frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"features of 2 \(first\), 3 \(second\) dimensions do not compare"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_no_perfect_score(generator, which, bad):
    cov = random_covariance(3, generator)
    given = [torch.zeros(3), cov.clone(), torch.zeros(3), cov.clone()]
    given[which].flatten()[0] = bad
    with pytest.raises(ValueError, match=f"{('mean1', 'cov1', 'mean2', 'cov2')[which]} has 1 values that are not fin"):
        frechet_distance(*given)


def test_what_is_no_covariance_is_refused(generator):
    mean, cov = torch.zeros(5), random_covariance(5, generator)
    for wrong in (-cov, cov - 0.5 * torch.eye(5) * torch.linalg.eigvalsh(cov)[-1]):
        with pytest.raises(ValueError, match="cov2 is no covariance: its smallest eigenvalue is -"):
            frechet_distance(mean, cov, mean, wrong)
    low_rank = moments_of(torch.randn(20, 64, generator=generator)).covariance
    rounded = low_rank.float()  # statistics kept in float32 have slightly negative eigenvalues
    assert torch.linalg.eigvalsh(rounded.double())[0] < -1e-10
    assert frechet_distance(torch.zeros(64), low_rank, torch.zeros(64), rounded) < 1e-5
    assert frechet_distance(mean, torch.zeros(5, 5), mean, torch.zeros(5, 5)) == 0
