"""Sets of features [N,d], one vector for each image: what cannot be compared is refused, and blocks of them."""

from collections.abc import Iterator

from torch import Tensor

ROWS = 2048  # in a block: 32 MiB of features of Inception in float64, as much of a table of pairs


def check_features(least: int, why: str, **sets: Tensor) -> None:
    """Refuse sets that are no matrices, too small, not finite, or not of one dimension.

    Args:
        least: images that each of them needs.
        why: what for, as it follows "too few".
        sets: by their names in the error.
    """
    for name, features in sets.items():
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"{name}: features are [N,d], one vector for each image, got {list(features.shape)}.")
        if len(features) < least:
            raise ValueError(f"{name}: {len(features)} images are too few {why}; give at least {least}.")
        if not features.isfinite().all():
            bad = (~features.isfinite()).any(1).nonzero().flatten()
            raise ValueError(
                f"{name}: features of {len(bad)} of {len(features)} images are not finite (first: {bad[0].item()}); "
                "look at these images, and compute features in float32."
            )
    check_dimensions(**sets)


def check_dimensions(**sets: Tensor) -> None:
    """Refuse sets of features of several dimensions; names are those in the error."""
    dims = {name: features.shape[1] for name, features in sets.items()}
    if len(set(dims.values())) > 1:
        said = ", ".join(f"{d} ({name})" for name, d in dims.items())
        raise ValueError(f"features of {said} dimensions do not compare; take those of one extractor.")


def where_float64_is(x: Tensor) -> Tensor:
    """x where it is, or on the CPU if its device has no float64."""
    return x.detach() if x.device.type in ("cpu", "cuda") else x.detach().cpu()


def blocks(count: int, rows: int = ROWS) -> Iterator[slice]:
    """Slices that cover range(count)."""
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
