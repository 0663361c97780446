"""Checkpoints that are whole or not there: written aside, fsynced, checksummed, renamed.

runs/x/
    latest                      name of the newest checkpoint
    best                        name of the one that did best on held-out images
    checkpoints/000012800/      images seen
        model/                  the EMA model, in the form of `save_pretrained`
        train/                  online weights and optimiser (safetensors), state.json
        manifest.json           size and sha256 of every file; which pointers name the folder
    kept/000006400/             the same without train/, of steps that a recipe asked to keep; never removed

A folder without the prefix `.tmp-` is complete, because the rename is the last thing that happens to it. A process may
be killed at any instruction; the next start goes on from the newest folder.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.folders import aside, checkpoints, fsync, fsync_all, sha256
from rae.training.sharding import part_for

# What one step leaves behind for every parameter; more or less than this in a file is an error.
_STATE = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names the file and what to do."""


def save_checkpoint(run: Path, images: int, write: Callable[[Path], None], *, keep: int, best: bool = False) -> Path:
    """Write one checkpoint, make it the latest, and remove all but the `keep` newest and the best.

    Args:
        run: the run's folder.
        images: images seen, which names the checkpoint.
        write: puts its files into the folder that it is given.
        keep: at least 1.
        best: make it the best.

    Raises:
        CheckpointError: the disk is full or failed. The checkpoints before this one are untouched.
    """
    final, pointers = run / "checkpoints" / f"{images:09d}", ["latest", "best"] if best else ["latest"]
    with _written(run, final, write, pointers):
        for pointer in pointers:
            _point(run, pointer, final.name)
        for old in checkpoints(run)[:-keep]:
            if not (run / "best").is_file() or old.name != (run / "best").read_text().strip():
                _remove(old)
    return final


def keep_models(run: Path, images: int, write: Callable[[Path], None]) -> Path:
    """Write the models of this step where they stay for good; arguments, folder and errors as of `save_checkpoint`.

    It comes before the checkpoint of the same step: a run that is killed in between makes the step again, and this.
    """
    final = run / "kept" / f"{images:09d}"
    _remove(final)
    with _written(run, final, write, []):
        return final


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint, every file checked against its manifest; None in a new run.

    Raises:
        CheckpointError: it is damaged. No older one is taken in its place without being asked for.
    """
    for folder in ("checkpoints", "kept"):
        for path in (run / folder).glob(".tmp-*"):
            _remove(path)
    found = checkpoints(run)
    if not found:
        return None
    damage = find_damage(found[-1])
    if damage:
        intact = next((path for path in reversed(found[:-1]) if not find_damage(path)), None)
        remedy = f"to go on from {intact.name}, which is intact" if intact else "to start anew; no older one is intact"
        raise CheckpointError(f"{damage}\nRemove the damaged checkpoint {remedy}: rm -r {found[-1]}")
    for pointer in _read_manifest(found[-1]).get("pointers", ["latest"]):  # earlier versions kept no list
        _point(run, pointer, found[-1].name)  # a run killed between rename and pointer
    return found[-1]


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, file by file; None if it is as it was written."""
    try:
        wanted = _read_manifest(checkpoint)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint / 'manifest.json'} cannot be read ({error})."
    found = _manifest(checkpoint)["files"]
    wrong = [
        f"{checkpoint / name} is {state}."
        for name in sorted(wanted.keys() | found.keys())
        if (state := _compare(wanted.get(name), found.get(name)))
    ]
    return "\n".join(wrong) or None


def save_training_state(
    folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: dict[str, Any]
) -> None:
    """Write what training goes on from into `folder`.

    Args:
        folder: made.
        weights: online ones, of `state_dict()`.
        moments: of `optimizer_tensors`.
        state: the loop's own, JSON.
    """
    folder.mkdir()
    save_file(dict(weights), folder / "weights.safetensors")
    save_file(dict(moments), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """The loop's own `state` that `save_training_state` wrote."""
    return json.loads((folder / "state.json").read_text())


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file into a module: no key may be missing, be left over or have another shape."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error


def load_optimizers(optimizers: Iterable[torch.optim.Optimizer], path: Path) -> None:
    """Load a file of `optimizer_tensors`; nothing may be missing or left over."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for optimizer in optimizers:
        _load_optimizer(optimizer, tensors, path)
    if tensors:
        raise CheckpointError(f"{path}: optimiser state of unknown parameters: {', '.join(sorted(tensors)[:5])}.")


def optimizer_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """`exp_avg/blocks.0.qkv.weight` and so on, for every parameter."""
    tensors = {}
    for optimizer in optimizers:
        for name, parameter in _named(optimizer):
            state = optimizer.state[parameter]
            if not state:
                raise CheckpointError(f"parameter {name} has never received a gradient; its state cannot be saved.")
            tensors |= {f"{key}/{name}": value for key, value in state.items()}
    return tensors


# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _written(run: Path, final: Path, write: Callable[[Path], None], pointers: list[str]) -> Iterator[None]:
    """Inside `with`, `final` is there, as `write` filled it; `pointers` are to name it."""
    hidden = final.with_name(f".tmp-{final.name}")
    try:
        _remove(hidden)
        hidden.mkdir(parents=True)
        write(hidden)
        (hidden / "manifest.json").write_text(json.dumps({"pointers": pointers} | _manifest(hidden), indent=1))
        fsync_all(hidden)
        hidden.rename(final)
        fsync(final.parent)
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        kept = checkpoints(run)
        last = f"The last good checkpoint is {kept[-1]}" if kept else "There is no earlier checkpoint"
        free = decimal(shutil.disk_usage(run).free)
        raise CheckpointError(
            f"{final} could not be written: {error}. {free} are free. {last}. Make room and run the same command again."
        ) from error


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    """Take the state of this optimiser's parameters out of `tensors`."""
    keys = _STATE[type(optimizer).__name__]
    wanted = {f"{key}/{name}" for key in keys for name, _ in _named(optimizer)}
    if missing := sorted(wanted - tensors.keys()):
        raise CheckpointError(f"{path}: no optimiser state for {', '.join(missing[:5])}.")
    states = [{key: tensors.pop(f"{key}/{name}") for key in keys} for name, _ in _named(optimizer)]
    for (name, parameter), state in zip(_named(optimizer), states):
        for key, value in state.items():
            if key != "step" and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {key}/{name} is {list(value.shape)}, the parameter {list(parameter.shape)}."
                )
            state[key] = part_for(parameter, value) if key != "step" else value
    # The groups (learning rate, betas) come from the recipe, the state from the file.
    optimizer.load_state_dict(
        {"state": dict(enumerate(states)), "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, torch.nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def _manifest(folder: Path) -> dict[str, Any]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json")
    return {"files": {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}}


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _compare(wanted: dict[str, Any] | None, found: dict[str, Any] | None) -> str | None:
    if found is None:
        return "missing"
    if wanted is None:
        return "not part of the checkpoint"
    if wanted["bytes"] != found["bytes"]:
        return f"damaged: {found['bytes']} bytes instead of {wanted['bytes']}"
    return None if wanted == found else "damaged: its sha256 is not the one written"


def _point(run: Path, pointer: str, name: str) -> None:
    with aside(run / pointer, durable=True) as hidden:
        hidden.write_text(name + "\n")


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill halfway never leaves a half one under its own name."""
    if folder.exists():
        doomed = folder if folder.name.startswith(".tmp-") else folder.rename(folder.with_name(f".tmp-{folder.name}"))
        shutil.rmtree(doomed)
