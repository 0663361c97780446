"""The demo from images to page, with an encoder of random weights and a few steps; what the page says is checked."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import Reader, decode
from tiny import save_encoder

from rae import RAE, demo
from rae.config import ConfigError
from rae.data.images import ImageError, Images, Views, center_crop, open_images, open_split, to_bytes, to_unit
from rae.evaluation.reconstruction import psnr


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny one with patches of 14 px, in place of the real one."""
    folder = save_encoder(tmp_path_factory.mktemp("encoder"), image_size=28, patch_size=14)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.studies, "ENCODER", str(folder))
        yield


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory) -> Path:
    """A demo that was stopped before stage 2, and went on."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "train_dit", _stop)
        with pytest.raises(SystemExit):
            demo.run_demo(out, quick=True)
    decoder = (out / "digits/decoder/checkpoints").stat().st_mtime_ns
    assert demo.run_demo(out, quick=True) == out / "report.html"
    assert (out / "digits/decoder/checkpoints").stat().st_mtime_ns == decoder
    return out


def _stop(recipe, folder):
    raise SystemExit(130)


def cells(page: Reader, name: str) -> list[str]:
    """The cells that follow the first cell of that content."""
    return page.cells[page.cells.index(name) + 1 :]


@pytest.fixture(scope="module")
def page(finished) -> Reader:
    return Reader((finished / "report.html").read_text())


def test_page_shows_real_images_and_what_was_made_of_them(page, finished):
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    images = {}
    for image in page.images:
        images.setdefault(image["alt"], []).append(decode(image["src"]))
    assert len(images["original"]) == len(images["decoded"]) == 2 * 10 + 2 * 6  # digits, photographs; held out, seen
    train, held_out = open_split(demo.studies.digits(finished, True).decoder.data)
    for part, shown in ((held_out, images["original"][:10]), (train, images["original"][10:20])):
        real = {center_crop(part[i][0], (28, 28)).tobytes() for i in range(len(part))}
        assert {picture.tobytes() for picture in shown} <= real
    assert {picture.shape for pictures in images.values() for picture in pictures} == {
        (28, 28, 3),  # digits
        (96, 96, 3),  # photographs
        (112, 112, 3),  # whole ones
        (7, 7, 3),  # colours of their tokens
    }
    assert {"state, t = 1", "expected, t = 0", "sample", "nearest"} <= images.keys()


def test_figures_are_those_of_the_models_and_come_with_their_protocol(page, finished):
    rae = RAE.from_pretrained(finished / "digits/decoder")
    data = demo.studies.digits(finished, True).decoder.data
    views = Views(open_split(data)[1], data, (28, 28))
    real = to_unit(torch.stack([views[i]["image"] for i in range(len(views))]))
    made = to_unit(to_bytes(rae.reconstruct(real)))
    value, protocol = cells(page, "PSNR of held-out images")[:2]
    assert value == f"{psnr(made, real).mean():.1f} dB"
    assert protocol == "180 of 180, 28 x 28 px, 8-bit, fp32"
    for kind, guidance in {"unguided": "no guidance", "CFG": "CFG 2", "AutoGuidance": "checkpoint at 25%"}.items():
        value, protocol = cells(page, f"samples read as the asked class, {kind}")[:2]
        assert 0 <= float(value.removesuffix("%")) <= 100
        for part in ("20 images, 10 of 10 classes in turn, seeds 0 to 19", "Euler, 4 calls", "fp32", guidance):
            assert part in protocol
        assert float(re.search(r"reads ([\d.]+)% of \d+ real ones", protocol)[1]) > 95


def test_page_says_what_it_took_and_how_to_do_it_again(page, finished):
    text = (finished / "report.html").read_text()
    assert re.fullmatch(r"\d+ min \d+ s", cells(page, "digits: stage 2, the DiT-DH")[0])
    assert re.fullmatch(r"[\d,]+ MiB", cells(page, "all parts")[1])
    assert f"rae demo --out {finished} --quick" in text
    assert f"rae train-dit {finished}/digits/dit/recipe.yaml" in text
    assert (
        cells(page, "SHA-256 of its weights")[0] == RAE.from_pretrained(finished / "digits/decoder").encoder.checksum()
    )
    assert "currentColor" in text


def test_finished_demo_computes_nothing_again(finished, capsys):
    before = (finished / "report.html").read_bytes()
    demo.run_demo(finished, quick=True)
    assert (finished / "report.html").read_bytes() == before
    console = capsys.readouterr().err
    assert console.count("done before") == len(list((finished / "parts").glob("*.json"))) == 9
    assert str(finished / "report.html") in console.replace("\n", "")


def test_other_settings_need_another_folder(finished, tmp_path):
    with pytest.raises(ConfigError, match="quick True -> False"):
        demo.run_demo(finished)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"not a demo's folder; give another --out"):
        demo.run_demo(tmp_path)


def test_a_demo_that_was_killed_while_it_noted_its_settings_begins_anew(tmp_path):
    asked = demo.Asked(version="1", quick=True, photos=None, images=None)
    (tmp_path / ".demo.json.1").write_text('{"version":')
    demo._claim(tmp_path, asked)
    assert (tmp_path / "demo.json").read_text() == asked.model_dump_json(indent=1)
    demo._claim(tmp_path, asked)


def save_photos(folder: Path, count: int) -> Path:
    """Noise in two folders of classes."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 60, 80, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        path = folder / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def test_own_photos_by_class(encoder, tmp_path, capsys):
    photos = save_photos(tmp_path / "photos", 24)
    (photos / "cats/0.png").write_bytes(b"cut short")
    page = Reader(demo.run_demo(tmp_path / "out", photos, quick=True).read_text())
    text = (tmp_path / "out/report.html").read_text()
    assert "24 of 24 images, the middle of each at 96 x 96 pixels; smaller ones are enlarged" in text
    assert len(list((tmp_path / "out/photos/images").rglob("*.png"))) == 23
    assert "left out" in capsys.readouterr().err
    alts = [image["alt"] for image in page.images]
    assert sum(alt.startswith("cats") for alt in alts) == sum(alt.startswith("dogs") for alt in alts) > 0
    assert "23 images are too few to learn to generate" in text
    assert not any("asked class" in cell for cell in page.cells)


NAMES = ["/m/01g317", "cat/dog", "cat/owl", "cat_dog", "Cat", "cat", " cat", "cat ", "", " ", "..", "../up", "é" * 200]
CALLED = [*NAMES[:6], "cat (6)", "cat (7)", "class 8", "class 9", "..", "../up", "é" * 200]


@pytest.mark.parametrize("missing", [set(), {0, 5, 8}])
def test_classes_have_folders_of_their_own_whatever_they_are_called(tmp_path, monkeypatch, missing):
    labels = [i % len(NAMES) for i in range(2 * len(NAMES))]

    def read(index: int) -> np.ndarray:
        if labels[index] in missing:
            raise ImageError("not here")
        return np.full((4, 4, 3), labels[index], np.uint8)

    names = [f"x.parquet row {i}" for i in labels[:-1]] + ["é" * 200 + ".png"]
    images = Images(names, labels, NAMES, "", read)
    monkeypatch.setattr(demo.studies, "FEWEST", 4)
    study = demo.studies.own_photos(tmp_path / "out", images, tmp_path / "photos", quick=True)
    study.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    folders = sorted((tmp_path / "out/photos/images").iterdir())
    assert len(folders) == len(NAMES) - len(missing)
    assert [len(list(folder.iterdir())) for folder in folders] == [2] * len(folders)
    there = [i for i in range(len(NAMES)) if i not in missing]
    for config in (study.decoder.data, study.dit.data):
        cut, _ = open_split(config.model_copy(update={"held_out": 0.0}))
        assert cut.class_names == [CALLED[i] for i in there]
        assert [cut[i][0][0, 0, 0] for i in range(len(cut))] == [there[label] for label in cut.labels]


def test_the_same_photos_by_another_path(encoder, tmp_path, monkeypatch, capsys):
    photos = save_photos(tmp_path / "photos", 24)
    monkeypatch.setattr(demo, "_carry_out", _stop)
    monkeypatch.chdir(tmp_path)
    for folder in (photos, Path("photos"), tmp_path / "out/../photos"):
        with pytest.raises(SystemExit):
            demo.run_demo(tmp_path / "out", folder, quick=True)


def test_of_many_photos_a_part_is_taken_and_the_report_says_so(tmp_path, monkeypatch):
    photos = save_photos(tmp_path / "photos", 24)
    monkeypatch.setattr(demo.studies, "MOST", 22)
    study = demo.studies.own_photos(tmp_path / "out", demo.studies.check_photos(photos), photos, quick=True)
    assert study.images.startswith("22 of 24 images")
    study.prepare()
    assert len(list((tmp_path / "out").rglob("*.png"))) == 22


@pytest.mark.parametrize("out", [".", "demo", "cats/demo", "../photos/demo"])
def test_a_demo_among_its_photos_is_refused_before_anything(tmp_path, monkeypatch, out):
    monkeypatch.chdir(save_photos(tmp_path / "photos", 24))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="give an --out beside it"):
        demo.run_demo(Path(out), Path("."), quick=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_photos_of_which_most_cannot_be_read(tmp_path, capsys):
    photos = save_photos(tmp_path / "photos", 22)
    for path in sorted((photos / "cats").iterdir()):
        path.write_bytes(b"[red]not an image")
    study = demo.studies.own_photos(tmp_path / "out", demo.studies.check_photos(photos), photos, quick=True)
    with pytest.raises(ImageError, match=f"11 of 22 images of {photos} can be read, the demo takes 20 or more"):
        study.prepare()
    assert f"left out: {photos / 'cats/0.png'}: cannot be decoded" in capsys.readouterr().err


def test_names_are_printed_as_they_are(tmp_path, capsys):
    (tmp_path / "[final]").mkdir()
    (tmp_path / "[final]/cat [1].jpg").write_bytes(b"not an image")
    demo.studies.cut_tiles(open_images(tmp_path / "[final]"), tmp_path / "out", (1,))
    assert str(tmp_path / "[final]/cat [1].jpg") in capsys.readouterr().err


@pytest.mark.parametrize(("count", "message"), [(0, "holds no images"), (3, "3 images, the demo takes 20 or more")])
def test_too_few_photos(tmp_path, count, message):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ImageError, match=message):
        demo.run_demo(tmp_path / "out", save_photos(tmp_path / "photos", count))
    assert not (tmp_path / "out").exists()


def test_photos_that_cannot_be_read(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(demo.studies.FEWEST):
        (tmp_path / f"photos/{i}.jpg").write_bytes(b"not an image")
    with pytest.raises(ImageError, match="none of the 20 images can be read"):
        demo.run_demo(tmp_path / "out", tmp_path / "photos")
