"""Configuration: what a person may write wrong is named by file, key, value and line."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import PositiveInt, ValidationError

from rae.config import Config, ConfigError, Size, load_recipe, parse, read_json


class Part(Config):
    shape: Literal["round", "square"] | tuple[PositiveInt, PositiveInt]
    weight: float | str = 0.0


class Whole(Config):
    part: Part
    rate: float = 1.0
    size: Size = (8, 8)


def recipe(folder: Path, content: str | bytes) -> Path:
    path = folder / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_overrides_are_yaml_and_later_ones_win(tmp_path):
    path = recipe(tmp_path, "part: {shape: round}\n")
    whole = load_recipe(Whole, path, ["rate=2e-4", "part.shape=[1,2]", "part.weight=3", "rate=3e-4"])
    assert whole == Whole(part={"shape": (1, 2), "weight": 3}, rate=3e-4)
    assert path.read_text() == "part: {shape: round}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x81\x00", "r.yaml: not valid YAML: .*#x0080"),
        ("part: [1", "r.yaml: not valid YAML: (.|\n)*line 1"),
        ("rate: 2020-13-45", "r.yaml: not valid YAML: month must be in 1..12"),
        (
            "rate: 1\npart:\n  weight: 1\n  shape: round\n  weight: 2\n",
            "the key 'weight' is given twice, in lines 3 and 5",
        ),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(Whole, recipe(tmp_path, content))


@pytest.mark.parametrize("override", ["rate=[1", "part={shape: round, shape: square}", "rate=2020-13-45", "rate=\0"])
def test_overrides_that_are_not_yaml_are_named(tmp_path, override):
    with pytest.raises(ConfigError) as error:
        load_recipe(Whole, recipe(tmp_path, "part: {shape: round}\n"), [override])
    assert f"override {override!r}: not valid YAML" in str(error.value)


def test_a_merged_key_is_not_given_twice(tmp_path):
    path = recipe(tmp_path, "x: &x {shape: round, weight: 1}\npart:\n  <<: *x\n  weight: 2\n")
    with pytest.raises(ConfigError, match=r"^[^\n]*\n  x: unknown key[^\n]*$"):
        load_recipe(Whole, path)


@pytest.mark.parametrize("content", [b"\x80\x81\x00", b'{"part": ', b""])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        read_json(Whole, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("part", "lines"),
    [
        ({"shape": "oval"}, ["part.shape: Input should be 'round' or 'square' or a valid tuple (got 'oval')."]),
        (
            {"shape": "round", "weight": []},
            ["part.weight: Input should be a valid number or a valid string (got [])."],
        ),
        (
            {"shape": [1, 0]},
            [
                "part.shape: Input should be 'round' or 'square' (got [1, 0]).",
                "part.shape.1: Input should be greater than 0 (got 0).",
            ],
        ),
        (
            {"shape": [1]},
            ["part.shape: Input should be 'round' or 'square' (got [1]).", "part.shape.1: required and not given."],
        ),
        ({}, ["part.shape: required and not given."]),
        (
            {"shape": "round", "wieght": 1},
            ["part.wieght: unknown key; did you mean 'weight'? Known here: shape, weight."],
        ),
        (3, ["part: Input should be a valid dictionary or instance of Part (got 3)."]),
    ],
)
def test_problems_are_one_line_for_each_key(part, lines):
    with pytest.raises(ConfigError) as error:
        parse(Whole, {"part": part}, "here")
    assert str(error.value).split("\n") == ["here does not fit:", *(f"  {line}" for line in lines)]


def test_one_number_is_both_sides_of_a_size():
    assert Whole(part={"shape": "round"}, size=16).size == (16, 16)
    assert Whole(part={"shape": "round"}, size=[16, 24]).size == (16, 24)
    with pytest.raises(ValidationError, match="valid tuple"):
        Whole(part={"shape": "round"}, size="16x24")
