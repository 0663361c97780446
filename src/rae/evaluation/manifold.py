"""Precision, recall, density and coverage: do samples lie where real images do, and the other way round.

With r_k(x) the distance of x to its k-th nearest neighbour in its own set, itself not counted, samples x, reference y:

    precision   share of x  in some ball  |x - y| <= r_k(y)        is what is made like what is real?
    recall      share of y  in some ball  |x - y| <= r_k(x)        could what is real be made?
    density     mean over x of the number of balls  |x - y| <= r_k(y), over k       (not bounded by 1)
    coverage    share of y  with some x in their own ball  |x - y| <= r_k(y)

Kynkaanniemi et al. 2019 (arXiv 1904.06991), section 2; Naeem et al. 2020 (arXiv 2002.09797), section 3.

Published conventions differ in k: ADM's evaluator takes 3, prdc 5. Neither counts an image among its own neighbours.
prdc has < for <=, which differs for copies alone, and ADM computes distances in float16, three digits. Here distances
are float64, with edges of balls moved out by its rounding: copies are at distance 0, in balls of radius 0 as well, and
in which order or blocks the images come decides nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rae.evaluation.feature_sets import blocks, check_dimensions, check_features, where_float64_is
from rae.evaluation.uncertainty import (
    Measured,
    Share,
    fewest,
    jackknife_error,
    measured_mean,
    measured_share,
    random_parts,
    share_bound,
)

ROUNDING = 1e-13  # of |x|^2 + |y|^2: more than float64 loses in a squared distance, less than float32 features can tell
PARTS = 20  # of the samples, for the jackknife
LEAST_PARTS = 8  # each with an image of every class, or the classes are taken as drawn


class Manifold(NamedTuple):
    """A set of images and how near their neighbours are; a reference's serves for many sets of samples.

    Attributes:
        features: x [N,d].
        centre: their mean [d] float64, from which they are looked at: far from it differences would drown in |x|^2.
        neighbours: r_1(x)^2 ... r_k(x)^2 [N,k] float64, ascending.
    """

    features: Tensor
    centre: Tensor
    neighbours: Tensor


class Overlap(NamedTuple):
    """Two manifolds in each other."""

    precision: Share
    recall: Share
    density: Measured
    coverage: Share


def manifold(features: Tensor, *, k: int, name: str = "features") -> Manifold:
    """Distances to the k nearest neighbours within a set, from all pairs, of which one tile is held at a time.

    Args:
        features: [N,d], any floating dtype; the work is done in float64 on their device (CPU where it has none).
        k: the most neighbours that will be asked for.
        name: in errors.

    Raises:
        ValueError: N <= k, features that are not finite.
    """
    if k < 1:
        raise ValueError(f"k counts neighbours, from 1; got {k}.")
    check_features(k + 1, f"for a neighbour number {k}", **{name: features})
    features = where_float64_is(features)
    centre = torch.stack([features[rows].double().sum(0) for rows in blocks(len(features))]).sum(0) / len(features)
    nearest = centre.new_full((len(features), k + 1), torch.inf)  # the image itself among them
    for rows in blocks(len(features)):
        x = _centred(features[rows], centre)
        for columns in blocks(rows.stop):  # each pair of blocks once
            d2 = _squared_distances(*x, *_centred(features[columns], centre))
            sides = [(rows, d2), (columns, d2.T)] if columns != rows else [(rows, d2)]
            for place, found in sides:
                closest = found.contiguous().topk(min(k + 1, found.shape[1]), largest=False).values
                nearest[place] = torch.cat([nearest[place], closest], 1).topk(k + 1, largest=False).values
    return Manifold(features, centre, nearest[:, 1:])


def overlap(samples: Manifold, reference: Manifold, *, k: int, strata: Tensor | None = None, seed: int = 0) -> Overlap:
    """Precision, recall, density and coverage of samples [N] against a reference [M], with standard errors.

    N and M matter, and their ratio: recall and coverage rise with N, precision with M. Compare figures of the same
    numbers, as published ones are (ADM: N = 50,000, M = 10,000).

    Errors are of other samples against the same reference. Precision and density are means over samples. To recall and
    coverage all samples contribute together: they are counted again without each of 20 random parts of the samples
    (jackknife), whose radii stay what they are. Recall's comes out too large near 1, up to twice in trials. Where it
    changes nothing there is no error, and of none or all of the y a bound, which is of other real images.

    A part that lacks classes would bring what these differ by into the error, so of strata there are no more parts than
    images of a class; `LEAST_PARTS` tell it to a third, and below that recall and coverage have errors as of classes
    that are drawn.

    Args:
        samples, reference: of at least k neighbours.
        k: 3 as ADM's evaluator, 5 as prdc.
        strata: of the samples, see `standard_error`; the parts have equally many of each, to within one.
        seed: of the parts.

    Raises:
        ValueError: fewer neighbours than k, other dimensions.
    """
    known = [each.neighbours.shape[1] for each in (samples, reference)]
    if not 1 <= k <= min(known):
        raise ValueError(
            f"neighbour {k} is asked for, known are 1 to {known[0]} of the samples and 1 to {known[1]} of the "
            f"reference; make both with manifold(..., k={max(k, 1)})."
        )
    check_dimensions(samples=samples.features, reference=reference.features)
    n, m = len(samples.features), len(reference.features)
    within_classes = strata if strata is not None and fewest(strata) >= LEAST_PARTS else None
    number = min(PARTS, n if within_classes is None else fewest(strata))
    parts = [part.to(samples.centre.device) for part in random_parts(n, number, seed, within_classes)]
    centre = reference.centre.to(samples.centre.device)
    within = torch.zeros(n, dtype=torch.int64, device=centre.device)  # balls of the reference about a sample
    reached, covered = torch.zeros(2, len(parts), m, dtype=torch.bool, device=centre.device)
    for columns in blocks(m):
        y, yy = _centred(reference.features[columns].to(centre.device), centre)
        y_edges = reference.neighbours[columns, k - 1].to(centre.device) + 2 * ROUNDING * yy
        for part, rows in enumerate(parts):
            x, xx = _centred(samples.features[rows], centre)
            x_edges = samples.neighbours[rows, k - 1] + 2 * ROUNDING * xx
            d2 = _squared_distances(x, xx, y, yy)
            real = d2 <= y_edges
            within[rows] += real.sum(1)
            covered[part, columns] = real.any(0)
            reached[part, columns] = (d2 <= x_edges[:, None]).any(0)
    return Overlap(
        precision=measured_share(within > 0, strata),
        recall=_of_parts(reached),
        density=measured_mean(within.double() / k, strata),
        coverage=_of_parts(covered),
    )


def _centred(features: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, x = features - centre [n,d] and |x|^2 [n]."""
    x = features.double() - centre
    return x, x.square().sum(1)


def _squared_distances(x: Tensor, xx: Tensor, y: Tensor, yy: Tensor) -> Tensor:
    """|x|^2 + |y|^2 - 2 x.y  [n,d], [m,d] -> [n,m]."""
    return torch.addmm(xx[:, None] + yy, x, y.T, alpha=-2)


def _of_parts(by_part: Tensor) -> Share:
    """Share of images that some part of the samples [G,M] serves, and its jackknife over the parts."""
    serving, count = by_part.sum(0), by_part.shape[1]
    without = ((serving - by_part.int()) > 0).sum(1).double()  # whole numbers: equal ones have an error of 0 exactly
    value, error = (serving > 0).double().mean().item(), jackknife_error(without) / count or None
    return Share(value, error, None if error else share_bound(value, count))
