"""Folders of pictures side by side: reconstructions of the same images, their failures; samples of the same seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rae.commands.compare_figures import ARROWS, DIFFERENT, told
from rae.commands.compare_read import Compared, Pictures, made_by
from rae.commands.compare_runs import recipes
from rae.commands.pictures import read_picture
from rae.evaluation.report import Piece, heading, note, paragraph, sheet, table
from rae.evaluation.uncertainty import measured_mean, written

SHOWN = 8  # images in a row
ROWS = 4  # of samples, all folders together, where there are that many of the same seeds
FIGURES = {"psnr": ("PSNR / dB", "{:.1f} dB"), "ssim": ("SSIM", "{:.3f}")}


def shown_width(width: int) -> int:
    """Pixels on the screen: small images are enlarged by a whole number, as far as eight fit into a page."""
    return width * max(1, 112 // width)


# --- reconstructions -------------------------------------------------------------------------------------------------


def reconstructions(compared: Sequence[Compared]) -> list[Piece]:
    """Each set of images by itself: figures, the same images from all folders, and those that are worst."""
    groups: dict[tuple, dict[str, Pictures]] = {}
    for each in compared:
        if each.reconstructions:
            protocol = each.reconstructions.protocol
            groups.setdefault((protocol["source"], *protocol["size"]), {})[each.name] = each.reconstructions
    pieces = []
    if len(groups) > 1:
        pieces.append(note("Not all are of the same images at the same size: each set stands by itself."))
    for (source, height, width), group in groups.items():
        if len(groups) > 1:
            pieces.append(heading(f"{', '.join(group)}: {height} x {width} pixels, images {source[:12]}"))
        pieces += _group(group)
    return pieces


def _group(group: Mapping[str, Pictures]) -> list[Piece]:
    rows = {name: pictures.rows for name, pictures in group.items()}
    common = sorted(set.intersection(*map(set, rows.values())))
    if not common:
        return [note(f"{', '.join(group)} have no image in common, so nothing is compared.")]
    names = [name for name in FIGURES if all(own[i][name] is not None for own in rows.values() for i in common)]
    values = {name: {label: np.array([own[i][name] for i in common]) for label, own in rows.items()} for name in names}
    pieces = [_figures(values, list(group))]
    more = [f"{name} ({len(own):,} images)" for name, own in rows.items() if len(own) > len(common)]
    text = f"Mean over {len(common):,} images ± its standard error."
    if more:
        text = f"Mean over the {len(common):,} images that all have ± its standard error; more have {', '.join(more)}."
    if len(group) > 1:
        text += (
            " Below, the mean of the differences to the first column, image by image, and the error of that mean; "
            f"within error is what lies within {DIFFERENT} of these."
        )
    pieces += [
        paragraph(text),
        *recipes({name: made_by(pictures.protocol) for name, pictures in group.items()}, "protocol"),
    ]
    there = [i for i in common if all(i in pictures.files for pictures in group.values())]
    if not there:
        return [*pieces, note("Their pictures are gone, so none are shown.")]
    at = [common.index(i) for i in there]
    first = next(iter(names))
    seen = _pairs(group, there, values[first], at, first, range(SHOWN), "The first ones.")
    pieces += [heading("Images and reconstructions"), seen]
    for name in names:
        title = FIGURES[name][0].partition(" ")[0]
        lowest = np.min([own[at] for own in values[name].values()], axis=0)
        worst = np.argsort(lowest, kind="stable")
        pieces.append(heading(f"Failures: the worst by {title}"))
        order = "The worst first" + (", of any row." if len(group) > 1 else ".")
        pieces.append(_pairs(group, there, values[name], at, name, worst[:SHOWN].tolist(), order))
    return pieces


def _figures(values: Mapping[str, Mapping[str, np.ndarray]], group: Sequence[str]) -> Piece:
    lines = []
    for name, own in values.items():
        first, *others = map(torch.from_numpy, own.values())
        cells = [written(*measured_mean(first))]
        for each in others:
            difference = measured_mean(each - first)
            said = told(difference.value, difference.error, "higher")
            cells.append(f"{written(*measured_mean(each))}\n{said}")
        lines.append([f"{FIGURES[name][0]}{ARROWS['higher']}", *cells])
    return table(["figure", *group], lines)


def _pairs(
    group: Mapping[str, Pictures],
    numbers: Sequence[int],
    values: Mapping[str, np.ndarray],
    at: Sequence[int],
    figure: str,
    chosen: Sequence[int],
    order: str,
) -> Piece:
    """A sheet: originals, and below them what each folder has made of them, with one of its figures.

    Args:
        numbers: of the images that all folders have.
        values: of the figure, by folder; those of the images are `at` these places.
        chosen: places in `numbers`.
        order: how they were chosen, in words.
    """
    chosen = [place for place in chosen if place < len(numbers)]
    rows, under = [], [[]]
    for name, pictures in group.items():
        pairs = [np.split(read_picture(pictures.files[numbers[place]]), 2, axis=1) for place in chosen]
        rows += [np.stack([original for original, _ in pairs])] if not rows else []
        rows.append(np.stack([decoded for _, decoded in pairs]))
        under.append([FIGURES[figure][1].format(values[name][at[place]]) for place in chosen])
    names = ["original", *(group if len(group) > 1 else ["decoded"])]
    columns = [f"{numbers[place]:06d}" for place in chosen]
    title = FIGURES[figure][0].partition(" ")[0]
    caption = f"Above, the numbers of the pictures; below each reconstruction its {title}. {order}"
    return sheet(rows, caption, names=names, columns=columns, under=under, size=shown_width(rows[0].shape[2]))


# --- samples ---------------------------------------------------------------------------------------------------------


def samples(compared: Sequence[Compared]) -> list[Piece]:
    """How they were made, what an image took, and images of the same seeds above each other."""
    found = {each.name: each.samples for each in compared if each.samples}
    if not found:
        return []
    pieces = [table(["figure", *found], _made(found))]
    if not all(each.evaluation for each in compared if each.samples):  # whose protocols stand with their figures
        pieces += recipes({name: made_by(pictures.protocol) for name, pictures in found.items()}, "protocol")
    if gone := [name for name, pictures in found.items() if not pictures.files]:
        pieces.append(note(f"{', '.join(gone)}: the PNGs are gone (packed in an .npz?), so none are shown."))
    there = {name: pictures for name, pictures in found.items() if pictures.files}
    if not there:
        return pieces
    seeds = {n: {p.protocol["first_seed"] + i: i for i in p.files} for n, p in there.items()}
    common = sorted(set.intersection(*map(set, seeds.values())))
    if not common:
        pieces.append(note("They have no seed in common: each shows its own first ones."))
        return pieces + [_seeds({name: there[name]}, sorted(seeds[name])[:SHOWN], seeds) for name in there]
    blocks = [common[start : start + SHOWN] for start in range(0, len(common), SHOWN)]
    return pieces + [_seeds(there, block, seeds) for block in blocks[: max(1, ROWS // len(there))]]


def _made(found: Mapping[str, Pictures]) -> list[list[str]]:
    protocols = [pictures.protocol for pictures in found.values()]
    seeds = [(own["first_seed"], own["first_seed"] + own["images"] - 1) for own in protocols]
    costs = [_cost(own) for own in protocols]
    return [
        ["images", *(f"{own['images']:,}" for own in protocols)],
        ["seeds", *(f"{first:,} to {last:,}" for first, last in seeds)],
        *([["seconds for an image", *costs]] if any(cost != "-" for cost in costs) else []),
    ]


def _cost(protocol: Mapping) -> str:
    done = [job for job in protocol["jobs"] if "seconds" in job] if "jobs" in protocol else []
    if not done:
        return "-"
    last = done[-1]
    guiding = f" and {last['guiding_passes']:.4g} of the guiding model" if last["guiding_passes"] else ""
    seconds = f"{last['seconds'] / last['computed']:#.3g}".removesuffix(".")
    return f"{seconds}\n{last['passes']:.4g} passes{guiding}, on {last['device']}"


def _seeds(group: Mapping[str, Pictures], block: Sequence[int], seeds: Mapping[str, Mapping[int, int]]) -> Piece:
    """A sheet of a few seeds, a row for each folder; classes above where all folders have the same ones."""
    rows, classes = [], []
    for name, pictures in group.items():
        numbers = [seeds[name][seed] for seed in block]
        rows.append(np.stack([read_picture(pictures.files[i]) for i in numbers]))
        classes.append([_class(pictures.protocol, i) for i in numbers])
    same = all(own == classes[0] for own in classes)
    columns, under = (classes[0], []) if same else ([], classes)
    size = max(shown_width(row.shape[2]) for row in rows)
    caption = f"Seeds {block[0]} to {block[-1]}." if len(block) > 1 else f"Seed {block[0]}."
    if not same:
        caption += " The classes that were asked for are not the same."
    return sheet(rows, caption, names=list(group), columns=columns if any(columns) else [], under=under, size=size)


def _class(protocol: Mapping, index: int) -> str:
    label, names = protocol["labels"][index], protocol["class_names"]
    if not any(protocol["labels"]) and not names:  # those of an unconditional model
        return ""
    return names[label] if names else f"class {label}"
