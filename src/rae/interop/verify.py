"""Parity with reference fixtures: run every case of a folder through our code and measure the largest error.

A case is a folder with

    case.json              "case" (what it is), "hyperparameters", "tensors" (name -> role, ...), "tolerance"
    tensors.safetensors    inputs and expected outputs
    weights*.safetensors   weights under the published key names, where there are any

The error of an output is max |result - expected| / std(expected), and for a single number the relative difference.
`cases.py` holds one function per kind of case; everything it needs comes from the case's own files, so a folder with
other sizes and seeds runs as well.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from rae.interop.cases import Case, NotBuilt, find_case


class FixtureError(ValueError):
    """A folder that is not one of fixtures, or a case that cannot be read."""


@dataclass(frozen=True)
class Measured:
    """One output of a case: its error and the limit. `error` is infinite if the output is missing or not finite."""

    tensor: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Outcome:
    """One case: what was measured, or why nothing was.

    Attributes:
        case: name of its folder.
        measured: one entry per expected output; empty unless it ran to the end.
        problem: why it did not run; None if it did.
        built: False if the part it is about does not exist yet.
    """

    case: str
    measured: tuple[Measured, ...] = ()
    problem: str | None = None
    built: bool = True
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.problem is None and all(m.passed for m in self.measured)

    @property
    def worst(self) -> Measured:
        """The output that is nearest to its limit, or furthest beyond it."""
        return max(self.measured, key=lambda m: (not m.passed, m.error / m.limit if m.limit else m.error))


@dataclass(frozen=True)
class Report:
    outcomes: tuple[Outcome, ...]

    @property
    def exit_status(self) -> int:
        """1 if a case broke or is past its tolerance, else 2 if one is about a part not built yet, else 0."""
        if any(o.built and not o.passed for o in self.outcomes):
            return 1
        return 0 if all(o.built for o in self.outcomes) else 2


def verify(folder: str | Path) -> Report:
    """Run every case in `folder` (its subfolders with a case.json, or itself if it is a case).

    Raises:
        FixtureError: no case there, or one of an unknown kind.
    """
    folder = Path(folder)
    folders = sorted(path.parent for path in [*folder.glob("case.json"), *folder.glob("*/case.json")])
    if not folders:
        raise FixtureError(f"{folder} holds no case: neither it nor a folder in it has a case.json.")
    cases = [_read_case(path) for path in folders]
    progress = track(cases, "verify", console=Console(stderr=True), transient=True)
    return Report(tuple(_run(case) for case in progress))


def print_report(report: Report, console: Console | None = None) -> None:
    """A table with the error of every case, of the output nearest to its limit, and one line that sums it up."""
    console = console or Console()
    table = Table(
        "case", "outputs", "largest error", "limit", "of", "seconds", "result", title="parity with the reference"
    )
    for name in ("outputs", "largest error", "limit", "seconds"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for outcome in report.outcomes:
        if outcome.problem is not None:
            result = f"[red]failed[/]: {escape(outcome.problem)}" if outcome.built else f"[yellow]{outcome.problem}[/]"
            table.add_row(outcome.case, "", "", "", "", "", result)
            continue
        worst = outcome.worst
        table.add_row(
            outcome.case,
            str(len(outcome.measured)),
            f"{worst.error:.1e}",
            f"{worst.limit:.0e}" if worst.limit else "exact",
            worst.tensor,
            f"{outcome.seconds:.1f}",
            "[green]passed[/]" if outcome.passed else "[red]past tolerance[/]",
        )
    console.print(table)
    passed = sum(o.passed for o in report.outcomes)
    waiting = sum(not o.built for o in report.outcomes)
    failed = len(report.outcomes) - passed - waiting
    console.print(f"{passed} cases passed, {failed} failed, {waiting} not built yet.")


def _read_case(folder: Path) -> Case:
    try:
        content = json.loads((folder / "case.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        roles = {name: entry["role"] for name, entry in content["tensors"].items()}
        case = Case(
            kind=content["case"],
            folder=folder,
            hyper=content["hyperparameters"],
            inputs={name: tensors[name] for name, role in roles.items() if role == "input"},
            expected={name: tensors[name] for name, role in roles.items() if role == "output"},
            tolerance=content["tolerance"],
        )
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise FixtureError(f"{folder} is not a complete case: {type(error).__name__} {error}.") from error
    find_case(case.kind)  # an unknown kind is an error before anything runs
    return case


def _run(case: Case) -> Outcome:
    name, start = case.folder.name, time.perf_counter()
    try:
        results = find_case(case.kind)(case)
    except NotBuilt as error:
        return Outcome(name, problem=str(error), built=False)
    except Exception as error:  # whatever breaks one case is its outcome; the others still run
        return Outcome(name, problem=f"{type(error).__name__}: {error}")
    per_tensor = case.tolerance.get("per_tensor", {})
    measured = tuple(
        Measured(key, _error(results.get(key), expected), per_tensor.get(key, case.tolerance["default"]))
        for key, expected in case.expected.items()
    )
    return Outcome(name, measured, seconds=time.perf_counter() - start)


def _error(result: Tensor | None, expected: Tensor) -> float:
    if result is None or result.shape != expected.shape or not result.isfinite().all():
        return float("inf")
    expected = expected.double()
    error = (result.detach().double() - expected).abs().max().item()
    scale = expected.abs().item() if expected.numel() == 1 else expected.std(correction=0).item()
    return error / scale if scale else error  # of a constant, the plain difference
