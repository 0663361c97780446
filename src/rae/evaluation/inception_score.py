"""Inception Score: are samples told apart by a classifier, and are they of many classes?

    IS = exp(mean_x KL(p(c|x) || p(c))),    p(c) = mean_x p(c|x)

Salimans et al. 2016 (arXiv 1606.03498), section 4. It knows no reference: 1 is the least, the number of classes the
most, and real images have a value of their own.
"""

import math

import torch
from torch import Tensor

from rae.evaluation.feature_sets import ROWS, check_features, where_float64_is
from rae.evaluation.uncertainty import Measured, all_equal, standard_error

SPLIT = 5000  # images, as ADM's evaluator: ten splits of 50,000


def inception_score(logits: Tensor, *, split: int | None = SPLIT, strata: Tensor | None = None) -> Measured:
    """Mean of the scores of consecutive splits, in float64, and its standard error.

    A score is too low at small numbers of images, for p(c) fits those that it is the mean of; hence splits of a fixed
    size, and a last one that is shorter lowers the mean as it does in ADM's evaluator. Splits are taken in the order
    given: images that lie class by class must be mixed first, or each split knows a few classes alone.

    The error is that of log IS, a mean of KL(p(c|x) || p(c)) in which the images move p(c) to second order only, times
    IS. It holds for one split as for ten, whose standard deviation is what papers print behind +-.

    Args:
        logits: [N,C] of the classifier; for published figures, Inception's without their bias.
        split: images in one; None = all together, which no order of the images changes.
        strata: of the images, see `standard_error`.

    Raises:
        ValueError: fewer than 2 images or classes, logits that are not finite, a split of less than 2.
    """
    check_features(2, "for a score", logits=logits)
    if logits.shape[1] < 2:
        raise ValueError(f"logits of {logits.shape[1]} class tell nothing apart; give those of a classifier, [N,C].")
    if split is not None and split < 2:
        raise ValueError(f"a split of {split} image always scores 1; take {SPLIT}, or None for all images together.")
    scores, influences = [], []
    for part in where_float64_is(logits).split(split or len(logits)):
        divergences = _divergences(part)
        scores.append(math.exp(divergences.mean().item()))
        # in a split of equal images, which always scores 1, what is left about the mean is rounding
        about = torch.zeros_like(divergences) if all_equal(divergences) else divergences - divergences.mean()
        influences.append(scores[-1] * about / len(part))
    influence = torch.cat(influences) * (len(logits) / len(scores))
    return Measured(sum(scores) / len(scores), standard_error(influence, strata))


def _divergences(logits: Tensor) -> Tensor:
    """KL(p(c|x) || p(c)) in nats [N]."""
    blocks = logits.split(ROWS)
    sums = torch.stack([part.double().log_softmax(1).logsumexp(0) for part in blocks])
    log_mean = sums.logsumexp(0) - math.log(len(logits))
    log_p = (part.double().log_softmax(1) for part in blocks)
    return torch.cat([(p.exp() * (p - log_mean)).sum(1) for p in log_p])
