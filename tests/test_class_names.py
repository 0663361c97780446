"""Names of classes from a file: every form means what it says, and what does not fit is an error with both sides."""

import json

import numpy as np
import pytest
from PIL import Image

from rae.data.class_names import name_classes
from rae.data.image_set import ImageError, Images
from rae.data.images import DataConfig, open_images, open_split


def images(*own: str) -> Images:
    read = np.zeros((8, 8, 3), dtype=np.uint8).copy
    return Images([f"{name}.png" for name in own], list(range(len(own))), list(own), "identity", lambda _: read())


@pytest.mark.parametrize(
    ("own", "file", "content", "names"),
    [
        (["n01", "n02", "n03"], "names.txt", "tench\n goldfish \nshark\n", ["tench", "goldfish", "shark"]),
        (["n01", "n02"], "names.json", ["tench", "goldfish"], ["tench", "goldfish"]),
        (["n01", "n02"], "names.json", {"1": "goldfish", "0": "tench"}, ["tench", "goldfish"]),
        (["n01", "n03"], "names.json", {"n01": "tench", "n02": "goldfish", "n03": "shark"}, ["tench", "shark"]),
        (["0", "1", "10", "2"], "names.json", {"0": "a", "1": "b", "2": "c", "10": "k"}, ["a", "b", "k", "c"]),
        (["000", "001", "002"], "names.txt", "a\nb\nc", ["a", "b", "c"]),
        (["2", "1", "0"], "names.txt", "a\nb\nc", ["c", "b", "a"]),
    ],
)
def test_names_by_line_number_or_code(tmp_path, own, file, content, names):
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    named = name_classes(images(*own), tmp_path / file, "here")
    assert named.class_names == names
    assert (named.labels, len(named)) == (list(range(len(own))), len(own))
    assert named.identity == "identity"


@pytest.mark.parametrize(
    ("own", "file", "content", "message"),
    [
        (["n01", "n02", "n03"], "x.txt", "a\nb", "holds 2 names, here has 3 classes, and none of them for n03"),
        (["n01", "n02"], "x.txt", "a\nb\nc", "holds 3 names, here has 2 classes: give each class one"),
        (["0", "1"], "x.json", ["a", "b", "c"], "holds 3 names, here has 2 classes"),
        (["3", "7"], "x.txt", "a\nb", "holds 2 names, here has 2 classes, and none of them for 3"),
        (["n01", "n09"], "x.json", {"n01": "a", "n02": "b"}, "here has 2 classes, and none of them for n09"),
        (["n01", "n02", "n03"], "x.txt", "crane\nowl\ncrane", "calls both n01 and n03 'crane'"),
        (["n01", "n02"], "x.txt", "a\n\n", "the name of 1 is ''"),
        (["n01", "n02"], "x.json", {"0": ["n01", "a"], "1": ["n02", "b"]}, r"the name of 0 is \['n01', 'a'\]"),
        (["n01"], "x.json", '{"n01": "a", "n01": "b"}', "gives n01 two names, 'a' and 'b'"),
        (["n01"], "x.json", "{", r"x\.json cannot be read \(Expecting property name"),
        (["n01"], "x.json", "3", "the name of 0 is 3"),
        (["n01"], "x.txt", b"\xff\xfe\xfa", r"x\.txt cannot be read \('utf-8' codec"),
    ],
)
def test_files_that_do_not_fit(tmp_path, own, file, content, message):
    raw = content if isinstance(content, str | bytes) else json.dumps(content)
    (tmp_path / file).write_bytes(raw.encode() if isinstance(raw, str) else raw)
    with pytest.raises(ImageError, match=message):
        name_classes(images(*own), tmp_path / file, "here")


def test_a_file_that_is_not_there_and_images_without_classes(tmp_path):
    with pytest.raises(ImageError, match=r"data\.class_names=/nowhere/x\.txt cannot be read \(.*No such file"):
        name_classes(images("n01"), "/nowhere/x.txt", "here")
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ImageError, match=r"names classes, and .* has none: take the key out"):
        open_split(DataConfig(source=str(tmp_path), class_names="names.txt"))


def test_names_hold_for_the_training_part_and_change_no_image(tmp_path):
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "names.txt").write_text("\n".join(words))
    config = DataConfig(source="digits", class_names=str(tmp_path / "names.txt"), held_out=0.1)
    plain = open_split(config.model_copy(update={"class_names": None}))
    for named, before in zip(open_split(config), plain):
        assert (named.class_names, named.labels) == (words, before.labels)
        assert named.identity == before.identity  # latents that were computed before are those of the same images
    whole, other = open_split(config.model_copy(update={"held_out": "digits"}))
    assert (whole.class_names, other.class_names) == (words, open_images("digits").class_names)
