"""Nearest training images in an encoder's features, and whether samples lie nearer to them than new real images do.

A model that has learnt its images by heart makes samples that lie nearer to a training image than a new image of the
same kind does. How near that is, real images that were held out tell: their distances are what samples' are compared
with, so no distance needs to mean anything by itself.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rae.evaluation.uncertainty import Measured, Share, share_bound

NEAR = 0.01  # this share of new real images lies nearer than what is called near
_AT_ONCE = 2**24  # numbers that are held, in float64: 128 MiB
_ROWS = 8192  # vectors of the corpus in a block, at most
_DRAWS = 2000  # of the bootstrap


def nearest(queries: Tensor, corpus: Iterable[Tensor], k: int = 1) -> tuple[Tensor, Tensor]:
    """|q - c| for the k nearest c of each q, over a corpus of any length, block by block.

    Candidates are found by |q|^2 + |c|^2 - 2 q.c in float64; their distances are those of the differences themselves,
    so a copy has 0.

    Args:
        queries: q [n,d], any floating dtype.
        corpus: blocks [m,d], m of any size, on any device.
        k: how many.

    Returns:
        distances [n,k] float64, ascending, and the indices of the vectors in the corpus [n,k] int64; on the queries'
        device (CPU where it has no float64).

    Raises:
        ValueError: fewer than k vectors in the corpus, other dimensions, values that are not finite.
    """
    device = queries.device if queries.device.type in ("cpu", "cuda") else torch.device("cpu")
    q = _checked(queries, queries.shape[-1], "queries", 0).to(device, torch.float64)
    distances = q.new_full((len(q), k), math.inf)
    indices, start = torch.zeros(len(q), k, dtype=torch.int64, device=device), 0
    for block in _blocks(corpus, q.shape[1]):
        c = block.to(device, torch.float64)
        rows, count = max(1, _AT_ONCE // max(len(c), k * c.shape[1])), min(k, len(c))
        for at in range(0, len(q), rows):
            part = slice(at, at + rows)
            squares = c.square().sum(1) - 2 * q[part] @ c.T  # |q|^2, the same for a row, changes no order
            found = squares.topk(count, largest=False).indices
            exact = (q[part, None] - c[found]).norm(dim=2)
            both = torch.cat([distances[part], exact], 1), torch.cat([indices[part], found + start], 1)
            order = both[0].argsort(dim=1, stable=True)[:, :k]
            distances[part], indices[part] = both[0].gather(1, order), both[1].gather(1, order)
        start += len(c)
    if start < k:
        raise ValueError(f"the {k} nearest of {start} vectors are asked for; give more images, or ask for fewer.")
    return distances, indices


class Memorisation(NamedTuple):
    """How the distances of samples to their nearest training images compare with those of new real images.

    Attributes:
        auc: the chance that a sample lies nearer to the training images than a new real image does: 0.5 where they do
            not differ, 1 where every sample does.
        share: of samples that lie nearer than `near`; None for fewer new images than can tell.
        near: the distance below which the share `expected` of new images of the samples' own distribution would lie.
        chance: that so many samples, or more, lie nearer than that, if they are distributed as the new images are.
    """

    auc: Measured
    share: Share | None = None
    near: float | None = None
    expected: float | None = None
    chance: float | None = None


def memorisation(samples: Tensor, held_out: Tensor) -> Memorisation:
    """Compare distances to the nearest training image: of samples with those of real images that were held out.

        auc    P(s < h) + P(s = h) / 2, its error by DeLong et al. 1988 (Biometrics 44(3))
        near   the j-th smallest of the m distances h, j = floor(NEAR (m + 1))
        share  of s < near; j / (m + 1) are expected, whatever the distribution, if s and h have the same one

    The number of samples below the j-th smallest of m others of the same distribution is beta-binomial, with n, j and
    m + 1 - j: hence `chance`, exactly. The error of the share is by bootstrap of both sets; of none or all of the s
    there is a bound in its place.

    Args:
        samples: s [n], n > 1.
        held_out: h [m], m > 1; a share of NEAR takes m >= 1 / NEAR - 1.

    Raises:
        ValueError: too few.
    """
    n, m = len(samples), len(held_out)
    if min(n, m) < 2:
        raise ValueError(f"distances of {n} samples and {m} held-out images do not compare; give at least 2 of each.")
    s, h = (x.to("cpu", torch.float64).sort().values for x in (samples, held_out))
    farther, nearer = 1 - _placement(s, h), _placement(h, s)
    auc = Measured(farther.mean().item(), math.sqrt(farther.var().item() / n + nearer.var().item() / m) or None)
    j = math.floor(NEAR * (m + 1) + 1e-9)
    if j == 0:
        return Memorisation(auc)
    count = _below(s, h[j - 1])
    # Bootstrap: the j-th smallest of m draws from h is h at a rank of Beta(j, m + 1 - j), the count below it binomial.
    random = np.random.default_rng(0)
    ranks = np.ceil(m * random.beta(j, m + 1 - j, _DRAWS)).astype(np.int64).clip(1, m)
    drawn = random.binomial(n, _below(s, h[torch.from_numpy(ranks - 1)]).numpy() / n) / n
    value = count.item() / n
    bound = share_bound(value, n)
    share = Share(value, float(drawn.std(ddof=1)) if bound is None else None, bound)
    return Memorisation(auc, share, h[j - 1].item(), j / (m + 1), _beta_binomial_tail(int(count), n, j, m + 1 - j))


def _placement(x: Tensor, sorted_others: Tensor) -> Tensor:
    """The share of the others below each x, half of those that are equal to it."""
    below, until = (torch.searchsorted(sorted_others, x, right=right) for right in (False, True))
    return (below + until).double() / (2 * len(sorted_others))


def _below(sorted_values: Tensor, limits: Tensor) -> Tensor:
    return torch.searchsorted(sorted_values, limits)


def _beta_binomial_tail(count: int, n: int, a: int, b: int) -> float:
    """P(K >= count) of the beta-binomial distribution: sum over k of C(n,k) B(k + a, n - k + b) / B(a, b)."""
    k = torch.arange(count, n + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_beta = torch.lgamma(k + a) + torch.lgamma(n - k + b) - math.lgamma(n + a + b)
    log_norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return min(1.0, (log_choose + log_beta - log_norm).exp().sum().item())


def _blocks(corpus: Iterable[Tensor], dim: int) -> Iterator[Tensor]:
    start = 0
    for block in corpus:
        yield from filter(len, _checked(block, dim, "corpus", start).split(_ROWS))
        start += len(block)


def _checked(x: Tensor, dim: int, name: str, start: int) -> Tensor:
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(f"{name}: features are [n, {dim}] here, got {list(x.shape)}; take those of one extractor.")
    if not x.isfinite().all():
        rows = (~x.isfinite()).any(1).nonzero().flatten()
        raise ValueError(f"{name}: features of {len(rows)} images are not finite (first: {start + rows[0].item()}).")
    return x
