"""What the folder of a run holds, read once: recipe, log, checkpoints and their damage. No weights are loaded."""

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rae.config import ConfigError, load_recipe
from rae.folders import check_outside, checkpoints, run_of
from rae.training.checkpoint import find_damage, read_state
from rae.training.decoder import DecoderRecipe
from rae.training.diagnosis import patience
from rae.training.dit_recipe import DiTRecipe
from rae.training.durations import in_images
from rae.training.run_folder import read_log

STATE = {"images", "identity", "schedules", "starts"}  # of `Run.state`, what is looked at here


@dataclass(frozen=True)
class RunRecord:
    """A run of either stage, at work or not, in its own folder or a copy of it.

    Attributes:
        folder: of the run.
        recipe: None where recipe.yaml cannot be read; `recipe_error` says why.
        lines: of log.jsonl.
        unreadable: numbers, from 1, of its lines that say nothing; `cut`: whether the last one is half a line.
        damage: checkpoint => what is wrong with it or None, oldest first.
        kept: the same of the models that `run.keep_at` names.
        state: of the newest intact checkpoint, or None.
        running: whether a process is training there now.
    """

    folder: Path
    recipe: DecoderRecipe | DiTRecipe | None
    recipe_error: str | None
    lines: list[dict[str, Any]]
    unreadable: list[int]
    cut: bool
    damage: dict[Path, str | None]
    kept: dict[Path, str | None]
    state: dict[str, Any] | None
    running: bool

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint, damaged or not."""
        return next(reversed(self.damage), None)

    @property
    def intact(self) -> list[Path]:
        return [path for path, damage in self.damage.items() if not damage]

    @property
    def missing_state(self) -> list[str]:
        """What the state of a checkpoint by another version lacks."""
        return sorted(STATE - self.state.keys()) if self.state else []

    @property
    def saved(self) -> int:
        """Images seen by the newest intact checkpoint."""
        return self.state["images"] if self.state else 0

    @property
    def logged(self) -> int:
        """Images seen by the last line of the log."""
        return self.lines[-1]["images"] if self.lines else 0

    @property
    def seen(self) -> int:
        return max(self.saved, self.logged)

    @property
    def step(self) -> int:
        return self.seen // self.recipe.run.batch

    @property
    def total(self) -> int | None:
        """Images asked for; None where that is in epochs and no checkpoint says how many images one has."""
        run, epoch = self.recipe.run, self.state["epoch"] if self.state and "epoch" in self.state else None
        if run.duration.endswith("ep") and epoch is None:
            return None
        return in_images(run.duration, batch=run.batch, epoch=epoch or 0)

    @property
    def finished(self) -> bool:
        return self.total is not None and self.newest is not None and int(self.newest.name) >= self.total

    @property
    def best_by(self) -> str:
        """The figure of the log that chooses `best`."""
        return self.recipe.evaluation.figure if isinstance(self.recipe, DecoderRecipe) else "held_out_loss"

    @property
    def judged_from(self) -> int:
        """Step from which on the losses of stage 2 tell something, by the schedule of the newest intact checkpoint."""
        steps = (self.total or self.seen) // self.recipe.run.batch
        return patience(self.recipe.optim, steps, self.state["schedules"]["optim"][1])

    @property
    def judged(self) -> bool:
        """Whether stage 2 has made so many steps."""
        return self.state is not None and self.step >= self.judged_from

    def series(self, name: str) -> list[tuple[int, float]]:
        """(images, value) of every line of the log that has this figure."""
        return [(line["images"], line[name]) for line in self.lines if name in line]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series(name)]


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder; every file of its checkpoints is compared with the manifest.

    Raises:
        ValueError: it is not one.
    """
    folder = folder.expanduser()
    if not (folder / "recipe.yaml").is_file():
        inside = run_of(folder.absolute())
        hint = f"It lies in one, give {inside}" if inside else "Give what a training command had for --out"
        raise ValueError(f"{folder} is not the folder of a run, it has no recipe.yaml. {hint}.")
    recipe, recipe_error = None, None
    try:
        recipe = _read_recipe(folder / "recipe.yaml")
    except ConfigError as error:
        recipe_error = str(error)
    damage, kept = _damage(checkpoints(folder)), _damage(checkpoints(folder, "kept"))
    intact = [path for path in damage if not damage[path]]
    state = read_state(intact[-1] / "train") if intact else None
    return RunRecord(folder, recipe, recipe_error, *read_log(folder), damage, kept, state, _is_running(folder))


def _damage(paths: list[Path]) -> dict[Path, str | None]:
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found[path] = find_damage(path)
    return {path: damage for path, damage in found.items() if path.is_dir()}  # training may just have removed it


def _read_recipe(path: Path) -> DecoderRecipe | DiTRecipe:
    sections = None
    with contextlib.suppress(yaml.YAMLError, ValueError):  # load_recipe says what is wrong with it
        sections = yaml.safe_load(path.read_bytes())
    second = isinstance(sections, dict) and "network" in sections
    return load_recipe(DiTRecipe if second else DecoderRecipe, path)


def check_outside_data(out: Path, model: str | Path) -> None:
    """See that pictures do not become images of the data that the run of a model names, where they would be a class.

    Raises:
        ValueError: `out` is inside a folder of training or held-out images.
    """
    if not (run := run_of(Path(os.path.abspath(Path(model).expanduser())))):
        return
    try:
        data = _read_recipe(run / "recipe.yaml").data
    except ConfigError:
        return  # of a recipe that cannot be read nothing is said; the model still can
    for source in (data.source, data.held_out):
        if isinstance(source, str):
            check_outside(out, source)


def _is_running(folder: Path) -> bool:
    """Whether another process holds the lock of `run_folder.claim`."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file in a copy, no locks on that file system
        return False
    return False
