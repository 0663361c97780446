"""`rae experiment`: studies by name, and a study with what the command line changes of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rae.experiments import NAMES, find_study
from rae.experiments.runner import run_study


def list_studies() -> None:
    """Print every study: its question and its cost."""
    table = Table("study", "question", "cost")
    for name in NAMES:
        study = find_study(name)
        table.add_row(name, study.question, study.cost)
    Console().print(table)


def run_experiment(
    name: str,
    out: Path | None,
    *,
    seeds: int | None,
    quick: bool,
    source: str | None,
    work: Path | None,
    changes: Sequence[str],
) -> Path:
    """`run_study` of a name, with changes of its protocol as KEY=VALUE, the value in JSON or a bare word.

    Raises:
        ValueError: there is no such study, a change is no KEY=VALUE, and what `run_study` refuses.
    """
    changed = dict(map(_change, changes))
    return run_study(find_study(name), out, seeds=seeds, quick=quick, source=source, work=work, changes=changed)


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"--set {text!r} is not of the form KEY=VALUE, such as steps=100.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
