"""Kernel distance (KID with features of Inception): the squared maximum mean discrepancy of two sets, without bias.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    k(x, y) = (x.y / d + 1)^3

Binkowski et al. 2018 (arXiv 1801.01401). The kernel sees means, covariances and third moments.
Its expectation does not depend on the number of images, and two sets of one distribution have 0 on average: values
below 0 are what that takes, and are not clipped.
"""

import math
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


class _Sums(NamedTuple):
    """Sums of the kernel for every image, float64: xx_i = sum_{j != i} k(x_i, x_j), and so on."""

    xx: Tensor  # [N]
    yy: Tensor  # [M]
    xy: Tensor  # [N]
    yx: Tensor  # [M]


def kernel_distance(
    samples: Tensor, reference: Tensor, *, paired: bool = False, strata: Tensor | None = None
) -> Measured:
    """MMD^2 of all images, from tiles of all pairs, and its standard error.

    It is what the mean over subsets tends to when there are ever more of them (`subset_distance`). The error is a
    jackknife over every image of both sets: whether two sets are of one distribution is asked of this distance more
    than of others, and chance in the reference moves it away from 0 as much as chance in the samples. For two sets of
    one distribution, where the sum over pairs is all that is left, the error comes out too large, by 2^(1/2) at most.
    Reconstructions change with their originals: of these each x is left out with its y.

    Args:
        samples: x [N,d], any floating dtype; the work is done in float64 on their device (CPU where it has none).
        reference: y [M,d].
        paired: x_i is a reconstruction of y_i.
        strata: of the samples, see `standard_error`.

    Raises:
        ValueError: fewer than 3 images, features that are not finite, other dimensions, pairs of N != M.
    """
    check_features(3, "for an estimate with an error", samples=samples, reference=reference)
    if paired and len(samples) != len(reference):
        raise ValueError(f"{len(samples)} samples and {len(reference)} originals are no pairs; give one for each.")
    x, y = _in_one_place(samples, reference)
    sums = _kernel_sums(x, y)
    n, m = len(sums.xx), len(sums.yy)
    xx, yy, xy = sums.xx.sum(), sums.yy.sum(), sums.xy.sum()
    value = _mmd2(xx, n, yy, m, xy)
    if all_equal(samples) and all_equal(reference):
        return Measured(value.item(), None)
    # the jackknife of f is the standard error of the mean of (n - 1) f_i, f_i being f without image i
    if paired:
        across = xy - sums.xy - sums.yx + _kernel_of_pairs(x, y)
        without = _mmd2(xx - 2 * sums.xx, n - 1, yy - 2 * sums.yy, n - 1, across)
        return Measured(value.item(), standard_error((n - 1) * without, strata))
    without_x = _mmd2(xx - 2 * sums.xx, n - 1, yy, m, xy - sums.xy)
    without_y = _mmd2(xx, n, yy - 2 * sums.yy, m - 1, xy - sums.yx)
    errors = standard_error((n - 1) * without_x, strata), standard_error((m - 1) * without_y)
    return Measured(value.item(), math.hypot(*(error or 0.0 for error in errors)))


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
        sums = _kernel_sums(*(s[row] for s, row in zip((x, y), rows)))
        found.append(_mmd2(sums.xx.sum(), size, sums.yy.sum(), size, sums.xy.sum()).item())
    return SubsetEstimate(float(np.mean(found)), float(np.std(found)))


def _in_one_place(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    x = where_float64_is(samples)
    return x, where_float64_is(reference).to(x.device)


def _mmd2(xx: Tensor, n: int, yy: Tensor, m: int, xy: Tensor) -> Tensor:
    """Sums over all pairs -> MMD^2."""
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def _kernel_sums(x: Tensor, y: Tensor) -> _Sums:
    xy, yx = (torch.zeros(len(s), dtype=torch.float64, device=x.device) for s in (x, y))
    for rows in blocks(len(x)):
        left = x[rows].double()
        for columns in blocks(len(y)):
            k = _kernel(left, y[columns].double())
            xy[rows] += k.sum(1)
            yx[columns] += k.sum(0)
    return _Sums(_sums_within(x), _sums_within(y), xy, yx)


def _sums_within(x: Tensor) -> Tensor:
    """Sums over the others [N]; each pair of blocks is computed once."""
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
