"""Images as files in folders, those that travel inside packages, and what a source that names data files means."""

import functools
import glob
import hashlib
import importlib.util
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from rae.data.image_set import SUFFIXES, ImageError, Images, PassedOver, digest, read_image

# images as well, and not read
OTHER_SUFFIXES = (
    *(".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef"),  # of cameras
)
FOLDER_SUFFIXES = (".parquet", ".arrow", ".tar")  # files that hold many images
DATA_SUFFIXES = (*FOLDER_SUFFIXES, ".npz")  # which must be named: in a folder of images it may hold anything of them
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Colour photographs that lie inside the scikit-image package itself; the others would be downloaded.
PHOTOGRAPHS = (
    ("astronaut", "astronaut.png"),
    ("cat", "chelsea.png"),
    ("coffee", "coffee.png"),
    ("galaxies", "hubble_deep_field.jpg"),
    ("tissue", "ihc.png"),
    ("motorcycle", "motorcycle_left.png"),
    ("retina", "retina.jpg"),
    ("rocket", "rocket.jpg"),
)


# --- data files ------------------------------------------------------------------------------------------------------


def find_data_files(source: str) -> list[Path]:
    """The Parquet, Arrow, tar or .npz files that `source` means, in their order; none where it means something else.

    Args:
        source: a file; a folder of them, though not of .npz; names with `{000..009}` or `{a,b}`, each of which must be
            there; or a pattern with `*`, `?` or `[...]`. What exists by its very name is that, whatever characters are
            in it.

    Raises:
        ImageError: files of several kinds or parts, some that are missing, images beside them, compressed tar files.
    """
    path = Path(source)
    if path.is_dir():
        return _in_folder(path)
    if source.endswith(COMPRESSED):
        raise ImageError(f"{source} is compressed, and images are read from it in any order: unpack it to .tar first.")
    if path.suffix not in DATA_SUFFIXES:
        return []
    names = [source] if path.exists() else list(_alternatives(source))
    files = []
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if not found:
            raise ImageError(f"{name}: no such file" + (f", of {len(names)} that {source} means." * (len(names) > 1)))
        files += found
    return _of_one_kind(source, [Path(file) for file in files])


def _in_folder(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.suffix in FOLDER_SUFFIXES and f.name[0] != "." and f.is_file())
    if not files:
        return []
    flat, folders = _contents(folder)
    below = (str(image.relative_to(folder)) for part in folders for image in _walk(part, folder))
    if image := next(chain(flat, below), None):
        raise ImageError(
            f"{folder} holds images ({image}, for one) and also {len(files)} files like "
            f"{files[0].name}: write {folder}/*{files[0].suffix} for those, or move them away for the images."
        )
    # train-00000-of-00002.parquet, train-00001-of-00002.parquet, test.parquet: train, test
    parts = sorted({re.sub(r"[-_.]?\d+(-of-\d+)?$", "", file.stem) for file in files})
    if len(parts) > 1:
        raise ImageError(
            f"{folder} holds files of {len(parts)} parts ({', '.join(parts)[:80]}): write which, such as "
            f"{folder}/{parts[0]}*{files[0].suffix}, or {folder}/*{files[0].suffix} for all."
        )
    return _of_one_kind(str(folder), files)


def _of_one_kind(source: str, files: list[Path]) -> list[Path]:
    kinds = sorted({file.suffix for file in files})
    if len(kinds) > 1:
        raise ImageError(f"{source} means files of {len(kinds)} kinds ({', '.join(kinds)}); write a pattern for one.")
    return files


def _alternatives(text: str) -> Iterator[str]:
    """`a{08..10}{x,y}` -> a08x, a08y, a09x, a09y, a10x, a10y, as a shell does."""
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not braces:
        yield text
        return
    first, last, listed = braces.groups()
    values = listed.split(",") if first is None else range(int(first), int(last) + 1)
    if not values:
        raise ImageError(f"{text}: {braces[0]} counts down and means no file; write the smaller number first.")
    for value in values:
        middle = value if first is None else str(value).zfill(len(first))
        yield from _alternatives(text[: braces.start()] + middle + text[braces.end() :])


# --- folders of images -----------------------------------------------------------------------------------------------


def open_folder(root: Path) -> Images:
    """A folder of images: sub-folders that hold some are classes, in sorted order; a flat folder has none.

    One image file is a set of one.

    Raises:
        ImageError: no such folder, an empty one, one with images both in it and in sub-folders, or a class whose images
            are all of a kind that is not read.

    Warns:
        PassedOver: some images are of a kind that is not read.
    """
    if _is_image(root):
        return _from_files(root.parent, [root.name], [0], None)
    if root.is_file():
        raise ImageError(f"{root} is a file of a kind that is not read ({', '.join((*SUFFIXES, *DATA_SUFFIXES))}).")
    if not root.is_dir():
        known = "a folder, .parquet, .arrow, .tar or .npz files, hf:owner/name, digits or photographs"
        raise ImageError(f"{root}: no such folder of images. A source is {known}.")
    flat, folders = _contents(root)
    other = sorted(name for name in os.listdir(root) if _is_image(root / name, OTHER_SUFFIXES))
    classes = {}
    for folder in folders:
        found = sorted(str(file.relative_to(root)) for file in _walk(folder, root, SUFFIXES + OTHER_SUFFIXES))
        files = [file for file in found if file.lower().endswith(SUFFIXES)]
        if files:
            classes[folder.name] = files
        elif found and not flat:
            raise ImageError(
                f"{folder} would be a class, but of its images none is of a kind that is read ({', '.join(SUFFIXES)}): "
                f"{Path(found[0]).name}, for one. Convert them, or move the folder away."
            )
        other += [file for file in found if file.lower().endswith(OTHER_SUFFIXES)]
    if flat and classes:
        raise ImageError(
            f"{root} holds {len(flat)} images and also {len(classes)} folders of images ({', '.join(classes)[:80]}): "
            "move all images into folders, one for each class, or all into one folder without classes."
        )
    if not flat and not classes:
        unread = f"; {_counted(other)} are there: convert them" if other else ""
        kinds = f"({', '.join(SUFFIXES)}), and no {', '.join(FOLDER_SUFFIXES)} files"
        batches = f" Its .npz files must be named: {root}/*.npz." if any(root.glob("*.npz")) else ""
        inside = next((path for path in sorted(root.rglob("*")) if path.suffix in FOLDER_SUFFIXES), None)
        tables = f" There are {inside.suffix} files in {inside.parent}: write that." if inside else ""
        raise ImageError(f"{root} holds no images {kinds}{unread}.{batches}{tables}")
    if other:
        warnings.warn(
            f"{root}: images of kinds that are not read are passed over: {_counted(other)} ({root / other[0]}, for "
            "one). Convert them to .png or .jpg to take them along.",
            PassedOver,
            stacklevel=2,
        )
    if flat:
        return _from_files(root, flat, [0] * len(flat), None)
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    return _from_files(root, [file for files in classes.values() for file in files], labels, list(classes))


def without_images(root: Path) -> list[str]:
    """Names of the folders beside classes that hold no image that is read, and so are none; none for other sources."""
    if not root.is_dir() or find_data_files(str(root)):
        return []
    flat, folders = _contents(root)
    return [] if flat else [folder.name for folder in folders if next(_walk(folder, root), None) is None]


def _counted(files: Sequence[str]) -> str:
    """["a.gif", "b/c.GIF", "d.heic"] -> "2 .gif, 1 .heic"."""
    kinds = Counter(Path(file).suffix.lower() for file in files).most_common()
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds)


def _contents(root: Path) -> tuple[list[str], list[Path]]:
    """Names of the images in a folder itself, and its sub-folders."""
    flat = sorted(name for name in os.listdir(root) if _is_image(root / name))
    return flat, sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _walk(folder: Path, root: Path, suffixes: Sequence[str] = SUFFIXES) -> Iterator[Path]:
    """The images below a class's folder; a folder that links lead to in several ways, or in circles, is read once."""
    seen = {os.path.realpath(root)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # the first way to it, in every run
        yield from (path for name in names if _is_image(path := Path(parent, name), suffixes))


def _is_image(path: Path, suffixes: Sequence[str] = SUFFIXES) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def _from_files(root: Path, files: Sequence[str], labels: list[int], class_names: list[str] | None) -> Images:
    paths = [str(root / file) for file in files]
    listing = [f"{file} {os.path.getsize(path)}" for file, path in zip(files, paths)]
    return Images(paths, labels, class_names, digest(listing), functools.partial(_read_file, paths))


def _read_file(paths: list[str], index: int) -> np.ndarray:
    return read_image(paths[index])


# --- inside packages -------------------------------------------------------------------------------------------------


def open_photographs() -> Images:
    """Colour photographs of several hundred pixels, each a class of its own."""
    root = Path(_package("skimage", "scikit-image")) / "data"
    names, files = zip(*PHOTOGRAPHS)
    return _from_files(root, files, list(range(len(files))), list(names))


def open_digits() -> Images:
    """1,797 handwritten digits of 8 x 8 pixels, in ten classes."""
    _package("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 levels 0..16 -> 0..255
    return Images(
        names=[f"digits[{i}]" for i in range(len(grey))],
        labels=digits.target.tolist(),
        class_names=[str(name) for name in digits.target_names],
        identity=digest([hashlib.sha256(grey.tobytes()).hexdigest()]),
        read=functools.partial(_read_grey, grey),
    )


def _read_grey(grey: np.ndarray, index: int) -> np.ndarray:
    return grey[index][:, :, None].repeat(3, axis=2)  # [H, W] -> [H, W, 3]


def _package(module: str, name: str) -> str:
    found = importlib.util.find_spec(module)
    if found is None:
        raise ImageError(f"these images are inside {name}, which is not installed: pip install 'rae[demo]'.")
    return found.submodule_search_locations[0]
