"""Standard errors: how far a figure would scatter if the same model made other images.

    mean of x_i                   s / sqrt(N)
    smooth figure of all images   s(h) / sqrt(N), h_i = d(figure) / d(weight of image i), weights of mean 1
    any other                     jackknife: the figure again, without each image, or each part of them
    images drawn class by class   sqrt(sum_c n_c s_c^2) / N in place of s / sqrt(N): classes do not scatter

The first two are what a bootstrap tends to with many replicates (Efron 1982, "The jackknife, the bootstrap and other
resampling plans", ch. 5 and 6), without its work and its own noise, and they need no seed. `bootstrap_error` is for
figures that have no such formula, and to check those that have one. Samples are resampled, the reference is held fixed:
two models are compared with one reference, and what it has of chance in it, it does to both. Where a function resamples
the reference too it says so.

Where no image differs from the others there is nothing to resample: that tells of no scatter, which is not a scatter of
0, so there is no error. A share of none or all of the images has a bound in its place, `share_bound`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SMALLEST = 7  # digits behind the point, beyond which a number is written with an exponent
MISSED = 0.05  # chance that a bound does not hold
BOUNDS = "Where none or all of the images count there is no standard error; the bound in its place has 95 % confidence."
_PARTS, _REPLICATE, _SUBSET = range(100, 103)  # families of draws under one seed; `rae.data.order` has those below


class Measured(NamedTuple):
    """A figure.

    Attributes:
        value: the figure.
        error: its standard error; None where it has none.
    """

    value: float
    error: float | None


class Share(NamedTuple):
    """A share of images.

    Attributes:
        value: from 0 to 1.
        error: its standard error; None where it has none.
        bound: in its place, of none or all of them; see `share_bound`. None where it has an error, and of a share
            between that has none.
    """

    value: float
    error: float | None
    bound: float | None


def written(value: float, error: float | None, bound: float | None = None) -> str:
    """12.3456, 0.0712 -> "12.346 ± 0.071": to the second digit of the error; to four where it is unknown or far below.

    A share with a bound is none or all: "none, below 4.9 %", "all, above 95.1 %", with what `BOUNDS` says.
    """
    if bound is not None:
        digits = max(0, 1 - math.floor(math.log10(100 * min(bound, 1 - bound))))
        return f"{'all, above' if value else 'none, below'} {100 * bound:.{digits}f} %"
    if not error or not math.isfinite(value) or not math.isfinite(error):
        return f"{value:.4g}" + (f" ± {error:.2g}" if error else "")
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > SMALLEST:  # what rounding leaves of a distance of nothing, or of its error
        digits = 2 if abs(value) < 10 * error else 4
        return f"{value:.{digits}g} ± {error:.2g}"
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def all_equal(values: Tensor, strata: Tensor | None = None) -> bool:
    """Whether no image of values [N,...] differs from the others, of its class, so that an error is one of rounding."""
    if strata is None:
        return bool((values == values[0]).all())
    return all(all_equal(values[strata == each]) for each in strata.to(values.device).unique())


def fewest(strata: Tensor) -> int:
    """How many images there are of the class that has the fewest."""
    return strata.unique(return_counts=True)[1].min().item()


def strata_of(labels: Tensor) -> Tensor | None:
    """Labels [N] as strata of `standard_error`; None where there is one image of a class, which tells no scatter."""
    return labels if fewest(labels) > 1 else None


def standard_error(values: Tensor, strata: Tensor | None = None) -> float | None:
    """s / sqrt(N) of the mean of values [N], or sqrt(sum_c n_c s_c^2) / N, s with N - 1 and s_c with n_c - 1.

    Args:
        values: [N].
        strata: the class c of each image [N], where it is not by chance how many there are of a class (Cochran 1977,
            "Sampling techniques", ch. 5): what classes differ by does not scatter. None = it is by chance.

    Returns:
        None for a single image, and where all are equal, or all of a class.

    Raises:
        ValueError: a class of one image; see `strata_of`.
    """
    if strata is not None and fewest(strata) < 2:
        raise ValueError("a class of 1 image tells no scatter within; leave the strata out, or give 2 of each class.")
    if all_equal(values, strata):
        return None
    values = values.double()
    if strata is None:
        return values.std().item() / math.sqrt(len(values))
    _, of, counts = strata.to(values.device).unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(counts))
    squares = (values - (sums.index_add(0, of, values) / counts)[of]).square()
    scatter = sums.index_add(0, of, squares) / (counts - 1)  # s_c^2
    return (counts * scatter).sum().sqrt().item() / len(values)


def share_bound(value: float, count: int) -> float | None:
    """One-sided bound with 95 % confidence of a share of which N images show none or all; None for other shares.

        none   below 1 - 0.05^(1/N)
        all    above 0.05^(1/N)

    Shares beyond it would make none, or all, of N images do so in less than one of twenty cases (Clopper and Pearson
    1934, Biometrika 26(4)).
    """
    if value not in (0, 1):
        return None
    return MISSED ** (1 / count) if value else 1 - MISSED ** (1 / count)


def measured_mean(values: Tensor, strata: Tensor | None = None) -> Measured:
    """Mean of one number for each image, [N] on the CPU or a GPU, and its `standard_error`.

    Raises:
        ValueError: none, or values that are not finite.
    """
    if len(values) == 0:
        raise ValueError("the mean of 0 values is asked for; give one for each image.")
    if values.is_floating_point() and not (finite := values.isfinite()).all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(f"{len(bad)} of {len(values)} values are not finite (first: image {bad[0].item()}).")
    return Measured(values.double().mean().item(), standard_error(values, strata))


def drawn_error(value: float, count: int) -> float:
    """sqrt(p (1 - p) / (N - 1)) of a share p of N images; of a share within strata it is too large."""
    return math.sqrt(value * (1 - value) / (count - 1))


def measured_share(chosen: Tensor, strata: Tensor | None = None) -> Share:
    """Share of the images of a mask [N], and its `drawn_error`, or that of `strata`; or its bound.

    Where of each class all or none are chosen nothing scatters within: a share between has neither.
    """
    value, error = measured_mean(chosen, strata)
    return Share(value, error, share_bound(value, len(chosen)))


def jackknife_error(without: Tensor) -> float:
    """sqrt((G - 1) / G sum_g (f_g - mean f)^2), f_g the figure without part g of G [G]; a part may be one image."""
    g = len(without)
    return math.sqrt((g - 1) / g * (without - without.mean()).square().sum().item())


def bootstrap_error(statistic: Callable[[Tensor], float], count: int, *, replicates: int, seed: int = 0) -> float:
    """Standard deviation of a figure over images drawn anew from those that are there, with replacement.

    Not for nearest neighbours: an image that is drawn twice is its own neighbour. Of B replicates, the error has itself
    a relative error of 1 / sqrt(2 B - 2).

    Args:
        statistic: the figure of the images of these numbers [count], some of them several times.
        count: N.
        replicates: B, at least 2.
        seed: the draws of replicate b are a function of (seed, b) alone.
    """
    if replicates < 2:
        raise ValueError(f"a spread takes at least 2 replicates, got {replicates}; 100 tell it to 7 %.")
    found = []
    for replicate in range(replicates):
        drawn = np.random.default_rng((_REPLICATE, seed, replicate)).integers(count, size=count)
        found.append(statistic(torch.from_numpy(drawn)))
    return float(np.std(found, ddof=1))


def random_parts(count: int, parts: int, seed: int = 0, strata: Tensor | None = None) -> list[Tensor]:
    """Numbers 0 ... count - 1 in disjoint random parts, sizes equal to within one, each in ascending order.

    Of strata [count] all parts have equally many images, to within one.
    """
    order = torch.from_numpy(np.random.default_rng((_PARTS, seed)).permutation(count))
    if strata is None:
        return [part.sort().values for part in order.tensor_split(parts)]
    order = order[strata.cpu()[order].argsort(stable=True)]  # class by class, and dealt out
    return [order[part::parts].sort().values for part in range(parts)]


def random_subset(count: int, size: int, number: int, seed: int = 0) -> Tensor:
    """`size` different numbers of 0 ... count - 1; a function of (seed, number) alone."""
    return torch.from_numpy(np.random.default_rng((_SUBSET, seed, number)).choice(count, size, replace=False))
