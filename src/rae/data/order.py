"""The order of the images: a position in the stream decides image, crop, flip and noise, so nothing random is stored.

A run reads one endless stream. Position p belongs to epoch p // n and is image `permutation(seed, epoch)[p % n]`;
batches span epochs and nothing is dropped. Every draw that concerns position p is a function of (seed, p): a resumed
run needs its number of images seen and nothing else, and neither the batch size nor the number of processes changes
what is drawn for an image.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

_ORDER, _CROP, _FLIP, _NOISE, _AUGMENT = range(5)  # independent families of draws under one seed


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Permutation of range(n): ranks of the raw 64-bit output of PCG64, which NumPy promises never to change."""
    bits = np.random.PCG64(np.random.SeedSequence((_ORDER, seed, epoch))).random_raw(n)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False  # the cache hands out one array
    return order


def image_index(position: int, n: int, seed: int) -> int:
    """Index in [0, n) of the image at `position` of the stream."""
    epoch, within = divmod(position, n)
    return int(epoch_order(seed, epoch, n)[within])


def crop_draws(position: int, seed: int) -> np.ndarray:
    """Two draws from U[0, 1) that place the crop of one position: row, column."""
    return np.random.default_rng((_CROP, seed, position)).random(2)


def mirrored(position: int, seed: int) -> bool:
    """Whether the image at `position` is mirrored, where the run mirrors images at all: every second one, at random."""
    return bool(np.random.default_rng((_FLIP, seed, position)).random() < 0.5)


def noise_draws(
    positions: Sequence[int], seed: int, shape: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise of a training step, each position of the stream from its own generator.

    Args:
        positions: B positions of the stream.
        seed: of the run.
        shape: of one image's normal noise.
        device: where the normals are drawn, which a CPU would take longer to than a GPU takes to train. They are a
            function of (seed, position) on devices of one kind: a run that moves to another kind goes on with others.

    Returns:
        Normals [B, *shape] on the device, and uniforms in [0, 1) [B, 2] on the CPU; float32.
    """
    normals = torch.empty(len(positions), *shape, device=device)
    uniforms = torch.empty(len(positions), 2)
    for row, position in enumerate(positions):
        (key,) = np.random.SeedSequence((_NOISE, seed, position)).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(key))
        normals[row].normal_(generator=generator)
        if normals.device != uniforms.device:  # what is made of uniforms must not make the CPU wait for the device
            generator = torch.Generator().manual_seed(int(key))
        uniforms[row].uniform_(generator=generator)
    return normals, uniforms


def augmentation_draws(positions: Sequence[int], seed: int, use: int) -> torch.Tensor:
    """Seven draws from U[0,1) for each position, float32 [7,B]; another `use` has others."""
    draws = [np.random.default_rng((_AUGMENT, seed, p, use)).random(7, dtype=np.float32) for p in positions]
    return torch.from_numpy(np.stack(draws, axis=1))


def batch_positions(seen: int, total: int, batch: int, *, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Positions that process `rank` of `world` takes of each coming batch: contiguous slices of the global batch.

    Args:
        seen: images already seen, where the next batch starts.
        total: where the stream ends, a whole number of batches.
        batch: images in the global batch, divisible by `world`.
    """
    local = batch // world
    for start in range(seen + rank * local, total, batch):
        yield range(start, start + local)
