"""How much a frozen representation tells of an image's class: to a linear map, and to its neighbours (Table 1d).

training features [N,d], labels --fit_path--> LinearProbe --scores--> [n,C] --measure_accuracy--> Accuracies
training features [N,d], labels --neighbour_votes-------------------> [n,C] --measure_accuracy--> Accuracies

All is computed in float64 and solved to the optimum: the same features have the same figures, whoever asks, and those
of a set in another order are the same up to rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.evaluation.uncertainty import Share, measured_share

WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of which the best on held-out images is taken
TOP = 5  # classes, one of which must be right for the second figure, where there are more than these
GAP = 1e-12  # nats that the loss of a fitted probe may lie above its minimum
NEWTON, INNER = 100, 5000  # steps, and steps of conjugate gradients within one, that no features are known to need
CONSTANT = 1e-5  # a feature that varies by less than this part of its size varies by rounding
BLOCK = 2**24  # scores or similarities at a time: 128 MiB


# --- a part of a set -------------------------------------------------------------------------------------------------


def part_of_each_class(labels: Tensor, digests: Tensor, fraction: float, names: Sequence[str]) -> Tensor:
    """The part of every class whose digests come first: round(fraction n) of n different images, and one at least.

    An image is chosen for what it shows, not for its place, so the order of the set does not matter; copies of an image
    within a class are chosen together, so none is left on the other side.

    Args:
        labels: [N].
        digests: [N] int64, of the images' pixels.
        fraction: in (0, 1).
        names: of the classes, for the error.

    Returns:
        Mask [N]; of every class some images are in it and some are not.

    Raises:
        ValueError: a class of a single image and its copies.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        different, rank = digests[members].unique(return_inverse=True)
        if len(different) < 2:
            raise ValueError(
                f"class {names[label]!r} has {len(members)} images, and they are the same; it takes 2 to set one aside."
            )
        chosen[members] = rank < min(max(round(fraction * len(different)), 1), len(different) - 1)
    return chosen


# --- linear probe ----------------------------------------------------------------------------------------------------


class LinearProbe(NamedTuple):
    """scores = W (f - mean) / std + b: the logits of a multinomial logistic regression.

    Attributes:
        weight: W [C,d], of standardised features.
        bias: b [C].
        mean, std: of the training features [d]; the std of a constant feature is infinite, so it has no part.
        weight_decay: lambda that it was fitted with.
        gap: nats, by how much its training loss lies above the minimum at most (`_newton`).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    weight_decay: float
    gap: float

    def scores(self, features: Tensor) -> Tensor:
        """Features [n,d] -> [n,C] float64."""
        blocks = features.split(max(1, BLOCK // features.shape[1]))
        return torch.cat([((f.double() - self.mean) / self.std) @ self.weight.T + self.bias for f in blocks])


def fit_path(features: Tensor, labels: Tensor, classes: int, decays: Sequence[float]) -> Iterator[LinearProbe]:
    """argmin over W, b of -(1/N) sum_i log softmax(W x_i + b)[y_i] + (lambda/2) |W|^2,  x = (f - mean) / std.

    One probe for each lambda, each sought from the one before. scikit-learn's C is 1 / (N lambda). The optimal W lies
    in the span of the images, so it is sought along their principal axes: no more than N where there are more features,
    and less entangled than these.

    Args:
        features: [N,d], on the device to compute on, which must have float64.
        labels: [N], each of 0 ... classes - 1 at least once.
        classes: C, at least 2.
        decays: values of lambda > 0; from the largest to the smallest is quickest.

    Raises:
        ValueError: features that are not finite, or all constant; a class without images.
    """
    _check_features(features)
    if len(missing := sorted(set(range(classes)) - set(labels.tolist()))) or classes < 2:
        raise ValueError(f"{classes} classes, of which {missing[:5]} have no images; a probe tells apart what it sees.")
    mean = features.double().mean(0)
    std = features.double().std(0, correction=0)
    std[std <= CONSTANT * torch.hypot(mean, std)] = math.inf
    if std.isinf().all():
        raise ValueError(f"all {len(std)} features are the same for all {len(features)} images; they tell no classes.")
    z, axes = _principal_coordinates((features.double() - mean) / std)
    z = F.pad(z, (0, 1), value=1.0)  # [N,r] -> [N,r+1]: the bias is the weight of a one, without decay
    theta = z.new_zeros(classes, z.shape[1])
    for decay in decays:
        theta, gap = _newton(z, labels, theta, decay)
        yield LinearProbe(theta[:, :-1] @ axes.T, theta[:, -1], mean, std, decay, gap)


class Trial(NamedTuple):
    """What a weight decay came to on the images that choose it: accuracy, and mean cross-entropy in nats."""

    decay: float
    accuracy: float
    loss: float


def choose_decay(
    features: Tensor, labels: Tensor, held_out: Tensor, classes: int, decays: Sequence[float] = WEIGHT_DECAYS
) -> tuple[float, list[Trial]]:
    """The lambda with the best accuracy on held-out images; of several, the one with the least cross-entropy.

    Not cross-entropy alone, which a few odd images decide: of a feature that hardly varied in training they have many
    standard deviations. From the largest lambda downwards, until both figures are worse than the best before.

    Args:
        features, labels, classes: of the training set, as for `fit_path`.
        held_out: mask [N] of the images that choose, while the others are fitted.
        decays: the grid.

    Returns:
        lambda, and all that was tried.
    """
    tried: list[Trial] = []
    for probe in fit_path(features[~held_out], labels[~held_out], classes, sorted(decays, reverse=True)):
        scores, own = probe.scores(features[held_out]), labels[held_out]
        accuracy, loss = measure_accuracy(scores, own).top1.value, F.cross_entropy(scores, own).item()
        worse = tried and accuracy < max(t.accuracy for t in tried) and loss > min(t.loss for t in tried)
        tried = [*tried, Trial(probe.weight_decay, accuracy, loss)]
        if worse:
            break
    return max(tried, key=lambda t: (t.accuracy, -t.loss)).decay, tried


def _principal_coordinates(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N,d] of mean 0 -> coordinates [N,r] along orthonormal axes [d,r], r <= min(N, d): all in which x varies."""
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = values > 1e-12 * values[-1]
    axes = x.T @ (vectors[:, kept] / values[kept].sqrt()) if wide else vectors[:, kept]
    return x @ axes, axes


def _newton(z: Tensor, labels: Tensor, theta: Tensor, decay: float) -> tuple[Tensor, float]:
    """The minimum of the loss J over theta [C,r+1] of inputs z [N,r+1], from `theta` on, by Newton's method.

        P = softmax(z theta^T),  dJ/dtheta = (P - Y)^T z / N + lambda theta,  H D = R^T z / N + lambda D,
        R = P * (z D^T - sum over classes of P * z D^T)

    without lambda in the last column, the bias. Each step solves H D = -dJ/dtheta by conjugate gradients, with the
    diagonal of H as preconditioner, the more exactly the nearer it is, and is halved until J falls enough. J is convex.

    Returns:
        theta, and how far J lies above its minimum at most: |dJ/dW|^2 / (2 lambda), as J is lambda-convex in W; and for
        the bias the same with its own curvature in place of lambda.
    """
    n, ridge = len(z), z.new_full((z.shape[1],), decay)
    ridge[-1] = 0
    rows = [slice(start, start + BLOCK // len(theta)) for start in range(0, n, BLOCK // len(theta))]
    onto = F.one_hot(labels, len(theta))

    def loss_gradient_probabilities(theta: Tensor) -> tuple[float, Tensor, Tensor]:
        loss, gradient, p = (ridge * theta.square()).sum() / 2, ridge * theta, z.new_empty(n, len(theta))
        for part in rows:
            log_p = (z[part] @ theta.T).log_softmax(1)
            loss = loss - log_p[onto[part] == 1].sum() / n
            p[part] = log_p.exp()
            gradient = gradient + (p[part] - onto[part]).T @ z[part] / n
        return loss.item(), gradient, p

    loss, gradient, p = loss_gradient_probabilities(theta)
    for _ in range(NEWTON):
        diagonal = ridge + sum((p[part] * (1 - p[part])).T @ z[part].square() for part in rows) / n
        least = torch.cat([ridge[:-1].expand(len(theta), -1), diagonal[:, -1:]], dim=1)
        gap = (gradient.square() / (2 * least)).sum().item()
        if gap <= GAP:
            return theta, gap

        def curve(direction: Tensor) -> Tensor:
            product = ridge * direction
            for part in rows:
                u = p[part] * (z[part] @ direction.T)  # noqa: B023 - used within this step
                product = product + (u - p[part] * u.sum(1, keepdim=True)).T @ z[part] / n  # noqa: B023
            return product

        step = _conjugate_gradients(curve, -gradient, diagonal, least)
        slope, size, rounding = (gradient * step).sum().item(), 1.0, 1e-14 * abs(loss)
        while (trial := loss_gradient_probabilities(theta + size * step))[0] > loss + 1e-4 * size * slope + rounding:
            size /= 2
        theta, (loss, gradient, p) = theta + size * step, trial
    raise FloatingPointError(f"no optimum for weight decay {decay:g} in {NEWTON} steps of Newton; {gap:.1e} nats left.")


def _conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, least: Tensor) -> Tensor:
    """x with H x = right from 0 on, the residual no more than a quarter of the right side, the less the smaller it is.

    Args:
        product: D -> H D.
        right: [C,r+1].
        diagonal: of H, the preconditioner, and of the norm.
        least: curvatures of `gap`: a residual that would leave half of GAP ends it as well.
    """
    x, residual, direction = torch.zeros_like(right), right, right / diagonal
    square = (residual * direction).sum()
    enough = square * min(1 / 16, square.item())
    for _ in range(INNER):
        image = product(direction)
        size = square / (direction * image).sum()
        x, residual = x + size * direction, residual - size * image
        preconditioned = residual / diagonal
        square, before = (residual * preconditioned).sum(), square
        if square <= enough or (residual.square() / least).sum() <= GAP:
            break
        direction = preconditioned + square / before * direction
    return x


# --- neighbours ------------------------------------------------------------------------------------------------------


def neighbour_votes(
    features: Tensor, labels: Tensor, test: Tensor, classes: int, *, k: int = 20, temperature: float | None = 0.07
) -> Tensor:
    """votes[c] = sum over the k nearest training images of class c of exp(s / temperature), s = cos(f, f_test).

    The weighted vote of Wu et al. 2018 (arXiv 1805.01978, Sec. 3.4), with the k and temperature of DINO (arXiv
    2104.14294). Of training images that are as near as the k-th, those that stand first in the set are taken.

    Args:
        features, labels: of the training images [N,d], [N], on the device to compute on, which must have float64.
        test: features [n,d].
        classes: C.
        k: neighbours, at most N.
        temperature: above 0; None: every neighbour has one vote.

    Returns:
        [n,C] float64; `measure_accuracy` gives an equal vote to the class with the lower number.

    Raises:
        ValueError: features that are not finite or that are zero, which points nowhere; k out of range.
    """
    for part in (features, test):
        _check_features(part)
        if len(zero := (part == 0).all(1).nonzero()):
            raise ValueError(
                f"the features of {len(zero)} images are all zero (first: {zero[0].item()}): no direction."
            )
    if not 1 <= k <= len(features):
        raise ValueError(f"{k} neighbours asked for among {len(features)} training images.")
    against, votes = F.normalize(features.double()).T, features.new_zeros(len(test), classes, dtype=torch.float64)
    for start in range(0, len(test), max(1, BLOCK // len(features))):
        rows = slice(start, start + max(1, BLOCK // len(features)))
        cosines = F.normalize(test[rows].double()) @ against  # -> [b,N]
        near, which = cosines.topk(min(k + 1, len(features)))
        # topk takes any of those that are equally near: of the k-th's equals it is to be the first ones
        tied = (near[:, k - 1 : k] == near[:, k:]).any(1)
        if tied.any():
            near[tied, :k], which[tied, :k] = (x[:, :k] for x in cosines[tied].sort(descending=True, stable=True))
        near, which = near[:, :k], which[:, :k]
        weight = torch.ones_like(near) if temperature is None else (near / temperature).exp()
        votes[rows].scatter_add_(1, labels[which], weight)
    return votes


def _check_features(features: Tensor) -> None:
    if not features.isfinite().all():
        rows = (~features.isfinite()).any(1).nonzero().flatten().tolist()
        raise ValueError(f"features of {len(rows)} of {len(features)} images are not finite (first: {rows[0]}).")


# --- figures ---------------------------------------------------------------------------------------------------------


class Confusion(NamedTuple):
    """`count` test images of class `label` are taken for `taken_for`: `share` of that class."""

    label: int
    taken_for: int
    count: int
    share: float


class Accuracies(NamedTuple):
    """How well scores tell the classes of n test images.

    Attributes:
        top1: share of the images whose class has the highest score.
        top5: share of the images whose class has one of the five highest; None for five classes or fewer.
        per_class: top1 of each class; None for one without test images.
        confused: pairs of classes, the largest count first.
        right: mask [n] of the images that top1 counts.
    """

    top1: Share
    top5: Share | None
    per_class: list[Share | None]
    confused: list[Confusion]
    right: Tensor


def measure_accuracy(scores: Tensor, labels: Tensor) -> Accuracies:
    """Accuracies of scores [n,C] for labels [n]; of equal scores, the class with the lower number comes first.

    Errors are binomial, sqrt(p (1 - p) / (n - 1)): how far p would scatter over other test images, for this training
    set; of none or all there is a bound. Of two sets of scores for the same images, `measured_mean` of the difference
    of `right` has a smaller error.
    """
    classes = scores.shape[1]
    own = scores.gather(1, labels[:, None])
    before = torch.arange(classes, device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(1)
    taken = scores.argmax(1)  # the first of equals
    table = torch.zeros(classes, classes, dtype=torch.long, device=scores.device)
    table.index_put_((labels, taken), torch.ones_like(labels), accumulate=True)
    of_class, wrong = table.sum(1).tolist(), table.clone().fill_diagonal_(0)
    order = wrong.flatten().sort(descending=True, stable=True).indices[: (wrong > 0).sum()]
    pairs = [
        (label, other, wrong[label, other].item()) for label, other in (divmod(i, classes) for i in order.tolist())
    ]
    return Accuracies(
        top1=measured_share(rank == 0),
        top5=measured_share(rank < TOP) if classes > TOP else None,
        per_class=[measured_share(rank[labels == c] == 0) if of_class[c] else None for c in range(classes)],
        confused=[Confusion(label, other, count, count / of_class[label]) for label, other, count in pairs],
        right=rank == 0,
    )
