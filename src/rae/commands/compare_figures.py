"""Figures of several evaluations side by side: what may stand in one row, and which differences are more than error."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rae.commands.compare_read import Compared, Evaluation, Judged, made_by
from rae.commands.compare_runs import recipes
from rae.commands.reference import UNKNOWN
from rae.evaluation.judge import AMONG_REAL
from rae.evaluation.report import WIDE, Piece, beside, dots, heading, note, paragraph, table
from rae.evaluation.uncertainty import BOUNDS, written

DIFFERENT = 2  # standard errors of a difference, beyond which it is called one
# behind a title, never below it
ARROWS = {
    "lower": "\N{NO-BREAK SPACE}↓",
    "higher": "\N{NO-BREAK SPACE}↑",
    "nearer to 1": "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}1",
}
HOW = (
    "Value ± its standard error; below, the difference to the first one of the row and its error, √(e₁² + e₂²). A "
    f"difference of up to {DIFFERENT} such errors is called within error; of twenty figures that do not differ, one "
    "goes beyond by chance."
)


class Row(NamedTuple):
    """One figure by one protocol: of each evaluation, or None."""

    name: str
    figures: list[Judged | None]

    @property
    def one(self) -> Judged:
        """Any of them, for what they share."""
        return next(figure for figure in self.figures if figure)

    @property
    def one_error(self) -> bool:
        """Whether their errors are of one kind, which is said once then."""
        return len({figure.error_of for figure in self.figures if figure}) == 1


def figures(compared: Sequence[Compared]) -> list[Piece]:
    """The section: a table of those of as many images against the same ones, others in others, and why."""
    judged = {each.name: each.evaluation for each in compared if each.evaluation}
    groups: dict[str, dict[str, Evaluation]] = {}
    for name, one in judged.items():
        groups.setdefault(json.dumps(_against(one), sort_keys=True), {})[name] = one
    pieces = [note(text) for text in apart(list(judged.values()))]
    for group in groups.values():
        if len(groups) > 1:
            pieces.append(heading(", ".join(group)))
        pieces += _group(group)
    return pieces


def _group(judged: Mapping[str, Evaluation]) -> list[Piece]:
    """A table in which each row has one protocol, flags, and a plot of each row that has two values."""
    found = rows(list(judged.values()))
    lines = [[_title(row), *_cells(row)] for row in found]
    flags = ["flags", *(_listed(of.flags, "flag") for of in judged.values())]
    missing = [[f"{each.title}: {each.why}" for each in of.left_out.values()] for of in judged.values()]
    lines += [["left out", *(_listed(each, "figure") for each in missing)]] if any(missing) else []
    pieces = [table(["figure", *judged], [_about(judged), flags, *lines])]
    bounds = any(figure.bound is not None for of in judged.values() for figure in of.figures.values())
    pieces.append(paragraph((HOW if len(judged) > 1 else "Value ± its standard error.") + f" {BOUNDS}" * bounds))
    plots = []
    for row in found:
        values = [figure and (figure.value, figure.error) for figure in row.figures]
        finite = [value for value, _ in filter(None, values) if math.isfinite(value)]
        if len(finite) > 1:
            # a distance that is many times the others' would push these together
            wide = row.one.better == "lower" and 0 < WIDE * min(finite) < max(finite)
            axis = f"{row.one.better} is better{', logarithmic' * wide}"
            plots.append(dots(dict(zip(judged, values)), row.one.title or row.name, axis, log=wide))
    pieces += [beside(*plots)] if plots else []
    made = {name: made_by(one.subject.protocol) for name, one in judged.items()}
    return pieces + (recipes(made, "protocol") if any(made.values()) else [])


def rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """A row for each figure; as many of one name as there are protocols that do not compare."""
    found: dict[tuple[str, str], list[Judged | None]] = {}
    for column, evaluation in enumerate(evaluations):
        for name, figure in evaluation.figures.items():
            key = name, json.dumps(protocol(evaluation, name), sort_keys=True)
            found.setdefault(key, [None] * len(evaluations))[column] = figure
    names = list(dict.fromkeys(name for name, _ in found))
    return [Row(name, line) for wanted in names for (name, _), line in found.items() if name == wanted]


def _against(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "number of images": evaluation.subject.images,
        "reference": evaluation.reference.model_dump(mode="json", include={"images", "identity", "size", "crop"}),
    }


def protocol(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """What two figures of a name must share to be compared."""
    figure = evaluation.figures[name]
    return _against(evaluation) | {
        "extractor": evaluation.extractors.get(name.partition("/")[2]),
        "protocol": figure.protocol.partition(AMONG_REAL)[0],  # of the same reference, however it was measured
        "better": figure.better,
    }


def apart(evaluations: Sequence[Evaluation]) -> list[str]:
    """Why figures of a name stand in several rows; names with the same reasons share a sentence."""
    why: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.figures):
        protocols = [protocol(each, name) for each in evaluations if name in each.figures]
        if others := [key for key in protocols[0] if any(one[key] != protocols[0][key] for one in protocols)]:
            title = next(each.figures[name].title for each in evaluations if name in each.figures)
            why.setdefault(", ".join(others), []).append(title or name)
    return [
        f"Not side by side, because they do not compare: {', '.join(names)} (different: {reason})."
        for reason, names in why.items()
    ]


def verdict(first: Judged, other: Judged) -> str:
    """The difference of two figures of one protocol, and whether it is one."""
    error = math.hypot(first.error, other.error) if first.error and other.error else None
    difference = other.value - first.value
    if other.better == "nearer to 1":
        return told(difference, error, "lower", abs(other.value - 1) - abs(first.value - 1))
    return told(difference, error, other.better)


def told(difference: float, error: float | None, better: str, gain: float | None = None) -> str:
    """A difference to the first one, and a word for it; `gain`: what the word is for, where that is something else."""
    if not math.isfinite(difference):
        return "not finite"
    if error is None:
        return f"{difference:+.3g}, no error known"
    word = call(difference if gain is None else gain, error, better)
    return f"{'' if difference < 0 else '+'}{written(difference, error)}: {word}"


def call(difference: float, error: float, better: str) -> str:
    """A word for a difference to the first one, and whether it is more than error."""
    if abs(difference) <= DIFFERENT * error:
        return "within error"
    return "better" if (difference < 0) == (better == "lower") else "worse"


def _title(row: Row) -> str:
    said = f"; {row.one.error_of}" if row.one.error_of and row.one_error else ""
    return f"{row.one.title or row.name}{ARROWS[row.one.better]}\n{row.one.protocol}{said}"


def _cells(row: Row) -> list[str]:
    first, cells = None, []
    for figure in row.figures:
        cells.append(written(figure.value, figure.error, figure.bound) if figure else "-")
        if figure and figure.error_of and not row.one_error:
            cells[-1] += f"\n{figure.error_of}"
        if first and figure:
            cells[-1] += f"\n{verdict(first, figure)}"
        first = first or figure
    return cells


def _listed(lines: Sequence[str], what: str) -> str:
    count = f"{len(lines)} {what}{'s' * (len(lines) > 1)}" if lines else "none"
    return "\n".join([count, *(f"• {line}" for line in lines)])


def _about(judged: dict[str, Evaluation]) -> list[str]:
    """What was judged and against what, of each column."""
    cells = ["judged, against"]
    for evaluation in judged.values():
        subject, reference = evaluation.subject, evaluation.reference
        whose = "" if reference.role == UNKNOWN else f", {reference.role} of the run"
        pairs = subject.kind == "reconstructions" and subject.source == reference.source
        against = "what they are of" if pairs else f"{reference.images:,} of {reference.source}"
        cells.append(
            f"{subject.images:,} {subject.kind}\n{subject.source}\nagainst {against}"
            f" ({(reference.identity or 'unknown')[:12]}){whose}"
        )
    return cells
