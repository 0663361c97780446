"""What a person sees of a long job: a progress bar, a sheet of pictures."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rae.data.images import to_bytes
from rae.processes import process_state, warn_if_busy


@contextlib.contextmanager
def progress(
    title: str, total: int, *, start: int = 0, console: Console | None = None
) -> Iterator[Callable[[int, str], None]]:
    """A bar with images/s and time left; where there is no terminal, a line every 30 seconds. On a CPU that is busy
    with other work, its threads and remedy are told first.

    Yields:
        advance(done, note): `done` of `total` images are done.
    """
    if total > start:
        warn_if_busy()
    console = console or Console(stderr=True, quiet=not process_state().is_main_process)
    begun = last = time.monotonic()

    def speed(done: int) -> str:
        return f"{(done - start) / max(time.monotonic() - begun, 1e-9):,.1f} images/s"

    if not console.is_terminal:

        def advance(done: int, note: str = "") -> None:
            nonlocal last
            if (now := time.monotonic()) - last > 30:
                left = time_left((total - done) * (now - begun) / max(done - start, 1))
                console.print(f"{title}: {done:,} of {total:,} images, {speed(done)}, {left}  {note}", highlight=False)
                last = now

        yield advance
        return
    texts = ("{task.completed:,}/{task.total:,}", "{task.fields[speed]}", "{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(16), *map(TextColumn, texts), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=start, speed="", note="")
        yield lambda done, note="": bar.update(task, completed=done, speed=speed(done), note=note)


def time_left(seconds: float) -> str:
    """In seconds where that is less than two minutes."""
    return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


def save_sheet(rows: list[torch.Tensor], path: Path) -> np.ndarray:
    """Images side by side as one PNG.

    Args:
        rows: each a batch [B, 3, h, w] in [0, 1] (values outside are clamped), one row of the sheet.
        path: of the PNG.

    Returns:
        The sheet, uint8 [R*h, B*w, 3].
    """
    # rows of [B,3,h,w] -> one picture [R*h, B*w, 3]
    sheet = torch.cat([torch.cat(list(to_bytes(row)), dim=2) for row in rows], dim=1).permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.ascontiguousarray(sheet.cpu().numpy())
    Image.fromarray(picture).save(path)
    return picture
