"""Parity with reference fixtures: run every case of a folder through our code and measure the largest error.

The error of an output is max |result - expected| / std(expected), and for a single number the relative difference.
`fixtures.py` says what a case is, `cases.py` holds one function per kind of case.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from rae.interop.cases import find_case
from rae.interop.fixtures import Case, FixtureError


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
    """

    case: str
    measured: tuple[Measured, ...] = ()
    problem: str | None = None
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
        """0 if every case passed, 1 if one broke or is past its tolerance."""
        return 0 if all(outcome.passed for outcome in self.outcomes) else 1


def verify(folder: str | Path) -> Report:
    """Run every case in `folder` (its subfolders with a case.json, or itself if it is a case).

    Raises:
        FixtureError: no case there, an incomplete one, or one of an unknown kind.
    """
    folder = Path(folder)
    folders = sorted(path.parent for path in [*folder.glob("case.json"), *folder.glob("*/case.json")])
    if not folders:
        raise FixtureError(f"{folder} holds no case: neither it nor a folder in it has a case.json.")
    cases = [Case.read(path) for path in folders]
    for case in cases:
        find_case(case.kind)  # an unknown kind is an error before anything runs
    progress = track(cases, "verify", console=Console(stderr=True), transient=True)
    return Report(tuple(_run(case) for case in progress))


def print_report(report: Report, console: Console | None = None) -> None:
    """A table with the error of every case, of the output nearest to its limit, and one line that sums it up."""
    console = console or Console()
    # a narrow terminal folds the columns of words: a case's name and figures are whole
    table = Table(title="parity with the reference: each case's n outputs, and the one nearest its limit")
    table.add_column("case", no_wrap=True, min_width=max(len(outcome.case) for outcome in report.outcomes))
    for header, width in (("n", 2), ("error", 7), ("limit", 5), ("s", 3)):
        table.add_column(header, justify="right", no_wrap=True, min_width=width)
    table.add_column("of output", overflow="fold")
    table.add_column("result", overflow="fold", min_width=6)
    for outcome in report.outcomes:
        if outcome.problem is not None:
            table.add_row(escape(outcome.case), "", "", "", "", "", f"[red]failed[/]: {escape(outcome.problem)}")
            continue
        worst = outcome.worst
        table.add_row(
            escape(outcome.case),
            str(len(outcome.measured)),
            f"{worst.error:.1e}",
            f"{worst.limit:.0e}" if worst.limit else "exact",
            f"{outcome.seconds:.1f}",
            escape(worst.tensor),
            "[green]passed[/]" if outcome.passed else "[red]past limit[/]",
        )
    console.print(table)
    passed = sum(o.passed for o in report.outcomes)
    console.print(f"{passed} cases passed, {len(report.outcomes) - passed} failed.")


def _run(case: Case) -> Outcome:
    name, start = case.folder.name, time.perf_counter()
    try:
        results = find_case(case.kind)(case)
    except Exception as error:  # whatever breaks one case is its outcome; the others still run
        return Outcome(name, problem=f"{type(error).__name__}: {error}")
    measured = tuple(
        Measured(key, _error(results.get(key), expected), case.limits.get(key, case.default_limit))
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
