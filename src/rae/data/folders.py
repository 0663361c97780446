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

from rae.data.image_set import SUFFIXES, ImageError, Images, PassedOver, digest, not_there, read_image

# images as well, and not read
OTHER_SUFFIXES = (
    *(".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef"),  # of cameras
)
FOLDER_SUFFIXES = (".parquet", ".arrow", ".tar")  # files that hold many images
DATA_SUFFIXES = (*FOLDER_SUFFIXES, ".npz")  # which must be named: in a folder of images it may hold anything of them
LOST_AND_FOUND = "lost+found"  # where a disk is mounted: its own, which nobody else can list
FILE_NAME = re.compile(r"\.[A-Za-z]\w*$")  # ends as that of a file, and not as "n01440764" or "St. Bernard"
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
        ImageError: files of several kinds or parts, some that are missing, images beside them, compressed tar files; or
            a folder that cannot be listed.
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
    names, classes = _contents(folder)
    files = [folder / name for name in names if name.endswith(FOLDER_SUFFIXES)]
    if not files:
        return []
    flat, below = (name for name in names if _ends(name)), (image for part in classes for image in _walk(folder, part))
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
    if gone := next((file for file in files if not file.exists()), None):
        raise ImageError(f"{gone}: {not_there(gone)}. Fetch or mount what is missing, or name files that are here.")
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

    One image file is a set of one. A link that leads nowhere is an image that cannot be read if it is one by its name.

    Raises:
        ImageError: no such folder, an empty one, one with images both in it and in sub-folders, a class whose images
            are all of a kind that is not read, or a folder that cannot be listed.

    Warns:
        PassedOver: some images are of a kind that is not read, or are not there.
    """
    if _ends(root.name) and root.is_file():
        return _from_files(root.parent, [root.name], [0], None)
    if root.is_file():
        raise ImageError(f"{root} is a file of a kind that is not read ({', '.join((*SUFFIXES, *DATA_SUFFIXES))}).")
    if not root.is_dir():
        known = "a folder, .parquet, .arrow, .tar or .npz files, hf:owner/name, digits or photographs"
        raise ImageError(f"{root}: no such folder of images. A source is {known}.")
    names, folders = _contents(root)
    flat, other = ([name for name in names if _ends(name, kinds)] for kinds in (SUFFIXES, OTHER_SUFFIXES))
    classes = {}
    for folder in folders:
        found = sorted(_walk(root, folder, SUFFIXES + OTHER_SUFFIXES))
        files = [file for file in found if _ends(file)]
        if files:
            classes[folder] = files
        elif found and not flat:
            raise ImageError(
                f"{root / folder} would be a class, but of its images none is of a kind that is read "
                f"({', '.join(SUFFIXES)}): {Path(found[0]).name}, for one. Convert them, or move the folder away."
            )
        other += [file for file in found if _ends(file, OTHER_SUFFIXES)]
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
    names, folders = _contents(root)
    flat = any(_ends(name) for name in names)
    return [] if flat else [folder for folder in folders if next(_walk(root, folder), None) is None]


def _counted(files: Sequence[str]) -> str:
    """["a.gif", "b/c.GIF", "d.heic"] -> "2 .gif, 1 .heic"."""
    kinds = Counter(Path(file).suffix.lower() for file in files).most_common()
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds)


def _contents(root: Path) -> tuple[list[str], list[str]]:
    """Names of the files in a folder and of its sub-folders, without hidden ones."""
    return tuple([name for name in names if not name.startswith(".")] for names in _list(root))


def _walk(root: Path, folder: str, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[str]:
    """The images below a class's folder, as paths from `root` on.

    A folder that links lead to in several ways, or in circles, is read once.
    """
    seen, left = {os.path.realpath(root)}, [folder]
    while left:
        part = left.pop()
        if (real := os.path.realpath(root / part)) in seen:
            continue
        seen.add(real)
        files, folders = _list(root / part)
        yield from (f"{part}/{name}" for name in files if _ends(name, suffixes) and not name.startswith("."))
        left += [f"{part}/{name}" for name in reversed(folders)]  # the first way to it, in every run


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files in a folder, links that lead nowhere among them, and of its sub-folders; both in order.

    The folder itself tells which is which: nothing is asked of the disk about ordinary files.

    Raises:
        ImageError: it cannot be listed, or a link in it that cannot be followed may lead to a folder.
    """
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_file, is_folder = _kind(entry)
                files += [entry.name] * is_file
                folders += [entry.name] * is_folder
    except OSError as error:
        if folder.name == LOST_AND_FOUND and isinstance(error, PermissionError):
            return [], []
        raise ImageError(
            f"{folder} cannot be listed ({error.strerror}): images would be missing, and classes have other numbers. "
            "Mount it again, have its permissions changed, or move it away."
        ) from error
    return sorted(files), sorted(folders)


def _kind(entry: os.DirEntry) -> tuple[bool, bool]:
    """Whether it is a file, and whether it is a folder; a pipe is neither."""
    try:
        if entry.is_symlink():
            entry.stat()  # raises where the link leads nowhere
        return entry.is_file(), entry.is_dir()
    except OSError as error:
        if FILE_NAME.search(entry.name) or entry.name.startswith("."):
            return True, False
        raise ImageError(
            f"{entry.path} leads nowhere ({error.strerror}) and may have been a folder of images: fetch or mount what "
            "it links to, or remove it."
        ) from error


def _ends(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    return name.lower().endswith(suffixes)


def _from_files(root: Path, files: Sequence[str], labels: list[int], class_names: list[str] | None) -> Images:
    paths = [str(root / file) for file in files]
    sizes = [_size(path) for path in paths]
    if gone := [path for path, size in zip(paths, sizes) if size < 0]:
        warnings.warn(
            f"{root}: {len(gone):,} of {len(paths):,} images are not there ({gone[0]}, for one: {not_there(gone[0])}), "
            "and are images that cannot be read",
            PassedOver,
            stacklevel=2,
        )
    listing = [f"{file} {size}" for file, size in zip(files, sizes)]
    return Images(paths, labels, class_names, digest(listing), functools.partial(_read_file, paths))


def _size(path: str) -> int:
    """Bytes of a file; -1 of one that is not there, as where a link leads nowhere."""
    try:
        return os.path.getsize(path)
    except (FileNotFoundError, NotADirectoryError):
        return -1
    except OSError as error:
        raise ImageError(
            f"{path}: {error.strerror}. Mount it again, have its permissions changed, or remove it."
        ) from error


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
