"""What `rae evaluate` judges: images that are there, or a model's, which it makes first.

a run of train-dit, a diffusion model         => samples, of `rae sample`
a run of train-decoder, an autoencoder        => reconstructions of given images, of `rae reconstruct`
a folder that one of these commands wrote     => the same, with the protocol beside them
anything else that holds images               => images
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rae.commands.pictures import OutputError, picture_name
from rae.commands.sample_folder import PROTOCOL
from rae.data.image_set import Images, digest, read_image
from rae.data.images import DataConfig, open_images, subset
from rae.evaluation.judge import take_turns
from rae.folders import saved_kind

RECONSTRUCTIONS, FIGURES = "reconstructions.json", "figures.json"  # what `rae reconstruct` was asked for, and found


@dataclass(frozen=True)
class Subject:
    """Images to be judged.

    Attributes:
        kind: what they are.
        source: where they are.
        images: in their order.
        originals: of reconstructions, in the same order.
        protocol: how they were made, as far as their folder tells.
        without: images of which there are no reconstructions, since they cannot be read; None = not known.
        turns: samples of several classes, of which none was drawn: how many there are of each is no chance.
    """

    kind: Literal["samples", "reconstructions", "images"]
    source: str
    images: Images
    originals: Images | None
    protocol: dict[str, Any]
    without: int | None = 0
    turns: bool = False


def open_subject(source: str, data: DataConfig, num: int | None) -> Subject:
    """Images that are there.

    Args:
        source: a folder of `rae sample` or `rae reconstruct`, or whatever `open_images` reads.
        data: how they are read; with a label of "" their classes are left alone, those of samples as well.
        num: the first so many; None = all.

    Raises:
        ImageError: nothing that can be read.
        OutputError: a protocol that cannot be read; samples that were packed; fewer images than `num`.
    """
    folder = Path(source).expanduser()
    originals, protocol, without = None, {}, 0
    if (folder / RECONSTRUCTIONS).is_file():
        kind, protocol = "reconstructions", _read(folder / RECONSTRUCTIONS)
        originals, images = _halves(folder)
    else:
        if (folder / PROTOCOL).is_file() and not any(folder.glob("*.png")):
            raise OutputError(
                f"{source} holds no pictures of its samples: they were packed (--no-pngs), judge the .npz; or "
                "`rae sample` was interrupted, the same command goes on."
            )
        kind, images = "images", open_images(source, data.image, data.label)
        if (folder / PROTOCOL).is_file():
            kind, protocol = "samples", _read(folder / PROTOCOL)
            images = images if data.label == "" else _labelled(images, protocol, folder)
    if num is not None and num > len(images):
        raise OutputError(f"{source} holds {len(images):,} images, {num:,} are asked for; make more, or ask for fewer.")
    if num is not None:
        images, originals = (each and subset(each, range(num)) for each in (images, originals))
    if originals:
        without = _without(folder, None if num is None else Path(images.names[-1]).name)
    turns = kind == "samples" and _take_turns(protocol, len(images))
    return Subject(kind, source, images, originals, protocol, without, turns)


def is_pairs(source: str) -> bool:
    """Whether what is judged are reconstructions, there already or made first, beside what they are of."""
    return saved_kind(source) == "autoencoder" or (Path(source).expanduser() / RECONSTRUCTIONS).is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}); make the pictures beside it again.") from error


def _labelled(samples: Images, protocol: dict[str, Any], folder: Path) -> Images:
    """Samples with the classes that they were made of; without any, those of an unconditional model."""
    try:
        labels, names = protocol["labels"], protocol["class_names"]
        made = [labels[int(Path(name).stem)] for name in samples.names]
    except (KeyError, ValueError, IndexError) as error:
        raise OutputError(
            f"{folder / PROTOCOL} does not tell the class of every image ({error!r}): other images lie beside samples, "
            "or another version made these. Judge them in a folder without it."
        ) from error
    if names is None and any(labels):
        names = [str(number) for number in range(max(labels) + 1)]
    return dataclasses.replace(samples, labels=made, class_names=names)


def _take_turns(protocol: dict[str, Any], count: int) -> bool:
    """See `Subject`; of a folder of an earlier version, which does not say whether labels were drawn, by the labels."""
    labels = protocol.get("labels", [])[:count]  # of what is no folder of `rae sample` nothing is known
    drawn = [job["random_labels"] for job in protocol.get("jobs", []) if "random_labels" in job]
    return len(set(labels)) > 1 and not any(drawn) if drawn else take_turns(labels)


def _halves(folder: Path) -> tuple[Images, Images]:
    """The pairs that `rae reconstruct` wrote, original beside reconstruction -> originals, reconstructions."""
    files = sorted(folder.glob("*.png"))
    names = [str(file) for file in files]
    identity = [digest([side, *(f"{file.name} {file.stat().st_size}" for file in files)]) for side in "01"]
    sides = [Images(names, [0] * len(names), None, identity[side], _Half(names, side)) for side in (0, 1)]
    return sides[0], sides[1]


def _without(folder: Path, last: str | None) -> int | None:
    """How many images have no pair, by figures.json: up to that of the picture `last`, or all. None = it is not there.

    Raises:
        OutputError: it cannot be read.
    """
    if not (folder / FIGURES).is_file():  # `rae reconstruct` was interrupted, or another process has yet to write it
        return None
    figures = _read(folder / FIGURES)
    try:
        pairs, broken = {row["file"] for row in figures["rows"]}, figures["unreadable"]
    except (KeyError, TypeError) as error:
        raise OutputError(f"{folder / FIGURES} is damaged (no {error}); run `rae reconstruct` again.") from error
    every = map(picture_name, range(len(pairs) + len(broken)))
    return sum(file not in pairs and (last is None or file < last) for file in every)


class _Half:
    """Index -> one half of that picture; a class, so that it can be sent to the processes that decode."""

    def __init__(self, files: list[str], side: int) -> None:
        self.files, self.side = files, side

    def __call__(self, index: int) -> np.ndarray:
        return np.split(read_image(self.files[index]), 2, axis=1)[self.side]  # [H,2W,3] -> [H,W,3]
