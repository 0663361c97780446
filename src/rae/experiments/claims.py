"""How studies of trained models decide, and show their settings side by side.

A claim says that a difference, taken seed by seed, is above 0. It holds if its interval (`Difference.interval`) is
above 0, and that of a second metric, where there is one, is not below; it fails if its interval is below 0 and that of
the second metric not above; else it is open.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from rae.evaluation.report import Piece, dots
from rae.experiments.frame import Difference, Results, Verdict

DINO, NET = "FD of DINOv2's class tokens", "FD of the judge's features"  # what plots call the two metrics
HEADINGS = {"fd_dino": "FD, DINOv2", "fd_net": "FD, judge"}  # and tables
RULE = (
    "A claim holds if the difference that it is about is above 0 by the interval of its mean over the seeds (± the "
    "95 % quantile of Student's t times the standard error), and the second metric's is not below 0 by its own; it "
    "fails if its interval is below 0 and the second metric's not above; else it is open. Agrees if all claims hold, "
    "does not agree if one fails, cannot tell otherwise. The metric that decides is the Frechet distance (FD) of class "
    "tokens of DINOv2-S at 56 px, the second one that of features of a small network trained on the images alone."
)
AGAIN = (
    "This is the second run. The first one's decoders were trained for 1,500 steps, and their own distance was nine "
    "tenths of that of all they decoded; claims and rule are unchanged. Seen before: the first run, and of decoders of "
    "6,000 steps reconstructions by those of tau 0 and 0.8, and samples of one model (LOG.md)."
)


class Claim(NamedTuple):
    """What is said, and differences that are above 0 if it is true: of the metric that decides, of a second one."""

    says: str
    difference: Difference | None
    second: Difference | None = None

    @property
    def finding(self) -> Literal["holds", "fails", "open"]:
        low, high = _interval(self.difference)
        second_low, second_high = _interval(self.second)
        if low > 0 and second_high >= 0:
            return "holds"
        return "fails" if high < 0 and second_low <= 0 else "open"

    def __str__(self) -> str:
        second = f", {_text(self.second)} by the second metric" if self.second else ""
        return f"{self.says}: {self.finding} ({_text(self.difference)}{second})"


def _interval(difference: Difference | None) -> tuple[float, float]:
    return difference.interval if difference else (-math.inf, math.inf)


def _text(difference: Difference | None) -> str:
    if difference is None:
        return "not measured"
    spread = "one seed" if difference.error is None else f"± {difference.error:.2g}, {difference.count} seeds"
    return f"{difference.mean:+.3g}, {spread}"


def better(results: Results, says: str, this: str, than: str) -> Claim:
    """The claim that one setting's samples are better than another's, by fd_dino and, as second metric, fd_net."""
    return Claim(says, *(results.difference(number, than, this) for number in ("fd_dino", "fd_net")))


def by_setting(results: Results, settings: Iterable[str], titles: Mapping[str, str]) -> list[Piece]:
    """For each number => title a plot: means over the seeds, with their standard errors."""

    def mean_and_error(setting: str, number: str) -> tuple[float, float | None] | None:
        if not results.seeds(setting):
            return None
        mean, std, count = results[setting, number]
        return mean, None if std is None else std / math.sqrt(count)

    settings = list(settings)
    return [
        dots({setting: mean_and_error(setting, number) for setting in settings}, title, "mean ± standard error")
        for number, title in titles.items()
    ]


def decide(claims: Sequence[Claim], besides: str = "") -> Verdict:
    """The verdict of all claims by `RULE`; `besides` is said and decides nothing."""
    findings = {claim.finding for claim in claims}
    says = "does not agree" if "fails" in findings else "cannot tell" if "open" in findings else "agrees"
    return Verdict(says, "; ".join(map(str, claims)) + "." + (f" {besides}" if besides else ""))
