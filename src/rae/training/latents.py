"""The encoder over a whole data set: exact latent statistics, and latents kept in memory or on the disk."""

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape

from rae import processes
from rae.autoencoder.baselines import Autoencoder
from rae.autoencoder.encoders import Encoder
from rae.autoencoder.latents import LatentStats
from rae.autoencoder.rae import RAE
from rae.config import ConfigError
from rae.data.images import DataConfig, Images, Views, loader, readable, to_unit
from rae.data.latent_cache import Origin, StoredLatents, open_cache
from rae.data.order import image_index, mirrored
from rae.training.display import progress

T = TypeVar("T")
Part = tuple[torch.Tensor, torch.Tensor, list[int]]  # latents [b,C,h,w], labels [b], positions in the stream
Parts = Iterator[Part]  # the micro-batches of one step


@torch.no_grad()
def latent_statistics(
    encode: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, int, int],
    images: Images,
    data: DataConfig,
    size: tuple[int, int],
    *,
    batch: int = 64,
    accelerator: Accelerator | None = None,
    left_out: Callable[[str], object] = lambda _: None,
) -> LatentStats:
    """Exact mean and variance of the latents of every image, centre-cropped and not mirrored.

    Args:
        encode: [0,1] images [B,3,H,W] -> latents [B,C,h,w] before standardisation.
        shape: (C, h, w).
        images, data, size: which images, how they are read, and (H, W) of their crops.
        batch: images at a time; the result does not depend on it (beyond float64 rounding of float32 latents).
        accelerator: shares the images among its processes.
        left_out: is told the name of every image that cannot be read, where `data.on_broken` is "skip"; training lets
            its stream name it.
    """
    accelerator = accelerator or processes.accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    stats, share = LatentStats(shape), range(rank, len(images), world)
    with progress("latent statistics", len(share)) as advance:
        for items in readable(images, data, size, share, batch=batch, left_out=left_out):
            stats.update(encode(to_unit(items["image"].to(accelerator.device))))
            advance(stats.count)
    if world == 1:
        return stats
    total = LatentStats(shape)
    for part in gather_object([stats]):
        total.merge(part)
    return total


class LatentCache(NamedTuple):
    """Latents, or tokens, of a whole data set in memory.

    Attributes:
        latents: [V,n,C,h,w] (tokens: [V,n,N,C]) on the CPU; V = 2 with mirror images as second view; else 1.
        labels: [n].
    """

    latents: torch.Tensor
    labels: torch.Tensor

    def take(self, positions: Sequence[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B,C,h,w] and labels [B] at positions of the training stream."""
        views, n = self.latents.shape[:2]
        index = torch.tensor([image_index(p, n, seed) for p in positions])
        view = torch.tensor([int(views == 2 and mirrored(p, seed)) for p in positions])
        return self.latents[view, index], self.labels[index]


def check_crop(what: Literal["tokens", "latents"], data: DataConfig, kept: str = "memory") -> None:
    """Raise ConfigError unless `what` can be kept in memory, or in the folder `kept`: random crops have no end."""
    if data.crop == "random":
        raise ConfigError(f"{what}: {kept} holds each image once, data.crop: random never ends; set {what}: online.")


def cache_latents(rae: Autoencoder, images: Images, data: DataConfig, *, batch: int = 64) -> LatentCache:
    """Encode every image once, centre-cropped, and mirrored as well if `data.flip`.

    Raises:
        ConfigError: random crops, which have no end; or more latents than the machine has memory.
    """
    return _cache("latents", rae.encode, rae.latent_shape, images, data, rae.image_size, batch, _device(rae))


def cache_tokens(
    encoder: Encoder, images: Images, data: DataConfig, size: tuple[int, int], *, batch: int = 64
) -> LatentCache:
    """Tokens [V,n,N,C] of every image, cropped to `size` and resized to the encoder's if that is another; as above."""
    shape = (encoder.grid[0] * encoder.grid[1], encoder.width)
    encode = functools.partial(encoder, resize=size != encoder.config.image_size)
    return _cache("tokens", encode, shape, images, data, size, batch, next(encoder.parameters()).device)


@torch.no_grad()
def _cache(
    what: Literal["tokens", "latents"],
    encode: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    images: Images,
    data: DataConfig,
    size: tuple[int, int],
    batch: int,
    device: torch.device,
) -> LatentCache:
    check_crop(what, data)
    shape = (1 + data.flip, len(images), *shape)
    needed, memory = 4 * math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (sharing := processes.on_this_machine()) * needed > 0.8 * memory:
        raise ConfigError(
            f"{what}: memory needs {needed / 2**30:.1f} GiB for {len(images):,} images in each of {sharing} processes, "
            f"this machine has {memory / 2**30:.1f} GiB; set {what}: online."
        )
    cache = LatentCache(torch.empty(shape), torch.empty(len(images), dtype=torch.int64))
    chunks, broken = [range(start, min(start + batch, len(images))) for start in range(0, len(images), batch)], []
    with progress("encoding", len(images)) as advance:
        for chunk, items in zip(chunks, loader(Views(images, data, size), chunks, data)):
            broken += [images.names[i] for i, read in zip(chunk, items["index"].tolist()) if i != read]
            x = to_unit(items["image"].to(device))
            for view in range(shape[0]):
                cache.latents[view, chunk.start : chunk.stop] = encode(x.flip(-1) if view else x).cpu()
            cache.labels[chunk.start : chunk.stop] = items["label"]
            advance(chunk.stop)
    for name in broken:
        Console(stderr=True).print(
            f"[yellow]{escape(name)} cannot be read; the next image takes its place", soft_wrap=True
        )
    return cache


def origin_of(rae: Autoencoder, images: Images, data: DataConfig) -> Origin:
    """What decides the latents of a run or cache."""
    return Origin(
        latents=rae.latent_identity,
        encoder=rae.encoder.checksum() if isinstance(rae, RAE) else rae.latent_identity,
        images=images.identity,
        labels=hashlib.sha256(np.asarray(images.labels, np.int64).tobytes()).hexdigest(),
        image_size=rae.image_size,
        crop=data.crop,
        enlarge=data.enlarge,
    )


def latent_error(exact: torch.Tensor, rounded: torch.Tensor) -> dict[str, float]:
    """`latent_error`: mean e^2 per element, e = rounded - exact; `latent_snr`: mean exact^2 to it, in dB. A cache gives
    the same figures of its own rounding (`CacheConfig`)."""
    signal, error = (x.double().square().mean().item() for x in (exact, rounded - exact))
    return {"latent_error": error, "latent_snr": 10 * math.log10(signal / error)}


def stored_latents(folder: str | Path, rae: Autoencoder, images: Images, data: DataConfig) -> StoredLatents:
    """The latents of a run, from a cache on the disk.

    Raises:
        ConfigError: no such folder; or random crops, which have no end.
        CacheError: there is no cache in it, it is damaged, or it is of another autoencoder or of other images.
    """
    check_crop("latents", data, str(folder))
    if not Path(folder).expanduser().is_dir():
        raise ConfigError(f"latents: {folder} is no folder; there are online, memory and folders of `rae cache`.")
    return open_cache(folder).of_run(origin_of(rae, images, data), data)


def cached_latents(
    cache: LatentCache | StoredLatents, batches: Iterable[range], seed: int, micro_batch: int, device: torch.device
) -> Iterator[Parts]:
    """For each batch of stream positions: its parts of at most `micro_batch` latents, each taken from the cache while
    the one before it is in use; all of them are to be used up. The same images and mirror images as `online_latents`.
    """
    steps = ([batch[start : start + micro_batch] for start in range(0, len(batch), micro_batch)] for batch in batches)
    steps, ahead = itertools.tee(steps)
    taken = _ahead(functools.partial(cache.take, seed=seed), itertools.chain.from_iterable(ahead))
    for parts in steps:
        yield ((latents.to(device), labels.to(device), list(part)) for part, (latents, labels) in zip(parts, taken))


def _ahead(take: Callable[[range], T], parts: Iterable[range]) -> Iterator[T]:
    """`take` of each part; a thread takes the next one while this one is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for part in parts:
            now, coming = coming, thread.submit(take, part)
            if now is not None:
                yield now.result()
        if coming is not None:
            yield coming.result()


def online_latents(rae: Autoencoder, batches: Iterable[dict[str, torch.Tensor]], micro_batch: int) -> Iterator[Parts]:
    """For each batch of a `Stream`: its parts of at most `micro_batch` images, encoded when they are asked for."""
    for batch in batches:
        columns = (batch[name].split(micro_batch) for name in ("image", "label", "position"))
        yield (_encode(rae, *part) for part in zip(*columns))


def _encode(rae: Autoencoder, image: torch.Tensor, label: torch.Tensor, position: torch.Tensor) -> Part:
    device = _device(rae)
    return rae.encode(to_unit(image.to(device))), label.to(device), position.tolist()


def _device(rae: Autoencoder) -> torch.device:
    return next(rae.decoder.parameters()).device
