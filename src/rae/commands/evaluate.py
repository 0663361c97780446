"""`rae evaluate`: every figure by one protocol. `rae reference`: what real images are, once for many evaluations.

subject ----open or make--> images --extractors--> features --judge--> evaluation.json, and a table
reference --open----------> images --extractors--> features ----^
"""

import dataclasses
import functools
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rae.autoencoder.rae import RAEConfig
from rae.commands.feature_folder import size_of
from rae.commands.flags import flags_of, skipped
from rae.commands.look import Features, Look, look_at, open_extractors, say
from rae.commands.pictures import OutputError, alone, check_file
from rae.commands.reconstruct import write_reconstructions
from rae.commands.reference import UNKNOWN, Reference, check_size, open_reference, role_of
from rae.commands.run_record import check_outside_data
from rae.commands.sides import read_sides
from rae.commands.subject import Subject, is_pairs, open_subject
from rae.config import ConfigError, read_json
from rae.data.crops import center_crop
from rae.data.image_set import Images
from rae.data.images import DataConfig, open_images, subset
from rae.evaluation.frechet import PARTS
from rae.evaluation.judge import INCEPTION, PRDC_NEIGHBOURS, judge, judge_pairs, left_out
from rae.evaluation.lpips import LPIPS
from rae.evaluation.pretrained import load_lpips
from rae.evaluation.reference import save_reference
from rae.evaluation.uncertainty import BOUNDS, written
from rae.folders import aside, check_outside, find_folder, saved_kind
from rae.processes import process_state

EVALUATION = "evaluation.json"
FORMAT = 1
LEAST_JUDGED = max(2 * PARTS[-1], PRDC_NEIGHBOURS + 1)  # images that every metric can take
LEAST_COMPARED = PRDC_NEIGHBOURS + 1
MADE = {"autoencoder": "reconstructions", "diffusion model": "samples"}  # kind of a model => folder of what it makes

Fits = Callable[[tuple[int, int]], None]  # raises where images of (H, W) cannot be judged as was asked


def _first(images: Images, num: int | None) -> Images:
    if num is not None and num > len(images):
        raise OutputError(f"{num:,} images are asked for, there are {len(images):,}; ask for fewer.")
    return images if num is None else subset(images, range(num))


# --- rae reference ---------------------------------------------------------------------------------------------------


def write_reference(
    data: DataConfig,
    out: Path,
    *,
    features: Sequence[str],
    size: tuple[int, int] | None,
    num: int | None,
    keep: int,
    batch: int,
    inception: Path | None,
    input_size: int | None,
    label: str | None = None,
) -> None:
    """`rae reference`: moments of the features of real images, and some of these features, in one file.

    Every process of a distributed job takes its share. What an interrupted job has done lies in OUT.parts, which is
    removed at the end.

    Args:
        data: the images, and how they are read.
        out: a .safetensors file.
        features: names of extractors.
        size: (H, W) in pixels to crop the images to; None = they all have one.
        num: the first so many only.
        keep: rows of features to keep, for the metrics that compare images one by one.
        batch: images at a time.
        inception: file of its weights; None = torch hub's.
        input_size: of encoders, see `open_extractor`.
        label: what holds the classes, see `open_images`; None = where there is one, "" = leave classes alone.

    Raises:
        OutputError: no name of a file that can be written, or more images than there are; another process is at work.
    """
    data = data.model_copy(update={"label": label})
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: a reference is a safetensors file; call it {out.with_suffix('.safetensors').name}.")
    check_file(out)
    look = Look(open_extractors(features, inception, input_size), data, batch)
    images, parts = _first(open_images(data.source, data.image, data.label), num), out.with_name(f"{out.name}.parts")
    with alone(parts):
        found = look_at(images, size, look, parts, source=data.source, keep=keep, what="reference")
        if not process_state().is_main_process:
            return
        about = _about(found, images)
        _save(found, about, look, out)
        shutil.rmtree(parts)
    table = Table("extractor", "images", "left out, unreadable", "rows kept", "written")
    for name, features_of in found.sets.items():
        counts = features_of.count, about["skipped"], len(features_of.rows["features"])
        table.add_row(name, *(f"{count:,}" for count in counts), escape(str(out)))
    Console().print(table)


def _about(found: Features, images: Images | None, without: int | None = 0) -> dict[str, Any]:
    """What the features are of, and how many images were left out; of features from a file, the file tells.

    Args:
        found: the features.
        images: that they are of; None = they are from a file.
        without: images that were left out before, see `Subject`.
    """
    if images is None:
        return found.about
    return found.about | {"skipped": None if without is None else without + len(images) - len(found.read)}


def _save(found: Features, about: dict[str, Any], look: Look, path: Path) -> None:
    described = {name: extractor.describe() for name, extractor in look.extractors.items()}
    save_reference(path, found.sets, extractors=described, **about)


# --- rae evaluate ----------------------------------------------------------------------------------------------------


def evaluate(
    subject: str,
    reference: str | None,
    out: Path,
    *,
    features: Sequence[str],
    data: DataConfig,
    num: int | None,
    size: tuple[int, int] | None,
    batch: int,
    lpips: bool,
    inception: Path | None,
    input_size: int | None,
    sample: Callable[[Path, Fits], None],
    label: str | None = None,
) -> dict[str, Any] | None:
    """`rae evaluate`: figures of images that are there, or of a model's, which it makes first.

    What takes long is kept in `out`, so that the same command goes on where it was interrupted: `samples` or
    `reconstructions`, features, and `reference.safetensors` for other evaluations. A larger `num` adds to it.

    Args:
        subject: see `rae.commands.subject`.
        reference: images, a file of `rae reference` or one of ADM's; for an autoencoder the images to reconstruct; None
            for reconstructions that are there, since these are compared with what they are of.
        out: a folder.
        features: names of extractors.
        data: how images are read; its source does not matter.
        num: the first so many images of the subject.
        size: (H, W) to crop the subject's images to; None = they all have one.
        batch: images at a time.
        lpips: also LPIPS of reconstructions, for which VGG16 is needed.
        sample: makes the samples of a model of stage 2 in the folder that it is given, if their size fits.
        inception: file of its weights; None = torch hub's.
        input_size: of encoders, see `open_extractor`.
        label: what holds the classes, see `open_images`; None = where there is one, "" = leave classes alone.

    Returns:
        What stands in `evaluation.json`, in the main process.

    Raises:
        ConfigError: no reference, or one that does not go with the subject; LPIPS of images that are no pairs; a column
            that neither side has.
        ReferenceError: a reference at another size, or by another extractor.
        OutputError: `out` is a file or holds something else, or another process is at work in it; too few images for
            the metrics.
        ValueError: `out`, where a model's images are written, is inside a folder of the images that it is judged
            against or was trained on.
    """
    begun, data = time.perf_counter(), data.model_copy(update={"label": label})
    if file := next((place for place in (out, *out.parents) if place.is_file()), None):
        raise OutputError(f"{file} is a file; give a folder.")
    if makes := saved_kind(subject) in MADE:  # pictures are written; of others only features and figures are
        check_outside_data(out, subject)
        check_outside(out, reference or "")
    sides = read_sides(data, [subject, *([reference] if reference else [])])
    look = Look(open_extractors(features, inception, input_size), data, batch)
    if lpips and not is_pairs(subject):
        raise ConfigError(f"--lpips is of reconstructions and what they are of; {subject} gives none, leave it out.")
    given = open_reference(reference, sides[-1], look) if reference else None
    if makes and given and given.features:  # whose images only its file names
        check_outside(out, given.features.about["source"])
    distance = load_lpips(purpose="metric").to(process_state().device) if lpips else None
    if num is not None:
        _check_count(subject, num, LEAST_JUDGED)
    if given:
        count = given.features.about["images"] if given.features else len(given.images)
        _check_count(given.source, count, LEAST_JUDGED if is_pairs(subject) else LEAST_COMPARED)
    if given and size:
        check_size(subject, size, given, data)
    fits = functools.partial(_check_made, subject, size=size, given=given, data=data)
    with alone(out):
        _check_out(out, **_known_before(subject, given, out))
        judged = _prepare(subject, given, out, sides, num=num, batch=batch, sample=sample, fits=fits)
        _check_count(subject, len(judged.images), LEAST_JUDGED)
        if given and not size:
            check_size(subject, size_of(judged.images, data.on_broken), given, data)
        against = _named(given) if given else (judged.source, None)
        if judged.originals:
            against = against[0], judged.originals.identity
        _check_out(out, subject=(subject, judged.images.identity), reference=against)
        return _measure(subject, judged, given, look, out, size=size, batch=batch, distance=distance, begun=begun)


def _measure(
    subject: str,
    judged: Subject,
    given: Reference | None,
    look: Look,
    out: Path,
    *,
    size: tuple[int, int] | None,
    batch: int,
    distance: LPIPS | None,
    begun: float,
) -> dict[str, Any] | None:
    """Features of both sides, all figures of them, written and printed: what `evaluate` returns."""
    own = look_at(judged.images, size, look, out / "features", source=subject)
    whole = _look_at_reference(judged, given, own, look, out / "reference")
    if not process_state().is_main_process:
        return None
    compared = judged.originals or given.images  # None: features from a file
    subject_about = _about(own, judged.images, judged.without)
    reference_about = _about(whole, compared, judged.without if judged.originals else 0)
    if compared and not (given and given.moments):
        _save(whole, reference_about, look, out / "reference.safetensors")
    role = role_of(subject, given) if given else UNKNOWN
    figures, missing = {}, {}
    if judged.originals:
        halves = [subset(half, sorted(own.read)) for half in (judged.originals, judged.images)]  # without broken ones
        halves = [_cropped(half, size) for half in halves] if size else halves
        figures = judge_pairs(*halves, distance, batch, process_state().device)
    pairs = (own.read, whole.read) if judged.originals else None
    for name in look.extractors:
        figures |= judge(own.sets[name], whole.sets[name], name, pairs=pairs, turns=judged.turns)
        missing |= left_out(own.sets[name], name, turns=judged.turns)
    found = {
        "format": FORMAT,
        "subject": {"kind": judged.kind} | subject_about | {"protocol": judged.protocol},
        "reference": reference_about | {"role": role},
        "extractors": {name: extractor.describe() for name, extractor in look.extractors.items()},
        "figures": {name: figure._asdict() for name, figure in figures.items()},
        "left_out": {name: figure._asdict() for name, figure in missing.items()},
        "flags": skipped(subject=subject_about, **({} if judged.originals else {"reference": reference_about}))
        + flags_of(judged, own, whole, given, role),
        "made": {
            "rae": importlib.metadata.version("rae"),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - begun, 1),
        },
    }
    with aside(out / EVALUATION) as hidden:
        hidden.write_text(json.dumps(found, indent=1) + "\n")
    _print(found, out)
    return found


def _check_count(source: str, count: int, least: int) -> None:
    if count < least:
        raise OutputError(f"{source}: {count} images are too few to be judged by; give at least {least}.")


def _prepare(
    subject: str,
    given: Reference | None,
    out: Path,
    sides: Sequence[DataConfig],
    *,
    num: int | None,
    batch: int,
    sample: Callable[[Path, Fits], None],
    fits: Fits,
) -> Subject:
    """The subject's images; those of a model are made first. `sides`: how the subject and what is given are read."""
    kind, needed = saved_kind(subject), f"{subject}: say what its images are compared with: --reference IMAGES or FILE."
    if kind == "autoencoder":
        if given is None or given.images is None or given.moments:
            raise ConfigError(
                f"{subject} is an autoencoder: its reconstructions are compared with the images that it is given; say "
                "which with --reference IMAGES."
            )
        _first(given.images, num)  # raises where there are fewer
        fits(read_json(RAEConfig, find_folder(subject, "an autoencoder") / "config.json").decoder.output_size)
        of = sides[-1].model_copy(update={"source": given.source})
        write_reconstructions(subject, of, out / MADE[kind], num=num, batch=batch, rounding="nearest")
        return open_subject(str(out / MADE[kind]), sides[0], None)
    if kind == "diffusion model":
        if given is None:
            raise ConfigError(needed)
        sample(out / MADE[kind], fits)
        return open_subject(str(out / MADE[kind]), sides[0], None)
    judged = open_subject(subject, sides[0], num)
    if judged.originals is None and given is None:
        raise ConfigError(needed)
    if judged.originals is not None and given is not None:
        raise ConfigError(f"{subject} holds reconstructions beside what they are of; leave --reference out.")
    return judged


def _check_made(
    subject: str, made: tuple[int, int], size: tuple[int, int] | None, given: Reference | None, data: DataConfig
) -> None:
    """Refuse images of a model, of (H, W) `made`, before it makes them, where they cannot be judged as was asked.

    Raises:
        ConfigError: they are smaller than `size`, and are not to be enlarged.
        ReferenceError, ImageError: as of `check_size`.
    """
    if size and not data.enlarge and (made[0] < size[0] or made[1] < size[1]):
        wanted, made = (" x ".join(map(str, each)) for each in (size, made))
        raise ConfigError(
            f"{subject} makes images of {made} pixels (height x width), smaller than the {wanted} asked for: leave "
            "--size out, or enlarge small images (bicubic): --enlarge."
        )
    if given and not size:
        check_size(subject, made, given, data)


def _known_before(subject: str, given: Reference | None, out: Path) -> dict[str, tuple[str, str | None]]:
    """Of either side, for `_check_out`, what is known of it before a model makes its images."""
    made, before = MADE.get(saved_kind(subject)), _read_evaluation(out)
    # in a folder that is there, how they were made is compared, unless what was judged is something else
    new = made is not None and (not (out / made).exists() or (before and before["subject"]["kind"] != made))
    known = {"subject": (subject, None)} if new else {}
    if given and made == "reconstructions":  # originals beside these have an identity of their own
        return known | ({"reference": (given.source, None)} if new else {})
    return known | ({"reference": _named(given)} if given else {})


def _named(given: Reference) -> tuple[str, str]:
    """What a reference is called, and its identity."""
    if given.images:
        return given.source, given.images.identity
    return given.features.about["source"], given.features.about["identity"]


def _check_out(out: Path, **now: tuple[str, str | None]) -> None:
    """Refuse a folder with the evaluation of others: images that are neither called the same nor the same.

    Args:
        out: the folder.
        now: "subject" or "reference" => what it is called, and its identity; None = it is not made yet.

    Raises:
        OutputError: it is one, or nothing says.
    """
    before = _read_evaluation(out)
    for side, (source, identity) in now.items() if before else ():
        was, known = before[side]["source"], before[side]["identity"]
        if identity != known and Path(source).expanduser().resolve() != Path(was).expanduser().resolve():
            raise OutputError(
                f"{out / EVALUATION} is of another {side}, {was}, not {source}; give another folder, or remove it."
            )


def _read_evaluation(out: Path) -> dict[str, Any] | None:
    """What stands in a folder's evaluation.json of both sides; None where there is none.

    Raises:
        OutputError: it is damaged.
    """
    path = out / EVALUATION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        for side, keys in {"subject": ("source", "identity", "kind"), "reference": ("source", "identity")}.items():
            [found[side][key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error!r}); remove it, or give another folder.") from error
    return found


def _cropped(images: Images, size: tuple[int, int]) -> Images:
    """The centre crops of images, scaled to `size` (H, W) as those are that features are of."""
    return dataclasses.replace(images, read=functools.partial(_read_cropped, images.read, size))


def _read_cropped(read: Callable[[int], np.ndarray], size: tuple[int, int], index: int) -> np.ndarray:
    return center_crop(read(index), size)


def _look_at_reference(judged: Subject, given: Reference | None, own: Features, look: Look, folder: Path) -> Features:
    """Features of what the subject is compared with; images are cropped to the subject's size."""
    size = tuple(own.about["size"])
    if judged.originals:  # halves of pairs, of the size of the other halves
        source = given.source if given else judged.source
        return look_at(judged.originals, size, look, folder, source=source, what="reference")
    if given.features:
        return given.features
    # Moments of a file are at the size of the images beside them, which is not to be changed.
    found = look_at(given.images, None if given.moments else size, look, folder, source=given.source, what="reference")
    if given.moments and found.sets:
        found.sets[INCEPTION] = dataclasses.replace(found.sets[INCEPTION], count=None, moments=given.moments)
    return found


# --- on the screen ---------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any], out: Path) -> None:
    role = found["reference"]["role"]
    whose = "" if role == UNKNOWN else f", {role} of the run"
    table = Table(
        "figure",
        "value ± error",
        "better",
        "how",
        title=escape(f"{found['subject']['source']} against {found['reference']['source']}{whose}"),
        caption=BOUNDS if any(figure["bound"] is not None for figure in found["figures"].values()) else None,
    )
    for figure in found["figures"].values():
        value = written(figure["value"], figure["error"], figure["bound"])
        how = "; ".join(filter(None, (figure["protocol"], figure["error_of"])))
        table.add_row(escape(figure["title"]), value, figure["better"], how)
    for figure in found["left_out"].values():
        table.add_row(escape(figure["title"]), "left out", "", figure["why"])
    Console().print(table)
    for flag in found["flags"]:
        say(f"note: {flag}")
    Console().print(f"written: {out / EVALUATION}", highlight=False, markup=False, soft_wrap=True)
