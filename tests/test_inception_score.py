"""The Inception Score: closed forms, the definition in numpy, its error against fresh samples and a bootstrap."""

import numpy as np
import pytest
import torch
from devices import Float32Device
from scipy.special import softmax
from scipy.stats import entropy

from rae.evaluation.inception_score import inception_score
from rae.evaluation.uncertainty import bootstrap_error


def logits_of(n: int, seed: int, classes: int = 10) -> torch.Tensor:
    directions = torch.randn(4, classes, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) @ directions


def by_definition(logits: torch.Tensor) -> float:
    p = softmax(logits.double().numpy(), axis=1)
    return float(np.exp(entropy(p, p.mean(0)[None], axis=1).mean()))


def test_closed_forms():
    assert inception_score(torch.zeros(7, 5)) == (pytest.approx(1), None)
    assert inception_score(logits_of(1, seed=0).repeat(7, 1), split=4) == (pytest.approx(1), None)
    certain = 1e4 * torch.eye(6).repeat(3, 1)  # one class each, with probabilities that no float holds
    assert inception_score(certain).value == pytest.approx(6, rel=1e-12)
    assert inception_score(1e4 * torch.eye(6)[[0, 0, 0, 1]]).value == pytest.approx(np.exp(entropy([0.75, 0.25])))
    assert inception_score(logits_of(1, 0).expand(9, -1)).value == pytest.approx(1)  # all the same


def test_splits_are_consecutive_and_the_last_is_what_is_left():
    logits = logits_of(107, seed=0)
    parts = [by_definition(part) for part in logits.split(25)]
    assert len(parts) == 5
    assert inception_score(logits, split=25).value == pytest.approx(np.mean(parts), rel=1e-12)
    assert inception_score(logits, split=None).value == pytest.approx(by_definition(logits), rel=1e-12)
    assert inception_score(logits).value == inception_score(logits, split=None).value  # fewer than 5,000
    ends = inception_score(logits[:101], split=25)  # one image left: 1, without an error
    assert ends.value == pytest.approx(np.mean([*parts[:4], 1]), rel=1e-12)


def test_many_blocks_and_any_order():
    logits = logits_of(5000, seed=1)
    whole = inception_score(logits, split=None)
    assert whole.value == pytest.approx(by_definition(logits), rel=1e-12)
    assert inception_score(logits.flip(0), split=None) == pytest.approx(whole, rel=1e-10)


def test_images_that_lie_class_by_class_score_little_in_splits():
    """As in ADM's evaluator; the docstring says so."""
    logits = 20 * torch.eye(8).repeat_interleave(10, dim=0)
    assert inception_score(logits, split=10).value == pytest.approx(1)
    assert inception_score(logits, split=None).value == pytest.approx(8, rel=1e-4)


@pytest.mark.parametrize("split", [None, 100])
def test_error_is_the_scatter_of_fresh_samples(split):
    found = [inception_score(logits_of(400, seed), split=split) for seed in range(100)]
    scatter = np.std([value for value, _ in found], ddof=1)
    assert np.mean([error for _, error in found]) == pytest.approx(scatter, rel=0.25)


@pytest.mark.parametrize("split", [None, 100])
def test_error_of_classes_in_turn_is_the_scatter_within(split):
    """Some classes are told and some are not."""
    labels = torch.arange(400) % 8
    sure = 8 * (labels > 3)[:, None] * torch.eye(10)[labels]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))

    def score(seed: int, strata: torch.Tensor | None):
        return inception_score((sure + logits_of(400, seed) / 2)[order], split=split, strata=strata)

    found = [score(seed, labels[order]) for seed in range(100)]
    scatter = np.std([value for value, _ in found], ddof=1)
    assert np.mean([error for _, error in found]) == pytest.approx(scatter, rel=0.25)
    assert score(0, None).error > 1.5 * scatter


def test_error_is_that_of_a_bootstrap():
    logits = logits_of(400, seed=0)
    error = bootstrap_error(lambda rows: inception_score(logits[rows]).value, 400, replicates=200)
    assert inception_score(logits).error == pytest.approx(error, rel=0.2)


def test_what_has_no_score_is_refused():
    with pytest.raises(ValueError, match="logits: 1 images are too few for a score; give at least 2"):
        inception_score(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="logits of 1 class tell nothing apart"):
        inception_score(torch.zeros(5, 1))
    with pytest.raises(ValueError, match="split of 1 image always scores 1; take 5000"):
        inception_score(torch.zeros(5, 3), split=1)
    with pytest.raises(ValueError, match=r"logits: features of 1 of 3 images are not finite \(first: 1\)"):
        inception_score(torch.tensor([[0.0, 1], [float("-inf"), 0], [0, 0]]))


def test_a_device_needs_no_float64():
    logits = logits_of(30, seed=0)
    expected = inception_score(logits)
    with Float32Device():
        assert inception_score(logits.to("lazy")) == expected
