"""A set of images, wherever it is stored: what every source hands out, the errors of all of them, and the decoder."""

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

NO_CLASSES = "or leave classes alone: --label '', in a recipe data.label= and nothing behind it."
SKIP = "or have it skipped: --skip-broken, in a recipe data.on_broken: skip."
# what Pillow raises of damaged files: RuntimeError of AVIF
UNDECODABLE = (OSError, SyntaxError, TypeError, ValueError, RuntimeError, struct.error, Image.DecompressionBombError)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class ImageError(ValueError):
    """Images that cannot be used; the message names the file, row or folder and the remedy."""


class PassedOver(UserWarning):
    """Images that lie in a folder and are not read; the message counts them."""


@dataclass(frozen=True)
class Images:
    """A fixed list of labelled images, any of which can be read at any time.

    `images[i]` is (uint8 [H, W, 3], label). Without classes `class_names` is None and every label is 0, which is
    the null label of an unconditional model.

    Attributes:
        identity: SHA-256 (hex) that changes with the images' number, order, sizes in bytes and labels, as the source
            has it; a resumed run compares it. The same images with their classes left alone have another one, except
            of folders: where labels do not matter, open them with a label of "".
    """

    names: Sequence[str]
    labels: Sequence[int]
    class_names: list[str] | None
    identity: str
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.read(index), self.labels[index]


def read_image(file: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Decode one image to uint8 [H, W, 3], upright (the camera's orientation tag is applied), transparency on white.

    Args:
        file: a path, or what is in the file.
        name: to call it in an error; None = `file`.

    Raises:
        ImageError: not an image, cut short, or with more than 8 bits a channel.
    """
    name = file if name is None else name
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            # Pillow has no mode for 16-bit colour: it reads raw "RGB;16B", for one, as 8 bits.
            if picture.mode.startswith(("I", "F")) or re.search(r";16[A-Z]", repr(picture.tile)):
                raise ImageError(f"{name}: more than 8 bits a channel (Pillow mode {picture.mode}); convert it to 8.")
            ImageOps.exif_transpose(picture, in_place=True)  # which a copy would slow down by half
            if picture.has_transparency_data:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except FileNotFoundError as error:
        raise ImageError(f"{name}: {not_there(file)}. Fetch or remove it, {SKIP}") from error
    except UNDECODABLE as error:
        if isinstance(error, ImageError):
            raise
        reason = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"{name}: cannot be decoded ({reason}). Replace or remove it, {SKIP}") from error


def not_there(file: str | Path) -> str:
    """What a file is that is not there."""
    if os.path.islink(file):
        return f"it is a link to {os.readlink(file)}, which is not here"
    return "there is no such file (any more)"


def digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
