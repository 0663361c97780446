"""`rae sample`: the same bits however the work is cut up; labels, latents, .npz, cost, overview, the autoencoder.

What `generate` itself does is in test_generate.py, bad input in test_bad_input.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import invoke
from PIL import Image
from safetensors.torch import load_file
from tiny import decoder_recipe, png, save_encoder

from rae import RAE, DiffusionModel
from rae.commands import sample, sample_folder
from rae.commands.autoencoder_of import other_autoencoder
from rae.commands.sample import choose_labels, split_labels
from rae.config import ConfigError
from rae.data.images import to_bytes
from rae.diffusion.guidance import CFG
from rae.diffusion.sampling import time_grid
from rae.training.decoder import train_decoder


def pngs(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def latents(folder: Path) -> torch.Tensor:
    return torch.stack([load_file(path)["latent"] for path in sorted((folder / "latents").iterdir())])


def protocol(folder: Path) -> dict:
    """How the samples were made, without what it took."""
    return {key: value for key, value in json.loads((folder / "samples.json").read_text()).items() if key != "jobs"}


def job(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())["jobs"][-1]


def made(folder: Path) -> dict[str, bytes]:
    """Every file but samples.json, by its name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "samples.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- the same bits


BATCH = ["--num", 10, "--steps", 3, "--cfg", 2, "--latents", "--batch", 4]  # 10 is no multiple of 4
FORWARD = DiffusionModel.forward


def coupled_forward(self, x, t, y):
    """A velocity that depends on all of its batch, as rounding errors do in large models, and not in these."""
    v = FORWARD(self, x, t, y)
    return v + 0.2 * v.mean(0) + 0.01 * len(v)


@pytest.fixture
def coupled(monkeypatch):
    monkeypatch.setattr(DiffusionModel, "forward", coupled_forward)


@pytest.fixture(scope="module")
def whole(runs, run, tmp_path_factory) -> Path:
    """Ten samples made at once by one process, each of them in its batch's company."""
    out = tmp_path_factory.mktemp("samples") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionModel, "forward", coupled_forward)
        run("sample", runs / "dit", *BATCH, "--out", out)
    assert len(made(out)) == 20
    return out


def test_two_processes_make_the_same_bits(whole, runs, tmp_path):
    (tmp_path / "main.py").write_text(
        "from test_sample_command import DiffusionModel, coupled_forward\n"
        "from rae.cli import main\n"
        "DiffusionModel.forward = coupled_forward\n"
        "main()\n"
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        tmp_path / "main.py",
    ]
    done = subprocess.run(
        [str(part) for part in (*launch, "--", "sample", runs / "dit", *BATCH, "--out", tmp_path / "two")],
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert made(tmp_path / "two") == made(whole)
    assert protocol(tmp_path / "two") == protocol(whole)
    for once in ("10 images of 16 x 16 pixels", "autoencoder: ", "2 processes, 4 images at a time", "10 images in"):
        assert done.stderr.count(once) == 1
    assert job(tmp_path / "two").items() >= {"processes": 2, "images": 10, "computed": 10, "calls": 2.0}.items()


def test_an_interrupted_job_ends_in_the_same_bits(whole, coupled, runs, run, tmp_path, monkeypatch):
    command, saved, save = ["sample", runs / "dit", *BATCH, "--out", tmp_path / "out"], [], sample_folder.save_picture

    def interrupted(picture, path):
        if len(saved) == 6:
            raise KeyboardInterrupt
        saved.append(path)
        save(picture, path)

    with monkeypatch.context() as patch:
        patch.setattr(sample_folder, "save_picture", interrupted)
        result = invoke(*command)
        assert (result.exit_code, "6 of 10 images are in" in result.output) == (130, True)
    (tmp_path / "out/000001.png").unlink()
    (tmp_path / "out/latents/000002.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in saved if path.exists()}
    assert len(before) == 5
    assert "are there" not in run(*command)  # of every chunk something is missing
    assert made(tmp_path / "out") == made(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    jobs = json.loads((tmp_path / "out/samples.json").read_text())["jobs"]
    assert jobs[0].keys() == {"batch", "processes", "device", "random_labels"}  # it never came to its end
    assert (jobs[1]["images"], jobs[1]["computed"]) == (6, 10)  # 1, 2, 6 to 9, and their chunks
    assert "nothing was missing" in run(*command)
    assert len(json.loads((tmp_path / "out/samples.json").read_text())["jobs"]) == 2


def test_images_that_are_added_are_those_of_a_larger_set(whole, coupled, runs, run, tmp_path):
    command = ["sample", runs / "dit", *BATCH, "--out", tmp_path / "out"]
    assert "are there" not in run(*command, "--num", 4)  # whole chunks
    assert "\n4 of 10 are there\n" in run(*command, "--num", 10)
    assert made(tmp_path / "out") == made(whole)


def test_another_batch_size_changes_rounding_alone(whole, runs, run, tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    run("sample", runs / "dit", *BATCH, "--out", many)
    run("sample", runs / "dit", *BATCH, "--batch", 1, "--out", few)
    assert np.abs(pngs(few).astype(int) - pngs(many)).max() <= 1
    torch.testing.assert_close(latents(few), latents(many), rtol=1e-3, atol=1e-4)
    assert not torch.isclose(latents(whole), latents(many), atol=1e-3).all()  # so that equal bits mean something above


def test_a_change_of_batch_size_is_said(runs, run, tmp_path):
    command = ["sample", runs / "dit", "--steps", 2, "--out", tmp_path / "out"]
    assert "at a time, the others" not in run(*command, "--num", 4, "--batch", 2)
    said = "what is there was made 2 images at a time, the others are made 3 at a time: the same up to rounding"
    assert said in run(*command, "--num", 6, "--batch", 3)
    assert "at a time, the others" not in run(*command, "--num", 6, "--batch", 2)  # nothing was missing


# --- labels


def imagenet() -> SimpleNamespace:
    """What `choose_labels` asks of a model of 1,000 classes without names."""
    return SimpleNamespace(null_label=1000, config=SimpleNamespace(class_names=None))


def test_fifty_thousand_are_fifty_of_each_of_a_thousand_classes():
    assert Counter(choose_labels(imagenet(), None, 50_000, None)) == dict.fromkeys(range(1000), 50)
    assert choose_labels(imagenet(), None, None, 50) == choose_labels(imagenet(), None, 50_000, None)


def test_random_labels_are_drawn_from_the_seed_of_each_image():
    drawn = choose_labels(imagenet(), None, 50_000, None, random_from=0)
    counts = np.bincount(drawn, minlength=1000)
    assert ((counts - 50.0) ** 2 / 50).sum() == pytest.approx(999, abs=5 * (2 * 999) ** 0.5)  # chi squared
    assert choose_labels(imagenet(), None, 100, None, random_from=0) == drawn[:100]
    assert choose_labels(imagenet(), None, 100, None, random_from=7) == drawn[7:107]
    assert drawn[:4] == [700, 955, 364, 96]  # in every version of NumPy: SeedSequence is fixed


def test_random_labels_by_flag(runs, run, refused, tmp_path):
    command = ["sample", runs / "dit", "--steps", 2, "--random-labels", "--labels", "7,1,4", "--out", tmp_path / "out"]
    assert "of each of 3 classes drawn at random" in run(*command, "--num", 12)
    labels = protocol(tmp_path / "out")["labels"]
    assert job(tmp_path / "out")["random_labels"] is True
    assert set(labels) == {1, 4, 7}
    assert labels != [7, 1, 4] * 4
    run(*command, "--num", 14)
    assert protocol(tmp_path / "out")["labels"][:12] == labels
    assert "--per-class and --random-labels exclude each other" in refused(*command, "--per-class", 2)


def test_own_classes_by_name(runs, run, tmp_path):
    shutil.copytree(runs / "dit/checkpoints/000000048/model", tmp_path / "dit")
    path = tmp_path / "dit/config.json"
    names = ["tench", "golden retriever", *(f"breed {i}" for i in range(8))]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": names}))
    command = ["sample", tmp_path / "dit", "--autoencoder", runs / "decoder", "--steps", 2, "--out", tmp_path / "out"]
    output = run(*command, "--labels", "golden retriever, tench", "--num", 3, "--npz", tmp_path / "x.npz")
    assert protocol(tmp_path / "out")["labels"] == [1, 0, 1]
    assert job(tmp_path / "out")["random_labels"] is False
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_1"].tolist() == [1, 0, 1]
    assert "'tench', 'golden retriever' x 2" in output  # the rows of the overview, in the order of the classes


IMAGENET = ("tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "crane, bird", "sax, saxophone")


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("tench, Tinca tinca", ["tench, Tinca tinca"]),
        ("tench,Tinca tinca ,1, crane", ["tench, Tinca tinca", 1, "crane"]),
        ("crane, bird, crane, crane", ["crane, bird", "crane", "crane"]),  # the longest first
        ("crane, goldfish, Carassius auratus", ["crane", "goldfish, Carassius auratus"]),
        ("tench, 4", ["tench", 4]),  # not known, which is for label_indices to say
        ("Tinca tinca, tench", ["Tinca tinca", "tench"]),
        ("", [""]),
        ("crane,", ["crane", ""]),
    ],
)
def test_names_with_commas_are_asked_for_as_they_are(text, asked):
    assert split_labels(text, IMAGENET) == asked


def test_where_names_are_numbers_there_are_no_indices():
    assert split_labels("1, 10,2", ("1", "2", "one, two")) == ["1", "10", "2"]
    assert split_labels("1, 10", ()) == [1, 10]


def test_imagenet_names_at_the_command(runs, run, refused, tmp_path):
    shutil.copytree(runs / "dit/checkpoints/000000048/model", tmp_path / "dit")
    path = tmp_path / "dit/config.json"
    names = [*IMAGENET, *(f"breed {i}" for i in range(5))]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": names}))
    command = ["sample", tmp_path / "dit", "--autoencoder", runs / "decoder", "--steps", 2, "--out", tmp_path / "out"]
    assert "'tench, Tinca tinca', 'crane', 'crane, bird'" in run(
        *command, "--labels", "2, tench, Tinca tinca, crane, bird"
    )
    assert protocol(tmp_path / "out")["labels"] == [2, 0, 3]
    assert "did you mean 'tench, Tinca tinca', index 0?" in refused(*command, "--labels", "tench")


# --- latents


def test_latents_decode_to_the_images(whole, runs):
    autoencoder = RAE.from_pretrained(runs / "decoder")
    kept = latents(whole)
    assert (kept.shape, kept.dtype) == ((10, *autoencoder.latent_shape), torch.float32)
    decoded = torch.cat([to_bytes(autoencoder.decode(z)) for z in kept.split(4)])
    assert np.array_equal(decoded.permute(0, 2, 3, 1).numpy(), pngs(whole))


def test_python_of_the_page_runs(whole, runs, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/sampling.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/decoder").symlink_to(runs / "decoder")
    (tmp_path / "samples").symlink_to(whole)
    names = {}
    exec(code, names)
    assert torch.equal(names["latents"], latents(whole)[:8])
    assert np.array_equal(to_bytes(names["images"])[3].permute(1, 2, 0).numpy(), pngs(whole)[3])


def test_latents_may_be_added_and_stay(whole, coupled, runs, run, refused, tmp_path):
    command = ["sample", runs / "dit", *(part for part in BATCH if part != "--latents"), "--out", tmp_path / "out"]
    run(*command)
    assert not (tmp_path / "out/latents").exists()
    before = (tmp_path / "out/000003.png").stat().st_mtime_ns
    run(*command, "--latents")
    assert made(tmp_path / "out") == made(whole)
    assert (tmp_path / "out/000003.png").stat().st_mtime_ns == before
    said = json.loads((tmp_path / "out/samples.json").read_text())
    output = run(*command)  # it keeps them, asked for or not
    assert f"latents are kept, since {tmp_path / 'out'} keeps them" in output
    assert "nothing was missing" in output
    assert json.loads((tmp_path / "out/samples.json").read_text()) == said
    (tmp_path / "out/latents/000003.safetensors").write_bytes(b"")
    assert "000003.safetensors is damaged (it is empty); delete it" in refused(*command, "--latents")
    (tmp_path / "out/latents/000003.safetensors").unlink()
    (tmp_path / "out/000008.png").unlink()
    run(*command)
    assert made(tmp_path / "out") == made(whole)
    run(*command, "--num", 12)
    assert len(latents(tmp_path / "out")) == len(pngs(tmp_path / "out")) == 12


def test_an_npz_holds_the_images_of_a_folder_with_latents(runs, run, tmp_path):
    command = ["sample", runs / "dit", "--num", 2, "--steps", 2, "--out", tmp_path / "out"]
    command += ["--npz", tmp_path / "x.npz", "--no-pngs"]
    run(*command, "--latents")
    assert "holds them already" in run(*command)


def test_latents_that_have_no_room(runs, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    message = refused("sample", runs / "dit", *BATCH, "--out", tmp_path / "below/out")
    assert "make room, give another place, or leave --latents out" in message
    assert not list(tmp_path.iterdir())


# --- .npz


def test_npz_in_place_of_pngs(whole, coupled, runs, run, tmp_path, monkeypatch):
    out, npz = tmp_path / "out", tmp_path / "samples.npz"
    command = ["sample", runs / "dit", *BATCH, "--out", out, "--npz", npz, "--no-pngs"]
    output = run(*command)
    assert not list(out.glob("*.png"))
    assert "000000.png" not in output
    with np.load(npz) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_0"], pngs(whole))
        assert (file["arr_1"].dtype, file["arr_1"].tolist()) == (np.int64, protocol(whole)["labels"])
    before = npz.stat().st_mtime_ns
    shutil.copy(whole / "000003.png", out)  # as if it had been killed while it removed them
    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_samples", None)
        assert f"{npz} holds them already" in run(*command)
    assert npz.stat().st_mtime_ns == before
    assert not list(out.glob("*.png"))
    run(*command, "--num", 12)  # other images than it holds
    with np.load(npz) as file:
        assert np.array_equal(file["arr_0"][:8], pngs(whole)[:8])
        assert len(file["arr_0"]) == len(file["arr_1"]) == 12


def test_an_npz_of_an_earlier_version_is_given_its_classes(whole, runs, run, tmp_path, monkeypatch):
    out, npz = tmp_path / "out", tmp_path / "samples.npz"
    command = ["sample", runs / "dit", *BATCH, "--out", out, "--npz", npz, "--no-pngs"]
    run(*command)
    sample_folder.pack(sorted(whole.glob("*.png")), None, npz, protocol(whole))
    monkeypatch.setattr(sample, "write_samples", None)
    with monkeypatch.context() as patch:
        patch.setattr(sample_folder, "_write_labels", lambda archive, labels: archive.writestr("half", b"")[0])
        with pytest.raises(TypeError):
            sample_folder.add_labels(npz, [])
    with np.load(npz) as file:
        assert file.files == ["arr_0"]  # the old one, whole
    assert f"{npz} holds them already\ntheir classes were not in it" in run(*command)
    with np.load(npz) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_0"], pngs(whole))
        assert (file["arr_1"].dtype, file["arr_1"].tolist()) == (np.int64, protocol(whole)["labels"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-overview.png", "samples.npz"]
    before = npz.stat().st_mtime_ns
    assert "classes were not" not in run(*command)
    assert npz.stat().st_mtime_ns == before


def test_an_npz_is_judged_as_its_pngs_are(runs, run, encoder, tmp_path):
    """By class as well: it holds the labels."""
    out, npz, real = tmp_path / "out", tmp_path / "x.npz", tmp_path / "real"
    for i in range(30):
        (real / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (real / f"{i % 3}/{i}.png").write_bytes(png(i))
    run("sample", runs / "dit", "--labels", "2,0", "--num", 12, "--steps", 2, "--out", out, "--npz", npz)
    look = ["--features", encoder, "--input-size", 16, "--reference", real]
    found = []
    for subject in (out, npz):
        run("evaluate", subject, *look, "--out", tmp_path / f"judged-{subject.name}")
        found.append(json.loads((tmp_path / f"judged-{subject.name}/evaluation.json").read_text())["figures"])
    values = [{name: figure["value"] for name, figure in figures.items()} for figures in found]
    assert {name for name in values[0] if values[0][name] != values[1][name]} == {f"kid/{encoder}"}
    with_error = [[figure for figure in figures.values() if figure["error"] is not None] for figures in found]
    turns = [{"classes in turn" in figure["error_of"] for figure in figures} for figures in with_error]
    assert turns == [{True}, {False}]  # an .npz does not say how its classes were chosen
    assert "class_agreement" in {name.partition("/")[0] for name in found[1]}


def test_npz_is_no_other_kind_of_file(runs, refused, tmp_path):
    command = ["sample", runs / "dit", "--num", 1, "--out", tmp_path / "out", "--npz"]
    for name in ("below/samples.npy", "below/samples"):
        assert f"give --npz {tmp_path / 'below/samples.npz'}" in refused(*command, tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert "--no-pngs needs --npz" in refused(*command[:-1], "--no-pngs")


def test_a_foreign_npz_is_not_taken_for_ours(tmp_path):
    for foreign in ({"arr_0": np.zeros((1, 2, 2, 3), dtype=np.uint8)}, {}):
        np.savez(tmp_path / "x.npz", **foreign)
        assert not sample_folder.is_packed(tmp_path / "x.npz", {"images": 1})
    assert not sample_folder.is_packed(tmp_path / "none.npz", {"images": 1})


# --- what it costs


def inside(steps: int, low: float, high: float) -> int:
    """How many of Euler's times are in the interval, for the model of `runs`."""
    times = time_grid(steps, 1.0)[:-1]
    return int(((times >= low) & (times <= high)).sum())


@pytest.mark.parametrize(
    ("options", "calls", "passes", "guiding"),
    [
        ([], 7, 7, 0),
        (["--grid", "calls"], 8, 8, 0),
        (["--sampler", "heun"], 14, 14, 0),
        (["--sampler", "euler-maruyama"], 8, 8, 0),  # and the last step
        (["--cfg", 2], 7, 14, 0),
        (["--cfg", 1], 7, 7, 0),
        (["--cfg", 2, "--interval", 0.3, 0.8], 7, 7 + inside(8, 0.3, 0.8), 0),
        (["--autoguidance", "SELF", 2, "--interval", 0.3, 0.8], 7, 7, inside(8, 0.3, 0.8)),
    ],
)
def test_calls_and_passes_are_counted(runs, run, tmp_path, options, calls, passes, guiding):
    assert 0 < inside(8, 0.3, 0.8) < 7
    assert DiffusionModel.from_pretrained(runs / "dit").flow.shift == 1.0
    options = [runs / "dit" if option == "SELF" else option for option in options]
    output = run("sample", runs / "dit", "--num", 5, "--batch", 3, "--steps", 8, *options, "--out", tmp_path / "out")
    done = job(tmp_path / "out")
    assert (done["calls"], done["passes"], done["guiding_passes"]) == (calls, passes, guiding)
    assert (done["images"], done["batch"], done["processes"]) == (5, 3, 1)
    assert done["seconds"] > 0
    told = f", {calls} calls by the sampler, {passes} passes of the model"
    assert told + (f", {guiding} of the guiding model\n" if guiding else "\n") in output


def test_adaptive_steps_are_counted_too(runs, run, tmp_path):
    run("sample", runs / "dit", "--num", 3, "--sampler", "dopri5", "--cfg", 2, "--out", tmp_path / "out")
    done = job(tmp_path / "out")
    assert done["calls"] >= 7
    assert done["passes"] == 2 * done["calls"]


def test_counting_leaves_no_trace(runs):
    model = DiffusionModel.from_pretrained(runs / "dit")
    with sample_folder.count_passes(model, CFG(2.0)) as counts:
        model(torch.zeros(2, *model.latent_shape), torch.ones(2), torch.tensor([3, model.null_label]))
        assert counts.tolist() == [1, 2, 0]
    model(torch.zeros(1, *model.latent_shape), torch.ones(1), torch.tensor([3]))
    assert counts.tolist() == [1, 2, 0]


# --- what is said


def test_what_will_be_done_is_said_first(runs, run, tmp_path):
    options = ["--num", 12, "--steps", 3, "--cfg", 1.5, "--interval", 0.1, 0.9, "--batch", 8]
    output = run("sample", runs / "dit", *options, "--out", tmp_path / "out")
    assert (
        "12 images, 1 to 2 of each of 10 classes; euler, 3 steps (grid: points); CFG 1.5 at t in [0.1, 0.9]; fp32 on "
        "cpu, 1 process, 8 images at a time\n"
    ) in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cfg", 0.5], "--cfg 0.5 is below 1: it weakens, and leads towards no class; above 1 it guides."),
        (["--cfg", -1], "--cfg -1 is below 1"),
        (["--cfg", 1], "--cfg 1 is no guidance: the samples are those of the model alone"),
        (["--cfg", 1.5], None),
        (["--autoguidance", "SELF", 0.5], "--autoguidance 0.5 is below 1: it weakens, and leads towards the guiding"),
        (["--autoguidance", "SELF", 1], "--autoguidance 1 is no guidance"),
        (["--autoguidance", "SELF", 1.5], "--autoguidance by the model itself is no guidance, whatever its scale"),
    ],
)
def test_guidance_that_does_not_guide_is_said(runs, run, tmp_path, options, said):
    options = [runs / "dit" if option == "SELF" else option for option in options]
    output = run("sample", runs / "dit", "--num", 1, "--steps", 2, *options, "--out", tmp_path / "out")
    assert (said or "CFG 1.5") in output
    assert (said is None) == ("above 1 it guides" not in output and "a weaker one guides" not in output)


def test_guidance_that_is_no_number(runs, refused, tmp_path):
    for scale in ("nan", "inf"):
        message = refused("sample", runs / "dit", "--cfg", scale, "--out", tmp_path / "out")
        assert f"guidance scale {scale}: it must be a finite number" in message


def test_overview_shows_the_first_by_class_and_is_no_sample(runs, run, tmp_path):
    out = tmp_path / "out"
    output = run("sample", runs / "dit", "--num", 70, "--labels", "7,1,4", "--steps", 2, "--out", out)
    sheet, samples = np.asarray(Image.open(tmp_path / "out-overview.png")), pngs(out)
    assert (sheet.shape, len(samples)) == ((8 * 16, 8 * 16, 3), 70)
    order = [*range(1, 64, 3), *range(2, 64, 3), *range(0, 64, 3)]  # 21 ones, 21 fours, 22 sevens
    tiles = sheet.reshape(8, 16, 8, 16, 3).swapaxes(1, 2).reshape(64, 16, 16, 3)
    assert np.array_equal(tiles, samples[order])
    rows = output.split("out-overview.png, row by row:\n")[1].splitlines()[:8]
    assert rows[:3] == ["  '1' x 8", "  '1' x 8", "  '1' x 5, '4' x 3"]
    run("sample", runs / "dit", "--num", 10, "--steps", 2, "--out", tmp_path / "few")
    assert np.asarray(Image.open(tmp_path / "few-overview.png"))[16:, 32:].min() == 255  # no eleventh


# --- finding the autoencoder


@pytest.fixture
def moved(runs, tmp_path, monkeypatch) -> Path:
    """runs/decoder and runs/dit, trained with relative paths and then moved to data/x; we are elsewhere."""
    root = tmp_path / "data/x"
    for name in ("decoder", "dit"):
        shutil.copytree(runs / name, root / "runs" / name)
    recipe = root / "runs/dit/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs / "decoder"), "runs/decoder"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


@pytest.mark.parametrize("part", ["", "latest", "checkpoints/000000024", "checkpoints/000000048/model"])
def test_a_run_that_was_moved_finds_its_autoencoder(moved, run, part):
    output = run("sample", moved / "runs/dit" / part, "--num", 1, "--steps", 2, "--out", "out")
    assert f"autoencoder: {moved / 'runs/decoder'}\n" in output
    os.chdir(moved / "runs/dit")
    out = "../../../../elsewhere/out"
    assert "nothing was missing" in run("sample", f"./{part}", "--num", 1, "--steps", 2, "--out", out)


def test_an_autoencoder_of_another_latent_space_is_passed_over(moved, run, refused):
    autoencoder = RAE.from_pretrained(moved / "runs/decoder")
    RAE(autoencoder.encoder, autoencoder.decoder, None).save_pretrained("runs/decoder")
    command = ["sample", moved / "runs/dit", "--num", 1, "--steps", 2, "--out", "out"]
    output = run(*command)
    assert "runs/decoder is not taken: the diffusion model was trained in latent space" in output
    assert f"autoencoder: {moved / 'runs/decoder'}\n" in output
    shutil.rmtree(moved / "runs/decoder")
    assert "error: the diffusion model was trained in latent space" in refused(*command)
    shutil.rmtree("runs/decoder")
    assert "was trained with autoencoder 'runs/decoder', which is not here, nor in a folder above" in refused(*command)


def test_an_autoencoder_that_does_not_fit_is_told_the_right_one(moved, refused, tmp_path):
    other = train_decoder(
        decoder_recipe(save_encoder(tmp_path / "encoder", patch_size=16), decoder__patch_size=16, run__duration="1st"),
        tmp_path / "other",
    )
    command = ["--autoencoder", other, "--num", 1, "--steps", 2, "--out", "out"]
    wrong = f"--autoencoder {other}: the autoencoder's latents are (16, 1, 1), the model wants (16, 2, 2) (C, h, w)."
    output = refused("sample", moved / "runs/dit", *command)
    assert f"{wrong} {moved / 'runs/dit'} was trained with runs/decoder, which is taken without --autoenc" in output
    shutil.copytree(moved / "runs/dit/checkpoints/000000048/model", "converted")  # of which nothing more is known
    assert refused("sample", "converted", *command).strip().endswith(wrong)
    assert not Path("out").exists()


def test_the_recipe_of_another_run_further_up_is_not_asked(moved, runs, refused):
    model = Path("W/a/b/c/d/model")
    shutil.copytree(moved / "runs/dit/checkpoints/000000048/model", model)
    shutil.copy(runs / "dit/recipe.yaml", "W")
    options = ["--num", 1, "--steps", 2, "--out", "out"]
    assert f"{model} is not the folder of a run, which would name its autoencoder; give --" in refused(
        "sample", model, *options
    )


def test_an_autoencoder_that_does_not_fit_is_told_whatever_the_recipe_says(moved, runs, tmp_path):
    model = DiffusionModel.from_pretrained(moved / "runs/dit")
    for text in ((runs / "decoder/recipe.yaml").read_text(), "run: [unclosed"):  # of stage 1; none
        (moved / "runs/dit/recipe.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"latents are .*, the model wants \S+ \S+ \S+ \(C, h, w\)\.$"):
            other_autoencoder("pixels@16", model, moved / "runs/dit")


def test_a_guiding_checkpoint_that_is_not_there_is_told_the_others(runs, refused, tmp_path):
    gone, command = runs / "dit/checkpoints/000000040", ["sample", runs / "dit", "--out", tmp_path / "out"]
    has = f"The run {runs / 'dit'} has checkpoints/000000024, checkpoints/000000048."
    for path in (gone, gone / "model"):
        assert f"{path}: no such folder; give one that exists. {has}" in refused(*command, "--autoguidance", path, 1.5)
    assert has in refused("sample", gone, *command[2:])
