"""`rae experiment`: the list, a study by name, what is refused."""

import json

import pytest

from rae.experiments import NAMES


def test_the_list_names_every_study(run):
    text = run("experiment", "list")
    assert all(name in text for name in NAMES)


def test_a_study_by_name_writes_rows_page_and_figures(run, tmp_path):
    command = ["experiment", "theorem", "--quick", "--seeds", 1, "--out", tmp_path, "--set", "starts=1"]
    text = run(*command, "--set", "lr=2e-2")
    assert "decided: Agrees if" in text.replace("\n", " ")
    lines = (tmp_path / "theorem.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert (json.loads(lines[0])["config"]["starts"], json.loads(lines[0])["config"]["lr"]) == (1, 0.02)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("theorem.jsonl", "theorem.md", "theorem.svg", "theorem-2.svg")
    }
    assert "20 of 20 runs are there already" in run(*command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["theorm"], "did you mean 'theorem'?"),
        (["theorem", "--set", "steps"], "--set 'steps' is not of the form KEY=VALUE"),
        (["theorem", "--set", "stepps=3"], "has no 'stepps' to change"),
        (["theorem", "--set", "steps=many"], "steps is 3000 in the protocol of theorem; 'many' is of another kind"),
        (["theorem", "--data", "digits"], "theorem reads no images, and was given digits"),
        (["overfit", "--data", "nowhere"], "nowhere"),
        (["theorem", "--quick", "--out", "results"], "--quick never writes to results"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(refused, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("experiment", *arguments)
    assert not any(tmp_path.iterdir())
