"""`rae evaluate` and `rae reference`: the figures are those of the features, however the work was cut up."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rae.commands import feature_folder
from rae.commands import look as look_module
from rae.commands.look import Features
from rae.commands.reference import Reference, role_of
from rae.data import images as images_module
from rae.data.crops import center_crop
from rae.data.images import open_images, subset, to_tensor, to_unit
from rae.evaluation import reference as reference_module
from rae.evaluation.features import open_extractor
from rae.evaluation.frechet import Moments, frechet_distance
from rae.evaluation.reconstruction import psnr
from rae.evaluation.reference import pixel_digests
from rae.evaluation.uncertainty import BOUNDS
from rae.folders import locked

METRICS = ("frechet", "kid", "precision", "recall", "density", "coverage")  # of 21 images, too few for another one


def save_images(folder: Path, count: int, *, seed: int, size=(20, 16), suffix: str = ".png", mean: int = 100) -> Path:
    """Noise about a mean, [H,W,3] of `size`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        image = (random.normal(mean, 40, (*size, 3)) + random.normal(0, 20, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Samples and real images: not to be written to."""
    root = tmp_path_factory.mktemp("sets")
    return save_images(root / "samples", 21, seed=1, mean=110), save_images(root / "real", 26, seed=2)


@pytest.fixture
def look(encoder):
    """Which extractor: a tiny one, which sees 16 x 16 pixels."""
    return ["--features", encoder, "--input-size", 16]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(feature_folder, "CHUNK", 8)


def figures(folder: Path) -> dict[str, dict]:
    """METRIC => figure, of the only extractor."""
    found = json.loads((folder / "evaluation.json").read_text())["figures"]
    return {name.partition("/")[0]: figure for name, figure in found.items()}


def values(folder: Path) -> dict[str, float]:
    return {name: figure["value"] for name, figure in figures(folder).items()}


# --- what stands in it


def test_figures_are_those_of_the_features(sets, encoder, look, run, tmp_path):
    samples, real = sets
    output = run("evaluate", samples, "--reference", real, *look, "--out", tmp_path / "out")
    extractor, moments = open_extractor(str(encoder), input_size=16), []
    for folder in sets:
        images = torch.stack([to_tensor(open_images(folder)[i][0]) for i in range(len(open_images(folder)))])
        moments.append(Moments(16))
        moments[-1].update(extractor(images)["features"])
    expected = frechet_distance(*(x for m in moments for x in (m.mean, m.covariance)))
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert figures(tmp_path / "out").keys() == set(METRICS)
    assert values(tmp_path / "out")["frechet"] == pytest.approx(expected, rel=1e-6)
    assert found["subject"].items() >= {"kind": "images", "images": 21, "size": [20, 16], "crop": "as they are"}.items()
    assert found["reference"].items() >= {"source": str(real), "images": 26, "size": [20, 16]}.items()
    assert found["extractors"] == {str(encoder): extractor.describe()}
    assert figures(tmp_path / "out")["frechet"]["protocol"] == "21 images against 26 images"
    assert all(figure["error"] > 0 for figure in figures(tmp_path / "out").values() if 0 < figure["value"] < 1)
    assert "FD" in output
    assert "written: " in output


def test_damage_is_seen(sets, look, run, tmp_path):
    half = save_images(tmp_path / "half", 26, seed=3)
    dark = save_images(tmp_path / "dark", 26, seed=3, mean=30)
    for name in ("half", "dark"):
        run("evaluate", tmp_path / name, "--reference", sets[1], *look, "--out", tmp_path / f"{name}-out")
    good, bad = (values(tmp_path / f"{folder.name}-out") for folder in (half, dark))
    assert good["frechet"] < bad["frechet"]
    assert good["kid"] < bad["kid"]
    assert good["coverage"] > bad["coverage"]


# --- the same figures however the work is cut up


@pytest.fixture
def whole(sets, look, run, tmp_path) -> dict[str, float]:
    run("evaluate", sets[0], "--reference", sets[1], *look, "--out", tmp_path / "whole")
    return values(tmp_path / "whole")


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_gives_the_same_figures(whole, small_chunks, sets, look, run, tmp_path, batch):
    run("evaluate", sets[0], "--reference", sets[1], *look, "--batch", batch, "--out", tmp_path / "out")
    assert values(tmp_path / "out") == pytest.approx(whole, rel=1e-6)
    assert len(list((tmp_path / "out/features").rglob("*.safetensors"))) == 3  # chunks of 8, 8 and 5


def turned(folder: Path, out: Path, suffix: str) -> Path:
    """The same pixels in other files, the last image first."""
    out.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        Image.open(file).save(out / f"{99 - i}{suffix}")
    return out


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_any_order_gives_the_same_figures_and_errors(whole, sets, look, run, tmp_path, suffix):
    others = [turned(folder, tmp_path / folder.name, suffix) for folder in sets]
    run("evaluate", others[0], "--reference", others[1], *look, "--out", tmp_path / "out")
    assert values(tmp_path / "out") == pytest.approx(whole, rel=1e-6)
    found, expected = (
        {name: figure["error"] for name, figure in figures(tmp_path / out).items()} for out in ("out", "whole")
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_features_without_digests_are_refused(whole, sets, look, run, refused, tmp_path):
    (about,) = (tmp_path / "whole/features").rglob("features.json")
    said = json.loads(about.read_text())
    del said["digests"]  # as of earlier versions
    about.write_text(json.dumps(said))
    told = refused("evaluate", sets[0], "--reference", sets[1], *look, "--out", tmp_path / "whole")
    assert "digests: None -> SHA-256" in told


def test_two_processes_give_the_same_figures(whole, sets, look, tmp_path):
    script = "from rae.cli import main; from rae.commands import feature_folder; feature_folder.CHUNK = 8; main()"
    (tmp_path / "main.py").write_text(script)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        tmp_path / "main.py",
    ]
    command = ["evaluate", sets[0], "--reference", sets[1], *look, "--out", tmp_path / "two"]
    done = subprocess.run(
        [str(part) for part in (*launch, "--", *command)],
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert values(tmp_path / "two") == pytest.approx(whole, rel=1e-6)
    assert done.stdout.count("written: ") == 1


def test_what_was_computed_is_not_computed_again(whole, small_chunks, sets, look, run, tmp_path, monkeypatch):
    command = ["evaluate", sets[0], "--reference", sets[1], *look, "--out", tmp_path / "out"]
    written, write = [], feature_folder._write

    def interrupted(file, parts):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        write(file, parts)

    from conftest import invoke

    with monkeypatch.context() as patch:
        patch.setattr(feature_folder, "_write", interrupted)
        assert invoke(*command).exit_code == 130
    before = [file.stat().st_mtime_ns for file in written]
    run(*command)
    assert [file.stat().st_mtime_ns for file in written] == before
    assert values(tmp_path / "out") == pytest.approx(whole, rel=1e-6)


def test_labels_are_looked_up_by_numbers(sets, tmp_path):
    """Those of a large set took seconds, one tensor for each."""

    class Labels(list):
        def __getitem__(self, number):
            assert type(number) is int
            return super().__getitem__(number)

    images = open_images(sets[1])
    images = dataclasses.replace(images, labels=Labels(i % 2 for i in range(len(images))), class_names=["a", "b"])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([to_tensor(images.read(i)) for i in order.tolist()])
    part = {"features": order[:, None].double(), "index": order, "digests": pixel_digests(pixels)}
    (tmp_path / "e").mkdir()
    feature_folder._write(feature_folder._file(tmp_path, "e", 0), [part])
    found, read = feature_folder.read_features(tmp_path, "e", images)
    assert found.rows["features"][:, 0].tolist() == read
    assert found.classes.labels.tolist() == [number % 2 for number in read]


# --- references


def test_a_reference_file_gives_the_same_figures(whole, sets, look, run, tmp_path):
    run("reference", sets[1], *look, "--out", tmp_path / "real.safetensors")
    assert not (tmp_path / "real.safetensors.parts").exists()
    run("evaluate", sets[0], "--reference", tmp_path / "real.safetensors", *look, "--out", tmp_path / "out")
    assert values(tmp_path / "out") == whole
    kept = tmp_path / "whole/reference.safetensors"  # an evaluation leaves one as well
    run("evaluate", sets[0], "--reference", kept, *look, "--out", tmp_path / "again")
    assert values(tmp_path / "again") == whole


def test_a_reference_keeps_so_many_rows_and_all_moments(sets, look, encoder, run, tmp_path):
    for keep in (10, 26):
        run("reference", sets[1], *look, "--keep", keep, "--out", tmp_path / f"{keep}.safetensors")
    few, all_ = (load_file(tmp_path / f"{keep}.safetensors") for keep in (10, 26))
    assert len(few[f"{encoder}/features"]) == 10
    assert len(all_[f"{encoder}/features"]) == 26
    assert torch.equal(few[f"{encoder}/features.mean"], all_[f"{encoder}/features.mean"])


def digests_of(images: np.ndarray) -> torch.Tensor:
    return pixel_digests(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


@pytest.mark.parametrize("batch", [1, 5])
def test_which_rows_a_reference_keeps_knows_no_order(encoder, small_chunks, look, run, tmp_path, batch):
    """40 pictures, and 10 copies of one of them, of both classes in turn."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (50, 20, 16, 3), dtype=np.uint8), np.arange(50) % 2
    digests = digests_of(images)
    images[40:] = images[digests[:40].argsort()[20]]
    digests, keep = digests_of(images), 24  # 20 pictures, and 4 of the 11 copies: fewer than there are of one class
    for name, order, how in (("one", np.arange(50), []), ("other", random.permutation(50), ["--batch", batch])):
        np.savez(tmp_path / f"{name}.npz", arr_0=images[order], arr_1=labels[order])
        file = tmp_path / f"{name}.safetensors"
        run("reference", tmp_path / f"{name}.npz", *look, "--keep", keep, *how, "--out", file)
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=1e-5)
    assert torch.equal(one[f"{encoder}/digests"], digests.sort().values[:keep])
    assert one["labels"][-4:].tolist() == [0, 0, 0, 0]


def test_rows_that_an_earlier_version_kept_are_flagged(sets, look, run, tmp_path):
    def flagged(keep: int, drawn: str) -> bool:
        file, out = tmp_path / f"{keep}.safetensors", tmp_path / "out"
        run("reference", sets[1], *look, "--keep", keep, "--out", file)
        with safe_open(file, "pt") as opened:
            said = json.loads(opened.metadata()["reference"])
        save_file(load_file(file), file, metadata={"reference": json.dumps(said | {"drawn": drawn})})
        run("evaluate", sets[0], "--reference", file, *look, "--out", out)
        flags = json.loads((out / "evaluation.json").read_text())["flags"]
        return any(
            "which 10 of the reference's 26 images are compared one by one goes by their order" in flag
            for flag in flags
        )

    assert [flagged(10, "by place"), flagged(10, "by digest"), flagged(26, "by place")] == [True, False, False]


def test_larger_references_are_cropped_to_the_subject(sets, look, run, tmp_path):
    large = save_images(tmp_path / "large", 12, seed=5, size=(40, 50))
    run("evaluate", sets[0], "--reference", large, *look, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["reference"].items() >= {"size": [20, 16], "crop": "centre crop, as in training"}.items()
    said = "12 of 12 images of the reference have another size, and are scaled and cropped to the subject's 20 x 16"
    assert said in found["flags"]
    told = run("evaluate", sets[0], "--reference", sets[1], *look, "--out", tmp_path / "same")
    assert "are scaled and cropped" not in told


def test_a_reference_at_another_size_is_refused(sets, look, refused, run, tmp_path):
    run(
        "reference",
        save_images(tmp_path / "large", 12, seed=5, size=(40, 50)),
        *look,
        "--out",
        tmp_path / "r.safetensors",
    )
    told = refused("evaluate", sets[0], "--reference", tmp_path / "r.safetensors", *look, "--out", tmp_path / "out")
    assert "have 20 x 16 pixels" in told
    assert "40 x 50: figures across sizes mean nothing" in told
    assert "--size 40x50" in told
    assert not (tmp_path / "out").exists()  # before anything is computed


def test_a_reference_by_another_extractor_is_refused(sets, encoder, look, refused, run, tmp_path):
    file = tmp_path / "r.safetensors"
    run("reference", sets[1], "--features", encoder, "--input-size", 24, "--out", file)
    told = refused("evaluate", sets[0], "--reference", file, *look, "--out", tmp_path / "out")
    assert "is by another" in told
    assert "input_size [24, 24], now [16, 16]" in told


# --- models


def test_a_model_of_stage_2_is_sampled(runs, look, run, tmp_path):
    command = ["evaluate", runs / "dit", "--num", 12, "--steps", 3, "--cfg", 1.5, *look, "--out", tmp_path / "out"]
    real = save_images(tmp_path / "real", 12, seed=1, size=(16, 16))
    run(*command, "--reference", real)
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["subject"]["kind"] == "samples"
    assert found["subject"]["protocol"]["guidance"]["scale"] == 1.5
    assert len(list((tmp_path / "out/samples").glob("*.png"))) == 12
    run("evaluate", tmp_path / "out/samples", "--reference", real, *look, "--out", tmp_path / "again")
    assert values(tmp_path / "again") == values(tmp_path / "out")
    assert json.loads((tmp_path / "again/evaluation.json").read_text())["subject"]["kind"] == "samples"


def test_a_model_of_stage_1_reconstructs_what_it_is_compared_with(runs, look, run, tmp_path):
    real = save_images(tmp_path / "real", 12, seed=1, size=(24, 20))
    run("evaluate", runs / "decoder", "--reference", real, *look, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["subject"]["kind"] == "reconstructions"
    assert (found["subject"]["source"], found["reference"]["source"]) == (str(runs / "decoder"), str(real))
    assert found["figures"].keys() >= {"psnr", "ssim"}
    pairs = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "out/reconstructions").glob("*.png"))]
    both = torch.from_numpy(np.stack(pairs)).permute(0, 3, 1, 2).double() / 255
    original, decoded = both.chunk(2, dim=3)
    assert found["figures"]["psnr"]["value"] == pytest.approx(psnr(decoded, original).mean().item(), rel=1e-6)
    said = "12 images against 12 images that these are of"
    assert figures(tmp_path / "out")["frechet"]["protocol"] == said
    halves = [tmp_path / side for side in ("left", "right")]  # the same images, which nobody knows to be pairs
    for i, folder in enumerate(halves):
        folder.mkdir()
        for file in (tmp_path / "out/reconstructions").glob("*.png"):
            Image.fromarray(np.split(np.asarray(Image.open(file)), 2, axis=1)[i]).save(folder / file.name)
    run("evaluate", halves[1], "--reference", halves[0], *look, "--out", tmp_path / "apart")
    together, apart = (figures(tmp_path / name)["frechet"] for name in ("out", "apart"))
    assert together["value"] == pytest.approx(apart["value"], rel=1e-6)
    assert together["error"] != pytest.approx(apart["error"], rel=0.01)
    run("evaluate", tmp_path / "out/reconstructions", *look, "--out", tmp_path / "again")
    assert values(tmp_path / "again") == values(tmp_path / "out")


def test_pairs_are_compared_at_the_size_that_is_asked_for(runs, look, run, tmp_path):
    real = save_images(tmp_path / "real", 12, seed=1, size=(24, 20))
    for size in ("16", "12x11"):
        run("evaluate", runs / "decoder", "--reference", real, *look, "--size", size, "--out", tmp_path / size)
    pairs = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "16/reconstructions").glob("*.png"))]
    halves = [[np.split(pair, 2, axis=1)[i] for pair in pairs] for i in (0, 1)]
    for size, shape in (("16", (16, 16)), ("12x11", (12, 11))):
        x, y = (to_unit(torch.stack([to_tensor(center_crop(each, shape)) for each in half])) for half in halves)
        found = json.loads((tmp_path / size / "evaluation.json").read_text())
        assert found["subject"]["size"] == list(shape)
        assert found["figures"]["psnr"]["value"] == pytest.approx(psnr(y, x).mean().item(), rel=1e-6)
    assert values(tmp_path / "16")["psnr"] != pytest.approx(values(tmp_path / "12x11")["psnr"], rel=1e-3)


def test_more_samples_are_added_to_those_that_are_there(runs, look, run, tmp_path):
    command = ["evaluate", runs / "dit", "--steps", 2, *look, "--reference", "digits", "--enlarge", "--out"]
    run(*command, tmp_path / "out", "--num", 12)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/samples").glob("*.png")}
    told = run(*command, tmp_path / "out", "--num", 20)
    assert "features of other images" in told
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert (len(before), len(list((tmp_path / "out/samples").glob("*.png")))) == (12, 20)
    run(*command, tmp_path / "new", "--num", 20)
    assert values(tmp_path / "out") == pytest.approx(values(tmp_path / "new"), rel=0.01)  # a last chunk stays as it is
    assert figures(tmp_path / "out")["frechet"]["protocol"].startswith("20 images against")


def test_a_size_that_does_not_fit_is_refused_before_anything_is_made(runs, look, run, refused, tmp_path):
    large, small = (save_images(tmp_path / str(side), 12, seed=1, size=(side, side)) for side in (24, 12))
    run("reference", large, *look, "--out", tmp_path / "r.safetensors")
    command = ["evaluate", runs / "dit", "--num", 8, "--size", 16, *look, "--out", tmp_path / "out", "--reference"]
    assert "have 16 x 16 pixels, those of" in refused(*command, tmp_path / "r.safetensors")
    assert "12 x 12 pixels (height x width), smaller than the 16 x 16 asked for" in refused(*command, small)
    command = ["evaluate", runs / "dit", "--num", 8, *look, "--out", tmp_path / "out", "--reference"]
    assert "have 16 x 16 pixels, those of" in refused(*command, tmp_path / "r.safetensors")
    assert "24 x 24 pixels (height x width), smaller than the 32 x 32 asked" in refused(*command, large, "--size", 32)
    assert "makes images of 16 x 16 pixels" in refused(*command, large, "--size", 24)
    command = ["evaluate", runs / "decoder", "--reference", large, *look, "--out", tmp_path / "out"]
    told = refused(*command, "--size", "17x16")
    assert "makes images of 16 x 16 pixels (height x width), smaller than the 17 x 16 asked for" in told
    assert not (tmp_path / "out").exists()
    run(*command, "--size", "17x16", "--enlarge")


def test_samples_are_asked_for_their_class(runs, look, run, refused, tmp_path):
    reference = ["--reference", "digits", "--enlarge"]
    run("evaluate", runs / "dit", "--num", 20, "--steps", 2, *look, *reference, "--out", tmp_path / "out")
    found = figures(tmp_path / "out")["class_agreement"]
    assert found["better"] == "higher"
    assert found["protocol"].startswith("20 images against 1,797, k = 20; of real images among each other 0.")
    assert figures(tmp_path / "out")["frechet"]["error_of"] == "classes in turn, error within them"
    kept = tmp_path / "out/reference.safetensors"  # which knows the classes as well
    run("evaluate", tmp_path / "out/samples", "--reference", kept, *look, "--out", tmp_path / "again")
    assert figures(tmp_path / "again")["class_agreement"] == found
    (tmp_path / "out/samples/other.png").write_bytes((tmp_path / "out/samples/000000.png").read_bytes())
    command = ["evaluate", tmp_path / "out/samples", "--reference", kept, *look, "--out", tmp_path / "third"]
    assert "does not tell the class of every image" in refused(*command)


def test_real_images_with_classes_are_asked_as_well(sets, look, run, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        for kind, mean in (("dark", 40), ("light", 220)):
            save_images(tmp_path / name / kind, 15, seed=seed, mean=mean)
    command = ["evaluate", tmp_path / "a", *look, "--reference"]
    run(*command, tmp_path / "b", "--out", tmp_path / "out")
    assert figures(tmp_path / "out")["class_agreement"]["value"] > 0.8
    run(*command, tmp_path / "b", "--label", "", "--out", tmp_path / "alone")
    assert "class_agreement" not in figures(tmp_path / "alone")
    (tmp_path / "b/light").rename(tmp_path / "b/white")
    assert "the reference has no class 'light'" in run(*command, tmp_path / "b", "--out", tmp_path / "other")
    assert "class_agreement" not in figures(tmp_path / "other")


def test_columns_are_of_the_side_that_has_them(look, run, refused, tmp_path):
    for kind, mean in (("dark", 40), ("light", 220)):
        save_images(tmp_path / "folder" / kind, 15, seed=1, mean=mean)
    images = open_images(save_images(tmp_path / "flat", 30, seed=2))
    pixels, labels = np.stack([images[i][0] for i in range(30)]), np.arange(30) % 2
    table = tmp_path / "table.npz"
    np.savez(table, pixels=pixels, classes=labels)
    named = ["--image", "pixels", "--label", "classes"]
    for subject, reference in (("folder", "table.npz"), ("table.npz", "folder")):
        out = tmp_path / f"of-{subject}"
        run("evaluate", tmp_path / subject, "--reference", tmp_path / reference, *look, *named, "--out", out)
        assert "class_agreement" in figures(out)  # of the folder's classes and the table's
    neither = ["evaluate", tmp_path / "folder", "--reference", tmp_path / "flat", "--features", "no-such-encoder"]
    told = " ".join(refused(*neither, *named[2:], "--out", tmp_path / "out").split())
    assert "--label classes names a column, and neither" in told
    one = ["reference", tmp_path / "folder", *look, "--label", "classes", "--out", tmp_path / "x.safetensors"]
    assert "--label classes (in a recipe data.label=classes) names a column" in " ".join(refused(*one).split())


def test_a_name_that_one_side_lacks_is_the_other_s(look, run, tmp_path):
    """Samples of `rae sample --npz` against a table with two columns of classes."""
    images = [open_images(save_images(tmp_path / name, 30, seed=seed)) for seed, name in enumerate("ab")]
    ours, theirs = (np.stack([each[i][0] for i in range(30)]) for each in images)
    np.savez(tmp_path / "samples.npz", arr_0=ours, arr_1=np.arange(30) % 2)
    np.savez(tmp_path / "table.npz", pixels=theirs, fine=np.arange(30) % 2, coarse=np.zeros(30, int))
    named = ["--reference", tmp_path / "table.npz", "--image", "pixels", "--label", "fine"]
    told = " ".join(run("evaluate", tmp_path / "samples.npz", *named, *look, "--out", tmp_path / "out").split())
    assert "samples.npz has no fine (--label), only arr_0, arr_1: its default is taken" in told
    assert "samples.npz has no pixels (--image), only arr_0, arr_1: its default is taken" in told
    assert "class_agreement" in figures(tmp_path / "out")


def test_figures_of_no_scatter_have_bounds(sets, look, run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    far = save_images(tmp_path / "far", 21, seed=1, mean=250)
    told = run("evaluate", far, "--reference", sets[1], *look, "--out", tmp_path / "out")
    found = figures(tmp_path / "out")["coverage"]
    assert (found["value"], found["error"], found["bound"]) == (0, None, pytest.approx(1 - 0.05 ** (1 / 26)))
    assert figures(tmp_path / "out")["frechet"]["bound"] is None
    assert "none, below 11 %" in told
    assert BOUNDS in " ".join(told.split())


def test_whose_images_the_reference_holds(runs, look, run, tmp_path):
    """The runs are trained on a part of digits, 0.1 of which is held out."""

    def role(subject, reference, *more) -> tuple[str, str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        told = run("evaluate", subject, "--reference", reference, *look, *more, "--num", 20, "--out", out)
        return json.loads((out / "evaluation.json").read_text())["reference"]["role"], told

    found, told = role(runs / "decoder", "digits", "--enlarge")
    assert found == "training and held-out images"
    assert "holds training and held-out images of this autoencoder: published rFID is of images" in " ".join(
        told.split()
    )
    found, told = role(runs / "dit", "digits", "--enlarge", "--steps", 2)
    assert found == "training and held-out images"
    assert "published rFID" not in told
    other = save_images(tmp_path / "other", 20, seed=0, size=(16, 16))
    found, told = role(runs / "decoder", other)
    assert found == "unknown"
    assert "whether this autoencoder saw the reference's images is not known" in told


def test_the_role_of_images_is_told_by_their_identity(tmp_path):
    """Of the training images, the held-out ones, the first so many of them; given as images or by a file."""
    (tmp_path / "run/checkpoints/8/train").mkdir(parents=True)
    training, held_out, other = (save_images(tmp_path / name, 5 + i, seed=i) for i, name in enumerate("abc"))
    known = {folder: open_images(folder).identity for folder in (training, held_out, other)}
    (tmp_path / "run/checkpoints/8/train/state.json").write_text(json.dumps({"identity": {"images": known[training]}}))
    recipe = {"data": {"source": str(training), "held_out": str(held_out)}}
    (tmp_path / "run/recipe.yaml").write_text(json.dumps(recipe))

    def by_file(folder: Path, count: int | None) -> Reference:
        images = open_images(folder) if count is None else subset(open_images(folder), range(count))
        return Reference("r", features=Features({"identity": images.identity, "images": len(images)}, {}, []))

    for place in ("run", "run/checkpoints/8", "run/checkpoints/8/model"):
        for folder, role in ((training, "training images"), (held_out, "held-out images"), (other, "unknown")):
            assert role_of(str(tmp_path / place), Reference("r", images=open_images(folder))) == role
            for count in (None, 4):
                assert role_of(str(tmp_path / place), by_file(folder, count)) == role
    for file in held_out.iterdir():  # the images are not here any more
        file.unlink()
    assert role_of(str(tmp_path / "run"), by_file(held_out.parent / "c", None)) == "unknown"
    assert role_of(str(tmp_path), by_file(training, None)) == "unknown"  # no run
    assert role_of(str(tmp_path / "run/other/model"), by_file(training, None)) == "unknown"  # no place that a run has


def test_a_reference_of_adm_is_not_resized(encoder, tmp_path, refused, monkeypatch):
    """Its moments are of images at one size, whatever is done to the few that lie beside them."""
    monkeypatch.setattr(look_module, "open_extractor", lambda name, **_: open_extractor(str(encoder), input_size=16))
    large = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", large, mu=np.zeros(16), sigma=np.eye(16))
    samples = save_images(tmp_path / "samples", 12, seed=0, size=(20, 20))
    told = refused("evaluate", samples, "--reference", tmp_path / "adm.npz", "--out", tmp_path / "out")
    assert "have 20 x 20 pixels, those of" in told
    assert "adm.npz 40 x 40: figures across sizes mean nothing" in told


def test_moments_without_images_or_spatial_features(encoder, sets, tmp_path, refused, run, monkeypatch):
    """The tiny encoder stands for Inception: its features are spatial ones and logits as well."""
    inner = open_extractor(str(encoder), input_size=16)
    real = inner.forward
    inner.forward = lambda images: (found := real(images)) | {"spatial": found["features"], "logits": found["features"]}
    monkeypatch.setattr(look_module, "open_extractor", lambda name, **_: inner)
    pixels = np.stack([open_images(sets[1])[i][0] for i in range(26)])
    command = ["evaluate", sets[0], "--reference", tmp_path / "r.npz", "--out", tmp_path / "out"]
    np.savez(tmp_path / "r.npz", mu=np.zeros(16), sigma=np.eye(16))
    assert "holds moments but no images for the metrics" in refused(*command)
    np.savez(tmp_path / "r.npz", pixels, mu=np.zeros(16), sigma=np.eye(16))
    assert "no sFID, for" in run(*command)
    assert figures(tmp_path / "out").keys() == {*METRICS, "inception_score"}
    assert figures(tmp_path / "out")["frechet"]["protocol"] == "21 images against images of a number not known"
    np.savez(tmp_path / "r.npz", pixels, mu=np.zeros(16), sigma=np.eye(16), mu_s=np.zeros(16), sigma_s=np.eye(16))
    run(*command)
    found = values(tmp_path / "out")
    assert found["sfid"] == pytest.approx(found["frechet"])  # the same features and moments


def test_the_first_images_of_some_classes_only_are_flagged(look, run, tmp_path):
    for kind, mean in (("dark", 40), ("light", 220)):
        save_images(tmp_path / "real" / kind, 30, seed=1, mean=mean)
    command = ["evaluate", tmp_path / "real", "--reference", tmp_path / "real/dark", *look, "--out", tmp_path / "out"]
    assert "no images of 1 of 2 classes of the subject are among those used" in run(*command, "--num", 30)
    assert "are among those used" not in run(*command[:-1], tmp_path / "all")


def test_folders_without_images_beside_classes_are_flagged(look, run, tmp_path):
    for i, place in enumerate(("samples/a", "samples/b", "real/a", "real/b")):
        save_images(tmp_path / place, 12, seed=i)
    command = ["evaluate", tmp_path / "samples", "--reference", tmp_path / "real", *look, "--out"]
    assert "without images" not in run(*command, tmp_path / "full")
    (tmp_path / "samples/c").mkdir()
    (tmp_path / "real/d/deep").mkdir(parents=True)
    (tmp_path / "real/e").mkdir()
    told = run(*command, tmp_path / "out")
    flags = json.loads((tmp_path / "out/evaluation.json").read_text())["flags"]
    for said in (
        "folders of the subject without images, which are no classes of it (1): c",
        "folders of the reference without images, which are no classes of it (2): d, e",
    ):
        assert said in flags
        assert f"note: {said}" in told


# --- bad input


def test_features_that_are_not_finite_are_named(small_chunks, encoder, sets, look, refused, tmp_path, monkeypatch):
    inner = open_extractor(str(encoder), input_size=16)
    real, bad = inner.forward, to_tensor(open_images(sets[0])[18][0])

    def forward(images):
        found = real(images)
        found["features"][(images == bad).flatten(1).all(1), 3] = torch.nan
        return found

    inner.forward = forward
    monkeypatch.setattr(look_module, "open_extractor", lambda name, **_: inner)
    told = refused("evaluate", sets[0], "--reference", sets[1], *look, "--batch", 4, "--out", tmp_path / "out")
    said = f"018.png (image 18 of 21, counted from 0): its features by {encoder} are not finite, those of 1 of 4 images"
    assert said in " ".join(told.split())
    assert len(list((tmp_path / "out/features").rglob("*.safetensors"))) == 2  # those before it: nothing of its chunk


def test_mixed_sizes(sets, look, refused, run, tmp_path):
    mixed = save_images(tmp_path / "mixed", 10, seed=0)
    Image.new("RGB", (30, 30)).save(mixed / "odd.png")
    command = ["evaluate", mixed, "--reference", sets[1], *look, "--out", tmp_path / "out"]
    for how in ((), ("--skip-broken",)):
        told = refused(*command, *how)
        assert "odd.png is 30 x 30 pixels (height x width), not 20 x 16" in told
    run(*command, "--size", "16", "--out", tmp_path / "cropped")


def test_broken_images_are_named_and_left_out(sets, look, refused, run, tmp_path):
    images = save_images(tmp_path / "images", 12, seed=0)
    (images / "004.png").write_bytes(b"no png")
    command = ["evaluate", images, "--reference", sets[1], *look, "--out"]
    assert "004.png: cannot be decoded" in refused(*command, tmp_path / "out")
    assert "left out: " in run(*command, tmp_path / "skipped", "--skip-broken")
    found = json.loads((tmp_path / "skipped/evaluation.json").read_text())
    assert found["subject"]["images"] == 11
    assert "1 of 12 images of the subject cannot be read and is left out" in found["flags"]
    run("evaluate", sets[1], "--reference", images, *look, "--out", tmp_path / "other", "--skip-broken")
    flags = json.loads((tmp_path / "other/evaluation.json").read_text())["flags"]
    assert "1 of 12 images of the reference cannot be read and is left out" in flags
    assert figures(tmp_path / "skipped")["frechet"]["protocol"] == "11 images against 26 images"


def test_reconstructions_know_how_many_images_were_left_out(runs, look, run, refused, tmp_path):
    images = save_images(tmp_path / "images", 14, seed=1, size=(16, 16))
    for name in ("003.png", "013.png"):
        (images / name).write_bytes(b"no png")

    def evaluated(subject: Path, *arguments) -> tuple[int, int | None, int | None, list[str]]:
        """Images judged, those left out of the subject and of what it is compared with, what is said of them."""
        run("evaluate", subject, *arguments, *look, "--out", tmp_path / "out" / subject.name)
        found = json.loads((tmp_path / "out" / subject.name / "evaluation.json").read_text())
        flags = [flag for flag in found["flags"] if "cannot be read" in flag]
        return found["subject"]["images"], found["subject"]["skipped"], found["reference"]["skipped"], flags

    said = ["2 of 14 images of the subject cannot be read and are left out"]
    assert evaluated(runs / "decoder", "--reference", images, "--skip-broken") == (12, 2, 2, said)
    pairs = tmp_path / "out/decoder/reconstructions"
    assert evaluated(pairs) == (12, 2, 2, said)
    one = ["1 of 13 images of the subject cannot be read and is left out"]
    assert evaluated(shutil.copytree(pairs, tmp_path / "first"), "--num", 12) == (12, 1, 1, one)  # 013 comes later
    shutil.copytree(pairs, tmp_path / "interrupted")
    (tmp_path / "interrupted/figures.json").unlink()
    assert evaluated(tmp_path / "interrupted") == (12, None, None, [])  # not known
    shutil.copytree(pairs, tmp_path / "other")
    (tmp_path / "other/figures.json").write_text("{}")
    assert "figures.json is damaged" in refused("evaluate", tmp_path / "other", *look, "--out", tmp_path / "x")


@pytest.mark.parametrize("size", [[], ["--size", 12]])
def test_a_pair_that_cannot_be_read_is_left_out_of_all_figures(runs, look, run, refused, tmp_path, size):
    real = save_images(tmp_path / "real", 12, seed=1, size=(16, 16))
    run("reconstruct", runs / "decoder", real, "--out", tmp_path / "pairs")
    whole = shutil.copytree(tmp_path / "pairs", tmp_path / "whole")
    (whole / "000003.png").unlink()  # as if it had never been
    broken = tmp_path / "pairs/000003.png"
    broken.write_bytes(broken.read_bytes()[:60])
    command = ["evaluate", tmp_path / "pairs", *look, *size, "--out", tmp_path / "out"]
    assert "000003.png: cannot be decoded" in refused(*command)
    run(*command, "--skip-broken")
    run("evaluate", whole, *look, *size, "--out", tmp_path / "without")
    found = figures(tmp_path / "out")
    assert found["psnr"]["protocol"] == "mean over 11 images and what they are of, 8 bits"
    assert values(tmp_path / "out") == pytest.approx(values(tmp_path / "without"), rel=1e-6)


def test_reconstructions_of_labelled_arrays_are_of_the_images_that_rae_reconstruct_knows(runs, look, run, tmp_path):
    """So `rae report` sets them side by side: labels play no part in what images these are."""
    images, source = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8), tmp_path / "x.npz"
    np.savez(source, arr_0=images, arr_1=np.arange(12) % 2)
    run("reconstruct", runs / "decoder", source, "--out", tmp_path / "pairs")
    run("evaluate", runs / "decoder", "--reference", source, *look, "--out", tmp_path / "out")
    folders = tmp_path / "pairs", tmp_path / "out/reconstructions"
    found = [json.loads((folder / "reconstructions.json").read_text()) for folder in folders]
    assert found[0] == found[1]


def test_a_reference_file_knows_how_many_images_were_left_out(sets, look, run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    images = save_images(tmp_path / "images", 12, seed=0)
    for name in ("004.png", "009.png"):
        (images / name).write_bytes(b"no png")

    def evaluated(file: Path) -> tuple[int | None, list[str]]:
        out = tmp_path / "out" / file.parent.name / file.stem
        run("evaluate", sets[0], "--reference", file, *look, "--out", out)
        found = json.loads((out / "evaluation.json").read_text())
        assert found["subject"]["skipped"] == 0
        return found["reference"]["skipped"], [flag for flag in found["flags"] if "cannot be read" in flag]

    file = tmp_path / "r.safetensors"
    output = run("reference", images, *look, "--skip-broken", "--out", file)
    (row,) = [line for line in output.splitlines() if "r.safetensors" in line]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["10", "2", "10"]  # images, left out, rows kept
    said = "2 of 12 images of the reference cannot be read and are left out"
    assert evaluated(file) == (2, [said])
    run("evaluate", sets[1], "--reference", images, *look, "--skip-broken", "--out", tmp_path / "other")
    assert evaluated(tmp_path / "other/reference.safetensors") == (2, [said])  # an evaluation leaves one as well
    run("reference", sets[1], *look, "--out", tmp_path / "whole.safetensors")
    assert evaluated(tmp_path / "whole.safetensors") == (0, [])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["SAMPLES"], "say what its images are compared with"),
        (["SAMPLES", "--reference", "REAL", "--num", 99], "holds 21 images, 99 are asked for"),
        (["SAMPLES", "--reference", "REAL", "--num", 4], "too few"),
        (["SAMPLES", "--reference", "REAL", "--cfg", 2], "--cfg is of models of stage 2"),
        (["SAMPLES", "--reference", "REAL", "--lpips"], "--lpips is of reconstructions and what they are of"),
        (["SAMPLES", "--reference", "nowhere"], "nowhere: no such folder"),
        (["DIT", "--reference", "REAL"], "Say how many samples to make"),
        (["DIT", "--num", 9], "say what its images are compared with"),
        (["DECODER", "--reference", "REAL", "--num", 99], "99 images are asked for, there are 26"),
        (["DECODER"], "is an autoencoder: its reconstructions are compared with the images"),
    ],
)
def test_what_cannot_be_judged(sets, runs, look, refused, tmp_path, arguments, told):
    places = {"SAMPLES": sets[0], "REAL": sets[1], "DIT": runs / "dit", "DECODER": runs / "decoder"}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert told in " ".join(refused("evaluate", *arguments, *look, "--out", tmp_path / "out").split())


def test_too_few_images_are_refused_before_anything_is_computed(sets, runs, look, refused, run, tmp_path):
    few = save_images(tmp_path / "few", 5, seed=0)
    run("reference", few, *look, "--out", tmp_path / "r.safetensors")
    out = ["--out", tmp_path / "out"]
    for subject, reference, told in (
        (few, sets[1], "few: 5 images are too few to be judged by; give at least 8"),
        (sets[0], few, "few: 5 images are too few to be judged by; give at least 6"),
        (sets[0], tmp_path / "r.safetensors", "r.safetensors: 5 images are too few"),
        (runs / "decoder", few, "few: 5 images are too few to be judged by; give at least 8"),
    ):
        assert told in refused("evaluate", subject, "--reference", reference, *look, *out)
    told = refused("evaluate", runs / "dit", "--reference", sets[1], "--num", 7, *look, *out)
    assert "dit: 7 images are too few" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["./enc", "../enc", ".enc"])
def test_features_lie_in_no_hidden_folder(tmp_path, name):
    assert feature_folder._place(tmp_path, name) == tmp_path / "_enc"


@pytest.mark.parametrize("into", ["", "judged", "deep/judged"])
def test_no_pictures_are_written_into_the_images_that_are_read(sets, runs, look, refused, tmp_path, into):
    real = shutil.copytree(sets[1], tmp_path / "real")
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes/noise").symlink_to(real)
    before = sorted(tmp_path.rglob("*"))
    for model in ("decoder", "dit"):
        num = ["--num", 12] if model == "dit" else []
        for reference, inside in ((real, real), (real.parent / "classes", real.parent / "classes/noise")):
            told = refused("evaluate", runs / model, "--reference", reference, *num, *look, "--out", real / into)
            assert f"--out {real / into} is inside {inside}, where what is written would be taken for its image" in told
    assert sorted(tmp_path.rglob("*")) == before


def test_no_pictures_are_written_into_the_images_of_a_reference_file(runs, look, refused, run, tmp_path):
    real = save_images(tmp_path / "real", 12, seed=1, size=(16, 16))
    run("reference", real, *look, "--out", tmp_path / "r.safetensors")
    before = sorted(tmp_path.rglob("*"))
    command = ["evaluate", runs / "dit", "--reference", tmp_path / "r.safetensors", "--num", 12, *look, "--out"]
    assert f"is inside {real}, where what is written" in refused(*command, real / "judged")
    assert sorted(tmp_path.rglob("*")) == before


def test_no_pictures_are_written_into_the_images_of_a_run(runs, refused, tmp_path):
    decoder, real = shutil.copytree(runs / "decoder", tmp_path / "run"), save_images(tmp_path / "real", 12, seed=1)
    text = (decoder / "recipe.yaml").read_text()
    for key, was in (("source", "digits"), ("held_out", "0.1")):
        own = save_images(tmp_path / key, 2, seed=2)
        assert f"\n  {key}: {was}\n" in text
        (decoder / "recipe.yaml").write_text(text.replace(f"\n  {key}: {was}\n", f"\n  {key}: {own}\n"))
        before = sorted(tmp_path.rglob("*"))
        unopened = ["evaluate", decoder, "--reference", real, "--features", "nothing"]
        for command in (unopened, ["reconstruct", decoder, real]):
            assert f"is inside {own}, where what is written" in refused(*command, "--out", own / "judged")
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("into", ["", "judged", "dark/judged"])
def test_features_and_figures_may_lie_among_images(look, run, tmp_path, flat, into):
    """They change neither which images nor which classes there are."""
    for i, kind in enumerate(("dark", "light")):
        save_images(tmp_path / "images" / kind, 12, seed=i, mean=60 + 100 * i)
        save_images(tmp_path / "real" / kind, 12, seed=8 + i, mean=60 + 100 * i)
    images, real = (tmp_path / name / ("dark" if flat else "") for name in ("images", "real"))
    before = [open_images(folder) for folder in (images, real)]
    for folder in (images, real):
        run("evaluate", images, "--reference", real, *look, "--out", folder / into)
        assert not any(
            "without images" in flag for flag in json.loads((folder / into / "evaluation.json").read_text())["flags"]
        )
    run("reference", real, *look, "--out", real / into / "r.safetensors")
    if not flat:
        run("probe", images, "pixels@12", "--neighbours", 5, "--out", images / "probed")
    for was, now in zip(before, (open_images(images), open_images(real))):
        assert (now.identity, now.class_names, now.names) == (was.identity, was.class_names, was.names)
    told = run("evaluate", images, "--reference", real, *look, "--out", tmp_path / "elsewhere")
    assert "without images" not in told


def test_an_evaluation_may_lie_in_the_run_that_it_is_of(runs, look, run, tmp_path):
    decoder, real = shutil.copytree(runs / "decoder", tmp_path / "run"), save_images(tmp_path / "real", 8, seed=1)
    run("evaluate", decoder, "--reference", real, *look, "--out", decoder / "judged")
    assert (decoder / "judged/evaluation.json").is_file()


def test_a_name_in_brackets_is_printed_as_it_is(sets, look, run, tmp_path):
    told = run("evaluate", sets[0], "--reference", sets[1], *look, "--out", tmp_path / "j [v2]")
    assert f"written: {tmp_path}/j [v2]/evaluation.json" in told


def test_weights_that_nobody_asked_for(sets, encoder, refused, tmp_path):
    command = ["evaluate", sets[0], "--reference", sets[1], "--out", tmp_path / "out"]
    assert "weights of Inception, which" in refused(*command, "--features", encoder, "--inception", tmp_path / "w.pth")
    assert "--input-size 56 is of encoders" in refused(*command, "--input-size", 56)


def test_two_commands_do_not_work_in_one_folder(sets, look, run, refused, tmp_path):
    for command, out, held in (
        (["evaluate", sets[0], "--reference", sets[1], *look], "judged", "judged"),
        (["reference", sets[0], *look], "r.safetensors", "r.safetensors.parts"),
        (["probe", "digits", "pixels@8", "--num", 100], "probed", "probed"),
    ):
        with locked(tmp_path / held, RuntimeError()):
            assert f"another process is at work in {tmp_path / held}; wait" in refused(
                *command, "--out", tmp_path / out
            )
        run(*command, "--out", tmp_path / out)


def test_a_file_in_the_way_is_told_before_anything_is_opened(sets, refused, tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/judged"):
        told = refused("evaluate", sets[0], "--reference", "nowhere", "--features", "nothing", "--out", tmp_path / out)
        assert f"{tmp_path / 'file'} is a file; give a folder." in told


def test_a_folder_with_the_evaluation_of_others_is_refused(sets, look, refused, run, tmp_path, monkeypatch):
    out = ["--out", tmp_path / "out"]
    run("evaluate", sets[0], "--reference", sets[1], *look, *out)
    before = (tmp_path / "out/evaluation.json").read_bytes()
    run("reference", sets[0], *look, "--out", tmp_path / "r.safetensors")
    for subject, reference, told in (
        (sets[1], sets[1], f"is of another subject, {sets[0]}, not {sets[1]}; give another folder"),
        (sets[0], sets[0], f"is of another reference, {sets[1]}, not {sets[0]}; give another folder"),
        (sets[0], tmp_path / "r.safetensors", f"is of another reference, {sets[1]}, not {sets[0]}; give another"),
    ):
        assert told in refused("evaluate", subject, "--reference", reference, *look, *out)
    assert (tmp_path / "out/evaluation.json").read_bytes() == before
    monkeypatch.chdir(sets[0].parent)
    run("evaluate", "samples", "--reference", "./real", *look, *out)  # by another path
    run("evaluate", shutil.copytree(sets[0], tmp_path / "copy"), "--reference", "real", *look, *out)  # the same images
    (tmp_path / "out/evaluation.json").write_text("{}")
    told = refused("evaluate", sets[0], "--reference", sets[1], *look, *out)
    assert "evaluation.json is damaged (KeyError('subject')); remove it" in told


def test_a_folder_with_the_evaluation_of_others_is_refused_before_a_model_makes_images(
    sets, runs, look, refused, run, tmp_path
):
    real, other = (save_images(tmp_path / name, 12 + seed, seed=seed) for seed, name in enumerate("ro"))
    run("evaluate", sets[0], "--reference", real, *look, "--out", tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    dit = ["evaluate", runs / "dit", "--num", 8, "--steps", 2, *look, "--reference"]
    decoder = ["evaluate", runs / "decoder", *look, "--reference"]
    for command, model in ((dit, "dit"), (decoder, "decoder")):
        told = refused(*command, real, "--out", tmp_path / "out")
        assert f"is of another subject, {sets[0]}, not {runs / model}; give another folder" in told
    assert sorted(tmp_path.rglob("*")) == before
    for command, made in ((dit, "samples"), (decoder, "reconstructions")):
        out = tmp_path / made
        run(*command, real, "--out", out)
        shutil.rmtree(out / made)
        before = sorted(tmp_path.rglob("*"))
        told = refused(*command, other, "--out", out)
        assert f"is of another reference, {real}, not {other}; give another folder" in told
        assert sorted(tmp_path.rglob("*")) == before
        run(*command, real, "--out", out)  # what was removed is made again
        copy = shutil.copytree(real, tmp_path / f"copy of {real.name}", dirs_exist_ok=True)
        run(*command, copy, "--out", out)  # the same images by another name
        shutil.copy(tmp_path / "out/evaluation.json", out)  # what a model made lies beside the evaluation of others
        before = sorted(tmp_path.rglob("*"))
        told = refused(*command, real, "--num", 10, "--out", out)
        assert f"is of another subject, {sets[0]}, not" in told
        assert sorted(tmp_path.rglob("*")) == before


# --- folders of features


def test_images_that_were_added_are_judged_with_the_others(sets, look, run, tmp_path):
    samples = shutil.copytree(sets[0], tmp_path / "samples")
    command = ["evaluate", samples, "--reference", sets[1], *look, "--out"]
    run(*command, tmp_path / "out")
    (first,) = (tmp_path / "out/features").iterdir()
    for i, file in enumerate(sorted(save_images(tmp_path / "more", 10, seed=9).iterdir())):
        file.rename(samples / f"{50 + i:03d}.png")
    told = run(*command, tmp_path / "out")
    assert f"note: {first} is removed: features of other images, at another size" in told
    (second,) = (tmp_path / "out/features").iterdir()
    assert second != first
    run(*command, tmp_path / "new")
    assert values(tmp_path / "out") == values(tmp_path / "new")
    assert figures(tmp_path / "out")["frechet"]["protocol"] == "31 images against 26 images"
    second.rename(tmp_path / "out/features/of an earlier version")
    assert "of an earlier version is removed" in run(*command, tmp_path / "out")
    (tmp_path / "out/features/of the user").mkdir()
    assert "is removed" not in run(*command, tmp_path / "out")


def test_what_rae_probe_keeps_in_the_same_folder_stays(look, run, tmp_path):
    for i, name in enumerate(("dark", "light")):
        save_images(tmp_path / "real" / name, 12, seed=i, size=(16, 16), mean=60 + 100 * i)
    command = ["probe", tmp_path / "real", "pixels@16", "--neighbours", 5, "--out", tmp_path / "out"]
    run(*command)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/features").rglob("*.safetensors")}
    judged = ["--reference", save_images(tmp_path / "other", 12, seed=9, size=(16, 16)), "--out", tmp_path / "out"]
    (tmp_path / "out/features/damaged").mkdir()
    (tmp_path / "out/features/damaged/features.json").write_text("")
    assert "is removed" not in run("evaluate", tmp_path / "real", *judged, *look)
    run(*command)
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_features_of_which_some_are_needed_stay(tmp_path):
    for name in ("old", "new"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "features.json").write_text(json.dumps({"old": name == "old"}))
    look_module.remove_features(tmp_path, lambda place, about: about["old"])
    assert (tmp_path / "both/old").is_dir()
    look_module.remove_features(tmp_path, lambda place, about: True)
    assert not (tmp_path / "both").exists()


def test_features_of_images_that_were_enlarged_are_not_those_of_images_that_may_not_be(
    sets, look, run, refused, tmp_path
):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in sets]
    for folder in folders:
        save_images(folder, 1, seed=0, size=(32, 32))  # the first one, which is asked before all others, is large
    command = ["evaluate", folders[0], "--reference", folders[1], *look, "--size", 24, "--out", tmp_path / "out"]
    run(*command, "--enlarge")
    assert "smaller than the 24 x 24 asked for" in refused(*command)


def test_what_was_left_out_is_read_once_for_all_extractors(sets, look, run, tmp_path, monkeypatch):
    from tiny import save_encoder

    samples, read = shutil.copytree(sets[0], tmp_path / "samples"), []
    (samples / "003.png").write_bytes(b"x")
    check = look_module.check_left_out
    monkeypatch.setattr(look_module, "check_left_out", lambda *given: read.append(given[1]) or check(*given))
    both = [*look, "--features", save_encoder(tmp_path / "other", patch_size=4), "--skip-broken"]
    run("evaluate", samples, "--reference", sets[1], *both, "--out", tmp_path / "out")
    assert read == [{*range(21)} - {3}, {*range(26)}]


def test_another_extractor_leaves_the_features_of_the_first(sets, look, run, tmp_path):
    from tiny import save_encoder

    other = ["--features", save_encoder(tmp_path / "other", patch_size=4), "--input-size", 16]
    for extractor in (look, other):
        told = run("evaluate", sets[0], "--reference", sets[1], *extractor, "--out", tmp_path / "out")
        assert "is removed" not in told
    for side in ("features", "reference"):
        assert len(list((tmp_path / "out" / side).glob("*/*/features.json"))) == 2


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("number", [8, 13])  # the first one of the second chunk, and another one
def test_features_of_images_that_were_changed_are_refused(
    small_chunks, sets, look, run, refused, tmp_path, side, number
):
    """BMP files of one size have as many bytes whatever is in them, which is what an identity is made of."""
    folders = [turned(folder, tmp_path / folder.name, ".bmp") for folder in sets]
    command = ["evaluate", folders[0], "--reference", folders[1], *look, "--out", tmp_path / "out"]
    run(*command)
    run(*command)
    file = sorted(folders[side].iterdir())[number]
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    told = " ".join(refused(*command).split())
    assert f"{file} has other pixels than when" in told
    place = tmp_path / "out" / ("features", "reference")[side]
    assert "000001.safetensors was made of it" in told
    (stale,) = place.glob("*/*")
    assert f"Remove {stale} and run the same command again" in told
    before = values(tmp_path / "out")
    shutil.rmtree(stale)
    run(*command)
    assert values(tmp_path / "out")["frechet"] != before["frechet"]


def test_images_that_were_copied_are_read_again_once(small_chunks, sets, look, run, tmp_path, monkeypatch):
    compared, loader = [], feature_folder.loader

    def counted(views, batches, data):
        compared.append(len(batches))
        return loader(views, batches, data)

    monkeypatch.setattr(feature_folder, "loader", counted)
    samples = shutil.copytree(sets[0], tmp_path / "samples")
    command = ["evaluate", samples, "--reference", sets[1], *look, "--out", tmp_path / "out"]
    for _ in range(2):
        run(*command)
    for file in samples.iterdir():
        file.write_bytes(file.read_bytes())
    for _ in range(2):
        run(*command)
    assert compared == [0, 0, 3, 4, 21, 4, 3, 4]  # chunks of 8


def test_images_that_can_or_cannot_be_read_now_are_changed(small_chunks, sets, look, run, refused, tmp_path):
    samples = shutil.copytree(sets[0], tmp_path / "samples")
    size = (samples / "008.png").stat().st_size
    command = ["evaluate", samples, "--reference", sets[1], *look, "--skip-broken", "--out", tmp_path / "out"]
    for i in range(8):
        (samples / f"{i:03d}.png").write_bytes(b"x" * 100)  # a chunk of which nothing can be read
    run(*command)
    run(*command)
    (samples / "008.png").write_bytes(b"x" * size)
    assert "008.png has other pixels than when" in refused(*command)


@pytest.mark.parametrize("side", [0, 1])
def test_what_was_left_out_is_asked_for_again(sets, look, run, refused, tmp_path, side):
    """Of a file that is damaged and mended the size in bytes may stay, which is what an identity is made of."""
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in sets]
    file = folders[side] / "003.png"
    sound = file.read_bytes()
    file.write_bytes(b"x" * len(sound))
    command = ["evaluate", folders[0], "--reference", folders[1], *look, "--out", tmp_path / "out"]
    run(*command, "--skip-broken")
    assert f"{file}: cannot be decoded" in refused(*command)
    assert f"left out: {file} cannot be read" in run(*command, "--skip-broken")
    file.write_bytes(sound)
    for how in ([], ["--skip-broken"]):
        told = " ".join(refused(*command, *how).split())
        assert f"{file} could not be read when" in told
        assert "and can be now" in told
    (place,) = (tmp_path / "out" / ("features", "reference")[side]).iterdir()
    assert f"Remove {place} and run the same command again" in told
    shutil.rmtree(place)
    assert "cannot be read" not in run(*command)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_start_once_for_all_chunks(small_chunks, sets, look, run, tmp_path, monkeypatch, workers):
    loader, started = images_module.loader, []

    def counted(views, batches, data):
        started.append(len(batches))
        return loader(views, batches, data)

    monkeypatch.setattr(images_module, "loader", counted)
    command = ["evaluate", sets[0], "--reference", sets[1], *look, "--batch", 5, "--workers", workers, "--out"]
    run(*command, tmp_path / "out")
    assert started == [2 + 2 + 1, 2 + 2 + 2 + 1]  # chunks of 8, 8, 5; of 8, 8, 8, 2
    run(*command, tmp_path / "out")
    assert started[2:] == [0, 0]
    (missing,) = (tmp_path / "out/features").rglob("000001.safetensors")
    missing.unlink()
    run(*command, tmp_path / "out")
    assert started[4:] == [2, 0]


def test_every_image_of_a_reference_that_is_cropped_is_counted(look, run, tmp_path):
    samples = save_images(tmp_path / "samples", 12, seed=0, size=(16, 16))
    mixed = save_images(tmp_path / "mixed", 20, seed=1, size=(40, 40))
    save_images(tmp_path / "small", 1, seed=2, size=(16, 16))
    (tmp_path / "small/000.png").replace(mixed / "000.png")  # the first one has the subject's size
    (mixed / "001.png").write_bytes(b"no png")
    command = ["evaluate", samples, "--reference", mixed, *look, "--skip-broken", "--out", tmp_path / "out"]
    said = "18 of 19 images of the reference have another size, and are scaled and cropped to the subject's 16 x 16"
    for _ in range(2):  # also where nothing is computed
        run(*command)
        assert said in json.loads((tmp_path / "out/evaluation.json").read_text())["flags"]


def test_the_same_images_twice_are_flagged(sets, look, run, tmp_path):
    output = run("evaluate", sets[1], "--reference", sets[1], *look, "--out", tmp_path / "out")
    assert "subject and reference are the same images" in output
    assert values(tmp_path / "out")["frechet"] == pytest.approx(0, abs=1e-9)


def test_the_same_images_in_other_files_are_flagged(sets, look, run, tmp_path):
    other = turned(sets[1], tmp_path / "other", ".bmp")
    said = "subject and reference are the same images"
    assert said in run("evaluate", other, "--reference", sets[1], *look, "--out", tmp_path / "out")
    (other / "99.bmp").unlink()
    run("reference", other, *look, "--out", tmp_path / "r.safetensors")
    for reference, out in ((other, "images"), (tmp_path / "r.safetensors", "file")):
        told = run("evaluate", sets[1], "--reference", reference, *look, "--out", tmp_path / out)
        assert "25 of the subject's 26 images are also in the reference" in told
        assert said not in told
    told = run("evaluate", sets[0], "--reference", sets[1], *look, "--out", tmp_path / "different")
    assert "images are also in" not in told


def test_images_of_the_same_names_and_bytes_are_not_the_same(look, run, tmp_path):
    """Which is all that an identity knows: BMP files of one size are as long whatever is in them."""
    for seed, name in enumerate("ab"):
        turned(save_images(tmp_path / "png" / name, 20, seed=seed), tmp_path / name, ".bmp")
    assert open_images(tmp_path / "a").identity == open_images(tmp_path / "b").identity
    told = run("evaluate", tmp_path / "a", "--reference", tmp_path / "b", *look, "--out", tmp_path / "out")
    assert "the same images" not in told
    assert values(tmp_path / "out")["frechet"] > 0.01


SAME = "subject and reference are the same images: distances are 0 whatever these are"


@pytest.mark.parametrize("left_by", ["reference", "evaluate"])
def test_a_reference_file_knows_all_of_its_images(sets, look, run, tmp_path, left_by):
    """The subject has 12 of the 26 images; `rae reference` keeps the features of 10."""
    images, subject = turned(sets[1], tmp_path / "images", ".png"), save_images(tmp_path / "subject", 8, seed=7)
    for i in range(12):
        shutil.copy(images / f"{99 - i}.png", subject / f"other {i}.png")
    if left_by == "reference":
        file = tmp_path / "r.safetensors"
        run("reference", images, *look, "--keep", 10, "--out", file)
    else:
        file = tmp_path / "first/reference.safetensors"
        run("evaluate", sets[0], "--reference", images, *look, "--out", file.parent)
    kept = load_file(file)["digests"]
    assert (len(kept), bool((kept.diff() > 0).all())) == (26, True)
    for name, compared, said in (
        ("some", subject, "12 of the subject's 20 images are also in the reference"),
        ("all", sets[1], SAME),
    ):
        run("evaluate", compared, "--reference", file, *look, "--out", tmp_path / name)
        assert said in json.loads((tmp_path / name / "evaluation.json").read_text())["flags"]


def test_what_a_reference_of_an_earlier_version_does_not_know_is_said(sets, encoder, look, run, tmp_path):
    known = sets[1], ["digests"]  # of the rows alone, in files of the version before
    unknown = [f"{encoder}/digests", "digests"]
    again = f"is not known, for an earlier version made the file; make it again with `rae reference {sets[1]}`"
    among = "among the 10 of the reference's 26 images that the file keeps; whether they are among the others"
    for i, (subject, gone, keep, said) in enumerate(
        [
            (*known, 10, f"10 of the subject's 26 images are also {among} {again}"),
            (*known, 26, SAME),
            (sets[0], ["digests"], 10, f"0 of the subject's 21 images are also {among} {again}"),
            (sets[0], ["digests"], 26, None),
            (sets[1], unknown, 10, SAME),  # by their identity
            (sets[0], unknown, 10, f"whether images of the subject are also in the reference {again}"),
        ]
    ):
        file = tmp_path / f"{i}.safetensors"
        run("reference", sets[1], *look, "--keep", keep, "--out", file)
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["reference"])
        tensors = {name: value for name, value in load_file(file).items() if name not in gone}
        about["sha256"] = reference_module._digest(tensors)
        save_file(tensors, file, metadata={"reference": json.dumps(about)})
        run("evaluate", subject, "--reference", file, *look, "--out", tmp_path / str(i))
        flags = json.loads((tmp_path / str(i) / "evaluation.json").read_text())["flags"]
        assert [flag for flag in flags if "no more than" not in flag] == ([said] if said else [])


def test_images_beside_moments_of_adm_are_not_all_that_these_are_of(encoder, sets, run, tmp_path, monkeypatch):
    inner = open_extractor(str(encoder), input_size=16)
    real = inner.forward
    inner.forward = lambda images: (found := real(images)) | {"logits": found["features"]}
    monkeypatch.setattr(look_module, "open_extractor", lambda name, **_: inner)
    pixels = np.stack([open_images(sets[1])[i][0] for i in range(26)])
    adm = tmp_path / "adm.npz"
    np.savez(adm, pixels, mu=np.zeros(16), sigma=np.eye(16))
    said = f"26 of the subject's 26 images are also among the 26 that {adm} holds beside its moments"
    for subject, shared in ((sets[1], True), (sets[0], False)):
        out = tmp_path / subject.name
        run("evaluate", subject, "--reference", adm, "--out", out)
        flags = json.loads((out / "evaluation.json").read_text())["flags"]
        assert [flag for flag in flags if "images are" in flag and "no more" not in flag] == [said] * shared
        assert values(out)["frechet"] > 0.1


@pytest.mark.parametrize(("count", "enough"), [(67, False), (68, True)])  # parts of 16 and of 17, for 16 features
def test_a_distance_of_infinitely_many_of_too_few_is_left_out(
    sets, encoder, look, run, tmp_path, monkeypatch, count, enough
):
    monkeypatch.setenv("COLUMNS", "400")
    samples, out = save_images(tmp_path / "samples", count, seed=3), tmp_path / "out"
    output = run("evaluate", samples, "--reference", sets[1], *look, "--out", out)
    found, name = json.loads((out / "evaluation.json").read_text()), f"frechet_infinite/{encoder}"
    assert figures(out).keys() - METRICS == ({"frechet_infinite"} if enough else set())
    why = "its line takes more images than features in N / 4: of 16 at least 68, there are 67"
    missing = {} if enough else {name: {"title": f"FD of infinitely many ({encoder})", "why": why}}
    assert found["left_out"] == missing
    rows = [line for line in output.splitlines() if "infinitely many" in line]
    assert ["left out" in row and why in row for row in rows] == [not enough]
    if enough:  # in any order
        run(
            "evaluate",
            turned(samples, tmp_path / "turned", ".png"),
            "--reference",
            sets[1],
            *look,
            "--out",
            tmp_path / "o",
        )
        assert figures(tmp_path / "o")["frechet_infinite"] == pytest.approx(figures(out)["frechet_infinite"])


def test_jpeg_files_are_flagged(sets, look, run, tmp_path):
    samples = save_images(tmp_path / "samples", 20, seed=3, suffix=".jpg")
    assert "20 of the subject's images are JPEG" in run(
        "evaluate", samples, "--reference", sets[1], *look, "--out", tmp_path / "out"
    )
