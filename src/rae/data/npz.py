"""Images in .npz files as ADM's evaluator reads them: `arr_0`, uint8 [N,H,W,3]; where there are labels, in `arr_1`.

An array that is stored as it is (np.savez, `rae sample --npz`) stays on the disk, of which an image is one piece; a
compressed one (np.savez_compressed) goes into memory.
"""

import functools
import math
import operator
import os
import zipfile
import zlib
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

from rae import processes
from rae.data.image_set import NO_CLASSES, ImageError, Images, digest

IMAGES, LABELS = "arr_0", "arr_1"  # as np.savez(file, images, labels) calls them
BLOCK = 2**20  # bytes read at a time
END = 22  # bytes of the last record of a zip file, before its comment
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)  # of zipfile and NumPy


class Batch(NamedTuple):
    """The images of a file."""

    count: int
    read: Callable[[int], np.ndarray]
    content: str  # CRC-32 of the array, its shape included


def open_npz(files: Sequence[Path], image: str | None, label: str | None) -> Images:
    """Images of .npz files, one after the other. Every file is read once, whole, for its checksum.

    Args:
        files: the files; sizes in pixels may differ between them.
        image: name of the array of images; None = `arr_0`.
        label: name of the array of labels, whole numbers [N] or one-hot [N,C]; None = `arr_1`, where there is one; "" =
            no classes.

    Raises:
        ImageError: damaged, pickled, no such array, not uint8 [N,H,W,3], too large for memory, labels of another
            number, of another kind, or of some of the files only.
    """
    batches, labels = zip(*(_open(file, image or IMAGES, label) for file in files))
    if None in labels and any(found is not None for found in labels):
        raise ImageError(
            f"{files[labels.index(None)]} holds no labels ({LABELS}), of {len(files)} files others do; complete them, "
            + NO_CLASSES
        )
    numbers, classes = [0] * sum(batch.count for batch in batches), None
    if None not in labels:
        numbers = [number for found, _ in labels for number in found]
        classes = [str(number) for number in range(max(count for _, count in labels))]
    names = [f"{file} image {i}" for file, batch in zip(files, batches) for i in range(batch.count)]
    ends = list(accumulate(batch.count for batch in batches))
    read = functools.partial(_read, ends, [batch.read for batch in batches])
    identity = digest([*(batch.content for batch in batches), *map(str, numbers), *(classes or [])])
    return Images(names, numbers, classes, identity, read)


def _read(ends: list[int], reads: list[Callable[[int], np.ndarray]], index: int) -> np.ndarray:
    part = bisect(ends, index)
    return reads[part](index - (ends[part - 1] if part else 0))


def _open(file: Path, image: str, label: str | None) -> tuple[Batch, tuple[list[int], int] | None]:
    try:
        with zipfile.ZipFile(file) as archive:
            check_directory(archive)
            held = {name.removesuffix(".npy"): name for name in archive.namelist()}
            _check_held(file, held, image, label)
            with Console(stderr=True).status(f"Check {escape(str(file))}"):
                batch = _images(file, archive, archive.getinfo(held[image]))
            name = LABELS if label is None and LABELS in held else label
            return batch, _labels(file, archive, held[name], batch.count) if name else None
    except UNREADABLE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{file} is damaged, cut short or no .npz file ({error}): copy it again, whole.") from error


def check_directory(archive: zipfile.ZipFile) -> None:
    """Whether the table of contents at the end of a file lists all that is in it, by the names that stand there.

    No checksum covers it. A flipped bit hides an array otherwise, which then seems never to have been: labels, say.

    Raises:
        zipfile.BadZipFile: it does not.
    """
    with open(archive.filename, "rb") as file:
        file.seek(-END - len(archive.comment), os.SEEK_END)
        told = int.from_bytes(file.read(END)[10:12], "little")
    # 0xFFFF: a writer of large files other than Python's may keep the number elsewhere
    if told not in (found := len(archive.infolist()), 0xFFFF):
        raise zipfile.BadZipFile(f"{told} arrays are announced, {found} are listed")
    for member in archive.infolist():
        archive.open(member).close()  # which compares the names


def _check_held(file: Path, held: dict[str, str], image: str, label: str | None) -> None:
    there = ", ".join(held) or "nothing"
    if image not in held:
        if {"mu", "sigma"} <= held.keys():
            raise ImageError(
                f"{file} holds statistics of images ({there}) and no images: it can be a reference, not a source."
            )
        raise ImageError(
            f"{file} holds no {image}, only {there}: name the array of the images with --image, in a recipe data.image."
        )
    if label and label not in held:
        raise ImageError(
            f"{file} holds no {label}, only {there}: name the array of the labels with --label, in a recipe data.label."
        )


# --- images ----------------------------------------------------------------------------------------------------------


def _images(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Batch:
    with archive.open(member) as array:
        shape, by_columns, dtype = _header(file, member, array)
        offset = array.tell()
        _check_images(f"{file}, {member.filename.removesuffix('.npy')}", shape, dtype, array)
        if member.compress_type == zipfile.ZIP_STORED and not by_columns:
            while array.read(BLOCK):  # which compares the checksum at the end
                pass
            read = functools.partial(_read_stored, str(file), _beginning(archive, member) + offset, shape)
        else:
            read = functools.partial(operator.getitem, _load(file, archive, member, math.prod(shape)))
    return Batch(shape[0], read, f"{member.CRC:08x}")


def _header(file: Path, member: zipfile.ZipInfo, array: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first index runs fastest, and type, of an array whose size in bytes fits them."""
    version = np.lib.format.read_magic(array)
    if version not in HEADERS:
        raise ImageError(f"{file}, {member.filename}: format {version} of NumPy; write it again as a plain array.")
    shape, by_columns, dtype = HEADERS[version](array)
    if dtype.hasobject:
        raise ImageError(
            f"{file}, {member.filename} holds Python objects, pickled, which are not loaded: an array of one type is "
            "needed, np.stack(images)."
        )
    if member.file_size != (expected := array.tell() + math.prod(shape) * dtype.itemsize):
        raise ValueError(f"{member.filename} has {member.file_size:,} bytes, {dtype} {list(shape)} {expected:,}")
    return shape, by_columns, dtype


def _check_images(where: str, shape: tuple[int, ...], dtype: np.dtype, array: IO[bytes]) -> None:
    """Say what must be done to an array x that is not uint8 [N,H,W,3]; `array` stands at its first value."""
    match shape:
        case (_, _, _, 3):
            remedy = None if math.prod(shape) else "one image at least must be there"
        case (_, 3, _, _):
            remedy = "channels come last: x.transpose(0, 2, 3, 1)"
        case (_, _, 3):
            remedy = "one image is a set of one: x[None]"
        case (_, _, _):
            remedy = "grey images have three equal channels: x[..., None].repeat(3, axis=-1)"
        case (_, _, _, 1):
            remedy = "grey images have three equal channels: x.repeat(3, axis=-1)"
        case (_, 1, _, _):
            remedy = "grey images have three equal channels, the last axis: x.transpose(0, 2, 3, 1).repeat(3, axis=-1)"
        case (_, _, _, 4):
            remedy = "there is no place for transparency: x[..., :3]"
        case _:
            remedy = "another array may hold the images: name it with --image, in a recipe data.image"
    if remedy is None and dtype != np.uint8:
        remedy = _to_bytes(np.frombuffer(array.read(math.prod(shape[1:]) * dtype.itemsize), dtype))
    if remedy:
        raise ImageError(f"{where} is {dtype} {list(shape)}, images are uint8 [N, H, W, 3]; {remedy}.")


def _to_bytes(image: np.ndarray) -> str:
    """What makes 8 bits of images of which this is the first."""
    if image.dtype.kind not in "biuf":
        return "those are no numbers"
    low, high = image.min().item(), image.max().item()
    said = f"the first has values in [{low:g}, {high:g}]:"
    if image.dtype.kind == "f" and low >= 0 and high <= 1:
        return f"{said} np.rint(x * 255).astype(np.uint8), if all are in [0, 1]"
    if image.dtype.kind == "f" and low >= -1 and high <= 1:
        return f"{said} np.rint((x + 1) / 2 * 255).astype(np.uint8), if all are in [-1, 1]"
    if low >= 0 and high <= 255:
        return f"{said} np.rint(x).astype(np.uint8), if all are in [0, 255]"
    return f"{said} bring them to whole numbers from 0 to 255"


def _beginning(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Where the content of a member begins in the file: behind its header of 30 bytes, its name and its extra field."""
    with open(archive.filename, "rb") as file:
        file.seek(member.header_offset + 26)
        lengths = file.read(4)
    return member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _read_stored(file: str, offset: int, shape: tuple[int, ...], index: int) -> np.ndarray:
    count = math.prod(shape[1:])
    try:
        image = np.fromfile(file, np.uint8, count, offset=offset + index * count)
    except OSError as error:
        raise ImageError(f"{file} image {index}: cannot be read ({error}).") from error
    if len(image) < count:
        raise ImageError(f"{file} image {index}: the file is shorter than when it was opened; copy it again, whole.")
    return image.reshape(shape[1:])


def _load(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, needed: int) -> np.ndarray:
    """All images at once: of a compressed array, or of one whose images are in no one piece each."""
    how = "compressed" if member.compress_type != zipfile.ZIP_STORED else "in Fortran's order"
    size, memory = f"{needed / 2**30:.2f} GiB", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (sharing := processes.on_this_machine()) * needed > 0.8 * memory:
        raise ImageError(
            f"{file}: its images are {how} and must go into memory, {size} in each of {sharing} processes; this "
            f"machine has {memory / 2**30:.2f} GiB. Write them by np.savez(file, np.ascontiguousarray(x))."
        )
    said = f"{file}: {how}, so its images take {size} of memory"
    Console(stderr=True).print(said, highlight=False, markup=False, soft_wrap=True)
    with archive.open(member) as array:
        return _whole(array)


def _whole(array: IO[bytes]) -> np.ndarray:
    values = np.lib.format.read_array(array, allow_pickle=False)
    array.read()  # nothing, and compares the checksum
    return values


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels(file: Path, archive: zipfile.ZipFile, member: str, count: int) -> tuple[list[int], int]:
    """Labels, and the number of classes that they tell of: columns of one-hot rows, or the largest and one more."""
    with archive.open(member) as array:
        shape, _, dtype = _header(file, archive.getinfo(member), array)
    where = f"{file}, {member.removesuffix('.npy')}, is {dtype} {list(shape)}:"
    if not shape or shape[0] != count:
        raise ImageError(f"{where} there are {count:,} images. Give a label to each, {NO_CLASSES}")
    if len(shape) > 2 or (len(shape) == 1 and dtype.kind not in "iu") or dtype.kind not in "iufb":
        raise ImageError(f"{where} labels are whole numbers [N], or one-hot [N, C]. Correct them, {NO_CLASSES}")
    with archive.open(member) as array:
        labels = _whole(array)
    if len(shape) == 1:
        if labels.min() < 0:
            raise ImageError(
                f"{where} the label of image {labels.argmin()} is {labels.min()}, of classes from 0. Correct it, "
                + NO_CLASSES
            )
        return labels.tolist(), int(labels.max()) + 1
    wrong = ~(np.isin(labels, (0, 1)).all(1) & (labels.sum(1) == 1))
    if wrong.any():
        raise ImageError(
            f"{where} the row of image {wrong.argmax()} is not one-hot, one 1 among zeros. Correct it, {NO_CLASSES}"
        )
    return labels.argmax(1).tolist(), shape[1]
