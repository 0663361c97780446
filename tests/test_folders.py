"""Files that are whole or not there, folders that one process holds, pointers of runs."""

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from tiny import png

from rae import DiffusionModel, folders
from rae.folders import aside, check_outside, find_folder, locked, run_of, saved_kind
from rae.sources import SourceError


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_the_new_one_or_the_old_one(tmp_path, before, error, durable):
    path = tmp_path / "figures.json"
    if before:
        path.write_text(before)
    with pytest.raises(error) if error else contextlib.nullcontext(), aside(path, durable=durable) as hidden:
        hidden.write_text("new")
        assert (hidden.parent, hidden.name[0]) == (tmp_path, ".")
        assert path.read_text() == before if before else not path.exists()
        if error:
            raise error
    left = before if error else "new"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"figures.json": left} if left else {})


def test_a_durable_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    path, seen = tmp_path / "figures.json", []
    monkeypatch.setattr(folders, "fsync", lambda target: seen.append((target, path.exists())))
    for durable in (False, True):
        with aside(path, durable=durable) as hidden:
            hidden.write_text("new")
        assert seen == ([(hidden, False), (tmp_path, True)] if durable else [])
        path.unlink()


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "new/folder"
    with locked(folder, ValueError("taken")):
        with pytest.raises(ValueError, match=r"^taken$"), locked(folder, ValueError("taken")):
            pytest.fail("held twice")
        with locked(tmp_path / "other", ValueError("taken")):
            pass
    with locked(folder, ValueError("taken")):
        pass
    with pytest.raises(ValueError, match=r"^taken$"), locked(folder, ValueError("other")):
        raise ValueError("taken")
    with locked(folder, ValueError("taken")):  # let go by an error as well
        assert [file.name for file in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_its_holder_has_removed_meanwhile_holds_nothing(tmp_path, monkeypatch, again):
    def flock(*_) -> None:
        (tmp_path / ".lock").rename(tmp_path / "gone")
        if again:
            (tmp_path / ".lock").touch()

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"^taken$"), locked(tmp_path, ValueError("taken")):
        pytest.fail("held by a file that nobody else finds")


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_that_another_process_takes_back_meanwhile_is_taken(tmp_path, monkeypatch, error):
    folder = tmp_path / "new"

    def fails(path, **_) -> None:
        raise error(17, "raced", str(path))

    def goes(path, **_) -> None:
        """Made, and gone before there is a lock in it."""

    for mkdir in (fails, goes):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(ValueError, match=r"^taken$"), locked(folder, ValueError("taken")):
            pytest.fail("held, and not there")


def test_a_lock_is_no_file_nor_changes_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), locked(tmp_path / "file", ValueError("taken")):
        pytest.fail("held a file")
    (tmp_path / ".lock").write_text("of another program")
    with locked(tmp_path, ValueError("taken")):
        assert (tmp_path / ".lock").read_text() == "of another program"


@pytest.mark.parametrize("content", [b"half", None])
def test_damaged_weights_are_to_be_copied_again(runs, tmp_path, content):
    for folder in (tmp_path / "copy", tmp_path / "dit/checkpoints/1/model"):
        shutil.copytree(runs / "dit/checkpoints/000000048/model", folder)
        file = folder / "model.safetensors"
        file.write_bytes(content or file.read_bytes()[:-1] + b"x")
    shutil.copy(runs / "dit/recipe.yaml", tmp_path / "dit")
    with pytest.raises(ValueError, match=r"its SHA-256 is \w+, config\.json says \w+\. Copy it again\.$"):
        DiffusionModel.from_pretrained(tmp_path / "copy")
    remedy = f"Copy it again; `rae doctor {tmp_path / 'dit'}` says what the run can go on from"
    with pytest.raises(ValueError, match=rf"{remedy}\.$"):
        DiffusionModel.from_pretrained(tmp_path / "dit/checkpoints/1/model")


def test_a_model_that_is_not_there_is_told_what_is(runs, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/nothere", "nothere"):
        with pytest.raises(SourceError, match=r"A run of `rae train-decoder` makes an autoencoder\.$"):
            find_folder(name, "an autoencoder")
    with pytest.raises(SourceError, match=r"no such folder.* A run of `rae train-dit` makes a diffusion model\.$"):
        find_folder("runs/nothere", "a diffusion model")
    shutil.copytree(runs / "dit", "runs/dit")
    Path("runs/dit/kept/000000032").mkdir(parents=True)
    has = "The run runs/dit has checkpoints/000000024, checkpoints/000000048, kept/000000032"
    with pytest.raises(SourceError, match=rf"{has}\.$"):
        find_folder("runs/dit/checkpoints/000000032/model", "a diffusion model")
    for folder in ("checkpoints", "kept"):
        shutil.rmtree(f"runs/dit/{folder}")
    with pytest.raises(SourceError, match=r"The run runs/dit has saved nothing yet\.$"):
        find_folder("runs/dit/kept/000000032", "a diffusion model")


@pytest.mark.parametrize(
    "name", [*"abc", "W", "models/000000048", "checkpoints/x", "checkpoints/000000048/train", "x/best"]
)
@pytest.mark.parametrize("relative", [False, True])
def test_a_recipe_further_up_makes_no_run_of_a_folder(tmp_path, name, relative, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("W") if relative else tmp_path / "W"
    run.mkdir()
    (run / "recipe.yaml").touch()
    assert run_of(run / name) is None
    with pytest.raises(SourceError, match=r"A run of `rae train-dit` makes a diffusion model\.$"):
        find_folder(run / name / "nix", "a diffusion model")
    for place in (
        "",
        "best",
        "latest",
        "kept/1",
        "checkpoints/48/model",
        "kept/1/model-ema0.99",
        "kept/1/model/encoder",
    ):
        assert run_of(run / place) == run


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_pointer_to_a_checkpoint_that_is_gone_is_named(tmp_path, pointer):
    run = tmp_path / "run"
    (run / "checkpoints/000000016/model").mkdir(parents=True)
    asked = run if pointer == "latest" else run / "best"
    for text in ("000000016", "000000016\n"):
        (run / pointer).write_text(text)
        assert find_folder(asked, "a model") == run / "checkpoints/000000016/model"
    for text in ("000999999", "", "../x"):
        (run / pointer).write_text(text)
        said = rf"{run / pointer} names checkpoint '{text}', which is not there; .* named by itself, as {run}/check"
        with pytest.raises(ValueError, match=rf"{said}.*/000000016\. See `rae doctor {run}`"):
            find_folder(asked, "a model")
    (run / "checkpoints/000000016").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"which is not there; it has none\. See `rae doctor"):
        find_folder(asked, "a model")


@pytest.mark.parametrize("out", ["photos", "photos/out", "photos/cat/out/x.png", "link/out", "photos/../photos/out"])
def test_nothing_is_written_into_a_folder_of_images(tmp_path, out, monkeypatch):
    (tmp_path / "photos/cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (tmp_path / "photos", tmp_path / "link", "~/photos", "."):
        with pytest.raises(ValueError, match=r"--out .* is inside .*; give an --out beside it\."):
            check_outside(tmp_path / out, source)


def test_nothing_is_written_into_classes_that_are_links(tmp_path):
    for name in ("disk/cat/deep", "disk/dog", "photos", "hidden"):
        (tmp_path / name).mkdir(parents=True)
    for name, to in (("cat", "disk/cat"), (".hidden", "hidden"), ("gone", "nowhere"), ("loop", "photos/loop")):
        (tmp_path / "photos" / name).symlink_to(tmp_path / to)
    for out in ("disk/cat", "disk/cat/deep/out"):
        with pytest.raises(ValueError, match=rf"--out {tmp_path / out} is inside {tmp_path}/photos/cat, where what is"):
            check_outside(tmp_path / out, tmp_path / "photos")
    for out in ("disk", "disk/dog/out", "disk/cats", "hidden/out", "nowhere"):
        check_outside(tmp_path / out, tmp_path / "photos")


def test_nothing_is_written_into_links_at_any_depth(tmp_path):
    for name in ("photos/cat/deep", "disk/more/.old", "far"):
        (tmp_path / name).mkdir(parents=True)
    for link, to in (("photos/cat/deep/more", "disk/more"), ("disk/more/.old/x", "far"), ("far/up", "photos")):
        (tmp_path / link).symlink_to(tmp_path / to)
    for out in ("photos/cat/deep/more/judged", "disk/more/judged", "far", "far/judged", "photos/cat/deep/judged"):
        with pytest.raises(ValueError, match=rf"--out {tmp_path / out} is inside {tmp_path}/photos"):
            check_outside(tmp_path / out, tmp_path / "photos")
    check_outside(tmp_path / "disk/judged", tmp_path / "photos")


def test_beside_a_folder_of_images_anything_may_be_written(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "digits.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for source in ("photos", "digits", "digits.npz", "photos/*.parquet", "hf:owner/name", ""):
        for out in (".", "out", "photos2", "photos/../out", "digits.npz.out"):
            check_outside(Path(out), source)


# --- a model by any of its names

NAMES = ["", "best", "latest", "checkpoints/000000048", "checkpoints/000000048/model"]


@pytest.mark.parametrize("name", NAMES)
def test_the_kind_of_a_model_is_known_by_any_of_its_names(runs, name, monkeypatch):
    assert saved_kind(runs / "dit" / name) == "diffusion model"
    monkeypatch.setenv("HOME", str(runs))
    assert saved_kind(f"~/decoder/{name}") == "autoencoder"
    assert saved_kind(runs / "encoder" / name) is None


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Thirty images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(30):
        (folder / f"class-{i % 2}").mkdir(exist_ok=True)
        (folder / f"class-{i % 2}/{i}.png").write_bytes(png(i))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_a_model_by_any_of_its_names(runs, run, refused, encoder, images, tmp_path, name):
    """... or says which name it takes."""
    dit, decoder, count = runs / "dit" / name, runs / "decoder" / name, itertools.count()

    def out(end: str = "") -> list:
        return ["--out", tmp_path / f"{next(count)}{end}"]

    look = ["--features", encoder, "--input-size", 16, "--reference", images, "--num", 20]
    for model, options, kind in ((dit, ["--steps", 2], "samples"), (decoder, [], "reconstructions")):
        run("evaluate", model, *options, *look, "--out", tmp_path / kind)
        assert json.loads((tmp_path / kind / "evaluation.json").read_text())["subject"]["kind"] == kind
        run("flops", model)
        assert "other commands take it as it is" in refused("convert", model, *out())
        if name:
            in_run = re.escape(str(model.parents[len(model.relative_to(runs).parts) - 2]))
            assert re.search(rf"It lies in one, give {in_run}\.", refused("doctor", model))
            assert re.search(rf"give .*{in_run}\.", refused("report", model, *out()))
    run("sample", dit, "--autoencoder", decoder, "--autoguidance", dit, 1.5, "--num", 1, "--steps", 2, *out())
    run("reconstruct", decoder, images, "--num", 1, *out())
    run("cache", runs / "dit.yaml", f"rae={decoder}", f"data.source={images}", *out())
    run("stats", decoder, images, *out(".safetensors"))
    run("probe", images, decoder, *out())
