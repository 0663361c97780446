"""Durations as people write them, in images as the loops count them."""

import re
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
    """A duration in images, rounded down to whole batches.

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
    return int(Fraction(number) * {None: 1, "k": 1000, "M": 1000_000}[prefix] * images) // batch * batch


def start_warning(key: str, start: Duration, duration: Duration) -> str:
    """What to say of a part of the training, at this key of the recipe, whose start is not within the run's length."""
    return (
        f"{key}: {start} is not before the end of the run ({duration}): it will not begin.\nAn earlier start, or a "
        "longer run.duration; a section that is left out needs no network."
    )
