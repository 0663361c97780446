"""What a latent cache on the disk holds: the numbers, the settings, one shard.

CACHE/
    cache.json            what is in it and what that was made from (`CacheConfig`); written last
    shards/00000.arrow    the first images' latents in the images' order, 1/4 GiB; Arrow's stream format, one record
                          batch a file, which `datasets.Dataset.from_file` and `pyarrow.memory_map` map into memory
    shards/00000.json     that shard's entry in cache.json (`Shard`)

A row is an image. Columns: `label` (int64), `latent` (C*h*w numbers) and, with both views, `mirrored` (those of the
mirrored image); of int8 also `latent_scale` and `mirrored_scale` (C float32). bf16, which Arrow has not, is its 16 bits
as uint16.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from rae.config import Config

Dtype = Literal["fp32", "fp16", "bf16", "int8"]

VIEWS = ("latent", "mirrored")
SHARD_BYTES = 2**28  # at most: what a writer holds in memory, and what is computed again after a kill
KINDS = {  # Arrow's and torch's types of what is in the files, torch's of what that means
    "fp32": ("float32", torch.float32, torch.float32),
    "fp16": ("float16", torch.float16, torch.float16),
    "bf16": ("uint16", torch.uint16, torch.bfloat16),
    "int8": ("int8", torch.int8, torch.int8),
}


class CacheError(ValueError):
    """A latent cache that cannot be written or used; the message names the file or folder and the remedy."""


# --- numbers ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Latents in the form that is on the disk.

    Attributes:
        values: [B,C,h,w] float32, float16, bfloat16 or int8.
        scale: [B,C] float32 of int8, else None.
    """

    values: Tensor
    scale: Tensor | None

    def to(self, device: torch.device | str) -> Tensor:
        """float32 latents [B,C,h,w] on a device; what travels there is the stored form."""
        values = self.values.to(device, non_blocking=True).float()
        return values if self.scale is None else values * self.scale.to(device, non_blocking=True)[..., None, None]


def store(z: Tensor, dtype: Dtype) -> Stored:
    """fp16, bf16: z, rounded.  int8: q = round(z / s),  s = max |z| / 127 over the positions of one latent's channel.

    The largest error is 2^-11 |z| of fp16 (from 6e-5 to 65,504), 2^-8 |z| of bf16, s / 2 of int8. The scale is
    the latent's own, so that nothing has to be known of the others; it is float32: as float16 it would save 0.8 %.

    Args:
        z: latents [B,C,h,w], float32.
        dtype: of the numbers stored.
    """
    if dtype != "int8":
        return Stored(z.to(KINDS[dtype][2]), None)
    scale = z.abs().amax((2, 3)) / 127
    steps = torch.where(scale == 0, 1, scale)[..., None, None]
    return Stored((z / steps).round().to(torch.int8), scale)


# --- what is in a cache ----------------------------------------------------------------------------------------------


class Origin(Config):
    """What decides latents: a cache of another origin is another data set.

    Attributes:
        latents: `RAE.latent_identity`: encoder, sizes, statistics.
        encoder: SHA-256 of the encoder's weights.
        images: `Images.identity`.
        labels: SHA-256 of the images' labels, which a run may leave alone.
        image_size: (H, W) of the crops.
        crop, enlarge: as in `DataConfig`.
    """

    latents: str
    encoder: str
    images: str
    labels: str
    image_size: tuple[PositiveInt, PositiveInt]
    crop: Literal["center"]
    enlarge: bool


class CacheSettings(Config):
    """What decides the bytes of a cache. The same settings go on with one that was interrupted.

    Attributes:
        kind, version: of the format.
        autoencoder: by which name it was given; for messages.
        class_names: of the labels, for other readers; None without classes.
        origin: of the latents.
        dtype: of the numbers stored.
        flip: whether the mirrored images' latents are there as well.
        shape: (C, h, w) of a latent.
        count: images.
        shard_rows: images of a shard; the last one may have fewer.
    """

    kind: Literal["latent cache"] = "latent cache"
    version: Literal[1] = 1
    autoencoder: str
    class_names: list[str] | None
    origin: Origin
    dtype: Dtype
    flip: bool
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    count: PositiveInt
    shard_rows: PositiveInt

    @property
    def views(self) -> tuple[str, ...]:
        return VIEWS[: 1 + self.flip]

    @property
    def spans(self) -> list[range]:
        """The images of every shard."""
        starts = range(0, self.count, self.shard_rows)
        return [range(start, min(start + self.shard_rows, self.count)) for start in starts]

    def deciding(self) -> dict[str, Any]:
        """The settings that must be the same in every shard, flat."""
        told = {"autoencoder", "class_names", "origin"}
        settings = self.model_dump(mode="json", include=set(CacheSettings.model_fields) - told)
        return settings | self.origin.model_dump(mode="json")


class Shard(Config):
    """One shard, as it was written.

    Attributes:
        bytes, sha256: of the file.
        signal, error: sums over its latents of the mean square of z, and of z - stored z, each of all views.
        unreadable: names of images in whose place the next one was taken.
    """

    bytes: PositiveInt
    sha256: str
    signal: float
    error: float
    unreadable: list[str]


class CacheConfig(CacheSettings):
    """`cache.json`. The error of the stored form, e = stored z - z, is measured over all latents:

        snr = 10 log10(mean z^2 / mean e^2)  in dB.

    In the loss: with x + e in the place of the data x, a network learns the flow to the distribution of x + e, which is
    at a distance W2 of at most sqrt(mean e^2) per element from that of x. The target of its velocity v becomes
    eps - x - e in place of eps - x, so that with r = v - (eps - x) the loss per element is

        mean (r + e)^2 = mean r^2 + 2 mean r e + mean e^2.

    Rounding errors e have mean zero, and noise covers them at all t but the very smallest, so that the network cannot
    tell them and the middle term vanishes: the loss is higher by `error` = mean e^2.

    Attributes:
        error: mean e^2 per element.
        snr: in dB; None where nothing was lost.
        shards: in their order.
    """

    error: float
    snr: float | None
    shards: list[Shard]

    @model_validator(mode="after")
    def _all_there(self) -> Self:
        if len(self.shards) != len(self.spans):
            raise ValueError(f"it names {len(self.shards)} shards of {len(self.spans)}")
        return self

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of all that is stored."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def conclude(settings: CacheSettings, shards: Sequence[Shard]) -> CacheConfig:
    """The `cache.json` of shards that are all written."""
    latents = settings.count * len(settings.views)
    signal, error = (sum(getattr(shard, name) for shard in shards) / latents for name in ("signal", "error"))
    snr = 10 * math.log10(signal / error) if error else None
    return CacheConfig(**settings.model_dump(), error=error, snr=snr, shards=shards)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line for each key whose values are not equal; "" if all are."""
    changed = [(key, before[key], now[key]) for key in before if before[key] != now[key]]
    return "\n".join(f"  {key}: {_short(was)} -> {_short(is_now)}" for key, was, is_now in changed)


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


# --- shards ----------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shards/{number:05d}.arrow"


def shard_rows(shape: tuple[int, int, int], dtype: Dtype, flip: bool) -> int:
    """Images of a shard: a power of two, so that batches mostly come out even."""
    number = math.prod(shape) * torch.empty(0, dtype=KINDS[dtype][1]).itemsize + 4 * shape[0] * (dtype == "int8")
    return 1 << max(0, (SHARD_BYTES // ((1 + flip) * number)).bit_length() - 1)


def empty_rows(settings: CacheSettings, rows: int) -> dict[str, Tensor]:
    """The columns of a shard, to be filled: `label` [rows], each view [rows,C,h,w], each scale [rows,C]."""
    columns = {"label": torch.empty(rows, dtype=torch.int64)}
    for view in settings.views:
        columns[view] = torch.empty(rows, *settings.shape, dtype=KINDS[settings.dtype][1])
        if settings.dtype == "int8":
            columns[f"{view}_scale"] = torch.empty(rows, settings.shape[0])
    return columns


def fill(columns: dict[str, Tensor], view: str, rows: slice, latents: Stored) -> None:
    """Put latents into some rows of a view."""
    columns[view][rows] = latents.values.cpu().view(columns[view].dtype)
    if latents.scale is not None:
        columns[f"{view}_scale"][rows] = latents.scale.cpu()


def write_shard(path: Path, settings: CacheSettings, columns: dict[str, Tensor]) -> None:
    """Write the columns of `empty_rows` as one Arrow file.

    Raises:
        OSError: the disk is full or failed.
    """
    pyarrow, schema = import_pyarrow(path), _schema(settings)
    arrays = []
    for field in schema:
        flat = pyarrow.array(columns[field.name].flatten().numpy())
        is_list = pyarrow.types.is_fixed_size_list(field.type)
        arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, type=field.type) if is_list else flat)
    batch = pyarrow.RecordBatch.from_arrays(arrays, schema=schema)
    with pyarrow.ipc.new_stream(str(path), schema) as file:
        file.write_batch(batch)


def shard_bytes(settings: CacheSettings, rows: int) -> int:
    """What a shard takes on the disk, a few hundred bytes less."""
    with torch.device("meta"):
        return sum(column.nbytes for column in empty_rows(settings, rows).values())


def find_damage(path: Path, wanted: Shard, *, verify: bool = False) -> str | None:
    """What is wrong with a shard; None if it is as it was written. Its SHA-256 is taken only with `verify`."""
    if not path.is_file():
        return f"{path} is missing"
    if (found := path.stat().st_size) != wanted.bytes:
        return f"{path} is damaged: {found:,} bytes instead of {wanted.bytes:,}"
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
                return f"{path} is damaged: its SHA-256 is not the one written"
    return None


def _schema(settings: CacheSettings) -> Any:
    """Arrow's schema, which also says which cache the shard is of."""
    import pyarrow

    fields = [pyarrow.field("label", pyarrow.int64())]
    number = getattr(pyarrow, KINDS[settings.dtype][0])()
    for view in settings.views:
        fields.append(pyarrow.field(view, pyarrow.list_(number, math.prod(settings.shape))))
        if settings.dtype == "int8":
            fields.append(pyarrow.field(f"{view}_scale", pyarrow.list_(pyarrow.float32(), settings.shape[0])))
    cache = hashlib.sha256(json.dumps(settings.deciding(), sort_keys=True).encode()).hexdigest()
    metadata = {"dtype": settings.dtype, "shape": json.dumps(settings.shape), "cache": cache}
    return pyarrow.schema(fields, metadata)


def map_shard(path: Path, settings: CacheSettings, rows: int, remedy: str) -> dict[str, np.ndarray]:
    """The columns of a shard, on its mapped file; no file stays open."""
    pyarrow, schema = import_pyarrow(path), _schema(settings)
    try:
        with pyarrow.memory_map(str(path)) as file:
            batch = pyarrow.ipc.open_stream(file).read_next_batch()
    except (pyarrow.ArrowException, OSError, StopIteration) as error:
        raise CacheError(f"{path} is damaged ({' '.join(str(error).split())}). {remedy}") from error
    if not batch.schema.equals(schema, check_metadata=True) or batch.num_rows != rows:
        raise CacheError(
            f"{path} is not a shard of this cache: {batch.num_rows} rows of\n{batch.schema}\ninstead of {rows} of\n"
            f"{schema}\n{remedy}"
        )
    columns = {"label": batch.column("label").to_numpy(zero_copy_only=True)}
    for name in batch.schema.names[1:]:
        flat = batch.column(name).values.to_numpy(zero_copy_only=True)
        columns[name] = flat.reshape(rows, *(settings.shape if name in VIEWS else settings.shape[:1]))
    return columns


def import_pyarrow(path: Path) -> Any:
    """pyarrow; CacheError says how to get it for `path`, a file or the folder of a cache."""
    try:
        import pyarrow
    except ImportError as error:
        raise CacheError(
            f"{path}: latents are kept in Arrow files, and pyarrow is not installed: pip install 'rae[data]'."
        ) from error
    return pyarrow
