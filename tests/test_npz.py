"""Images of .npz files: read in place, from several files, with labels; what is damaged or laid out otherwise."""

import functools
import hashlib
import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import picture, png

from rae.commands.sample_folder import pack
from rae.data.images import DataConfig, ImageError, Views, loader, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2, 0])


@pytest.fixture
def file(tmp_path) -> Path:
    np.savez(tmp_path / "x.npz", PIXELS, LABELS)
    return tmp_path / "x.npz"


def save(folder: Path, *arrays: np.ndarray, **named: np.ndarray) -> str:
    np.savez(folder / "x.npz", *arrays, **named)
    return str(folder / "x.npz")


def same(images, pixels: np.ndarray = PIXELS) -> bool:
    return len(images) == len(pixels) and all(np.array_equal(images[i][0], pixels[i]) for i in range(len(images)))


# --- images and labels


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_images_and_labels(tmp_path, capsys, write):
    write(tmp_path / "x.npz", PIXELS, LABELS)
    images = open_images(tmp_path / "x.npz")
    assert same(images)
    assert (list(images.labels), images.class_names) == (LABELS.tolist(), ["0", "1", "2"])
    assert images.names[3] == f"{tmp_path / 'x.npz'} image 3"
    assert images[6][0].dtype == np.uint8
    said = "x.npz: compressed, so its images take 0.00 GiB of memory\n"
    assert (said in capsys.readouterr().err) == (write is np.savez_compressed)


def test_an_array_in_fortran_s_order_and_other_headers(tmp_path, capsys):
    assert same(open_images(save(tmp_path, np.asfortranarray(PIXELS))))
    assert "x.npz: in Fortran's order, so its images take 0.00 GiB of memory\n" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
        np.lib.format.write_array(array, PIXELS, version=(2, 0))
    assert same(open_images(tmp_path / "x.npz"))


def test_what_rae_sample_writes(tmp_path):
    files = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(files):
        path.write_bytes(png(seed))
    path, pixels = tmp_path / "samples.npz", np.stack([picture(seed) for seed in range(3)])
    pack(files, None, path, {"seed": 0})
    images = open_images(path)
    assert same(images, pixels)
    assert (set(images.labels), images.class_names) == ({0}, None)
    pack(files, [3, 0, 3], path, {"seed": 0})
    images = open_images(path)
    assert same(images, pixels)
    assert (images.labels, images.class_names) == ([3, 0, 3], ["0", "1", "2", "3"])
    np.savez(tmp_path / "by-numpy.npz", pixels, np.array([3, 0, 3]))  # as ADM's scripts do
    assert images.identity == open_images(tmp_path / "by-numpy.npz").identity


def test_packing_holds_one_image_in_memory(tmp_path):
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(tmp_path / "0.png")
    tracemalloc.start()
    pack([tmp_path / "0.png"] * 64, range(64), tmp_path / "x.npz", {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.npz").stat().st_size > 64 * 256 * 256 * 3
    assert peak < 8 * 256 * 256 * 3


def test_one_hot_labels_tell_of_all_classes(tmp_path):
    for kind in (np.float32, np.int64, bool):
        images = open_images(save(tmp_path, PIXELS, np.eye(5, dtype=kind)[LABELS]))
        assert (list(images.labels), images.class_names) == (LABELS.tolist(), ["0", "1", "2", "3", "4"])


def test_arrays_by_other_names(tmp_path):
    path = save(tmp_path, pixels=PIXELS, classes=LABELS)
    images = open_images(path, image="pixels", label="classes")
    assert same(images)
    assert list(images.labels) == LABELS.tolist()
    assert open_images(path, image="pixels").class_names is None
    assert open_images(save(tmp_path, PIXELS, LABELS), label="").class_names is None
    with pytest.raises(ImageError, match=r"holds no arr_0, only pixels, classes: name the array .* data\.image"):
        open_images(save(tmp_path, pixels=PIXELS, classes=LABELS))
    with pytest.raises(ImageError, match=r"holds no kinds, only pixels, classes: name the array .* data\.label"):
        open_images(path, image="pixels", label="kinds")


def test_several_files_one_after_the_other(tmp_path):
    for i, rows in enumerate((slice(0, 3), slice(3, 4), slice(4, 7))):
        np.savez(tmp_path / f"{i}.npz", PIXELS[rows], LABELS[rows])
    for source in ("*.npz", "{0..2}.npz"):
        images = open_images(tmp_path / source)
        assert same(images)
        assert list(images.labels) == LABELS.tolist()
        assert images.names[4] == f"{tmp_path / '2.npz'} image 0"
    np.savez(tmp_path / "1.npz", PIXELS[3:4])
    with pytest.raises(ImageError, match=r"1\.npz holds no labels \(arr_1\), of 3 files others do"):
        open_images(tmp_path / "*.npz")
    assert same(open_images(tmp_path / "*.npz", label=""))
    with pytest.raises(ImageError, match=r"3\.npz: no such file, of 4 that"):
        open_images(tmp_path / "{0..3}.npz")


def test_a_folder_of_them_must_be_named(tmp_path, file):
    with pytest.raises(ImageError, match=rf"holds no images .* Its \.npz files must be named: {tmp_path}/\*\.npz"):
        open_images(tmp_path)
    (tmp_path / "0.png").write_bytes(png(0))  # beside images it may hold anything
    assert open_images(tmp_path).names == [str(tmp_path / "0.png")]


# --- in place


def test_images_stay_on_the_disk(tmp_path):
    many = np.zeros((2000, 16, 16, 3), np.uint8)
    many[-1] = 9
    images = open_images(save(tmp_path, many))
    assert len(pickle.dumps(images.read)) < 1000
    assert (pickle.loads(pickle.dumps(images.read))(1999) == 9).all()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_workers_read_them(tmp_path, write):
    write(tmp_path / "x.npz", PIXELS, LABELS)
    images = open_images(tmp_path / "x.npz")
    assert np.array_equal(pickle.loads(pickle.dumps(images.read))(5), PIXELS[5])
    config = DataConfig(source="", workers=1)
    (batch,) = loader(Views(images, config, (6, 5)), [range(7)], config)
    assert np.array_equal(batch["image"].numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert batch["label"].tolist() == LABELS.tolist()


def test_a_file_that_changes_is_noticed(file):
    images = open_images(file)
    os.truncate(file, 300)
    with pytest.raises(ImageError, match=r"x\.npz image 6: the file is shorter than when it was opened"):
        images[6]
    file.unlink()
    with pytest.raises(ImageError, match=r"x\.npz image 0: cannot be read"):
        images[0]


def test_paths_are_printed_as_they_are(tmp_path, capsys):
    for name in ("j [v2]", "[/]"):
        (tmp_path / name).mkdir(parents=True)
        np.savez_compressed(tmp_path / name / "x.npz", PIXELS)
        assert same(open_images(tmp_path / name / "x.npz"))
        assert f"{tmp_path / name / 'x.npz'}: compressed, so its images take" in capsys.readouterr().err


def test_compressed_images_that_memory_does_not_hold(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", PIXELS)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": PIXELS.nbytes, "SC_PHYS_PAGES": 2}[name])
    assert same(open_images(tmp_path / "x.npz"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ImageError, match=r"compressed and must .* in each of 2 processes; .* np\.savez\("):
        open_images(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", PIXELS)
    assert same(open_images(tmp_path / "x.npz"))


# --- identity


def test_an_identity_covers_content_order_and_labels_but_no_name(tmp_path):
    def identity(*arrays, write=np.savez, **options) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write(folder / "x.npz", *arrays)
        return open_images(folder / "x.npz", **options).identity

    own, darker = identity(PIXELS, LABELS), PIXELS.copy()
    darker[3, 2, 2, 1] ^= 1
    assert own == identity(PIXELS, LABELS) == identity(PIXELS, LABELS, write=np.savez_compressed)
    different = {
        own,
        identity(PIXELS),
        identity(darker, LABELS),
        identity(PIXELS[::-1], LABELS),
        identity(PIXELS, LABELS[::-1]),
        identity(PIXELS[:6], LABELS[:6]),
        identity(PIXELS.reshape(7, 5, 6, 3), LABELS),
        identity(PIXELS, np.eye(4)[LABELS]),
    }
    assert len(different) == 8
    assert identity(PIXELS, LABELS, label="") == identity(PIXELS)


def test_identity_is_what_it_has_always_been(file):
    """Resumed runs compare it."""
    with zipfile.ZipFile(file) as archive:
        content = f"{archive.getinfo('arr_0.npy').CRC:08x}"
    for label, numbers, names in ((None, LABELS.tolist(), ["0", "1", "2"]), ("", [0] * 7, [])):
        lines = [content, *map(str, numbers), *names]
        assert open_images(file, label=label).identity == hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- what cannot be read


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damage_is_never_taken_for_images(tmp_path, write):
    path = tmp_path / "x.npz"
    write(path, PIXELS, LABELS)
    whole = path.read_bytes()
    for cut in (0, 1, 40, 300, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ImageError, match=r"x\.npz is damaged, cut short or no \.npz file"):
            open_images(path)
    for at in (60, 90, 200, 400, 700):  # headers, sizes and pixels
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        with pytest.raises(ImageError, match=r"x\.npz is damaged, cut short or no \.npz file"):
            open_images(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_no_flipped_bit_changes_anything_in_silence(tmp_path, write):
    """Bits of the table of contents, which no checksum covers, and some of those before it."""
    path = tmp_path / "x.npz"
    write(path, PIXELS, LABELS)
    whole, refused = path.read_bytes(), []
    contents = whole.index(b"PK\x01\x02")
    for bit in [*range(8 * contents, 8 * len(whole), 7), *range(0, 8 * contents, 101)]:
        at = bit // 8
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit % 8]) + whole[at + 1 :])
        try:
            images = open_images(path)
        except ImageError as error:
            refused.append("x.npz" in str(error))
        else:
            assert same(images), bit
            assert (list(images.labels), images.class_names) == (LABELS.tolist(), ["0", "1", "2"]), bit
    assert len(refused) > 100
    assert all(refused)


def test_large_files_have_another_table_of_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # in place of 2 GiB
    path = Path(save(tmp_path, PIXELS, LABELS))
    assert b"PK\x06\x06" in path.read_bytes()
    assert same(open_images(path))


def test_damage_far_behind_the_header_is_found(tmp_path):
    many = np.zeros((40, 16, 16, 3), np.uint8)
    for arrays in ((many, np.arange(40)), (PIXELS, np.eye(3000)[LABELS])):
        path = Path(save(tmp_path, *arrays))
        data = bytearray(path.read_bytes())
        data[-2000] ^= 8
        path.write_bytes(data)
        with pytest.raises(ImageError, match=r"x\.npz is damaged, .*Bad CRC-32"):
            open_images(path)


def test_files_that_are_something_else(tmp_path, file):
    for content in (b"", b"not a zip file", png(0)):
        file.write_bytes(content)
        with pytest.raises(ImageError, match=r"x\.npz is damaged, cut short or no \.npz file"):
            open_images(file)
    with pytest.raises(ImageError, match=r"holds statistics of images .* and no images: it can be a reference"):
        open_images(save(tmp_path, mu=np.zeros(3), sigma=np.eye(3)))
    with pytest.raises(ImageError, match="holds no arr_0, only nothing"):
        open_images(save(tmp_path))
    with pytest.raises(ImageError, match="no such file"):
        open_images(tmp_path / "y.npz")


def test_pickles_are_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    for arrays in ((np.array([Trap()]),), (PIXELS, np.array([Trap()] * 7))):
        with pytest.raises(ImageError, match=r"arr_.\.npy holds Python objects, pickled, which are not loaded"):
            open_images(save(tmp_path, *arrays))
    assert not (tmp_path / "touched").exists()


def test_sizes_that_do_not_fit_each_other(tmp_path):
    head, path = io.BytesIO(), tmp_path / "x.npz"
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (9, 6, 5, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", head.getvalue() + PIXELS.tobytes())
    with pytest.raises(ImageError, match=r"damaged, .*\(arr_0\.npy has 758 bytes, uint8 \[9, 6, 5, 3\] 938\)"):
        open_images(path)


unit = PIXELS / np.float32(255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (unit, r"float32 .* has values in \[0, 0\.97\d+\]: np\.rint\(x \* 255\)\.astype\(np\.uint8\), if all are in"),
        (unit * 2 - 1, r"float32 .* has values in \[-1, 0\.9\d+\]: np\.rint\(\(x \+ 1\) / 2 \* 255\)\.astype"),
        (PIXELS.astype(np.float64), r"float64 .*: np\.rint\(x\)\.astype\(np\.uint8\), if all are in \[0, 255\]"),
        (PIXELS.astype(np.int64), r"int64 .*: np\.rint\(x\)\.astype\(np\.uint8\), if all are in \[0, 255\]"),
        (PIXELS.astype(np.int16) - 99, r"int16 .* bring them to whole numbers from 0 to 255"),
        (np.full((2, 2, 2, 3), np.nan), r"float64 .* values in \[nan, nan\]: bring them to whole numbers"),
        (PIXELS > 99, r"bool .*: np\.rint\(x\)\.astype\(np\.uint8\)"),
        (np.full((2, 2, 2, 3), "red"), r"<U3 .*; those are no numbers"),
        (PIXELS.transpose(0, 3, 1, 2), r"uint8 \[7, 3, 6, 5\], .*; channels come last: x\.transpose\(0, 2, 3, 1\)"),
        (PIXELS[..., 0], r"uint8 \[7, 6, 5\], .*; grey images have three equal channels: x\[\.\.\., None\]\.repeat\(3"),
        (PIXELS[..., :1], r"uint8 \[7, 6, 5, 1\], .*; grey .*: x\.repeat\(3, axis=-1\)"),
        (
            PIXELS.transpose(0, 3, 1, 2)[:, :1],
            r"uint8 \[7, 1, 6, 5\], .*; grey .*: x\.transpose\(0, 2, 3, 1\)\.repeat\(3",
        ),
        (PIXELS[0], r"uint8 \[6, 5, 3\], .*; one image is a set of one: x\[None\]"),
        (
            np.zeros((2, 6, 5, 4), np.uint8),
            r"uint8 \[2, 6, 5, 4\], .*; there is no place for transparency: x\[\.\.\., :3\]",
        ),
        (PIXELS[:0], r"uint8 \[0, 6, 5, 3\], .*; one image at least"),
        (PIXELS[:, :0], r"uint8 \[7, 0, 5, 3\], .*; one image at least"),
        (np.zeros((7, 2048), np.float32), r"float32 \[7, 2048\], .*; another array may hold the images"),
        (np.uint8(3), r"uint8 \[\], .*; another array may hold the images"),
    ],
)
def test_arrays_laid_out_otherwise_have_their_remedy(tmp_path, array, message):
    with pytest.raises(ImageError, match=rf"x\.npz, arr_0 is {message}"):
        open_images(save(tmp_path, array))


def test_remedies_help(tmp_path):
    grey = PIXELS[..., :1].repeat(3, axis=-1)
    for array, pixels in [
        (np.rint(unit * 255).astype(np.uint8), PIXELS),
        (np.rint((unit * 2 - 1 + 1) / 2 * 255).astype(np.uint8), PIXELS),
        (PIXELS.transpose(0, 3, 1, 2).transpose(0, 2, 3, 1), PIXELS),
        (PIXELS[..., 0][..., None].repeat(3, axis=-1), grey),
        (PIXELS.transpose(0, 3, 1, 2)[:, :1].transpose(0, 2, 3, 1).repeat(3, axis=-1), grey),
        (PIXELS[0][None], PIXELS[:1]),
    ]:
        assert same(open_images(save(tmp_path, array)), pixels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:6], r"int64 \[6\]: there are 7 images"),
        (np.int64(3), r"int64 \[\]: there are 7 images"),
        (LABELS - 1, r"the label of image 1 is -1, of classes from 0"),
        (LABELS.astype(float), r"float64 \[7\]: labels are whole numbers \[N\], or one-hot \[N, C\]"),
        (LABELS.astype(str), r"<U21 \[7\]: labels are whole numbers"),
        (np.eye(3)[LABELS][:, None], r"\[7, 1, 3\]: labels are whole numbers"),
        (np.eye(3)[LABELS] * 0.5, r"the row of image 0 is not one-hot"),
        (np.maximum(np.eye(3)[LABELS], np.eye(7, 3)), r"the row of image 0 is not one-hot"),
        (np.eye(2, 3).repeat(4, axis=0)[:7] * (np.arange(7) != 5)[:, None], r"the row of image 5 is not one-hot"),
        (LABELS[:, None], r"the row of image 0 is not one-hot"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, message):
    path = save(tmp_path, PIXELS, labels)
    with pytest.raises(ImageError, match=message) as error:
        open_images(path)
    assert "x.npz, arr_1, is" in str(error.value)
    assert "--label '', in a recipe data.label= and nothing behind it" in str(error.value)
    assert same(open_images(path, label=""))


def test_a_password_and_an_unknown_compression(tmp_path, file):
    whole = file.read_bytes()
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # flag bit 0: encrypted, in both headers
        place = whole.index(mark) + at
        whole = whole[:place] + bytes([whole[place] | 1]) + whole[place + 1 :]
    file.write_bytes(whole)
    with pytest.raises(ImageError, match=r"x\.npz is damaged, .*encrypted"):
        open_images(file)


def test_class_names_and_held_out_parts_are_as_of_any_source(file, tmp_path):
    from rae.data.images import open_split

    (tmp_path / "names.txt").write_text("zero\none\ntwo\n")
    config = DataConfig(source=str(file), class_names=str(tmp_path / "names.txt"), held_out=0.3)
    images, held_out = open_split(config)
    assert (len(images), len(held_out), images.class_names) == (5, 2, ["zero", "one", "two"])
    read = functools.reduce(lambda found, i: found | {images[i][0].tobytes()}, range(5), set())
    assert not read & {held_out[i][0].tobytes() for i in range(2)}
