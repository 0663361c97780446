"""`rae sample`: new images as PNGs and one .npz for the ADM evaluator, with the protocol that they were made by.

labels, seeds --write_samples--> PNGs, latents, samples.json --save_overview--> one sheet; --pack--> .npz
"""

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from rae.autoencoder.baselines import Autoencoder
from rae.commands.autoencoder_of import autoencoder_of, other_autoencoder
from rae.commands.pictures import OutputError, Rounding, check_file, picture_name
from rae.commands.run_record import check_outside_data
from rae.commands.sample_folder import (
    PROTOCOL,
    add_labels,
    has_labels,
    is_packed,
    keeps_latents,
    latent_name,
    pack,
    protocol_of,
    save_overview,
    write_samples,
)
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.model import DiffusionModel
from rae.processes import process_state
from rae.training.run import DTYPES

_LABELS = int.from_bytes(b"labels")  # a family of draws apart from any other of the same seed


def sample_to_folder(
    model: str,
    *,
    out: Path,
    autoencoder: str | None,
    labels: str | None,
    random_labels: bool,
    num: int | None,
    per_class: int | None,
    seed: int,
    steps: int,
    grid: str,
    sampler: str,
    cfg: float | None,
    autoguidance: tuple[str, float] | None,
    interval: tuple[float, float],
    precision: str,
    batch: int,
    rounding: Rounding,
    latents: bool,
    npz: Path | None,
    no_pngs: bool,
    fits: Callable[[tuple[int, int]], object] | None = None,
) -> None:
    """`rae sample`: load the models, sample what is not in `out` yet, and say what is there and what it took.

    Args:
        autoencoder: folder or hub id; None = the one that the run `model` was trained with.
        labels, num, per_class, random_labels: see `choose_labels`.
        interval: of shifted times, for either guidance.
        latents: keep them as well; a folder that keeps some keeps all.
        npz: one file of all images.
        no_pngs: remove the PNGs once they are in `npz`.
        fits: is told (H, W) of the images before any is made, and raises where they would be of no use.
        The others are those of `generate` and `write_samples`.

    Raises:
        ValueError: `out` is inside a folder of images that the run `model` was trained on, or keeps for measuring.
        Besides, what loading models, `generate` and `write_samples` raise.
    """
    check_outside_data(out, model)
    state = process_state()
    if npz:
        _check_npz(npz)
    console, device = Console(stderr=True, quiet=not state.is_main_process), state.device

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def warn(text: str) -> None:
        say(text, "yellow")

    diffusion = DiffusionModel.from_pretrained(model, dtype=DTYPES[precision]).to(device)
    chosen = choose_labels(diffusion, labels, num, per_class, random_from=seed if random_labels else None)
    guidance = CFG(cfg, *interval) if cfg is not None else None
    if autoguidance:
        weak = DiffusionModel.from_pretrained(autoguidance[0], dtype=DTYPES[precision]).to(device)
        guidance = AutoGuidance(weak, autoguidance[1], *interval)
    if guidance and guidance.scale <= 1:
        warn(_weak_guidance(guidance))
    if autoencoder:
        rae = other_autoencoder(autoencoder, diffusion, model)
    else:
        autoencoder, rae = autoencoder_of(diffusion, model, warn)
    if fits:
        fits(rae.output_size)
    say(f"autoencoder: {autoencoder}")
    rae = rae.to(device)
    if not latents and (latents := keeps_latents(out)):
        say(f"latents are kept, since {out} keeps them")
    settings = {"seed": seed, "rounding": rounding, "keep_latents": latents}
    settings |= {"steps": steps, "grid": grid, "sampler": sampler, "guidance": guidance}
    say(
        f"{_describe_labels(chosen, diffusion.null_label, random_labels)}; {_describe(settings)}; {precision} on "
        f"{device.type}, {_count(state.num_processes, 'process', 'processes')}, {batch} images at a time"
    )
    protocol = protocol_of(diffusion, rae, chosen, **settings)
    if autoguidance and protocol["guidance"]["weak"] == protocol["model"]:
        warn("--autoguidance by the model itself is no guidance, whatever its scale; a weaker one guides.")
    images = [out / picture_name(i) for i in range(len(chosen))]
    unkept = sum(not (out / latent_name(i)).exists() for i in range(len(chosen))) if latents else 0
    job, rows = None, []
    if no_pngs and not unkept and is_packed(npz, protocol):
        say(f"{npz} holds them already")
        if diffusion.null_label and state.is_main_process and not has_labels(npz):
            _check_room(npz, npz.stat().st_size, "leave --npz out")
            add_labels(npz, chosen)
            say("their classes were not in it, as an earlier version of rae packed it: arr_1 is added")
    else:
        if npz:
            _check_room(npz, 3 * math.prod(rae.output_size) * len(chosen), "leave --npz out")
        _check_room(out, 4 * math.prod(rae.latent_shape) * unkept, "leave --latents out")
        job = write_samples(diffusion, rae, chosen, out, protocol, batch=batch, random_labels=random_labels, **settings)
        if state.is_main_process:
            rows = save_overview(out, chosen, _overview(out))
            if npz:
                pack(images, chosen if diffusion.null_label else None, npz, protocol)
    if not state.is_main_process:
        return
    if no_pngs:
        for image in images:
            image.unlink(missing_ok=True)
    console.print(_written(out, protocol, rae, npz, no_pngs))
    if diffusion.null_label and rows:
        say(f"{_overview(out).name}, row by row:")
        for row in rows:
            say(f"  {_names([chosen[i] for i in row], diffusion.config.class_names)}")
    say(_describe_job(job) if job else "nothing was missing")


def choose_labels(
    model: DiffusionModel,
    labels: str | None,
    num: int | None,
    per_class: int | None,
    *,
    random_from: int | None = None,
) -> list[int]:
    """One class index per image; the classes take turns, so any number of images is balanced to within one.

    Args:
        labels: names or indices with commas between, see `split_labels`; None = all classes.
        num: images in all; None = one for each of `labels`, or 16 without them.
        per_class: images of each class, in place of `num`.
        random_from: seed of the first image; then each class is drawn, from the seed of its image alone, so the images
            before stay what they are in a larger set. Published figures are about 0.1 gFID better with balanced
            classes (Table 14).

    Raises:
        ValueError: an unknown class, or classes asked of an unconditional model.
    """
    if model.null_label == 0:  # unconditional: no classes, the null label for every image
        if labels is not None or per_class or random_from is not None:
            raise ValueError("this model is unconditional: it knows no classes; give --num alone.")
        return [model.null_label] * (num or 16)
    classes, default = list(range(model.null_label)), 16
    if labels is not None:
        asked = split_labels(labels, model.config.class_names or ())
        classes, default = [model.label_indices([label]).item() for label in asked], len(asked)
    count = per_class * len(classes) if per_class else num or default
    if random_from is None:
        return [classes[i % len(classes)] for i in range(count)]
    draws = (np.random.SeedSequence((_LABELS, random_from + i)).generate_state(1, np.uint64) for i in range(count))
    return [classes[int(draw[0]) % len(classes)] for draw in draws]


def split_labels(text: str, names: Sequence[str]) -> list[str | int]:
    """Class names and indices with commas between: "tench, Tinca tinca, 207" -> ["tench, Tinca tinca", 207].

    Names may have commas of their own: at each place the longest known one is taken. What is not known stays, up to
    its next comma, for `DiffusionModel.label_indices` to say. Where a name is a number there are no indices: an unknown
    name would otherwise be taken for the index of another class.
    """
    indices, known = not any(map(str.isdecimal, names)), {tuple(_at_commas(name)): name for name in names}
    asked, parts, longest = [], _at_commas(text), max(map(len, known), default=1)
    while parts:
        lengths = (n for n in range(min(longest, len(parts)), 0, -1) if tuple(parts[:n]) in known)
        count = next(lengths, 0)
        label = known[tuple(parts[:count])] if count else parts[0]
        asked.append(int(label) if indices and not count and label.isdecimal() else label)
        parts = parts[max(count, 1) :]
    return asked


def _at_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


# --- what cannot be is found before the work -------------------------------------------------------------------------


def _check_npz(npz: Path) -> None:
    if npz.suffix != ".npz" and not npz.is_dir():
        raise OutputError(f"--npz {npz}: the ADM evaluator reads .npz; give --npz {npz.with_suffix('.npz')}.")
    check_file(npz)


def _check_room(path: Path, size: int, remedy: str) -> None:
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if size > (free := shutil.disk_usage(parent).free):
        raise OutputError(
            f"{path} will take {decimal(size)}, {decimal(free)} are free there; make room, give another place, or "
            f"{remedy}."
        )


# --- in words --------------------------------------------------------------------------------------------------------


def _overview(out: Path) -> Path:
    """Beside the folder, not in it, where it would be taken for one of the samples."""
    named = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    return named.with_name(f"{named.name}-overview.png")


def _weak_guidance(guidance: CFG | AutoGuidance) -> str:
    option, away = ("--cfg", "no class") if isinstance(guidance, CFG) else ("--autoguidance", "the guiding model")
    if guidance.scale == 1:
        return f"{option} 1 is no guidance: the samples are those of the model alone; above 1 it guides."
    return f"{option} {guidance.scale:g} is below 1: it weakens, and leads towards {away}; above 1 it guides."


def _describe_labels(labels: Sequence[int], null_label: int, random: bool) -> str:
    images, each = _count(len(labels), "image", "images"), Counter(labels).values()
    if null_label == 0:
        return f"{images} of no class"
    counts = f"{min(each):,}" if min(each) == max(each) else f"{min(each):,} to {max(each):,}"
    return f"{images}, {counts} of each of {_count(len(each), 'class', 'classes')}{' drawn at random' * random}"


def _describe(settings: dict[str, Any]) -> str:
    guidance, steps = settings["guidance"], f"{_count(settings['steps'], 'step', 'steps')} (grid: {settings['grid']})"
    by = "no guidance"
    if guidance:
        kind = type(guidance).__name__
        by = f"{kind} {guidance.scale:g} at t in [{guidance.t_min:g}, {guidance.t_max:g}]"
    return f"{settings['sampler']}, {'its own steps' if settings['sampler'] == 'dopri5' else steps}; {by}"


def _written(out: Path, protocol: dict[str, Any], rae: Autoencoder, npz: Path | None, no_pngs: bool) -> Table:
    table, (height, width) = Table("written", "what"), protocol["size"]
    images = _count(protocol["images"], "image", "images")
    if not no_pngs:
        table.add_row(escape(f"{out}/{picture_name(0)} ..."), f"{images} of {height} x {width} pixels")
    if protocol["latents_kept"]:
        shape = " x ".join(map(str, rae.latent_shape))
        table.add_row(escape(f"{out}/{latent_name(0)} ..."), f"their latents, {shape}, float32")
    table.add_row(escape(f"{out}/{PROTOCOL}"), "how they were made, and what it took")
    table.add_row(escape(str(_overview(out))), "the first of them, by class")
    if npz:
        table.add_row(escape(str(npz)), f"{images}, {decimal(npz.stat().st_size)}")
    return table


def _describe_job(job: dict[str, Any]) -> str:
    images, processes = _count(job["images"], "image", "images"), _count(job["processes"], "process", "processes")
    more = f" ({job['computed']:,} computed)" if job["computed"] > job["images"] else ""
    guiding = f", {_rounded(job['guiding_passes'])} of the guiding model" if job["guiding_passes"] else ""
    calls, passes = _count(job["calls"], "call", "calls"), _count(job["passes"], "pass", "passes")
    return (
        f"{images}{more} in {job['seconds']:,.1f} s, {processes}; each {job['seconds'] / job['computed']:.3g} s, "
        f"{calls} by the sampler, {passes} of the model{guiding}"
    )


def _names(labels: Sequence[int], class_names: Sequence[str] | None) -> str:
    """[7, 7, 1] -> "'seven' x 2, 'one'"; names may have commas, and be numbers."""
    counted = [(label, len(list(group))) for label, group in groupby(labels)]
    names = [(repr(class_names[label]) if class_names else f"class {label}", count) for label, count in counted]
    return ", ".join(f"{name} x {count}" if count > 1 else name for name, count in names)


def _count(number: float, one: str, many: str) -> str:
    return f"{_rounded(number)} {one if number == 1 else many}"


def _rounded(count: float) -> str:
    return f"{count:,.1f}".removesuffix(".0")
