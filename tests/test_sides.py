"""--image and --label of two sources that are compared: each is read by the names that it has."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from tiny import png

from rae.commands.sides import read_sides
from rae.config import ConfigError
from rae.data.images import DataConfig

COLUMNS = {"image": Image(), "fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["c", "d"])}


def a_table() -> Dataset:
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "fine": [0, 1], "coarse": [1, 0]}
    return Dataset.from_dict(rows, Features(COLUMNS))


def make(folder: Path) -> dict[str, str]:
    """A source of every kind that has names: table, saved data set, arrays, shard; and a folder of images."""
    a_table().to_parquet(folder / "table.parquet")
    a_table().save_to_disk(folder / "saved")
    np.savez(folder / "batch.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=[0, 1])
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name in ("0.IMAGE", "0.seg.png", "0.cls", "1.other"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    (folder / "flat").mkdir()
    (folder / "flat/0.png").write_bytes(png(0))
    (arrow,) = (folder / "saved").glob("*.arrow")
    names = ("table.parquet", "saved", "batch.npz", "shard.tar", "flat")
    return {name.partition(".")[0]: str(folder / name) for name in names} | {"arrow": str(arrow), "hub": "hf:a/b"}


def read(option: str, name: str, *which: str) -> list[str | None]:
    return [getattr(data, option) for data in read_sides(DataConfig(source="", **{option: name}), [*which])]


def test_a_name_is_of_the_sources_that_have_it(tmp_path, capsys):
    at = make(tmp_path)
    capsys.readouterr()
    for table in ("table", "saved", "arrow"):
        for other in ("batch", "shard"):
            assert read("label", "fine", at[other], at[table]) == [None, "fine"]
            (line,) = capsys.readouterr().err.splitlines()  # said, of the one that has names and not this one
            had = {"batch": "arr_0, arr_1", "shard": "cls"}[other]
            assert line == f"note: {at[other]} has no fine (--label), only {had}: its default is taken"
    assert read("label", "fine", at["table"], at["saved"]) == ["fine", "fine"]
    assert read("label", "cls", at["shard"], at["table"]) == ["cls", None]
    assert read("image", "seg.png", at["table"], at["shard"]) == [None, "seg.png"]
    assert read("image", "image", at["shard"], at["table"]) == ["image", "image"]
    assert read("image", "other", at["batch"], at["hub"]) == [None, "other"]  # which only opening it will tell
    capsys.readouterr()
    assert read("label", "fine", at["flat"], at["table"]) == [None, "fine"]
    assert read("label", "", at["flat"], at["table"]) == ["", ""]
    assert capsys.readouterr().err == ""


def test_a_name_that_no_source_has_is_refused_with_what_there_is(tmp_path):
    at = make(tmp_path)
    with pytest.raises(ConfigError) as error:
        read("label", "fien", at["batch"], at["table"])
    assert str(error.value) == (
        f"--label fien names a column, and neither {at['batch']} (arr_0, arr_1) nor {at['table']} (image, fine, "
        "coarse) has it: name another one, leave it out, or leave classes alone with --label ''."
    )
    with pytest.raises(ConfigError, match=r"--image x .* neither .*flat \(no columns\) nor .*shard.tar \(image, seg"):
        read("image", "x", at["flat"], at["shard"])
    with pytest.raises(ConfigError, match=r"flat \(no columns\) has none of it: name another one, or leave it out\."):
        read("image", "x", at["flat"])


def test_sources_that_cannot_be_read_are_left_to_what_opens_them(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "x.npz").write_bytes(b"no zip")
    DatasetDict(train=a_table()).save_to_disk(tmp_path / "parts")
    for name in ("x.tar", "x.npz", "parts"):
        assert read("image", "image", str(tmp_path / name)) == ["image"]
