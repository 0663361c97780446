"""The discriminator of stage 1: small heads on the tokens of a frozen vision transformer (StyleGAN-T's form)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from rae.autoencoder.encoders import Encoder

NormKind = Literal["sample", "batch"]


class SpectralConv(nn.Module):
    """A one-dimensional convolution by W / sigma, circular; sigma = u^T W v estimates W's largest singular value.

    `iterate` improves the estimate by one power iteration, v = W^T u / |W^T u|, u = W v / |W v|. It is called once in
    a training step of the discriminator: nothing depends on `train()` or on the number of forward passes.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        like = nn.Conv1d(inputs, outputs, kernel)
        self.weight, self.bias = like.weight, like.bias
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(inputs * kernel), dim=0))
        for _ in range(15):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        matrix = self.weight.flatten(1)
        self.v.copy_(F.normalize(matrix.mT @ self.u, dim=0, eps=1e-12))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0, eps=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        # u and v are copied: an iteration must not change what the backward pass of an earlier forward pass reads
        sigma = self.u.clone() @ (self.weight.flatten(1) @ self.v.clone())
        pad = self.weight.shape[2] // 2
        return F.conv1d(F.pad(x, (pad, pad), mode="circular") if pad else x, self.weight / sigma, self.bias)


class Norm(nn.Module):
    """(x - mean) / sqrt(var + 1e-6) * weight + bias for each channel of [B,C,N].

    Args:
        channels: C.
        kind: what mean and variance are taken over: the tokens of one "sample" (what the authors' batch norm computes),
            or all tokens of the "batch" of all processes.
    """

    def __init__(self, channels: int, kind: NormKind) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "sample":
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=1e-6)
        centred = x - _mean(x)
        scale = self.weight.view(-1, 1) * (_mean(centred.square()) + 1e-6).rsqrt()
        return centred * scale + self.bias.view(-1, 1)


def _mean(x: Tensor) -> Tensor:
    """Over batch and tokens, and over processes, each of which has the same number: [B,C,N] -> [1,C,1]."""
    mean = x.mean((0, 2), keepdim=True)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        mean = _SumOverProcesses.apply(mean) / torch.distributed.get_world_size()
    return mean


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes; the losses of each reach the images of all."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


class Head(nn.Module):
    """Features [B,C,N] -> one logit per token [B,N]."""

    def __init__(self, channels: int, kernel: int, norm: NormKind) -> None:
        super().__init__()
        self.conv1 = SpectralConv(channels, channels, 1)
        self.norm1 = Norm(channels, norm)
        self.conv2 = SpectralConv(channels, channels, kernel)
        self.norm2 = Norm(channels, norm)
        self.out = SpectralConv(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        x = (F.leaky_relu(self.norm2(self.conv2(x)), 0.2) + x) / math.sqrt(2)
        return self.out(x)[:, 0]


class Discriminator(nn.Module):
    """Images -> logits of every token at several depths of a frozen network; only the heads are trained.

    Args:
        features: the frozen network; what it sees has `features.config.input_size` pixels.
        depths: blocks, from 0, whose output is judged. The last block's is judged by one head more, the first one.
        kernel: tokens that the second convolution of a head sees, in raster order and around the end.
        norm: see `Norm`.
    """

    def __init__(
        self, features: Encoder, *, depths: Sequence[int] = (2, 5, 8, 11), kernel: int = 9, norm: NormKind = "sample"
    ) -> None:
        super().__init__()
        last = features.config.depth - 1
        if not depths or min(depths) < 0 or max(depths) > last:
            raise ValueError(f"depths {list(depths)} of {features.config.name}, whose blocks are 0 to {last}.")
        tokens = math.prod(features.grid)
        if kernel % 2 == 0 or kernel // 2 > tokens:
            raise ValueError(f"kernel {kernel} on {tokens} tokens; take an odd one that does not wrap around twice.")
        if tokens == 1 and norm == "sample":
            raise ValueError("norm: sample has no variance over a single token; give a larger input_size.")
        self._frozen = (features,)  # in a tuple: no part of the state, neither trained nor saved
        self.depths = (last, *depths)
        self.heads = nn.ModuleList(Head(features.width, kernel, norm) for _ in self.depths)

    @property
    def frozen(self) -> Encoder:
        return self._frozen[0]

    def features(self, images: Tensor) -> list[Tensor]:
        """Images [B,3,H,W] in [-1,1], of any size -> features [B,C,N] for each head, differentiable in the images.

        They are resized bilinearly (no antialias, aspect ratio not kept) to what the network sees.
        """
        encoder = self.frozen
        size = encoder.config.input_size
        x = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return [
            hidden.float().mT for hidden in encoder.hidden_states(encoder.normalise((x + 1) / 2), blocks=self.depths)
        ]

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """Features [B,C,N] for each head -> logits [B, heads * N]."""
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))

    def iterate(self) -> None:
        """One power iteration of every spectral norm."""
        for module in self.modules():
            if isinstance(module, SpectralConv):
                module.iterate()
