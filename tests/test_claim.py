"""Folders that go on: what may differ from what they were begun with, and what is said of the rest."""

import pytest

from rae.commands.pictures import OutputError, claim

BEGUN = {"images": 3, "labels": [0, 1, 2], "extractor": {"name": "e" * 80, "input_size": [16, 16]}, "seed": 0}
GROWS = ("images", "labels")


@pytest.fixture
def claimed(tmp_path):
    """What is said of a folder that is claimed once more, with changes."""
    claim(tmp_path, "claim.json", BEGUN, GROWS)

    def claimed(**changes) -> str:
        with pytest.raises(OutputError) as error:
            claim(tmp_path, "claim.json", BEGUN | changes, GROWS)
        return str(error.value)

    return claimed


def test_a_folder_grows(tmp_path, claimed):
    claim(tmp_path, "claim.json", BEGUN | {"images": 4, "labels": [0, 1, 2, 0]}, GROWS)
    assert "was begun with more (images: 4 -> 3, labels: 4 -> 3). It can grow, not shrink" in claimed()


def test_a_list_alone_that_would_shrink_is_named(claimed):
    assert "was begun with more (labels: 3 -> 2)." in claimed(labels=[0, 1])


@pytest.mark.parametrize("images", [None, "4", 4.5, [4]])
def test_what_is_of_another_type_has_not_grown(claimed, images):
    assert f"made in another way:\n  images: 3 -> {images}\nAsk for the same" in claimed(images=images)


def test_of_a_long_section_the_key_that_differs_is_shown(claimed):
    told = claimed(extractor=BEGUN["extractor"] | {"input_size": [32, 32]}, seed=1)
    assert "in another way:\n  extractor.input_size: [16, 16] -> [32, 32]\n  seed: 0 -> 1\nAsk" in told
