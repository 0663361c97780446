"""Standard errors against closed forms, and against what fresh samples do."""

import math

import pytest
import torch

from rae.evaluation.uncertainty import (
    all_equal,
    bootstrap_error,
    drawn_error,
    fewest,
    jackknife_error,
    measured_mean,
    measured_share,
    random_parts,
    random_subset,
    share_bound,
    standard_error,
    strata_of,
    written,
)


@pytest.fixture
def values():
    return torch.randn(400, generator=torch.Generator().manual_seed(0)).exp()


def test_mean_and_its_error():
    found = measured_mean(torch.tensor([1.0, 2.0, 6.0]))
    assert found == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3)))
    assert measured_mean(torch.tensor([True, False])) == (0.5, pytest.approx(0.5))
    assert measured_mean(torch.tensor([2])) == (2.0, None)


@pytest.mark.parametrize("value", [2, 0.1, 1.4])
def test_equal_values_have_no_error(value):
    """No scatter is seen, which is not one of 0, nor of what rounding leaves: 1.4 differs from the mean of seven."""
    for dtype in (None, torch.float64):
        values = torch.tensor([value] * 7, dtype=dtype)
        assert standard_error(values) is None
        assert measured_mean(values) == (pytest.approx(value, rel=1e-6), None)


@pytest.mark.parametrize("count", [1, 60, 50_000])
def test_none_and_all_of_the_images_have_a_bound_in_place_of_an_error(count):
    none, every = (measured_share(torch.full((count,), value)) for value in (False, True))
    assert none[:2] == (0.0, None)
    assert every[:2] == (1.0, None)
    assert (1 - none.bound) ** count == pytest.approx(0.05)  # so seldom would none be there of a share of the bound
    assert every.bound**count == pytest.approx(0.05)
    assert share_bound(0.5, count) is None
    assert measured_share(torch.tensor([True, False])) == (0.5, pytest.approx(0.5), None)


@pytest.mark.parametrize(
    ("value", "count", "text"),
    [
        (0.0, 60, "none, below 4.9 %"),
        (1.0, 60, "all, above 95.1 %"),
        (0.0, 12, "none, below 22 %"),
        (0.0, 50_000, "none, below 0.0060 %"),
        (1.0, 50_000, "all, above 99.9940 %"),
    ],
)
def test_a_bound_has_two_digits_of_what_may_be_missed(value, count, text):
    assert written(value, None, share_bound(value, count)) == text


def test_error_of_strata_in_closed_form():
    """Classes 0, 1, 2 of variances 2, 0, 1/3 with 2, 3, 4 images: (2 * 2 + 3 * 0 + 4 / 3) / 81."""
    values, strata = torch.tensor([1.0, 3, 7, 7, 7, 0, 1, 0, 1]), torch.tensor([0, 0, 5, 5, 5, 2, 2, 2, 2])
    assert standard_error(values, strata) == pytest.approx(math.sqrt((4 + 4 / 3) / 81), rel=1e-12)
    order = torch.randperm(9)
    assert standard_error(values[order], strata[order]) == pytest.approx(standard_error(values, strata), rel=1e-12)
    assert standard_error(values, torch.zeros(9)) == pytest.approx(standard_error(values), rel=1e-12)
    assert measured_mean(values, strata) == (3, standard_error(values, strata))
    chosen = values > 0.5  # half of class 2, nothing else scatters: 4 * 1/3 of 81
    assert measured_share(chosen, strata) == (7 / 9, pytest.approx(math.sqrt(4 / 3) / 9, rel=1e-12), None)


def test_strata_without_scatter_have_no_error():
    values = torch.tensor([1.4, 0.1] * 7)  # 1.4 differs from the mean of seven
    assert standard_error(values, torch.arange(14) % 2) is None


def test_a_share_of_whole_classes_has_no_error():
    labels = torch.arange(40) % 10
    assert measured_share(labels == 3, labels) == (0.1, None, None)
    assert drawn_error(0.1, 40) == pytest.approx(measured_share(labels == 3).error, rel=1e-12)
    assert measured_share(labels < 10, labels) == (1, None, share_bound(1, 40))
    for some in (torch.arange(40) < 4, torch.arange(40) == 7):  # one of four of each of four classes, or of one
        assert measured_share(some, labels).error == pytest.approx(standard_error(some, labels), rel=1e-12)


def test_images_that_are_equal_within_classes():
    labels = torch.tensor([2, 0, 2, 0, 5])
    x = torch.randn(3, 4)[labels.clamp(max=2)]
    x[4] += 1
    assert all_equal(x, labels)
    assert not all_equal(x)
    assert not all_equal(x, labels.clamp(max=2))
    assert fewest(labels) == 1


def test_a_stratum_of_one_tells_nothing():
    assert strata_of(torch.tensor([0, 1, 1, 2, 2])) is None
    with pytest.raises(ValueError, match="a class of 1 image tells no scatter within"):
        standard_error(torch.arange(5), torch.tensor([0, 1, 1, 2, 2]))
    kept = torch.tensor([4, 1, 1, 4])
    assert strata_of(kept) is kept


def test_error_of_strata_is_the_scatter_of_fresh_images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    found = [labels * 5 + (labels + 1) * torch.randn(30, generator=generator) for _ in range(2000)]
    errors = torch.tensor([standard_error(values, labels) for values in found])
    scatter = torch.stack(found).mean(1).var()
    assert errors.square().mean() == pytest.approx(scatter.item(), rel=0.1)  # without bias; known to 3 %


def test_jackknife_of_a_mean_is_its_standard_error(values):
    values = values.double()
    without = (values.sum() - values) / (len(values) - 1)
    assert jackknife_error(without) == pytest.approx(standard_error(values), rel=1e-12)


def test_bootstrap_of_a_mean_tends_to_its_standard_error(values):
    error = bootstrap_error(lambda rows: values[rows].mean().item(), len(values), replicates=800)
    assert error == pytest.approx(standard_error(values), rel=3 / math.sqrt(2 * 800))  # three of its own errors


def test_bootstrap_of_a_median(values):
    # of n values of density p about the median: 1 / (2 p sqrt(n)); the median of exp(normal) is 1, its density there
    # that of the normal at 0
    error = bootstrap_error(lambda rows: values[rows].median().item(), len(values), replicates=200)
    assert error == pytest.approx(math.sqrt(2 * math.pi) / 2 / math.sqrt(len(values)), rel=0.3)


def test_replicates_are_functions_of_seed_and_number():
    def drawn(replicates, seed):
        seen = []
        bootstrap_error(lambda rows: seen.append(rows.tolist()) or float(rows[0]), 20, replicates=replicates, seed=seed)
        return seen

    assert drawn(5, 3)[:2] == drawn(2, 3)
    assert drawn(2, 3) != drawn(2, 4)
    assert drawn(2, 3)[0] != drawn(2, 3)[1]
    assert all(set(rows) <= set(range(20)) and len(rows) == 20 for rows in drawn(5, 0))


def test_parts_are_disjoint_random_and_of_one_size():
    parts = random_parts(103, 4)
    assert torch.cat(parts).sort().values.tolist() == list(range(103))
    assert sorted(len(part) for part in parts) == [25, 26, 26, 26]
    assert all(abs(part.double().mean() - 51) < 15 for part in parts)  # not the first, second, ... quarter
    assert parts[0].tolist() == random_parts(103, 4)[0].tolist() != random_parts(103, 4, seed=1)[0].tolist()


def test_parts_of_strata_have_equally_many_of_each():
    strata = torch.tensor([7] * 5 + [2] * 8 + [0] * 11)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    parts = random_parts(24, 4, strata=strata)
    assert torch.cat(parts).sort().values.tolist() == list(range(24))
    counts = torch.stack([strata[part].bincount(minlength=8)[[7, 2, 0]] for part in parts])
    assert (counts.amax(0) - counts.amin(0)).tolist() == [1, 0, 1]
    assert counts.sum(1).tolist() == [6] * 4
    again, other = (random_parts(24, 4, seed, strata) for seed in (0, 1))
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]
    assert [part.tolist() for part in parts] != [part.tolist() for part in other]


def test_subsets_hold_nothing_twice():
    subset = random_subset(50, 40, number=7)
    assert len(subset.unique()) == 40
    assert subset.tolist() == random_subset(50, 40, number=7).tolist() != random_subset(50, 40, number=8).tolist()


def test_errors_carry_the_numbers():
    with pytest.raises(ValueError, match=r"1 of 3 values are not finite \(first: image 2\)"):
        measured_mean(torch.tensor([1.0, 2.0, float("nan")]))
    with pytest.raises(ValueError, match="mean of 0 values"):
        measured_mean(torch.zeros(0))
    with pytest.raises(ValueError, match="at least 2 replicates, got 1"):
        bootstrap_error(lambda rows: 0.0, 5, replicates=1)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.123, "12.35 ± 0.12"),
        (12345.6, 98.0, "12,346 ± 98"),
        (0.5, 0.00987, "0.5000 ± 0.0099"),
        (17.123456, None, "17.12"),
        (1.0, 0.0, "1"),
        (0.000012, 0.0000034, "0.0000120 ± 0.0000034"),
        (12.3, 0.0000012, "12.3000000 ± 0.0000012"),  # seven digits behind the point
        (12.3456, 9.9e-7, "12.35 ± 9.9e-07"),  # eight of them
        (12.3456, 3e-9, "12.35 ± 3e-09"),
        (4.5e-13, 2.9e-13, "4.5e-13 ± 2.9e-13"),
    ],
)
def test_values_have_the_digits_that_their_error_leaves_them(value, error, text):
    assert written(value, error) == text
