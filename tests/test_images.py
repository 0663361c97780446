"""Images: ADM's crop bit for bit, an exact order, views that depend on (seed, position) alone, clear errors."""

import errno
import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import Float32Device
from PIL import Image

from rae.config import ConfigError, load_recipe, parse
from rae.data.crops import center_crop, random_crop
from rae.data.folders import without_images
from rae.data.image_set import Images, PassedOver, read_image
from rae.data.images import (
    DataConfig,
    ImageError,
    Stream,
    Views,
    loader,
    open_images,
    open_split,
    readable,
    readable_chunks,
    to_bytes,
    to_unit,
)
from rae.data.order import batch_positions, crop_draws, epoch_order, image_index, mirrored, noise_draws
from rae.data.streams import StreamError


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three and two images of 40 x 56 pixels, one of them in a folder below its class."""
    for seed, name in enumerate(["b/0.png", "b/deep/1.PNG", "b/2.jpg", "a/0.png", "a/1.webp"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(40, 56, seed)).save(tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("not an image by name")
    (tmp_path / "b/.hidden.png").write_text("nor this")
    (tmp_path / "empty").mkdir()
    return tmp_path


# --- sources


def test_class_folders_in_sorted_order(folder):
    images = open_images(folder)
    assert [Path(name).relative_to(folder).as_posix() for name in images.names] == [
        "a/0.png",
        "a/1.webp",
        "b/0.png",
        "b/2.jpg",
        "b/deep/1.PNG",
    ]
    assert list(images.labels) == [0, 0, 1, 1, 1]
    assert images.class_names == ["a", "b"]
    image, label = images[2]
    assert label == 1
    np.testing.assert_array_equal(image, picture(40, 56, 0))


def test_classes_of_a_folder_can_be_left_alone_and_columns_it_has_none(folder):
    assert open_images(folder, label="").class_names is None
    assert open_images(folder, label="").labels == [0] * 5
    with pytest.raises(ImageError, match=r"--image photo \(.* data\.image=photo\) names a column, and .* has none"):
        open_images(folder, image="photo")
    with pytest.raises(ImageError, match=r"--label class \(.* data\.label=class\) names a column"):
        open_split(DataConfig(source=str(folder), label="class"))


def test_flat_folder_has_no_classes_and_identity_follows_the_files(folder):
    flat = open_images(folder / "a")
    assert flat.class_names is None
    assert list(flat.labels) == [0, 0]
    before = open_images(folder).identity
    assert open_images(folder).identity == before
    Image.fromarray(picture(9, 9)).save(folder / "a/2.png")
    assert open_images(folder).identity != before


def test_bundled_sets():
    digits = open_images("digits")
    image, label = digits[7]
    assert (len(digits), digits.class_names[label], image.shape, image.dtype) == (1797, "7", (8, 8, 3), np.uint8)
    assert (image[..., 0] == image[..., 2]).all()
    assert max(digits[i][0].max() for i in range(50)) == 255
    photographs = open_images("photographs")
    assert all(min(photographs[i][0].shape[:2]) >= 256 for i in range(len(photographs)))


def test_held_out_part_is_apart_and_complete():
    train, held_out = open_split(DataConfig(source="digits", held_out=0.2))
    assert (len(train), len(held_out)) == (1438, 359)
    assert sorted([*train.names, *held_out.names]) == sorted(open_images("digits").names)
    assert train.identity != held_out.identity
    np.testing.assert_array_equal(
        train[5][0], open_images("digits")[int(train.names[5].removeprefix("digits[").rstrip("]"))][0]
    )
    with pytest.raises(ImageError, match="leaves 0 held out"):
        open_split(DataConfig(source="digits", held_out=1e-5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "no such folder"),
        (lambda root: root / "empty", "holds no images"),
        (lambda root: root / "hub", r"hub holds no images .* There are \.parquet files in .*/hub/data: write that\."),
        (lambda root: root, "3 images and also 1 folders"),
    ],
)
def test_unusable_folders(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hub/data").mkdir(parents=True)  # as the hub's data sets lie on the disk
    (tmp_path / "hub/data/train.parquet").touch()
    for name in ("0.png", "1.png", "2.png", "sub/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture(8, 8)).save(tmp_path / name)
    with pytest.raises(ImageError, match=message):
        open_images(make(tmp_path))


def test_suffixes_of_data_files_are_in_lower_case(tmp_path):
    """So a BACKUP.TAR beside images is none of them."""
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(picture(8, 8)).save(flat / "a.PNG")
    (flat / "BACKUP.TAR").touch()
    assert open_images(flat).names == [str(flat / "a.PNG")]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/X.PARQUET").touch()
    for source in (tmp_path / "tables/X.PARQUET", tmp_path / "tables"):
        with pytest.raises(ImageError, match=r"is a file of a kind that is not read|holds no images"):
            open_images(source)


def test_folders_without_images_are_told_of_classes_only(folder):
    assert without_images(folder) == ["empty"]
    assert without_images(folder / "b") == []  # flat: what is below it is no class
    assert without_images(folder / "nowhere") == []


def test_one_file_is_a_set_of_one(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    images = open_images(tmp_path / "a.png")
    assert (len(images), images.class_names, images[0][0].shape) == (1, None, (3, 4, 3))


def test_links_in_circles_are_read_once(folder):
    (folder / "a/up").symlink_to(folder)
    (folder / "a/again").symlink_to(folder / "a")
    (folder / "b/a").symlink_to(folder / "a")
    images = open_images(folder)
    assert [Path(name).relative_to(folder).as_posix() for name in images.names if "/b/" not in name] == [
        "a/0.png",
        "a/1.webp",
    ]
    assert sum("/b/a/" in name for name in images.names) == 2  # another class may link to the same images
    assert len(images) == 7


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(folder):
    whole, away = open_images(folder), folder.parent / "away"
    for name in ("b/2.jpg", "a/0.png", "a/1.webp"):
        (folder / name).unlink()
        (folder / name).symlink_to(away / name)
    with pytest.warns(
        PassedOver, match=rf"3 of 5 images .* \({folder}/a/0\.png, .* a link to {away}/a/0\.png, which is n"
    ):
        images = open_images(folder)
    assert (images.names, images.labels, images.class_names) == (whole.names, whole.labels, whole.class_names)
    assert images.identity != whole.identity
    assert without_images(folder) == ["empty"]
    config, left_out = DataConfig(source=str(folder), on_broken="skip"), []
    with pytest.raises(
        ImageError, match=r"a/0\.png: it is a link to .*/away/a/0\.png, which is not here\. Fetch or .*skip"
    ):
        Views(images, config.model_copy(update={"on_broken": "error"}), (24, 24))[0]
    read = list(readable(images, config, (24, 24), range(5), batch=5, left_out=left_out.append))
    assert torch.cat([part["index"] for part in read]).tolist() == [2, 4]
    assert left_out == [str(folder / name) for name in ("a/0.png", "a/1.webp", "b/2.jpg")]
    away.symlink_to(folder / "b/0.png")  # a link to below a file
    with pytest.warns(PassedOver):
        assert open_images(folder).identity == images.identity


def test_a_link_that_may_have_led_to_a_class_is_refused(folder):
    for name in ("notes.csv", "a/labels.json", ".cache", "b/.x.png"):  # files that are no images
        (folder / name).symlink_to(folder / "gone")
    before = open_images(folder)
    for name in ("dog", "n02085620", "St. Bernard", "b/more"):
        (folder / name).symlink_to(folder / "gone")
        with pytest.raises(ImageError, match=rf"{folder / name} leads nowhere \(No such file .* remove it\.$"):
            open_images(folder)
        with pytest.raises(ImageError, match="leads nowhere"):
            without_images(folder)
        (folder / name).unlink()
    assert open_images(folder).identity == before.identity


@pytest.mark.parametrize("part", ["", "b", "b/deep", "empty"])
def test_a_folder_that_cannot_be_listed_ends_it(folder, part, monkeypatch):
    scandir = os.scandir

    def broken(path):
        if Path(path) == folder / part:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    for look in (open_images, without_images)[: 1 if part == "b/deep" else 2]:  # there are images in b itself
        with pytest.raises(
            ImageError, match=rf"^{folder / part} cannot be listed \(Input/output error\): .* move it away"
        ):
            look(folder)


def test_what_the_disk_keeps_for_itself_is_no_class(folder, monkeypatch):
    (folder / "lost+found").mkdir()
    before, scandir = open_images(folder), os.scandir

    def denied(path):
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert open_images(folder).identity == before.identity


def test_a_file_that_cannot_be_looked_at_is_named(folder):
    (folder / "b/circle.png").symlink_to("circle.png")
    with pytest.raises(ImageError, match=r"b/circle\.png: Too many levels of symbolic links\. Mount"):
        open_images(folder)


def test_what_is_no_file_is_left_alone(folder):
    before = open_images(folder)
    os.mkfifo(folder / "b/pipe.png")
    (folder / "b/link.png").symlink_to(folder / "b/pipe.png")
    assert open_images(folder).identity == before.identity


def test_ordinary_files_are_looked_at_once(folder, monkeypatch):
    """1.28 million of them on a network's disk."""
    looked, stat = [], os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *args, **options: looked.append(str(path)) or stat(path, *args, **options)
    )
    images = open_images(folder)
    assert sorted(path for path in looked if path.lower().endswith((".png", ".jpg", ".webp"))) == sorted(images.names)


def test_identity_of_a_folder_is_what_it_has_always_been(folder):
    for size, name in enumerate(["b/0.png", "b/deep/1.PNG", "b/2.jpg", "a/0.png", "a/1.webp"]):
        (folder / name).write_bytes(bytes(size))
    listing = "a/0.png 3\na/1.webp 4\nb/0.png 0\nb/2.jpg 2\nb/deep/1.PNG 1"
    assert open_images(folder).identity == hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize("suffix", [".gif", ".AVIF", ".heic", ".jfif"])
def test_a_class_of_unread_files_is_named(folder, suffix):
    (folder / "c").mkdir()
    (folder / f"c/photo{suffix}").touch()
    with pytest.raises(ImageError, match=rf"c would be a class, .*: photo{suffix}, for one\. Convert them"):
        open_images(folder)
    Image.fromarray(picture(8, 8)).save(folder / "c/0.png")
    with pytest.warns(PassedOver, match=rf"passed over: 1 {suffix.lower()} \(.*photo{suffix}, for one\)"):
        assert open_images(folder).class_names == ["a", "b", "c"]


def test_images_of_kinds_that_are_not_read_are_counted_and_change_nothing(folder):
    before = open_images(folder)
    for name in ("a/x.gif", "b/deep/Y.GIF", "b/z.heic", "top.jxl", "empty/.hidden.gif"):
        (folder / name).touch()
    with pytest.warns(PassedOver) as told:
        images = open_images(folder)
    (warning,) = told
    assert f"{folder}: images of kinds that are not read are passed over: 2 .gif, 1 " in str(warning.message)
    assert f"({folder / 'top.jxl'}, for one). Convert them" in str(warning.message)
    assert "1 .heic" in str(warning.message)
    assert (images.names, images.identity) == (before.names, before.identity)


def test_nothing_but_kinds_that_are_not_read(tmp_path):
    for name in ("a.gif", "b.gif"):
        (tmp_path / name).touch()
    with pytest.raises(ImageError, match=r"holds no images .*; 2 \.gif are there: convert them"):
        open_images(tmp_path)
    with pytest.raises(ImageError, match=r"a\.gif is a file of a kind that is not read \(\.jpg, .*\.npz\)"):
        open_images(tmp_path / "a.gif")


def test_names_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(picture(8, 8)).save(tmp_path / name)
    images = open_images(tmp_path)
    assert images.names == [str(tmp_path / name)]
    np.testing.assert_array_equal(images[0][0], picture(8, 8))
    (tmp_path / name).rename(tmp_path / "cafe.png")
    assert open_images(tmp_path).identity != images.identity


@pytest.mark.parametrize("name", ["digits", "photographs"])
def test_a_name_that_means_two_things_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    Image.fromarray(picture(8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(ImageError, match=rf"write \./{name} for the folder"):
        open_images(name)
    assert len(open_images(f"./{name}")) == 1
    (tmp_path / name / "recipe.yaml").touch()  # `--out digits`: the same command again goes on
    assert len(open_images(name)) > 1
    with pytest.raises(ImageError, match=r"write \. for the folder"):
        open_images("")


# --- crops


def test_center_crop_keeps_what_needs_no_resize():
    image = picture(32, 50)
    np.testing.assert_array_equal(center_crop(image, (32, 32)), image[:, 9:41])
    halves = image.repeat(2, axis=0).repeat(2, axis=1)  # 64 x 100: one box step back to 32 x 50
    np.testing.assert_array_equal(center_crop(halves, (32, 32)), image[:, 9:41])


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
@pytest.mark.parametrize("shape", [(31, 33), (71, 53), (37, 91), (129, 201)])
def test_crops_have_the_size_asked_for(shape, size):
    image = picture(*shape)
    assert center_crop(image, size).shape == (*size, 3)
    for draws in [(0, 0), (0.999999, 0.999999)]:
        assert random_crop(image, size, draws).shape == (*size, 3)


def test_random_crop_reaches_every_place_of_the_enlarged_image():
    image = picture(12, 12)
    whole = np.asarray(Image.fromarray(image))  # 12 = 1.5 x 8, so nothing is resized
    tiles = {random_crop(image, (8, 8), (r / 5, c / 5)).tobytes(): (r, c) for r in range(5) for c in range(5)}
    assert tiles == {whole[r : r + 8, c : c + 8].tobytes(): (r, c) for r in range(5) for c in range(5)}


@pytest.mark.parametrize("shape", [(375, 500), (90, 61), (700, 1100)])
def test_random_crop_is_a_part_of_the_scaled_image(shape):
    image = np.asarray(Image.fromarray(picture(9, 12)).resize(shape[::-1], Image.Resampling.BICUBIC))
    scale = 192 / min(shape)
    whole = np.asarray(
        Image.fromarray(image).resize((int(shape[1] * scale), int(shape[0] * scale)), Image.Resampling.BICUBIC)
    )
    for draws in np.random.default_rng(0).random((5, 2)):
        top, left = (int(draw * (side - 128 + 1)) for draw, side in zip(draws, whole.shape))
        apart = np.abs(random_crop(image, (128, 128), draws).astype(int) - whole[top : top + 128, left : left + 128])
        assert apart.max() <= 2
        assert (apart > 0).mean() < 0.02


# --- the stream


@pytest.mark.parametrize("n", [1, 7, 100])
def test_every_epoch_holds_every_image_once_in_its_own_order(n):
    epochs = [[image_index(p, n, seed=3) for p in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) == 3
    assert n < 7 or list(epoch_order(4, 0, n)) != epochs[0]


def test_batches_of_all_processes_tile_the_stream():
    ranks = [list(batch_positions(24, 96, 12, rank=rank, world=3)) for rank in range(3)]
    positions = [p for batch in zip(*ranks) for part in batch for p in part]
    assert positions == list(range(24, 96))
    assert list(batch_positions(60, 96, 12, rank=1, world=3)) == ranks[1][3:]  # resumed


def test_noise_of_an_image_does_not_depend_on_its_batch():
    normals, uniforms = noise_draws(range(10), seed=0, shape=(3, 5))
    for position in range(10):
        one = noise_draws([position], seed=0, shape=(3, 5))
        assert torch.equal(one[0][0], normals[position])
        assert torch.equal(one[1][0], uniforms[position])
    assert not torch.equal(noise_draws(range(10), seed=1, shape=(3, 5))[0], normals)
    many, _ = noise_draws(range(4000), seed=0, shape=(4,))
    assert abs(many.mean()) < 5 / 4000**0.5
    assert abs((many[1:] * many[:-1]).mean()) < 5 / 4000**0.5  # neighbours are independent
    assert abs(np.mean([crop_draws(p, 0) for p in range(4000)]) - 0.5) < 5 * 12**-0.5 / 8000**0.5
    assert abs(np.mean([mirrored(p, 0) for p in range(4000)]) - 0.5) < 5 * 0.5 / 4000**0.5


def test_noise_on_a_cpu_is_what_it_has_always_been():
    normals, uniforms = noise_draws([0, 123456], seed=7, shape=(2,))
    assert normals.flatten().tolist() == pytest.approx([0.25817856, 0.78712469, -1.10332060, 1.05239570], abs=1e-7)
    assert uniforms.flatten().tolist() == pytest.approx([0.76701480, 0.14770895, 0.82121730, 0.46069127], abs=1e-7)


def test_normals_are_drawn_on_the_device_and_uniforms_are_not(monkeypatch):
    class Anywhere(torch.Generator):  # a device that does not exist has no generator
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Anywhere)
    with Float32Device():
        normals, uniforms = noise_draws(range(6), 0, (3, 5), "lazy")
        assert (normals.device.type, uniforms.device.type) == ("lazy", "cpu")
        one = noise_draws([4], 0, (3, 5), "lazy")
        assert torch.equal(one[0][0].cpu(), normals[4].cpu())
        assert torch.equal(one[1][0], uniforms[4])
        assert len({*uniforms.flatten().tolist()}) == 12


def test_stream_yields_the_same_with_and_without_workers(folder):
    images = open_images(folder)
    config = DataConfig(source=str(folder), crop="random", flip=True)
    stream = Stream(images, config, (24, 24), seed=1)
    alone = [stream[p] for p in range(12)]
    batches = list(loader(stream, list(batch_positions(0, 12, 4)), config.model_copy(update={"workers": 2})))
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack([item["image"] for item in alone]))
    assert torch.cat([b["label"] for b in batches]).tolist() == [images.labels[item["index"]] for item in alone]
    assert torch.cat([b["position"] for b in batches]).tolist() == list(range(12))


def test_flip_mirrors_about_half(folder):
    config = DataConfig(source=str(folder), flip=True)
    flipped = Stream(open_images(folder), config, (40, 40), seed=0)
    plain = Stream(open_images(folder), config.model_copy(update={"flip": False}), (40, 40), seed=0)
    mirrored = [not torch.equal(flipped[p]["image"], plain[p]["image"]) for p in range(200)]
    assert all(torch.equal(flipped[p]["image"], plain[p]["image"].flip(-1)) for p in range(200) if mirrored[p])
    assert 70 < sum(mirrored) < 130


def test_bytes_and_floats_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_unit(levels)), levels)
    assert to_bytes(torch.tensor([-0.5, 1.5])).tolist() == [0, 255]


# --- bad input


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(folder, workers):
    truncate(folder / "b/2.jpg")
    config = DataConfig(source=str(folder), workers=workers)
    stream = Stream(open_images(folder), config, (24, 24), seed=0)
    message = (
        r"^[^\n]*b/2\.jpg: cannot be decoded \([^\n]*truncated[^\n]*--skip-broken, in a recipe data\.on_broken: skip\.$"
    )
    with pytest.raises(ImageError, match=message):
        list(loader(stream, [range(5)], config))


def test_broken_image_is_replaced_by_the_next_one_every_time(folder):
    truncate(folder / "b/2.jpg")
    config = DataConfig(source=str(folder), on_broken="skip")
    views = Views(open_images(folder), config, (24, 24))
    assert [views[i]["index"] for i in range(5)] == [0, 1, 2, 4, 4]
    assert torch.equal(views[3]["image"], views[4]["image"])
    for path in [p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".webp") and p.name[0] != "."]:
        path.write_bytes(b"nothing")
    with pytest.raises(ImageError, match="none of the 5 images"):
        views[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_chunks_have_batches_of_their_own_images(folder, workers):
    truncate(folder / "b/2.jpg")
    views = Views(open_images(folder), DataConfig(source=str(folder), on_broken="skip", workers=workers), (24, 24))
    read = readable_chunks(views, [range(3), range(3, 4), range(0), range(2, 5)], 2)
    parts = [[(wanted, items["index"].tolist()) for wanted, items in batches] for batches in read]
    assert parts == [
        [(range(2), [0, 1]), (range(2, 3), [2])],
        [(range(3, 4), [])],
        [],
        [(range(2, 4), [2]), (range(4, 5), [4])],
    ]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_broken_images_are_left_out_by_name(folder, batch):
    truncate(folder / "b/2.jpg")
    images, left_out = open_images(folder), []
    config = DataConfig(source=str(folder), on_broken="skip")
    parts = list(readable(images, config, (24, 24), range(1, 5), batch=batch, left_out=left_out.append))
    assert torch.cat([part["index"] for part in parts]).tolist() == [1, 2, 4]
    assert torch.cat([part["label"] for part in parts]).tolist() == [0, 1, 1]
    assert max(len(part["image"]) for part in parts) <= batch
    views = Views(images, config, (24, 24))
    assert torch.equal(torch.cat([p["image"] for p in parts]), torch.stack([views[i]["image"] for i in (1, 2, 4)]))
    assert left_out == [str(folder / "b/2.jpg")]


def test_small_images_are_enlarged_only_when_asked(folder):
    config = DataConfig(source=str(folder))
    with pytest.raises(ImageError, match=r"a/0\.png is 40 x 56 pixels .* than the 64 x 48 .* data\.enlarge: true"):
        Views(open_images(folder), config, (64, 48))[0]
    enlarged = Views(open_images(folder), config.model_copy(update={"enlarge": True}), (64, 48))[0]["image"]
    assert enlarged.shape == (3, 64, 48)


def test_files_that_are_not_8_bit_colour(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == np.arange(64, dtype=np.uint8).reshape(8, 8, 1)).all()


def raises_runtime_error(file: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(file)) as opened:
            opened.load()
    except RuntimeError:
        return True
    except (OSError, ValueError, SyntaxError):
        return False
    return False


def test_a_damaged_avif_is_skipped_and_an_error_of_ours_is_not(tmp_path):
    Image.fromarray(picture(40, 56)).save(tmp_path / "0.avif")
    whole = (tmp_path / "0.avif").read_bytes()
    flipped = (whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(len(whole)))
    damaged = next(filter(raises_runtime_error, flipped))

    def read(index: int) -> np.ndarray:
        if index == 2:
            raise StreamError("the hub cannot be reached")
        return read_image((whole, damaged)[index], f"row {index}")

    images, config = Images(["a", "b", "c"], [0] * 3, None, "", read), DataConfig(source="", on_broken="skip")
    with pytest.raises(ImageError, match=r"^row 1: cannot be decoded \(.*decode.*\)\. Replace or remove it, .*skip\.$"):
        images[1]
    with pytest.raises(StreamError, match="the hub cannot be reached"):
        list(loader(Views(images, config, (24, 24)), [range(3)], config))
    images = Images(["a", "b"], [0] * 2, None, "", read)
    (batch,) = loader(Views(images, config, (24, 24)), [range(2)], config)
    assert batch["index"].tolist() == [0, 0]


def png(pixels: np.ndarray) -> bytes:
    """A colour PNG of 16 bits a channel, which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def test_16_bit_colour_is_refused(tmp_path):
    (tmp_path / "deep.png").write_bytes(png(np.full((4, 4, 3), 300)))
    with Image.open(tmp_path / "deep.png") as opened:
        assert opened.mode == "RGB"  # which says 8 bits
    with pytest.raises(ImageError, match="more than 8 bits a channel"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_are_white(tmp_path, mode):
    pixels = picture(8, 8)
    pixels[0, 0] = 0
    alpha = np.where(np.arange(64).reshape(8, 8, 1) % 2, 255, 0).astype(np.uint8)
    if mode == "P":  # colour 0 is transparent
        image = Image.fromarray(pixels[..., 0], "L").convert("P")
        image.save(tmp_path / "x.png", transparency=0)
        opaque, alpha = np.asarray(image.convert("RGB")), 255 * (np.asarray(image)[..., None] > 0)
    elif mode == "RGB":  # one colour is
        Image.fromarray(pixels).save(tmp_path / "x.png", transparency=tuple(pixels[2, 3].tolist()))
        opaque, alpha = pixels, 255 * (pixels != pixels[2, 3]).any(axis=-1, keepdims=True)
    else:
        colour = pixels[..., :1] if mode == "LA" else pixels
        Image.fromarray(np.concatenate([colour, alpha], axis=2)).save(tmp_path / "x.png")
        opaque = np.broadcast_to(colour, pixels.shape)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.where(alpha, opaque, 255))


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.fromarray(np.full((4, 4, 4), (200, 100, 0, 51), dtype=np.uint8)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0, 0].tolist() == [244, 224, 204]  # 255 + (x - 255) / 5


def test_camera_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(picture(10, 20)).save(tmp_path / "side.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "side.png"), np.rot90(picture(10, 20), -1))


def test_fewer_than_no_workers_are_refused():
    with pytest.raises(ConfigError, match="workers: Input should be greater than or equal to 0"):
        parse(DataConfig, {"source": "digits", "workers": -1}, "recipe")


def test_misspelt_key_names_the_nearest(tmp_path):
    (tmp_path / "r.yaml").write_text("source: digits\nheldout: 0.1\n")
    with pytest.raises(ConfigError, match="did you mean 'held_out'"):
        load_recipe(DataConfig, tmp_path / "r.yaml")
