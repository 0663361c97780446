"""The judge of the demo reads real digits, and only what is in the picture."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rae.evaluation.classifier import fit_classifier


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    small = (data.images / 16 * 255).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(i).convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)) for i in small]
    return np.stack(large), data.target


def test_reads_held_out_digits_and_is_deterministic(digits):
    first, second = (fit_classifier(*digits, seed=3) for _ in range(2))
    assert first.accuracy == second.accuracy >= 0.97
    assert first.held_out == 450
    images, labels = digits
    assert (first.predict(images[:100]) == labels[:100]).mean() >= 0.97


def test_labels_without_information_are_not_learnt(digits):
    images, labels = digits
    shuffled = np.random.default_rng(0).permutation(labels)
    assert fit_classifier(images, shuffled, seed=0).accuracy < 0.2


def test_wrong_input_is_named(digits):
    images, labels = digits
    with pytest.raises(ValueError, match="1797 images and 5 labels"):
        fit_classifier(images, labels[:5], seed=0)
    with pytest.raises(ValueError, match="got float32"):
        fit_classifier(images.astype(np.float32), labels, seed=0)
