"""Kernel distance (KID with features of Inception): the squared maximum mean discrepancy of two sets, without bias.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    k(x, y) = (x.y / d + 1)^3

Binkowski et al. 2018 (arXiv 1801.01401). The kernel sees means, covariances and third moments.
Its expectation does not depend on the number of images, and two sets of one distribution have 0 on average: values
below 0 are what that takes, and are not clipped.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rae.evaluation.feature_sets import blocks, check_features, where_float64_is
from rae.evaluation.uncertainty import Measured, all_equal, random_subset, standard_error


class SubsetEstimate(NamedTuple):
    """The distance as papers print it.

    Attributes:
        mean: over the subsets.
        std: of one subset's estimate about it, which is what stands behind their +-: not an error of the mean.
    """

    mean: float
    std: float


def kernel_distance(
    samples: Tensor, reference: Tensor, *, paired: bool = False, strata: Tensor | None = None
) -> Measured:
    """MMD^2 of all images, from tiles of all pairs, and its standard error.

    It is what the mean over subsets tends to when there are ever more of them (`subset_distance`). It is the mean of

        u(x) = mean_{x' != x} k(x, x') - mean_y k(x, y)      half the derivative by the weight of x

    over the samples, plus that of v(y), the same from the other side, so the error is that of the mean of 2 u and of
    2 v, of both: whether two sets are of one distribution is asked of this distance more than of others, and chance in
    the reference moves it away from 0 as much as chance in the samples. For two sets of one distribution, where the
    derivative vanishes, it comes out too large: of drawn images by 2^(1/2) at most, of strata with few images each by
    more, whatever the distance, up to twice with 3 to 5 of a class and three to four times with 2.

    Reconstructions are not drawn apart from their originals: of pairs k(x_i, y_i) is left out, which two images of
    different pairs never come to (Gretton et al. 2012, JMLR 13, Lemma 6), and the error is that of the mean of
    2 (u + v). What loses nothing has 0.

    Where the numbers n_c of the classes are fixed, two different images are too seldom of one class: those that are
    count n_c / (n_c - 1) times, and the sum is divided by N^2, so that classes meet by their shares n_c / N.

    Args:
        samples: x [N,d], any floating dtype; the work is done in float64 on their device (CPU where it has none).
        reference: y [M,d].
        paired: x_i is a reconstruction of y_i.
        strata: of the samples, see `standard_error`; not of pairs.

    Raises:
        ValueError: fewer than 3 images, features that are not finite, other dimensions, pairs of N != M or with strata,
            a class of one image.
    """
    check_features(3, "for an estimate with an error", samples=samples, reference=reference)
    if paired and len(samples) != len(reference):
        raise ValueError(f"{len(samples)} samples and {len(reference)} originals are no pairs; give one for each.")
    if paired and strata is not None:
        raise ValueError("pairs have no strata: both of a pair are drawn together; leave one of the two out.")
    x, y = _in_one_place(samples, reference)
    if paired:
        if (x == y).all():  # of which the sums leave rounding
            return Measured(0.0, None)
        both = _sums_of_pairs(x, y) / (len(x) - 1)
        error = None if all_equal(samples) and all_equal(reference) else standard_error(2 * both)
        return Measured(both.mean().item(), error)
    u, v = _derivatives(x, y, () if strata is None else _classes(strata.to(x.device)))
    sides = (samples, 2 * u, strata), (reference, 2 * v, None)
    errors = [standard_error(values, of) for images, values, of in sides if not all_equal(images, of)]
    return Measured((u.mean() + v.mean()).item(), math.hypot(*(error or 0.0 for error in errors)) or None)


def subset_distance(
    samples: Tensor, reference: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> SubsetEstimate:
    """Mean and standard deviation of MMD^2 over random subsets: the published protocol, 100 subsets of 1,000.

    Args:
        samples: x [N,d].
        reference: y [M,d].
        subsets: how many.
        size: images of each set in a subset, none of them twice.
        seed: subset i is a function of (seed, i) alone.

    Raises:
        ValueError: fewer images than `size`, features that are not finite, other dimensions.
    """
    if size < 2 or subsets < 1:
        raise ValueError(f"at least 1 subset of at least 2 images is needed, got {subsets} of {size}.")
    check_features(size, f"for subsets of {size}", samples=samples, reference=reference)
    x, y = _in_one_place(samples, reference)
    found = []
    for i in range(subsets):
        rows = (random_subset(len(s), size, 2 * i + which, seed) for which, s in enumerate((x, y)))
        u, v = _derivatives(*(s[row] for s, row in zip((x, y), rows)))
        found.append((u.mean() + v.mean()).item())
    return SubsetEstimate(float(np.mean(found)), float(np.std(found)))


def _in_one_place(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    x = where_float64_is(samples)
    return x, where_float64_is(reference).to(x.device)


def _classes(strata: Tensor) -> list[Tensor]:
    """Numbers of the images of each class."""
    counts = strata.unique(return_counts=True)[1].tolist()
    if min(counts) < 2:
        raise ValueError("a class of 1 image has no two of it; leave the strata out, or give 2 of each class.")
    return list(strata.argsort().split(counts))


def _derivatives(x: Tensor, y: Tensor, classes: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """u [N], v [M] of `kernel_distance`; classes: rows of each, where their numbers are fixed."""
    xy, yx = _sums_across(x, y)
    within, others = _sums_within(x), len(x) if classes else len(x) - 1
    for rows in classes:
        within[rows] += _sums_within(x[rows]) / (len(rows) - 1)
    return within / others - xy / len(y), _sums_within(y) / (len(y) - 1) - yx / len(x)


def _sums_of_pairs(x: Tensor, y: Tensor) -> Tensor:
    """sum_{j != i} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j)  [N]."""
    xy, yx = _sums_across(x, y)
    return _sums_within(x) + _sums_within(y) - xy - yx + 2 * _kernel_of_pairs(x, y)


def _sums_across(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j k(x_i, y_j)  [N], sum_j k(y_i, x_j)  [M]."""
    xy, yx = (torch.zeros(len(s), dtype=torch.float64, device=x.device) for s in (x, y))
    for rows in blocks(len(x)):
        left = x[rows].double()
        for columns in blocks(len(y)):
            k = _kernel(left, y[columns].double())
            xy[rows] += k.sum(1)
            yx[columns] += k.sum(0)
    return xy, yx


def _sums_within(x: Tensor) -> Tensor:
    """sum_{j != i} k(x_i, x_j)  [N]; each pair of blocks is computed once."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows in blocks(len(x)):
        left = x[rows].double()
        for columns in blocks(rows.stop):
            k = _kernel(left, x[columns].double())
            if columns == rows:
                k.diagonal().zero_()
            else:
                sums[columns] += k.sum(0)
            sums[rows] += k.sum(1)
    return sums


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T).div_(x.shape[1]).add_(1)).pow_(3)


def _kernel_of_pairs(x: Tensor, y: Tensor) -> Tensor:
    """k(x_i, y_i) [N]."""
    products = [(x[rows].double() * y[rows].double()).sum(1) for rows in blocks(len(x))]
    return (torch.cat(products) / x.shape[1] + 1) ** 3
