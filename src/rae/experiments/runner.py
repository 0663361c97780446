"""A study is run: every (setting, seed) once, in rows that a killed run does not lose.

    results/NAME.jsonl      one line for each (setting, seed); lines are added, never changed
    results/NAME.png        a picture, where the study has one, drawn once all rows are there (drawing.py)
    results/NAME.md, .svg   what they say, written anew after every run (page.py)

A row holds all that its numbers are a function of, so rows of another protocol are told apart and refused.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from rae.data.images import open_images
from rae.evaluation.report import check_plots
from rae.experiments.drawing import read_picture, write_picture
from rae.experiments.frame import Config, Drawing, Place, Results, Row, Study
from rae.experiments.page import write_page
from rae.folders import fsync
from rae.sources import cache_folder

_QUIET = {"capture_output": True, "text": True}


def run_study(
    study: Study,
    out: Path | None = None,
    *,
    seeds: int | None = None,
    quick: bool = False,
    source: str | None = None,
    work: Path | None = None,
    changes: Config | None = None,
) -> Path:
    """Run what is missing of a study, and write its page; the same command again goes on.

    Seed 0 of all settings comes first, so that a study that is stopped early has something to say of all of them.

    Args:
        study: one of `find_study`.
        out: folder of the rows and the page; None = `results`, of the quick form a new temporary one.
        seeds: how many, from 0; None = as many as the study declares.
        quick: the quick form, which says nothing of the claim.
        source: of images, in place of the study's own.
        work: folder for what takes long to make and can be used again; None = `experiments` in the cache of rae.
        changes: of the protocol, by key; overrides settings and quick form alike.

    Returns:
        The page.

    Raises:
        ValueError: a key that the protocol has not, fewer seeds than one, a quick form beside the real results, rows
            of another protocol, a picture that is none, another process at work on the same rows, images for a study
            that reads none.
        ImageError: the images cannot be had.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    seeds = study.seeds if seeds is None else seeds
    changes = dict(changes or {})
    check_plots()
    _check(study, out, seeds, quick, source, changes)
    place = Place(source or study.source, work or cache_folder() / "experiments")
    extra = {"data": describe_images(place.source)} if place.source else {}
    extra |= {**study.quick, "quick": True} if quick else {}
    configs = {
        name: json.loads(json.dumps({**study.protocol, **own, **extra, **changes}))
        for name, own in study.settings.items()
    }
    if out is None:
        out = Path(tempfile.mkdtemp(prefix=f"rae-{study.name}-") if quick else "results")
    out.mkdir(parents=True, exist_ok=True)
    with _rows_file(out / f"{study.name}.jsonl", console) as (rows, append):
        _check_rows(out / f"{study.name}.jsonl", rows, configs)
        if study.drawing:
            read_picture(out / f"{study.name}.png")  # refuses another file of that name, before any row runs
        _declare(study, console, quick)
        try:
            _run_missing(study, configs, range(seeds), place, rows, append, console)
            if study.drawing:
                _draw(study.drawing, configs, rows, place, out / f"{study.name}.png", console)
        finally:  # a page of what there is, however it ends
            page = write_page(study, rows, out)
    console.print(f"[green]{escape(str(page))}")
    return page


def describe_images(source: str) -> str:
    """Images are told apart by what they are, and not by where they lie: their number and a checksum."""
    images = open_images(source)
    return f"{len(images):,} images, {images.identity[:12]}"


def _declare(study: Study, console: Console, quick: bool) -> None:
    """Print what will be asked, done and judged, before it is."""
    texts = {"question": study.question, "the paper": study.claim, "decided": study.rule}
    texts |= {"settings": "; ".join(study.settings)}
    texts |= {"cost": "seconds (QUICK: the numbers mean nothing)" if quick else study.cost}
    for name, text in texts.items():
        console.print(f"[bold]{name}[/]: {escape(text)}")


def _run_missing(
    study: Study,
    configs: Mapping[str, Config],
    seeds: range,
    place: Place,
    rows: Sequence[Row],
    append: Callable[[Row], None],
    console: Console,
) -> None:
    done = {(row["setting"], row["seed"]) for row in rows}
    pending = [(setting, seed) for seed in seeds for setting in configs if (setting, seed) not in done]
    total = len(pending) + len(done)
    if done:
        console.print(f"{len(done)} of {total} runs are there already")
    where = _environment()
    while pending:
        setting, seed = pending.pop(0)
        begun, cpu = time.monotonic(), time.process_time()
        numbers = study.run(configs[setting], setting, seed, place)
        spent = {"seconds": round(time.monotonic() - begun, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
        row = {"study": study.name, "setting": setting, "seed": seed, "numbers": numbers, "config": configs[setting]}
        append(row | spent | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | where)
        figures = ", ".join(f"{name} {numbers[name]:.4g}" for name in study.shown)
        console.print(
            f"{total - len(pending)}/{total} {escape(setting)}, seed {seed}: {figures}; {spent['seconds']:.0f} s"
            + (f", about {_left(rows, pending) / 60:.0f} min left" if pending else "")
        )


def _left(rows: Sequence[Row], pending: Sequence[tuple[str, int]]) -> float:
    """Seconds, by what each setting took before; one that has not run yet by the mean of the others."""
    mean = statistics.fmean(row["seconds"] for row in rows)
    took = {row["setting"]: row["seconds"] for row in rows}
    return sum(took.get(setting, mean) for setting, _ in pending)


def _draw(
    drawing: Drawing, configs: Mapping[str, Config], rows: Sequence[Row], place: Place, file: Path, console: Console
) -> None:
    """Draw a study's picture, unless it is there."""
    quick, results = any("quick" in config for config in configs.values()), Results(rows)
    own = json.loads(json.dumps({**drawing.protocol, **(drawing.quick if quick else {})}))
    own["seeds"] = [seed for seed in own["seeds"] if all(seed in results.seeds(setting) for setting in configs)]
    made_of, found = {"protocol": own, "settings": configs}, read_picture(file)
    if found and made_of.items() <= found.made_of.items():
        console.print(f"{escape(str(file))} is there already")
        return
    if found:
        console.print(f"[yellow]{escape(str(file))} is of another protocol, or of fewer seeds: it is drawn again")
    console.print(f"drawing {escape(str(file))}: {'seconds' if quick else drawing.cost}")
    where = _environment()
    pixels, caption = drawing.draw(own, configs, results, place, lambda text: console.print(escape(text)))
    write_picture(file, pixels, caption, made_of | where)
    console.print(f"{escape(str(file))}: {escape(caption)}")


# --- checks ----------------------------------------------------------------------------------------------------------


def _check(study: Study, out: Path | None, seeds: int, quick: bool, source: str | None, changes: Config) -> None:
    if seeds < 1:
        raise ValueError(f"{seeds} seeds; give 1 or more, 3 for an error bar that means something.")
    known = {key: value for own in (*study.settings.values(), study.protocol) for key, value in own.items()}
    for key, value in changes.items():
        if key not in known:
            raise ValueError(f"the protocol of {study.name} has no {key!r} to change; it has {', '.join(known)}.")
        was = known[key]
        if type(value) is not type(was) and (type(was), type(value)) != (float, int):
            raise ValueError(f"{key} is {was!r} in the protocol of {study.name}; {value!r} is of another kind.")
    if source and not study.source:
        raise ValueError(f"{study.name} reads no images, and was given {source}; leave --data out.")
    if quick and out is not None and out.resolve().name == "results":
        raise ValueError(f"--quick never writes to {out}, where figures that count are kept; give another --out.")


def _check_rows(file: Path, rows: Sequence[Row], configs: Mapping[str, Config]) -> None:
    """Refuse rows that are not of this protocol."""
    for number, row in enumerate(rows, 1):
        was, now = row["config"], configs.get(row["setting"])
        if now is None:
            raise ValueError(
                f"{file}, line {number}: the study has no setting {row['setting']!r}; give another --out, or take the "
                "line out."
            )
        if changed := [key for key in {**was, **now} if (key in was, was.get(key)) != (key in now, now.get(key))]:
            key = changed[0]
            raise ValueError(
                f"{file}, line {number}: {row['setting']} was run with {key} = {was.get(key)!r}, this is {key} = "
                f"{now.get(key)!r}; rows of two protocols are not mixed: give another --out."
            )


# --- rows ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _rows_file(path: Path, console: Console) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """The rows of a file that this process holds alone, and a function that adds one, on the disk when it returns."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is at work on {path}; wait for it, or give another --out.") from error
        fsync(path.parent)
        file.seek(0)
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            file.truncate(whole)
            console.print(f"[yellow]{escape(str(path))}: the last line was cut short by a kill; its run is made again")
        rows = read_rows(text[:whole], path)

        def append(row: Row) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            rows.append(row)

        yield rows, append


def read_rows(text: bytes, path: Path) -> list[Row]:
    """Whole lines => rows; ValueError names the line that is none."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            row["setting"], row["seed"], row["seconds"], dict(row["numbers"]), dict(row["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no row of a study ({error}); take it out to go on.") from error
        rows.append(row)
    return rows


def _environment() -> dict[str, Any]:
    """What numbers may depend on beside the protocol."""
    return {
        "commit": _commit(),
        "hardware": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("rae", "torch")},
    }


def _commit() -> str | None:
    """Of the checkout that this file belongs to, -dirty where it was changed since; None where it belongs to none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", __file__]
    if shutil.which("git") is None or subprocess.run(tracked, **_QUIET).returncode:
        return None
    described = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], **_QUIET)
    return described.stdout.strip() or None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
