"""Images per second and core, from JPEG bytes to stage 1's random crop, with several decoders.

    pip install simplejpeg opencv-python-headless imagecodecs pyvips[binary] kornia-rs ajpegli   # any of them, or none
    python benchmarks/decode.py FOLDER-OF-PHOTOGRAPHS
    python benchmarks/decode.py                        # the photographs inside scikit-image

Two sizes of JPEG (quality 95, 4:2:0) are made in memory: photographs of 500 x 375, and sheets of 4 x 4 of them. Every
way decodes, scales the shorter side to 384 and cuts 256 x 256 out at random; "decode" is the decoder alone. Differences
are those from the package's own way, the first row, in grey levels. Its decoder stays Pillow: whatever decodes the same
pixels is faster by little once the crop is made, and what is much faster decodes other pixels.
"""

import argparse
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from rae.data.crops import center_crop, random_crop
from rae.data.image_set import read_image
from rae.data.images import open_images

SIZE = (256, 256)
PRESENT, WHOLE = "Pillow (rae)", "Pillow, all scaled"
Decoder = Callable[[bytes], np.ndarray]  # JPEG -> uint8 [H, W, 3]


def drafted(data: bytes) -> np.ndarray:
    """Pillow, with libjpeg's scaling by 1/2, 1/4 or 1/8 in the frequency domain, down to no less than is needed."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", tuple(3 * side // 2 for side in SIZE))
        return np.asarray(picture.convert("RGB"))


def decoders() -> dict[str, Decoder]:
    """Those that are installed."""
    found = {PRESENT: read_image, WHOLE: read_image, "Pillow, draft": drafted}
    with suppress(ImportError):
        import simplejpeg

        side = 3 * SIZE[0] // 2
        found["simplejpeg"] = partial(simplejpeg.decode_jpeg, fastdct=False, fastupsample=False)
        found["simplejpeg, scaled"] = partial(simplejpeg.decode_jpeg, min_height=side, min_width=side, min_factor=1)
    with suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        found["opencv"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    with suppress(ImportError):
        import imagecodecs

        found["imagecodecs"] = imagecodecs.jpeg8_decode
    with suppress(ImportError, OSError):
        os.environ["VIPS_CONCURRENCY"] = "1"  # read at import
        import pyvips

        found["pyvips"] = lambda data: pyvips.Image.new_from_buffer(data, "", access="sequential").numpy()
    with suppress(ImportError):
        from kornia_rs.io import decode_image_jpegturbo

        found["kornia-rs"] = lambda data: decode_image_jpegturbo(data, "rgb")
    with suppress(ImportError):
        import ajpegli

        found["ajpegli"] = ajpegli.imdecode
    return found


def cut_afterwards(image: np.ndarray, size: tuple[int, int], draws: np.ndarray) -> np.ndarray:
    """`random_crop` as it is written down: the whole image scaled, then the cut."""
    height, width = size
    scale = max(1.5 * height / image.shape[0], 1.5 * width / image.shape[1])
    rows, columns = (int(round(side * scale, 6)) for side in image.shape[:2])
    whole = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = int(draws[0] * (rows - height + 1)), int(draws[1] * (columns - width + 1))
    return whole[top : top + height, left : left + width]


def jpegs(source: str) -> dict[str, list[bytes]]:
    """About 100 photographs of 500 x 375 and 12 sheets of 2000 x 1500."""
    images = open_images(source)
    small = [center_crop(images[i][0], (375, 500)) for i in range(min(len(images), 100))]
    sheets = [
        np.concatenate(
            [np.concatenate([small[(16 * n + 4 * r + c) % len(small)] for c in range(4)], 1) for r in range(4)]
        )
        for n in range(12)
    ]
    return {"500 x 375": [_jpeg(image) for image in small], "2000 x 1500": [_jpeg(image) for image in sheets]}


def _jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=95, subsampling="4:2:0")
    return file.getvalue()


def seconds_per_image(run: Callable[[bytes], object], files: list[bytes]) -> float:
    start = time.process_time()
    for data in files:
        run(data)
    return (time.process_time() - start) / len(files)


def measure(files: list[bytes], ways: dict[str, Decoder], repeats: int) -> list[list[str]]:
    """One row for each way; repetitions are interleaved, so that a noisy machine is noisy for all."""
    draws = np.random.default_rng(0).random((len(files), 2))

    def cut(name: str, data: bytes, draw: np.ndarray) -> np.ndarray:
        return (cut_afterwards if name == WHOLE else random_crop)(ways[name](data), SIZE, draw)

    def cuts(name: str) -> np.ndarray:
        return np.stack([cut(name, data, draw) for data, draw in zip(files, draws)]).astype(int)

    present, times = cuts(PRESENT), {name: ([], []) for name in ways}
    for _ in range(repeats):
        for name, decode in ways.items():
            for run, kept in zip((decode, partial(cut, name, draw=draws[0])), times[name]):
                kept.append(seconds_per_image(run, files))
    first = statistics.median(times[PRESENT][1])
    rows = []
    for name in ways:
        alone, whole = (statistics.median(kept) for kept in times[name])
        apart = np.abs(cuts(name) - present)
        rate = [f"{1 / alone:.0f}", f"{1 / whole:.0f}", f"{first / whole:.2f}"]
        rows.append([name, *rate, f"{apart.mean():.3f}", str(apart.max())])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="photographs", help="any source of images  [photographs]")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    console, ways = Console(width=100), decoders()
    console.print(f"{platform.processor() or platform.machine()}, Pillow {Image.__version__}, CPU time of one process")
    for size, files in jpegs(arguments.source).items():
        kilobytes = statistics.mean(map(len, files)) / 1000
        table = Table(title=f"{len(files)} JPEGs of {size}, {kilobytes:.0f} kB, to a random crop of 256 x 256")
        for header in ("decoder", "decode / s", "images / s", "ratio", "mean diff.", "largest"):
            table.add_column(header, justify="left" if header == "decoder" else "right")
        for row in measure(files, ways, arguments.repeats):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
