"""Latents a second read at random from a cache on the disk, beside a plain copy of the same bytes in memory.

    python benchmarks/latent_cache.py [--folder FOLDER] [--threads 1 2] [--cold]

Caches of normal latents of [768,16,16] (DINOv2-B at 256 px) are written into a new folder, 0.4 GB at a time at most,
and removed. Rows are random, batches of 64:

    copy      rows of an array in memory -> one and the same batch in memory
    copy new  the same into new memory every time, which the system has to find and clear
    gather    `StoredLatents.gather` from the page cache: into new memory, too (with a GPU: pinned, and used again)
    take      finds out besides what is at positions of the training stream; what training calls
    float32   `take`, and the numbers in float32 on the CPU, which a GPU does by itself
    disk      --cold: gather after the system has forgotten the files, no row twice

Ways are interleaved and each figure is that of its fastest batch, since other work on the machine can only slow one
down. Several threads stand for the processes of a machine with several GPUs: each makes batches, and the rates add up.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rae.data.latent_cache import StoredLatents, open_cache
from rae.data.latent_format import (
    CacheSettings,
    Origin,
    Shard,
    conclude,
    empty_rows,
    fill,
    shard_path,
    shard_rows,
    store,
    write_shard,
)
from rae.folders import sha256

SHAPE, BATCH, WANTED = (768, 16, 16), 64, 20_000


def write(folder: Path, dtype: str, images: int) -> StoredLatents:
    """A cache of normal latents, the same 64 again and again at shifted places."""
    origin = Origin(latents="", encoder="", images="", labels="", image_size=(256, 256), crop="center", enlarge=False)
    settings = CacheSettings(
        autoencoder="",
        class_names=None,
        origin=origin,
        dtype=dtype,
        flip=False,
        shape=SHAPE,
        count=images,
        shard_rows=shard_rows(SHAPE, dtype, False),
    )
    (folder / "shards").mkdir(parents=True)
    z, shards = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0)), []
    for number, span in enumerate(settings.spans):
        columns = empty_rows(settings, len(span))
        columns["label"].zero_()
        for start in range(0, len(span), BATCH):
            rows = slice(start, min(start + BATCH, len(span)))
            fill(columns, "latent", rows, store(z.roll(start + span.start, 0)[: rows.stop - start], dtype))
        path = shard_path(folder, number)
        write_shard(path, settings, columns)
        os.sync()
        size, checksum = path.stat().st_size, sha256(path)
        shards.append(Shard(bytes=size, sha256=checksum, signal=1, error=1, unreadable=[]))
    (folder / "cache.json").write_text(conclude(settings, shards).model_dump_json())
    return open_cache(folder)


def in_memory(cache: StoredLatents) -> np.ndarray:
    """The stored latents in ordinary memory, [n,C,h,w]."""
    return np.concatenate([shard["latent"] for shard in cache.columns])


def seconds(work: Callable[[int], object], threads: int, first: int) -> float:
    """Time of one batch for each thread at once."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: time.sleep(0.001), range(threads)))  # they are there
        start = time.perf_counter()
        list(pool.map(work, range(first, first + threads)))
        return time.perf_counter() - start


def warm(cache: StoredLatents, threads: int, repeats: int) -> dict[str, float]:
    """Batches a second of all threads together, by what is done."""
    source, n = in_memory(cache), len(cache)
    targets = [np.empty((BATCH, *SHAPE), source.dtype) for _ in range(threads)]
    order = np.random.default_rng(0)

    def picks() -> list[np.ndarray]:
        return [order.permutation(n)[:BATCH] for _ in range(threads)]

    def copy(job: int) -> None:
        for target, row in zip(targets[job % threads], chosen[job % threads]):
            target[...] = source[row]

    def copy_new(job: int) -> None:
        target = np.empty((BATCH, *SHAPE), source.dtype)
        for place, row in zip(target, chosen[job % threads]):
            place[...] = source[row]

    def gather(job: int) -> None:
        cache.gather(chosen[job % threads].tolist(), [False] * BATCH)

    def take(job: int) -> None:
        cache.take(range(job * BATCH, (job + 1) * BATCH), 0)

    def as_float(job: int) -> None:
        cache.take(range(job * BATCH, (job + 1) * BATCH), 0)[0].to("cpu")

    ways = {"copy": copy, "copy new": copy_new, "gather": gather, "take": take, "float32": as_float}
    times = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, work in ways.items():
            chosen = picks()
            spent = seconds(work, threads, repeat * threads)
            if repeat:  # the first round maps the files
                times[name].append(spent)
    return {name: threads / min(spent) for name, spent in times.items()}


def cold(folder: Path) -> float:
    """Latents a second from the disk."""
    for path in folder.glob("shards/*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cache = open_cache(folder)
    rows = np.random.default_rng(1).permutation(len(cache)).reshape(-1, BATCH)
    start = time.perf_counter()
    for row in rows:
        cache.gather(row.tolist(), [False] * BATCH)
    return rows.size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write  [the system's folder for temporary files]")
    parser.add_argument("--images", type=int, default=1024, help="of each type  [1024]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cold", action="store_true", help="what the disk gives, as well")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    title = f"latents of {SHAPE} a second, batches of {BATCH} of {arguments.images}; {WANTED:,} are wanted"
    table = Table(title=title)
    columns = ("copy", "copy new", "gather", "take", "float32")
    for header in ("type", "threads", *columns, "GB/s", "gather / copy", "/ copy new", "disk"):
        table.add_column(header, justify="left" if header == "type" else "right")
    root = Path(tempfile.mkdtemp(prefix="latent-cache-", dir=arguments.folder))
    try:
        for dtype in ("fp16", "bf16", "int8"):
            cache = write(root / dtype, dtype, arguments.images)
            size = cache.row("latent", 0).nbytes
            for threads in arguments.threads:
                rates = {name: BATCH * rate for name, rate in warm(cache, threads, arguments.repeats).items()}
                shown = [f"{rates[name]:,.0f}" for name in columns] + [f"{rates['gather'] * size / 1e9:.1f}"]
                shown += [f"{rates['gather'] / rates[name]:.2f}" for name in ("copy", "copy new")]
                table.add_row(dtype, str(threads), *shown, "")
            del cache  # pages that are mapped are not forgotten
            if arguments.cold:
                table.add_row(dtype, "1", *[""] * 8, f"{cold(root / dtype):,.0f}")
            shutil.rmtree(root / dtype)
    finally:
        shutil.rmtree(root)
    console.print(table)


if __name__ == "__main__":
    main()
