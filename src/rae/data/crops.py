"""Images of any size -> images of one size: ADM's centre crop and stage 1's random crop."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def center_crop(image: np.ndarray, size: tuple[int, int], filter: str = "bicubic") -> np.ndarray:
    """Scale the image to cover `size`, then cut out the middle: ADM's preparation (arXiv 2105.05233), bit for bit.

    While both sides are at least twice the target they are halved with a box filter; one antialiased `filter` does
    the rest.

    Args:
        image: uint8 [H, W, 3] of any size; smaller ones are enlarged.
        size: (h, w) in pixels.
        filter: "bicubic" (ADM's), "bilinear", "lanczos", "box" or "nearest".

    Returns:
        uint8 [h, w, 3].
    """
    height, width = size
    picture = Image.fromarray(image)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    picture = np.asarray(picture.resize(scaled, Image.Resampling[filter.upper()]))
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def random_crop(image: np.ndarray, size: tuple[int, int], draws: Sequence[float]) -> np.ndarray:
    """Scale the image (bicubic, antialiased) to just cover 1.5 x `size`, then cut out a random part (Sec. 3, App. C).

    Only that part is computed, which takes a third of the time. Pillow keeps its place in float32, so that of the
    values cut out of the whole scaled image about 1 in 200 is another, by one level and seldom by two.

    Args:
        image: uint8 [H, W, 3] of any size.
        size: (h, w) in pixels; 256 is cut out of 384.
        draws: two numbers in [0, 1), the place of the crop (row, column) among all possible ones.

    Returns:
        uint8 [h, w, 3].
    """
    height, width = size
    scale = max(1.5 * height / image.shape[0], 1.5 * width / image.shape[1])
    # round(.., 6): 1.5 x the shorter side comes back whole, the longer side is cut to whole pixels as in the reference
    rows, columns = (int(round(side * scale, 6)) for side in image.shape[:2])
    top, left = int(draws[0] * (rows - height + 1)), int(draws[1] * (columns - width + 1))
    down, right = image.shape[0] / rows, image.shape[1] / columns  # pixels of the image for one of the scaled image
    box = (left * right, top * down, (left + width) * right, (top + height) * down)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box))
