"""LPIPS on VGG16: the perceptual distance of the paper's stage 1 (arXiv 1801.03924, version 0.1)."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)  # VGG16's five stages
_CONVOLUTIONS = (2, 2, 3, 3, 3)  # in each of them
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# torchvision counts ReLUs and poolings as layers: these of its `features` are convolutions, in order
_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_STARTS = (0, 4, 9, 16, 23)  # first layers of the five slices that LPIPS packages cut them into


class LPIPS(nn.Module):
    """d(x, y) = sum over stages s of mean over pixels of w_s . (f_s(x) / |f_s(x)| - f_s(y) / |f_s(y)|)^2.

    f_s is what leaves the last ReLU of stage s, |.| the norm over channels (+ 1e-10), w_s >= 0 a weight per channel.
    The network is frozen, and does the same in training and evaluation.

    Args:
        widths: channels of the five stages; other than VGG16's own for tests.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        sizes = [width for width, count in zip(widths, _CONVOLUTIONS) for _ in range(count)]
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip([3, *sizes], sizes))
        self.weights = nn.ParameterList(torch.zeros(width) for width in widths)
        self.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images [B,3,H,W] in [-1,1] -> the five stages' outputs [B,C_s,H/2^s,W/2^s]."""
        x = (x - x.new_tensor(_SHIFT).view(3, 1, 1)) / x.new_tensor(_SCALE).view(3, 1, 1)
        layers, outputs = iter(self.convolutions), []
        for stage, count in enumerate(_CONVOLUTIONS):
            if stage:
                x = F.max_pool2d(x, 2)
            for _ in range(count):
                x = F.relu(next(layers)(x))
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two batches of images [B,3,H,W] in [-1,1], neither clamped -> distances [B]; at least 16 x 16 pixels."""
        total = x.new_zeros(len(x))
        for weight, *both in zip(self.weights, self.features(x), self.features(y)):
            a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in both)
            total = total + torch.einsum("bchw,c->b", (a - b).square(), weight) / a[0, 0].numel()
        return total

    def load_published(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights under their published names: `features.N.*` of torchvision's VGG16 or `net.sliceS.I.*` of the
        LPIPS packages, and `linS.model.1.weight`. VGG16's classifier and what LPIPS holds besides are passed over.

        Raises:
            KeyError: names that are missing or unknown.
        """
        state = {}
        for name, value in tensors.items():
            if found := re.fullmatch(r"(?:features|net\.slice([1-5]))\.(\d+)\.(weight|bias)", name):
                index, start = int(found[2]), _STARTS[int(found[1] or 1) - 1]
                index += start if index < start else 0  # some count the layers of a slice from 0
                if index not in _FEATURES:
                    raise KeyError(f"unknown tensor {name!r}; VGG16 (without batch norm) has no such convolution.")
                state[f"convolutions.{_FEATURES.index(index)}.{found[3]}"] = value
            elif found := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
                state[f"weights.{found[1]}"] = value.flatten()
            elif not re.match(r"classifier\.|scaling_layer\.|lins\.", name):  # lins.S are lin0 to lin4 once more
                raise KeyError(f"unknown tensor {name!r}; VGG16 has features.N.*, LPIPS linS.model.1.weight.")
        if missing := self.state_dict().keys() - state.keys():
            raise KeyError(f"no tensors for {', '.join(sorted(missing)[:5])}; VGG16's and LPIPS's are both needed.")
        self.load_state_dict(state)
