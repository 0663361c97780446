"""WebDataset shards: samples by key, read in any order, damage named by shard and key."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import picture, png

from rae.data import shards
from rae.data.images import DataConfig, ImageError, Stream, loader, open_images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAE_CACHE", str(folder))
    return folder


def shard(path: Path, members: dict[str, bytes], *, mode: str = "w") -> str:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def sample(seed: int, label: bytes | None = b"0") -> dict[str, bytes]:
    members = {f"{seed:04}.json": b"{}", f"{seed:04}.png": png(seed), f"{seed:04}.txt": b"a caption"}
    return members | ({f"{seed:04}.cls": label} if label is not None else {})


def samples(seeds, label=lambda seed: str(seed % 3).encode()) -> dict[str, bytes]:
    return {name: content for seed in seeds for name, content in sample(seed, label(seed)).items()}


# --- reading


def test_shards_are_read_one_after_the_other(tmp_path):
    for part in range(3):
        shard(tmp_path / f"train/train-{part:03}.tar", samples(range(2 * part, 2 * part + 2)))
    whole = shard(tmp_path / "whole.tar", samples(range(6)))
    for source in ("train", "train/train-{000..002}.tar", "train/*.tar", "train/train-00{0,1,2}.tar"):
        images = open_images(tmp_path / source)
        assert [image.tobytes() for image, _ in (images[i] for i in range(6))] == [
            picture(s).tobytes() for s in range(6)
        ]
        assert (images.labels, images.class_names) == ([0, 1, 2, 0, 1, 2], ["0", "1", "2"])
        assert images.names[3] == f"{tmp_path}/train/train-001.tar key 0003"
        assert images.identity == open_images(whole).identity  # where they lie does not matter


def test_keys_end_at_the_first_dot_and_what_is_no_sample_is_left_alone(tmp_path):
    members = {
        "a.b/.DS_Store": b"x",
        "a.b/._7.png": b"x",
        "README": b"x",
        "a.b/7.PNG": png(7),
        "a.b/7.cls": b"1\n",
        "a.b/8.0.png": png(8),
        "a.b/8.cls": b" 0",
        "a.b/" + 150 * "x" + ".png": png(9),  # a name longer than the header
        "a.b/" + 150 * "x" + ".cls": b"2",
    }
    images = open_images(shard(tmp_path / "x.tar", members))
    assert [name.rpartition(" ")[2][:6] for name in images.names] == ["a.b/7", "a.b/8", "a.b/xx"]
    assert images.labels == [1, 0, 2]
    for i, seed in enumerate((7, 8, 9)):
        np.testing.assert_array_equal(images[i][0], picture(seed))


def test_labels_are_optional(tmp_path):
    source = shard(tmp_path / "x.tar", samples(range(3), lambda _: None))
    assert (open_images(source).labels, open_images(source).class_names) == ([0, 0, 0], None)
    source = shard(tmp_path / "y.tar", samples(range(3)))
    assert (open_images(source, label="").labels, open_images(source, label="").class_names) == ([0, 0, 0], None)
    without = open_images(tmp_path / "x.tar").identity  # the same images
    assert open_images(source).identity != open_images(source, label="").identity == without


def test_identity_is_what_it_has_always_been(tmp_path):
    """Resumed runs compare it."""
    source = shard(tmp_path / "x.tar", samples(range(4)))
    for label, numbers in ((None, [0, 1, 2, 0]), ("", [0] * 4)):
        rows = "\n".join(f"{seed:04} {len(png(seed))} {number}" for seed, number in enumerate(numbers))
        assert open_images(source, label=label).identity == hashlib.sha256(rows.encode()).hexdigest()


def test_identity_follows_keys_sizes_and_labels(tmp_path):
    first = open_images(shard(tmp_path / "x.tar", samples(range(3)))).identity
    for name, members in {
        "key": samples([0, 1, 3]),
        "label": samples(range(3), lambda _: b"2"),
        "size": {**samples(range(3)), "0001.png": png(1) + b" "},
    }.items():
        assert open_images(shard(tmp_path / f"{name}.tar", members)).identity != first, name


def test_stream_is_the_same_with_and_without_workers(tmp_path):
    config = DataConfig(source=shard(tmp_path / "x.tar", samples(range(5))), crop="random", flip=True)
    stream = Stream(open_images(config.source), config, (16, 16), seed=1)
    alone = [stream[p] for p in range(8)]
    batches = list(loader(stream, [range(4), range(4, 8)], config.model_copy(update={"workers": 2})))
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack([item["image"] for item in alone]))


def test_a_shard_is_listed_once(tmp_path, monkeypatch, cache):
    source = shard(tmp_path / "x.tar", samples(range(3)))
    first = open_images(source)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_list", None)
        again = open_images(source)
    assert (again.names, again.labels, again.identity) == (first.names, first.labels, first.identity)
    shard(Path(source), samples(range(4)))
    assert len(open_images(source)) == 4
    for listed in cache.rglob("*.json"):
        listed.write_text(listed.read_text()[:-9])
    assert len(open_images(source)) == 4  # a damaged list is made again
    monkeypatch.setenv("RAE_CACHE", os.devnull)  # nor is one needed
    assert len(open_images(source)) == 4


# --- bad input


@pytest.mark.parametrize("keep", ["inside a member", "inside a header", "at a header", "no end"])
def test_shards_cut_short(tmp_path, keep):
    whole = Path(shard(tmp_path / "whole.tar", samples(range(3))))
    with tarfile.open(whole) as tar:
        entries = tar.getmembers()
    at = {
        "inside a member": entries[-3].offset_data + 100,
        "inside a header": entries[-4].offset + 100,
        "at a header": entries[-4].offset,
        "no end": entries[-1].offset_data + 512,
    }[keep]
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:at])
    with pytest.raises(ImageError, match=r"cut\.tar .*after 000\d\.\w+.*: copy it again, whole"):
        open_images(tmp_path / "cut.tar")


def test_damaged_header_in_the_middle(tmp_path):
    source = Path(shard(tmp_path / "x.tar", samples(range(3))))
    with tarfile.open(source) as tar:
        at = tar.getmembers()[5].offset
    data = bytearray(source.read_bytes())
    data[at : at + 100] = b"\xff" * 100
    source.write_bytes(data)
    with pytest.raises(ImageError, match=rf"x\.tar is damaged or cut short at byte {at}, after 0001\.json"):
        open_images(source)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**sample(1), "0002.txt": b"x", "0002.cls": b"0"}, r"key 0002: of its files \(txt, cls\) none is an image"),
        ({**sample(1), "0001.jpg": b"x"}, r"key 0001: of its files .* 2 are images; .*data\.image=png"),
        ({**sample(1), "0002.png": png(2)}, r"key 0002 has no \.cls, 1 of 2 samples have"),
        ({**sample(1, b"cat"), **sample(2)}, r"key 0001: \.cls holds 'cat'; it must be the number"),
        ({**sample(1, b"-1")}, r"key 0001: \.cls holds '-1'"),
        ({"README": b"x"}, r"holds no samples"),
    ],
)
def test_unusable_samples(tmp_path, members, message):
    with pytest.raises(ImageError, match=rf"x\.tar.* ?{message}"):
        open_images(shard(tmp_path / "x.tar", members))


def test_one_of_several_images_is_named(tmp_path):
    source = shard(tmp_path / "x.tar", {"0.png": png(0), "0.seg.png": png(1)})
    for ending in ("seg.png", ".SEG.png"):
        np.testing.assert_array_equal(open_images(source, image=ending)[0][0], picture(1))
    with pytest.raises(ImageError, match=r"\(png, seg\.png\) none is webp, as --image .* asks"):
        open_images(source, image="webp")
    with pytest.raises(ImageError, match=r"--label txt .*: the labels of shards are in \.cls"):
        open_images(source, label="txt")


def test_a_name_that_comes_twice(tmp_path):
    source = shard(tmp_path / "x.tar", {"0.png": png(0)})
    shard(Path(source), {"0.png": png(1)}, mode="a")
    with pytest.raises(ImageError, match=r"key 0: there are two 0\.png"):
        open_images(source)


def test_broken_images_are_named_skipped_or_fatal(tmp_path):
    source = shard(tmp_path / "x.tar", {"0.png": png(0), "1.png": png(1)[:300], "2.png": png(2)})
    images = open_images(source)
    config = DataConfig(source=source)
    with pytest.raises(
        ImageError, match=r"^[^\n]*x\.tar key 1: cannot be decoded \(.*truncated.*in a recipe data\.on_broken: skip"
    ):
        list(loader(Stream(images, config, (16, 16), seed=0), [range(3)], config))
    config = config.model_copy(update={"on_broken": "skip"})
    (batch,) = loader(Stream(images, config, (16, 16), seed=0), [range(3)], config)
    assert sorted(batch["index"].tolist()) == [0, 2, 2]
    Path(source).unlink()
    with pytest.raises(ImageError, match=r"x\.tar key 0: cannot be read \(the shard is gone since it was listed\)"):
        images[0]


def test_shards_that_have_no_random_access(tmp_path):
    with pytest.raises(ImageError, match=r"x\.tar\.gz is compressed.*unpack it to \.tar"):
        open_images(tmp_path / "x.tar.gz")
    source = shard(tmp_path / "x.tar", samples(range(2)), mode="w:gz")
    with pytest.raises(ImageError, match=r"cannot be read as a tar file.*unpacked to \.tar"):
        open_images(source)


# --- which files


def test_files_of_a_range_must_all_be_there(tmp_path):
    for part in (0, 2):
        shard(tmp_path / f"train-{part:03}.tar", samples([part]))
    with pytest.raises(ImageError, match=r"train-001\.tar: no such file, of 3 that .* means"):
        open_images(tmp_path / "train-{000..002}.tar")
    with pytest.raises(ImageError, match=r"\{2\.\.0\} counts down"):
        open_images(tmp_path / "train-00{2..0}.tar")
    for missing in ("nothing.tar", "val-*.tar"):
        with pytest.raises(ImageError, match=r"\.tar: no such file"):
            open_images(tmp_path / missing)


def test_a_shard_whose_link_leads_nowhere_is_missing(tmp_path):
    for part in range(2):
        shard(tmp_path / f"train/train-{part:03}.tar", samples([part]))
    (tmp_path / "train/train-001.tar").rename(tmp_path / "blob")
    (tmp_path / "train/train-001.tar").symlink_to(tmp_path / "blob")
    assert len(open_images(tmp_path / "train")) == 2
    (tmp_path / "blob").unlink()
    for source in ("train", "train/*.tar", "train/train-{000..001}.tar", "train/train-001.tar"):
        with pytest.raises(
            ImageError, match=rf"train-001\.tar: it is a link to {tmp_path}/blob, which is not here\. Fetch"
        ):
            open_images(tmp_path / source)


def test_folders_that_mean_several_things(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "val-000.tar"):
        shard(tmp_path / "parts" / name, samples([0]))
    with pytest.raises(ImageError, match=r"files of 2 parts \(train, val\): write which, such as .*parts/train\*\.tar"):
        open_images(tmp_path / "parts")
    assert len(open_images(tmp_path / "parts/train*.tar")) == 2
    shard(tmp_path / "mixed/0.tar", samples([0]))
    (tmp_path / "mixed/cats").mkdir()
    (tmp_path / "mixed/.thumbnails").mkdir()
    (tmp_path / "mixed/.thumbnails/0.png").write_bytes(png(0))
    assert len(open_images(tmp_path / "mixed")) == 1
    (tmp_path / "mixed/cats/0.png").write_bytes(png(0))
    with pytest.raises(ImageError, match=r"holds images \(cats/0\.png, for one\) and also 1 files like 0\.tar"):
        open_images(tmp_path / "mixed")
    shard(tmp_path / "kinds/0.tar", samples([0]))
    (tmp_path / "kinds/1.parquet").touch()
    with pytest.raises(ImageError, match=r"2 kinds \(\.parquet, \.tar\)"):
        open_images(tmp_path / "kinds")
