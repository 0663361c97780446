"""Picture files <=> tensors, for use from Python."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rae.data.crops import center_crop
from rae.data.image_set import ImageError, read_image
from rae.data.images import to_bytes, to_tensor, to_unit


def load_images(files: Sequence[str | Path], size: tuple[int, int] | int, *, enlarge: bool = False) -> Tensor:
    """Picture files -> [0,1] images [B,3,H,W], read and centre-cropped as in training.

    Args:
        files: of any kind that Pillow reads.
        size: (H, W) in pixels, such as `rae.image_size`, or one number for both.
        enlarge: allow pictures smaller than that (bicubic).

    Raises:
        ImageError: a file that cannot be decoded, or is too small.
        TypeError: one file, or a folder, instead of a list.
        ValueError: an empty list.
    """
    if isinstance(files, str | Path):
        one, listed = "file", f"[{str(files)!r}]"
        if Path(files).is_dir():
            one, listed = "folder", f"sorted(Path({str(files)!r}).iterdir())"
        raise TypeError(f"{files!r} is a {one}; give a list: load_images({listed}, size).")
    if not files:
        raise ValueError("there are no files to load; give a list of one or more.")
    height, width = (size, size) if isinstance(size, int) else size
    pictures = []
    for file in files:
        picture = read_image(file)
        if not enlarge and (picture.shape[0] < height or picture.shape[1] < width):
            raise ImageError(
                f"{file} is {picture.shape[0]} x {picture.shape[1]} pixels (height x width), smaller than the "
                f"{height} x {width} asked for; enlarge=True enlarges it (bicubic)."
            )
        pictures.append(to_tensor(center_crop(picture, (height, width))))
    return to_unit(torch.stack(pictures))


def save_image(images: Tensor, file: str | Path) -> None:
    """Write [0,1] images [3,H,W], or [B,3,H,W] side by side, as one picture; values outside are clamped.

    Args:
        images: as `RAE.decode` or `generate` gives them, on any device.
        file: its suffix says which kind, .png for one.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"images of shape {list(images.shape)}; a picture is made of [3,H,W] or [B,3,H,W].")
    if not images.isfinite().all():
        raise ValueError("images hold values that are not finite, which no picture shows.")
    row = torch.cat(list(images), dim=-1) if images.ndim == 4 else images  # [B,3,H,W] -> [3,H,B*W]
    Image.fromarray(to_bytes(row).permute(1, 2, 0).cpu().contiguous().numpy()).save(file)
