"""A folder of features: made in fixed chunks by any number of processes, kept, and read as one set in their order.

chunk k = images [512 k, 512 (k + 1)) --extractor--> FOLDER/NAME/000000.safetensors, 000001.safetensors, ...

Every image is computed by itself or in whatever company: its features differ by rounding alone, so neither the number
of processes nor an interruption changes a figure by more.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rae.commands.pictures import OutputError, claim
from rae.data.image_set import ImageError, Images
from rae.data.images import DataConfig, Views, read, readable
from rae.evaluation.features import Extractor
from rae.evaluation.reference import DIGESTS, Classes, FeatureSet, collect, digest_order, pixel_digests
from rae.folders import aside
from rae.processes import process_state
from rae.training.display import progress

CHUNK = 512  # images in a file, which an interruption costs at most


def size_of(images: Images, on_broken: str) -> tuple[int, int]:
    """(H, W) of the first image that can be read, which all others are to have."""
    _, image, _ = read(images, 0, on_broken)
    return image.shape[0], image.shape[1]


class OneSize(Views):
    """Views of images that all have the size asked for."""

    def check_size(self, index: int, image: np.ndarray) -> None:
        if image.shape[:2] != self.size:
            raise ImageError(
                f"{self.images.names[index]} is {image.shape[0]} x {image.shape[1]} pixels (height x width), not "
                f"{self.size[0]} x {self.size[1]} as {self.images.names[0]}: images are judged at one size. With "
                "--size all are cropped to it, as in training."
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
        OutputError: the folder holds features of other images or of another extractor.
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
    own = range(len(chunks))[state.process_index :: state.num_processes]
    todo = [k for k in own if not all(_file(folder, name, k).exists() for name in extractors)]
    with progress(what, sum(len(chunks[k]) for k in todo)) as advance:
        done = 0
        for k in todo:
            parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in extractors}
            views = Views if crop else OneSize
            for part in readable(images, data, size, chunks[k], batch=batch, left_out=lambda _: None, views=views):
                for name, extractor in extractors.items():
                    found = extractor(part["image"].to(state.device))
                    found = {kind: values.float().cpu() for kind, values in found.items()}
                    _check_finite(found, name, images, part["index"].tolist())
                    parts[name].append(found | {"index": part["index"], DIGESTS: pixel_digests(part["image"])})
                done += len(part["image"])
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
    files = sorted(_place(folder, name).glob("*.safetensors"))
    known = [part for file in files if len((part := _load(file, "index", DIGESTS))["index"])]
    numbers = torch.cat([part["index"] for part in known])
    labels = torch.tensor([images.labels[number] if images else 0 for number in numbers.tolist()])
    order = digest_order(torch.cat([part[DIGESTS] for part in known]), labels)
    kept = order[:keep]
    parts = ({kind: values for kind, values in _load(file).items() if kind != "index"} for file in files)
    classes = Classes(labels[kept], images.class_names) if images and images.class_names is not None else None
    return dataclasses.replace(collect(parts, len(numbers), kept), classes=classes), numbers[order].tolist()


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
