"""What a study is, and its rows as its rule reads them.

A study asks the paper one question. All of it is data, and stands before anything runs: what is done, with what, and
how the rows decide. A row is what came of one setting with one seed.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from rae.evaluation.report import Piece

Config = Mapping[str, Any]  # flat, of what JSON knows
Row = dict[str, Any]
Numbers = dict[str, float]


class Place(NamedTuple):
    """Where a run finds images, and where it may keep what others can use or what it would go on from.

    Attributes:
        source: of images, as `open_images` reads it; None for a study that reads none.
        work: a folder, made when something is put there. Numbers must not depend on what is in it.
    """

    source: str | None
    work: Path


class Summary(NamedTuple):
    """One number of one setting over its seeds; the standard deviation of a single seed is None."""

    mean: float
    std: float | None
    count: int


class Difference(NamedTuple):
    """Mean of a - b over the seeds that both have, its standard error (None for one seed), how many these are."""

    mean: float
    error: float | None
    count: int

    @classmethod
    def between(cls, a: Mapping[int, float], b: Mapping[int, float]) -> "Difference | None":
        """Of two numbers, seed => value each; None where they have no seed in common."""
        found = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
        if not found:
            return None
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
        return cls(statistics.fmean(found), error, len(found))

    @property
    def interval(self) -> tuple[float, float]:
        """mean ± q error, q the 95 % quantile of Student's t with count - 1 degrees of freedom (2.92 for 3 seeds).

        Where nothing but chance is at work the truth is above the interval once in twenty times, and as often below.
        """
        if self.error is None:
            return -math.inf, math.inf
        from scipy.special import stdtrit

        reach = float(stdtrit(self.count - 1, 0.95)) * self.error
        return self.mean - reach, self.mean + reach


class Results:
    """The rows of a study: `results["d = n", "loss"].mean`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def values(self, setting: str, number: str) -> dict[int, float]:
        """Seed => value."""
        return {row["seed"]: row["numbers"][number] for row in self.rows if row["setting"] == setting}

    def seeds(self, setting: str) -> set[int]:
        return {row["seed"] for row in self.rows if row["setting"] == setting}

    def __getitem__(self, key: tuple[str, str]) -> Summary:
        values = list(self.values(*key).values())
        if not values:
            raise KeyError(f"there is no row of {key[0]!r} yet")
        return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def difference(self, number: str, a: str, b: str) -> Difference | None:
        """a - b, seed by seed; None where they have no seed in common."""
        return Difference.between(self.values(a, number), self.values(b, number))


class Verdict(NamedTuple):
    """What the rows say of the paper's claim, and why, in words."""

    says: Literal["agrees", "does not agree", "cannot tell"]
    reason: str


@dataclass(frozen=True)
class Drawing:
    """A picture of what a study's models make, drawn once all its rows are there; no row depends on it.

    Attributes:
        protocol: what it is a function of beside the settings' configs and the rows. Its `seeds` are those that are
            shown, 0 among them, as far as there are rows of them.
        quick: what the quick form changes of it.
        cost: in words.
        draw: (protocol, setting => config, rows, place, say) => uint8 [H,W,3] and a caption. `say` prints a line of
            progress. What takes long it keeps in `place.work`, so that it goes on where it was killed.
    """

    protocol: Config
    quick: Config
    cost: str
    draw: Callable[[Config, Mapping[str, Config], Results, Place, Callable[[str], object]], tuple[np.ndarray, str]]


@dataclass(frozen=True)
class Study:
    """A question to the paper, and how it will be answered.

    Attributes:
        name: of the study and its files.
        question, claim: ours; the paper's, with its place and its own numbers.
        protocol: what all settings share: data, sizes, steps, batch, optimiser.
        settings: name => what it adds to the protocol, or changes of it.
        quick: what the quick form changes of both, so that all of it takes seconds. It shows that the code runs.
        cost: what all of it costs, in words.
        rule: how `judge` decides, in words; printed before the run.
        judge: rows of every setting => verdict.
        run: (protocol with the setting's own, setting, seed, place) => numbers. All that is random in it comes from
            `seed_of`. It takes minutes at most, or goes on by itself where it was killed.
        shown: number => heading of its column in the table.
        figures: of the rows that there are, which may be few: `curves` and `dots` of evaluation/report.py.
        drawing: its picture, if it has one.
        source: where its images come from unless the user says otherwise; None = it reads none. What they are is
            added to the protocol, as "data".
        seeds: how many, from 0; fewer than 3 where `cost` says why.
        paper: setting => number => what the paper has there, for the same column.
        pairs: (number, setting, setting) whose difference, seed by seed, is of interest.
    """

    name: str
    question: str
    claim: str
    protocol: Config
    settings: Mapping[str, Config]
    quick: Config
    cost: str
    rule: str
    judge: Callable[[Results], Verdict]
    run: Callable[[Config, str, int, Place], Numbers]
    shown: Mapping[str, str]
    figures: Callable[[Results], Sequence[Piece]]
    drawing: Drawing | None = None
    source: str | None = None
    seeds: int = 3
    paper: Mapping[str, Mapping[str, float]] | None = None
    pairs: Sequence[tuple[str, str, str]] = ()


def seed_of(*key: str | int) -> int:
    """A seed for whatever the key names, such as (study, setting, seed, "weights"): 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8]) >> 1


def draws(*key: str | int) -> torch.Generator:
    """A generator on the CPU that starts at `seed_of(*key)`."""
    return torch.Generator().manual_seed(seed_of(*key))
