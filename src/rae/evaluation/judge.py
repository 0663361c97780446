"""Features of two sets of images, or pairs of images -> all figures that can be had of them, with their protocol."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rae.data.image_set import Images
from rae.data.images import to_tensor, to_unit
from rae.evaluation.class_agreement import NEIGHBOURS, class_agreement, numbered_alike, real_agreement
from rae.evaluation.frechet import PARTS, Normal, frechet_measured, frechet_to_infinity, least_to_infinity, normal
from rae.evaluation.inception_score import SPLIT, inception_score
from rae.evaluation.kernel_distance import kernel_distance
from rae.evaluation.lpips import LPIPS
from rae.evaluation.manifold import LEAST_PARTS, manifold, overlap
from rae.evaluation.reconstruction import WINDOW, psnr, ssim
from rae.evaluation.reference import FeatureSet, by_digest
from rae.evaluation.uncertainty import Measured, Share, drawn_error, fewest, measured_mean, strata_of, written

INCEPTION = "inception"
WITHIN, AS_DRAWN = "classes in turn, error within them", "classes in turn, error as if they were drawn"
NO_ERROR = "no error of pairs"
KID_AS_DRAWN = ", classes in turn as if they were drawn"  # which is another figure: too low (docs/metrics.md)
ADM_NEIGHBOURS, PRDC_NEIGHBOURS = 3, 5  # k of precision and recall as ADM's evaluator, of density and coverage as prdc
Better = Literal["lower", "higher", "nearer to 1"]
AMONG_REAL = "; of real images among each other "  # behind it, what the reference comes to; no part of the protocol


class Figure(NamedTuple):
    """A measured number, and how it was measured.

    Attributes:
        title: what to call it, as papers do.
        value: the number.
        error: its standard error; None where it has none.
        bound: in its place, of a share of none or all of the images; see `share_bound`.
        better: which way.
        protocol: numbers of images, and whatever else it depends on; figures of one protocol compare.
        error_of: what its error is of, which does not move the value; "" = of other samples, or other pairs, or there
            is none.
    """

    title: str
    value: float
    error: float | None
    bound: float | None
    better: Better
    protocol: str
    error_of: str


class LeftOut(NamedTuple):
    """A figure that is not given.

    Attributes:
        title: what it would be called.
        why: and what it takes.
    """

    title: str
    why: str


def left_out(samples: FeatureSet, extractor: str, *, turns: bool = False) -> dict[str, LeftOut]:
    """Figures that `judge` does not give of so few samples: "METRIC/EXTRACTOR" => why. `turns`: see there."""
    count, dim = samples.rows["features"].shape
    of_class = fewest(samples.classes.labels) if turns and samples.classes else None
    if count < (least := least_to_infinity(dim)):
        why = f"its line takes more images than features in N / 4: of {dim:,} at least {least:,}, there are {count:,}"
    elif of_class is not None and of_class < PARTS[-1]:
        why = f"its line divides each class into {PARTS[-1]}, for they took turns; of some there are {of_class} images"
    else:
        return {}
    title = f"{_distance(extractor)} of infinitely many{_suffix(extractor)}"
    return {f"frechet_infinite/{extractor}": LeftOut(title, why)}


def take_turns(labels: Sequence[int]) -> bool:
    """Whether K > 1 classes take turns, c_i = c_(i mod K), N > K: of samples whose folder does not say it.

    Earlier versions did not: one image of each class, or classes that `--labels` names twice, look like drawn ones.
    """
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
            reconstructions: one and what it is of have the same number. Errors are then of other pairs, and there is no
            class agreement.
        turns: the samples' classes took turns, so that errors are of other samples of the same classes, and KID meets
            classes by their shares; all as of classes that are drawn, with errors that are too large and a KID that is
            too low, where there is one sample of a class, or where the set has no classes. Not of pairs.

    Returns:
        "METRIC/EXTRACTOR" => figure, without those of `left_out`.

    Raises:
        ValueError: too few images for a metric, other dimensions, features that are not finite; numbers of `pairs` that
            are not those of all rows of both, pairs in turn.
    """
    if pairs and turns:
        raise ValueError("pairs of classes in turn are asked for: errors of pairs are of other pairs; leave turns out.")
    if pairs:
        samples, reference = _paired(samples, reference, *pairs)
    else:
        samples, reference = by_digest(samples), by_digest(reference)
    strata, error_of = None, ""
    if turns and not samples.classes:
        error_of = f"{AS_DRAWN}, for they are left alone"
    elif turns:
        strata = strata_of(samples.classes.labels)
        error_of = WITHIN if strata is not None else f"{AS_DRAWN}, for of some there is one image"
    rows, known = samples.rows["features"], reference.rows["features"]
    of = "images of a number not known" if reference.count is None else f"{reference.count:,} images"
    against, among = f"{len(rows):,} images against {of}", f"{len(rows):,} images against {len(known):,}"
    short, figures = _distance(extractor), {}
    if pairs:
        against, among = (f"{each} that these are of" for each in (against, among))

    def other(kind: str) -> Normal | Tensor:  # what stays, or what changes with the samples
        return reference.rows[kind] if pairs else normal(*reference.moments[kind])

    def add(name: str, title: str, found: Measured | Share, better: Better, how: str, said: str = error_of) -> None:
        said = said if found.error is not None or said == NO_ERROR else ""
        figures[f"{name}/{extractor}"] = _figure(f"{title}{_suffix(extractor)}", found, better, how, said)

    def one_by_one(found: Share) -> tuple[Share, str]:  # of images that count or not, whatever the others are
        if found.error is found.bound is None:
            as_drawn = found._replace(error=drawn_error(found.value, len(rows)))
            return as_drawn, f"{AS_DRAWN}, for of each all images count or none"
        return found, error_of

    if left_out(samples, extractor, turns=turns):
        add("frechet", short, frechet_measured(rows, other("features"), strata=strata), "lower", against)
    else:
        line = frechet_to_infinity(rows, other("features"), strata=strata)
        add("frechet", short, line.finite, "lower", against)
        parts = f"by the line through N, N / 2 and N / 4 of {'the pairs' if pairs else 'them'}, divided by digest"
        add("frechet_infinite", f"{short} of infinitely many", line.infinite, "lower", f"{against}; {parts}")
    distance = kernel_distance(rows, known, paired=bool(pairs), strata=strata)
    which = " but of one and what it is of" if pairs else KID_AS_DRAWN if error_of and strata is None else ""
    add("kid", "KID", distance, "lower", f"{among}, all pairs{which}")
    own, real = (
        manifold(each, k=PRDC_NEIGHBOURS, name=name) for name, each in (("samples", rows), ("reference", known))
    )
    of_parts = error_of
    if strata is not None and fewest(strata) < LEAST_PARTS:
        of_parts = f"{AS_DRAWN}, for of some there are fewer than {LEAST_PARTS} images"
    for k, names in ((ADM_NEIGHBOURS, ("precision", "recall")), (PRDC_NEIGHBOURS, ("density", "coverage"))):
        shares = overlap(own, real, k=k, strata=strata)._asdict()
        for name in names:
            found, said = shares[name], of_parts if name in ("recall", "coverage") else error_of
            if pairs:  # of images that change with those that they lie among no error was found (docs/metrics.md)
                found, said = Measured(found.value, None), NO_ERROR
            elif name == "precision":
                found, said = one_by_one(found)
            add(name, name, found, "nearer to 1" if name == "density" else "higher", f"{among}, k = {k}", said)
    if (classes := reference.classes) and samples.classes:
        labels, _ = numbered_alike(samples.classes, classes)
        if labels is not None:
            found, said = one_by_one(class_agreement(rows, labels, known, classes, strata=strata))
            by_real = f"{AMONG_REAL}{written(*real_agreement(known, classes))}"
            add("class_agreement", "class agreement", found, "higher", f"{among}, k = {NEIGHBOURS}{by_real}", said)
    if extractor == INCEPTION:
        if "spatial" in reference.moments:
            distance = frechet_measured(samples.rows["spatial"], other("spatial"), strata=strata)
            add("sfid", "sFID", distance, "lower", against)
        split = f"splits of {SPLIT:,} by digest" if len(rows) > SPLIT else "all together"
        score = inception_score(samples.rows["logits"], strata=strata)
        add("inception_score", "Inception Score", score, "higher", f"{len(rows):,} images, {split}")
    return figures


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
    return dataclasses.replace(samples, rows=rows, classes=None), reference


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


def _figure(title: str, found: Measured | Share, better: Better, protocol: str, error_of: str = "") -> Figure:
    bound = found.bound if isinstance(found, Share) else None
    return Figure(title, found.value, found.error, bound, better, protocol, error_of)
