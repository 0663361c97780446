"""What the commands that write pictures share: files that are whole or not there, folders that go on, checksums."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from rae.folders import aside, locked
from rae.processes import process_state
from rae.sources import weights_sha256
from rae.training.run_folder import flatten

Rounding = Literal["nearest", "truncate"]


class OutputError(ValueError):
    """A file or folder that cannot be written to, because it is or holds something else."""


def checksum(module: torch.nn.Module) -> str:
    """SHA-256 (hex) of a model's weights."""
    return weights_sha256(module.state_dict().values())


def check_file(path: Path) -> None:
    """Make the folder of a file that is to be written at the end of a long job.

    Raises:
        OutputError: the file could not be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent} cannot be written to; give another file.")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder of results, the first process for all: of two commands each would remove what the other needs.

    A new folder is removed where what is asked for is refused before anything is written.

    Raises:
        OutputError: another command holds it.
    """
    if not process_state().is_main_process:
        yield
        return
    is_new = not folder.exists()
    with locked(folder, OutputError(f"another process is at work in {folder}; wait for it, or give another --out.")):
        try:
            yield
        except Exception:
            if is_new and os.listdir(folder) == [".lock"]:
                shutil.rmtree(folder)
            raise


def claim(folder: Path, file: str, protocol: dict[str, Any], grows: tuple[str, ...] = ()) -> None:
    """Keep in `folder`/`file` how its pictures are made; a folder whose pictures were made in another way is refused.

    Args:
        folder: made if it does not exist; else empty, or claimed before.
        file: its name.
        protocol: what decides the pixels.
        grows: keys of numbers that may have become larger since, and of lists that may have become longer.

    Raises:
        OutputError: the folder holds pictures made in another way, or something else.
    """
    path = folder / file
    if path.is_file():
        before = _read(path)
        if before == protocol:
            return
        was, now = flatten(before), flatten(protocol)  # what differs in a long section is shown, not how it begins
        pairs = {key: (was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys())}
        refused = {
            key: (was, now)
            for key, (was, now) in pairs.items()
            if was != now and not (key in grows and _begins(now, was))
        }
        if refused and all(key in grows and _begins(was, now) for key, (was, now) in refused.items()):
            counts = ", ".join(f"{key}: {_count(was)} -> {_count(now)}" for key, (was, now) in refused.items())
            raise OutputError(
                f"{folder} was begun with more ({counts}). It can grow, not shrink: ask for as many, or give another "
                "folder."
            )
        if refused:
            lines = "\n".join(f"  {key}: {str(was)[:60]} -> {str(now)[:60]}" for key, (was, now) in refused.items())
            raise OutputError(
                f"{folder} holds what was made in another way:\n{lines}\nAsk for the same, or give another folder."
            )
    else:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; give a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        if any(not found.name.startswith(".") for found in folder.iterdir()):
            raise OutputError(f"{folder} is not empty; give a new folder.")
    with aside(path) as hidden:
        hidden.write_text(json.dumps(protocol, indent=1) + "\n")


def _begins(now: Any, was: Any) -> bool:
    """Whether `now` is `was` and more."""
    if type(now) is not type(was):
        return False
    return now[: len(was)] == was if isinstance(was, list) else was <= now


def _count(value: Any) -> Any:
    return len(value) if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}), so nothing says how the pictures beside it were made; give another folder."
        ) from error


def picture_name(index: int) -> str:
    """The file of image `index`."""
    return f"{index:06d}.png"


def is_there(path: Path) -> bool:
    """Whether a picture exists.

    Raises:
        OutputError: an empty file does, which is what a crash of the machine may leave of it.
    """
    if path.exists() and path.stat().st_size == 0:
        raise _damaged(path, "it is empty")
    return path.exists()


def read_picture(path: Path) -> np.ndarray:
    """A PNG -> uint8 [H,W,3].

    Raises:
        OutputError: it is damaged.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except (OSError, SyntaxError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> OutputError:
    return OutputError(f"{path} is damaged ({reason}); delete it and run the same command again, which makes it anew.")


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H,W,3] as PNG."""
    with aside(path) as hidden:
        Image.fromarray(picture).save(hidden, format="PNG")
