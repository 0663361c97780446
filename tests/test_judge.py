"""What `judge` makes of rows in any order: pairs that change together, classes that take turns."""

import numpy as np
import pytest
import torch

from rae.data.image_set import Images
from rae.evaluation.frechet import Moments, frechet_measured, frechet_to_infinity, normal_of
from rae.evaluation.judge import judge, judge_pairs, left_out, take_turns
from rae.evaluation.kernel_distance import kernel_distance
from rae.evaluation.reconstruction import psnr, ssim
from rae.evaluation.reference import DIGESTS, Classes, FeatureSet, Gaussian

N, D = 40, 3


def of(*features: torch.Tensor, digests: list[int] | None = None, labels: torch.Tensor | None = None) -> FeatureSet:
    """As `rae evaluate` has it: features, and of Inception spatial ones and logits; digests are by the row."""
    rows = dict(zip(("features", "spatial", "logits"), features))
    moments = {}
    for kind in rows.keys() - {"logits"}:
        summed = Moments(rows[kind].shape[1])
        summed.update(rows[kind])
        moments[kind] = Gaussian(summed.mean, summed.covariance)
    rows[DIGESTS] = torch.tensor(digests or range(len(features[0])))
    classes = None if labels is None else Classes(labels, [str(i) for i in range(int(labels.max()) + 1)])
    return FeatureSet(len(features[0]), rows, moments, classes)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pair(generator):
    """Reconstructions and originals, row by row: float32 [N,D]."""
    y = torch.randn(N, D, generator=generator)
    return 0.9 * y + 0.1 * torch.randn(N, D, generator=generator), y


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_figures_of_pairs_are_those_of_aligned_rows(pair, generator):
    x, y = pair
    numbers = [torch.randperm(N, generator=generator) for _ in range(2)]
    found = judge(
        *(of(each[rows], each[rows] ** 2, each[rows]) for each, rows in zip(pair, numbers)),
        "inception",
        pairs=tuple(rows.tolist() for rows in numbers),
    )
    line = frechet_to_infinity(*(each[numbers[1]] for each in pair))  # divided by the originals' digests
    for name, expected in {
        "frechet": frechet_measured(x, y),
        "frechet_infinite": line.infinite,
        "sfid": frechet_measured(x**2, y**2),
        "kid": kernel_distance(x, y, paired=True),
    }.items():
        figure = found[f"{name}/inception"]
        assert (figure.value, figure.error) == pytest.approx(expected, rel=1e-6)
    assert found["frechet/inception"][-2:] == (f"{N} images against {N} images that these are of", "")
    assert found["kid/inception"].protocol.endswith(f"{N} that these are of, all pairs but of one and what it is of")
    assert "N / 4 of the pairs, divided by digest" in found["frechet_infinite/inception"].protocol
    for name in ("precision", "recall", "density", "coverage"):
        figure = found[f"{name}/inception"]
        assert (figure.error, figure.bound) == (None, None)
        assert figure.error_of == "no error of pairs"


def test_values_of_pairs_are_those_of_two_sets(pair):
    """But for the line, whose originals become infinitely many as well, and KID, where no image meets its own."""
    alone, paired = (judge(*map(of, pair), "e", **how) for how in ({}, {"pairs": (range(N), range(N))}))
    assert alone.keys() == paired.keys()
    for name in alone.keys() - {"frechet_infinite/e", "kid/e"}:
        assert paired[name].value == pytest.approx(alone[name].value, rel=1e-9), name
    y = pair[1]
    alone, same = (judge(of(y), of(y), "e", **how) for how in ({}, {"pairs": (range(N), range(N))}))
    for name in ("frechet_infinite/e", "kid/e"):
        assert abs(same[name].value) < 1e-10 < -alone[name].value


@pytest.mark.parametrize("numbers", [range(N - 1), [0, *range(N - 1)], range(1, N + 1)])
def test_rows_that_make_no_pairs_are_refused(pair, numbers):
    with pytest.raises(ValueError, match=f"and {N} numbers of {N} samples and {N} originals make no pairs"):
        judge(*map(of, pair), "e", pairs=(numbers, range(N)))


def test_pairs_are_not_of_classes_in_turn(pair):
    labels = torch.arange(N) % 2
    with pytest.raises(ValueError, match="errors of pairs are of other pairs; leave turns out"):
        judge(*(of(each, labels=labels) for each in pair), "e", pairs=(range(N), range(N)), turns=True)


# --- classes that take turns -----------------------------------------------------------------------------------------


def test_whether_classes_take_turns():
    assert take_turns([2, 0, 1, 2, 0])
    for labels in ([], [0, 0, 0], [0, 1, 2], [0, 1, 1, 0], [0, 0, 1, 0, 0, 1]):
        assert not take_turns(labels)


def test_errors_of_classes_in_turn_are_smaller(generator):
    labels = torch.arange(90) % 3
    real = 4 * torch.eye(3)[labels] + torch.randn(90, 3, generator=generator)
    x = (4 + labels[:, None]) * torch.eye(3)[labels] + (labels[:, None] / 2 + 1) * torch.randn(
        90, 3, generator=generator
    )
    order = torch.randperm(90, generator=generator)  # the labels go with the rows
    samples = of(x, x, x * labels[:, None], digests=order.tolist(), labels=labels)
    drawn, turns = (judge(samples, of(real, real, labels=labels), "inception", turns=turns) for turns in (False, True))
    for name in drawn.keys() - {"recall/inception", "coverage/inception"}:  # by other parts, of any size
        assert turns[name].error < drawn[name].error, name
        assert turns[name].error_of == "classes in turn, error within them", name
        assert drawn[name].error_of == ""
        assert turns[name].protocol == drawn[name].protocol, name  # so that they compare
        if name.split("/")[0] not in ("frechet_infinite", "kid"):  # by other parts, and without the bias of classes
            assert turns[name].value == drawn[name].value, name
    assert turns["kid/inception"].value == pytest.approx(kernel_distance(x, real, strata=labels).value, rel=1e-9)
    within = frechet_measured(x, normal_of(real), strata=labels).error
    assert [turns[f"{name}/inception"].error for name in ("frechet", "sfid")] == pytest.approx([within] * 2, rel=1e-9)


BETTER = {"frechet": "lower", "frechet_infinite": "lower", "sfid": "lower", "kid": "lower", "density": "nearer to 1"}
BETTER |= dict.fromkeys(("precision", "recall", "coverage", "class_agreement", "inception_score"), "higher")


@pytest.mark.parametrize("how", [{}, {"turns": True}, {"pairs": (range(N), range(N))}])
def test_which_way_is_better(pair, how):
    labels = torch.arange(N) % 2
    found = judge(*(of(each, each, each, labels=labels) for each in pair), "inception", **how)
    expected = {name: way for name, way in BETTER.items() if name != "class_agreement" or "pairs" not in how}
    assert {name.removesuffix("/inception"): figure.better for name, figure in found.items()} == expected


AS_DRAWN = "classes in turn, error as if they were drawn, for of "


@pytest.mark.parametrize(
    ("wrong", "error", "error_of"),
    [
        ([2, 5, 8, 11], (2 / 9 / 11) ** 0.5, f"{AS_DRAWN}each all images count or none"),
        ([2], 1 / 12, "classes in turn, error within them"),  # where that of classes that are drawn is the same
        ([], None, ""),
    ],
)
def test_errors_of_whole_classes_are_as_if_these_were_drawn(wrong, error, error_of, generator):
    """Where a class is all right or all wrong, 4 images of it tell no scatter within."""
    real, labels = torch.arange(90) % 3, torch.arange(12) % 3
    made = labels.clone()
    made[wrong] = 1  # where class 2 is asked for
    y, x = (5 * torch.eye(3)[each] + 0.1 * torch.randn(len(each), 3, generator=generator) for each in (real, made))
    found = judge(of(x, labels=labels), of(y, labels=real), "e", turns=True)["class_agreement/e"]
    assert (found.value, found.error_of) == (pytest.approx(1 - len(wrong) / 12), error_of)
    assert found.error == (error and pytest.approx(error))


@pytest.mark.parametrize(("of_class", "error_of"), [(7, f"{AS_DRAWN}some there are fewer than 8 images"), (8, None)])
def test_parts_that_lack_classes_are_as_if_these_were_drawn(of_class, error_of, generator):
    labels = torch.arange(10 * of_class) % 10
    x, y = torch.randn(2, len(labels), 3, generator=generator)
    drawn, turns = (judge(of(x, labels=labels), of(y), "e", turns=turns) for turns in (False, True))
    for name in ("recall/e", "coverage/e"):
        assert turns[name].error_of == (error_of or "classes in turn, error within them")
        assert (turns[name].error == drawn[name].error) == bool(error_of)
    assert turns["precision/e"].error_of == "classes in turn, error within them"


@pytest.mark.parametrize("of_class", [1, 3])
def test_no_line_of_parts_that_lack_classes(of_class, generator):
    labels = torch.arange(20 * of_class) % 20 if of_class > 1 else torch.arange(39) % 20
    x, y = torch.randn(2, len(labels), 2, generator=generator)
    samples = of(x, labels=labels)
    found = judge(samples, of(y), "e", turns=True)
    missing = left_out(samples, "e", turns=True)
    assert missing["frechet_infinite/e"].why.endswith(f"4, for they took turns; of some there are {of_class} images")
    assert found.keys() == judge(samples, of(y), "e").keys() - missing.keys()
    assert left_out(samples, "e") == left_out(of(x), "e", turns=True) == {}


def test_a_class_of_one_image_tells_no_scatter(generator):
    labels = torch.arange(14) % 13
    x, y = torch.randn(2, 14, 2, generator=generator)
    drawn, turns = (judge(of(x, labels=labels), of(y), "e", turns=turns) for turns in (False, True))
    assert {name: figure[:4] for name, figure in turns.items()} == {
        name: figure[:4] for name, figure in drawn.items() if name != "frechet_infinite/e"
    }
    assert turns["frechet/e"].error_of.endswith("error as if they were drawn, for of some there is one image")
    assert turns["frechet/e"].protocol == drawn["frechet/e"].protocol
    assert turns["density/e"].error_of == turns["frechet/e"].error_of
    assert turns["kid/e"].protocol == f"{drawn['kid/e'].protocol}, classes in turn as if they were drawn"  # biased
    alone = judge(of(x), of(y), "e", turns=True)  # whose classes are left alone
    assert alone["kid/e"].protocol == turns["kid/e"].protocol
    assert alone["frechet/e"][:4] == drawn["frechet/e"][:4]
    assert alone["frechet/e"].error_of.endswith("error as if they were drawn, for they are left alone")


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_pixels_of_pairs_are_judged_in_batches():
    pixels = np.random.default_rng(0).integers(256, size=(2, 5, 16, 20, 3), dtype=np.uint8)
    sides = [Images([*"abcde"], [0] * 5, None, "", side.__getitem__) for side in pixels]
    found = judge_pairs(*sides, None, batch=2, device=torch.device("cpu"))
    y, x = (torch.from_numpy(side).permute(0, 3, 1, 2) / 255 for side in pixels)
    assert found.keys() == {"psnr", "ssim"}
    assert found["psnr"].value == pytest.approx(psnr(x, y).mean().item(), rel=1e-12)
    assert found["ssim"].value == pytest.approx(ssim(x, y).mean().item(), rel=1e-12)
    assert found["psnr"].error > 0
