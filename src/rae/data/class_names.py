"""Names of classes from a file, for sources and models whose own are numbers or codes (n01440764)."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae.data.image_set import ImageError, Images


def name_classes(images: Images, file: str | Path, source: str) -> Images:
    """The same images, their classes named by a file.

    Args:
        images: with classes.
        file: see `read_class_names`; numbers count in the order of the classes.
        source: what to call the images in an error.

    Raises:
        ImageError: images without classes; or as `read_class_names`.
    """
    where = f"data.class_names={file}"
    if images.class_names is None:
        raise ImageError(f"{where} names classes, and {source} has none: take the key out.")
    names = read_class_names(file, images.class_names, where=where, whose=source)
    return dataclasses.replace(images, class_names=names)  # whose identity is that of their numbers


def read_class_names(file: str | Path, own: Sequence[str], *, where: str, whose: str) -> list[str]:
    """The names that a file gives to classes, in their order.

    Args:
        file: text with one name a line, or JSON (`.json`): a list of names, or an object from what the source calls a
            class, or its number, to its name (`{"n01440764": "tench"}`, which may know more classes than there are).
            Numbers, lines and lists count from 0 in the order of the classes; where the source calls all its classes
            by numbers, those are meant, since their order is that of text (0, 1, 10, 2).
        own: what the source calls them.
        where, whose: what to call the file and the source in an error.

    Raises:
        ImageError: a file that cannot be read, has too few or too many names, or gives two classes the same.
    """
    known, keys = _read(Path(file).expanduser(), where), own
    numbered = all(map(str.isdecimal, known))
    if numbered and not known.keys() >= {*own}:
        keys = [str(int(name)) for name in own] if all(map(str.isdecimal, own)) else [str(i) for i in range(len(own))]
    missing = [name for name, key in zip(own, keys) if key not in known]
    if missing or (numbered and len(known) > len(own)):
        which = f", and none of them for {missing[0]}" if missing else ""
        raise ImageError(
            f"{where} holds {len(known)} names, {whose} has {len(own)} classes{which}: give each class one."
        )
    names = {}  # and what the source calls them
    for name, key in zip(own, keys):
        if known[key] in names:
            raise ImageError(
                f"{where} calls both {names[known[key]]} and {name} {known[key]!r}: give each class a name of its own."
            )
        names[known[key]] = name
    return list(names)


def _read(path: Path, where: str) -> dict[str, str]:
    """The file's names by what they are names of; lines and lists count from 0."""
    try:
        text = path.read_text(encoding="utf-8")
        # an object as its pairs: of two equal keys, a dictionary would keep the last in silence
        read: Any = json.loads(text, object_pairs_hook=tuple) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ImageError(f"{where} cannot be read ({error}); it is text with a name a line, or .json.") from error
    pairs = read if isinstance(read, tuple) else enumerate(read if isinstance(read, list) else [read])
    names = {}
    for key, name in pairs:
        if not isinstance(name, str) or not name.strip():
            raise ImageError(f"{where}: the name of {key} is {name!r}; a name is text that is not empty.")
        if str(key) in names:
            raise ImageError(f"{where} gives {key} two names, {names[key]!r} and {name!r}; keep one.")
        names[str(key)] = name.strip()
    return names
