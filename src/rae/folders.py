"""Saved models are folders: written whole or not at all, found by path, run or hub id, loaded only if undamaged.

    config.json      what the model is: its `kind`, its own settings, and in `files` the SHA-256 of each weight file
    *.safetensors    weights, float32

`RAE` and `DiffusionModel` say what is in theirs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.sources import MODEL_REMEDIES, SourceError, fetch_hub, source_of

_MODEL_OF_RUN = re.compile(r"\.|best|latest|(checkpoints|kept)/\d+(/model[^/]*(/.*)?)?")  # as seen from the run


def find_folder(folder_or_hub_id: str | Path, what: str) -> Path:
    """The folder that holds a model: the one given, a checkpoint, a run's newest or best one, or what a hub id names.

    Args:
        folder_or_hub_id: `~` is expanded. A run stands for its newest checkpoint, `run/best` for its best one.
        what: to call the model in an error, with its article.

    Raises:
        ValueError: a file; a run that has saved nothing yet; or one whose `latest` or `best` names no checkpoint of it.
        SourceError: neither an existing folder nor a hub id, or not to be had from the hub; with what the run has that
            it would be in, or the command that makes such a model.
    """
    path = Path(folder_or_hub_id).expanduser()
    if _is_pointer(path):
        return _named_by(path) / "model"
    if path.is_file() or (path.suffix in {".pt", ".pth", ".bin", ".ckpt"} and not path.is_dir()):
        raise ValueError(
            f"{path} is a file; {what} is a folder. Pickles (.pt, .pth, .bin) are not loaded: `rae convert` "
            "makes a folder of one by the authors that you trust."
        )
    try:
        kind, _, name = source_of(folder_or_hub_id).partition(":")
    except SourceError as error:
        raise SourceError(f"{error} {_what_there_is(path, what)}") from error
    if kind == "hub":
        return fetch_hub(name, ["config.json", "*.safetensors", "encoder/*"], MODEL_REMEDIES)
    folder = Path(name)
    if (folder / "manifest.json").is_file():  # one checkpoint of a run
        return folder / "model"
    if (folder / "latest").is_file():
        return find_folder(folder / "latest", what)
    if (folder / "recipe.yaml").is_file():  # a run, killed before its first checkpoint had a pointer
        if not (found := checkpoints(folder)):
            raise ValueError(f"{folder}: this run has saved nothing yet; let it reach its first checkpoint.")
        return found[-1] / "model"
    return folder


def _what_there_is(path: Path, what: str) -> str:
    """In place of a model that is not at `path`."""
    if run := run_of(path):
        there = [str(found.relative_to(run)) for found in (*checkpoints(run), *checkpoints(run, "kept"))]
        return f"The run {run} has {', '.join(there) or 'saved nothing yet'}."
    return f"A run of `rae {'train-decoder' if what == 'an autoencoder' else 'train-dit'}` makes {what}."


def run_of(path: Path) -> Path | None:
    """The folder of the run that `path` is, or is a model of; None if there is none.

    A model is at run/best, run/latest, run/checkpoints/N or run/kept/N, and in the folders `model` of both. A run
    further up has nothing to do with it: recipe.yaml lies in many a folder of projects.
    """
    for place in (path, *path.parents):
        if _MODEL_OF_RUN.fullmatch(path.relative_to(place).as_posix()) and (place / "recipe.yaml").is_file():
            return place
    return None


def check_kind(folder: Path, wanted: str) -> None:
    """Say in one line that a folder holds the other kind of model.

    Raises:
        ValueError: it does.
    """
    trained, found = {"autoencoder": "train-decoder", "diffusion model": "train-dit"}, _kind(folder)
    if found in trained and found != wanted:
        raise ValueError(
            f"{folder} holds the {found} that `rae {trained[found]}` makes; what is needed here is the {wanted} that "
            f"`rae {trained[wanted]}` makes."
        )


def saved_kind(name: str | Path) -> str | None:
    """The kind of the model that a local folder, run or `run/best` holds ("autoencoder", say); None if it is none."""
    path = Path(name).expanduser()
    return _kind(find_folder(path, "a model")) if path.is_dir() or _is_pointer(path) else None


def _kind(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text())["kind"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # whoever reads config.json says what is wrong with it


def _is_pointer(path: Path) -> bool:
    return path.name in ("latest", "best") and path.is_file()


def _named_by(pointer: Path) -> Path:
    """The checkpoint that a run's `latest` or `best` names."""
    run, name, there = pointer.parent, pointer.read_text(errors="replace").strip(), checkpoints(pointer.parent)
    for path in there:
        if path.name == name:
            return path
    others = f"a checkpoint may be named by itself, as {there[-1]}" if there else "it has none"
    raise ValueError(f"{pointer} names checkpoint {name!r}, which is not there; {others}. See `rae doctor {run}`.")


def checkpoints(run: Path, where: Literal["checkpoints", "kept"] = "checkpoints") -> list[Path]:
    """All complete checkpoints of a run, oldest first, or the models it keeps; they are named by images seen."""
    found = (path for path in (run / where).glob("*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))


# --- weights ---------------------------------------------------------------------------------------------------------


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file of float32 tensors; ValueError names one of another type."""
    _check_types(tensors, f"{path.name} cannot be saved", "load the model again in float32")
    save_file(dict(tensors), path)


def load_tensors(folder: Path, name: str, files: Mapping[str, str]) -> dict[str, Tensor]:
    """Read `folder`/`name`, whose SHA-256 must be `files[name]`.

    Raises:
        ValueError: missing, damaged or changed since it was saved, not safetensors, or not float32.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder was copied in part, copy it whole.")
    found, wanted = sha256(path), files.get(name)
    if found != wanted:
        raise ValueError(
            f"{path} is damaged or was changed: its SHA-256 is {found}, config.json says {wanted}. {_copy_again(path)}"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}. {_copy_again(path)}") from error
    _check_types(tensors, f"{path} cannot be loaded", "save it from a model in float32")
    return tensors


def _copy_again(path: Path) -> str:
    run = run_of(path)
    return f"Copy it again{f'; `rae doctor {run}` says what the run can go on from' if run else ''}."


def _check_types(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{what}: {name} is {tensor.dtype}, saved models are torch.float32; {remedy}.")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file in a folder, by its name."""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def check_outside(out: Path, source: str | Path) -> None:
    """Refuse to write pictures or data into a folder of images that is read, which would hold others from then on.

    Folders in it that are links are read, at any depth. Features and figures may lie among images: nobody takes them
    for one.

    Args:
        out: a file or folder to be written.
        source: of images, whatever its form; one that is no folder has no inside.

    Raises:
        ValueError: `out` is that folder or one that a link in it leads to, or in it.
    """
    folder, place = os.path.expanduser(source), out.expanduser().resolve()
    for inside in _folders(folder) if os.path.isdir(folder) else ():
        if place.is_relative_to(os.path.realpath(inside)):
            raise ValueError(
                f"--out {out} is inside {inside}, where what is written would be taken for its images; give an --out "
                "beside it."
            )


def _folders(root: str) -> Iterator[str]:
    """A folder of images and those in it that its listing reads; nothing is asked of the disk about ordinary files."""
    seen, left = set(), [root]
    while left:
        place = left.pop()
        if (real := os.path.realpath(place)) in seen:  # links in circles
            continue
        seen.add(real)
        yield place
        with contextlib.suppress(OSError), os.scandir(place) as entries:  # whoever reads it says what is wrong
            found = (e for e in entries if e.is_dir(follow_symlinks=False) or (e.is_symlink() and os.path.isdir(e)))
            left += [e.path for e in found if place != root or not e.name.startswith(".")]


@contextlib.contextmanager
def aside(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A hidden file beside `path` to write to, which takes its place at the end: whole, or not there.

    Whatever ends the writing early, `path` stays as it was and the hidden file is removed. A kill -9 leaves the latter.

    Args:
        path: in a folder that exists.
        durable: bring it to the disk, so that a crash of the machine does not leave an empty file either.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield hidden
        if durable:
            fsync(hidden)
        hidden.replace(path)
        if durable:
            fsync(path.parent)
    finally:
        hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, taken: Exception) -> Iterator[None]:
    """Make a folder and hold it alone; the lock goes with the process, however it ends.

    Args:
        folder: a file `.lock` is left in it.
        taken: is raised where another process holds it, or takes back what it made of it meanwhile.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115, `with` follows
    except (FileNotFoundError, FileExistsError) as error:
        if isinstance(error, FileExistsError) and os.path.lexists(error.filename) and not os.path.isdir(error.filename):
            raise  # a file is in the way
        raise taken from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise taken from error
        if not _is_same(lock.fileno(), folder / ".lock"):
            raise taken  # whoever held it was refused, and has taken its new folder back meanwhile
        yield


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def write_folder(folder: str | Path, kind: str, write: Callable[[Path], None]) -> None:
    """Write a model's folder aside, bring it to the disk, and rename it.

    Args:
        folder: made if it does not exist; replaced if it is a model of the same kind, and nothing else is in it.
        kind: "autoencoder" or "diffusion model", as `write` puts it into config.json.
        write: puts the files into the folder that it is given.

    Raises:
        ValueError: the folder is something else. It is left as it is, and so is the old model if anything fails.
    """
    folder = Path(folder).expanduser().resolve()
    _check_replaceable(folder, kind)
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}-", dir=folder.parent))
    new, old = hidden / "new", hidden / "old"
    try:
        new.mkdir()
        write(new)
        fsync_all(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        fsync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(hidden, ignore_errors=True)


def _check_replaceable(folder: Path, kind: str) -> None:
    if not folder.exists():
        return
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    try:
        saved = json.loads((folder / "config.json").read_text())
        known = {"config.json", "encoder", *saved["files"]} if saved["kind"] == kind else set()
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    if strange := sorted(there - known):
        raise ValueError(
            f"{folder} exists and is not a saved {kind} alone (it has {', '.join(strange[:3])}); give another folder."
        )


def fsync_all(folder: Path) -> None:
    """Bring a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        fsync(path)


def fsync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
