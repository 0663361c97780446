"""A latent cache on the disk, read at random (the command `rae cache` writes it, `latent_format` says what is in it).

page cache --StoredLatents.gather--> Stored [B,C,h,w] --Stored.to--> float32 latents on the device
"""

import ctypes
import dataclasses
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rae.config import ConfigError, read_json
from rae.data.images import DataConfig
from rae.data.latent_format import (
    KINDS,
    VIEWS,
    CacheConfig,
    CacheError,
    Origin,
    Stored,
    differences,
    find_damage,
    map_shard,
    shard_path,
)
from rae.data.order import image_index, mirrored

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclasses.dataclass(frozen=True)
class StoredLatents:
    """A latent cache, mapped from the disk (`open_cache`).

    Attributes:
        folder, config: of the cache.
        labels: int64 [n].
        flip: whether `take` mirrors every second image, at random.
        columns: of each shard, by name, on the mapped file.
    """

    folder: Path
    config: CacheConfig
    labels: Tensor
    flip: bool
    columns: list[dict[str, np.ndarray]] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return self.config.count

    def row(self, column: str, index: int) -> np.ndarray:
        """What `column` has of image `index`, on the mapped file: [C,h,w] of a view, [C] of a scale."""
        shard, row = divmod(index, self.config.shard_rows)
        return self.columns[shard][column][row]

    def gather(self, indices: Sequence[int], flips: Sequence[bool]) -> Stored:
        """Latents of images, of those mirrored where `flips` says so.

        Each row is copied once, from the page cache to a tensor that a GPU can fetch by itself; rows that are not in
        the page cache are asked of the disk all at once.
        """
        views = [VIEWS[flip] for flip in flips]
        rows = [self.row(view, index) for view, index in zip(views, indices)]
        for row in rows:
            _will_need(row)
        _, on_disk, dtype = KINDS[self.config.dtype]
        values = _copied(rows, self.config.shape, on_disk).view(dtype)
        if self.config.dtype != "int8":
            return Stored(values, None)
        scales = [self.row(f"{view}_scale", index) for view, index in zip(views, indices)]
        return Stored(values, _copied(scales, self.config.shape[:1], torch.float32))

    def take(self, positions: Sequence[int], seed: int) -> tuple[Stored, Tensor]:
        """Latents and labels [B] at positions of the training stream."""
        indices = [image_index(position, len(self), seed) for position in positions]
        return self.gather(indices, [self.flip and mirrored(p, seed) for p in positions]), self.labels[indices]

    def of_run(self, origin: Origin, data: DataConfig) -> "StoredLatents":
        """This cache, for a run with that autoencoder and those images, mirrored or not as the run wants them.

        Raises:
            CacheError: it is of another autoencoder, of other images or crops, without the mirrored views that the run
                needs, or with other images in the place of unreadable ones, which the run does not allow.
        """
        config, remedy = self.config, "Give the folder of another cache, or write one for this run with `rae cache`."
        if different := differences(config.origin.model_dump(), origin.model_dump()):
            raise CacheError(
                f"{self.folder} holds latents of the autoencoder {config.autoencoder}, and not those that this run "
                f"needs (cache -> run):\n{different}\n{remedy}"
            )
        if data.flip and not config.flip:
            raise CacheError(f"{self.folder} has no mirrored images (flip: False), data.flip is True. {remedy}")
        unreadable = [name for shard in config.shards for name in shard.unreadable]
        if unreadable and data.on_broken == "error":
            raise CacheError(
                f"{self.folder} has the next image in the place of {len(unreadable)} that could not be read, such as "
                f"{unreadable[0]}, and data.on_broken is error: set data.on_broken=skip, or mend the image and write "
                "the cache again."
            )
        return dataclasses.replace(self, flip=data.flip)


def open_cache(folder: str | Path, *, verify: bool = False) -> StoredLatents:
    """Open a cache that `rae cache` wrote: sizes, columns and rows of all shards are compared with its cache.json.

    Args:
        folder: of the cache.
        verify: take the SHA-256 of all shards as well, which reads them whole.

    Raises:
        CacheError: there is none, it is not finished, its cache.json is damaged, or a shard is missing, damaged or of
            another cache.
    """
    folder = Path(folder).expanduser()
    if (folder / "partial.json").is_file():
        raise CacheError(f"{folder} is a latent cache that is not finished: run the same `rae cache` command again.")
    if not (folder / "cache.json").is_file():
        raise CacheError(f"{folder} is not a latent cache (it has no cache.json); `rae cache` writes one.")
    try:
        config = read_json(CacheConfig, folder / "cache.json")
    except ConfigError as error:
        raise CacheError(
            f"{error}\nCopy it again, or run the same `rae cache` command again, which writes it anew and keeps shards "
            "that are whole."
        ) from error
    paths = [shard_path(folder, number) for number in range(len(config.shards))]
    remedy = "Copy it again, or run the same `rae cache` command again, which writes it anew."
    for path, shard in zip(paths, config.shards):
        if damage := find_damage(path, shard, verify=verify):
            raise CacheError(f"{damage}. {remedy}")
    columns = [map_shard(path, config, len(span), remedy) for path, span in zip(paths, config.spans)]
    labels = torch.from_numpy(np.concatenate([shard["label"] for shard in columns]))
    return StoredLatents(folder, config, labels, config.flip, columns)


def _copied(rows: Sequence[np.ndarray], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The rows in one tensor, on which a GPU's copy need not wait."""
    tensor = torch.empty(len(rows), *shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    for target, row in zip(tensor.numpy(), rows):
        target[...] = row
    return tensor


def _will_need(row: np.ndarray) -> None:
    """Let the system begin to read a mapped row: left to itself it would read it bit by bit, when touched."""
    start = row.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise(start, row.ctypes.data + row.nbytes - start, mmap.MADV_WILLNEED)
