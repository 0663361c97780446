"""Durations as people write them, in images as the loops count them."""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator

_FORM = re.compile(r"(\d+(?:\.\d+)?)(k|M)?(ep|st|img|%)")


def _check(text: Any) -> str:
    if not isinstance(text, str) or not _FORM.fullmatch(text):
        raise ValueError('a duration is a number with a unit: "80ep", "1000st", "5%", "500kimg", "1.5Mimg"')
    return text


Duration = Annotated[str, BeforeValidator(_check)]


def in_images(duration: Duration, *, batch: int, epoch: int, total: int | None = None) -> int:
    """A duration in images, rounded down to whole batches; arguments as of `exact_images`."""
    return int(exact_images(duration, batch=batch, epoch=epoch, total=total)) // batch * batch


def exact_images(duration: Duration, *, batch: int, epoch: int, total: int | None = None) -> Fraction:
    """A duration in images, and parts of one.

    Args:
        duration: a number with the unit ep (epochs), st (steps), img (images) or % (of `total`); k and M multiply.
        batch: images in a step.
        epoch: images in an epoch.
        total: images in the whole run; None where the run's own length is asked for, which cannot be a percentage.
    """
    number, prefix, unit = _FORM.fullmatch(duration).groups()
    if unit == "%" and total is None:
        raise ValueError(f"the length of a run cannot be {duration!r} of itself; give epochs, steps or images.")
    images = {"ep": epoch, "st": batch, "img": 1, "%": Fraction(total or 0, 100)}[unit]
    return Fraction(number) * {None: 1, "k": 1000, "M": 1000_000}[prefix] * images


def best_warning(evaluate: Duration, save: Duration, *, batch: int, epoch: int, total: int) -> tuple[str | None, int]:
    """What to say of steps that are judged and not saved, and so cannot become `best`; and how many can, but the last.

    Args:
        evaluate, save: the intervals.
        batch, epoch, total: as of `exact_images`.
    """
    intervals = (exact_images(each, batch=batch, epoch=epoch, total=total) for each in (evaluate, save))
    judged, saved = ({*steps(each, batch=batch, total=total)} - {total // batch} for each in intervals)
    both = len(judged & saved)
    if both == len(judged):
        return None, both
    return (
        f"held-out images are judged every {evaluate} and checkpoints saved every {save}: `best` is chosen among "
        f"{both + 1:,} of the {len(judged) + 1:,} steps that are judged, the last one{' among them' * (both > 0)}.\n"
        f"run.save_every={evaluate} saves all that are judged, run.evaluate_every={save} judges all that are saved."
    ), both


def steps(every: Fraction, *, batch: int, total: int) -> Iterator[int]:
    """The steps after which something is due that is to be done every so many images: the first at or past each."""
    every = max(every, Fraction(batch))
    return (math.ceil(k * every / batch) for k in range(1, int(total / every) + 1))


def start_warning(key: str, start: Duration, duration: Duration) -> str:
    """What to say of a part of the training, at this key of the recipe, whose start is not within the run's length."""
    return (
        f"{key}: {start} is not before the end of the run ({duration}): it will not begin.\nAn earlier start, or a "
        "longer run.duration; a section that is left out needs no network."
    )
