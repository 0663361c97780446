"""How `rae evaluate` and `rae reference` look at a set of images: by which networks, at what size, cropped or not."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rae.commands.feature_folder import check_left_out, count_resized, read_features, size_of, write_features
from rae.config import ConfigError
from rae.data.image_set import Images
from rae.data.images import DataConfig
from rae.evaluation.features import Extractor, open_extractor
from rae.evaluation.judge import INCEPTION
from rae.evaluation.reference import FeatureSet
from rae.processes import process_state

KEYS = {"identity", "size", "crop"}  # in features.json of `write_features`, not in that of `rae probe`
CROPPED, WHOLE = "centre crop, as in training", "as they are"


@dataclass(frozen=True)
class Look:
    """How images are looked at: by which extractors, how they are read, and how many at a time."""

    extractors: Mapping[str, Extractor]
    data: DataConfig
    batch: int


@dataclass(frozen=True)
class Features:
    """Features of a set of images.

    Attributes:
        about: source, identity, images, size and crop, as they stand in a reference and in `evaluation.json`.
        sets: by name of the extractor; empty where another process holds them.
        read: numbers of the images that could be read.
        resized: how many of them were scaled and cropped.
    """

    about: dict[str, Any]
    sets: dict[str, FeatureSet]
    read: list[int]
    resized: int = 0


def look_at(
    images: Images,
    size: tuple[int, int] | None,
    look: Look,
    folder: Path,
    *,
    source: str,
    keep: int | None = None,
    what: str = "features",
) -> Features:
    """Features of images by all processes, which the first one reads.

    They lie in a folder whose name depends on the images and their size. Once they are whole, those of other images
    beside them are removed: an evaluation that grows does not fill the disk.

    Args:
        images: to look at.
        size: (H, W) in pixels to crop them to; None = they all have one.
        look: by which extractors.
        folder: where features lie in the meantime, those of one set of images.
        source: what to call the images.
        keep: rows to keep; None = all.
        what: to call the job on the screen.
    """
    crop, size = size is not None, size or size_of(images, look.data.on_broken)
    what_of = json.dumps([images.identity, len(images), list(size), crop, crop and look.data.enlarge])
    place = folder / hashlib.sha256(what_of.encode()).hexdigest()[:12]
    write_features(images, size, look.extractors, place, data=look.data, batch=look.batch, crop=crop, what=what)
    sets, read, resized = {}, [], 0
    if process_state().is_main_process:
        remove_features(folder, lambda other, about: other != place and about.keys() >= KEYS)
        of_all = set(range(len(images)))
        for name in look.extractors:
            sets[name], read = read_features(place, name, images, keep)
            of_all.intersection_update(read)
        missing = check_left_out(images, of_all, place, look.data.on_broken)
        resized = count_resized(place, next(iter(look.extractors)), size)
        for index in missing:
            say(f"left out: {images.names[index]} cannot be read")
    about = {"source": source, "identity": images.identity, "images": len(read), "size": list(size)}
    return Features(about | {"crop": CROPPED if crop else WHOLE}, sets, read, resized)


def remove_features(folder: Path, stale: Callable[[Path, dict[str, Any]], bool]) -> None:
    """Remove features that are no longer used, which is said.

    Args:
        folder: of folders of features, each with its features.json or with folders that have one.
        stale: one of these folders, what stands in its features.json => whether it is to go. Other commands may keep
            theirs beside it.
    """
    for place in sorted(folder.iterdir()):
        abouts = [_about(file) for file in (*place.glob("features.json"), *place.glob("*/features.json"))]
        if abouts and all(stale(place, about) for about in abouts):
            shutil.rmtree(place)
            say(f"note: {place} is removed: features of other images, at another size, or by an earlier version")


def _about(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # whose it is nobody knows, so it stays


def open_extractors(names: Sequence[str], inception: Path | None, input_size: int | None) -> dict[str, Extractor]:
    """Extractors by name; the weights are Inception's, the size is that of all others."""
    if inception and INCEPTION not in names:
        raise ConfigError(f"{inception} are weights of Inception, which --features {', '.join(names)} does not name.")
    if input_size and set(names) == {INCEPTION}:
        raise ConfigError(f"--input-size {input_size} is of encoders; Inception sees 299 pixels per side, always.")
    found = {}
    for name in dict.fromkeys(names):
        settings = {"weights": inception} if name == INCEPTION else {"input_size": input_size}
        found[name] = open_extractor(name, **settings).to(process_state().device)
    return found


def say(text: str, style: str = "yellow") -> None:
    if process_state().is_main_process:
        Console(stderr=True).print(text, style=style, highlight=False, markup=False, soft_wrap=True)
