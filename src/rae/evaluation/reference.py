"""What an extractor says of a set of images, and references: the same of real images, kept in a file for many uses.

features of N images --collect--> mean and covariance of all of them, rows of some --save_reference--> file

A reference says of which images it is, at what size, and by which extractor; figures against another one's are refused.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rae.config import Config, Size, parse
from rae.data.npz import UNREADABLE, check_directory
from rae.evaluation.frechet import Moments
from rae.folders import aside

DIGESTS = "digests"  # the kind of row that tells which image it is of
SUMMED = ("features", "spatial")  # kinds of features of which mean and covariance are taken
ADM = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # their names in ADM's files


class ReferenceError(ValueError):
    """A reference that cannot be used: damaged, or of other images or another extractor than the samples."""


class Gaussian(NamedTuple):
    """First and second moments of features, float64: mean [d] and sample covariance [d,d]."""

    mean: Tensor
    covariance: Tensor


class Classes(NamedTuple):
    """Which class each of K images is of: labels [K] int64, and the names that they are numbers of."""

    labels: Tensor
    names: list[str]


@dataclass(frozen=True)
class FeatureSet:
    """What one extractor says of a set of images.

    Attributes:
        count: N, images in all; None where a file does not tell.
        rows: kind of features ("features"; of Inception also "spatial", "logits") => [K,d] float32, of K of the images;
            and `DIGESTS` => [K] int64, see `pixel_digests`, which files of earlier versions lack.
        moments: kind => mean and covariance over all N.
        classes: of these K; None where they have none.
        digests: [N] int64 of all images, in rising order; None where a file of an earlier version does not tell.
    """

    count: int | None
    rows: dict[str, Tensor]
    moments: dict[str, Gaussian]
    classes: Classes | None = None
    digests: Tensor | None = None


class ReferenceAbout(Config):
    """What a reference is of, as it stands in its file.

    Attributes:
        kind: tells the file from others.
        source: the images, as they were named.
        identity: of the images (`Images.identity`).
        images: N.
        skipped: images besides these N that could not be read; None = in a file of an earlier version.
        size: (H, W) in pixels that the extractors were given.
        crop: how the images came to that size.
        extractors: name => `Extractor.describe()`, its identity among it.
        drawn: how the rows were chosen where there are fewer than N; of earlier versions, by place in the stream.
        class_names: of the labels of the rows; None where the images have none, or an earlier version kept none.
        sha256: of the tensors and their names.
    """

    kind: Literal["reference"]
    source: str
    identity: str
    images: PositiveInt
    skipped: NonNegativeInt | None = None
    size: Size
    crop: str
    extractors: dict[str, dict[str, Any]]
    drawn: Literal["by place", "by digest"] = "by place"
    class_names: list[str] | None = None
    sha256: str


def pixel_digests(images: Tensor) -> Tensor:
    """64 bits of the SHA-256 of each image as extractors see it: uint8 [B,3,H,W] on the CPU -> int64 [B]."""
    return torch.tensor([int.from_bytes(pixels_sha256(image)[:8], "big", signed=True) for image in images.numpy()])


def pixels_sha256(image: np.ndarray) -> bytes:
    """SHA-256 of the shape and the pixels of one image."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def digest_order(digests: Tensor, labels: Tensor) -> Tensor:
    """Places [N] of images in the order of their digests [N], copies by their labels [N].

    The first K of them are an even draw, for SHA-256 knows nothing of what is in an image; the same one in whatever
    order the images come, and an image more or less changes one of them.
    """
    return torch.from_numpy(np.lexsort((labels.numpy(), digests.numpy())))


def by_digest(found: FeatureSet) -> FeatureSet:
    """The same with its rows in the order of the images' digests, copies by their labels.

    Whatever divides the images at random divides them by their places: so these know nothing of the order or the files
    that the images came in. A set without digests, of an earlier version's file, stays as it is.
    """
    if DIGESTS not in found.rows:
        return found
    digests, classes = found.rows[DIGESTS], found.classes
    labels = classes.labels if classes else torch.zeros_like(digests)
    order = digest_order(digests, labels)
    rows = {kind: values[order] for kind, values in found.rows.items()}
    return dataclasses.replace(found, rows=rows, classes=classes and Classes(labels[order], classes.names))


def collect(parts: Iterable[Mapping[str, Tensor]], count: int, kept: Tensor | None = None) -> FeatureSet:
    """Features in the order of their images -> their moments, and the rows that are kept.

    Args:
        parts: features [n,d] by kind, of the next n images each.
        count: N of all parts together.
        kept: places [K] of the images whose rows stay, in the order that these are to have; None = all as they come.

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    if count < 2:
        raise ValueError(f"{count} image: a set needs at least 2 to have a spread.")
    kept, row_of = torch.arange(count) if kept is None else kept, torch.full((count,), -1)
    row_of[kept] = torch.arange(len(kept))
    rows: dict[str, Tensor] = {}
    moments: dict[str, Moments] = {}
    start = 0
    for part in parts:
        length = len(part["features"])
        to = row_of[start : start + length]
        for kind, values in part.items() if length else ():
            rows.setdefault(kind, values.new_empty(len(kept), *values.shape[1:]))[to[to >= 0]] = values[to >= 0]
            if kind in SUMMED:
                moments.setdefault(kind, Moments(values.shape[1])).update(values)
        start += length
    gaussians = {kind: Gaussian(summed.mean, summed.covariance) for kind, summed in moments.items()}
    return FeatureSet(count, rows, gaussians)


# --- the file --------------------------------------------------------------------------------------------------------


def save_reference(path: Path, sets: Mapping[str, FeatureSet], **about: Any) -> None:
    """Write a safetensors file: NAME/KIND.mean, NAME/KIND.covariance (float64), NAME/KIND (rows, float32); of the rows
    labels, of all images digests (int64).

    Args:
        path: of the file.
        sets: by name of the extractor, of the same images.
        about: fields of `ReferenceAbout`, without `kind`, `drawn`, `class_names` and `sha256`.
    """
    tensors, first = {}, next(iter(sets.values()))
    if first.digests is not None:
        tensors[DIGESTS] = first.digests
    if classes := first.classes:
        tensors["labels"], about["class_names"] = classes.labels, classes.names
    for name, features in sets.items():
        for kind, (mean, covariance) in features.moments.items():
            tensors |= {f"{name}/{kind}.mean": mean, f"{name}/{kind}.covariance": covariance}
        tensors |= {f"{name}/{kind}": rows.contiguous() for kind, rows in features.rows.items()}
    said = ReferenceAbout(kind="reference", drawn="by digest", sha256=_digest(tensors), **about)
    with aside(path) as hidden:
        save_file(tensors, hidden, metadata={"reference": said.model_dump_json()})


def load_reference(path: Path) -> tuple[ReferenceAbout, dict[str, FeatureSet]]:
    """Read what `save_reference` wrote.

    Raises:
        ReferenceError: damaged, or another file.
    """
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("reference")
            tensors = {key: file.get_tensor(key) for key in file.keys()} if said else {}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise ReferenceError(f"{path} cannot be read ({error}); make it again with `rae reference`.") from error
    if not said:
        raise ReferenceError(f"{path} is no reference; `rae reference` makes one of images.")
    about = parse(ReferenceAbout, json.loads(said), str(path))
    if (found := _digest(tensors)) != about.sha256:
        raise ReferenceError(
            f"{path} is damaged or was changed: its tensors have SHA-256 {found[:12]}..., it says "
            f"{about.sha256[:12]}...; make it again with `rae reference`."
        )
    sets, classes = {}, about.class_names and Classes(tensors["labels"], about.class_names)
    for name in about.extractors:
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        kinds = [key for key in own if "." not in key]
        moments = {k: Gaussian(own[f"{k}.mean"], own[f"{k}.covariance"]) for k in kinds if f"{k}.mean" in own}
        rows = {kind: own[kind] for kind in kinds}
        sets[name] = FeatureSet(about.images, rows, moments, classes, tensors.get(DIGESTS))
    return about, sets


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy())
    return digest.hexdigest()


def is_adm_reference(path: Path) -> bool:
    """Whether a file is one of ADM's reference batches: an .npz that holds `mu` and `sigma`.

    Raises:
        ReferenceError: it is damaged, so that arrays may have been there that are not found.
    """
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            check_directory(archive)
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except UNREADABLE as error:
        raise ReferenceError(f"{path} is damaged ({error}); copy it again, whole.") from error


def read_adm_reference(path: Path) -> dict[str, Gaussian]:
    """Moments of ADM's reference batches (`VIRTUAL_imagenet256_labeled.npz`): mu, sigma, mu_s, sigma_s.

    Of how many images they are the file does not tell. Its images (`arr_0`, 10,000 of them), for precision and recall,
    are a source of images like any other.

    Raises:
        ReferenceError: damaged, or moments that do not fit each other.
    """
    moments = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for kind, names in ADM.items():
                if names[0] not in file:
                    continue
                mean, covariance = (torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in names)
                if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                    shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
                    raise ReferenceError(f"{path}: {names[0]} and {names[1]} are {shapes}, not [d] and [d, d].")
                moments[kind] = Gaussian(mean, covariance)
    except (*UNREADABLE, KeyError) as error:
        if isinstance(error, ReferenceError):
            raise
        raise ReferenceError(f"{path} cannot be read ({error}); download it again.") from error
    return moments
