"""What is judged, as it lies on the disk: samples and the classes that they were made of."""

import json

import numpy as np
import pytest
from PIL import Image

from rae.commands.pictures import OutputError
from rae.commands.subject import open_subject
from rae.data.images import DataConfig


@pytest.mark.parametrize(("label", "names"), [(None, ["cat", "dog"]), ("", None)])
def test_classes_of_samples_are_left_alone_where_that_is_asked_for(tmp_path, label, names):
    for i in range(3):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i:06d}.png")
    (tmp_path / "samples.json").write_text(json.dumps({"labels": [1, 0, 1], "class_names": ["cat", "dog"]}))
    subject = open_subject(str(tmp_path), DataConfig(source="", label=label), None)
    assert subject.kind == "samples"
    assert subject.images.class_names == names
    assert subject.images.labels == ([1, 0, 1] if names else [0, 0, 0])
    assert subject.protocol["labels"] == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "drawn", "turns"),
    [
        ([2, 0, 1], [False], True),  # one image of each class
        ([1, 0, 1, 1, 0, 1], [False, False], True),
        ([1, 0, 1, 0], [True], False),  # by chance in turn
        ([1, 1, 1], [False], False),
        ([1, 0, 1], [None], True),  # of an earlier version
        ([1, 0, 0], [None], False),
        ([1, 0, 0, 1], [None, False], True),  # made longer by this one
        ([1, 0, 1], [], True),
    ],
)
def test_whether_classes_took_turns_is_what_the_folder_says(tmp_path, labels, drawn, turns):
    for i in range(len(labels)):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i:06d}.png")
    jobs = [{} if each is None else {"random_labels": each} for each in drawn]
    about = {"labels": labels, "class_names": None} | ({"jobs": jobs} if jobs else {})
    (tmp_path / "samples.json").write_text(json.dumps(about))
    for label in (None, ""):  # classes that are left alone
        assert open_subject(str(tmp_path), DataConfig(source="", label=label), None).turns == turns


def test_samples_without_pictures_were_packed_or_are_still_to_come(tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps({"labels": [0], "class_names": None}))
    told = r"\(--no-pngs\), judge the .npz; or `rae sample` was interrupted, the same"
    with pytest.raises(OutputError, match=told):
        open_subject(str(tmp_path), DataConfig(source=""), None)
