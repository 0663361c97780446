"""Parquet, Arrow, saved data sets and the hub's: columns by their type, classes by name, rows named in errors."""

import hashlib
import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from tiny import picture, png

from rae.data.images import DataConfig, ImageError, Stream, loader, open_images, open_split

COLOURS = ClassLabel(names=["red", "green", "blue"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def rows(seeds, label=COLOURS, **columns) -> Dataset:
    """A row for each seed: its picture, and its label of three."""
    seeds = list(seeds)
    data = {"image": [{"bytes": png(s), "path": f"{s}.png"} for s in seeds], "label": [s % 3 for s in seeds]}
    features = {"image": Image(), "label": label} | {name: kind for name, (kind, _) in columns.items()}
    return Dataset.from_dict(data | {name: values for name, (_, values) in columns.items()}, Features(features))


def parquet(dataset: Dataset, path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    dataset.to_parquet(path)
    return str(path)


def contents(images) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), label) for image, label in (images[i] for i in range(len(images)))]


def expected(seeds) -> list[tuple[bytes, int]]:
    return [(picture(s).tobytes(), s % 3) for s in seeds]


# --- sources


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    dataset = rows(range(5))
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    DatasetDict(train=dataset, test=rows(range(2))).save_to_disk(tmp_path / "parts")
    parquet(dataset, tmp_path / "one.parquet")
    for part, seeds in enumerate([range(2), range(2, 5)]):
        parquet(rows(seeds), tmp_path / f"files/train-{part:05}-of-00002.parquet")
    for source, first in {
        "saved": "saved row 3",
        "parts/train": "train row 3",
        "one.parquet": "one.parquet row 3",
        "files": "train-00001-of-00002.parquet row 1",
        "files/*.parquet": "train-00001-of-00002.parquet row 1",
        "files/train-{00000..00001}-of-00002.parquet": "train-00001-of-00002.parquet row 1",
        "saved/*.arrow": "data-00001-of-00002.arrow row 0",
    }.items():
        images = open_images(tmp_path / source)
        assert contents(images) == expected(range(5)), source
        assert images.class_names == ["red", "green", "blue"]
        assert Path(images.names[3]).name == first
        assert images.identity == open_images(tmp_path / "saved").identity
    backwards = open_images(tmp_path / "files/train-{00001,00000}-of-00002.parquet")
    assert contents(backwards) == expected([2, 3, 4, 0, 1])


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    assert contents(open_images(parquet(rows(range(2)), tmp_path / "[final]/x.parquet"))) == expected(range(2))


def test_identity_follows_content_labels_and_order_and_not_the_place(tmp_path):
    def identity(dataset, name="x"):
        return open_images(parquet(dataset, tmp_path / f"{name}.parquet")).identity

    first = identity(rows(range(4)))
    assert identity(rows(range(4)), "elsewhere") == first
    assert identity(rows([0, 1, 3, 2]), "order") != first
    assert identity(rows([0, 1, 2, 3 + 30]), "content") != first  # the same label
    assert identity(rows(range(4), ClassLabel(names=["r", "g", "b"])), "names") != first
    raw = Pillow.new("RGB", (4, 4)), Pillow.new("RGB", (4, 4), "white")  # BMP files of one size in bytes
    files = [io.BytesIO() for _ in raw]
    for image, file in zip(raw, files):
        image.save(file, "bmp")
    black, white = ({"bytes": file.getvalue(), "path": None} for file in files)
    bitmaps = [Dataset.from_dict({"image": [image]}, Features(image=Image())) for image in (black, white)]
    assert identity(bitmaps[0], "black") != identity(bitmaps[1], "white")


def test_identity_is_what_it_has_always_been(tmp_path):
    """Resumed runs compare it. Classes that are left alone are not in it, so that it is that of images without any."""
    source = parquet(rows(range(4)), tmp_path / "x.parquet")
    content = [hashlib.sha256(png(seed)).hexdigest() for seed in range(4)]
    for label, numbers, names in ((None, [0, 1, 2, 0], COLOURS.names), ("", [0] * 4, [])):
        lines = [*(f"{len(png(seed))} {number}" for seed, number in enumerate(numbers)), *content, *names]
        assert open_images(source, label=label).identity == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    plain = parquet(rows(range(4)).remove_columns("label"), tmp_path / "plain.parquet")
    assert open_images(plain).identity == open_images(source, label="").identity


def test_training_reads_rows_as_files(tmp_path):
    folder = tmp_path / "folder"
    for seed in range(7):
        path = folder / COLOURS.names[seed % 3] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
    files = open_images(folder)
    order = [int(Path(name).stem) for name in files.names]
    dataset = rows(order, ClassLabel(names=files.class_names))
    dataset = dataset.remove_columns("label").add_column("label", files.labels)
    dataset = dataset.cast_column("label", ClassLabel(names=files.class_names))
    config = DataConfig(source=parquet(dataset, tmp_path / "x.parquet"), crop="random", flip=True, held_out=0.3)
    for part, twin in zip(open_split(config), open_split(config.model_copy(update={"source": str(folder)}))):
        batches = [
            list(loader(Stream(images, config, (16, 16), seed=3), [range(5), range(5, 9)], which))
            for images, which in ((part, config.model_copy(update={"workers": 1})), (twin, config))
        ]
        for batch, other in zip(*batches):
            assert all(torch.equal(batch[name], other[name]) for name in ("image", "label", "index", "position"))


def test_images_beside_the_table(tmp_path):
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    paths = [str(tmp_path / f"{seed}.png") for seed in range(2)]
    table = Dataset.from_dict({"image": paths}, Features(image=Image())).data.table
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as file:
        file.write(table)
    images = open_images(tmp_path / "x.arrow")
    assert [image for image, _ in contents(images)] == [image for image, _ in expected(range(2))]
    (tmp_path / "1.png").unlink()
    assert open_images(tmp_path / "x.arrow").identity != images.identity
    with pytest.raises(ImageError, match=r"x\.arrow row 1: its image is .* in .*1\.png, which is not here"):
        images[1]


# --- columns


def test_columns_are_named_where_there_are_several(tmp_path):
    masks = [{"bytes": png(100 + s), "path": None} for s in range(3)]
    source = parquet(
        rows(range(3), mask=(Image(), masks), tone=(ClassLabel(names=["a", "b"]), [1, 0, 1])), tmp_path / "x.parquet"
    )
    with pytest.raises(ImageError, match=r"2 columns of type Image \(image, mask\).* name the one with --image, in a"):
        open_images(source)
    with pytest.raises(
        ImageError, match=r"2 columns of classes \(label, tone\).* --label, .* --label '', in a recipe data\.label= "
    ):
        open_images(source, image="mask")
    images = open_images(source, image="mask", label="tone")
    assert (images.labels, images.class_names) == ([1, 0, 1], ["a", "b"])
    np.testing.assert_array_equal(images[1][0], picture(101))
    assert open_images(source, image="mask", label="").class_names is None
    with pytest.raises(
        ImageError, match=r"--label tint \(.* data\.label=tint\): .* no such column; it has image, label, mask, tone"
    ):
        open_images(source, image="image", label="tint")
    with pytest.raises(
        ImageError, match=r"--image label \(.* data\.image=label\): this column of .* is ClassLabel.*binary"
    ):
        open_images(source, image="label")
    train, _ = open_split(DataConfig(source=source, image="image", label="tone"))
    assert train.labels == [1, 0, 1]


@pytest.mark.parametrize("shape", ["binary", "struct"])
def test_bytes_that_do_not_say_that_they_are_images(tmp_path, shape):
    values = [png(s) if shape == "binary" else {"bytes": png(s), "path": None} for s in range(2)]
    kind = Value("binary") if shape == "binary" else {"bytes": Value("binary"), "path": Value("string")}
    source = parquet(Dataset.from_dict({"jpg": values}, Features(jpg=kind)), tmp_path / "x.parquet")
    for images in (open_images(source), open_images(source, image="jpg")):
        assert (images.labels, images.class_names) == ([0, 0], None)
        np.testing.assert_array_equal(images[1][0], picture(1))
    two = Dataset.from_dict({"jpg": values, "mask": values}, Features(jpg=kind, mask=kind))
    with pytest.raises(ImageError, match=r"2 columns of images \(jpg, mask\), of the columns jpg, mask: name the one"):
        open_images(parquet(two, tmp_path / "two.parquet"))
    others = [{"bytes": png(s), "path": None} for s in (5, 6)]
    typed = Dataset.from_dict({"jpg": values, "image": others}, Features(jpg=kind, image=Image()))
    typed = open_images(parquet(typed, tmp_path / "typed.parquet"))  # a type that says so goes first
    np.testing.assert_array_equal(typed[1][0], picture(6))
    none = Dataset.from_dict({"label": [1, 2]})
    with pytest.raises(ImageError, match=r"0 columns of images, of the columns label: .* a struct with bytes\)"):
        open_images(parquet(none, tmp_path / "none.parquet"))


@pytest.mark.parametrize(
    ("kind", "values", "labels", "names"),
    [
        (Value("int64"), [2, 0, 2], [2, 0, 2], ["0", "1", "2"]),
        (Value("string"), ["cat", "ant", "cat"], [1, 0, 1], ["ant", "cat"]),
        (COLOURS, [-1, -1, -1], [0, 0, 0], None),  # a test set of the hub's
    ],
)
def test_kinds_of_labels(tmp_path, kind, values, labels, names):
    dataset = rows(range(3)).remove_columns("label")
    dataset = dataset.add_column("label", values).cast_column("label", kind)
    images = open_images(parquet(dataset, tmp_path / "x.parquet"))
    assert (images.labels, images.class_names) == (labels, names)


def test_labels_that_cannot_be(tmp_path):
    for number, (kind, values, message) in enumerate(
        [
            (COLOURS, [0, -1, 2], r"x\d\.parquet row 1: the label in label is -1, of classes from 0 to 2"),
            (Value("int64"), [0, 1, -3], r"x\d\.parquet row 2: the label in label is -3, of classes from 0\."),
            (Value("int64"), [0, None, 1], r"x\d\.parquet row 1: the label in label is None"),
            (Value("string"), ["cat", None, "dog"], r"x\d\.parquet row 1: the label in label is None\. .*--label ''"),
            (Value("large_string"), [None, None, None], r"x\d\.parquet row 0: the label in label is None"),
            (COLOURS, [0, 1, None], r"x\d\.parquet row 2: the label in label is None"),
            (Value("float32"), [0.0, 1.0, 2.0], r"the column label is Value\('float32'\); classes are of type"),
        ]
    ):
        data = {"image": [{"bytes": png(0), "path": None}] * 3, "label": values}
        source = parquet(Dataset.from_dict(data, Features(image=Image(), label=kind)), tmp_path / f"x{number}.parquet")
        with pytest.raises(ImageError, match=message):
            open_images(source)
        assert open_images(source, label="").class_names is None


def test_held_out_set_of_other_classes(tmp_path):
    held_out = parquet(rows(range(2), ClassLabel(names=["red", "blue", "green"])), tmp_path / "held_out.parquet")
    source = parquet(rows(range(3)), tmp_path / "x.parquet")
    with pytest.raises(ImageError, match=r"\['red', 'blue', 'green'\]\) are not those of"):
        open_split(DataConfig(source=source, held_out=held_out))
    numbers = [parquet(rows(range(n), Value("int64")), tmp_path / f"numbers{n}.parquet") for n in (3, 2)]
    assert [len(part) for part in open_split(DataConfig(source=numbers[0], held_out=numbers[1]))] == [3, 2]
    with pytest.raises(ImageError, match="are not those of"):
        open_split(DataConfig(source=numbers[1], held_out=numbers[0]))


# --- bad input


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_rows_are_named_skipped_or_fatal(tmp_path, workers):
    values = [{"bytes": png(0), "path": None}, {"bytes": png(1)[:300], "path": None}, None, {"bytes": b"x", "path": ""}]
    source = parquet(Dataset.from_dict({"image": values}, Features(image=Image())), tmp_path / "x.parquet")
    images = open_images(source)
    for row, reason in enumerate([r"truncated", r"there is no image", r"not an image that Pillow knows"], start=1):
        with pytest.raises(ImageError, match=rf"^[^\n]*x\.parquet row {row}: [^\n]*{reason}[^\n]*on_broken: skip.*\.$"):
            images[row]
    config = DataConfig(source=source, on_broken="skip", workers=workers)
    (batch,) = loader(Stream(images, config, (16, 16), seed=0), [range(4)], config)
    assert batch["index"].tolist() == [0] * 4
    config = config.model_copy(update={"on_broken": "error"})
    with pytest.raises(ImageError, match=r"x\.parquet row"):
        list(loader(Stream(images, config, (16, 16), seed=0), [range(4)], config))


def test_unusable_files(tmp_path):
    whole = parquet(rows(range(3)), tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes(Path(whole).read_bytes()[:-100])
    with pytest.raises(ImageError, match=r"cut\.parquet cannot be read \(.*\)\. Copy it again"):
        open_images(tmp_path / "cut.parquet")
    (tmp_path / "cut.arrow").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"cut\.arrow cannot be read"):
        open_images(tmp_path / "cut.arrow")
    for name, dataset, message in (
        ("fewer", rows(range(3)).remove_columns("label"), r"its column label is None, that of the other ClassLabel"),
        (
            "other",
            rows(range(3), ClassLabel(names=["green", "red", "blue"])),
            r"its column label is ClassLabel.*'green'",
        ),
        ("more", rows(range(3), mask=(Value("int8"), [1, 2, 3])), r"its column mask is Value\('int8'\)"),
    ):
        parquet(dataset, tmp_path / f"{name}.parquet")
        with pytest.raises(ImageError, match=rf"{name}\.parquet cannot be read together with .*{message}"):
            open_images(tmp_path / f"{{whole,{name}}}.parquet")
    parquet(rows([]), tmp_path / "empty.parquet")
    with pytest.raises(ImageError, match=r"empty\.parquet has no rows"):
        open_images(tmp_path / "empty.parquet")
    DatasetDict(train=rows(range(2)), test=rows(range(2))).save_to_disk(tmp_path / "parts")
    with pytest.raises(ImageError, match=r"2 parts \(test, train\): write which, .*parts/test"):
        open_images(tmp_path / "parts")
    rows(range(2)).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/data-00000-of-00001.arrow").unlink()
    with pytest.raises(ImageError, match=r"saved cannot be read"):
        open_images(tmp_path / "saved")


def test_without_datasets_installed(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (tmp_path / "x.parquet", "hf:owner/name"):
        with pytest.raises(ImageError, match=r"read by datasets, which is not installed: pip install 'rae\[data\]'"):
            open_images(source)


# --- the hub


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name:v1.0", ("owner/name", "v1.0", "train")),
        ("hf:owner/name@test", ("owner/name", None, "test")),
        ("hf:o-w.n/na_me:full@train[:1000]", ("o-w.n/na_me", "full", "train[:1000]")),
        ("hf:owner/name@train+test", ("owner/name", None, "train+test")),
    ],
)
def test_names_of_the_hub(monkeypatch, source, asked):
    def load(name, config, *, split):
        assert (name, config, split) == asked
        return rows(range(3))

    monkeypatch.setattr(datasets, "load_dataset", load)
    images = open_images(source)
    assert images.names[2] == f"{source} row 2"
    assert contents(images) == expected(range(3))


def test_names_that_the_hub_does_not_have(tmp_path, monkeypatch):
    for source in ("hf:name", "hf:", "hf:owner/name:a:b", "hf:owner/name@", "hf:owner/name/more"):
        with pytest.raises(ImageError, match=r"hf:owner/name:config@split"):
            open_images(source)

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ImageError, match=r"^hf:owner/name cannot be read \(Couldn't reach .*\)\. Check owner.*HF_ENDPOI"
    ):
        open_images("hf:owner/name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"there is owner/name here: write \./owner/name"):
        open_images("hf:owner/name")
