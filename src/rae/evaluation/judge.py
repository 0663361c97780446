"""Features of two sets of images, or pairs of images -> all figures that can be had of them, with their protocol."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rae.data.image_set import Images
from rae.data.images import to_tensor, to_unit
from rae.evaluation.class_agreement import NEIGHBOURS, class_agreement, numbered_alike, real_agreement
from rae.evaluation.frechet import Normal, frechet_measured, frechet_to_infinity, least_to_infinity, normal
from rae.evaluation.inception_score import SPLIT, inception_score
from rae.evaluation.kernel_distance import kernel_distance
from rae.evaluation.lpips import LPIPS
from rae.evaluation.manifold import manifold, overlap
from rae.evaluation.reconstruction import WINDOW, psnr, ssim
from rae.evaluation.reference import FeatureSet, by_digest
from rae.evaluation.uncertainty import Measured, Share, measured_mean, strata_of

INCEPTION = "inception"
ADM_NEIGHBOURS, PRDC_NEIGHBOURS = 3, 5  # k of precision and recall as ADM's evaluator, of density and coverage as prdc


class Figure(NamedTuple):
    """A measured number, and how it was measured.

    Attributes:
        title: what to call it, as papers do.
        value: the number.
        error: its standard error; None where it has none.
        bound: in its place, of a share of none or all of the images; see `share_bound`.
        better: which way.
        protocol: numbers of images, and whatever else it depends on.
    """

    title: str
    value: float
    error: float | None
    bound: float | None
    better: Literal["lower", "higher"]
    protocol: str


class LeftOut(NamedTuple):
    """A figure that is not given.

    Attributes:
        title: what it would be called.
        why: and what it takes.
    """

    title: str
    why: str


def left_out(samples: FeatureSet, extractor: str) -> dict[str, LeftOut]:
    """Figures that `judge` does not give of so few samples: "METRIC/EXTRACTOR" => why."""
    count, dim = samples.rows["features"].shape
    if count >= (least := least_to_infinity(dim)):
        return {}
    title = f"{_distance(extractor)} of infinitely many{_suffix(extractor)}"
    why = f"its line takes more images than features in N / 4: of {dim:,} at least {least:,}, there are {count:,}"
    return {f"frechet_infinite/{extractor}": LeftOut(title, why)}


def take_turns(labels: Sequence[int]) -> bool:
    """Whether K > 1 classes take turns, c_i = c_(i mod K), as those of `rae sample` without --random-labels do."""
    turn = len(set(labels))
    return 1 < turn < len(labels) and all(label == labels[i % turn] for i, label in enumerate(labels))


def judge(
    samples: FeatureSet,
    reference: FeatureSet,
    extractor: str,
    *,
    pairs: tuple[Sequence[int], Sequence[int]] | None = None,
    turns: bool = False,
) -> dict[str, Figure]:
    """Figures of samples against a reference, by the features of one extractor, whatever order the images are in.

    Args:
        samples: with all rows. Class agreement is of samples with the classes of the reference only.
        reference: with moments of all its images, and rows of some; sFID where it has moments of spatial features.
        extractor: its name; "inception" has more to tell than encoders.
        pairs: the number of the image in each row of the samples, and of the reference, of samples that are
            reconstructions: one and what it is of have the same number. Errors are then of other pairs.
        turns: the samples' classes took turns, see `take_turns`, so that errors are of other samples of the same
            classes; as of classes that are drawn, which is too large, where there is one sample of a class, or where
            the set has no classes.

    Returns:
        "METRIC/EXTRACTOR" => figure, without those of `left_out`.

    Raises:
        ValueError: too few images for a metric, other dimensions, features that are not finite; numbers of `pairs` that
            are not those of all rows of both.
    """
    if pairs:
        samples, reference = _paired(samples, reference, *pairs)
    else:
        samples, reference = by_digest(samples), by_digest(reference)
    strata, how_turns = None, ""
    if turns and samples.classes:
        strata = strata_of(samples.classes.labels)
        one = "error as if they were drawn, for of some there is one image"
        how_turns = f"; classes in turn, {one if strata is None else 'error within them'}"
    rows, known = samples.rows["features"], reference.rows["features"]
    of = "images of a number not known" if reference.count is None else f"{reference.count:,} images"
    against, among = f"{len(rows):,} images against {of}", f"{len(rows):,} images against {len(known):,}"
    short, suffix = _distance(extractor), _suffix(extractor)
    if pairs:
        against, among = (f"{each} that these are of" for each in (against, among))
    drawn, figures = f"{against}{how_turns}", {}

    def other(kind: str) -> Normal | Tensor:  # what stays, or what changes with the samples
        return reference.rows[kind] if pairs else normal(*reference.moments[kind])

    if left_out(samples, extractor):
        distance = frechet_measured(rows, other("features"), strata=strata)
        figures["frechet"] = _figure(f"{short}{suffix}", distance, "lower", drawn)
    else:
        line = frechet_to_infinity(rows, other("features"), strata=strata)
        how = f"{against}; by the line through N, N / 2 and N / 4 of {'the pairs' if pairs else 'them'}, divided by "
        how += f"digest{'' if strata is None else ' and class'}{how_turns}"
        figures["frechet"] = _figure(f"{short}{suffix}", line.finite, "lower", drawn)
        figures["frechet_infinite"] = _figure(f"{short} of infinitely many{suffix}", line.infinite, "lower", how)
    distance = kernel_distance(rows, known, paired=bool(pairs), strata=strata)
    figures["kid"] = _figure(f"KID{suffix}", distance, "lower", f"{among}, all pairs{how_turns}")
    own, real = (
        manifold(each, k=PRDC_NEIGHBOURS, name=name) for name, each in (("samples", rows), ("reference", known))
    )
    for k, names in ((ADM_NEIGHBOURS, ("precision", "recall")), (PRDC_NEIGHBOURS, ("density", "coverage"))):
        shares = overlap(own, real, k=k, strata=strata)._asdict()
        for name in names:
            # of images that change with those that they lie among no error was found that holds (docs/metrics.md)
            found, how = (Measured(shares[name].value, None), "; no error of pairs") if pairs else (shares[name], "")
            figures[name] = _figure(f"{name}{suffix}", found, "higher", f"{among}, k = {k}{how}{how_turns}")
    if (classes := reference.classes) and samples.classes:
        labels, _ = numbered_alike(samples.classes, classes)
        if labels is not None:
            agreement = class_agreement(rows, labels, known, classes, strata=strata)
            among_real = real_agreement(known, classes)
            how = f"{among}, k = {NEIGHBOURS}; of real images among each other {among_real.value:.3f}{how_turns}"
            figures["class_agreement"] = _figure(f"class agreement{suffix}", agreement, "higher", how)
    if extractor == INCEPTION:
        split = f"splits of {SPLIT:,} by digest" if len(rows) > SPLIT else "all together"
        score = inception_score(samples.rows["logits"], strata=strata)
        if "spatial" in reference.moments:
            spatial = frechet_measured(samples.rows["spatial"], other("spatial"), strata=strata)
            figures["sfid"] = _figure("sFID", spatial, "lower", drawn)
        how = f"{len(rows):,} images, {split}{how_turns}"
        figures["inception_score"] = _figure("Inception Score", score, "higher", how)
    return {f"{name}/{extractor}": figure for name, figure in figures.items()}


def _paired(
    samples: FeatureSet, reference: FeatureSet, numbers: Sequence[int], of: Sequence[int]
) -> tuple[FeatureSet, FeatureSet]:
    """Both with rows in the order of the originals' digests, which rounding in a decoder does not change."""
    counts = [len(each.rows["features"]) for each in (samples, reference)]
    if [len(numbers), len(of)] != counts or sorted(numbers) != sorted(of) or len(set(of)) < len(of):
        raise ValueError(
            f"{len(numbers)} and {len(of)} numbers of {counts[0]} samples and {counts[1]} originals make no pairs: "
            "every row of either side has its own number, and both of a pair the same one."
        )
    number = torch.tensor(of)
    reference = by_digest(dataclasses.replace(reference, rows=reference.rows | {"number": number}))
    place = torch.tensor(numbers).argsort()[reference.rows["number"].argsort().argsort()]
    rows = {kind: values[place] for kind, values in samples.rows.items()}
    classes = samples.classes and samples.classes._replace(labels=samples.classes.labels[place])
    return dataclasses.replace(samples, rows=rows, classes=classes), reference


@torch.no_grad()
def judge_pairs(
    originals: Images,
    images: Images,
    distance: LPIPS | None,
    batch: int = 32,
    device: torch.device | None = None,
) -> dict[str, Figure]:
    """PSNR, SSIM and, with `distance`, LPIPS of reconstructions, from 8-bit images: means over the images.

    Args:
        originals, images: in the same order.
        distance: on that device.
        batch: images at a time.
        device: where it is computed; None = where `distance` is, the CPU without it.
    """
    device = device or (next(distance.parameters()).device if distance is not None else torch.device("cpu"))
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    for pair in _pairs(originals, images, batch):
        x, y = (to_unit(each.to(device)) for each in pair)
        found["psnr"].append(psnr(x, y).cpu())
        if min(x.shape[2:]) >= WINDOW:
            found["ssim"].append(ssim(x, y).cpu())
        if distance is not None:
            found["lpips"].append(distance(2 * x - 1, 2 * y - 1).cpu().double())
    titles = {"psnr": ("PSNR / dB", "higher"), "ssim": ("SSIM", "higher"), "lpips": ("LPIPS (VGG16)", "lower")}
    how = f"mean over {len(images):,} images and what they are of, 8 bits"
    return {
        name: _figure(titles[name][0], measured_mean(torch.cat(values)), titles[name][1], how)
        for name, values in found.items()
        if values
    }


def _pairs(originals: Images, images: Images, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), batch):
        chunk = range(start, min(start + batch, len(images)))
        yield tuple(torch.stack([to_tensor(each.read(i)) for i in chunk]) for each in (images, originals))


def _distance(extractor: str) -> str:
    return "FID" if extractor == INCEPTION else "FD"


def _suffix(extractor: str) -> str:
    return "" if extractor == INCEPTION else f" ({extractor})"


def _figure(title: str, found: Measured | Share, better: Literal["lower", "higher"], protocol: str) -> Figure:
    bound = found.bound if isinstance(found, Share) else None
    return Figure(title, found.value, found.error, bound, better, protocol)
