"""Tokens <=> standardised latent maps: exact statistics per element, and noise augmentation as an explicit function.

tokens [B,N,C] => latent maps [B,C,h,w] => standardised latents, the space that the diffusion models live in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.folders import aside

# Variance floor under the square root, as in the authors' code (it is not in their checkpoints).
EPS = 1e-5

SigmaLaw = Literal["uniform", "half-normal"]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens <=> maps


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """z[b, c, i, j] = tokens[b, i*w + j, c]: row-major tokens [B,N,C] -> maps [B,C,h,w].

    Raises:
        ValueError: the number of tokens is not h*w.
    """
    height, width = grid
    batch, count, channels = tokens.shape
    if count != height * width:
        raise ValueError(
            f"{count} tokens do not fill a grid of {height} x {width} = {height * width}; pass their grid."
        )
    return tokens.transpose(1, 2).reshape(batch, channels, height, width)


def map_to_tokens(z: Tensor) -> Tensor:
    """Inverse of `tokens_to_map`: maps [B,C,h,w] -> tokens [B,N,C]."""
    return z.flatten(2).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Standardisation


def standardise(z: Tensor, mean: Tensor, var: Tensor, eps: float = EPS) -> Tensor:
    """(z - mean) / sqrt(var + eps), per element of the map.

    Args:
        z: latent maps [B,C,h,w].
        mean, var: statistics [C,h,w] of the data set (`LatentStats`).
        eps: variance floor, inside the square root.
    """
    return (z - mean) / torch.sqrt(var + eps)


def unstandardise(z: Tensor, mean: Tensor, var: Tensor, eps: float = EPS) -> Tensor:
    """z * sqrt(var + eps) + mean: inverse of `standardise`."""
    return z * torch.sqrt(var + eps) + mean


class LatentStats:
    """Exact mean and variance of latent maps, per element, over any number of batches and processes.

        n = n_a + n_b,  delta = mean_b - mean_a
        mean = mean_a + delta * n_b / n
        m2   = m2_a + m2_b + delta^2 * n_a * n_b / n          (m2: sum of squared deviations from the mean)

    This is the pairwise update of Chan, Golub and LeVeque (1983) in float64: the result is that of one two-pass
    computation over all the data, whatever their order and split, up to float64 rounding.

    Args:
        shape: (C, h, w) of one latent map.

    Attributes:
        count: number of maps seen.
        mean, m2: float64 [C,h,w], on the CPU.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.count = 0
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.m2 = torch.zeros(shape, dtype=torch.float64)

    @property
    def var(self) -> Tensor:
        """m2 / count, the population variance: float64 [C,h,w].

        Raises:
            ValueError: nothing has been seen yet.
        """
        if self.count == 0:
            raise ValueError(
                "the latent statistics have seen no latents, so there is no variance; call update() first."
            )
        return self.m2 / self.count

    def update(self, latents: Tensor) -> None:
        """Take in a batch of latent maps [B,C,h,w].

        Raises:
            ValueError: another shape, an empty batch, or a value that is not finite.
        """
        shape = tuple(self.mean.shape)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != shape or len(latents) == 0:
            raise ValueError(f"latents of shape {list(latents.shape)} do not fit statistics of {['B', *shape]}.")
        # MPS has no float64.
        x = latents.detach().to("cpu" if latents.device.type == "mps" else latents.device, torch.float64)
        mean = x.mean(dim=0)
        m2 = (x - mean).square().sum(dim=0)
        if not torch.isfinite(m2).all():
            raise ValueError("latents hold NaN or infinite values; statistics over them would be useless.")
        self._merge(len(x), mean.cpu(), m2.cpu())

    def merge(self, other: "LatentStats") -> None:
        """Take in everything that `other` has seen (another process, another shard).

        Raises:
            ValueError: the two are of different shapes.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"statistics of {list(self.mean.shape)} cannot be merged with statistics of {list(other.mean.shape)}; "
                "they are of different encoders or image sizes."
            )
        if other.count:
            self._merge(other.count, other.mean, other.m2)

    def _merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total

    def save(self, path: str | Path, about: Mapping[str, str] | None = None) -> None:
        """Write `count`, `mean` and `m2` to a safetensors file, which is whole or not there.

        Args:
            path: of the file.
            about: what it was taken of, for the file's own metadata.

        Raises:
            OSError: the disk is full or failed.
        """
        path = Path(path)
        try:
            with aside(path, durable=True) as hidden:
                tensors = {"count": torch.tensor(self.count), "mean": self.mean, "m2": self.m2}
                save_file(tensors, hidden, metadata=about and dict(about))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "LatentStats":
        """Read a file written by `save`.

        Raises:
            ValueError: no such file, a damaged one, or one that holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file of latent statistics; `rae stats` makes one.")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}); delete it. The run that it belongs to takes its "
                "statistics again; a file of `rae stats`, make again."
            ) from error
        found = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        if set(found) != {"count", "mean", "m2"} or found["mean"] != found["m2"] or len(found["mean"]) != 3:
            raise ValueError(f"{path} holds {found}, not latent statistics (count, mean and m2 [C,h,w]).")
        stats = cls(found["mean"])
        stats.count, stats.mean, stats.m2 = int(tensors["count"]), tensors["mean"], tensors["m2"]
        return stats


# ----------------------------------------------------------------------------------------------------------------------
# Noise augmentation (arXiv 2510.11690, Sec. 4.3): the decoder is trained on tokens + sigma * noise, one sigma per image


def draw_sigma(law: SigmaLaw, tau: float, draws: Tensor) -> Tensor:
    """sigma = tau * u, u ~ U(0,1)  ("uniform", the authors' code: mean 0.5 tau)
    sigma = |tau * n|, n ~ N(0,1)   ("half-normal", the paper: mean 0.8 tau).

    Args:
        law: which of the two.
        tau: scale; 0.8 in the paper.
        draws: one number per image [B], of the law's own distribution (u or n); drawing them is the caller's business.

    Raises:
        ValueError: an unknown law.
    """
    if law == "uniform":
        return tau * draws
    if law == "half-normal":
        return (tau * draws).abs()
    raise ValueError(f"unknown law of sigma {law!r}; there are 'uniform' (the code) and 'half-normal' (the paper).")


def add_noise(tokens: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """tokens + sigma * noise, before the tokens are standardised: for training a decoder, and for asking what it bears.

    Args:
        tokens: [B,N,C], straight from the encoder.
        sigma: one per image [B] (`draw_sigma`).
        noise: standard normal [B,N,C].
    """
    return tokens + sigma.view(-1, 1, 1) * noise
