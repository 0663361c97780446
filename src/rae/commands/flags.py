"""What a reader of figures should know of the images that they are of, in sentences: `flags` of `evaluation.json`."""

from pathlib import Path
from typing import Any

import torch

from rae.commands.look import Features
from rae.commands.reference import BOTH, TRAINED, UNKNOWN, Reference
from rae.commands.subject import Subject
from rae.data.folders import without_images
from rae.evaluation.class_agreement import numbered_alike
from rae.evaluation.reference import DIGESTS

SAME = "subject and reference are the same images: distances are 0 whatever these are"


def skipped(**sets: dict[str, Any]) -> list[str]:
    """What is to be said of images that could not be read: "subject" or "reference" => how many are in `skipped`."""
    return [
        f"{missing:,} of {about['images'] + missing:,} images of the {whose} cannot be read and "
        f"{'are' if missing > 1 else 'is'} left out"
        for whose, about in sets.items()
        if (missing := about["skipped"])
    ]


def flags_of(judged: Subject, own: Features, whole: Features, given: Reference | None, role: str) -> list[str]:
    """All else that is to be said.

    Args:
        judged, own: the subject, and features of it.
        given, whole: what it is compared with, None where that came with the subject, and features of it.
        role: of `role_of`.
    """
    flags, count = [], own.about["images"]
    if said := _shared(own, whole):
        flags.append(said)
    if not judged.originals and (said := _resized(whole)):
        flags.append(said)
    if judged.kind == "reconstructions" and role in (TRAINED, BOTH):
        flags.append(f"the reference holds {role} of this autoencoder: published rFID is of images that it never saw")
    if judged.kind == "reconstructions" and role == UNKNOWN:
        flags.append("whether this autoencoder saw the reference's images is not known; published rFID: it did not")
    for name, features in own.sets.items():
        if count <= (width := features.rows["features"].shape[1]):
            flags.append(
                f"{count:,} images are no more than the {width:,} features of {name}: Frechet distances of so few are "
                "far too large, and only compare with others of as many images"
            )
    if given and given.features and whole.about["drawn"] == "by place":
        kept = len(next(iter(whole.sets.values())).rows["features"])
        if kept < whole.about["images"]:
            flags.append(
                f"which {kept:,} of the reference's {whole.about['images']:,} images are compared one by one goes by "
                f"their order, for an earlier version made {given.source}; make it again with `rae reference`"
            )
    if given and given.moments:
        flags.append(f"nothing in {whole.about['source']} says by which network and resizing its moments were made")
        if "spatial" not in given.moments:
            flags.append(f"no sFID, for {whole.about['source']} holds no moments of spatial features (mu_s, sigma_s)")
    if compressed := sum(name.lower().endswith((".jpg", ".jpeg")) for name in judged.images.names):
        flags.append(f"{compressed:,} of the subject's images are JPEG files, whose artefacts are judged with them")
    if judged.protocol.get("precision", "float32") != "float32":
        flags.append(f"sampled in {judged.protocol['precision']}; published figures are of float32")
    ours, theirs = (next(iter(found.sets.values())).classes for found in (own, whole))
    known = given.source if given and given.images else None
    for whose, source, classes in (("subject", judged.source, ours), ("reference", known, theirs)):
        if classes and source and (empty := _empty(Path(source).expanduser())):
            named = ", ".join(empty)[:80]
            flags.append(f"folders of the {whose} without images, which are no classes of it ({len(empty):,}): {named}")
    if judged.kind == "samples" and ours:
        counts = ours.labels.bincount(minlength=len(ours.names)).tolist()
        if max(counts) > min(counts) + 1:
            flags.append(f"classes are not balanced: {min(counts):,} to {max(counts):,} images of each (Table 14)")
    for whose, classes in (("subject", ours), ("reference", theirs)):
        if classes and (none := len(classes.names) - len(classes.labels.unique())):
            flags.append(f"no images of {none:,} of {len(classes.names):,} classes of the {whose} are among those used")
    if ours and theirs and (said := numbered_alike(ours, theirs)[1]):
        flags.append(said)
    return flags


def _empty(root: Path) -> list[str]:
    """Folders beside classes that hold no image, but for those that features of images were written to."""
    return [name for name in without_images(root) if not any((root / name).rglob("features.json"))]


def _shared(own: Features, whole: Features) -> str | None:
    """What is to be said of images that subject and reference share, pixel for pixel, in whatever files and order.

    Files of earlier versions hold the digests of the rows that they keep, or none: then the identity of the whole set
    can tell that it is the same, and what nobody can tell is said. Beside moments of ADM lie some images, not
    necessarily those that the moments are of.
    """
    ours, theirs = (next(iter(each.sets.values())) for each in (own, whole))
    known = theirs.rows.get(DIGESTS) if theirs.digests is None else theirs.digests
    source, count = whole.about["source"], whole.about["images"]
    earlier = f"for an earlier version made the file; make it again with `rae reference {source}`"
    if known is None:
        not_known = f"whether images of the subject are also in the reference is not known, {earlier}"
        return SAME if own.about["identity"] == whole.about["identity"] else not_known
    shared = int(torch.isin(ours.digests, known).sum())
    some = f"{shared:,} of the subject's {len(ours.digests):,} images are also"
    if theirs.count is None:
        return f"{some} among the {len(known):,} that {source} holds beside its moments" if shared else None
    if len(known) < count:
        kept = f"the {len(known):,} of the reference's {count:,} images that the file keeps"
        return f"{some} among {kept}; whether they are among the others is not known, {earlier}"
    if torch.equal(ours.digests, known.sort().values):
        return SAME
    return f"{some} in the reference" if shared else None


def _resized(whole: Features) -> str | None:
    """What is to be said of images of a reference that were brought to the subject's size."""
    if not whole.resized:
        return None
    size = " x ".join(map(str, whole.about["size"]))
    return (
        f"{whole.resized:,} of {whole.about['images']:,} images of the reference have another size, and are scaled and "
        f"cropped to the subject's {size}"
    )
