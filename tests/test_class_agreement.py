"""Class agreement: clouds whose classes are known, labels that are wrong on purpose, classes that are not the same."""

import pytest
import torch

from rae.evaluation.class_agreement import LEAST, class_agreement, numbered_alike, real_agreement
from rae.evaluation.reference import Classes

NAMES = ["ant", "bee", "cow"]


def clouds(count: int, *, seed: int, spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Features about three directions, and which of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.eye(3)[labels] + spread * torch.randn(count, 3, generator=generator), labels


def test_the_share_of_samples_that_are_of_their_class():
    real, classes = clouds(90, seed=0)
    samples, labels = clouds(40, seed=1)
    labels[:10] = (labels[:10] + 1) % 3  # asked for another class than what was made
    found = class_agreement(samples, labels, real, Classes(classes, NAMES))
    assert found.value == 0.75
    assert found.error == pytest.approx((0.75 * 0.25 / 39) ** 0.5)


def test_error_within_classes():
    real, classes = clouds(90, seed=0)
    samples, labels = clouds(40, seed=1)
    labels[:10] = (labels[:10] + 1) % 3
    made = torch.arange(40) % 3  # of 14, 13 and 13 images 4, 3 and 3 are wrong
    found = class_agreement(samples, labels, real, Classes(classes, NAMES), strata=made)
    within = sum(n * (n / (n - 1)) * (w / n) * (1 - w / n) for n, w in ((14, 4), (13, 3), (13, 3)))
    assert found == (0.75, pytest.approx(within**0.5 / 40, rel=1e-9), None)


def test_real_images_are_asked_apart_from_those_that_vote():
    real, labels = clouds(150, seed=0)
    assert real_agreement(real, Classes(labels, NAMES)) == (1, None, pytest.approx(0.05 ** (1 / 150)))
    noise = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))  # no class can be told: 1 / 3
    found = real_agreement(noise, Classes(torch.arange(3000) % 3, NAMES))
    assert found.error == pytest.approx((found.value * (1 - found.value) / 2999) ** 0.5)  # of all of them
    assert abs(found.value - 1 / 3) < 4 * found.error


def test_classes_are_matched_by_name():
    labels = torch.tensor([0, 1, 1])
    reference = Classes(torch.arange(60) % 3, NAMES)
    found, said = numbered_alike(Classes(labels, ["cow", "ant", "yak"]), reference)  # no sample is a yak
    assert found.tolist() == [2, 0, 0]
    assert said is None
    found, said = numbered_alike(Classes(labels, ["0", "1"]), Classes(reference.labels, ["0", "1", "2"]))
    assert (found.tolist(), said) == ([0, 1, 1], None)


def test_bare_numbers_are_matched_by_number_and_it_is_said():
    labels, reference = torch.tensor([1, 2]), Classes(torch.arange(60) % 3, NAMES)
    for one, other in ((Classes(labels, ["0", "1", "2"]), reference), (Classes(labels, NAMES), None)):
        found, said = numbered_alike(one, other or Classes(reference.labels, ["0", "1", "2"]))
        assert found.tolist() == [1, 2]
        assert "matched by number: class 1 for" in said


@pytest.mark.parametrize(
    ("names", "told"),
    [(["ant", "yak"], "no class agreement: the reference has no class 'yak'"), ([*"0123"], "has no class '0'")],
)
def test_classes_that_are_not_those_of_the_reference(names, told):
    labels = torch.tensor([0, len(names) - 1])
    found, said = numbered_alike(Classes(labels, names), Classes(torch.arange(60) % 3, NAMES))
    assert found is None
    assert told in said


def test_a_reference_of_too_few_images():
    assert LEAST == 25
    labels = torch.tensor([0, 1])
    few, enough = (Classes(torch.arange(count) % 3, NAMES) for count in (24, 25))
    assert numbered_alike(Classes(labels, NAMES), few) == (
        None,
        "class agreement takes 25 images of the reference, this one has 24",
    )
    assert numbered_alike(Classes(labels, NAMES), enough)[0] is not None
    features, _ = clouds(25, seed=0)
    assert real_agreement(features, enough).value == 1
