"""The images that training and the commands read: opening a source, splitting it, crops, the stream of training.

source --open_images--> uint8 [H, W, 3] --center_crop / random_crop--> uint8 [h, w, 3] --Stream--> batches [B, 3, h, w]
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt

from rae.config import Config
from rae.data.class_names import name_classes
from rae.data.crops import center_crop, random_crop
from rae.data.folders import find_data_files, open_digits, open_folder, open_photographs
from rae.data.image_set import ImageError, Images, digest
from rae.data.npz import open_npz
from rae.data.order import crop_draws, epoch_order, image_index, mirrored
from rae.data.shards import open_shards
from rae.data.streams import StreamError, open_stream
from rae.data.tables import is_saved_dataset, open_hub, open_saved, open_tables

PACKAGED = {"digits": open_digits, "photographs": open_photographs}
FILES = {".parquet": open_tables, ".arrow": open_tables, ".tar": open_shards, ".npz": open_npz}


class DataConfig(Config):
    """Where the images come from and what is done to them on the way to the model."""

    source: str  # a folder, .parquet, .arrow, .tar or .npz files, hf:owner/name, digits or photographs: see Sources
    image: str | None = None  # column of a table, ending in a shard or array of an .npz; None = the only one, or arr_0
    label: str | None = None  # column of the classes; None = the only one of its kind, or arr_1; "" = leave them alone
    class_names: str | None = None  # file that names the classes: lines, or .json; None = their own names
    held_out: float | str = 0.0  # kept out of training: a fraction of the source, or another source
    crop: Literal["center", "random"] = "center"  # "random" is decoder training's: to 1.5 x the size, then a crop
    flip: bool = False  # mirror every second image, at random
    enlarge: bool = False  # allow images smaller than asked for (bicubic)
    on_broken: Literal["error", "skip"] = "error"  # "skip" takes the next readable image and reports the name
    workers: NonNegativeInt = 0  # processes that decode ahead of training; 0 decodes in between


def open_images(source: str | Path, image: str | None = None, label: str | None = None) -> Images:
    """Open a set of images.

    Args:
        source: one of
            - "digits" (1,797 handwritten digits, 8 x 8 pixels, of scikit-learn) or "photographs" (those inside
              scikit-image);
            - a folder: sub-folders that hold images are classes, in sorted order; a flat folder has none. Hidden files
              and files that are not images by name are left alone;
            - Parquet, Arrow or WebDataset (tar) files: one, a folder of them, a pattern, or names with braces
              (`train-{000..009}.tar`); or a folder that `save_to_disk` of Hugging Face datasets wrote;
            - .npz files, one or by such a name: `arr_0` uint8 [N,H,W,3] and, where there are labels, `arr_1`;
            - "hf:owner/name", "hf:owner/name:config", "hf:owner/name@split", "hf:owner/name:config@split": of the hub,
              or with "hf-stream:" in place of "hf:", of which rows are fetched when they are first asked for.
        image: the column of a table, the ending in a shard's samples or the array of an .npz that holds the images,
            where there are several; None = the only one, or `arr_0`.
        label: the column, or the array, that holds the classes; None = the only one of its kind, or `arr_1`, if there
            is one; "" = no classes.

    Raises:
        ImageError: there is no such source, it holds nothing that can be used, or its name means two things.
    """
    source = str(source)
    if source == "":
        raise ImageError("the source of the images is empty; write . for the folder that you are in.")
    # A folder with a recipe in it is a run of that name, which training goes on with.
    if source in PACKAGED and os.path.isdir(source) and not os.path.exists(f"{source}/recipe.yaml"):
        raise ImageError(
            f"{source} means images that travel inside a package, and there is a folder {source} here: write "
            f"./{source} for the folder; rename it, or go elsewhere, for the package's."
        )
    if source.startswith("hf-stream:"):
        return open_stream(source, image, label)
    if source.startswith("hf:"):
        return open_hub(source, image, label)
    if is_saved_dataset(source):
        return open_saved(source, image, label)
    if files := find_data_files(source):
        return FILES[files[0].suffix](files, image, label)
    if image or label:
        key, name = ("image", image) if image else ("label", label)
        raise ImageError(
            f"--{key} {name} (in a recipe data.{key}={name}) names a column, and {source} has none: take it out."
        )
    images = PACKAGED[source]() if source in PACKAGED else open_folder(Path(source))
    return images if label is None else dataclasses.replace(images, labels=[0] * len(images), class_names=None)


def has_columns(source: str) -> bool:
    """Whether `image` and `label` of `open_images` can name anything in a source: not in folders of image files.

    Raises:
        ImageError: data files that cannot be told apart, as of `open_images`.
    """
    return source.startswith(("hf:", "hf-stream:")) or is_saved_dataset(source) or bool(find_data_files(source))


def open_split(config: DataConfig) -> tuple[Images, Images | None]:
    """The training images and, where the configuration keeps some back, the held-out ones."""
    images, held_out = open_images(config.source, config.image, config.label), None
    if isinstance(config.held_out, str):
        held_out = open_images(config.held_out, config.image, config.label)
        _check_same_classes(config, images.class_names, held_out.class_names)
    if config.class_names is not None:
        images = name_classes(images, config.class_names, config.source)
    if isinstance(config.held_out, str) or not config.held_out:
        return images, held_out
    return split_images(images, config.held_out)


def _check_same_classes(config: DataConfig, names: list[str] | None, held_out: list[str] | None) -> None:
    # Labels that are bare numbers have as many classes as the largest says, which a small set need not reach.
    if held_out != names and not (names and held_out and held_out == names[: len(held_out)]):
        raise ImageError(
            f"the classes of {config.held_out} ({held_out}) are not those of {config.source} ({names}); name the "
            "classes of both the same."
        )


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
        identity=digest([images.identity, *map(str, indices)]),
        read=functools.partial(_read_subset, images.read, indices),
    )


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
                f"than the {self.size[0]} x {self.size[1]} asked for. Take it out, ask for smaller images, or "
                "enlarge small ones (bicubic): --enlarge, in a recipe data.enlarge: true."
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


class _Batches(torch.utils.data.Dataset):
    """Indices or positions -> the batch, or its error, which a worker would turn into the text of a traceback."""

    def __init__(self, dataset: Views) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any] | ImageError | StreamError:
        try:
            return torch.utils.data.default_collate([self.dataset[index] for index in indices])
        except (ImageError, StreamError) as error:
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
        if isinstance(batch, Exception):
            raise batch
        yield batch


def readable_chunks(
    views: Views, chunks: Iterable[range], batch: int
) -> Iterator[Iterator[tuple[range, dict[str, torch.Tensor]]]]:
    """Items of the images in each chunk, in batches, without those that were read in the place of a broken one.

    Args:
        views: of the images.
        chunks: indices of images. One loader reads all, so a chunk's batches are to be taken before the next one's.
        batch: images at a time.

    Returns:
        For each chunk its batches: the indices asked for, and the items of those that can be read, which may be none.
    """
    cut = [[chunk[start : start + batch] for start in range(0, len(chunk), batch)] for chunk in chunks]
    wanted = [indices for batches in cut for indices in batches]
    read = ((indices, _own(indices, items)) for indices, items in zip(wanted, loader(views, wanted, views.config)))
    return (itertools.islice(read, len(batches)) for batches in cut)


def _own(indices: range, items: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    own = items["index"] == torch.tensor(indices)
    return {name: column[own] for name, column in items.items()}


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
    (batches,) = readable_chunks(Views(images, config, size), [indices], batch)
    for wanted, items in batches:
        for index in sorted(set(wanted) - set(items["index"].tolist())):
            left_out(images.names[index])
        if len(items["index"]):
            yield items


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # uint8 [h, w, 3] -> [3, h, w]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255  # uint8 [B, 3, h, w] -> [0, 1] float32


def to_bytes(images: torch.Tensor, rounding: Literal["nearest", "truncate"] = "nearest") -> torch.Tensor:
    """Any float images -> uint8: clamp(0, 1) * 255, to the nearest level or, as in the authors' code, truncated."""
    levels = images.clamp(0, 1) * 255
    return (levels.round() if rounding == "nearest" else levels).byte()


def _read_subset(read: Callable[[int], np.ndarray], indices: Sequence[int], index: int) -> np.ndarray:
    return read(indices[index])


def _leave_signals_to_the_parent(_: int) -> None:
    # Ctrl-C and a batch system's SIGTERM reach the whole process group; the training process decides when to end.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
