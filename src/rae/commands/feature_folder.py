"""A folder of features: made in fixed chunks by any number of processes, kept, and read as one set in their order.

chunk k = images [512 k, 512 (k + 1)) --extractor--> FOLDER/NAME/000000.safetensors, 000001.safetensors, ...

Every image is computed by itself or in whatever company: its features differ by rounding alone, so neither the number
of processes nor an interruption changes a figure by more.
"""

import dataclasses
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rae.commands.pictures import OutputError, claim
from rae.data.crops import center_crop
from rae.data.image_set import ImageError, Images
from rae.data.images import DataConfig, Views, loader, read, readable_chunks, to_tensor
from rae.evaluation.features import Extractor
from rae.evaluation.reference import DIGESTS, Classes, FeatureSet, collect, digest_order, pixel_digests
from rae.folders import aside
from rae.processes import process_state
from rae.training.display import progress

CHUNK = 512  # images in a file, which an interruption costs at most
COLUMNS = ("index", "original")  # what a file holds of each image beside features: its number, and (H, W) of its file


def size_of(images: Images, on_broken: str) -> tuple[int, int]:
    """(H, W) of the first image that can be read, which all others are to have."""
    _, image, _ = read(images, 0, on_broken)
    return image.shape[0], image.shape[1]


class Sized(Views):
    """Views with `original`, (H, W) [2] of the image before any crop."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, image, label = read(self.images, index, self.config.on_broken)
        self.check_size(index, image)
        item = {"image": to_tensor(center_crop(image, self.size)), "label": label, "index": index}
        return item | {"original": torch.tensor(image.shape[:2])}


class OneSize(Sized):
    """Views of images that all have the size asked for."""

    def check_size(self, index: int, image: np.ndarray) -> None:
        if image.shape[:2] != self.size:
            raise ImageError(
                f"{self.images.names[index]} is {image.shape[0]} x {image.shape[1]} pixels (height x width), not "
                f"{self.size[0]} x {self.size[1]} as the first one that can be read: images are judged at one size. "
                "With --size all are cropped to it, as in training."
            )


@torch.no_grad()
def write_features(
    images: Images,
    size: tuple[int, int],
    extractors: Mapping[str, Extractor],
    folder: Path,
    *,
    data: DataConfig,
    batch: int,
    crop: bool,
    what: str = "features",
) -> None:
    """Features of all images by every extractor, of which those are computed that are not there yet.

    Args:
        images: to look at.
        size: (H, W) in pixels that they have, or are brought to.
        extractors: by name.
        folder: made if it does not exist.
        data: how images are read: workers, enlarging, what to do about broken ones.
        batch: images at a time.
        crop: scale larger images and cut out their centre; otherwise one of another size is an error.
        what: to call the job on the screen.

    Raises:
        ImageError: an image of another size, or one that cannot be read.
        OutputError: the folder holds features of other images or of another extractor, or of images that were changed
            since, as of `check_unchanged`.
        FloatingPointError: features that are not finite.
    """
    state = process_state()
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    if state.is_main_process:
        about = {"images": len(images), "identity": images.identity, "size": list(size), "crop": crop}
        about[DIGESTS] = "SHA-256"  # of pixels; features of earlier versions lie without
        for name, extractor in extractors.items():
            claim(_place(folder, name), "features.json", about | {"extractor": extractor.describe()})
    state.wait_for_everyone()
    views = (Sized if crop else OneSize)(images, data, size)
    todo, there = [], []
    for k in range(len(chunks))[state.process_index :: state.num_processes]:
        files = [_file(folder, name, k) for name in extractors]
        if all(file.exists() for file in files):
            there += files
        else:
            todo.append(k)
    check_unchanged(there, views)
    batches_of = readable_chunks(views, [chunks[k] for k in todo], batch)  # workers start once
    with progress(what, sum(len(chunks[k]) for k in todo)) as advance:
        done = 0
        for k, batches in zip(todo, batches_of):
            parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in extractors}
            for wanted, part in batches:
                done += len(wanted)
                if len(part["index"]):
                    pixels, known = part["image"].to(state.device), {kind: part[kind] for kind in COLUMNS}
                    known[DIGESTS] = pixel_digests(part["image"])
                    for name, extractor in extractors.items():
                        found = {kind: values.float().cpu() for kind, values in extractor(pixels).items()}
                        _check_finite(found, name, images, part["index"].tolist())
                        parts[name].append(found | known)
                advance(done, "")
            for name, found in parts.items():
                _write(_file(folder, name, k), found)
    state.wait_for_everyone()


def read_features(
    folder: Path, name: str, images: Images | None = None, keep: int | None = None
) -> tuple[FeatureSet, list[int]]:
    """What `write_features` has written, as one set, and the numbers of its images: both in the order of digests.

    Args:
        folder: of all extractors.
        name: of one of them.
        images: that these are of, for their classes; None = the set has none.
        keep: so many rows at most, see `digest_order`; None = all.
    """
    files = _files(folder, name)
    known = [part for file in files if len((part := _load(file, "index", DIGESTS))["index"])]
    numbers = torch.cat([part["index"] for part in known])
    labels = torch.tensor([images.labels[number] if images else 0 for number in numbers.tolist()])
    digests = torch.cat([part[DIGESTS] for part in known])
    order = digest_order(digests, labels)
    kept = order[:keep]
    parts = ({kind: values for kind, values in _load(file).items() if kind not in COLUMNS} for file in files)
    classes = Classes(labels[kept], images.class_names) if images and images.class_names is not None else None
    found = dataclasses.replace(collect(parts, len(numbers), kept), classes=classes, digests=digests.sort().values)
    return found, numbers[order].tolist()


def check_left_out(images: Images, numbers: Collection[int], folder: Path, on_broken: str) -> list[int]:
    """Numbers of the images that features in `folder` lack, since they could not be read, and cannot be now.

    Args:
        images: that features were made of.
        numbers: of those that they are of, as of `read_features`.
        folder: of the features.
        on_broken: of `DataConfig`; what was skipped at one time is not to be at another.

    Raises:
        ImageError: one of them cannot be read, and is not to be skipped.
        OutputError: one of them can be read.
    """
    missing = sorted(set(range(len(images))) - set(numbers))
    for index in missing:
        try:
            images.read(index)
        except ImageError:
            if on_broken == "error":
                raise
        else:
            raise OutputError(
                f"{images.names[index]} could not be read when {folder} was made, and can be now: the features there "
                f"lack it. Remove {folder} and run the same command again."
            )
    return missing


def count_resized(folder: Path, name: str, size: tuple[int, int]) -> int:
    """How many of the images that `write_features` has brought to `size` (H, W) had another one."""
    parts = (_load(file, "original") for file in _files(folder, name))
    return sum(int((part["original"] != torch.tensor(size)).any(1).sum()) for part in parts if part)


def _digests(items: Mapping[str, Tensor]) -> Tensor:
    return pixel_digests(items["image"])


def check_unchanged(
    files: Sequence[Path],
    views: Views,
    kind: str = DIGESTS,
    digests: Callable[[Mapping[str, Tensor]], Tensor] = _digests,
) -> None:
    """Refuse features of images that have other pixels now.

    Of each file of features the first image is read again, and those whose own files were written, copied or renamed
    since. Images without files of their own, as rows of tables, are told by the first one alone.

    Args:
        files: of features, with `index` and `kind` of each image.
        views: of the images.
        kind: what the files call their digests.
        digests: items of `views` => the digests.

    Raises:
        OutputError: one of the images has other pixels, or cannot be read.
    """
    begun = time.time_ns()
    known = [(file, *pair) for file in files for pair in _suspects(file, views.images.names, kind)]
    read_again = loader(views, [[index] for _, index, _ in known], views.config)
    with progress("comparing images", len(known)) as advance:
        for done, ((file, index, digest), now) in enumerate(zip(known, read_again), start=1):
            if now["index"].item() != index or digests(now).item() != digest:
                raise OutputError(
                    f"{views.images.names[index]} has other pixels than when {file} was made of it: features of images "
                    f"that were changed since are of no use. Remove {file.parent} and run the same command again."
                )
            advance(done, "")
    for file, count in Counter(file for file, _, _ in known).items():
        if count > 1:
            os.utime(file, ns=(begun, begun))  # copied images are not read again every time


def _suspects(file: Path, names: Sequence[str], kind: str) -> Iterator[tuple[int, int]]:
    """(number, digest) of the first image of a file of features, and of those that may have been changed since."""
    known, made = _load(file, "index", kind), file.stat().st_mtime_ns
    if kind not in known:  # none of its images could be read
        return
    for place, (index, digest) in enumerate(zip(known["index"].tolist(), known[kind].tolist())):
        if place == 0 or _written(names[index]) >= made:
            yield index, digest


def _written(name: str) -> int:
    """When the file of an image was last written, copied or renamed, ns; 0 where it has none of its own."""
    try:
        return os.stat(name).st_ctime_ns
    except OSError:
        return 0


def _check_finite(found: Mapping[str, Tensor], name: str, images: Images, numbers: Sequence[int]) -> None:
    for kind, values in found.items():
        bad = [n for n, finite in zip(numbers, values.isfinite().flatten(1).all(1).tolist()) if not finite]
        if bad:
            raise FloatingPointError(
                f"{images.names[bad[0]]} (image {bad[0]:,} of {len(images):,}, counted from 0): its {kind} by {name} "
                f"are not finite, those of {len(bad)} of {len(numbers)} images of this batch. If these are all, look "
                f"at the weights of {name}; otherwise at the image, and take it out."
            )


def _place(folder: Path, name: str) -> Path:
    return folder / re.sub(r"^[^\w@-]+|[^\w.@-]+", "_", name)  # ./encoder -> _encoder: a leading dot would hide it


def _file(folder: Path, name: str, chunk: int) -> Path:
    return _place(folder, name) / f"{chunk:06d}.safetensors"


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(_place(folder, name).glob("*.safetensors"))


def _write(file: Path, parts: Sequence[Mapping[str, Tensor]]) -> None:
    if not parts:  # none of these images can be read
        parts = [{"features": torch.zeros(0, 0), "index": torch.zeros(0, dtype=torch.int64)}]
    whole = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
    with aside(file) as hidden:
        save_file(whole, hidden)


def _load(file: Path, *kinds: str) -> dict[str, Tensor]:
    """What it holds of these kinds, or of all."""
    try:
        with safe_open(file, "pt") as opened:
            there = opened.keys()
            return {kind: opened.get_tensor(kind) for kind in there if kind in (kinds or there)}
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file} is damaged ({error}); delete it and run the same command again.") from error
