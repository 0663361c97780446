"""What a person may get wrong, at the command line: one clear message, exit status 2, and nothing is lost."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from rae import RAE, DiffusionModel
from rae.cli import rae
from rae.processes import process_state

GOLDEN = Path(__file__).parent / "golden"


def make_images(folder: Path, count: int = 4, size: int = 16) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


# --- recipes


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("decoder", "run.bacth=4", "run.bacth: unknown key; did you mean 'batch'?"),
        ("decoder", "optim.lr=fast", "optim.lr: "),
        ("decoder", "optim", "is not of the form section.key=value"),
        ("decoder", "encoder.image_size=[20,20]", "not a multiple of its patch size 8"),
        ("decoder", "decoder.patch_size=5", "decoder.patch_size=8 makes them equal"),
        ("decoder", "data.enlarge=false", "digits[0] is 8 x 8 pixels (height x width), smaller than the 16 x 16"),
        ("decoder", "data.source=nowhere", "nowhere: no such folder of images"),
        ("decoder", "encoder.name=dinov2-bsae", "did you mean 'dinov2-base'?"),
        ("dit", "network.head=[8,2,1]", "Theorem 1"),
        ("dit", "network.size=XXXL", "network.size"),
        ("dit", "rae=nowhere", "'nowhere' is neither an existing folder, nor a hub id"),
    ],
)
def test_impossible_recipes(runs, refused, tmp_path, stage, change, message):
    output = refused(f"train-{stage}", runs / f"{stage}.yaml", change, "--out", tmp_path / "run")
    assert message in output
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_another_recipe_does_not_touch_the_run(runs, refused):
    before = {path: path.stat().st_mtime_ns for path in (runs / "decoder").rglob("*")}
    output = refused("train-decoder", runs / "decoder.yaml", "noise.tau=0.5", "--out", runs / "decoder")
    assert "noise.tau: 0.8 -> 0.5" in output
    after = {path: path.stat().st_mtime_ns for path in (runs / "decoder").rglob("*")}
    assert {path.name for path in before if before[path] != after[path]} <= {".lock"}


def test_no_recipe(refused, tmp_path):
    assert "no.yaml: no such recipe" in refused("train-dit", "no.yaml", "--out", tmp_path / "run")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "this file holds list" in refused("train-dit", tmp_path / "list.yaml", "--out", tmp_path / "run")


# --- images


def test_empty_folder(runs, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("reconstruct", runs / "decoder", tmp_path / "empty", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_jpeg_is_fatal_or_left_out_by_name(runs, run, refused, tmp_path):
    images = make_images(tmp_path / "images")
    (images / "1.jpg").write_bytes((images / "1.jpg").read_bytes()[:-100])
    command = ["reconstruct", runs / "decoder", images, "--out"]
    assert f"{images / '1.jpg'}: cannot be decoded" in refused(*command, tmp_path / "fatal")
    assert f"left out: {images / '1.jpg'} cannot be read" in run(*command, tmp_path / "out", "--skip-broken")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["000000.png", "000002.png", "000003.png"]


@pytest.mark.parametrize("out", ["out", "cat/out", "."])
def test_nothing_is_written_among_the_images_that_are_read(runs, refused, tmp_path, out):
    """What is written would be a class of them from then on."""
    images, held_out = tmp_path / "images", tmp_path / "held_out"
    for folder in (images, held_out):
        folder.mkdir()
        make_images(folder / "cat")
    for stage in ("decoder", "dit"):
        shutil.copytree(runs / stage, tmp_path / stage)
    recipe = yaml.safe_load((runs / "dit/recipe.yaml").read_text())
    recipe["data"] |= {"source": str(images), "held_out": str(held_out)}
    (tmp_path / "dit/recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = sorted(tmp_path.rglob("*"))
    sources = [f"data.source={images}", f"data.held_out={held_out}"]
    for folder, command in (
        (images, ["reconstruct", tmp_path / "decoder", images]),
        (images, ["sample", tmp_path / "dit", "--num", 1]),
        (held_out, ["sample", tmp_path / "dit/latest", "--num", 1]),
        (images, ["cache", runs / "dit.yaml", *sources]),
        (held_out, ["cache", runs / "dit.yaml", *sources]),
    ):
        told = refused(*command, "--out", folder / out)
        assert f"--out {folder / out} is inside {folder}" in told
        assert "give an --out beside it" in told
    assert sorted(tmp_path.rglob("*")) == before


def test_images_of_another_size(runs, refused, tmp_path):
    images = make_images(tmp_path / "images", size=12)
    message = refused("reconstruct", runs / "decoder", images, "--out", tmp_path / "out")
    assert "is 12 x 12 pixels (height x width), smaller than the 16 x 16 asked for" in message


# --- models


def test_damaged_weights(runs, refused, tmp_path):
    shutil.copytree(runs / "decoder", tmp_path / "decoder")
    (newest,) = (tmp_path / "decoder").glob("checkpoints/000000048/model/decoder.safetensors")
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    message = f"{newest} is damaged"
    assert message in refused("reconstruct", tmp_path / "decoder", "digits", "--enlarge", "--out", tmp_path / "out")
    output = refused("train-decoder", runs / "decoder.yaml", "run.duration=9st", "--out", tmp_path / "decoder")
    assert f"{newest} is damaged" in output
    assert "go on from 000000024, which is intact" in output
    RAE.from_pretrained(tmp_path / "decoder/checkpoints/000000024/model")


def test_weights_of_other_shapes(runs, refused, tmp_path):
    shutil.copytree(runs / "dit/checkpoints/000000048/model", tmp_path / "dit")
    tensors = load_file(tmp_path / "dit/model.safetensors")
    name = next(name for name in tensors if name.endswith("final.linear.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "dit/model.safetensors")
    set_checksum(tmp_path / "dit/model.safetensors")
    command = ["sample", tmp_path / "dit", "--autoencoder", runs / "decoder", "--out", tmp_path / "out"]
    output = refused(*command)
    assert "model.safetensors does not fit its config.json" in output
    assert f"size mismatch for {name}" in output
    (tmp_path / "dit/model.safetensors").write_bytes(b"half")
    assert "model.safetensors is damaged or was changed" in refused(*command)
    set_checksum(tmp_path / "dit/model.safetensors")
    assert "model.safetensors is not a readable safetensors file" in refused(*command)


def set_checksum(file: Path) -> None:
    """Let config.json say that the file is as it was saved."""
    config = json.loads((file.parent / "config.json").read_text())
    config["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / "config.json").write_text(json.dumps(config))


def test_foreign_folders(runs, refused, tmp_path):
    for command in (["reconstruct", runs / "encoder", "digits"], ["sample", runs / "encoder"]):
        assert f"{runs / 'encoder/config.json'} does not fit" in refused(*command, "--out", tmp_path / "out")
    for command in (["reconstruct", runs / "dit", "digits"], ["sample", runs / "decoder"]):
        assert "what is needed here is the" in refused(*command, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("/tmp/opened-a-pickle",)


def test_pickles_are_not_opened(runs, refused, tmp_path):
    torch.save({"model": Harmful()}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful()))
    out = ["--out", tmp_path / "out"]
    assert "Pickles (.pt, .pth, .bin) are not loaded" in refused("reconstruct", tmp_path / "model.pt", "digits", *out)
    assert "is a file; a diffusion model is a folder" in refused("sample", tmp_path / "model.pt", *out)
    assert "calls posix.mkdir when it is opened" in refused("convert", tmp_path / "model.pt", *out)
    refused("convert", tmp_path / "plain.pt", *out)
    assert not Path("/tmp/opened-a-pickle").exists()


def test_a_model_refuses_another_latent_space(runs, run, refused, tmp_path):
    run("train-decoder", runs / "decoder.yaml", "statistics=false", "run.duration=1st", "--out", tmp_path / "other")
    output = refused("sample", runs / "dit", "--autoencoder", tmp_path / "other", "--out", tmp_path / "out")
    assert "another encoder, image size or other latent statistics" in output


def test_encoder_that_cannot_be_reached(tmp_path):
    command = [sys.executable, "-m", "rae.cli", "stats", "dinov2-base", "digits", "--image-size", "16"]
    command += ["--out", str(tmp_path / "stats.safetensors")]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    result = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "facebook/dinov2-base could not be had from the hub" in result.stderr
    assert "give a local folder in the transformers layout" in result.stderr


# --- sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "seven"], "class 'seven' is not among the 10 of this model; it knows '0', '1', '2'"),
        (["--labels", ""], "class '' is not among the 10 of this model"),
        (["--labels", "10"], "class '10' is not among the 10 of this model; did you mean '1'?"),
        (["--cfg", 2, "--interval", 0.9, 0.1], "it must satisfy 0 <= t_min < t_max <= 1"),
        (["--interval", 0.1, 0.9], "without them it has no effect"),
        (["--num", 3, "--per-class", 2], "exclude each other"),
        (["--steps", 1], "1 steps are too few for the grid 'points'"),
        (["--sampler", "euler-maruyama", "--grid", "calls"], "takes the grid 'points' only"),
        (["--autoguidance", "nowhere", 1.5], "'nowhere' is neither an existing folder, nor a hub id"),
        (["--seed", 2**32], "seeds are integers in 0 .. 2^32 - 1"),
    ],
)
def test_impossible_samples(runs, refused, tmp_path, options, message):
    assert message in refused("sample", runs / "dit", *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_names_are_numbers_a_class_has_no_other_name(runs, refused, tmp_path):
    shutil.copytree(runs / "dit/checkpoints/000000048/model", tmp_path / "dit")
    path = tmp_path / "dit/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"class_names": [f"{10 * i}" for i in range(1, 10)] + ["other"]}))
    command = ["sample", tmp_path / "dit", "--autoencoder", runs / "decoder", "--out", tmp_path / "out", "--labels"]
    assert "class '1' is not among the 10" in refused(*command, "1")


def test_an_autoencoder_that_lies_elsewhere_is_not_taken_for_one_of_the_hub(runs, run, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "here/runs").mkdir(parents=True)
    (tmp_path / "here/runs/x").symlink_to(runs / "decoder")
    shutil.copytree(runs / "dit", tmp_path / "dit")
    recipe = tmp_path / "dit/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs / "decoder"), "runs/x"))
    command = ["sample", tmp_path / "dit", "--num", 1, "--steps", 2, "--out", tmp_path / "out"]
    monkeypatch.chdir(tmp_path)
    output = refused(*command)
    assert f"{tmp_path / 'dit'} was trained with autoencoder 'runs/x', which is not here" in output
    assert "or give --autoencoder" in output
    monkeypatch.chdir(tmp_path / "here")
    run(*command)


def test_damaged_samples(runs, run, refused, tmp_path):
    command = ["sample", runs / "dit", "--num", 2, "--steps", 2, "--out", tmp_path / "out"]
    run(*command)
    picture, protocol = tmp_path / "out/000001.png", tmp_path / "out/samples.json"
    whole = picture.read_bytes()
    picture.write_bytes(b"")
    assert f"{picture} is damaged (it is empty); delete it and run the same command again" in refused(*command)
    picture.write_bytes(whole[:100])
    assert f"{picture} is damaged" in refused(*command, "--npz", tmp_path / "samples.npz")
    picture.unlink()
    run(*command, "--npz", tmp_path / "samples.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-overview.png", "samples.npz"]
    for damaged in ("", "{", "[1]"):
        protocol.write_text(damaged)
        assert f"{protocol} is damaged" in refused(*command)


@pytest.mark.parametrize("command", ["sample", "stats"])
def test_files_that_cannot_be_written_are_found_before_the_work(runs, refused, tmp_path, monkeypatch, command):
    arguments = {
        "sample": ["sample", runs / "dit", "--num", 2, "--out", tmp_path / "out", "--npz"],
        "stats": ["stats", runs / "encoder", "digits", "--image-size", 16, "--enlarge", "--out"],
    }[command]
    monkeypatch.setattr(DiffusionModel, "from_pretrained", None)
    monkeypatch.setattr("rae.commands.stats.load_encoder", None)
    name = {"sample": "x.npz", "stats": "x.safetensors"}[command]
    folder = tmp_path / "folder" / name
    folder.mkdir(parents=True)
    assert f"{folder} is a folder; give the name of a file" in refused(*arguments, folder)
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(*arguments, tmp_path / "file/below" / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{tmp_path} cannot be written to" in refused(*arguments, tmp_path / name)


def test_samples_are_not_begun_where_their_npz_has_no_room(runs, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 3 * 16 * 16 - 1))
    command = ["sample", runs / "dit", "--num", 4, "--out", tmp_path / "out", "--npz", tmp_path / "x.npz"]
    assert f"{tmp_path / 'x.npz'} will take 3.1 kB, 3.1 kB are free there" in refused(*command)
    assert not list(tmp_path.iterdir())


def test_a_model_folder_does_not_say_its_autoencoder(runs, refused, tmp_path):
    shutil.copytree(runs / "dit/checkpoints/000000048/model", tmp_path / "dit")
    assert "give --autoencoder" in refused("sample", tmp_path / "dit", "--out", tmp_path / "out")


def test_samples_of_two_kinds_are_not_mixed(runs, run, refused, tmp_path):
    command = ["sample", runs / "dit", "--num", 2, "--out", tmp_path / "out"]
    run(*command, "--steps", 2)
    assert "steps: 2 -> 3\nAsk for the same, or give another folder" in refused(*command, "--steps", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert "is not empty; give a new folder" in refused("sample", runs / "dit", "--out", tmp_path / "mine")
    file = tmp_path / "mine/thesis.tex"
    assert f"{file} is a file; give a folder" in refused("sample", runs / "dit", "--out", file)


# --- the machine


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes: writing fails as on a full disk, with another number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("stage", ["decoder", "dit"])
def test_full_disk_keeps_the_last_checkpoint(runs, run, refused, tmp_path, stage):
    shutil.copytree(runs / stage, tmp_path / "run")
    command = [f"train-{stage}", runs / f"{stage}.yaml", "run.duration=9st", "--out", tmp_path / "run"]
    with full_disk(20_000):  # a sheet of pictures fits, the weights do not
        output = refused(*command)
    assert f"The last good checkpoint is {tmp_path / 'run/checkpoints/000000048'}" in output
    assert "Make room and run the same command again" in output
    {"decoder": RAE, "dit": DiffusionModel}[stage].from_pretrained(tmp_path / "run")
    run(*command)
    assert (tmp_path / "run/latest").read_text() == "000000072\n"


def test_full_disk_while_sampling(runs, run, refused, tmp_path):
    command = ["sample", runs / "dit", "--num", 2, "--steps", 2, "--out", tmp_path / "out"]
    with full_disk(500):  # the protocol fits, a picture does not
        assert "File too large. Make room and run the same command again" in refused(*command)
    assert not list((tmp_path / "out").glob("*.png"))
    run(*command)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_full_disk_while_packing(runs, run, refused, tmp_path):
    command = ["sample", runs / "dit", "--num", 8, "--steps", 2, "--out", tmp_path / "out"]
    run(*command)
    with full_disk(5000):  # of 6144 bytes of pixels
        assert "Make room and run the same command again" in refused(*command, "--npz", tmp_path / "x.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-overview.png"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_full_disk_while_converting(refused, tmp_path):
    torch.save(load_file(GOLDEN / "ditdh_qknorm/weights.safetensors"), tmp_path / "stage2.pt")
    command = ["convert", tmp_path / "stage2.pt", "--shift", 2, "--time-law", "uniform", "--out", tmp_path / "out"]
    with full_disk(1000):
        output = refused(*command)
    assert f"os error {errno.EFBIG}). Make room and run the same command again" in output


def test_full_disk_while_saving_statistics(runs, refused, tmp_path):
    out = ["--image-size", 16, "--enlarge", "--out", tmp_path / "stats.safetensors"]
    with full_disk(500):
        output = refused("stats", runs / "encoder", "digits", *out)
    assert f"os error {errno.EFBIG}). Make room and run the same command again" in output
    assert not list(tmp_path.iterdir())


def interrupt(command: list, when) -> tuple[int, str]:
    """Start `rae COMMAND`, send it a Ctrl-C as soon as `when()`; its exit status and what it said."""
    arguments = [sys.executable, "-m", "rae.cli", *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not when() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_ctrl_c_while_training_saves(runs, run, tmp_path):
    command = ["train-dit", runs / "dit.yaml", "run.save_every=100%", "--out", tmp_path / "run"]
    log = tmp_path / "run/log.jsonl"
    status, said = interrupt([*command, "run.duration=1000000st"], lambda: log.exists() and log.read_text())
    assert status == 130, said
    assert "Run the same command again to go on" in said
    seen = int((tmp_path / "run/latest").read_text())
    DiffusionModel.from_pretrained(tmp_path / "run")
    assert f"resumed at {seen:,} of" in run(*command, f"run.duration={seen + 16}img")


def test_ctrl_c_while_sampling_keeps_what_is_there(runs, run, tmp_path):
    out = tmp_path / "out"
    command = ["sample", runs / "dit", "--num", 100_000, "--steps", 2, "--batch", 1, "--out", out]
    status, said = interrupt(command, lambda: len(list(out.glob("*.png"))) > 3)
    assert status == 130, said
    there = list(out.glob("*.png"))
    assert f"{len(there)} of 100,000 images are in {out}" in said
    for path in there:
        Image.open(path).load()


def test_ctrl_c_says_what_may_be_done(monkeypatch):
    for words, hint in (((), "the same command may be run again"), (("7 of 9 are there",), "7 of 9 are there")):

        def broken(words=words) -> None:
            raise KeyboardInterrupt(*words)

        monkeypatch.setattr("rae.commands.doctor.print_encoders", broken)
        result = CliRunner().invoke(rae, ["encoders"])
        assert (result.exit_code, result.output) == (130, f"interrupted; {hint}\n")


def test_processes_that_do_not_see_each_other(runs, refused, tmp_path, monkeypatch):
    process_state()  # this one is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    for address, message in ((None, "nothing says where the others are"), ("127.0.0.1", "this one sees 1")):
        if address:
            monkeypatch.setenv("MASTER_ADDR", address)
        for command in (["sample", runs / "dit"], ["reconstruct", runs / "decoder", "digits"]):
            assert message in refused(*command, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_launcher_is_told_the_error(refused, tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    output = refused("doctor", tmp_path / "nowhere")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))  # as torchrun reads it
    assert failure.message["message"] + "\n" == output
    assert abs(failure.timestamp - time.time()) < 60


def test_a_process_whose_company_has_ended_says_so_in_one_line(refused, tmp_path, monkeypatch):
    def closed() -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:54413.")

    monkeypatch.setattr("rae.commands.doctor.print_encoders", closed)
    assert isinstance(CliRunner().invoke(rae, ["encoders"]).exception, RuntimeError)  # alone it is a defect
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert refused("encoders").startswith("error: another process of this job has ended")
    assert not (tmp_path / "error.json").exists()  # that of the other one is the reason


@pytest.mark.filterwarnings("default::rae.data.image_set.PassedOver")
def test_images_that_are_passed_over_are_told_once(runs, run, tmp_path, monkeypatch):
    images = make_images(tmp_path / "images")
    (images / "phone.heic").touch()
    command = ["reconstruct", runs / "decoder", images, "--out", tmp_path / "out"]
    told = f"{images}: images of kinds that are not read are passed over: 1 .heic ({images / 'phone.heic'}, for one)."
    assert run(*command).count(told) == 1
    monkeypatch.setenv("RANK", "1")  # of several processes the first one speaks
    assert told not in run(*command)


# --- errors that are not the user's


def test_a_defect_keeps_its_traceback(run, monkeypatch):
    import rae.commands.doctor as doctor

    def broken() -> None:
        int("x")  # raised by Python, in a file of ours

    monkeypatch.setattr(doctor, "print_encoders", broken)
    with pytest.raises(AssertionError):
        run("encoders")


def test_traceback_on_request(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("RAE_TRACEBACK", "1")
    result = CliRunner().invoke(rae, ["sample", str(runs / "nowhere"), "--out", str(tmp_path)])
    assert type(result.exception).__name__ == "SourceError"
