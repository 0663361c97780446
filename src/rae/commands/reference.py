"""What `rae evaluate` compares images with: other images, or features that a file holds; and whose images they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rae.commands.feature_folder import size_of
from rae.commands.look import Features, Look
from rae.config import parse
from rae.data.image_set import ImageError, Images, digest
from rae.data.images import DataConfig, Views, open_images, split_images
from rae.evaluation.judge import INCEPTION
from rae.evaluation.reference import (
    Gaussian,
    ReferenceError,
    is_adm_reference,
    load_reference,
    read_adm_reference,
)
from rae.folders import checkpoints, run_of
from rae.training.checkpoint import read_state

TRAINED, HELD_OUT, BOTH, UNKNOWN = "training images", "held-out images", "training and held-out images", "unknown"


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


def open_reference(source: str, data: DataConfig, look: Look) -> Reference:
    """Images to be looked at, or features from a file.

    Args:
        source: of either; or a reference of ADM's.
        data: how images are read, their columns included.
        look: by which extractors.

    Raises:
        ReferenceError: features by other extractors, moments without images, a damaged file.
        ImageError: images that cannot be opened.
    """
    path = Path(source).expanduser()
    if is_adm_reference(path):
        if others := [name for name in look.extractors if name != INCEPTION]:
            raise ReferenceError(f"{source} holds moments of Inception, none of {', '.join(others)}; leave these out.")
        moments = read_adm_reference(path)
        try:
            return Reference(source, images=open_images(source, None, ""), moments=moments)
        except ImageError as error:
            raise ReferenceError(
                f"{source} holds moments but no images for the metrics that compare images one by one ({error}) "
                "Give ADM's reference, the images that these are of, or a file that `rae reference` makes of them."
            ) from error
    if path.suffix != ".safetensors":
        return Reference(source, images=open_images(source, data.image, data.label))
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
    fields = about.model_dump(mode="json", include={"source", "identity", "images", "skipped", "size", "crop", "drawn"})
    return Reference(source, features=Features(fields, {name: sets[name] for name in look.extractors}, []))


def check_size(subject: str, ours: Sequence[int], reference: Reference, data: DataConfig) -> None:
    """Refuse features and moments of images at another size, and images that cannot be brought to the subject's.

    Args:
        subject: what to call it.
        ours: (H, W) in pixels of its images.
        reference: to compare them with.
        data: how images are read.

    Raises:
        ReferenceError: features or moments at another size.
        ImageError: the first image is smaller, and is not to be enlarged.
    """
    if reference.images and not reference.moments:
        Views(reference.images, data, tuple(ours))[0]
        return
    theirs = reference.features.about["size"] if reference.features else size_of(reference.images, data.on_broken)
    if list(ours) != list(theirs):
        ours, theirs = (" x ".join(map(str, size)) for size in (ours, theirs))
        raise ReferenceError(
            f"the images of {subject} have {ours} pixels, those of {reference.source} {theirs}: figures across sizes "
            f"mean nothing. Make a reference at {ours} (`rae reference ... --size`), or, if the subject's are larger, "
            f"crop them: --size {theirs.replace(' ', '')}."
        )


# --- whose images ----------------------------------------------------------------------------------------------------


def role_of(subject: str, reference: Reference) -> str:
    """What the images of a reference are to the run that is judged: those that it was trained on, or that it was not.

    A checkpoint knows the identity of the images that it was trained on; a reference that a file holds knows that of
    its own, or of the first so many of a set.

    Returns:
        `TRAINED`, `HELD_OUT`, `BOTH`; or `UNKNOWN`: the subject is no run, or the images are others, or are not here.
    """
    run = run_of(Path(subject).expanduser().resolve())
    states = [at for each in checkpoints(run) if ((at := each / "train") / "state.json").is_file()] if run else []
    if not states:
        return UNKNOWN
    trained = read_state(states[-1])["identity"]["images"]
    data = parse(DataConfig, yaml.safe_load((run / "recipe.yaml").read_bytes())["data"], str(run / "recipe.yaml"))
    if _are(reference, trained):
        return TRAINED
    if isinstance(data.held_out, str):
        return HELD_OUT if _are(reference, _identity(data)) else UNKNOWN
    if data.held_out and reference.images and _split(reference.images, data.held_out) == trained:
        return BOTH
    return UNKNOWN


def _are(reference: Reference, identity: str | None) -> bool:
    """Whether a reference is of these images, or of the first so many of them."""
    if reference.images:
        return reference.images.identity == identity
    about = reference.features.about
    return about["identity"] in (identity, digest([str(identity), *map(str, range(about["images"]))]))


def _identity(data: DataConfig) -> str | None:
    """Of the held-out images, as training opened them; None where they are not here any more."""
    try:
        return open_images(data.held_out, data.image, data.label).identity
    except ImageError:
        return None


def _split(images: Images, held_out: float) -> str | None:
    """Identity of the training images of a set that was split as training splits it."""
    try:
        return split_images(images, held_out)[0].identity
    except ImageError:
        return None
