"""A picture of a study as a file: PNG with its caption, and all that it is a function of, inside.

So a page can show it, and a later run can tell whether it is still the picture of what is declared.
"""

import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rae.folders import aside

CAPTION, MADE_OF = "Description", "made of"  # names of the texts in the file; the first is one that viewers know
SCALE, GAP, ABOVE, BELOW, DPI = 2, 8, 54, 18, 100  # pixels, but for a pixel's side and the dots of an inch


class Picture(NamedTuple):
    """What a file says of itself: its caption, and what it was made of."""

    caption: str
    made_of: dict[str, Any]


def write_picture(file: Path, pixels: np.ndarray, caption: str, made_of: dict[str, Any]) -> None:
    """uint8 [H,W,3] -> PNG, with a caption and what it was made of."""
    texts, data = PngInfo(), io.BytesIO()
    texts.add_itxt(CAPTION, caption)
    texts.add_itxt(MADE_OF, json.dumps(made_of))
    Image.fromarray(pixels).save(data, "PNG", optimize=True, pnginfo=texts)
    with aside(file) as hidden:
        hidden.write_bytes(data.getvalue())


def read_picture(file: Path) -> Picture | None:
    """What a file that `write_picture` wrote says of itself; None if there is no file.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with Image.open(file) as image:
            image.load()
            texts = image.text if image.format == "PNG" else {}
        if missing := [name for name in (CAPTION, MADE_OF) if name not in texts]:
            raise ValueError(f"its text {missing[0]!r} is missing, as where another program has saved it anew")
        return Picture(texts[CAPTION], dict(json.loads(texts[MADE_OF])))
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError, TypeError, ValueError) as error:  # Pillow says SyntaxError of a damaged PNG
        raise ValueError(
            f"{file} is no picture of a study: {error}. Remove it, and the same command draws it again: "
            f"rm {shlex.quote(str(file))}"
        ) from error


def sheet(rows: Sequence[Tensor], above: Sequence[str], below: Sequence[Sequence[str]]) -> np.ndarray:
    """Images in rows, with texts, on white; each pixel is drawn as a square of `SCALE`, none is blurred.

    Args:
        rows: each uint8 [n,3,h,w], of one n, h and w.
        above: what stands above each column; lines.
        below: for each row, what stands under each of its images.

    Returns:
        uint8 [H,W,3].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, _, h, w = rows[0].shape
    h, w = h * SCALE, w * SCALE
    width, height = GAP + count * (w + GAP), ABOVE + len(rows) * (h + BELOW)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    style = {"ha": "center", "va": "center", "fontsize": 8, "linespacing": 1.3, "color": "black"}
    for c, text in enumerate(above):
        figure.text((GAP + c * (w + GAP) + w / 2) / width, 1 - ABOVE / 2 / height, text, **style)
    for r, (images, texts) in enumerate(zip(rows, below, strict=True)):
        for c, (image, text) in enumerate(zip(images, texts, strict=True)):
            top, left = ABOVE + r * (h + BELOW), GAP + c * (w + GAP)
            large = np.kron(image.permute(1, 2, 0).numpy(), np.ones((SCALE, SCALE, 1), np.uint8))
            figure.figimage(large, left, height - top - h, origin="upper")
            figure.text((left + w / 2) / width, 1 - (top + h + BELOW / 2) / height, text, **style)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
