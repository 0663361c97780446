"""Rows of the hub that are fetched when they are asked for: the same as downloaded ones, and each group once."""

import io
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from hub import Hub, serve
from huggingface_hub import HfFileSystem
from tiny import picture, png

from rae.data import streams
from rae.data.image_set import ImageError, Images
from rae.data.images import DataConfig, Stream, loader, open_images
from rae.data.streams import StreamError, open_stream
from rae.data.tables import open_tables

SOURCE = "hf-stream:someone/images"
FIRST, SECOND, TEST = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet"
COLOURS = ClassLabel(names=["red", "green", "blue"])


def parquet(seeds, **columns) -> bytes:
    """Groups of three rows: an image, something large that nobody asks for, and a label."""
    seeds = list(seeds)
    data = {"image": [{"bytes": png(s), "path": f"{s}.png"} for s in seeds]}
    data |= {"other": [np.random.default_rng(s).bytes(60_000) for s in seeds], "label": [s % 3 for s in seeds]}
    features = Features(image=Image(), other=Value("binary"), label=columns.pop("label", COLOURS))
    file = io.BytesIO()
    Dataset.from_dict(data, features).to_parquet(file, batch_size=3)
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Seven, five and three rows, in groups of three."""
    return {FIRST: parquet(range(7)), SECOND: parquet(range(7, 12)), TEST: parquet(range(20, 23))}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    monkeypatch.setenv("RAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    forget()
    with serve(dict(files)) as hub:
        yield hub


def forget() -> None:
    """As another process begins."""
    streams._group.cache_clear()
    streams._metadata.cache_clear()
    HfFileSystem.clear_instance_cache()


def opened(hub: Hub, source: str = SOURCE, image: str | None = None, label: str | None = None) -> Images:
    """The stream; what was asked of the hub from now on is in `hub.asked`."""
    images = open_images(source, image, label)
    hub.asked.clear()
    return images


def pixels(images: Images) -> list[bytes]:
    return [images[i][0].tobytes() for i in range(len(images))]


def expected(seeds) -> list[bytes]:
    return [picture(s).tobytes() for s in seeds]


# --- the same as downloaded -------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_downloaded_files(hub, tmp_path):
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    images, local = opened(hub), open_tables([tmp_path / FIRST, tmp_path / SECOND], None, None)
    assert (images.labels, images.class_names, len(images)) == (local.labels, local.class_names, 12)
    assert images.names[8] == f"{SOURCE} row 8"
    assert pixels(images) == pixels(local) == expected(range(12))
    assert pixels(opened(hub, f"{SOURCE}@test")) == expected(range(20, 23))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_in_the_same_order(hub, tmp_path, workers):
    (tmp_path / FIRST).write_bytes(hub.files[FIRST])
    (tmp_path / SECOND).write_bytes(hub.files[SECOND])
    config = DataConfig(source="x", crop="random", flip=True)
    batches = [range(start, start + 4) for start in range(0, 24, 4)]
    local = Stream(open_tables([tmp_path / FIRST, tmp_path / SECOND], None, None), config, (16, 16), seed=3)
    stream = Stream(opened(hub), config.model_copy(update={"workers": workers}), (16, 16), seed=3)
    for found, wanted in zip(loader(stream, batches, stream.config), loader(local, batches, config), strict=True):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert len(hub.asked) == len(set(hub.asked)) == 5  # the groups, whichever process needed them


@pytest.mark.parametrize(
    ("part", "rows"), [("train[4:9]", range(4, 9)), ("train[-3:]", range(9, 12)), ("train[50%:]", range(6, 12))]
)
def test_parts_of_a_split(hub, part, rows):
    images = opened(hub, f"{SOURCE}@{part}")
    assert pixels(images) == expected(rows)
    assert images.labels == [row % 3 for row in rows]
    assert images.names == [f"{SOURCE}@{part} row {row}" for row in rows]
    assert images.identity != opened(hub).identity


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_a_group_is_fetched_when_it_is_first_asked_for_and_once(hub):
    images = open_stream(SOURCE, None, None)
    assert sum(len(span) for _, span in hub.asked) < 0.4 * (len(hub.files[FIRST]) + len(hub.files[SECOND]))
    hub.asked.clear()
    images[4]
    ((name, span),) = hub.asked
    png_bytes = sum(len(png(seed)) for seed in (3, 4, 5))
    assert name == FIRST
    assert png_bytes < len(span) < 1.1 * png_bytes + 1000  # nothing of the other column
    for index in (3, 5, 4):
        images[index]
    assert len(hub.asked) == 1
    pixels(images)
    assert len(hub.asked) == 5
    forget()
    hub.asked.clear()
    assert pixels(open_stream(SOURCE, None, None)) == expected(range(12))
    assert len(hub.asked) == 2  # footers
    assert len(opened(hub, label="")) == 12


def test_processes_that_want_a_group_at_once_fetch_it_once(hub):
    images = opened(hub)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda index: images[index][0].tobytes(), [0, 1, 2, 0, 1, 2, 0, 1]))
    assert found == expected([0, 1, 2, 0, 1, 2, 0, 1])
    assert len(hub.asked) == 1


def test_what_a_killed_process_left_is_fetched_anew(hub, tmp_path):
    images = opened(hub)
    images[0]
    (whole,) = (tmp_path / "cache/streams").rglob("0.arrow")
    whole.rename(whole.with_name(".0.arrow")).write_bytes(whole.with_name(".0.arrow").read_bytes()[:100])
    forget()
    assert pixels(images) == expected(range(12))
    assert not list((tmp_path / "cache").rglob(".*"))


def test_labels_of_no_use_are_not_fetched(hub):
    images = open_stream(SOURCE, None, "")
    assert (len(hub.asked), images.class_names, set(images.labels)) == (2, None, {0})  # footers


def test_identity_follows_sizes_labels_and_order_and_not_the_commit(hub):
    def identity(commit: str, label: str | None = None) -> str:
        hub.commit = commit * 40
        forget()
        return open_stream(SOURCE, None, label).identity

    first = identity("a")
    hub.files["README.md"] = b"new"
    assert identity("b") == first
    assert identity("b", "") != first
    hub.files[FIRST], hub.files[SECOND] = hub.files[SECOND], hub.files[FIRST]
    assert identity("c") != first


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_cannot_be_fetched_are_not_skipped(hub, workers):
    images, config = opened(hub), DataConfig(source="x", on_broken="skip", workers=workers)
    del hub.files[SECOND]
    with pytest.raises(StreamError, match=rf"^group [01] of hf://.*{SECOND} could not be fetched .*Run the same"):
        list(loader(Stream(images, config, (16, 16), seed=0), [range(12)], config))
    images[6]  # of the other file


@pytest.mark.parametrize("size", [0, 100])
def test_kept_rows_that_are_damaged(hub, tmp_path, size):
    opened(hub)[0]
    (path,) = (tmp_path / "cache/streams").rglob("0.arrow")
    path.write_bytes(path.read_bytes()[:size])
    forget()
    with pytest.raises(StreamError, match=rf"{path} is damaged .*: remove it, it will be fetched again"):
        opened(hub)[0]


def test_a_disk_without_room(hub, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    with pytest.raises(
        StreamError, match=r"takes 2.\.. kB in .*streams, where 20\.0 kB are free: .*RAE_CACHE.*\[:10000"
    ):
        open_stream(SOURCE, None, None)
    assert len(open_stream(f"{SOURCE}@train[:3]", None, None)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{SOURCE}@valid", r"it has no split valid, but train, test"),
        (f"{SOURCE}@train+test", r"it has no split train\+test, but train, test"),
        (f"{SOURCE}@train[x]", r"Unrecognized instruction format: train\[x\]"),
        (f"{SOURCE}@train[5:2]", r"has no rows"),
        ("hf-stream:images", r"write hf-stream:owner/name, and where it has several"),
        ("hf-stream:someone/else", r"hf-stream:someone/else cannot be read \(.*\)\. Check owner"),
    ],
)
def test_sources_that_are_not_there(hub, source, message):
    with pytest.raises(ImageError, match=message):
        open_stream(source, None, None)


def test_files_that_cannot_be_streamed(hub):
    hub.files.clear()
    hub.files["train.csv"] = b"a,b\n1,2\n"
    with pytest.raises(ImageError, match=r"of the kind csv, and only parts of Parquet.*download it: hf:someone/images"):
        open_stream(SOURCE, None, None)


def test_columns_are_chosen_as_of_tables(hub):
    with pytest.raises(
        ImageError, match=r"--image picture \(.* data\.image=picture\): .* no such column; it has image, other, label"
    ):
        open_stream(SOURCE, "picture", None)
    hub.files[SECOND] = parquet(range(7, 12), label=Value("int64"))
    forget()
    with pytest.raises(ImageError, match=rf"{SECOND} cannot be read together with .*{FIRST}: its column label"):
        open_stream(SOURCE, None, None)


def test_without_datasets_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImageError, match=r"read by datasets, which is not installed: pip install 'rae\[data\]'"):
        open_stream(SOURCE, None, None)
