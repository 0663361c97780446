"""Our code against numbers of the authors' implementation (tests/golden), and proof that the check can fail.

tests/golden is a part of the fixtures, computed with github.com/bytetriper/RAE at commit a4d18c4 on tiny models.
"""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from rae.cli import rae
from rae.interop import cases, fixtures
from rae.interop.fixtures import FixtureError
from rae.interop.verify import Outcome, Report, print_report, verify

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


@pytest.fixture(scope="module")
def outcomes():
    return {outcome.case: outcome for outcome in verify(GOLDEN).outcomes}


@pytest.mark.parametrize("name", CASES)
def test_parity(outcomes, name):
    outcome = outcomes[name]
    assert outcome.problem is None
    assert [m for m in outcome.measured if not m.passed] == []


def copy_case(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, folder / name))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dit_patch2", "blocks.0.attn.proj.weight"),
        ("ditdh_equal_width", "blocks.3.mlp.w3.bias"),
        ("decoder_token_interp", "decoder_layers.0.attention.attention.value.bias"),
        ("encoder_dinov2_posinterp", "embeddings.patch_embeddings.projection.weight"),
    ],
)
def test_a_slightly_wrong_weight_fails(tmp_path, name, key):
    path = copy_case(name, tmp_path) / "weights.safetensors"
    weights = load_file(path)
    weights[key] *= 1 + 1e-3
    save_file(weights, path)
    (outcome,) = verify(tmp_path).outcomes
    assert outcome.problem is None
    assert not outcome.passed


def test_a_wrong_epsilon_fails(monkeypatch):
    def convert(*args, **settings):
        decoder = convert_decoder(*args, **settings)
        for module in decoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-6
        return decoder

    convert_decoder = fixtures.convert_decoder
    monkeypatch.setattr(fixtures, "convert_decoder", convert)
    report = verify(GOLDEN / "decoder_token_interp")
    assert not report.outcomes[0].passed
    assert report.exit_status == 1


@pytest.mark.parametrize(
    "result",
    [{}, {"psnr": torch.tensor([float("nan")])}, {"psnr": torch.ones(2)}],
    ids=["missing", "not a number", "another shape"],
)
def test_a_result_that_cannot_be_compared_fails(monkeypatch, result):
    monkeypatch.setitem(cases.CASES, "metrics", lambda case: result)
    report = verify(GOLDEN / "metrics")
    assert report.exit_status == 1
    assert all(m.error == float("inf") for m in report.outcomes[0].measured)


def test_a_missing_key_fails_that_case_by_name_and_the_others_run(tmp_path):
    copy_case("metrics", tmp_path)
    path = copy_case("dit_patch2", tmp_path) / "weights.safetensors"
    weights = load_file(path)
    del weights["t_embedder.W"]
    save_file(weights, path)
    report = verify(tmp_path)
    broken, fine = report.outcomes
    assert "t_embedder.W" in broken.problem
    assert fine.passed
    assert report.exit_status == 1
    print_report(report, Console(width=200, file=(page := io.StringIO())))
    assert "1 cases passed, 1 failed." in page.getvalue()


def test_folders_that_are_no_fixtures_are_refused(tmp_path):
    with pytest.raises(FixtureError, match="holds no case"):
        verify(tmp_path)
    folder = copy_case("metrics", tmp_path)
    content = json.loads((folder / "case.json").read_text())
    (folder / "case.json").write_text(json.dumps(content | {"case": "vae"}))
    with pytest.raises(FixtureError, match=r"unknown case 'vae'; known are encoder, .*ditdh"):
        verify(tmp_path)
    del content["tolerance"]
    (folder / "case.json").write_text(json.dumps(content))
    with pytest.raises(FixtureError, match="not a complete case: KeyError 'tolerance'"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tensors.safetensors", lambda data: data[: len(data) // 2]),
        ("tensors.safetensors", lambda data: b""),
        ("case.json", lambda data: data[: len(data) // 2]),
        ("case.json", lambda data: b"\xff\xfe"),
        ("case.json", lambda data: b"[]"),
        ("case.json", lambda data: data.replace(b'"role": "output"', b'"role": "input"')),
        ("case.json", lambda data: re.sub(rb'"tensors": *{', b'"tensors": {"x": 1, ', data)),
        ("case.json", lambda data: re.sub(rb'"tolerance": *{', b'"tolerance": [], "was": {', data)),
        ("case.json", lambda data: re.sub(rb'"default": *[^,}]*', b'"default": "low"', data)),
    ],
)
def test_damaged_cases_are_named(tmp_path, file, damage):
    path = copy_case("metrics", tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FixtureError, match=str(tmp_path / "metrics")):
        verify(tmp_path)


def test_exit_status_of_the_command(tmp_path, monkeypatch):
    def status(folder) -> int:
        result = CliRunner().invoke(rae, ["verify", str(folder)])
        assert "Traceback" not in result.output
        return result.exit_code

    copy_case("metrics", tmp_path)
    assert status(tmp_path) == 0
    assert status(tmp_path / "nowhere") == 2
    monkeypatch.setitem(cases.CASES, "metrics", lambda case: {})
    assert status(tmp_path) == 1
    (tmp_path / "metrics/tensors.safetensors").write_bytes(b"half")
    assert status(tmp_path) == 2


def test_names_are_whole_in_a_narrow_terminal(tmp_path):
    name = "encoder_siglip2_posinterp[bold]"
    copy_case("metrics", tmp_path).rename(tmp_path / name)
    copy_case("encoder_dinov2_posinterp", tmp_path)
    report = verify(tmp_path)
    outcome = Outcome("gan_losses", problem="no [red] part")
    print_report(Report((*report.outcomes, outcome)), Console(width=80, file=(page := io.StringIO())))
    for text in (name, "encoder_dinov2_posinterp", "gan_losses"):
        assert f"│ {text} " in page.getvalue()
    assert max(map(len, page.getvalue().splitlines())) <= 80
    print_report(Report((outcome,)), Console(width=200, file=(page := io.StringIO())))
    assert "no [red] part" in page.getvalue()


def test_variants_find_the_function_of_their_kind():
    assert cases.find_case("ditdh_wide") is cases.find_case("dit") is cases.network
    assert cases.find_case("encoder_dinov3") is cases.encoder
    assert cases.find_case("encode_noised") is cases.encode_noised
