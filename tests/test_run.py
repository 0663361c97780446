"""A run at work, whatever it trains: what it reads, says and keeps around the loop."""

import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from conftest import invoke
from PIL import Image
from tiny import decoder_recipe, log

from rae import processes
from rae.commands.doctor import machine
from rae.data.images import DataConfig, ImageError, open_images, subset
from rae.processes import ProcessError, accelerator
from rae.training import run as run_module
from rae.training import run_folder
from rae.training.checkpoint import save_training_state
from rae.training.display import progress, time_left
from rae.training.held_out import spread
from rae.training.run import Run
from rae.training.run_folder import TrainingError


@pytest.fixture
def busy(monkeypatch):
    """A machine of two cores at load 7, on which torch uses two threads."""
    monkeypatch.setattr(os, "getloadavg", lambda: (7.2, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    processes._load_before.cache_clear()
    yield
    processes._load_before.cache_clear()


def images(folder: Path, count: int, unreadable: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    for i in range(count):
        path = folder / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        if i in unreadable:
            path.write_bytes(path.read_bytes()[:45])
    return folder


def save(run: Run) -> None:
    run.save(lambda folder: save_training_state(folder / "train", {}, {}, run.state({})))


def test_an_unreadable_image_is_logged_although_the_run_was_killed_before_the_line(tmp_path):
    recipe = decoder_recipe(tmp_path)  # a line of the log after three steps
    stream = SimpleNamespace(images=open_images("digits"), seed=0)
    batch = {"position": torch.tensor([0]), "index": torch.tensor([-1])}
    with Run(tmp_path / "run", recipe, epoch=10) as run:
        run.begin()
        list(run.watch_broken(stream, [batch]))
        run.finish_step(loss=1.0)
        save(run)
    with Run(tmp_path / "run", recipe, epoch=10) as run:
        run.resume({})
        run.begin()
        run.finish_step(loss=1.0)
        run.log()
    assert len(log(tmp_path / "run", "broken")) == 1


# --- a new folder


def test_a_run_that_is_refused_leaves_nothing(runs, refused, tmp_path):
    command = ["train-dit", runs / "dit.yaml", f"rae={tmp_path / 'nothere'}", "--out"]
    told = (
        f"{tmp_path / 'nothere'}: no such folder; give one that exists. A run of `rae train-decoder` makes an autoenc"
    )
    assert told in refused(*command, tmp_path / "new/runs/x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/.hidden").touch()
    for out in ("x", "y"):
        assert told in refused(*command, tmp_path / "runs" / out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".hidden", "runs", "x"]
    shutil.copy(runs / "dit.yaml", tmp_path / "runs/x/recipe.yaml")  # as of a run that was killed before its first step
    assert told in refused(*command, tmp_path / "runs/x")
    assert sorted(path.name for path in (tmp_path / "runs/x").iterdir()) == [".hidden", ".lock", "recipe.yaml"]


def test_a_run_does_not_begin_among_its_images(tmp_path):
    """Its sheets of pictures would be images, or a class, of the set."""
    images(tmp_path / "images", 2)
    for key in ("source", "held_out"):
        recipe = decoder_recipe(tmp_path, **{f"data__{key}": str(tmp_path / "images")})
        told = "is inside .*images, where what is written would be taken for its images; give an --out beside it"
        with pytest.raises(ValueError, match=told), Run(tmp_path / "images/run", recipe, epoch=10):
            pytest.fail("begun")
        assert {path.name for path in (tmp_path / "images").iterdir()} == {"0.png", "1.png"}


def test_a_folder_that_the_first_process_has_begun_is_no_folder_of_images(tmp_path, monkeypatch):
    """Others come late: `digits` means images inside a package, and is the run's own folder by now."""
    monkeypatch.chdir(tmp_path)
    run = Run("digits", decoder_recipe(tmp_path), epoch=10)
    Path("digits").mkdir()
    run.main = False
    with run:
        assert run.checkpoint is None


@pytest.mark.parametrize("computed", ["log.jsonl", "held-out-of-the-judge.safetensors", None])
def test_what_was_computed_or_is_anothers_stays(tmp_path, computed):
    folder, other = tmp_path / "runs/x", tmp_path / "runs/other"

    def refuse() -> None:
        other.mkdir()
        if computed:
            (folder / computed).touch()
        raise TrainingError("refused")

    with pytest.raises(TrainingError, match="refused"), Run(folder, decoder_recipe(tmp_path), epoch=10):
        refuse()
    left = {".lock", "recipe.yaml", computed, "other", "runs", "x"} if computed else {"runs", "other"}
    assert {path.name for path in tmp_path.rglob("*")} == left


def test_what_is_in_a_folder_is_asked_once_nobody_else_changes_it(tmp_path, monkeypatch):
    """Another start made a run of it between our first look and our lock."""
    folder, locked = tmp_path / "run", run_folder.locked

    def late(place: Path, taken: Exception):
        place.mkdir(exist_ok=True)
        (place / "recipe.yaml").write_text("of the other start")
        return locked(place, taken)

    monkeypatch.setattr(run_folder, "locked", late)
    with pytest.raises(TrainingError, match="refused"), run_folder.claim(folder):
        raise TrainingError("refused")
    assert (folder / "recipe.yaml").read_text() == "of the other start"
    (folder / "recipe.yaml").unlink()
    (folder / "log.jsonl").touch()
    with run_folder.claim(folder):
        pass


@pytest.mark.parametrize("there", [["thesis.tex"], ["thesis.tex", ".lock"]])
def test_a_folder_of_something_else_stays_as_it_is(tmp_path, there):
    for name in there:
        (tmp_path / name).write_text(name)
    with pytest.raises(TrainingError, match="holds files but no run"), run_folder.claim(tmp_path):
        pytest.fail("claimed")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in there}
    with pytest.raises(TrainingError, match="is a file; give a folder"), run_folder.claim(tmp_path / "thesis.tex"):
        pytest.fail("claimed")


def test_a_run_that_is_ended_before_its_first_step_stays(tmp_path):
    with pytest.raises(SystemExit), Run(tmp_path / "run", decoder_recipe(tmp_path), epoch=10):
        signal.raise_signal(signal.SIGTERM)
    assert (tmp_path / "run/recipe.yaml").exists()


# --- a busy machine


@pytest.mark.parametrize(
    ("load", "cores", "threads", "said"),
    [
        (7.2, 2, 2, r"load 7 on 2 cores\), and torch uses 2 threads, .* OMP_NUM_THREADS=1 before the command"),
        (65, 64, 32, "load 65 on 64 cores"),
        (7.2, 2, 1, None),
        (7.2, 8, 8, None),
        (2.9, 2, 2, None),  # the command before was this one's other half
    ],
)
def test_a_busy_machine_is_told_by_load_cores_and_threads(load, cores, threads, said):
    told = processes.busy_machine(load, cores, threads)
    assert re.search(said, told) if said else told is None


def test_a_busy_machine_is_told_once_when_work_begins(busy, monkeypatch):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        with progress("nothing to do", 8, start=8):
            assert not told
        for title in ("statistics", "training"):
            with progress(title, 8):
                pass
            monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))  # by its own work
    assert [str(each.message)[:45] for each in told] == ["the machine is busy with other work (load 7 o"]
    assert machine()["cores"].endswith("OMP_NUM_THREADS=1 before the command helps.")
    monkeypatch.setattr(processes, "process_state", lambda: SimpleNamespace(device=torch.device("cuda")))
    assert processes.busy_here() is None
    assert machine()["cores"].endswith("(torch uses 2)")


@pytest.mark.filterwarnings("default::rae.processes.BusyMachine")
def test_training_on_a_busy_machine_is_told_at_the_command(busy, runs, tmp_path):
    result = invoke("train-dit", runs / "dit.yaml", "run.duration=1st", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert result.output.count("the machine is busy with other work (load 7 on 2 cores)") == 1


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "0 s left"), (119, "119 s left"), (120, "2 min left")])
def test_little_time_left_is_told_in_seconds(seconds, said):
    assert time_left(seconds) == said


# ---


def test_held_out_images_of_which_none_can_be_read(tmp_path):
    data = DataConfig(source="digits", on_broken="skip")
    held_out = open_images(images(tmp_path / "images", 3, unreadable=(0, 1)))
    with Run(tmp_path / "run", decoder_recipe(tmp_path), epoch=10) as run:
        with pytest.raises(ImageError, match=r"none of the 2 images can be read; the first is .*0\.png"):
            run.check_held_out(subset(held_out, [0, 1]), data, (16, 16))
        run.check_held_out(None, data, (16, 16))
        run.check_held_out(held_out, data, (16, 16))


@pytest.mark.parametrize(("folder", "count", "best"), [("a", 2, 8), ("b", 2, 16), ("a", 3, 16), (None, 2, 8)])
def test_best_is_found_anew_where_other_images_decide(tmp_path, capsys, folder, count, best):
    sets = {name: open_images(images(tmp_path / name, size)) for name, size in (("a", 3), ("b", 4))}
    settings = {"run__evaluate_every": "1st", "run__save_every": "1st", "data__source": "digits"}
    for name, of_them, figure in (("a", 2, 1.0), (folder, count, 2.0)):
        recipe = decoder_recipe(tmp_path, **settings)
        with Run(tmp_path / "run", recipe, epoch=10) as run:
            if run.checkpoint:
                run.resume({})
            run.check_held_out(name and spread(sets[name], of_them), recipe.data, (16, 16))
            run.begin()
            run.finish_step(loss=1.0)
            if name:
                run.judge(best_by="figure", figure=figure)
            save(run)
    assert int((tmp_path / "run/best").read_text()) == best
    said = "held-out images, or what judges them, are not those of before: `best` is found anew"
    assert (said in capsys.readouterr().err) == (best == 16)


@pytest.mark.parametrize(
    ("duration", "evaluate", "save_every", "said", "logged"),
    [
        ("20st", "5st", "7st", "among 1 of the 4 steps that are judged, the last one.", 1),
        ("20st", "4st", "10st", "among 1 of the 5 steps", 1),
        ("40st", "4st", "10st", "among 2 of the 10 steps that are judged, the last one among them.", 0),
        ("20st", "5st", "5st", None, 0),
        ("20st", "10st", "5st", None, 0),
        ("20st", "20st", "7st", None, 0),  # judged at the end, which is always saved
        ("20st", "10%", "10%", None, 0),
    ],
)
def test_steps_that_cannot_become_the_best_are_told(tmp_path, capsys, duration, evaluate, save_every, said, logged):
    settings = {"run__duration": duration, "run__evaluate_every": evaluate, "run__save_every": save_every}
    recipe = decoder_recipe(tmp_path, **settings, data__source="digits")
    for held_out in (None, open_images(images(tmp_path / "images", 2))):
        folder = tmp_path / f"run-{held_out is None}"
        with Run(folder, recipe, epoch=10) as run:
            run.check_held_out(held_out, recipe.data, (16, 16))
            run.begin()
        told = capsys.readouterr().err
        assert ("`best` is chosen" in told) == (said is not None and held_out is not None)
        assert held_out is None or (said or "") in told
    assert len(log(folder, "warning")) == logged


def test_a_run_that_moves_to_another_kind_of_device_says_so(tmp_path, capsys):
    recipe = decoder_recipe(tmp_path)
    for device in ("cpu", "cpu", "cuda"):
        with Run(tmp_path / "run", recipe, epoch=10) as run:
            run.accelerator.state.device = torch.device(device)
            if run.checkpoint:
                run.resume({})
            run.begin()
            run.finish_step(loss=1.0)
            save(run)
            run.accelerator.state.device = torch.device("cpu")
        assert ("the run was on cpu and goes on on cuda" in capsys.readouterr().err) == (device == "cuda")


def test_trackers_end_and_processes_stay_together(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(run_module, "_check_trackers", lambda names: None)
    monkeypatch.setattr(run_module, "accelerator", lambda **_: accelerator())  # no tracker is installed here
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *_: ended.append("processes"))
    with Run(tmp_path / "run", decoder_recipe(tmp_path, run__trackers=["tensorboard"]), epoch=10) as run:
        run.accelerator.trackers = [SimpleNamespace(finish=lambda: ended.append("tracker"))]
        monkeypatch.setattr(run.accelerator, "init_trackers", lambda name: None)
        run.begin()
    assert ended == ["tracker"]


def test_accelerate_s_own_configuration_neither_compiles_nor_wraps(monkeypatch):
    accelerator()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state()
    assert accelerator().state.dynamo_plugin.backend == DynamoBackend.NO
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ProcessError, match=r"ACCELERATE_USE_FSDP is set.*Unset it, or start with torchrun"):
        accelerator()
