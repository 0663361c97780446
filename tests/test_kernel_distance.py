"""The kernel distance: from sums over pairs one by one, against moments in closed form, its error against fresh
samples."""

import math

import numpy as np
import pytest
import torch
from devices import Float32Device

from rae.evaluation.kernel_distance import kernel_distance, subset_distance
from rae.evaluation.uncertainty import random_subset


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def one_by_one(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition, as loops."""

    def k(a, b):
        return (float(a @ b) / x.shape[1] + 1) ** 3

    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) for s in (x, y)]
    across = sum(k(a, b) for a in x for b in y)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * across / (n * m)


def as_published(x: torch.Tensor, y: torch.Tensor) -> float:
    """From kernel matrices, as the authors, torch-fidelity and torchmetrics have it."""
    x, y, d = x.double(), y.double(), x.shape[1]
    xx, yy, xy = (x @ x.T / d + 1) ** 3, (y @ y.T / d + 1) ** 3, (x @ y.T / d + 1) ** 3
    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return (within - 2 * xy.mean()).item()


def of_pairs(x: torch.Tensor, y: torch.Tensor) -> float:
    """From kernel matrices without their diagonals (Gretton et al. 2012, Lemma 6)."""
    x, y, d, n = x.double(), y.double(), x.shape[1], len(x)
    h = sum(sign * (a @ b.T / d + 1) ** 3 for sign, a, b in ((1, x, x), (1, y, y), (-1, x, y), (-1, y, x)))
    return ((h.sum() - h.trace()) / (n * (n - 1))).item()


def in_one_dimension(x: list[tuple[float, float]], y: list[tuple[float, float]]) -> float:
    """(x y + 1)^3 = 1 + 3 x y + 3 x^2 y^2 + x^3 y^3, a distance of moments: of mixtures of normals."""
    moments = [np.mean([(m, m**2 + s**2, m**3 + 3 * m * s**2) for m, s in each], axis=0) for each in (x, y)]
    return float([3, 3, 1] @ (moments[0] - moments[1]) ** 2)


def test_sums_over_pairs(generator):
    x, y = torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator) + 0.5
    assert kernel_distance(x, y).value == pytest.approx(one_by_one(x, y), rel=1e-12)


def test_many_blocks(generator):
    x, y = (torch.rand(2100, 3, generator=generator) + shift for shift in (0, 0.1))
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(as_published(x, y), rel=1e-9)
    assert kernel_distance(y.flip(0), x.flip(0)) == pytest.approx(found, rel=1e-9)


def test_it_is_a_distance_of_moments_without_bias(generator):
    (a, s), (b, t) = (0.3, 1.0), (0.0, 1.2)
    expected = in_one_dimension([(a, s)], [(b, t)])
    draws = [
        kernel_distance(
            a + s * torch.randn(12, 1, generator=generator), b + t * torch.randn(8, 1, generator=generator)
        ).value
        for _ in range(1500)
    ]
    assert np.mean(draws) == pytest.approx(expected, abs=3 * np.std(draws) / math.sqrt(len(draws)))


def test_equal_distributions_have_none(generator):
    found = [kernel_distance(*torch.randn(2, 100, 8, generator=generator)) for _ in range(100)]
    ratios = [value / error for value, error in found]
    assert abs(np.mean(ratios)) < 0.3
    assert np.mean([abs(ratio) < 2 for ratio in ratios]) > 0.93  # cautious there: more than 95 % are expected
    assert any(value < 0 for value, _ in found)  # nothing is clipped


# --- errors ----------------------------------------------------------------------------------------------------------


def test_error_is_nearly_a_jackknife_over_both_sets(generator):
    """They differ by (N - 1) / (N - 2) in the first of the sums over pairs."""
    x, y = torch.randn(40, 3, generator=generator), torch.randn(30, 3, generator=generator) + 1
    parts = []
    for left_out, n in (("x", 40), ("y", 30)):
        keep = [[j for j in range(n) if j != i] for i in range(n)]
        without = [as_published(x[rows], y) if left_out == "x" else as_published(x, y[rows]) for rows in keep]
        parts.append((n - 1) ** 2 / n * np.var(without, ddof=1))
    assert kernel_distance(x, y).error == pytest.approx(math.sqrt(sum(parts)), rel=0.05)


def test_error_is_the_scatter_of_fresh_sets(generator):
    found = [
        kernel_distance(1.2 * torch.randn(100, 6, generator=generator), torch.randn(150, 6, generator=generator))
        for _ in range(100)
    ]
    scatter = np.std([value for value, _ in found], ddof=1)
    assert np.mean([error for _, error in found]) == pytest.approx(scatter, rel=0.25)


def test_of_pairs_no_image_meets_its_own(generator):
    x, y = torch.randn(2, 9, 3, generator=generator)
    found = kernel_distance(x, y, paired=True)
    assert found.value == pytest.approx(of_pairs(x, y), rel=1e-9)
    x, y = torch.randn(2, 60, 3, generator=generator)
    without = [of_pairs(x[rows], y[rows]) for rows in ([*range(i), *range(i + 1, 60)] for i in range(60))]
    jackknife = 59 / 60**0.5 * np.std(without, ddof=1)  # which has N - 2 for N - 1
    assert kernel_distance(x, y, paired=True).error == pytest.approx(58 / 59 * jackknife, rel=1e-9)
    assert kernel_distance(x, x, paired=True) == (0, None)
    assert kernel_distance(x[:1].repeat(9, 1), y[:1].repeat(9, 1), paired=True).error is None
    with pytest.raises(ValueError, match="9 samples and 8 originals are no pairs"):
        kernel_distance(x[:9], y[:8], paired=True)


def test_value_of_pairs_is_that_of_sets_drawn_apart(generator):
    """In one dimension, where it is known; with an image's own original among the y it would be lower by 0.3."""
    y = torch.randn(1500, 12, 1, generator=generator)
    x = 0.9 * y + 0.1 * torch.randn(1500, 12, 1, generator=generator) + 0.05
    found = [kernel_distance(*pair, paired=True).value for pair in zip(x, y)]
    expected = in_one_dimension([(0.05, math.hypot(0.9, 0.1))], [(0, 1)])
    assert np.mean(found) == pytest.approx(expected, abs=3 * np.std(found) / math.sqrt(1500))
    apart = [kernel_distance(*pair).value for pair in zip(x, y)]
    assert np.mean(apart) < expected - 0.3


def test_value_of_classes_in_turn_is_that_of_their_mixture(generator):
    """In one dimension, with 5, 3 and 2 images of three classes; as if they were drawn it would be lower by 1."""
    classes, of = [(-1.5, 0.3), (0.5, 0.6), (2.0, 0.4)], torch.tensor([0, 1, 0, 2, 0, 1, 0, 2, 1, 0])
    centres, spreads = torch.tensor(classes)[of].T
    x = (centres + spreads * torch.randn(1500, 10, generator=generator))[..., None]
    y = torch.randn(1500, 12, 1, generator=generator)
    found = [kernel_distance(*each, strata=of).value for each in zip(x, y)]
    expected = in_one_dimension([classes[c] for c in of], [(0, 1)])
    assert np.mean(found) == pytest.approx(expected, abs=3 * np.std(found) / math.sqrt(1500))
    drawn = [kernel_distance(*each).value for each in zip(x, y)]
    assert np.mean(drawn) < expected - 1
    with pytest.raises(ValueError, match="a class of 1 image has no two of it"):
        kernel_distance(x[0], y[0], strata=torch.arange(10) // 3)
    with pytest.raises(ValueError, match="pairs have no strata"):
        kernel_distance(x[0], x[1], paired=True, strata=of)


def test_error_of_pairs_is_the_scatter_of_fresh_pairs(generator):
    pairs = [(0.9 * y + 0.1, y) for y in torch.randn(100, 100, 6, generator=generator)]
    found = [kernel_distance(*pair, paired=True) for pair in pairs]
    scatter = np.std([value for value, _ in found], ddof=1)
    assert np.mean([error for _, error in found]) == pytest.approx(scatter, rel=0.25)
    assert np.mean([kernel_distance(*pair).error for pair in pairs]) > 3 * scatter  # as if they were drawn apart


def test_error_of_classes_in_turn_is_the_scatter_within(generator):
    centres, labels = 2 * torch.randn(5, 4, generator=generator), torch.arange(100) % 5
    sets = [
        (centres[labels] + torch.randn(100, 4, generator=generator), torch.randn(150, 4, generator=generator))
        for _ in range(100)
    ]
    found = [kernel_distance(*each, strata=labels) for each in sets]
    scatter = np.std([value for value, _ in found], ddof=1)
    assert np.mean([error for _, error in found]) == pytest.approx(scatter, rel=0.25)
    assert np.mean([kernel_distance(*each).error for each in sets]) > 1.3 * scatter


# --- subsets ---------------------------------------------------------------------------------------------------------


def test_subsets_as_published(generator):
    x, y = torch.rand(40, 5, generator=generator), torch.rand(30, 5, generator=generator)
    found = subset_distance(x, y, subsets=6, size=20, seed=3)
    expected = [
        as_published(x[random_subset(40, 20, 2 * i, seed=3)], y[random_subset(30, 20, 2 * i + 1, seed=3)])
        for i in range(6)
    ]
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.std == pytest.approx(np.std(expected), rel=1e-9)


def test_sets_of_equal_images_have_no_error(generator):
    for x, y in torch.randn(8, 2, 1, 5, generator=generator):  # of some, rounding leaves one of 5e-15
        assert kernel_distance(x.repeat(9, 1), y.repeat(7, 1)).error is None
    y, labels = torch.randn(7, 5, generator=generator), torch.arange(12) % 3
    assert kernel_distance(x.repeat(9, 1), y).error > 0.1
    for classes in torch.randn(8, 3, 5, generator=generator):  # equal within classes, which is no scatter either
        assert kernel_distance(classes[labels], x.repeat(9, 1), strata=labels).error is None
        of_reference = kernel_distance(classes.repeat(4, 1), y).error  # with all of the samples' scatter
        assert 0.01 < kernel_distance(classes[labels], y, strata=labels).error < of_reference


def test_the_mean_over_subsets_tends_to_the_whole(generator):
    x, y = torch.randn(60, 5, generator=generator), torch.randn(80, 5, generator=generator) * 1.3
    found = subset_distance(x, y, subsets=600, size=20)
    assert found.mean == pytest.approx(kernel_distance(x, y).value, abs=3 * found.std / math.sqrt(600))
    everything = subset_distance(x, y[:60], subsets=3, size=60)
    assert everything.mean == pytest.approx(kernel_distance(x, y[:60]).value, rel=1e-9)
    assert everything.std == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_compared_is_refused(generator):
    x = torch.randn(5, 4, generator=generator)
    with pytest.raises(ValueError, match="reference: 2 images are too few for an estimate with an error"):
        kernel_distance(x, x[:2])
    with pytest.raises(ValueError, match=r"features of 4 \(samples\), 3 \(reference\) dimensions"):
        kernel_distance(x, x[:, :3])
    with pytest.raises(ValueError, match="samples: features of 5 of 5 images are not finite"):
        kernel_distance(x * float("nan"), x)
    with pytest.raises(ValueError, match="samples: 5 images are too few for subsets of 1000; give at least 1000"):
        subset_distance(x, x)
    with pytest.raises(ValueError, match="at least 1 subset of at least 2 images is needed, got 0 of 3"):
        subset_distance(x, x, subsets=0, size=3)


def test_a_device_needs_no_float64(generator):
    x, y = torch.randn(2, 20, 4, generator=generator)
    expected, in_subsets = kernel_distance(x, y), subset_distance(x, y, subsets=2, size=10)
    with Float32Device():
        assert kernel_distance(x.to("lazy"), y.to("lazy")) == expected
        assert subset_distance(x.to("lazy"), y, subsets=2, size=10) == in_subsets
