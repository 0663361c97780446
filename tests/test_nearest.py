"""Nearest neighbours against all distances written out; the memorisation test against what its parts must be."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import betabinom, mannwhitneyu

from rae.evaluation import nearest as module
from rae.evaluation.nearest import _beta_binomial_tail, memorisation, nearest


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- nearest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("sizes", [[40], [1, 0, 2, 30, 7], [1] * 40])
def test_neighbours_are_those_of_all_distances_whatever_the_blocks(k, sizes, monkeypatch):
    queries, corpus = normal(23, 5), normal(40, 5, seed=1)
    expected = (queries[:, None] - corpus).norm(dim=2).sort(1)
    for rows, at_once in ((8192, 2**24), (6, 17)):
        monkeypatch.setattr(module, "_ROWS", rows)
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        distances, indices = nearest(queries, corpus.split(sizes), k)
        torch.testing.assert_close(distances, expected.values[:, :k], rtol=1e-14, atol=0)
        assert torch.equal(indices, expected.indices[:, :k])


def test_copies_have_distance_zero_even_far_from_the_origin():
    corpus = (normal(50, 8, seed=2) + 1e4).float()
    queries = torch.stack([corpus[7], corpus[31] + 1e-2])
    distances, indices = nearest(queries, [corpus], 2)
    assert indices[:, 0].tolist() == [7, 31]
    assert distances[0, 0] == 0
    assert distances[1, 0].item() == pytest.approx(0.01 * 8**0.5, rel=0.2)  # steps of float32 are 1e-3 there
    assert (distances[:, 1] > 0.5).all()


def test_half_precision_is_taken_as_it_is():
    queries, corpus = normal(5, 4).half(), normal(9, 4, seed=1).half()
    expected = torch.cdist(queries.double(), corpus.double()).min(1).values
    torch.testing.assert_close(nearest(queries, [corpus])[0][:, 0], expected)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"features are \[n, 4\] here, got \[9, 5\]"):
        nearest(normal(3, 4), [normal(9, 5)])
    with pytest.raises(ValueError, match="the 10 nearest of 9 vectors"):
        nearest(normal(3, 4), [normal(9, 4)], 10)
    with pytest.raises(ValueError, match="the 1 nearest of 0 vectors"):
        nearest(normal(3, 4), [])
    broken = normal(9, 4)
    broken[6, 1] = math.nan
    with pytest.raises(ValueError, match=r"corpus: features of 1 images are not finite \(first: 15\)"):
        nearest(normal(3, 4), [normal(9, 4), broken])
    with pytest.raises(ValueError, match=r"queries: features of 1 images are not finite \(first: 6\)"):
        nearest(broken, [normal(9, 4)])


# --- memorisation ----------------------------------------------------------------------------------------------------


def test_auc_is_the_mann_whitney_statistic_and_its_error_that_of_its_placements():
    s, h = normal(30).round(decimals=1), normal(45, seed=1).round(decimals=1) + 0.3  # with ties
    found = memorisation(s, h).auc
    assert found.value == pytest.approx(mannwhitneyu(h, s).statistic / (30 * 45), rel=1e-12)
    wins = (s[:, None] < h).double() + (s[:, None] == h).double() / 2
    error = math.sqrt(wins.mean(1).var() / 30 + wins.mean(0).var() / 45)  # DeLong et al. 1988, Eq. (4)
    assert found.error == pytest.approx(error, rel=1e-12)


def test_errors_are_the_spread_over_repetitions():
    found = [memorisation(normal(400, seed=2 * i) - 0.3, normal(300, seed=2 * i + 1)) for i in range(300)]
    for figures in ([each.auc for each in found], [each.share for each in found]):
        spread = np.std([figure.value for figure in figures])
        assert np.mean([figure.error or 0 for figure in figures]) == pytest.approx(spread, rel=0.2)


def test_the_same_distribution_gives_half_and_the_share_that_is_expected():
    found = [memorisation(normal(200, seed=2 * i), normal(199, seed=2 * i + 1)) for i in range(400)]
    assert {each.expected for each in found} == {2 / 200}  # the 2nd smallest of 199
    assert np.mean([each.auc.value for each in found]) == pytest.approx(0.5, abs=0.005)
    assert np.mean([each.share.value for each in found]) == pytest.approx(0.01, abs=0.0015)
    low = np.mean([each.chance <= 0.05 for each in found])
    assert low <= 0.07  # at most 5 % of such tests say so, up to the spread of 400 of them


def test_copies_are_seen():
    fresh, novel = normal(500).abs() + 1, normal(400, seed=1).abs() + 1
    copies = torch.cat([torch.zeros(40), novel[40:]])  # a tenth of the samples
    found = memorisation(copies, fresh)
    assert found.share.value >= 0.1
    assert found.share.value - found.expected > 4 * found.share.error
    assert found.chance < 1e-6
    assert found.auc.value > 0.5
    every = memorisation(torch.zeros(40), fresh)
    assert every.auc == (1.0, None)
    assert every.share == (1.0, None, pytest.approx(0.05 ** (1 / 40)))


def test_samples_that_are_farther_are_told_by_the_other_side_of_a_half():
    found = memorisation(normal(100) + 3, normal(100, seed=1))
    assert found.auc.value < 0.1
    assert found.share == (0.0, None, pytest.approx(1 - 0.05 ** (1 / 100)))
    assert found.chance == 1.0


def test_the_share_takes_as_many_new_images_as_its_percentile_has():
    assert memorisation(normal(50), normal(98, seed=1)).share is None
    assert memorisation(normal(50), normal(99, seed=1)).near == normal(99, seed=1).min()
    with pytest.raises(ValueError, match="1 samples and 5 held-out images do not compare"):
        memorisation(normal(1), normal(5))


@pytest.mark.parametrize(
    ("count", "n", "a", "b"), [(0, 50, 1, 99), (3, 50, 1, 99), (9, 5000, 20, 1980), (50, 50, 2, 9)]
)
def test_the_tail_is_that_of_the_beta_binomial(count, n, a, b):
    assert _beta_binomial_tail(count, n, a, b) == pytest.approx(betabinom.sf(count - 1, n, a, b), rel=1e-8)
