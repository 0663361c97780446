"""The folder of a run: locked while it is at work, compared with what is asked for, its log cut back to the checkpoint.

runs/x/
    recipe.yaml     what was asked for; a resumed run must ask for the same
    log.jsonl       one line per event or interval, each with `images` seen
    samples/        a sheet of pictures every now and then
    latest, best    names of checkpoints
    checkpoints/    see checkpoint.py
"""

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.filesize import decimal
from rich.table import Table

from rae.config import Config, ConfigError, load_recipe
from rae.folders import aside, checkpoints, locked

# What a resumed run may ask for differently: how long, how often, how it is watched, how fast images are decoded, and
# where things lie; that they are the same things, checksums decide.
FREE = {"run.duration", "run.log_every", "run.save_every", "run.evaluate_every", "run.keep", "run.trackers"}
FREE |= {"run.keep_at", "run.sharding"}  # what stays, and who holds which part: checkpoints are the same
FREE |= {"run.recompute"}  # the same operations, done twice
ROUNDING = {"run.micro_batch", "run.compile"}  # the same sums in another order, as by other processes
FREE |= ROUNDING
FREE |= {"run.evaluate_images", "sheet.images", "sheet.steps", "sheet.cfg", "data.workers"}
FREE |= {"evaluation.features", "evaluation.weights"}  # by another network `best` is found anew
FREE |= {"optim.warmup", "optim.decay_end"}
FREE |= {"encoder.name", "rae", "latents", "data.source", "data.held_out", "data.class_names"}
FREE |= {f"loss.adversarial.discriminator.optim.{key}" for key in ("warmup", "decay_end")}
# A start may be written differently where a longer run would move it; `Run.resume` sees to it that it does not move.
FREE |= {"loss.perceptual.start", "loss.adversarial.start", "loss.adversarial.discriminator.start"}
FREE |= {"loss.perceptual.vgg16", "loss.perceptual.heads", "loss.adversarial.discriminator.features"}


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Lock the run's folder, a new one or one of a run. An error before there is a log leaves nothing new behind."""
    if folder.is_file():
        raise TrainingError(f"{folder} is a file; give a folder.")
    made = [path for path in (folder / ".lock", folder, *folder.parents) if not path.exists()]
    with locked(folder, TrainingError(f"another process is training in {folder}; end it or give another folder.")):
        # Only now does nobody else change what is in it.
        is_run, before = (folder / "recipe.yaml").exists(), set(folder.iterdir())
        try:
            if not is_run and any(not path.name.startswith(".") for path in before):
                raise TrainingError(f"{folder} holds files but no run (no recipe.yaml); give a new folder.")
            yield
        except Exception:
            if not is_run:
                _take_back(folder, before, made)
            raise


def _take_back(folder: Path, before: set[Path], made: list[Path]) -> None:
    """Remove a run that was refused: its recipe, its lock and the folders made for it, innermost first.

    Nothing is removed where there is more than that, or where another process has put something into a folder since.
    """
    new = set(folder.iterdir()) - before
    if {path.name for path in new} <= {"recipe.yaml"}:
        for path in new:
            path.unlink()
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir() if path.is_dir() else path.unlink()


def check_recipe(folder: Path, recipe: Config) -> str | None:
    """Refuse to go on from a checkpoint with another recipe, except for what is `FREE`; what to say of `ROUNDING`."""
    path, asked = folder / "recipe.yaml", flatten(recipe.model_dump(mode="json"))
    if path.exists() and checkpoints(folder):
        begun = flatten(load_recipe(type(recipe), path).model_dump(mode="json"))
        changed = {key for key in asked.keys() | begun.keys() if asked.get(key) != begun.get(key)}
        if refused := changed - FREE:
            lines = "\n".join(f"  {key}: {begun.get(key)!r} -> {asked.get(key)!r}" for key in sorted(refused))
            raise ConfigError(
                f"{folder} was begun with another recipe:\n{lines}\nBegin a new run in another folder, or ask for the "
                f"same; only {', '.join(sorted(FREE & asked.keys()))} may change."
            )
        if other := sorted(changed & ROUNDING):
            return f"{', '.join(other)} is another than before: from here on sums are rounded otherwise"
    return None


def check_identity(folder: Path, state: Mapping[str, Any], identity: Mapping[str, str], epoch: int) -> None:
    """Refuse to go on with other images, latents or networks than those that the run was begun with.

    Args:
        folder: of the run.
        state: of its checkpoint.
        identity: checksums of what it would go on with, by name.
        epoch: images in an epoch, now.
    """
    for name, now in identity.items():
        begun = state["identity"].get(name, now)  # checkpoints of earlier versions have no class names
        if begun == now:
            continue
        if name == "cache":
            then, asked = (kept if kept in ("online", "memory") else f"the cache {kept[:12]}" for kept in (begun, now))
            raise TrainingError(
                f"{folder} was begun with latents: {then}, and the recipe says latents: {asked}. Ask for the same, or "
                "begin a new run in another folder."
            )
        counts = f" ({state['epoch']:,} then, {epoch:,} now)" if name == "images" else ""
        raise TrainingError(
            f"{folder} was trained on {name} {begun[:12]} and finds {name} {now[:12]}{counts}: files were added, "
            "removed or changed, or the recipe names others. Restore them, or begin a new run in another folder."
        )


def check_starts(state: Mapping[str, Any], starts: Mapping[str, int], batch: int) -> None:
    """Refuse to move the start of a part of the training, in images, that is past or would be."""
    for key, now in starts.items():
        begun = state["starts"][key]
        if now != begun and min(now, begun) < state["images"]:
            raise TrainingError(
                f"{key} was step {begun // batch} of this run, it is step {now // batch} now, and "
                f"{state['images'] // batch} steps are made: too late. {key}={begun // batch}st keeps it."
            )


def keep_recipe(folder: Path, recipe: Config) -> None:
    """Write the recipe of a run that goes on, or begins."""
    with aside(folder / "recipe.yaml") as hidden:
        hidden.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def read_log(folder: Path) -> tuple[list[dict[str, Any]], list[int], bool]:
    """The log's lines that can be read; numbers, from 1, of those that cannot; whether the last one is half a line."""
    path, lines, unreadable = folder / "log.jsonl", [], []
    whole, _, rest = (path.read_text(errors="replace") if path.is_file() else "").rpartition("\n")
    for number, text in enumerate(whole.splitlines(), start=1):
        line = None
        with contextlib.suppress(ValueError):
            line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("images"), int):
            lines.append(line)
        else:
            unreadable.append(number)
    return lines, unreadable, bool(rest)


def log_damage(path: Path, unreadable: list[int]) -> str:
    """What is wrong with a log of which these lines cannot be read; the second line is the remedy."""
    numbers = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
    delete = ";".join(f"{number}d" for number in unreadable)
    return (
        f"{path}: no figures can be read from line {numbers}.\nTraining cannot go on before that is taken out of the "
        f"file: sed -i '{delete}' {shlex.quote(str(path))}"
    )


def check_log(folder: Path) -> None:
    """Refuse to go on with a log that is damaged; half a line at its end is what a killed run leaves."""
    _, unreadable, _ = read_log(folder)
    if unreadable:
        raise TrainingError(log_damage(folder / "log.jsonl", unreadable))


def truncate_log(path: Path, seen: int) -> list[dict[str, Any]]:
    """Drop what a killed run wrote after its last checkpoint, which will be written again; returns what stays."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["images"] <= seen]
    with aside(path) as hidden:
        hidden.write_text("".join(kept))
    return [json.loads(line) for line in kept]


def written(folder: Path) -> Table:
    """What a run that is finished wrote, and how large it is."""
    kept = checkpoints(folder)
    rows = {
        f"checkpoints/{kept[-1].name}/model": "the model, EMA weights",
        "best": "names the checkpoint that did best on held-out images",
        "checkpoints": f"{len(kept)}, each to go on from",
        "kept": "the models of the steps that run.keep_at names",
        "samples": "sheets of pictures",
        "log.jsonl": "figures",
        "recipe.yaml": "what was asked for",
    }
    table = Table("written", "what", "size")
    for name, what in rows.items():
        if (folder / name).exists():
            table.add_row(name, what, size(folder / name))
    return table


def size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return decimal(sum(file.stat().st_size for file in files))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"run": {"batch": 8}} -> {"run.batch": 8}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
