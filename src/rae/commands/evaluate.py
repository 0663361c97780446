"""`rae evaluate`: every figure by one protocol. `rae reference`: what real images are, once for many evaluations.

subject ----open or make--> images --extractors--> features --judge--> evaluation.json, and a table
reference --open----------> images --extractors--> features ----^
"""

import dataclasses
import importlib.metadata
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rae.commands.feature_folder import read_features, size_of, write_features
from rae.commands.pictures import OutputError, check_file
from rae.commands.reconstruct import write_reconstructions
from rae.commands.subject import Subject, open_subject
from rae.config import ConfigError
from rae.data.image_set import Images
from rae.data.images import DataConfig, open_images, subset
from rae.evaluation.features import Extractor, open_extractor
from rae.evaluation.judge import INCEPTION, judge, judge_pairs
from rae.evaluation.pretrained import load_lpips
from rae.evaluation.reference import (
    FeatureSet,
    Gaussian,
    ReferenceError,
    is_adm_reference,
    load_reference,
    read_adm_reference,
    save_reference,
)
from rae.folders import aside, saved_kind
from rae.processes import process_state

EVALUATION = "evaluation.json"
FORMAT = 1
CROPPED, WHOLE = "centre crop, as in training", "as they are"


@dataclass(frozen=True)
class Look:
    """How images are looked at: by which extractors, how they are read, and how many at a time."""

    extractors: Mapping[str, Extractor]
    data: DataConfig
    batch: int


@dataclass(frozen=True)
class Features:
    """Features of a set of images.

    Attributes:
        about: source, identity, images, size and crop, as they stand in a reference and in `evaluation.json`.
        sets: by name of the extractor; empty where another process holds them.
        read: numbers of the images that could be read.
    """

    about: dict[str, Any]
    sets: dict[str, FeatureSet]
    read: list[int]


def look_at(
    images: Images,
    size: tuple[int, int] | None,
    look: Look,
    folder: Path,
    *,
    source: str,
    keep: int | None = None,
    what: str = "features",
) -> Features:
    """Features of images by all processes, which the first one reads.

    Args:
        images: to look at.
        size: (H, W) in pixels to crop them to; None = they all have one.
        look: by which extractors.
        folder: where features lie in the meantime.
        source: what to call the images.
        keep: rows to keep; None = all.
        what: to call the job on the screen.
    """
    crop, size = size is not None, size or size_of(images, look.data.on_broken)
    write_features(images, size, look.extractors, folder, data=look.data, batch=look.batch, crop=crop, what=what)
    sets, read = {}, []
    if process_state().is_main_process:
        for name in look.extractors:
            sets[name], read = read_features(folder, name, keep)
        missing = sorted(set(range(len(images))) - set(read))
        for index in missing:
            _say(f"left out: {images.names[index]} cannot be read")
    about = {"source": source, "identity": images.identity, "images": len(read), "size": list(size)}
    return Features(about | {"crop": CROPPED if crop else WHOLE}, sets, read)


@dataclass(frozen=True)
class Reference:
    """What images are compared with: images, or features that a file holds.

    Attributes:
        source: as it was given.
        images: to be looked at; None where there are features.
        features: those of a file of `rae reference`.
        moments: those of a file of ADM, which are of more images than it holds.
    """

    source: str
    images: Images | None = None
    features: Features | None = None
    moments: dict[str, Gaussian] | None = None


def _open_extractors(names: Sequence[str], inception: Path | None, input_size: int | None) -> dict[str, Extractor]:
    """Extractors by name; the weights are Inception's, the size is that of all others."""
    if inception and INCEPTION not in names:
        raise ConfigError(f"{inception} are weights of Inception, which --features {', '.join(names)} does not name.")
    if input_size and set(names) == {INCEPTION}:
        raise ConfigError(f"--input-size {input_size} is of encoders; Inception sees 299 pixels per side, always.")
    found = {}
    for name in dict.fromkeys(names):
        settings = {"weights": inception} if name == INCEPTION else {"input_size": input_size}
        found[name] = open_extractor(name, **settings).to(process_state().device)
    return found


def _first(images: Images, num: int | None) -> Images:
    if num is not None and num > len(images):
        raise OutputError(f"{num:,} images are asked for, there are {len(images):,}; ask for fewer.")
    return images if num is None else subset(images, range(num))


def _say(text: str, style: str = "yellow") -> None:
    if process_state().is_main_process:
        Console(stderr=True).print(text, style=style, highlight=False, markup=False, soft_wrap=True)


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
    """
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: a reference is a safetensors file; call it {out.with_suffix('.safetensors').name}.")
    check_file(out)
    look = Look(_open_extractors(features, inception, input_size), data, batch)
    images, parts = _first(open_images(data.source, data.image, data.label), num), out.with_name(f"{out.name}.parts")
    found = look_at(images, size, look, parts, source=data.source, keep=keep, what="reference")
    if not process_state().is_main_process:
        return
    _save(found, look, out)
    shutil.rmtree(parts)
    table = Table("extractor", "images", "rows kept", "written")
    for name, features_of in found.sets.items():
        table.add_row(name, f"{features_of.count:,}", f"{len(features_of.rows['features']):,}", escape(str(out)))
    Console().print(table)


def _save(found: Features, look: Look, path: Path) -> None:
    described = {name: extractor.describe() for name, extractor in look.extractors.items()}
    save_reference(path, found.sets, extractors=described, **found.about)


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
    sample: Callable[[Path], None],
) -> dict[str, Any] | None:
    """`rae evaluate`: figures of images that are there, or of a model's, which it makes first.

    What takes long is kept in `out`, so that the same command goes on where it was interrupted: `samples` or
    `reconstructions`, features, and `reference.safetensors` for other evaluations.

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
        sample: makes the samples of a model of stage 2 in the folder that it is given.
        inception: file of its weights; None = torch hub's.
        input_size: of encoders, see `open_extractor`.

    Returns:
        What stands in `evaluation.json`, in the main process.

    Raises:
        ConfigError: no reference, or one that does not go with the subject.
        ReferenceError: a reference at another size, or by another extractor.
        OutputError: `out` holds something else.
    """
    begun = time.perf_counter()
    look = Look(_open_extractors(features, inception, input_size), data, batch)
    given = _open_reference(reference, look) if reference else None
    distance = load_lpips(purpose="metric").to(process_state().device) if lpips else None
    judged = _prepare(subject, given, out, data=data, num=num, batch=batch, sample=sample)
    own = look_at(judged.images, size, look, out / "features", source=judged.source)
    # A half of a pair has the size of the other one; other images are cropped to that of the subject's.
    of = judged.originals or (given and given.images)
    if of is not None:
        source = judged.source if judged.originals else given.source
        whole = look_at(of, tuple(own.about["size"]), look, out / "reference", source=source, what="reference")
    else:
        whole = given.features
    if not process_state().is_main_process:
        return None
    if given and given.moments:
        whole.sets["inception"] = dataclasses.replace(whole.sets["inception"], count=None, moments=given.moments)
    _check_size(judged, own, whole)
    if of is not None and not (given and given.moments):
        _save(whole, look, out / "reference.safetensors")
    figures = judge_pairs(judged.originals, judged.images, distance, batch) if judged.originals else {}
    for name in look.extractors:
        figures |= judge(own.sets[name], whole.sets[name], name)
    found = {
        "format": FORMAT,
        "subject": {"kind": judged.kind} | own.about | {"protocol": judged.protocol},
        "reference": whole.about,
        "extractors": {name: extractor.describe() for name, extractor in look.extractors.items()},
        "figures": {name: figure._asdict() for name, figure in figures.items()},
        "flags": _flags(judged, own, whole, given),
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


def _prepare(
    subject: str,
    given: Reference | None,
    out: Path,
    *,
    data: DataConfig,
    num: int | None,
    batch: int,
    sample: Callable[[Path], None],
) -> Subject:
    """The subject's images; those of a model are made first."""
    kind, needed = saved_kind(subject), f"{subject}: say what its images are compared with: --reference IMAGES or FILE."
    if kind == "autoencoder":
        if given is None or given.images is None or given.moments:
            raise ConfigError(
                f"{subject} is an autoencoder: its reconstructions are compared with the images that it is given; say "
                "which with --reference IMAGES."
            )
        of = data.model_copy(update={"source": given.source})
        write_reconstructions(subject, of, out / "reconstructions", num=num, batch=batch, rounding="nearest")
        return open_subject(str(out / "reconstructions"), data, None)
    if kind == "diffusion model":
        if given is None:
            raise ConfigError(needed)
        sample(out / "samples")
        return open_subject(str(out / "samples"), data, None)
    judged = open_subject(subject, data, num)
    if judged.originals is None and given is None:
        raise ConfigError(needed)
    if judged.originals is not None and given is not None:
        raise ConfigError(f"{subject} holds reconstructions beside what they are of; leave --reference out.")
    return judged


def _open_reference(source: str, look: Look) -> Reference:
    """Images to be looked at, or features from a file.

    Raises:
        ReferenceError: features by other extractors.
    """
    path = Path(source).expanduser()
    if is_adm_reference(path):
        if others := [name for name in look.extractors if name != "inception"]:
            raise ReferenceError(f"{source} holds moments of Inception, none of {', '.join(others)}; leave these out.")
        return Reference(source, images=open_images(source, None, ""), moments=read_adm_reference(path))
    if path.suffix != ".safetensors":
        return Reference(source, images=open_images(source, look.data.image, look.data.label))
    about, sets = load_reference(path)
    for name, extractor in look.extractors.items():
        if name not in sets:
            raise ReferenceError(
                f"{source} holds features by {', '.join(sets)}, none by {name}; make one with `rae reference ... "
                f"--features {name}`."
            )
        was, now = about.extractors[name], extractor.describe()
        changed = [
            f"{key} {was.get(key)}, now {now.get(key)}" for key in {**was, **now} if was.get(key) != now.get(key)
        ]
        if changed:
            raise ReferenceError(
                f"{source} is by another {name}: {'; '.join(changed)}. Make it again, or set the same."
            )
    fields = about.model_dump(mode="json", include={"source", "identity", "images", "size", "crop"})
    return Reference(source, features=Features(fields, {name: sets[name] for name in look.extractors}, []))


def _check_size(judged: Subject, own: Features, whole: Features) -> None:
    ours, theirs = (_by(found.about["size"]) for found in (own, whole))
    if ours != theirs:
        raise ReferenceError(
            f"the images of {judged.source} have {ours} pixels, those of {whole.about['source']} {theirs}: "
            f"figures across sizes mean nothing. Make a reference at {ours} (`rae reference ... --size`), or, if the "
            f"subject's are larger, crop them: --size {theirs}."
        )


# --- what a reader should know ---------------------------------------------------------------------------------------


def _flags(judged: Subject, own: Features, whole: Features, given: Reference | None) -> list[str]:
    flags, count = [], own.about["images"]
    if own.about["identity"] == whole.about["identity"]:
        flags.append("subject and reference are the same images: distances are 0 whatever these are")
    for name, features in own.sets.items():
        if count <= (width := features.rows["features"].shape[1]):
            flags.append(
                f"{count:,} images are no more than the {width:,} features of {name}: Frechet distances of so few are "
                "far too large, and only compare with others of as many images"
            )
    if given and given.moments:
        flags.append(f"nothing in {whole.about['source']} says by which network and resizing its moments were made")
    if compressed := sum(name.lower().endswith((".jpg", ".jpeg")) for name in judged.images.names):
        flags.append(f"{compressed:,} of the subject's images are JPEG files, whose artefacts are judged with them")
    if judged.protocol.get("precision", "float32") != "float32":
        flags.append(f"sampled in {judged.protocol['precision']}; published figures are of float32")
    counts = Counter(judged.protocol.get("labels", ())).values()
    if counts and max(counts) > min(counts) + 1:
        flags.append(f"classes are not balanced: {min(counts):,} to {max(counts):,} images of each (Table 14)")
    return flags


def _print(found: dict[str, Any], out: Path) -> None:
    table = Table(
        "figure",
        "value ± error",
        "better",
        "how",
        title=escape(f"{found['subject']['source']} against {found['reference']['source']}"),
    )
    for figure in found["figures"].values():
        value = rounded(figure["value"], figure["error"])
        table.add_row(escape(figure["title"]), value, figure["better"], figure["protocol"])
    Console().print(table)
    for flag in found["flags"]:
        _say(f"note: {flag}")
    Console().print(f"written: {out / EVALUATION}", highlight=False, soft_wrap=True)


def rounded(value: float, error: float | None) -> str:
    """12.3456, 0.071 -> "12.35 ± 0.07": to the second digit of the error, or to four digits without one."""
    if not error:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
