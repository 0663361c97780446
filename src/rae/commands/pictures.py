"""What the commands that write pictures share: PNGs that are whole or not there, new folders, checksums."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from rae.autoencoder.sources import weights_sha256

Rounding = Literal["nearest", "truncate"]


class OutputError(ValueError):
    """A folder that cannot be written to, because it holds something else."""


def checksum(module: torch.nn.Module) -> str:
    """SHA-256 (hex) of a model's weights."""
    return weights_sha256(module.state_dict().values())


def make_empty(folder: Path) -> None:
    """Make a folder, or take an empty one; raises OutputError for another."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OutputError(f"{folder} is not empty; give a new folder.")


def picture_name(index: int) -> str:
    """The file of image `index`."""
    return f"{index:06d}.png"


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H,W,3] as PNG: aside, then renamed, so that one that exists is whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(picture).save(aside, format="PNG")
    aside.replace(path)
