"""Runs of one stage side by side: what their recipes ask for differently, their logs as curves, their newest sheets."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rae.commands.compare_read import Compared, RunFiles
from rae.commands.pictures import OutputError, read_picture
from rae.evaluation.report import WIDE, Piece, beside, code, curves, folded, heading, note, paragraph, sheet, table

# figure of the log => title, unit; in this order, and other held-out figures behind the known ones
FIGURES = {
    "loss": ("training loss", "loss"),
    "held_out_l1": ("held-out images: L1", "L1"),
    "held_out_psnr": ("held-out images: PSNR", "dB"),
    "held_out_ssim": ("held-out images: SSIM", "SSIM"),
    "held_out_fd": ("held-out images: Frechet distance in the run's encoder", "distance"),
    "held_out_rfid": ("held-out images: rFID", "rFID"),
    "held_out_loss": ("held-out loss, averaged weights", "loss"),
    "held_out_loss_online": ("held-out loss, weights before averaging", "loss"),
    "lr": ("learning rate", "lr"),
    "images_per_second": ("speed", "images/s"),
}
UNITS = {"dB", "images/s"}  # that are not the figure's name again
HIGHER = {"held_out_psnr", "held_out_ssim"}  # are better when higher
WIDTH = 896  # of a sheet on the screen, in pixels
ABSENT = object()
# figures of the log => beginnings of the keys that decide what they are of
_DATA = ("data.source", "data.image", "encoder.image_size", "rae", "flow.")
DECIDE = {
    "Training losses": (*_DATA, "loss.", "noise."),
    "Held-out figures": (*_DATA, "data.held_out", "run.evaluate_images", "encoder.name"),
}


def runs(compared: Sequence[Compared]) -> list[Piece]:
    """The section of the runs of one stage."""
    found = {each.name: each.run for each in compared}
    pieces = recipes({name: run.recipe for name, run in found.items()}) + judges(found)
    told = {name: [*run.doubts, *_told(run)] for name, run in found.items()}
    pieces += [note(f"{name}: {text}") for name, texts in told.items() for text in texts]
    return [*pieces, *logs(found), *sheets(found)]


# --- recipes ---------------------------------------------------------------------------------------------------------


class Recipes(NamedTuple):
    """Keys of several recipes, dotted => a value for each recipe, or one for all.

    Attributes:
        different: keys whose values differ.
        within: keys of a section that not every recipe has; those that have it have them, and agree.
        same: keys that are the same in all.
    """

    different: dict[str, list[Any]]
    within: dict[str, Any]
    same: dict[str, Any]


def compare_recipes(recipes: Sequence[Mapping[str, Any]]) -> Recipes:
    """Sort the keys of recipes by whether they differ."""
    found = Recipes({}, {}, {})
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    parts = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    keys.sort(key=lambda key: parts.index(key.partition(".")[0]))
    for key in keys:
        values = [recipe.get(key, ABSENT) for recipe in recipes]
        given = [value for value in values if value is not ABSENT]
        agree = all(value == given[0] for value in given)
        section = any(other.startswith(f"{key}.") for other in keys)
        without = [recipe for recipe in recipes if key not in recipe]
        inside = all(any(key.startswith(f"{name}.") for name, value in r.items() if value is None) for r in without)
        if section:
            found.different[key] = ["off" if value is None else "on" for value in values]
        elif agree and len(given) == len(values):
            found.same[key] = given[0]
        elif agree and inside:
            found.within[key] = given[0]
        else:
            found.different[key] = values
    return found


def recipes(found: Mapping[str, Mapping[str, Any]], what: str = "recipe") -> list[Piece]:
    """What differs between recipes, or protocols, and what does not folded away."""
    if len(found) == 1:
        ((_, recipe),) = found.items()
        return [code(_lines(recipe), what)]
    different, within, same = compare_recipes(list(found.values()))
    pieces = [heading(f"What differs between the {what}s")]
    if different:
        rows = [[key, *map(_shown, values)] for key, values in different.items()]
        pieces.append(table(["key", *found], rows))
    else:
        pieces.append(paragraph(f"Nothing: the same {what}."))
    if within:
        pieces.append(code(_lines(within), f"the same wherever the section is on ({_keys(within)})"))
    return [*pieces, code(_lines(same), f"the same in all ({_keys(same)})")]


def _keys(found: Mapping[str, Any]) -> str:
    return f"{len(found)} key{'s' * (len(found) != 1)}"


def _lines(recipe: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {_shown(value)}" for key, value in recipe.items())


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "not given"
    return value if isinstance(value, str) else json.dumps(value)


def judges(found: Mapping[str, RunFiles]) -> list[Piece]:
    """The networks that judged what stage 1 decodes."""
    terms = dict.fromkeys(term for run in found.values() for term in run.judges)
    rows = [[term, *(run.judges.get(term, "-") for run in found.values())] for term in terms]
    return [heading("Networks that judge"), table(["what", *found], rows)] if rows else []


# --- logs ------------------------------------------------------------------------------------------------------------


def logs(found: Mapping[str, RunFiles]) -> list[Piece]:
    """Newest figures, curves, and the loss by time."""
    names = _figures(found.values())
    empty = [name for name, run in found.items() if not run.lines]
    pieces = [note(f"{', '.join(empty)}: nothing is logged yet.")] if empty else []
    if not names:
        return pieces
    known = [name for name in names if name in FIGURES or name.startswith("held_out_")]
    shown = [*(name for name in FIGURES if name in known), *(name for name in known if name not in FIGURES)]
    pieces += [heading("Figures of the logs"), table(["figure", *found], _newest(found, shown))]
    pieces.append(paragraph("The newest value of each. A log knows no errors; rae evaluate does."))
    pieces += map(note, _incomparable(found))
    pieces.append(beside(*(_curves(found, name) for name in shown), *_by_time(found)))
    if others := [name for name in names if name not in shown]:
        plots = [_curves(found, name) for name in others]
        pieces.append(folded(f"other figures of the logs ({len(others)})", beside(*plots)))
    return pieces


def _figures(found: Sequence[RunFiles]) -> list[str]:
    """Names of numbers in the logs, but those of bins of time."""
    names = {}
    for run in found:
        for line in run.lines:
            names |= {k: None for k, v in line.items() if isinstance(v, int | float) and "/" not in k}
    return [name for name in names if name != "images"]


def _newest(found: Mapping[str, RunFiles], names: Sequence[str]) -> list[list[str]]:
    rows = [["images seen", *(f"{run.seen:,}" for run in found.values())]]
    for name in names:
        title, unit = FIGURES.get(name, (name, ""))
        cells, unit = [], f" {unit}" if unit in UNITS else ""
        for run in found.values():
            images, values = run.series(name)
            text = f"{values[-1]:.4g}{unit}" if values else "-"
            if len(values) > 1 and name.startswith("held_out_"):
                best = (max if name in HIGHER else min)(range(len(values)), key=values.__getitem__)
                text += f"\nbest {values[best]:.4g}{unit} at {images[best]:,} images"
            cells.append(text)
        rows.append([f"{title}\n{name}", *cells])
    return rows


def _curves(found: Mapping[str, RunFiles], name: str) -> Piece:
    series = {label: run.series(name) for label, run in found.items()}
    title, unit = FIGURES.get(name, (name, ""))
    values = [value for _, values in series.values() for value in values if math.isfinite(value)]
    wide = name not in ("lr", "images_per_second") and min(values, default=0) > 0
    return curves(series, title, "images seen", unit, log=wide and max(values) > WIDE * min(values))


def _by_time(found: Mapping[str, RunFiles]) -> list[Piece]:
    """Stage 2's held-out loss over the time of the flow, of the newest line that has it."""
    series, prefix = {}, "held_out_loss/"
    for name, run in found.items():
        line = next((line for line in reversed(run.lines) if any(key.startswith(prefix) for key in line)), {})
        bins = {float(key.removeprefix(prefix)) + 0.05: value for key, value in line.items() if key.startswith(prefix)}
        series[name] = list(bins), list(bins.values())
    title = "newest held-out loss by time: 0 is data, 1 is noise"
    return [curves(series, title, "t", "loss")] if any(times for times, _ in series.values()) else []


def _incomparable(found: Mapping[str, RunFiles]) -> Iterator[str]:
    """Which figures of the logs do not compare, since the recipes differ in what decides them."""
    different = compare_recipes([run.recipe for run in found.values()]).different
    for what, keys in DECIDE.items():
        if of := [key for key in different if key.startswith(keys)]:
            yield f"{what} do not compare, for the recipes differ in {', '.join(of)}."


def _told(run: RunFiles) -> list[str]:
    """What training said of itself, and when."""
    said = {text: line["images"] for line in run.lines for key in ("warning", "stopped") if (text := line.get(key))}
    return [f"training said at {images:,} images: {text}" for text, images in said.items()]


# --- sheets ----------------------------------------------------------------------------------------------------------


def sheets(found: Mapping[str, RunFiles]) -> list[Piece]:
    """The newest sheet of each run, row by row of the same kind; the newest that all have where that is another one."""
    unreadable, newest = [], {}
    for name, run in found.items():
        for path in reversed(run.sheets):
            try:
                read_picture(path)
            except OutputError:
                unreadable.append(f"{name}: {path.name} is damaged, or being written; an older sheet is shown.")
                continue
            newest[name] = path
            break
    pieces = [heading("Newest sheets"), *map(note, unreadable), *_sheet(found, newest)] if newest else []
    moments = {path.stem for path in newest.values()}
    common = set.intersection(*({path.stem for path in found[name].sheets} for name in newest)) if newest else set()
    if len(moments) > 1 and common:
        same = {name: next(path for path in found[name].sheets if path.stem == max(common)) for name in newest}
        pieces += [heading("Sheets at the same number of images seen"), *_sheet(found, same)]
    return pieces


def _sheet(found: Mapping[str, RunFiles], paths: Mapping[str, Path]) -> list[Piece]:
    strips = {name: _strips(found[name], read_picture(path)) for name, path in paths.items()}
    originals = [own["original"] for own in strips.values() if "original" in own]
    shared = len(originals) > 1 and all(np.array_equal(one, originals[0]) for one in originals)
    rows = {"original": originals[0]} if shared else {}
    kinds = list(dict.fromkeys(kind for own in strips.values() for kind in own))
    # of the same kind below each other, but originals that differ above what was made of them
    order = [(name, kind) for kind in kinds for name in strips] if found[next(iter(paths))].stage == 2 else []
    for name, kind in order or [(name, kind) for name in strips for kind in kinds]:
        if kind in strips[name] and not (shared and kind == "original"):
            label = kind if len(paths) == 1 else name if kind == "decoded" else f"{name}: {kind}"
            rows[label] = strips[name][kind]
    moments = {name: f"{int(path.stem):,}" for name, path in paths.items()}
    seen = ", ".join(f"{name} {images}" for name, images in moments.items())
    seen = moments[next(iter(moments))] if len(set(moments.values())) == 1 else seen
    what = "Samples of the same seeds and classes in turn"
    if next(iter(found.values())).stage == 1:
        held_out = {bool(run.recipe[key]) if (key := "data.held_out") in run.recipe else None for run in found.values()}
        whose = {(True,): "Held-out images", (False,): "Training images"}.get((*held_out,), "Images")
        what = f"{whose} and their reconstructions"
    shown = [row[None] for row in rows.values()]
    return [sheet(shown, f"{what}. Images seen: {seen}.", names=list(rows), size=WIDTH)]


def _strips(run: RunFiles, picture: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of a sheet by what they show, uint8 [h,W,3] each."""
    if run.stage == 1:
        return dict(zip(("original", "decoded"), np.split(picture, 2)))
    recipe = run.recipe
    if not {"sheet.cfg", "sheet.images"} <= recipe.keys() or recipe["sheet.cfg"] is None:
        return {"samples": picture}
    side = picture.shape[1] / recipe["sheet.images"]  # a model without classes has no second row, whatever was asked
    if round(picture.shape[0] / side) < 2 or picture.shape[0] % 2:
        return {"samples": picture}
    return dict(zip(("no guidance", f"CFG {recipe['sheet.cfg']:g}"), np.split(picture, 2)))
