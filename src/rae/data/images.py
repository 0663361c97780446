"""Images from disk: a folder, or two small sets that travel inside packages; cropping; the stream that training reads.

files --open_images--> uint8 [H, W, 3] --center_crop / random_crop--> uint8 [h, w, 3] --Stream--> batches [B, 3, h, w]
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import NonNegativeInt

from rae.config import Config
from rae.data.order import crop_draws, epoch_order, image_index, mirrored

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OTHER_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl")  # images as well, and not read
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


class ImageError(ValueError):
    """Images that cannot be used; the message names the file or folder and the remedy."""


class DataConfig(Config):
    """Where the images come from and what is done to them on the way to the model."""

    source: str  # a folder of images, "digits" (scikit-learn) or "photographs" (scikit-image)
    held_out: float | str = 0.0  # kept out of training: a fraction of the source, or another source
    crop: Literal["center", "random"] = "center"  # "random" is decoder training's: to 1.5 x the size, then a crop
    flip: bool = False  # mirror every second image, at random
    enlarge: bool = False  # allow images smaller than asked for (bicubic)
    on_broken: Literal["error", "skip"] = "error"  # "skip" takes the next readable image and reports the name
    workers: NonNegativeInt = 0  # processes that decode ahead of training; 0 decodes in between


@dataclasses.dataclass(frozen=True)
class Images:
    """A fixed list of labelled images.

    `images[i]` is (uint8 [H, W, 3], label). Without classes `class_names` is None and every label is 0, which is
    the null label of an unconditional model.
    """

    names: Sequence[str]
    labels: Sequence[int]
    class_names: list[str] | None
    identity: str  # changes with the files, their sizes or their order; a resumed run compares it
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.read(index), self.labels[index]


def open_images(source: str | Path) -> Images:
    """Open a set of images.

    Args:
        source: "digits" (1,797 handwritten digits, 8 x 8 pixels, of scikit-learn), "photographs" (those inside
            scikit-image), or a folder. Sub-folders that hold images are classes, in sorted order; a flat folder has
            none. Hidden files and files that are not images by name are left alone.

    Raises:
        ImageError: no such folder, an empty one, one with images both in it and in sub-folders, a class whose images
            are all of a kind that is not read, or a name that means a folder as well.
    """
    if source == "":
        raise ImageError("the source of the images is empty; write . for the folder that you are in.")
    # A folder with a recipe in it is a run of that name, which training goes on with.
    if source in ("digits", "photographs") and os.path.isdir(source) and not os.path.exists(f"{source}/recipe.yaml"):
        raise ImageError(
            f"{source} means images that travel inside a package, and there is a folder {source} here: write "
            f"./{source} for the folder; rename it, or go elsewhere, for the package's."
        )
    if source == "digits":
        return _open_digits()
    if source == "photographs":
        root = Path(_package("skimage", "scikit-image")) / "data"
        return _from_files(root, [file for _, file in PHOTOGRAPHS], list(range(len(PHOTOGRAPHS))), _PHOTOGRAPH_NAMES)
    return _open_folder(Path(source))


def open_split(config: DataConfig) -> tuple[Images, Images | None]:
    """The training images and, where the configuration keeps some back, the held-out ones."""
    images = open_images(config.source)
    if isinstance(config.held_out, str):
        held_out = open_images(config.held_out)
        if held_out.class_names != images.class_names:
            raise ImageError(
                f"the classes of {config.held_out} ({held_out.class_names}) are not those of {config.source} "
                f"({images.class_names}); name the folders of both the same."
            )
        return images, held_out
    return split_images(images, config.held_out) if config.held_out else (images, None)


def split_images(images: Images, held_out: float) -> tuple[Images, Images]:
    """Set a fixed random part aside: (training, held-out), the same for every run over the same images.

    Args:
        held_out: fraction in (0, 1); at least one image stays on each side.
    """
    count = round(held_out * len(images))
    if not 0 < count < len(images):
        raise ImageError(
            f"held_out = {held_out} of {len(images)} images leaves {count} held out; both parts need some."
        )
    order = epoch_order(0, 0, len(images))
    return subset(images, sorted(order[count:].tolist())), subset(images, sorted(order[:count].tolist()))


def subset(images: Images, indices: Sequence[int]) -> Images:
    """The images at `indices`, in that order."""
    return Images(
        names=[images.names[i] for i in indices],
        labels=[images.labels[i] for i in indices],
        class_names=images.class_names,
        identity=_digest([images.identity, *map(str, indices)]),
        read=functools.partial(_read_subset, images.read, indices),
    )


def center_crop(image: np.ndarray, size: tuple[int, int], filter: str = "bicubic") -> np.ndarray:
    """Scale the image to cover `size`, then cut out the middle: ADM's preparation (arXiv 2105.05233), bit for bit.

    While both sides are at least twice the target they are halved with a box filter; one antialiased `filter` does
    the rest.

    Args:
        image: uint8 [H, W, 3] of any size; smaller ones are enlarged.
        size: (h, w) in pixels.
        filter: "bicubic" (ADM's), "bilinear", "lanczos", "box" or "nearest".

    Returns:
        uint8 [h, w, 3].
    """
    height, width = size
    picture = Image.fromarray(image)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    picture = np.asarray(picture.resize(scaled, Image.Resampling[filter.upper()]))
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def random_crop(image: np.ndarray, size: tuple[int, int], draws: Sequence[float]) -> np.ndarray:
    """Scale the image (bicubic, antialiased) to just cover 1.5 x `size`, then cut out a random part (Sec. 3, App. C).

    Args:
        image: uint8 [H, W, 3] of any size.
        size: (h, w) in pixels; 256 is cut out of 384.
        draws: two numbers in [0, 1), the place of the crop (row, column) among all possible ones.

    Returns:
        uint8 [h, w, 3].
    """
    height, width = size
    scale = max(1.5 * height / image.shape[0], 1.5 * width / image.shape[1])
    # round(.., 6): 1.5 x the shorter side comes back whole, the longer side is cut to whole pixels as in the reference
    scaled = (int(round(image.shape[1] * scale, 6)), int(round(image.shape[0] * scale, 6)))
    picture = np.asarray(Image.fromarray(image).resize(scaled, Image.Resampling.BICUBIC))
    top = int(draws[0] * (picture.shape[0] - height + 1))
    left = int(draws[1] * (picture.shape[1] - width + 1))
    return picture[top : top + height, left : left + width]


class Views(torch.utils.data.Dataset):
    """Index -> the centre crop of that image, never at random: for statistics, caches and held-out figures.

    Items hold `image` uint8 [3, h, w], `label`, and `index`, the image that was read: another one than asked for
    where that one was broken and `on_broken` is "skip".
    """

    def __init__(self, images: Images, config: DataConfig, size: tuple[int, int]) -> None:
        self.images, self.config, self.size = images, config, tuple(size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, image, label = read(self.images, index, self.config.on_broken)
        self.check_size(index, image)
        return {"image": to_tensor(center_crop(image, self.size)), "label": label, "index": index}

    def check_size(self, index: int, image: np.ndarray) -> None:
        if (image.shape[0] < self.size[0] or image.shape[1] < self.size[1]) and not self.config.enlarge:
            raise ImageError(
                f"{self.images.names[index]} is {image.shape[0]} x {image.shape[1]} pixels (height x width), smaller "
                f"than the {self.size[0]} x {self.size[1]} asked for. Take it out, ask for smaller images, or set "
                "data.enlarge: true to enlarge small images (bicubic)."
            )


class Stream(Views):
    """Position of the training stream -> the image there, cropped and flipped by the draws of that position.

    Items hold `image` uint8 [3, h, w], `label`, `index` and `position`.
    """

    def __init__(self, images: Images, config: DataConfig, size: tuple[int, int], seed: int) -> None:
        super().__init__(images, config, size)
        self.seed = seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        wanted = image_index(position, len(self.images), self.seed)
        index, image, label = read(self.images, wanted, self.config.on_broken)
        self.check_size(index, image)
        if self.config.crop == "random":
            image = random_crop(image, self.size, crop_draws(position, self.seed))
        else:
            image = center_crop(image, self.size)
        if self.config.flip and mirrored(position, self.seed):
            image = image[:, ::-1]
        return {"image": to_tensor(image), "label": label, "index": index, "position": position}


def read(images: Images, index: int, on_broken: str) -> tuple[int, np.ndarray, int]:
    """(index, image, label) of image `index` or, with "skip", of the next readable one: the same one every time."""
    for step in range(len(images)):
        candidate = (index + step) % len(images)
        try:
            return candidate, *images[candidate]
        except ImageError:
            if on_broken == "error":
                raise
    raise ImageError(f"none of the {len(images)} images can be read; the first is {images.names[0]}.")


def read_image(path: str | Path) -> np.ndarray:
    """Decode one file to uint8 [H, W, 3], upright (the camera's orientation tag is applied), transparency on white.

    Raises:
        ImageError: not an image, cut short, or with more than 8 bits a channel.
    """
    try:
        with Image.open(path) as picture:
            # Pillow has no mode for 16-bit colour: it reads raw "RGB;16B", for one, as 8 bits.
            if picture.mode.startswith(("I", "F")) or re.search(r";16[A-Z]", repr(picture.tile)):
                raise ImageError(f"{path}: more than 8 bits a channel (Pillow mode {picture.mode}); convert it to 8.")
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise ImageError(f"{path}: gone since the folder was listed.") from error
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{path}: cannot be decoded ({error}). Replace or remove the file, or set data.on_broken: skip."
        ) from error


class _Batches(torch.utils.data.Dataset):
    """Indices or positions -> the batch, or the ImageError, which a worker would turn into the text of a traceback."""

    def __init__(self, dataset: Views) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any] | ImageError:
        try:
            return torch.utils.data.default_collate([self.dataset[index] for index in indices])
        except ImageError as error:
            return error


def loader(
    dataset: Views, batches: Iterator[range] | Sequence[range], config: DataConfig
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `dataset` at the given ranges of indices or positions, decoded by `config.workers` processes."""
    for batch in torch.utils.data.DataLoader(
        _Batches(dataset),
        sampler=batches,
        batch_size=None,
        num_workers=config.workers,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=torch.cuda.is_available(),
    ):
        if isinstance(batch, ImageError):
            raise batch
        yield batch


def readable(
    images: Images,
    config: DataConfig,
    size: tuple[int, int],
    indices: range,
    *,
    batch: int,
    left_out: Callable[[str], object],
) -> Iterator[dict[str, torch.Tensor]]:
    """Centre crops of the images at `indices` in batches, as of `Views`, and none in the place of a broken one.

    Args:
        images, config, size: as for `Views`.
        indices: of the images to read.
        batch: images at a time; fewer where one is broken.
        left_out: is told the name of every image that cannot be read, where `config.on_broken` is "skip".
    """
    chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    for chunk, items in zip(chunks, loader(Views(images, config, size), chunks, config)):
        wanted = torch.tensor(chunk)
        own = items["index"] == wanted
        for index in wanted[~own].tolist():
            left_out(images.names[index])
        if own.any():
            yield {name: column[own] for name, column in items.items()}


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # uint8 [h, w, 3] -> [3, h, w]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255  # uint8 [B, 3, h, w] -> [0, 1] float32


def to_bytes(images: torch.Tensor, rounding: Literal["nearest", "truncate"] = "nearest") -> torch.Tensor:
    """Any float images -> uint8: clamp(0, 1) * 255, to the nearest level or, as in the authors' code, truncated."""
    levels = images.clamp(0, 1) * 255
    return (levels.round() if rounding == "nearest" else levels).byte()


_PHOTOGRAPH_NAMES = [name for name, _ in PHOTOGRAPHS]


def _open_digits() -> Images:
    _package("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 levels 0..16 -> 0..255
    return Images(
        names=[f"digits[{i}]" for i in range(len(grey))],
        labels=digits.target.tolist(),
        class_names=[str(name) for name in digits.target_names],
        identity=_digest([hashlib.sha256(grey.tobytes()).hexdigest()]),
        read=functools.partial(_read_grey, grey),
    )


def _open_folder(root: Path) -> Images:
    if not root.is_dir():
        known = "Give a folder of images, digits or photographs."
        raise ImageError(f"{root}: no such folder of images. {known}")
    flat = sorted(name for name in os.listdir(root) if _is_image(root / name))
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {folder: sorted(str(file.relative_to(root)) for file in _walk(folder, root)) for folder in folders}
    classes = {folder.name: files for folder, files in found.items() if files}
    if flat and classes:
        raise ImageError(
            f"{root} holds {len(flat)} images and also {len(classes)} folders of images ({', '.join(classes)[:80]}): "
            "move all images into folders, one for each class, or all into one folder without classes."
        )
    for folder, files in found.items():
        other = None if files or flat else next(_walk(folder, root, OTHER_SUFFIXES), None)
        if other:
            raise ImageError(
                f"{folder} would be a class, but of its images none is of a kind that is read ({', '.join(SUFFIXES)}): "
                f"{other.name}, for one. Convert them, or move the folder away."
            )
    if not flat and not classes:
        raise ImageError(f"{root} holds no images ({', '.join(SUFFIXES)}).")
    if flat:
        return _from_files(root, flat, [0] * len(flat), None)
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    return _from_files(root, [file for files in classes.values() for file in files], labels, list(classes))


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


def _from_files(root: Path, files: list[str], labels: list[int], class_names: list[str] | None) -> Images:
    paths = [str(root / file) for file in files]
    listing = [f"{file} {os.path.getsize(path)}" for file, path in zip(files, paths)]
    return Images(paths, labels, class_names, _digest(listing), functools.partial(_read_file, paths))


def _read_file(paths: list[str], index: int) -> np.ndarray:
    return read_image(paths[index])


def _read_grey(grey: np.ndarray, index: int) -> np.ndarray:
    return grey[index][:, :, None].repeat(3, axis=2)  # [H, W] -> [H, W, 3]


def _read_subset(read: Callable[[int], np.ndarray], indices: Sequence[int], index: int) -> np.ndarray:
    return read(indices[index])


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _package(module: str, name: str) -> str:
    found = importlib.util.find_spec(module)
    if found is None:
        raise ImageError(f"these images are inside {name}, which is not installed: pip install 'rae[demo]'.")
    return found.submodule_search_locations[0]


def _leave_signals_to_the_parent(_: int) -> None:
    # Ctrl-C and a batch system's SIGTERM reach the whole process group; the training process decides when to end.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
