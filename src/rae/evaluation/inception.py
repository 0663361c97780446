"""The network that FID, sFID and the Inception Score are defined by: Inception-v3 in TensorFlow's graph of 2015-12-05.

uint8 images [B,3,H,W] => bilinear to 299 x 299 => (x - 128) / 128 => Inception-v3 => pool3, spatial features, logits

It is not the Inception-v3 of other libraries: its average pools do not count the padding, its last block pools by the
maximum, its classes are 1,008. Parameters have the names of the file that torch-fidelity and pytorch-fid publish, which
`load_inception` of `rae.evaluation.pretrained` finds. With random weights it equals torch-fidelity 0.4.0's module to
float rounding (tests/test_inception.py); with the published ones it could not be run where it was written.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299  # pixels per side that the network sees
DIM = 2048  # of pool3
SPATIAL = 7  # channels taken for sFID: 7 x 17 x 17 = 2,023 numbers, about as many as pool3 has

# One branch of a block is a list of steps: a pool; (name, channels, kernel) of a convolution of stride 1 that keeps the
# size; (name, channels, kernel, 2) of one of stride 2 without padding; a list of convolutions that stand side by side.
_mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(F.max_pool2d, kernel_size=3, stride=2)
Step = Callable[[Tensor], Tensor] | tuple | list
Branches = Sequence[Sequence[Step]]


def _block_35(pooled: int) -> Branches:
    return (
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [_mean, ("branch_pool", pooled, 1)],
    )


def _block_17(width: int) -> Branches:
    row, column = (1, 7), (7, 1)
    return (
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [
            ("branch7x7dbl_1", width, 1),
            *(("branch7x7dbl_2", width, column), ("branch7x7dbl_3", width, row)),
            *(("branch7x7dbl_4", width, column), ("branch7x7dbl_5", 192, row)),
        ],
        [_mean, ("branch_pool", 192, 1)],
    )


def _block_8(pool: Callable[[Tensor], Tensor]) -> Branches:
    row, column = (1, 3), (3, 1)
    return (
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]],
        [
            *(("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)),
            [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ],
        [pool, ("branch_pool", 192, 1)],
    )


BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": (
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        [_halve],
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": (
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            *(("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7))),
            *(("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)),
        ],
        [_halve],
    ),
    "Mixed_7b": _block_8(_mean),
    "Mixed_7c": _block_8(_max),  # TensorFlow's graph has it so, unlike the paper of Inception-v3
}


class Inception(nn.Module):
    """What ADM's evaluator (arXiv 2105.05233) takes from an image, in one pass.

    The network is frozen, and does the same in training and evaluation mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding="valid")
        channels = 192
        for name, branches in BLOCKS.items():
            block = Block(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(DIM, 1008)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Inception":
        """Does not reach the batch norms, which normalise by the statistics of the file."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images -> features.

        Args:
            images: uint8 [B,3,H,W] of any size.

        Returns:
            "features" [B,2048], `pool_3:0` of the graph, for FID; "spatial" [B,2023], the first 7 channels of
            `mixed_6/conv:0` in the order (row, column, channel), for sFID; "logits" [B,1008] by the matrix
            `softmax/weights` without the bias, for the Inception Score. All of them of the parameters' type.
        """
        x = (resize_bilinear(images.to(self.fc.weight.dtype), SIZE) - 128) / 128
        if x.device.type == "cpu":  # where convolutions take two thirds of the time so
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # -> [B,64,147,147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))  # -> [B,192,71,71]
        x = _halve(x)
        for name in BLOCKS:  # -> [B,C,35,35], [B,768,17,17], [B,C,8,8]
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":  # branch1x1 comes first
                spatial = x[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        features = x.mean((2, 3))
        return {"features": features, "spatial": spatial, "logits": features @ self.fc.weight.T}


class Convolution(nn.Module):
    """Convolution without bias, batch norm by frozen statistics, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, "valid" if stride > 1 else padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches of `BLOCKS` side by side; their channels one after the other.

    Attributes:
        channels: that come out.
    """

    def __init__(self, inputs: int, branches: Branches) -> None:
        super().__init__()
        self.channels, self._branches = 0, []
        for branch in branches:
            channels, path = inputs, []
            for step in branch:
                if isinstance(step, list):
                    path.append([self._convolution(channels, *one) for one in step])
                    channels = sum(outputs for _, outputs, _ in step)
                elif isinstance(step, tuple):
                    path.append(self._convolution(channels, *step))
                    channels = step[1]
                else:
                    path.append(step)
            self.channels += channels
            self._branches.append(path)

    def _convolution(self, inputs: int, name: str, *settings) -> Convolution:
        convolution = Convolution(inputs, *settings)
        self.add_module(name, convolution)
        return convolution

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([_follow(branch, x) for branch in self._branches], 1)


def _follow(path: Sequence[Callable[[Tensor], Tensor] | list[Convolution]], x: Tensor) -> Tensor:
    for step in path:
        x = torch.cat([one(x) for one in step], 1) if isinstance(step, list) else step(x)
    return x


def resize_bilinear(x: Tensor, size: int) -> Tensor:
    """y_i = x_l + (x_h - x_l) (p - l), p = i n / size, l = floor(p), h = min(l + 1, n - 1), along both axes.

    TensorFlow 1's ResizeBilinear (align_corners and half_pixel_centers both False), in its order of operations: the
    first pixel stays where it is, the last ones repeat the edge, and a large image is sampled, not averaged.

    Args:
        x: [B,C,H,W], floating point.
        size: pixels per side of the result; the aspect ratio is not kept.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.long()
        fraction = (position - low).to(x.dtype)
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * (fraction if dim == 3 else fraction[:, None])
    return x
