"""Frechet distance between two sets of features, from moments that stream over batches and merge over processes.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

Heusel et al. 2017 (arXiv 1706.08500), Eq. (6). With Inception features this is FID, with DINOv2 features FD-DINOv2.
"""

import torch
from torch import Tensor

NEGATIVE = 1e-5  # a negative eigenvalue up to this part of the largest is rounding, as of statistics kept in float32


class Moments:
    """Count, mean and scatter of feature vectors in float64; the order of updates and merges does not matter.

    Attributes:
        count: n, vectors seen.
        mean: mu [d] float64.
        m2: sum of (f - mu)(f - mu)^T over the vectors [d,d] float64.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.m2 = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add a batch of features [B,d], any floating dtype and device."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features are [B, {len(self.mean)}] here, got {list(features.shape)}.")
        if not features.isfinite().all():
            rows = (~features.isfinite()).any(1).nonzero().flatten().tolist()
            raise ValueError(f"features of {len(rows)} of {len(features)} images are not finite (first: {rows[0]}).")
        if len(features) == 0:
            return
        features = features.detach().to("cpu", torch.float64)
        mean = features.mean(0)
        self._add(len(features), mean, (features - mean).T @ (features - mean))

    def merge(self, other: "Moments") -> None:
        """Add the vectors that `other` saw, for example in another process."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"cannot merge features of dimension {len(other.mean)} into {len(self.mean)}.")
        if other.count:
            self._add(other.count, other.mean, other.m2)

    def _add(self, count: int, mean: Tensor, m2: Tensor) -> None:
        # Chan, Golub and LeVeque (1983): the scatter of a union is the sum of scatters plus that of the two means
        total = self.count + count
        step = mean - self.mean
        self.m2 = self.m2 + m2 + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Sample covariance, m2 / (n - 1) [d,d]."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, this set has {self.count}.")
        return self.m2 / (self.count - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    With S = R R^T, the eigenvalues of S_1 S_2 are the squared singular values of R_1^T R_2, so the trace of the root is
    their sum: nothing complex, no failure for singular covariances (fewer vectors than dimensions), and no root of
    rounding noise.

    Args:
        mean1, mean2: [d].
        cov1, cov2: symmetric positive semi-definite [d,d].

    Returns:
        the distance, not negative, computed in float64.

    Raises:
        ValueError: other shapes, values that are not finite, a covariance that is not positive semi-definite.
    """
    shapes = [list(x.shape) for x in (mean1, cov1, mean2, cov2)]
    d = len(mean1)
    if shapes != [[d], [d, d], [d], [d, d]]:
        raise ValueError(f"means [d] and covariances [d,d] of one d are needed, got {shapes}.")
    given = {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}
    for name, x in given.items():
        if not x.isfinite().all():
            raise ValueError(
                f"{name} has {(~x.isfinite()).sum()} values that are not finite; compute the features or the reference "
                "statistics again."
            )
    mean1, cov1, mean2, cov2 = (x.to("cpu", torch.float64) for x in given.values())
    trace_of_root = torch.linalg.svdvals(_root(cov1, "cov1").T @ _root(cov2, "cov2")).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root
    return distance.clamp(min=0).item()  # equal sets leave rounding of either sign


def _root(cov: Tensor, name: str) -> Tensor:
    """R [d,r] with R R^T = cov, r its numerical rank."""
    eigenvalues, vectors = torch.linalg.eigh(cov)
    lowest, largest = eigenvalues[0], eigenvalues.abs().max()
    if lowest < -NEGATIVE * largest:
        raise ValueError(
            f"{name} is no covariance: its smallest eigenvalue is {lowest:.3g}, its largest {eigenvalues[-1]:.3g}; the "
            "file that it comes from is damaged or holds something else."
        )
    kept = eigenvalues > eigenvalues[-1] * len(cov) * torch.finfo(cov.dtype).eps
    return vectors[:, kept] * eigenvalues[kept].sqrt()
