"""Samples beside their nearest training images, and whether they lie nearer than new real images do.

training, held-out images, samples --extractor--> features --nearest--> distances --memorisation--> figures, sheets
(the real ones, if asked, --autoencoder--> reconstructions first)
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from rae.autoencoder.baselines import open_autoencoder
from rae.autoencoder.rae import RAE
from rae.commands.compare_figures import DIFFERENT
from rae.commands.compare_pictures import SHOWN, shown_width
from rae.commands.compare_read import Compared, Pictures
from rae.commands.feature_folder import check_left_out, read_features, write_features
from rae.commands.fingerprint import fingerprint
from rae.commands.look import KEYS, remove_features, say
from rae.commands.pictures import alone, checksum
from rae.config import parse
from rae.data.image_set import Images, digest
from rae.data.images import DataConfig, Views, open_images, open_split, to_bytes, to_unit
from rae.evaluation.features import Extractor, open_extractor
from rae.evaluation.nearest import Memorisation, memorisation, nearest
from rae.evaluation.reference import DIGESTS
from rae.evaluation.report import Piece, ReportError, curves, heading, note, paragraph, sheet, table
from rae.evaluation.uncertainty import written
from rae.processes import process_state
from rae.training.display import progress

_BLOCK = 4096  # training images compared at a time
_POINTS = 200  # of a line
UNLIKELY = 0.01  # chance below which a share is called too large
DECODED = (
    "Samples came out of a decoder, and are compared with images that did not: one that was learnt by heart shows as "
    "its reconstruction, which may lie as far from it as other images do. --through AUTOENCODER reconstructs real "
    "images first."
)

Picture = Callable[[int], np.ndarray]  # number of an image -> uint8 [h, w, 3]


@dataclass(frozen=True)
class Nearest:
    """What samples are compared with.

    Attributes:
        training: the images that the models were trained on; or a run, for those of its recipe.
        held_out: real images that they were not; None = the held-out ones of that run.
        features: the name of an extractor.
        input_size: pixels per side that it sees; None = its own.
        batch: images at a time.
        through: an autoencoder that training and held-out images are reconstructed by first, as samples came out of its
            decoder: a latent that was learnt by heart is decoded to the reconstruction of an image, not to the image.
    """

    training: DataConfig
    held_out: DataConfig | None
    features: str
    input_size: int | None
    batch: int
    through: str | None = None


@dataclass(frozen=True)
class Known:
    """A set of images as the comparison sees it.

    Attributes:
        features: [N,d].
        digests: [N] int64, of the pixels, as of `pixel_digests`.
        picture: of each.
    """

    features: Tensor
    digests: Tensor
    picture: Picture


def nearest_images(compared: Sequence[Compared], near: Nearest, folder: Path) -> list[Piece]:
    """The section of all folders of samples. Features are kept in `folder`, where a second call finds them.

    Raises:
        OutputError: another process is at work in `folder`.
        ReportError: no samples, or of several sizes; held-out images that all are training images, or are not given.
        ImageError: an image that cannot be read, unless `on_broken` is "skip"; the page then says how many there are.
    """
    samples = {each.name: each.samples for each in compared if each.samples and each.samples.files}
    if not samples:
        raise ReportError("--nearest looks for the neighbours of samples, and no folder given holds any PNGs of them.")
    sizes = {tuple(pictures.protocol["size"]) for pictures in samples.values()}
    if len(sizes) > 1:
        told = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise ReportError(f"--nearest: samples of one size are compared, these have {told}; give those of one size.")
    (size,) = sizes
    training, held_out, data = _open(near)
    training, held_out = (_by_pixels(images, how) for images, how in zip((training, held_out), data))
    if training.identity == held_out.identity:
        raise ReportError(
            "--nearest and --held-out are the same images; what is compared with must not have been trained on."
        )
    plain = open_extractor(near.features, input_size=near.input_size).to(process_state().device)
    real = _Reconstructed(near.through, plain, samples) if near.through else plain

    def look_at(images: Images, how: DataConfig, what: str, extractor: nn.Module = real) -> Known:
        settings = [images.identity, list(size), extractor.identity]
        seen.add(images.identity)
        place = folder / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        named = {near.features: extractor}
        write_features(images, size, named, place, data=how, batch=near.batch, crop=True, what=what)
        found, read = read_features(place, near.features)
        views, missing = Views(images, how, size), check_left_out(images, read, place, how.on_broken)
        for index in missing:
            say(f"left out: {images.names[index]} cannot be read")
        if missing:
            left_out.append(f"{len(missing):,} of {len(images):,} {what}")
        features, digests = (found.rows[kind] for kind in ("features", DIGESTS))
        return Known(features, digests, lambda i: views[read[i]]["image"].permute(1, 2, 0).numpy())

    left_out: list[str] = []
    seen: set[str] = set()
    with alone(folder):
        known = look_at(training, data[0], "training images"), look_at(held_out, data[1], "held-out images")
        if torch.isin(known[1].digests, known[0].digests).all():
            raise ReportError(
                f"all {len(known[1].digests):,} held-out images are training images as well, pixel for pixel; what is "
                "compared with must not have been trained on: give others with --held-out."
            )
        look_at_own = functools.partial(look_at, extractor=plain)
        own = {name: _look_at_samples(pictures, data[0], look_at_own) for name, pictures in samples.items()}
        if process_state().is_main_process:
            remove_features(folder, lambda _, about: about.keys() >= KEYS and about["identity"] not in seen)
    through = f"reconstructed by {near.through}, " if near.through else ""
    protocol = (
        f"{len(known[0].features):,} training and {len(known[1].features):,} held-out images, {size[0]} x {size[1]} "
        f"pixels, {through}features of {near.features} ({plain.identity[:12]})"
    )
    notes = [note(f"Left out, since they cannot be read: {', '.join(left_out)}.")] if left_out else []
    notes += [] if near.through else [note(DECODED)]
    return notes + remembered(own, known[1], known[0], protocol)


class _Reconstructed(nn.Module):
    """An extractor of what an autoencoder makes of images, 8-bit as samples are.

    Attributes:
        identity: of both.
    """

    def __init__(self, name: str, extractor: Extractor, samples: Mapping[str, Pictures]) -> None:
        super().__init__()
        self.extractor, self.autoencoder = extractor, open_autoencoder(name).to(process_state().device)
        decoder = checksum(self.autoencoder.decoder)
        for sample, pictures in samples.items():
            if (other := pictures.protocol.get("decoder")) != decoder:
                raise ReportError(
                    f"{name} has the decoder {decoder[:12]}, {sample} came out of {str(other)[:12]}: give the "
                    "autoencoder that the samples were decoded by."
                )
        self.identity = digest([extractor.identity, self.autoencoder.latent_identity, decoder])

    def describe(self) -> dict[str, Any]:
        return self.extractor.describe() | {"identity": self.identity}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, autoencoder = to_unit(images), self.autoencoder
        if isinstance(autoencoder, RAE):  # whose encoder may see fewer pixels
            x = autoencoder.reconstruct(x, resize=autoencoder.output_size != autoencoder.image_size)
        else:
            x = autoencoder.decode(autoencoder.encode(x))
        return self.extractor(to_bytes(x))


def sources(near: Nearest) -> list[str]:
    """Where the images lie that samples are compared with."""
    return [how.source for how in _how(near) if how]


def _how(near: Nearest) -> tuple[DataConfig, DataConfig | None]:
    """How training images are read, those of a run by its recipe, and held-out ones; None = of no other source."""
    recipe, reading = Path(near.training.source).expanduser() / "recipe.yaml", near.training
    if not recipe.is_file():
        return near.training, near.held_out
    if reading.image and not near.held_out:
        raise ReportError(f"--image {reading.image}: {reading.source} is a run, whose recipe names it; leave it out.")
    data = parse(DataConfig, yaml.safe_load(recipe.read_bytes())["data"], str(recipe))
    changes = {"workers": reading.workers, "enlarge": data.enlarge or reading.enlarge}
    changes["on_broken"] = "skip" if "skip" in (data.on_broken, reading.on_broken) else "error"
    data = data.model_copy(update=changes)
    others = data.model_copy(update={"source": data.held_out}) if isinstance(data.held_out, str) else None
    return data, near.held_out or others


def _open(near: Nearest) -> tuple[Images, Images, tuple[DataConfig, DataConfig]]:
    """Training and held-out images, and how they are read."""
    data, others = _how(near)
    training, held_out = open_split(data)
    if near.held_out:
        held_out = open_images(others.source, others.image, others.label)
    if held_out is None:
        raise ReportError(
            f"{near.training.source} has no held-out images: say with --held-out which real images the models were not "
            "trained on. Their distances are what those of samples are compared with."
        )
    return training, held_out, (data, others or data)


def _look_at_samples(pictures: Pictures, data: DataConfig, look_at: Callable) -> Known:
    how = data.model_copy(update={"source": str(pictures.folder), "image": None, "label": "", "held_out": 0.0})
    made = {key: value for key, value in pictures.protocol.items() if key != "jobs"}
    images = _by_pixels(open_images(how.source, how.image, how.label), how, json.dumps(made, sort_keys=True))
    return look_at(images, how, f"samples of {pictures.folder.name}")


def _by_pixels(images: Images, how: DataConfig, *also: str) -> Images:
    """Images with an identity that knows some of their pixels, and what else they depend on."""
    return dataclasses.replace(images, identity=digest([fingerprint(images, how.on_broken), *also]))


def remembered(samples: Mapping[str, Known], held_out: Known, training: Known, protocol: str) -> list[Piece]:
    """Figures, distances, and sheets of the images that lie nearest to training images.

    Args:
        samples: by name.
        held_out: real images that were not trained on.
        training: those that were.
        protocol: of how many images and by which features.
    """
    sets = {**samples, "held-out real images": held_out}
    features = torch.cat([known.features for known in sets.values()]).to(process_state().device)
    found = [x[:, 0].cpu() for x in nearest(features, _blocks(training.features))]
    distances, neighbours = (dict(zip(sets, x.split([len(known.features) for known in sets.values()]))) for x in found)
    real = distances["held-out real images"]
    figures = {name: memorisation(distances[name], real) for name in samples}
    pieces = [
        paragraph(
            "The distance of each sample to its nearest training image, compared with those of real images that were "
            "not trained on. Plain images lie nearer than rich ones, whoever made them: copies show in the second "
            f"figure, and in the pictures below. {protocol}."
        ),
        _table(figures, distances),
        *(paragraph(_verdict(name, figure)) for name, figure in figures.items()),
    ]
    if (real == 0).any():
        pieces.append(
            note(
                f"{int((real == 0).sum())} of the held-out images have the very features of a training image: they are "
                "not new, and hide what they should show. Take them out."
            )
        )
    pieces.append(
        curves(
            {name: _distribution(d) for name, d in distances.items()},
            "distance to the nearest training image",
            "distance",
            "share of images",
        )
    )
    for name, known in sets.items():
        pieces.append(heading(f"Nearest to training images: {name}"))
        pieces.append(_sheet(name, known, training, distances[name], neighbours[name]))
    return pieces


def _blocks(features: Tensor) -> Iterator[Tensor]:
    with progress("nearest", len(features)) as advance:
        for number, block in enumerate(features.split(_BLOCK), start=1):
            yield block
            advance(min(number * _BLOCK, len(features)), "")


def _table(figures: Mapping[str, Memorisation], distances: Mapping[str, Tensor]) -> Piece:
    rows = [["samples", *(f"{len(distances[name]):,}" for name in figures)]]
    medians = [f"{distances[name].median():.4g}" for name in figures]
    rows.append([f"median distance\nheld-out: {distances['held-out real images'].median():.4g}", *medians])
    rows.append(
        ["nearer than a new real image\nAUC; 0.5 = no difference", *(written(*f.auc) for f in figures.values())]
    )
    first = next(iter(figures.values()))
    if first.share:
        title = f"very near: below {first.near:.4g}\n{first.expected:.2%} expected, as of new real images"
        rows.append([title, *(_share(figure, len(distances[name])) for name, figure in figures.items())])
    return table(["figure", *figures], rows)


def _share(figure: Memorisation, count: int) -> str:
    value, error, bound = figure.share
    if bound is None:
        share = f"{value:.2%} ± {error:.2%}"
    else:
        share = f"{written(*figure.share)}\nof {count:,}, with 95 % confidence"
    return share + f"\nchance of as many: {figure.chance:.2g}" * (value > 0)  # none or more: 1


def _verdict(name: str, figure: Memorisation) -> str:
    value, error = figure.auc
    if abs(value - 0.5) <= DIFFERENT * (error or 0):
        auc = "no difference between its samples and new real images is told by how near training images lie"
    elif value > 0.5:
        auc = "its samples lie nearer to training images than new real images do"
    else:
        auc = "its samples lie farther from training images than new real images do"
    if figure.share is None:
        return f"{name}: {auc}. Whether a few are copies, 99 held-out images and more would tell."
    if figure.chance < UNLIKELY:
        return f"{name}: {auc}, and too many lie very near: look below whether they are copies."
    return f"{name}: {auc}; no more lie very near than chance would have it."


def _distribution(distances: Tensor) -> tuple[list[float], list[float]]:
    shares = torch.linspace(0, 1, min(_POINTS, len(distances)), dtype=torch.float64)
    return torch.quantile(distances, shares).tolist(), shares.tolist()


def _sheet(name: str, known: Known, training: Known, distances: Tensor, neighbours: Tensor) -> Piece:
    chosen = distances.argsort(stable=True)[:SHOWN].tolist()
    rows = [np.stack([known.picture(i) for i in chosen])]
    rows.append(np.stack([training.picture(i) for i in neighbours[chosen].tolist()]))
    under = [[f"{distances[i]:#.3g}".removesuffix(".") for i in chosen], []]
    caption = "Those that lie nearest, the nearest first, with the distance; below each its nearest training image."
    return sheet(rows, caption, names=["image", "training"], under=under, size=shown_width(rows[0].shape[2]))
