"""A judge that does not live in the encoder's space: a small network that learns here to tell the classes apart.

grey images [B,1,H,W] in [0,1] --two convolutions, one hidden layer--> features [B,64] --> logits [B,K]

Frechet distances of its features are on a scale of their own; whether it reads a sample as the class that was asked
for is a share. It shares nothing with the encoder: neither weights, nor the images that those come from.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rae.data.images import Images, to_tensor, to_unit
from rae.data.order import batch_positions, image_index
from rae.folders import aside, save_tensors
from rae.training.display import progress

FEATURES = 64
_SEED = 0  # of weights and order: there is one judge to a set of images


class Judge(nn.Module):
    """Images -> (features [B,64], logits [B,K]); see above.

    Args:
        side: (H, W) of the images.
        classes: K.
    """

    def __init__(self, side: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()
        )
        inside = 64 * math.prod(math.ceil(math.ceil(s / 2) / 2) for s in side)
        self.hidden, self.logits = nn.Linear(inside, FEATURES), nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B,3,H,W] -> features after the ReLU, logits."""
        grey = to_unit(images).mean(1, keepdim=True)
        features = F.relu(self.hidden(self.convolutions(grey).flatten(1)))
        return features, self.logits(features)


def train_judge(images: Images, *, steps: int, batch: int = 64, lr: float = 2e-3) -> Judge:
    """Train on labelled images of one size, kept in memory: cross-entropy, Adam, its rate falling to 0 as a cosine.

    Raises:
        ValueError: no classes, of which there must be two at least.
    """
    if not images.class_names or len(images.class_names) < 2:
        raise ValueError(f"the images have classes {images.class_names}; a judge of classes needs two or more.")
    pictures = torch.stack([to_tensor(images.read(i)) for i in range(len(images))])
    labels = torch.tensor(images.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        judge = Judge(tuple(pictures.shape[2:]), len(images.class_names))
    optimiser = torch.optim.Adam(judge.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with progress("judge", steps * batch) as advance:
        for positions in batch_positions(0, steps * batch, batch):
            rows = torch.tensor([image_index(p, len(images), _SEED) for p in positions])
            F.cross_entropy(judge(pictures[rows])[1], labels[rows]).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            advance(positions.stop)
    return judge.requires_grad_(False)


def save_judge(judge: Judge, path: Path) -> None:
    """Write the weights, whole or not at all."""
    with aside(path) as hidden:
        save_tensors(judge.state_dict(), hidden)


def load_judge(path: Path, side: tuple[int, int], classes: int) -> Judge:
    """Read what `save_judge` wrote."""
    judge = Judge(side, classes)
    judge.load_state_dict(load_file(path))
    return judge.requires_grad_(False)


@torch.no_grad()
def read(judge: Judge, images: Tensor, batch: int = 256) -> dict[str, Any]:
    """uint8 images [N,3,H,W] -> {"features": [N,64], "classes": [N] that it takes them for}."""
    parts = [judge(part) for part in images.split(batch)]
    features, logits = (torch.cat(values) for values in zip(*parts))
    return {"features": features, "classes": logits.argmax(1)}
