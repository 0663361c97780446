"""Images in Parquet and Arrow files, in folders of `Dataset.save_to_disk`, and in data sets of the Hugging Face hub.

Hugging Face `datasets` reads them all; it is imported when one is opened. Rows are Arrow's, mapped from the disk, so
any of them can be read at any time; Parquet is converted to Arrow once, into the cache of `datasets`.
"""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rae.data.image_set import NO_CLASSES, SKIP, ImageError, Images, digest, read_image

HUB = re.compile(r"hf(-stream)?:(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[^:@]+))?(@(?P<split>[^@]+))?")
LABEL = "label"  # what a column of classes that does not say so by its type is mostly called
IMAGE_TYPES = "images are of type Image, or the bytes of files (binary, or a struct with bytes)."
ROOM = "Rows are copied into the cache of datasets: HF_DATASETS_CACHE names a place with room for them."
REACH = (
    "Check owner, name, configuration and split; `hf auth login` opens those behind a licence; HF_ENDPOINT names a "
    "mirror that can be reached, HF_HOME a cache that has it."
)
WHOLE, SAVED = "Copy it again, whole.", "Save it again, or copy it whole."
SAMPLED = 64  # rows whose content the identity covers; of the others it knows the size


def is_saved_dataset(source: str) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any(os.path.isfile(f"{source}/{name}") for name in ("state.json", "dataset_dict.json"))


def open_saved(folder: str, image: str | None, label: str | None) -> Images:
    """A folder of `Dataset.save_to_disk`; `image` and `label` as in `open_images`."""
    datasets = import_datasets(folder)
    if os.path.isfile(f"{folder}/dataset_dict.json"):
        parts = sorted(path.name for path in Path(folder).iterdir() if is_saved_dataset(str(path)))
        raise ImageError(f"{folder} holds {len(parts)} parts ({', '.join(parts)}): write which, {folder}/{parts[0]}.")
    table = attempt(folder, SAVED, datasets.load_from_disk, folder)
    return _images(table, [f"{folder} row {row}" for row in range(len(table))], folder, image, label)


def column_names(source: str, files: Sequence[Path]) -> list[str] | None:
    """Columns of a table, of which no row is read; None = `open_saved` will tell what is wrong.

    Args:
        source: a folder of `Dataset.save_to_disk`, where there are no files; or what to call them.
        files: Parquet or Arrow files, of which the first one is looked at.
    """
    datasets = import_datasets(source)
    if not files:
        found = attempt(source, SAVED, datasets.load_from_disk, source)
        return list(found.features) if isinstance(found, datasets.Dataset) else None
    if files[0].suffix == ".arrow":
        return list(attempt(files[0], WHOLE, datasets.Dataset.from_file, str(files[0])).features)
    return list(attempt(files[0], WHOLE, _parquet_shape, files[0])[1])


def open_tables(files: Sequence[Path], image: str | None, label: str | None) -> Images:
    """Parquet or Arrow files, one after the other; `image` and `label` as in `open_images`."""
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    datasets = import_datasets(where)
    if files[0].suffix == ".arrow":
        parts = [attempt(file, WHOLE, datasets.Dataset.from_file, str(file)) for file in files]
        shapes = [(len(part), part.features) for part in parts]
        load = functools.partial(datasets.concatenate_datasets, parts)
    else:
        shapes = [attempt(file, WHOLE, _parquet_shape, file) for file in files]
        names = [glob.escape(os.path.abspath(file)) for file in files]
        load = functools.partial(datasets.load_dataset, "parquet", data_files=names, split="train")
    for file, (_, features) in zip(files, shapes):
        check_same_columns(files[0], shapes[0][1], file, features)
    rows = [f"{file} row {row}" for file, (count, _) in zip(files, shapes) for row in range(count)]
    if not rows:
        raise ImageError(f"{where} has no rows.")
    table = attempt(where, f"{WHOLE} {ROOM}", load)
    return _images(table, rows, where, image, label)


def open_hub(source: str, image: str | None, label: str | None) -> Images:
    """A data set of the hub, downloaded once into the cache of `datasets`.

    Args:
        source: "hf:owner/name", then ":config" where it has several, then "@split" (default: train), which may be a
            part (`@train[:1000]`) or a sum (`@train+test`).
        image, label: as in `open_images`.
    """
    name, config, split = named_on_hub(source)
    datasets = import_datasets(source)
    remedy = f"{REACH} {ROOM} Or save_to_disk(folder) it elsewhere, and give that folder."
    table = attempt(source, remedy, datasets.load_dataset, name, config, split=split)
    return _images(table, [f"{source} row {row}" for row in range(len(table))], source, image, label)


def named_on_hub(source: str) -> tuple[str, str | None, str]:
    """(owner/name, configuration, split) of "hf:..." or "hf-stream:..."."""
    named, kind = HUB.fullmatch(source), source.partition(":")[0]
    if not named:
        raise ImageError(
            f"{source} names no data set of the hub: write {kind}:owner/name, and where it has several of them the "
            f"configuration and the split: {kind}:owner/name:config@split."
        )
    if os.path.exists(named["id"]):  # which `datasets` would read in place of the hub's
        raise ImageError(
            f"{source} means a data set of the hub, and there is {named['id']} here: write ./{named['id']}."
        )
    return named["id"], named["config"], named["split"] or "train"


def _images(table: Any, names: list[str], where: str, image: str | None, label: str | None) -> Images:
    if not len(table):
        raise ImageError(f"{where} has no rows.")
    pixels = _undecoded(table, image_column(table.features, where, image))
    labels, class_names = [0] * len(table), None
    if column := label_column(table.features, where, label):
        values = table.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
        labels, class_names = classes(values, table.features[column], names, where, column)
    sizes = [size if size is not None else _outside(pixels[i]) for i, size in enumerate(_sizes(pixels))]
    sampled = [_content(pixels[i]) for i in range(0, len(pixels), -(-len(pixels) // SAMPLED))]
    rows = [f"{size} {number}" for size, number in zip(sizes, labels)]
    identity = digest([*rows, *sampled, *(class_names or [])])
    return Images(names, labels, class_names, identity, functools.partial(read_row, pixels, names))


def _undecoded(table: Any, column: str) -> Any:
    """The table with the column of images alone, as what is in the files."""
    import datasets

    is_image = isinstance(table.features[column], datasets.Image)
    table = table.select_columns([column])
    return table.cast_column(column, datasets.Image(decode=False)) if is_image else table


# --- columns ---------------------------------------------------------------------------------------------------------


def image_column(features: Mapping[str, Any], where: str, name: str | None) -> str:
    """Which column holds the images: the one that is named; else the only one of type Image, or else of bytes."""
    import datasets

    typed = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    of_bytes = [column for column, kind in features.items() if _holds_bytes(kind)]
    if name is None:
        if len(found := typed or of_bytes) != 1:
            remedy = "name the one with --image, in a recipe data.image." if found else IMAGE_TYPES
            raise ImageError(
                f"{where} has {len(found)} columns of {'type Image' if typed else 'images'}{_listed(found)}, of the "
                f"columns {', '.join(features)}: {remedy}"
            )
        return found[0]
    kind = _feature(features, where, "image", name)
    if name not in (*typed, *of_bytes):
        raise ImageError(
            f"--image {name} (in a recipe data.image={name}): this column of {where} is {kind}; {IMAGE_TYPES}"
        )
    return name


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds the content of files: bytes, or a struct with `bytes`."""
    holder = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(holder, "dtype", None) in ("binary", "large_binary")


def label_column(features: Mapping[str, Any], where: str, name: str | None) -> str | None:
    """Which column holds the classes; None = they are to be left alone, or there are none."""
    import datasets

    if name == "":
        return None
    if name is None:
        found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if len(found) > 1:
            raise ImageError(
                f"{where} has {len(found)} columns of classes{_listed(found)}: name one with --label, in a "
                f"recipe data.label, {NO_CLASSES}"
            )
        if not found and LABEL not in features:
            return None
        name = found[0] if found else LABEL
    _feature(features, where, "label", name)
    return name


def classes(
    values: list[Any], kind: Any, names: Sequence[str], where: str, column: str
) -> tuple[list[int], list[str] | None]:
    """What is in a column of classes -> labels of all rows and the classes' names.

    Args:
        values: of the rows.
        kind: the column's type.
        names: what to call the rows in an error.
        where, column: what to call table and column.
    """
    import datasets

    if isinstance(kind, datasets.ClassLabel) and set(values) == {-1}:
        return [0] * len(values), None  # how the hub marks a test set whose classes are kept secret
    dtype = getattr(kind, "dtype", "")
    if not isinstance(dtype, str) or not re.fullmatch(r"u?int\d+|(large_)?string", dtype):
        raise ImageError(
            f"{where}: the column {column} is {kind}; classes are of type ClassLabel, whole numbers or strings. Name "
            f"another with --label, in a recipe data.label, {NO_CLASSES}"
        )
    if None in values:
        row = names[values.index(None)]
        raise ImageError(f"{row}: the label in {column} is None. Give a label to each row, {NO_CLASSES}")
    if dtype.endswith("string"):
        class_names = sorted(set(values))
        numbers = {value: number for number, value in enumerate(class_names)}
        return [numbers[value] for value in values], class_names
    class_names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    most = len(class_names) if class_names else float("inf")
    for row, value in zip(names, values):
        if not 0 <= value < most:
            raise ImageError(
                f"{row}: the label in {column} is {value}, of classes from 0"
                + f" to {most - 1}" * bool(class_names)
                + f". Correct it, {NO_CLASSES}"
            )
    return values, class_names or [str(number) for number in range(max(values) + 1)]


def _feature(features: Mapping[str, Any], where: str, key: str, name: str) -> Any:
    if name not in features:
        raise ImageError(
            f"--{key} {name} (in a recipe data.{key}={name}): {where} has no such column; it has {', '.join(features)}."
        )
    return features[name]


def _listed(found: Sequence[str]) -> str:
    return f" ({', '.join(found)})" if found else ""


# --- rows ------------------------------------------------------------------------------------------------------------


def read_row(pixels: Any, names: Sequence[str], index: int) -> np.ndarray:
    """The image of a row; `pixels[index]` is {column: what the column has of it}."""
    data, path = _parts(pixels[index])
    if data is None and not path:
        raise ImageError(f"{names[index]}: there is no image. Take the row out, {SKIP}")
    if data is None and not os.path.isfile(path):
        raise ImageError(
            f"{names[index]}: its image is not in the table but in {path}, which is not here. Copy it as well, {SKIP}"
        )
    return read_image(path if data is None else data, names[index])


def _parts(row: dict[str, Any]) -> tuple[bytes | None, str | None]:
    """What is in the image's file, and the path of the file where it lies outside the table."""
    (value,) = row.values()
    return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


def _sizes(pixels: Any) -> Iterator[int | None]:
    """Bytes of every image, from Arrow's offsets: no image is read. None = no bytes in the table."""
    import pyarrow
    import pyarrow.compute

    for batch in pixels.with_format("arrow").iter(10_000):
        column = batch.column(0)
        if pyarrow.types.is_struct(column.type):
            column = pyarrow.compute.struct_field(column, "bytes")
        yield from pyarrow.compute.binary_length(column).to_pylist()


def _outside(row: dict[str, Any]) -> int:
    _, path = _parts(row)
    return os.path.getsize(path) if path and os.path.isfile(path) else -1


def _content(row: dict[str, Any]) -> str:
    return hashlib.sha256(_parts(row)[0] or b"").hexdigest()


# --- datasets --------------------------------------------------------------------------------------------------------


def import_datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImageError(f"{where} is read by datasets, which is not installed: pip install 'rae[data]'.") from error
    return datasets


def _parquet_shape(file: Path) -> tuple[int, dict[str, Any]]:
    """Number of rows, and types of the columns."""
    import datasets
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        return opened.metadata.num_rows, datasets.Features.from_arrow_schema(opened.schema_arrow)


def check_same_columns(first: Path | str, wanted: dict[str, Any], file: Path | str, features: dict[str, Any]) -> None:
    """Raise ImageError unless two files have the same columns of the same types."""
    # `datasets` fills missing columns with nothing, and reads one file's class numbers by another's names.
    for name in {**wanted, **features}:
        if wanted.get(name) != features.get(name):
            raise ImageError(
                f"{file} cannot be read together with {first}: its column {name} is {features.get(name)}, that of the "
                f"other {wanted.get(name)}. Name files that belong together."
            )


def attempt(where: str | Path, remedy: str, load: Callable, *arguments: Any, **options: Any) -> Any:
    """What `load` gives; whatever it raises becomes an ImageError that names `where`, the reason and the remedy."""
    try:
        return load(*arguments, **options)
    except Exception as error:  # Arrow's errors, the hub's and its HTTP client's have no common base
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ImageError(f"{where} cannot be read ({reason}). {remedy}") from error
