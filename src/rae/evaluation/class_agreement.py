"""Class agreement: is a sample of the class that it was asked for, as its nearest real images tell?

    share of the samples x whose class is  argmax_c votes(x)[c],   votes of their 20 nearest images of the reference

The votes are those of the k-NN of `rae.evaluation.probe`, on whatever features there are. Real images do not all agree
either: what they come to among each other, `real_agreement`, is what a perfect model would come to.
"""

import torch
from torch import Tensor

from rae.evaluation.probe import measure_accuracy, neighbour_votes
from rae.evaluation.reference import Classes
from rae.evaluation.uncertainty import Share, measured_share, random_parts

NEIGHBOURS = 20
PARTS = 5  # of the reference, of which each is asked and the others vote
LEAST = NEIGHBOURS * PARTS // (PARTS - 1)  # images of a reference, for that


def class_agreement(
    samples: Tensor, labels: Tensor, reference: Tensor, classes: Classes, *, strata: Tensor | None = None
) -> Share:
    """The share of samples that are of their class, and its standard error sqrt(p (1 - p) / (N - 1)), of other samples.

    Args:
        samples: x [N,d].
        labels: of the samples [N], in the numbers of the reference (`numbered_alike`).
        reference: [M,d].
        classes: of the reference.
        strata: of the samples, see `standard_error`.

    Raises:
        ValueError: fewer than 20 images in the reference, features that are not finite or all zero.
    """
    votes = neighbour_votes(reference, classes.labels, samples, len(classes.names), k=NEIGHBOURS)
    return measured_share(measure_accuracy(votes, labels).right, strata)


def real_agreement(reference: Tensor, classes: Classes) -> Share:
    """The same of the reference's own images, each fifth of them by the rest."""
    parts, right = random_parts(len(reference), PARTS), []
    for number, asked in enumerate(parts):
        rest = torch.cat(parts[:number] + parts[number + 1 :])
        votes = neighbour_votes(
            reference[rest], classes.labels[rest], reference[asked], len(classes.names), k=NEIGHBOURS
        )
        right.append(measure_accuracy(votes, classes.labels[asked]).right)
    return measured_share(torch.cat(right))


def numbered_alike(samples: Classes, reference: Classes) -> tuple[Tensor | None, str | None]:
    """Labels of the samples in the numbers of the reference, by the names of the classes.

    Where one side knows its classes by number alone, number i is the other one's class i.

    Returns:
        labels [N], None where classes are not the same; and what is to be said of it, if anything.
    """
    if len(reference.labels) < LEAST:
        return None, f"class agreement takes {LEAST} images of the reference, this one has {len(reference.labels)}"
    number = {name: i for i, name in enumerate(reference.names)}
    used = {label: samples.names[label] for label in samples.labels.unique().tolist()}
    if used.keys() and all(name in number for name in used.values()):
        table = torch.tensor([number.get(name, -1) for name in samples.names])
        return table[samples.labels], None
    if _are_numbers(samples.names) != _are_numbers(reference.names) and max(used) < len(reference.names):
        first = f"class {min(used)} for {reference.names[min(used)]!r}"
        return samples.labels, f"classes of one side have no names and are matched by number: {first}, for one"
    strange = next(name for name in used.values() if name not in number)
    return None, f"no class agreement: the reference has no class {strange!r}"


def _are_numbers(names: list[str]) -> bool:
    return names == [str(i) for i in range(len(names))]
