"""Features of two sets of images, or pairs of images -> all figures that can be had of them, with their protocol."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rae.data.image_set import Images
from rae.data.images import to_tensor, to_unit
from rae.evaluation.class_agreement import NEIGHBOURS, class_agreement, numbered_alike, real_agreement
from rae.evaluation.frechet import frechet_measured, frechet_to_infinity, least_to_infinity, normal
from rae.evaluation.inception_score import SPLIT, inception_score
from rae.evaluation.kernel_distance import kernel_distance
from rae.evaluation.lpips import LPIPS
from rae.evaluation.manifold import manifold, overlap
from rae.evaluation.reconstruction import WINDOW, psnr, ssim
from rae.evaluation.reference import FeatureSet, by_digest
from rae.evaluation.uncertainty import Measured, Share, measured_mean

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


def judge(samples: FeatureSet, reference: FeatureSet, extractor: str) -> dict[str, Figure]:
    """Figures of samples against a reference, by the features of one extractor, whatever order the images are in.

    Args:
        samples: with all rows. Class agreement is of samples with the classes of the reference only.
        reference: with moments of all its images, and rows of some; sFID where it has moments of spatial features.
        extractor: its name; "inception" has more to tell than encoders.

    Returns:
        "METRIC/EXTRACTOR" => figure, without those of `left_out`.

    Raises:
        ValueError: too few images for a metric, other dimensions, features that are not finite.
    """
    samples, reference = by_digest(samples), by_digest(reference)
    rows, known = samples.rows["features"], reference.rows["features"]
    of = "images of a number not known" if reference.count is None else f"{reference.count:,} images"
    against, among = f"{len(rows):,} images against {of}", f"{len(rows):,} images against {len(known):,}"
    short, suffix = _distance(extractor), _suffix(extractor)
    figures, normal_reference = {}, normal(*reference.moments["features"])
    if left_out(samples, extractor):
        figures["frechet"] = _figure(f"{short}{suffix}", frechet_measured(rows, normal_reference), "lower", against)
    else:
        distance = frechet_to_infinity(rows, normal_reference)
        line = f"{against}; by the line through N, N / 2 and N / 4 of them, divided by digest"
        figures["frechet"] = _figure(f"{short}{suffix}", distance.finite, "lower", against)
        title = f"{short} of infinitely many{suffix}"
        figures["frechet_infinite"] = _figure(title, distance.infinite, "lower", line)
    figures["kid"] = _figure(f"KID{suffix}", kernel_distance(rows, known), "lower", f"{among}, all pairs")
    own, real = (
        manifold(each, k=PRDC_NEIGHBOURS, name=name) for name, each in (("samples", rows), ("reference", known))
    )
    for k, names in ((ADM_NEIGHBOURS, ("precision", "recall")), (PRDC_NEIGHBOURS, ("density", "coverage"))):
        found = overlap(own, real, k=k)
        for name in names:
            title, how = f"{name}{suffix}", f"{among}, k = {k}"
            figures[name] = _figure(title, getattr(found, name), "higher", how)
    if (classes := reference.classes) and samples.classes:
        labels, _ = numbered_alike(samples.classes, classes)
        if labels is not None:
            agreement, among_real = class_agreement(rows, labels, known, classes), real_agreement(known, classes)
            how = f"{among}, k = {NEIGHBOURS}; of real images among each other {among_real.value:.3f}"
            figures["class_agreement"] = _figure(f"class agreement{suffix}", agreement, "higher", how)
    if extractor == INCEPTION:
        split = f"splits of {SPLIT:,} by digest" if len(rows) > SPLIT else "all together"
        score = inception_score(samples.rows["logits"])
        if moments := reference.moments.get("spatial"):
            spatial = frechet_measured(samples.rows["spatial"], normal(*moments))
            figures["sfid"] = _figure("sFID", spatial, "lower", against)
        figures["inception_score"] = _figure("Inception Score", score, "higher", f"{len(rows):,} images, {split}")
    return {f"{name}/{extractor}": figure for name, figure in figures.items()}


@torch.no_grad()
def judge_pairs(originals: Images, images: Images, distance: LPIPS | None, batch: int = 32) -> dict[str, Figure]:
    """PSNR, SSIM and, with `distance`, LPIPS of reconstructions, from 8-bit images: means over the images.

    Args:
        originals, images: in the same order.
        distance: on the device where it is to compute.
        batch: images at a time.
    """
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    for x, y in _pairs(originals, images, batch):
        found["psnr"].append(psnr(x, y))
        if min(x.shape[2:]) >= WINDOW:
            found["ssim"].append(ssim(x, y))
        if distance is not None:
            device = next(distance.parameters()).device
            found["lpips"].append(distance(*(2 * each.to(device) - 1 for each in (x, y))).double().cpu())
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
        yield tuple(to_unit(torch.stack([to_tensor(each.read(i)) for i in chunk])) for each in (images, originals))


def _distance(extractor: str) -> str:
    return "FID" if extractor == INCEPTION else "FD"


def _suffix(extractor: str) -> str:
    return "" if extractor == INCEPTION else f" ({extractor})"


def _figure(title: str, found: Measured | Share, better: Literal["lower", "higher"], protocol: str) -> Figure:
    bound = found.bound if isinstance(found, Share) else None
    return Figure(title, found.value, found.error, bound, better, protocol)
