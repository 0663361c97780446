"""`rae cache`: the latents of every image, once, into a folder that training reads.

images --Views--> [0,1] images --RAE.encode--> latents --store--> shards/00000.arrow, ... --> cache.json

    partial.json          the settings, while shards are missing
    shards/00000.json     of a shard that is written: its checksum and its part of the measured error
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from rae.autoencoder.baselines import Autoencoder, open_autoencoder
from rae.config import C, ConfigError, read_json
from rae.data.images import DataConfig, Views, loader, open_split, to_unit
from rae.data.latent_format import (
    CacheConfig,
    CacheError,
    CacheSettings,
    Dtype,
    Shard,
    conclude,
    differences,
    empty_rows,
    fill,
    find_damage,
    import_pyarrow,
    map_shard,
    shard_bytes,
    shard_path,
    shard_rows,
    store,
    write_shard,
)
from rae.folders import aside, check_outside, locked, sha256
from rae.processes import process_state
from rae.training.display import progress
from rae.training.latents import check_crop, origin_of


@torch.no_grad()
def write_cache(
    model: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    dtype: Dtype = "fp16",
    batch: int = 32,
    verify: bool = False,
) -> Path:
    """`rae cache`: encode the training images of `data`, centre-cropped, and mirrored as well where `data.flip`.

    The same command goes on where it was interrupted, writes what is missing, damaged or of another size in a finished
    cache anew, and ends in the same bits. Processes that were started together share the shards.

    Args:
        model: autoencoder (folder, run or hub id).
        data: which images, and how they are read; without those of `data.held_out`.
        out: folder; made if it does not exist.
        dtype: of the numbers stored; see `store`.
        batch: images that are encoded at a time.
        verify: take the SHA-256 of the shards that are there, and write damaged ones anew. The first process does it,
            for some minutes with a large cache, while the others wait.

    Returns:
        The folder.

    Raises:
        ConfigError: random crops.
        ImageError: an image that cannot be read, unless `data.on_broken` is "skip": the next one takes its place.
        CacheError: the folder holds something else, or a cache of other settings; it is in use; the disk has too little
            room; pyarrow is not installed; or latents do not fit the type.
        ValueError: `out` is inside a folder of images that is read.
    """
    out = Path(out)
    for source in (data.source, data.held_out):
        if isinstance(source, str):
            check_outside(out, source)
    import_pyarrow(out)
    check_crop("latents", data, str(out))
    state, (images, _) = process_state(), open_split(data)
    rae = open_autoencoder(model).to(state.device)
    settings = CacheSettings(
        autoencoder=str(model),
        class_names=images.class_names,
        origin=origin_of(rae, images, data),
        dtype=dtype,
        flip=data.flip,
        shape=rae.latent_shape,
        count=len(images),
        shard_rows=shard_rows(rae.latent_shape, dtype, data.flip),
    )
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(_claim(out))
            _begin(out, settings, verify)
        state.wait_for_everyone()
        if not (out / "cache.json").exists():
            mine = range(state.process_index, len(settings.spans), state.num_processes)
            missing = [number for number in mine if not _record(out, number).exists()]
            _write_shards(missing, rae, Views(images, data, rae.image_size), settings, out, batch)
        state.wait_for_everyone()
        if state.is_main_process:
            _print(_finish(out, settings), out)
        state.wait_for_everyone()
    return out


def _write_shards(
    numbers: list[int], rae: Autoencoder, crops: Views, settings: CacheSettings, out: Path, batch: int
) -> None:
    """Encode and write these shards, each whole or not at all."""
    names, device = crops.images.names, next(rae.decoder.parameters()).device
    every = settings.spans
    spans = [every[number] for number in numbers]
    chunks = [[span[start : start + batch] for start in range(0, len(span), batch)] for span in spans]
    batches = loader(crops, [chunk for of_span in chunks for chunk in of_span], crops.config)
    with progress("encoding", sum(map(len, spans))) as advance:
        done = 0
        for number, span, of_span in zip(numbers, spans, chunks):
            columns, signal, error, unreadable = empty_rows(settings, len(span)), 0.0, 0.0, []
            for chunk, items in zip(of_span, batches):
                rows = slice(chunk.start - span.start, chunk.stop - span.start)
                columns["label"][rows] = items["label"]
                unreadable += [names[i] for i, read in zip(chunk, items["index"].tolist()) if i != read]
                x = to_unit(items["image"].to(device))
                for view in settings.views:
                    z = rae.encode(x.flip(-1) if view == "mirrored" else x)
                    stored = store(z, settings.dtype)
                    lost = (stored.to(z.device) - z).square().flatten(1).mean(1)
                    _check_finite(lost, z, [names[i] for i in chunk], settings.dtype)
                    signal += z.square().flatten(1).mean(1).double().sum().item()
                    error += lost.double().sum().item()
                    fill(columns, view, rows, stored)
                done += len(chunk)
                advance(done)
            with aside(shard_path(out, number), durable=True) as hidden:
                write_shard(hidden, settings, columns)
                size, checksum = hidden.stat().st_size, sha256(hidden)
            shard = Shard(bytes=size, sha256=checksum, signal=signal, error=error, unreadable=unreadable)
            _write(_record(out, number), shard)


def _check_finite(lost: torch.Tensor, z: torch.Tensor, names: list[str], dtype: Dtype) -> None:
    for name, finite, largest in zip(names, lost.isfinite().tolist(), z.abs().amax((1, 2, 3)).tolist()):
        if not finite:
            raise CacheError(
                f"{name}: its latents, up to {largest:.4g}, cannot be stored as {dtype}"
                + ("; bf16 has the range of float32." if dtype == "fp16" else ".")
            )


# --- the folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Make and lock the folder, a new one or one of a cache."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder} is a file; give a folder.")
    is_cache = any((folder / name).is_file() for name in ("partial.json", "cache.json"))
    if not is_cache and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise CacheError(f"{folder} is not empty, and no latent cache; give a new folder.")
    with locked(folder, CacheError(f"another process is writing {folder}; wait for it, or give another folder.")):
        yield


def _begin(folder: Path, settings: CacheSettings, verify: bool) -> None:
    """Refuse a cache of other settings; forget shards that are gone or damaged; see that there is room for the rest.

    Afterwards a shard that is not to be written has a record, or there is a whole cache.json.
    """
    whole, spans = _read(CacheConfig, folder / "cache.json"), settings.spans
    begun = whole or _read(CacheSettings, folder / "partial.json")
    if begun is None:
        _check_shards(folder, settings)
    elif different := differences(begun.deciding(), settings.deciding()):
        raise CacheError(
            f"{folder} was begun with other settings:\n{different}\nAsk for the same, or give another folder."
        )
    records = {n: record for n in range(len(spans)) if (record := _read(Shard, _record(folder, n)))}
    shards = dict(enumerate(whole.shards)) | records if whole else records
    show = progress("checking", settings.count) if verify else contextlib.nullcontext(lambda _: None)
    with show as advance:
        for n in list(shards):
            if damage := find_damage(shard_path(folder, n), shards[n], verify=verify):
                Console(stderr=True).print(Text(f"{damage}; it is written anew", "yellow"), soft_wrap=True)
                del shards[n]
            advance(spans[n].stop)
    for n in set(range(len(spans))) - shards.keys():
        _record(folder, n).unlink(missing_ok=True)
    if whole and len(shards) == len(spans):
        return
    needed = sum(shard_bytes(settings, len(span)) for n, span in enumerate(spans) if n not in shards)
    if needed > (free := shutil.disk_usage(folder).free):
        raise CacheError(
            f"{folder} needs {decimal(needed)} for {len(spans) - len(shards):,} shards of {settings.dtype}, "
            f"{decimal(free)} are free: make room, give a folder elsewhere, or take a smaller type (int8)."
        )
    (folder / "shards").mkdir(exist_ok=True)
    for hidden in (folder / "shards").glob(".*"):
        hidden.unlink()  # of a writer that was killed
    if whole:
        for n, shard in shards.items():
            _write(_record(folder, n), shard)
    _write(folder / "partial.json", settings)
    (folder / "cache.json").unlink(missing_ok=True)


def _check_shards(folder: Path, settings: CacheSettings) -> None:
    """In the place of settings that are damaged, or not there: every shard that is there must be of these ones."""
    for number, span in enumerate(settings.spans):
        if (path := shard_path(folder, number)).is_file():
            remedy = (
                f"The settings that {folder} was written with cannot be read: ask for the same, or give another folder."
                " If it is the shard that is damaged, remove it, and the same command writes it anew."
            )
            map_shard(path, settings, len(span), remedy)


def _finish(folder: Path, settings: CacheSettings) -> CacheConfig:
    """Write cache.json, unless it is there."""
    if not (folder / "cache.json").is_file():
        shards = [read_json(Shard, _record(folder, n)) for n in range(len(settings.spans))]
        _write(folder / "cache.json", conclude(settings, shards))
    (folder / "partial.json").unlink(missing_ok=True)
    return read_json(CacheConfig, folder / "cache.json")


def _read(schema: type[C], path: Path) -> C | None:
    """What the file says; None where it is not there, or is damaged, which is said."""
    if not path.is_file():
        return None
    try:
        return read_json(schema, path)
    except ConfigError as error:
        Console(stderr=True).print(Text(f"{error}\nThe command goes on without it.", "yellow"), soft_wrap=True)
        return None


def _record(folder: Path, number: int) -> Path:
    return shard_path(folder, number).with_suffix(".json")


def _write(path: Path, config: Shard | CacheSettings) -> None:
    with aside(path, durable=True) as hidden:
        hidden.write_text(config.model_dump_json(indent=1) + "\n")


def _print(config: CacheConfig, folder: Path) -> None:
    for name in (name for shard in config.shards for name in shard.unreadable):
        text = Text(f"{name} cannot be read; the next image takes its place", "yellow")
        Console(stderr=True).print(text, soft_wrap=True)
    size = decimal(sum(shard.bytes for shard in config.shards))
    exact = config.snr is None
    rows = {
        "images": f"{config.count:,}" + ", and mirrored" * config.flip,
        "latents (C, h, w)": str(config.shape),
        "stored as": f"{config.dtype}, {size}, shards: {len(config.shards):,}",
        "signal to error": "nothing lost" if exact else f"{config.snr:.1f} dB",
        "added to the loss": "nothing" if exact else f"{config.error:.2g} per element",
        "written": Text(str(folder)),
    }
    table = Table(show_header=False)
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)
