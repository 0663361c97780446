"""docs/reproduction.md says what the committed rows say. Run as a script, this file writes it."""

import shutil
from pathlib import Path

import pytest

from rae.experiments import NAMES, find_study
from rae.experiments.drawing import read_picture
from rae.experiments.frame import Row, Study
from rae.experiments.page import overview, write_page
from rae.experiments.runner import read_rows

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/reproduction.md", ROOT / "results"
BEGIN, END = "<!-- findings: written by `make help` -->\n", "<!-- end of findings -->\n"


def rows_of(study: Study) -> list[Row]:
    file = RESULTS / f"{study.name}.jsonl"
    return read_rows(file.read_bytes(), file) if file.exists() else []


def findings() -> str:
    return f"\n{overview([(study, rows_of(study)) for study in map(find_study, NAMES)])}\n"


def test_findings_are_those_of_the_rows():
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0] == findings(), "run: make help"


def test_no_results_are_of_a_study_that_is_gone():
    assert {file.stem for file in RESULTS.glob("*.jsonl")} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if (RESULTS / f"{name}.jsonl").exists()])
def test_pages_are_those_of_their_rows(name, tmp_path):
    if (RESULTS / f"{name}.png").exists():
        shutil.copy(RESULTS / f"{name}.png", tmp_path)
    page = write_page(find_study(name), rows_of(find_study(name)), tmp_path)
    assert (RESULTS / page.name).read_text() == page.read_text(), f"run: rae experiment {name}"
    assert all((RESULTS / made.name).exists() for made in tmp_path.iterdir())  # drawn by any version of matplotlib


@pytest.mark.parametrize("name", [name for name in NAMES if (RESULTS / f"{name}.jsonl").exists()])
def test_rows_are_of_the_protocol_that_is_declared(name):
    study = find_study(name)
    for row in rows_of(study):
        assert "dirty" not in (row["commit"] or "dirty"), "run from a commit"
        declared = {**study.protocol, **study.settings[row["setting"]]}
        assert row["config"].keys() - declared.keys() <= {"data"}
        assert {key: row["config"][key] for key in declared} == declared, "the protocol was changed since"


@pytest.mark.parametrize("name", [name for name in NAMES if (RESULTS / f"{name}.png").exists()])
def test_pictures_are_of_the_protocol_that_is_declared(name):
    study, file = find_study(name), RESULTS / f"{name}.png"
    made_of = read_picture(file).made_of
    assert made_of["protocol"] == study.drawing.protocol
    assert made_of["settings"] == {row["setting"]: row["config"] for row in rows_of(study)}
    assert "dirty" not in (made_of["commit"] or "dirty"), "run from a commit"
    assert file.stat().st_size < 300_000


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + findings() + END + rest.split(END)[1])
