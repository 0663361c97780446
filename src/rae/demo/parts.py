"""Parts of the demo, each done once: what it found and what it took are kept, so that a stopped demo goes on."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from rae.config import Config, read_json
from rae.demo.measure import Findings
from rae.evaluation.report import Figure
from rae.folders import aside


class Part(Config):
    """parts/NAME.json: what a part found and took. A kill -9 loses the time since it was begun or resumed."""

    title: str
    done: bool = False
    seconds: float = 0.0
    memory_mib: float = 0.0  # largest resident memory of the process meanwhile
    figures: tuple[Figure, ...] = ()

    @property
    def cost(self) -> list[str]:
        return [self.title, f"{self.seconds // 60:.0f} min {self.seconds % 60:.0f} s", f"{self.memory_mib:,.0f} MiB"]


class Parts:
    """A folder of parts: NAME.json, and NAME.npz with the pictures.

    Attributes:
        done: what each part took, in the order of the demo.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console, self.done = folder, console, []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, title: str, work: Callable[[], Findings | None]) -> Findings:
        """What `work` finds, or found when it was done before."""
        record, pictures = self.folder / f"{name}.json", self.folder / f"{name}.npz"
        part = read_json(Part, record) if record.exists() else Part(title=title)
        if part.done:
            self.console.print(f"[bold]{escape(title)}[/]: done before", highlight=False)
        else:
            self.console.rule(f"[bold]{escape(title)}", align="left")
            part = self._attempt(part, work, record, pictures)
        self.done.append(part)
        with np.load(pictures) as file:
            return Findings(dict(file), part.figures)

    def _attempt(self, part: Part, work: Callable[[], Findings | None], record: Path, pictures: Path) -> Part:
        start = time.monotonic()
        with suppress(OSError):  # on Linux this resets the peak; elsewhere it stays that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
        try:
            found = work() or Findings()
            np.savez_compressed(pictures, **found.pictures)
            part = part.model_copy(update={"done": True, "figures": tuple(found.figures)})
        finally:
            peak = max(part.memory_mib, _peak_memory_mib())
            spent = {"seconds": part.seconds + time.monotonic() - start, "memory_mib": peak}
            part = part.model_copy(update=spent)
            with aside(record) as hidden:
                hidden.write_text(part.model_dump_json(indent=1))
        return part


def total(parts: Sequence[Part]) -> Part:
    return Part(title="all parts", seconds=sum(p.seconds for p in parts), memory_mib=max(p.memory_mib for p in parts))


def _peak_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
