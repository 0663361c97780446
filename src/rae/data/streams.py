"""Data sets of the hub whose rows are fetched when they are first asked for: Parquet files, by ranges of their bytes.

hub --footers, labels--> Images        a row --its group, fetched and kept in $RAE_CACHE/streams--> image

Parquet holds rows in groups, each of which can be fetched by itself. A group is fetched once, by whichever process asks
first, and kept. So any row can be read at any time, and whatever is computed is what the downloaded set would give.
"""

import fcntl
import functools
import itertools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from rae.data.image_set import ImageError, Images, digest
from rae.data.tables import (
    REACH,
    attempt,
    check_same_columns,
    classes,
    image_column,
    import_datasets,
    label_column,
    named_on_hub,
    read_row,
)
from rae.sources import cache_folder

AT_ONCE = 16  # files that are looked into, for what all of them hold
MAPPED = 64  # groups that a process keeps mapped


class StreamError(RuntimeError):
    """Rows that could not be fetched: no fault of an image, so none is skipped for it."""


class Group(NamedTuple):
    """Rows of a Parquet file that are fetched together.

    Attributes:
        url: of the file, with the commit that it is of.
        number: of the group in its file.
        column: the one that is fetched.
        rows: how many.
        compressed, bytes: of the column, in the file and out of it.
    """

    url: str
    number: int
    column: str
    rows: int
    compressed: int
    bytes: int


def open_stream(source: str, image: str | None, label: str | None) -> Images:
    """A data set of the hub, of which nothing is downloaded yet but the labels.

    Args:
        source: "hf-stream:owner/name", then ":config" where it has several, then "@split" (default: train), which may
            be a part (`@train[:10000]`).
        image, label: as in `open_images`.

    Raises:
        ImageError: not on the hub, not of Parquet files, or without images that could be used.
        StreamError: the disk has no room for it.
    """
    name, config, split = named_on_hub(source)
    import_datasets(source)
    urls, features = attempt(source, REACH, _files, source, name, config, split.partition("[")[0])
    found = _of_all(urls, functools.partial(attempt, source, REACH, _features))
    for url, columns in zip(urls, found):
        check_same_columns(urls[0], found[0], url, columns)
    features = features or found[0]
    column = image_column(features, source, image)
    groups = [group for url in urls for group in _groups(url, column)]
    part = attempt(source, REACH, _part, split, sum(group.rows for group in groups))
    names = [f"{source} row {row}" for row in part]
    if not names:
        raise ImageError(f"{source} has no rows.")
    rows = _Rows(groups, part)
    _check_room(source, rows.groups)
    labels, class_names = [0] * len(part), None
    if by := label_column(features, source, label):
        files = list(dict.fromkeys(group.url for group in rows.groups))
        before = sum(group.rows for group in itertools.takewhile(lambda group: group.url != files[0], groups))
        tables = _of_all(files, functools.partial(_labels, by))
        values = [value for table in tables for value in table.column(0).to_pylist()]
        values = values[part.start - before : part.stop - before]
        labels, class_names = classes(values, features[by], names, source, by)
    sizes = [f"{group.rows} {group.compressed}" for group in rows.groups]
    identity = digest([*sizes, f"{rows.first} {len(part)}", *map(str, labels), *(class_names or [])])
    return Images(names, labels, class_names, identity, functools.partial(read_row, rows, names))


# --- what is on the hub ----------------------------------------------------------------------------------------------


def _files(source: str, name: str, config: str | None, split: str) -> tuple[list[str], dict[str, Any] | None]:
    """The Parquet files of a split, at the commit that the hub has now, and their columns where its card says so."""
    import datasets

    builder = datasets.load_dataset_builder(name, config)
    if builder.name != "parquet":
        raise ValueError(
            f"its files are of the kind {builder.name}, and only parts of Parquet can be fetched; "
            f"download it: hf:{source.partition(':')[2]}"
        )
    files = builder.config.data_files
    if split not in files:
        raise ValueError(f"it has no split {split}, but {', '.join(map(str, files))}")
    return [str(url) for url in files[split]], builder.info.features


def _of_all(urls: list[str], look: Callable[[str], Any]) -> list[Any]:
    """`look` into each file, several at a time."""
    console = Console(stderr=True)
    options = {"console": console, "disable": not console.is_terminal, "transient": True}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(track(threads.map(look, urls), "Look into the files", len(urls), **options))


@functools.lru_cache(None)
def _metadata(url: str) -> Any:
    """Parquet's own: columns, groups and where they are."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(_file(url))


def _features(url: str) -> dict[str, Any]:
    """The types of a file's columns."""
    import datasets

    return datasets.Features.from_arrow_schema(_metadata(url).schema.to_arrow_schema())


def _groups(url: str, column: str) -> list[Group]:
    groups, metadata = [], _metadata(url)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
        sizes = [(chunk.total_compressed_size, chunk.total_uncompressed_size) for chunk in chunks]
        groups.append(Group(url, number, column, group.num_rows, *map(sum, zip(*sizes))))
    return groups


def _part(split: str, rows: int) -> range:
    """`train[10:20]`, `train[:5%]` -> the rows."""
    import datasets

    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: rows})
    return range(part.from_, part.to)


def _check_room(source: str, groups: list[Group]) -> None:
    folder = cache_folder() / "streams"
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(group.bytes for group in groups if not _place(group.url, group.column, group.number).exists())
    if needed > (free := shutil.disk_usage(folder).free):
        raise StreamError(
            f"{source} takes {decimal(needed)} in {folder}, where {decimal(free)} are free: make room, have RAE_CACHE "
            "name a folder elsewhere, or take a part of it (@train[:10000])."
        )


# --- rows ------------------------------------------------------------------------------------------------------------


class _Rows:
    """Row of `part` -> {column: what the column has of it}; a group that is not there is fetched."""

    def __init__(self, groups: list[Group], part: range) -> None:
        ends = np.cumsum([group.rows for group in groups])
        used = slice(np.searchsorted(ends, part.start, "right"), np.searchsorted(ends, part.stop, "left") + 1)
        self.groups = groups[used]
        self.starts = (ends - [group.rows for group in groups])[used]
        self.first = part.start - int(self.starts[0])  # row of the first group
        self.starts -= part.start

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        return _group(self.groups[number]).slice(row - int(self.starts[number]), 1).to_pylist()[0]


@functools.lru_cache(MAPPED)
def _group(group: Group) -> Any:
    """Arrow's table of a group, mapped from the disk."""
    place, what = _place(group.url, group.column, group.number), f"group {group.number} of {group.url}"
    return _kept(place, what, lambda: _parquet(group.url).read_row_group(group.number, columns=[group.column]))


def _labels(column: str, url: str) -> Any:
    """Arrow's table of a whole file's labels."""
    place = _place(url, column, "labels")
    return _kept(place, f"the labels of {url}", lambda: _parquet(url).read(columns=[column]))


def _place(url: str, column: str, what: int | str) -> Path:
    return cache_folder() / f"streams/{digest([url, column])[:32]}/{what}.arrow"


def _kept(path: Path, what: str, fetch: Callable[[], Any]) -> Any:
    """The table at `path`, fetched if it is not there: once, whatever processes ask for it at the same time."""
    import pyarrow

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{path.name}")
        with open(hidden, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # which goes with the process
            if path.exists():  # by the one that had the lock before
                hidden.unlink(missing_ok=True)
            else:
                file.truncate(0)
                _write(file, what, fetch)
                hidden.rename(path)
    try:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise StreamError(f"{path} is damaged ({error}): remove it, it will be fetched again.") from error


def _write(file: Any, what: str, fetch: Callable[[], Any]) -> None:
    import pyarrow

    try:
        table = fetch()
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
    except Exception as error:  # Arrow's errors, the hub's and its HTTP client's have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StreamError(
            f"{what} could not be fetched ({reason}). Run the same command again when the hub can be reached and the "
            "disk has room: it goes on from what is saved."
        ) from error


def _parquet(url: str) -> Any:
    """A Parquet file, of which only what is asked for is fetched."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(_file(url), metadata=_metadata(url), pre_buffer=True)


def _file(url: str) -> Any:
    import fsspec

    files, path = fsspec.url_to_fs(url)
    return files.open(path, cache_type="none")  # no bytes ahead of those that are asked for
