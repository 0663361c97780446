"""Studies: rows that a kill does not lose, protocols that do not mix, intervals, and the page."""

import fcntl
import itertools
import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import png

from rae.evaluation.report import curves
from rae.experiments import NAMES, find_study
from rae.experiments.drawing import ABOVE, BELOW, GAP, SCALE, read_picture, sheet
from rae.experiments.frame import Difference, Drawing, Results, Study, Verdict, draws, seed_of
from rae.experiments.page import write_page
from rae.experiments.runner import read_rows, run_study

CALLS = []  # (setting, seed) of every run that was made, in order


def measure(config, setting, seed, place) -> dict[str, float]:
    """Numbers that depend on the seed, and on the setting by exactly its shift."""
    CALLS.append((setting, seed))
    common = torch.randn((), generator=draws("small", seed)).item()
    return {"loss": common + config["shift"], "steps": config["steps"]}


def by_interval(results: Results) -> Verdict:
    low, high = results.difference("loss", "b", "a").interval
    if low > 0:
        return Verdict("agrees", "b is above a.")
    return Verdict("does not agree" if high < 0 else "cannot tell", "b is not above a.")


def study(**changes) -> Study:
    return Study(
        **{
            "name": "small",
            "question": "Is b above a?",
            "claim": "It is, by 1 (Table 0).",
            "protocol": {"steps": 10, "shift": 0.0},
            "settings": {"a": {}, "b": {"shift": 1.0}},
            "quick": {"steps": 1},
            "cost": "nothing",
            "rule": "Agrees if the interval of b - a is above 0.",
            "judge": by_interval,
            "run": measure,
            "shown": {"loss": "loss"},
            "figures": lambda results: [curves({"loss": ([0, 1], [2, 3])}, "Loss", "x", "y")],
            "paper": {"b": {"loss": 1.5}},
            "pairs": [("loss", "b", "a")],
        }
        | changes
    )


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "small.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


# --- rows


def test_every_setting_runs_once_with_every_seed_and_first_with_seed_0(tmp_path):
    run_study(study(), tmp_path, seeds=2)
    assert CALLS == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [(row["setting"], row["seed"]) for row in rows(tmp_path)] == CALLS
    assert rows(tmp_path)[1]["config"] == {"steps": 10, "shift": 1.0}
    assert rows(tmp_path)[0].keys() >= {"numbers", "commit", "hardware", "threads", "versions", "seconds", "time"}


def test_a_second_run_makes_what_is_missing_and_leaves_the_rest_alone(tmp_path):
    run_study(study(), tmp_path, seeds=1)
    before = (tmp_path / "small.jsonl").read_bytes()
    CALLS.clear()
    run_study(study(), tmp_path, seeds=3)
    assert CALLS == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert (tmp_path / "small.jsonl").read_bytes().startswith(before)
    CALLS.clear()
    run_study(study(), tmp_path, seeds=3)
    assert CALLS == []


def test_a_line_that_a_kill_cut_short_is_made_again(tmp_path):
    run_study(study(), tmp_path, seeds=2)
    file = tmp_path / "small.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    CALLS.clear()
    run_study(study(), tmp_path, seeds=2)
    assert CALLS == [("a", 1), ("b", 1)]
    assert file.read_bytes().startswith(b"".join(lines[:2]))
    assert [row["numbers"] for row in rows(tmp_path)] == [json.loads(line)["numbers"] for line in lines]


def test_kill_9_in_the_middle_keeps_the_rows_before(tmp_path):
    def dies(config, setting, seed, place):
        if (setting, seed) == ("b", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(config, setting, seed, place)

    if not (child := os.fork()):
        run_study(study(run=dies), tmp_path, seeds=2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [(row["setting"], row["seed"]) for row in rows(tmp_path)] == [("a", 0), ("b", 0), ("a", 1)]
    run_study(study(), tmp_path, seeds=2)
    assert CALLS == [("b", 1)]


def test_an_error_leaves_a_page_of_the_rows_that_there_are(tmp_path):
    def fails(config, setting, seed, place):
        if setting == "b":
            raise FloatingPointError("the loss is nan")
        return measure(config, setting, seed, place)

    with pytest.raises(FloatingPointError, match="nan"):
        run_study(study(run=fails), tmp_path, seeds=1)
    page = (tmp_path / "small.md").read_text()
    assert "1 of 2 settings have not been run" in page
    assert "5 of 6 runs are missing: a, seed 1; a, seed 2; b, seed 0; b, seed 1; b, seed 2." in page


def test_two_processes_do_not_share_rows(tmp_path):
    with (tmp_path / "small.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another process is at work on .*small.jsonl"):
            run_study(study(), tmp_path)
    assert CALLS == []


@pytest.mark.parametrize("line", ["{}", "no JSON", '{"setting": "a", "seed": 0, "seconds": 1, "numbers": 3}', "[1]"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    run_study(study(), tmp_path, seeds=1)
    file = tmp_path / "small.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"small.jsonl, line 3 is no row of a study"):
        run_study(study(), tmp_path, seeds=1)
    assert file.read_text().endswith(line + "\n")


# --- protocols


def test_rows_of_another_protocol_are_refused(tmp_path):
    run_study(study(), tmp_path, seeds=1)
    before = (tmp_path / "small.jsonl").read_bytes()
    CALLS.clear()
    with pytest.raises(ValueError, match=r"line 1: a was run with steps = 10, this is steps = 20.*another --out"):
        run_study(study(), tmp_path, changes={"steps": 20})
    with pytest.raises(ValueError, match=r"no setting 'a'"):
        run_study(study(settings={"b": {"shift": 1.0}}), tmp_path)
    with pytest.raises(ValueError, match="a was run with rate = None, this is rate = None"):
        run_study(study(protocol={"steps": 10, "shift": 0.0, "rate": None}), tmp_path)
    assert CALLS == []
    assert (tmp_path / "small.jsonl").read_bytes() == before


def test_changes_reach_every_setting(tmp_path):
    run_study(study(), tmp_path, seeds=1, changes={"steps": 20})
    assert [row["numbers"]["steps"] for row in rows(tmp_path)] == [20, 20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"step": 3}, "no 'step' to change; it has .*steps"), ({"steps": "x"}, "steps is 10 .* 'x' is of another kind")],
)
def test_changes_that_the_protocol_does_not_know_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_study(study(), tmp_path / "out", changes=changes)
    assert not (tmp_path / "out").exists()


def test_the_quick_form_never_writes_to_results(tmp_path):
    with pytest.raises(ValueError, match="--quick never writes to"):
        run_study(study(), tmp_path / "results", quick=True)
    assert not (tmp_path / "results").exists()
    page = run_study(study(), quick=True, seeds=1)
    assert page.parent.name.startswith("rae-small-")
    assert "QUICK" in page.read_text()
    assert "cannot tell: this is the quick form." in page.read_text()


def test_quick_rows_and_real_ones_do_not_mix(tmp_path):
    run_study(study(quick={}), tmp_path, seeds=1, quick=True)
    with pytest.raises(ValueError, match="quick = True, this is quick = None"):
        run_study(study(quick={}), tmp_path, seeds=1)


def test_images_are_part_of_the_protocol(tmp_path):
    for name, count in {"two": 2, "three": 3, "moved": 2}.items():
        (tmp_path / name).mkdir()
        for k in range(count):
            (tmp_path / name / f"{k}.png").write_bytes(png(k))
    two, three, moved = (str(tmp_path / name) for name in ("two", "three", "moved"))
    reads = study(source=two)
    run_study(reads, tmp_path, seeds=1)
    assert re.fullmatch("2 images, [0-9a-f]{12}", rows(tmp_path)[0]["config"]["data"])
    with pytest.raises(ValueError, match=r"a was run with data = '2 images, .*this is data = '3 images"):
        run_study(reads, tmp_path, seeds=1, source=three)
    with pytest.raises(ValueError, match="small reads no images, and was given"):
        run_study(study(), tmp_path / "other", source=two)
    CALLS.clear()
    run_study(reads, tmp_path, seeds=1, source=moved)  # the same images elsewhere
    assert CALLS == []


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 seeds"):
        run_study(study(), tmp_path, seeds=0)


# --- seeds and intervals


def test_seeds_are_functions_of_their_names():
    assert seed_of("a", 1, "weights") == seed_of("a", 1, "weights")
    assert len({seed_of("a", 1), seed_of("a", 2), seed_of("b", 1), seed_of("a", "1")}) == 4
    assert all(0 <= seed_of("a", k) < 2**63 for k in range(99))
    assert torch.equal(torch.randn(3, generator=draws("a")), torch.randn(3, generator=draws("a")))


def made_up(**values) -> Results:
    """Results of settings that are given as lists of losses by seed."""
    return Results(
        [
            {"setting": name, "seed": seed, "numbers": {"loss": loss}, "config": {}}
            for name, losses in values.items()
            for seed, loss in enumerate(losses)
            if loss is not None
        ]
    )


def test_differences_pair_the_seeds():
    found = made_up(a=[10, 20, 30], b=[11, 22, 33, 99]).difference("loss", "b", "a")
    assert found == Difference(2, 1 / math.sqrt(3), 3)  # of 1, 2, 3
    low, high = found.interval  # t of 2 degrees of freedom: q with P(t < q) = (1 + q / sqrt(2 + q^2)) / 2 = 0.95
    q = math.sqrt(2 * 0.81 / (1 - 0.81))
    assert (low, high) == (pytest.approx(2 - q / math.sqrt(3)), pytest.approx(2 + q / math.sqrt(3)))
    assert made_up(a=[1, None], b=[None, 1]).difference("loss", "b", "a") is None
    assert made_up(a=[1], b=[3]).difference("loss", "b", "a").interval == (-math.inf, math.inf)


def test_summaries():
    results = made_up(a=[1, 3], b=[5])
    assert results["a", "loss"] == (2, math.sqrt(2), 2)
    assert results["b", "loss"] == (5, None, 1)
    assert results.seeds("a") == {0, 1}
    with pytest.raises(KeyError, match="no row of 'c'"):
        results["c", "loss"]


# --- page

PAGE = """# Study: small

Question: Is b above a?

The paper: It is, by 1 (Table 0).

> agrees: b is above a.

## Results

| setting | loss |
| --- | --- |
| a | 2 ± 1 |
| b | 4 ± 1<br><small>paper: 1.5</small> |

Mean ± standard deviation over 3 seeds, or as many as brackets say. In small: the paper's own number.

Differences, seed by seed, ± the standard error of their mean:

| number | difference | value |
| --- | --- | --- |
| loss | b − a | +2 ± 0.06 (3 pairs) |

![Loss](small.svg)

## How it was decided

Agrees if the interval of b - a is above 0.

## How it was done

| for all settings |  |
| --- | --- |
| steps | 10 |

<details><summary>what each setting has for itself</summary>

| setting | shift |
| --- | --- |
| a | 0 |
| b | 1 |

</details>

Cost: 6 runs, 6.0 minutes of processor time, 12.0 minutes by the clock, on a Z80, 1 thread(s), torch 9. \
Parts that the work folder held already are not in these; all of them: nothing. Commits: abc.
"""


def test_a_page_says_what_the_rows_say(tmp_path):
    by_hand = {"hardware": "a Z80", "threads": 1, "versions": {"torch": "9"}, "commit": "abc"}
    by_hand |= {"seconds": 120, "cpu_seconds": 60}
    losses = {"a": [1.0, 2.0, 3.0], "b": [3.0, 4.1, 4.9]}
    configs = {"a": {"steps": 10, "shift": 0.0}, "b": {"steps": 10, "shift": 1.0}}
    lines = [
        json.dumps({"setting": s, "seed": k, "numbers": {"loss": v}, "config": configs[s]} | by_hand)
        for s, values in losses.items()
        for k, v in enumerate(values)
    ]
    (tmp_path / "small.jsonl").write_text("\n".join(lines) + "\n")
    page = run_study(study(), tmp_path)
    assert CALLS == []
    assert page.read_text() == PAGE
    assert (tmp_path / "small.svg").read_text().startswith("<svg")


# --- the picture


def grey(own, configs, results, place, say):
    CALLS.append("picture")
    say(f"of {results['b', 'loss'].count} seeds")
    return np.full((2, 3, 3), own["grey"], np.uint8), f"Grey of {own['grey']}, σ < 1."


def drawing(**protocol) -> Drawing:
    return Drawing(
        protocol={"grey": 7, "sizes": (1, 2), "seeds": [0, 2]} | protocol, quick={"grey": 8}, cost="nothing", draw=grey
    )


def test_a_picture_is_drawn_once_all_rows_are_there_and_by_another_protocol_again(tmp_path, capsys):
    page = run_study(study(drawing=drawing()), tmp_path, seeds=2)
    assert CALLS[-1] == "picture"
    assert "of 2 seeds" in capsys.readouterr().err
    with Image.open(tmp_path / "small.png") as image:
        assert np.asarray(image).tolist() == [[[7] * 3] * 3] * 2
    found = read_picture(tmp_path / "small.png")
    assert found.caption == "Grey of 7, σ < 1."
    assert found.made_of["protocol"] == {"grey": 7, "sizes": [1, 2], "seeds": [0]}  # seed 2 has no rows
    assert found.made_of["settings"]["b"] == {"steps": 10, "shift": 1.0}
    assert "![What the models make](small.png)\n\nGrey of 7, σ \\< 1. Drawn at commit" in page.read_text()

    CALLS.clear()
    run_study(study(drawing=drawing()), tmp_path, seeds=2)
    assert CALLS == []
    assert "small.png is there already" in capsys.readouterr().err
    run_study(study(drawing=drawing()), tmp_path, seeds=3)
    assert CALLS[-1] == "picture"
    assert read_picture(tmp_path / "small.png").made_of["protocol"]["seeds"] == [0, 2]
    run_study(study(drawing=drawing()), tmp_path, seeds=4)
    assert CALLS.count("picture") == 1
    run_study(study(drawing=drawing(grey=9)), tmp_path, seeds=3)
    assert CALLS[-1] == "picture"
    assert "small.png is of another protocol, or of fewer seeds: it is drawn again" in capsys.readouterr().err
    assert read_picture(tmp_path / "small.png").caption.startswith("Grey of 9")


def test_the_quick_picture_and_a_study_without(tmp_path):
    page = run_study(study(drawing=drawing()), tmp_path, seeds=1, quick=True)
    assert "Grey of 8" in page.read_text()
    run_study(study(), tmp_path / "none", seeds=1)
    assert not (tmp_path / "none/small.png").exists()


def test_no_picture_of_rows_that_are_missing(tmp_path):
    def fails(config, setting, seed, place):
        raise FloatingPointError("the loss is nan")

    with pytest.raises(FloatingPointError):
        run_study(study(drawing=drawing(), run=fails), tmp_path, seeds=1)
    assert CALLS == []
    assert not (tmp_path / "small.png").exists()


def saved_anew(file: Path) -> None:
    with Image.open(file) as image:
        Image.fromarray(np.asarray(image)).save(file)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (saved_anew, "its text 'Description' is missing, as where another program has saved it anew"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"made of", b"made_of")), ""),  # the sum is wrong
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), ""),
        (lambda file: file.write_bytes(b"nothing"), "cannot identify image file"),
    ],
)
def test_a_file_that_is_no_picture_of_a_study_is_refused_before_any_row_runs(damage, why, tmp_path):
    file = tmp_path / "small.png"
    page = run_study(study(drawing=drawing()), tmp_path, seeds=1)
    rows = (tmp_path / "small.jsonl").read_text()
    damage(file)
    CALLS.clear()
    said = rf"^{file} is no picture of a study: .*{why}.*\. Remove it, and the same command draws it again: rm {file}$"
    with pytest.raises(ValueError, match=said):
        run_study(study(drawing=drawing()), tmp_path, seeds=2)
    assert (CALLS, (tmp_path / "small.jsonl").read_text()) == ([], rows)

    page.unlink()
    text = write_page(study(drawing=drawing()), read_rows(rows.encode(), file), tmp_path).read_text()
    assert "small.png is no picture of a study" in text
    assert "![What the models make]" not in text

    file.unlink()
    run_study(study(drawing=drawing()), tmp_path, seeds=2)
    assert CALLS[-1] == "picture"
    assert read_picture(tmp_path / "other.png") is None


def test_a_sheet_draws_every_pixel_as_a_square_on_white():
    images = torch.randint(0, 255, (2, 3, 3, 5, 4), dtype=torch.uint8)
    found = sheet(list(images), ["a", "b", "c"], [["", "1", "2"], ["3", "", ""]])
    assert found.shape == (ABOVE + 2 * (5 * SCALE + BELOW), GAP + 3 * (4 * SCALE + GAP), 3)
    for r, c in itertools.product(range(2), range(3)):
        top, left = ABOVE + r * (5 * SCALE + BELOW), GAP + c * (4 * SCALE + GAP)
        drawn = found[top : top + 5 * SCALE, left : left + 4 * SCALE]
        assert (drawn == np.kron(images[r, c].permute(1, 2, 0), np.ones((SCALE, SCALE, 1)))).all()
    under = found[-BELOW:]
    assert (under[:, : GAP + 4 * SCALE] < 255).any(), "a text"
    assert (under[:, -4 * SCALE - GAP :] == 255).all(), "none"


# --- the list


@pytest.mark.parametrize("name", NAMES)
def test_every_study_is_declared_whole(name):
    study = find_study(name)
    assert study.name == name
    keys = {key for own in (study.protocol, *study.settings.values()) for key in own}
    assert study.quick.keys() <= keys
    assert (study.paper or {}).keys() <= study.settings.keys()
    assert all(number in study.shown for number, _, _ in study.pairs)
    assert all({a, b} <= study.settings.keys() for _, a, b in study.pairs)
    assert "quick" not in keys
    if drawing := study.drawing:
        assert drawing.quick.keys() <= drawing.protocol.keys()
        assert 0 in drawing.protocol["seeds"]
    assert len(study.rule) > 80


def test_a_misspelt_study_is_told_the_nearest():
    with pytest.raises(ValueError, match="no study 'theorm'; did you mean 'theorem'"):
        find_study("theorm")
