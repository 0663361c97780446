"""`rae probe`: how much frozen latents tell of an image's class, several latent spaces beside each other (Table 1d).

images --write_features--> OUT/features --linear probe, neighbours--> OUT/probe.json, and a table

Features are kept, so other settings encode nothing again. Neither the order of the images, nor the size of batches, nor
the number of processes changes a figure, but by the rounding of features.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from rae.autoencoder.baselines import is_baseline
from rae.commands.fingerprint import fingerprint
from rae.commands.look import remove_features
from rae.commands.pictures import OutputError, alone
from rae.commands.probe_features import Pool, Probed, open_latents, read_features, write_features
from rae.config import ConfigError
from rae.data.image_set import ImageError, Images
from rae.data.images import DataConfig, Views, open_images, open_split, subset
from rae.data.order import epoch_order
from rae.evaluation.probe import (
    WEIGHT_DECAYS,
    Accuracies,
    choose_decay,
    fit_path,
    measure_accuracy,
    neighbour_votes,
    part_of_each_class,
)
from rae.evaluation.uncertainty import BOUNDS, Measured, Share, measured_mean, written
from rae.folders import aside
from rae.processes import process_state

CHOOSING = 0.2  # part of each class's training images that chooses the weight decay
SHOWN = (("linear", "top1"), ("linear", "top5"), ("neighbours", "top1"))  # of what probe.json says
CONFUSED = 50  # pairs of classes that probe.json names


def write_probe(
    names: Sequence[str],
    data: DataConfig,
    test: str | float,
    out: Path,
    *,
    image_size: tuple[int, int] | None = None,
    input_size: tuple[int, int] | None = None,
    pools: Sequence[Pool] = ("mean",),
    num: int | None = None,
    num_test: int | None = None,
    neighbours: int = 20,
    temperature: float | None = 0.07,
    batch: int = 32,
) -> dict[str, Any] | None:
    """`rae probe`: linear probe and nearest neighbours on frozen latents of images in classes.

    Prints a table and writes `out`/probe.json. Every process of a distributed job encodes its share of the images.

    Args:
        names, image_size, input_size: of `open_latents`.
        data: training images with their classes, and how images are read.
        test: another source with the same classes, or the fraction of each class that is set aside.
        out: folder; that of another probe may be used again.
        pools: what is made of latents, each beside the other: "mean" over positions, or "none": all of their numbers.
        num, num_test: so many of the images, of each class in proportion; None = all.
        neighbours, temperature: k and temperature of `neighbour_votes`.
        batch: images that are encoded at a time.

    Returns:
        In the main process what stands in probe.json; None in others.

    Raises:
        ConfigError: a fraction, a number of images or of neighbours that cannot be; as `open_latents`.
        ImageError: images without classes, of one class, or of others than the test images; a class of too few images;
            test images that all are training images.
        OutputError: `out` holds something else, or features that are damaged or of images that were changed since; or
            another process is at work in it.
        Besides, what opening latent spaces and encoding raises.
    """
    state, folder = process_state(), out / "features"
    train, tested = open_sets(data, test, num, num_test)
    fitted = len(train) if tested else len(train) - round(float(test) * len(train))
    if neighbours > fitted:
        raise ConfigError(f"{neighbours} neighbours are asked for among {fitted:,} training images; ask for fewer.")
    others = out.is_dir() and any(not found.name.startswith(".") for found in out.iterdir())
    if out.is_file() or (others and not folder.is_dir()):
        raise OutputError(f"{out} is a file, or a folder that holds something else than probes; give a new folder.")
    # what is kept of images is found by their pixels
    opened = [dataclasses.replace(of, identity=fingerprint(of, data.on_broken)) for of in (train, tested) if of]
    if len({of.identity for of in opened}) < len(opened):
        raise _all_seen(len(opened[1]), data.source, test)
    for images in opened if image_size else ():
        Views(images, data, image_size)[0]  # a first one that is too small is told before an encoder is loaded
    spaces = open_latents(names, image_size, input_size)
    with alone(out):
        for space in spaces:
            for images in opened:
                write_features(space, pools, images, data, folder, batch=batch)
        if not state.is_main_process:
            return None
        known = {images.identity for images in opened}
        remove_features(folder, lambda _, about: "pool" in about and about["images"] not in known)
        device = state.device if state.device.type in ("cpu", "cuda") else torch.device("cpu")  # others have no float64
        rows: list[dict[str, Any]] = []
        right: list[dict[str, Tensor]] = []
        for space in spaces:
            for pool in pools:
                read = [read_features(space, pool, images, data, folder) for images in opened]
                fit, seen = read if tested else _part(read[0], float(test), train.class_names)
                if not rows:
                    about = _check_sets(fit, seen, data.source, test)
                    about["unreadable"] = [n for i, r in zip(opened, read) for n in sorted({*i.names} - {*r.names})]
                with Console(stderr=True).status(f"probing {escape(space.name)}"):
                    figures, hits = _probe(fit, seen, train.class_names, neighbours, temperature, device)
                right.append(hits)
                ahead = {kind: measured_mean(hits[kind].double() - right[0][kind].double()) for kind in hits}
                row = {"latents": space.name, "identity": space.identity, "image_size": list(space.image_size)}
                row |= {"shape": list(space.shape), "pool": pool, "features": fit.features.shape[1]} | figures
                rows.append(row | {"ahead_of_first": {kind: _plain(figure) for kind, figure in ahead.items()}})
        protocol = {
            "training": {"source": data.source, "identity": train.identity, "images": len(fit.names)},
            "test": {"source": test, "identity": tested and tested.identity, "images": len(seen.names)} | about,
            "classes": train.class_names,
            "precision": "features float32, probes float64",
            "weight_decays": {"grid": WEIGHT_DECAYS, "chosen_on": CHOOSING},
            "neighbours": {"k": neighbours, "temperature": temperature},
        }
        found = {"protocol": protocol, "rows": rows}
        with aside(out / "probe.json") as hidden:
            hidden.write_text(json.dumps(found, indent=1) + "\n")
        _print(found, out)
        return found


# --- images ----------------------------------------------------------------------------------------------------------


def open_sets(
    data: DataConfig, test: str | float, num: int | None, num_test: int | None
) -> tuple[Images, Images | None]:
    """Training and test images, their classes numbered from 0, without those that neither has; arguments and errors of
    `write_probe`. None where the test images are a part of the training images, which only their pixels tell."""
    if isinstance(test, float) and not 0 < test < 1:
        raise ConfigError(f"{test} of the images as a test: give a fraction between 0 and 1, or another source.")
    if isinstance(test, float) and num_test:
        raise ConfigError(f"{num_test} test images are asked for, and {test} of the images; give one of them.")
    if isinstance(test, float):
        train, tested = open_images(data.source, data.image, data.label), None
    else:
        train, tested = open_split(data.model_copy(update={"held_out": test}))
        if Path(test).resolve() == Path(data.source).resolve():  # of copies elsewhere only pixels tell
            raise ImageError(f"{test} holds the images of {data.source}: a probe is tested on others; try --test 0.2.")
    if train.class_names is None:
        raise ImageError(
            f"{data.source} has no classes, which a probe is to tell: sub-folders are classes, and so is a column of "
            "a table, --label."
        )
    train, tested = _draw(train, num, data.source), tested and _draw(tested, num_test, str(test))
    counts, seen = Counter(train.labels), Counter(tested.labels if tested else ())
    used = sorted(counts | seen)
    if len(used) < 2:
        raise ImageError(
            f"{data.source} has images of one class only ({train.class_names[used[0]]!r}); a probe tells two."
        )
    least = 2 if tested else 3  # one to fit, one that chooses the weight decay, one for the test
    if few := {train.class_names[label]: counts[label] for label in used if counts[label] < least}:
        raise ImageError(
            f"{data.source}: {len(few)} of {len(used)} classes have fewer than {least} training images "
            f"({_listed(few)}); add images, take these classes out, or ask for more with --num."
        )
    return _renumber(train, used), tested and _renumber(tested, used)


def _draw(images: Images, num: int | None, source: str) -> Images:
    """`num` of the images, of each class in proportion, the same at every call."""
    if num is None or num == len(images):
        return images
    if num > len(images):
        raise ConfigError(f"{source} holds {len(images):,} images, {num:,} are asked for; ask for fewer.")
    order = epoch_order(0, 0, len(images))
    place = np.empty(len(order))  # of an image within its class, from 0 to 1
    labels = np.asarray(images.labels)
    for label in set(images.labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return subset(images, sorted(order[np.argsort(place[order], kind="stable")][:num].tolist()))


def _renumber(images: Images, used: Sequence[int]) -> Images:
    number = {label: i for i, label in enumerate(used)}
    names = [images.class_names[label] for label in used]
    return dataclasses.replace(images, labels=[number[label] for label in images.labels], class_names=names)


def _part(images: Probed, fraction: float, names: Sequence[str]) -> tuple[Probed, Probed]:
    """(training, test) images."""
    chosen = part_of_each_class(images.labels, images.digests, fraction, names)
    return images.take(~chosen), images.take(chosen)


def _check_sets(fit: Probed, seen: Probed, source: str, test: str | float) -> dict[str, Any]:
    """What is to be known of the two sets besides figures: test images that are training images as well."""
    twice = torch.isin(seen.digests, fit.digests)
    if twice.all():
        raise _all_seen(len(twice), source, test)
    return {"also_in_training": seen.take(twice).names}


def _all_seen(count: int, source: str, test: str | float) -> ImageError:
    return ImageError(f"all {count:,} test images ({test}) are training images of {source} as well; give others.")


# --- figures ---------------------------------------------------------------------------------------------------------


def _probe(
    fit: Probed, seen: Probed, names: list[str], k: int, temperature: float | None, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures of linear probe and neighbours, as plain data; and which of the test images each gets right."""
    chooses = part_of_each_class(fit.labels, fit.digests, CHOOSING, names).to(device)
    features, labels, test = fit.features.to(device), fit.labels.to(device), seen.features.to(device)
    decay, tried = choose_decay(features, labels, chooses, len(names))
    probe = next(fit_path(features, labels, len(names), [decay]))
    scores = {
        "linear": probe.scores(test),
        "neighbours": neighbour_votes(features, labels, test, len(names), k=k, temperature=temperature),
    }
    found = {kind: measure_accuracy(values.cpu(), seen.labels) for kind, values in scores.items()}
    figures = {kind: _plain_accuracy(accuracy, names) for kind, accuracy in found.items()}
    loss = F.cross_entropy(scores["linear"].cpu(), seen.labels).item()
    figures["linear"] |= {"loss": loss, "weight_decay": decay, "gap": probe.gap}
    figures["linear"]["tried"] = [trial._asdict() for trial in tried]
    return figures, {kind: accuracy.right for kind, accuracy in found.items()}


def _plain_accuracy(accuracy: Accuracies, names: Sequence[str]) -> dict[str, Any]:
    confused = [
        {"class": names[c.label], "taken_for": names[c.taken_for], "count": c.count, "share": c.share}
        for c in accuracy.confused[:CONFUSED]
    ]
    return {
        "top1": _plain(accuracy.top1),
        "top5": _plain(accuracy.top5),
        "classes": {name: _plain(figure) for name, figure in zip(names, accuracy.per_class)},
        "confused": confused,
    }


def _plain(figure: Measured | Share | None) -> dict[str, float | None] | None:
    return figure and figure._asdict()


# --- what is shown ---------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any], out: Path) -> None:
    protocol, rows, console = found["protocol"], found["rows"], Console()
    images = f"{protocol['training']['images']:,} training and {protocol['test']['images']:,} test images"
    k, temperature = protocol["neighbours"].values()
    votes = "each one vote" if temperature is None else f"weighted, temperature {temperature:g}"
    table = Table("latents", "pool", title=f"{images} of {len(protocol['classes'])} classes: {escape(str(out))}")
    table.caption = (
        "% of test images ± standard error; in brackets: ahead of the first row on the same images. Linear: weight "
        f"decay chosen on {CHOOSING:.0%} of the training images, from {WEIGHT_DECAYS[0]:g} to {WEIGHT_DECAYS[-1]:g}. "
        f"k-NN: {k} neighbours by cosine, {votes}. {protocol['precision'].capitalize()}."
    )
    shown = (row[kind][top] for row in rows for kind, top in SHOWN)
    if any(figure and figure["bound"] is not None for figure in shown):
        table.caption += f" {BOUNDS}"
    for header in ("features", "linear", "top 5", "k-NN"):
        table.add_column(header, justify="right", no_wrap=True)
    details = Table("latents", "pool", "decay", "hardest classes, linear", "most often mistaken, linear")
    for row in rows:
        linear = row["linear"]
        cells = {kind: _percent(row[kind]["top1"]) for kind in ("linear", "neighbours")}
        if row is not rows[0]:
            cells = {kind: f"{cell}\n({_percent(row['ahead_of_first'][kind], '+')})" for kind, cell in cells.items()}
        top5 = _percent(linear["top5"]) if linear["top5"] else "-"
        name = escape(row["latents"])
        table.add_row(name, row["pool"], f"{row['features']:,}", cells["linear"], top5, cells["neighbours"])
        classes = {name: figure["value"] for name, figure in linear["classes"].items() if figure}
        worst = "\n".join(f"{name} {100 * classes[name]:.0f} %" for name in sorted(classes, key=classes.get)[:3])
        pairs = "\n".join(f"{c['class']} for {c['taken_for']}, {c['count']:,}" for c in linear["confused"][:3])
        details.add_row(name, row["pool"], f"{linear['weight_decay']:g}", escape(worst), escape(pairs))
    console.print(table)
    console.print(details)
    for note in _notes(protocol, rows):
        Console(stderr=True).print(f"[yellow]{escape(note)}", highlight=False, soft_wrap=True)


def _notes(protocol: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """What limits the figures."""
    notes = [f"left out: {name} cannot be read" for name in protocol["test"]["unreadable"]]
    if twice := protocol["test"]["also_in_training"]:
        notes.append(
            f"{len(twice):,} test images are training images as well, to the pixel, and count: {_listed(twice)}"
        )
    empty = [name for name, figure in rows[0]["linear"]["classes"].items() if figure is None]
    if empty:
        notes.append(f"{len(empty):,} classes have no test images: {_listed(empty)}")
    pooled = [row["latents"] for row in rows if row["pool"] == "mean" and is_baseline(row["latents"])]
    if pooled:
        notes.append(
            f"{pooled[0]}: hardly more than colour is left in a mean over positions; --pool none is fair to it"
        )
    edge = [row["latents"] for row in rows if row["linear"]["weight_decay"] in (WEIGHT_DECAYS[0], WEIGHT_DECAYS[-1])]
    if edge:
        notes.append(f"{', '.join(edge)}: the weight decay chosen is the last of the grid, a better one may lie beyond")
    return notes


def _listed(things: Sequence[str] | Mapping[str, int], most: int = 3) -> str:
    """The first few, and that there are others."""
    shown = [f"{name!r} {count}" for name, count in things.items()] if isinstance(things, Mapping) else list(things)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most:,} more" if len(shown) > most else "")


def _percent(figure: dict[str, float | None], sign: str = "") -> str:
    if figure.get("bound") is not None:  # of shares, not of differences
        return written(**figure)
    error = "" if figure["error"] is None else f" ± {100 * figure['error']:.1f}"
    return f"{100 * figure['value']:{sign}.1f}{error}"
