"""Of which of the sources that are compared --image and --label are: of those that have what they name."""

import itertools
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rae.commands.look import say
from rae.config import ConfigError
from rae.data.folders import find_data_files
from rae.data.images import DataConfig, has_columns
from rae.data.npz import UNREADABLE
from rae.data.shards import MEMBER
from rae.data.tables import column_names, is_saved_dataset
from rae.evaluation.reference import is_adm_reference

LABELS_OF_SHARDS = ["cls"]
REMEDY = {
    "image": "name another one, or leave it out",
    "label": "name another one, leave it out, or leave classes alone with --label ''",
}


def read_sides(data: DataConfig, sources: Sequence[str]) -> list[DataConfig]:
    """How each source is read: by the columns that are named where it has them, elsewhere by those that it has itself.

    Args:
        data: with the names.
        sources: one, or two that are compared.

    Raises:
        ConfigError: a name that none of them has.
    """
    found = [data] * len(sources)
    for option in ("image", "label"):
        if not (name := getattr(data, option)):
            continue
        named = [_names(source, option) for source in sources]
        has = [names is None or _has(names, name) for names in named]
        if not any(has):
            told = [f"{each} ({', '.join(names) or 'no columns'})" for each, names in zip(sources, named)]
            none = f"{told[0]} has none of it" if len(told) == 1 else f"neither {' nor '.join(told)} has it"
            raise ConfigError(f"--{option} {name} names a column, and {none}: {REMEDY[option]}.")
        for i, source in enumerate(sources):
            if not has[i]:
                found[i] = found[i].model_copy(update={option: None})
                if named[i]:
                    say(f"note: {source} has no {name} (--{option}), only {', '.join(named[i])}: its default is taken")
    return found


def _has(names: Sequence[str], name: str) -> bool:
    return name in names or name.lower().removeprefix(".") in names  # as endings in shards are written


def _names(source: str, option: str) -> list[str] | None:
    """What an option can name in a source: nothing in a folder of images; None = only opening it will tell."""
    if not has_columns(source) or is_adm_reference(Path(source).expanduser()):
        return []
    if source.startswith(("hf:", "hf-stream:")):
        return None
    files = [] if is_saved_dataset(source) else find_data_files(source)
    if not files or files[0].suffix not in (".npz", ".tar"):
        return column_names(source, files)
    try:
        if files[0].suffix == ".npz":
            with zipfile.ZipFile(files[0]) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        return LABELS_OF_SHARDS if option == "label" else _endings(files[0])
    except (*UNREADABLE, tarfile.TarError):
        return None


def _endings(file: Path) -> list[str]:
    """Those of the first sample of a shard."""
    with tarfile.open(file, "r:") as tar:
        parts = (found for entry in tar if entry.isreg() and (found := MEMBER.fullmatch(entry.name)))
        _, first = next(itertools.groupby(parts, lambda found: found[1]), (None, []))
        return [found[2].lower() for found in first]
