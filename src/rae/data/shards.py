"""Images in WebDataset shards: tar files whose members `key.jpg`, `key.cls`, ... are one sample, read in any order.

A shard is listed once; where its members lie is kept in the cache of this package, so that a sample is one seek.
"""

import contextlib
import functools
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from rae.data.image_set import NO_CLASSES, SUFFIXES, ImageError, Images, digest, read_image
from rae.sources import cache_folder

# As WebDataset has it, the key ends at the first dot of the last part: a/b.c/7.seg.png is a/b.c/7 and seg.png.
MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
BLOCK = 512  # bytes; one of zeros ends a tar file
LONGEST = 64  # bytes of a label that are read


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    offset: int  # where its content begins, in bytes of the shard
    size: int
    label: str | None  # content of a `.cls`


class Sample(NamedTuple):
    name: str  # for errors: shard and key
    key: str
    image: Member
    label: Member | None


def open_shards(files: Sequence[Path], image: str | None, label: str | None) -> Images:
    """Tar files, one after the other.

    Args:
        files: the shards.
        image: ending of the samples' images, where they have several; None = the one that is an image by its ending.
        label: "" = no classes; None = the number in `.cls`, where there is one.

    Raises:
        ImageError: not a tar file, cut short, a sample without an image or with two, labels of some samples only.
    """
    if label not in (None, "", "cls"):
        raise ImageError(
            f"--label {label} (in a recipe data.label={label}): the labels of shards are in .cls; leave it out, "
            + NO_CLASSES
        )
    console = Console(stderr=True)
    listing = track(files, "List the shards", console=console, transient=True, disable=not console.is_terminal)
    found = [_samples(file, image) for file in listing]
    samples = [sample for shard in found for sample in shard]
    labels, class_names = _classes(samples) if label != "" else ([0] * len(samples), None)
    places = [(n, s.image.offset, s.image.size) for n, shard in enumerate(found) for s in shard]
    names = [sample.name for sample in samples]
    rows = [f"{sample.key} {sample.image.size} {number}" for sample, number in zip(samples, labels)]
    read = functools.partial(_read, [str(file) for file in files], np.array(places), names)
    return Images(names, labels, class_names, digest(rows), read)


def _samples(file: Path, image: str | None) -> list[Sample]:
    """The samples of a shard: neighbours with one key."""
    groups: list[tuple[str, dict[str, Member]]] = []
    for member in _members(file):
        if not (parts := MEMBER.fullmatch(member.name)):
            continue
        key, ending = parts[1], parts[2].lower()
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        if ending in groups[-1][1]:
            raise ImageError(f"{file} key {key}: there are two {member.name}; give every sample a key of its own.")
        groups[-1][1][ending] = member
    if not groups:
        raise ImageError(f"{file} holds no samples (files such as key.jpg).")
    return [
        Sample(f"{file} key {key}", key, _image(file, key, members, image), members.get("cls"))
        for key, members in groups
    ]


def _image(file: Path, key: str, members: dict[str, Member], wanted: str | None) -> Member:
    if wanted is not None:
        wanted = wanted.lower().removeprefix(".")
        endings = [wanted] if wanted in members else []
    else:
        endings = [ending for ending in members if "." + ending.rpartition(".")[2] in SUFFIXES]
    if len(endings) == 1:
        return members[endings[0]]
    has = f"of its files ({', '.join(members)})"
    if not endings:
        what = (
            f"none is {wanted}, as --image (in a recipe data.image) asks"
            if wanted
            else f"none is an image ({', '.join(SUFFIXES)})"
        )
        raise ImageError(
            f"{file} key {key}: {has} {what}. A sample's files have one key and stand together (tar --sort=name)."
        )
    raise ImageError(
        f"{file} key {key}: {has} {len(endings)} are images; name the ending of the one that is meant, such as "
        f"--image {endings[0]}, in a recipe data.image={endings[0]}."
    )


def _classes(samples: Sequence[Sample]) -> tuple[list[int], list[str] | None]:
    without = [sample.name for sample in samples if sample.label is None]
    if len(without) == len(samples):
        return [0] * len(samples), None
    if without:
        raise ImageError(
            f"{without[0]} has no .cls, {len(samples) - len(without)} of {len(samples)} samples have; complete them, "
            + NO_CLASSES
        )
    labels = []
    for sample in samples:
        if not re.fullmatch(r"\s*\d+\s*", sample.label.label):
            raise ImageError(
                f"{sample.name}: .cls holds {sample.label.label[:40]!r}; it must be the number of the class, from 0. "
                f"Correct it, {NO_CLASSES}"
            )
        labels.append(int(sample.label.label))
    return labels, [str(number) for number in range(max(labels) + 1)]


def _read(files: list[str], places: np.ndarray, names: list[str], index: int) -> np.ndarray:
    shard, offset, size = places[index].tolist()
    try:
        with open(files[shard], "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        reason = "the shard is gone since it was listed" if isinstance(error, FileNotFoundError) else error
        raise ImageError(f"{names[index]}: cannot be read ({reason}).") from error
    return read_image(data, names[index])


# --- listing ---------------------------------------------------------------------------------------------------------


def _members(file: Path) -> list[Member]:
    """The files in a shard, in their order: from the cache, if the shard has the same size and time as then."""
    found = file.stat()
    cache = cache_folder() / "shards"
    listed = cache / f"{digest([str(file.resolve()), str(found.st_size), str(found.st_mtime_ns)])}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Member(*entry) for entry in json.loads(listed.read_text())]
    members = _list(file)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time and nothing else
        cache.mkdir(parents=True, exist_ok=True)
        listed.write_text(json.dumps(members))  # half of it is no JSON, and is written again
    return members


def _list(file: Path) -> list[Member]:
    members = []
    try:
        with tarfile.open(file, "r:") as tar:
            while (entry := tar.next()) is not None:
                if entry.isreg() and not entry.issparse():
                    label = None
                    if entry.name.lower().endswith(".cls"):
                        label = tar.extractfile(entry).read(LONGEST).decode(errors="replace")
                    members.append(Member(entry.name, entry.offset_data, entry.size, label))
            # tarfile takes a damaged header in the middle for the end
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):
                last = f", after {members[-1].name}" if members else ""
                raise ImageError(f"{file} is damaged or cut short at byte {tar.offset}{last}: copy it again, whole.")
    except (tarfile.TarError, OSError) as error:
        last = f" after {members[-1].name}" if members else ""
        raise ImageError(
            f"{file} cannot be read as a tar file ({error}{last}): copy it again, whole; a compressed one is to be "
            "unpacked to .tar."
        ) from error
    return members
