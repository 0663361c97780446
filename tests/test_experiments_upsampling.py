"""The study of up-sampling decoders: its quick form, what a quarter of the tokens costs, every outcome of its rule."""

import dataclasses
import json

import pytest

from rae.experiments import upsampling
from rae.experiments.frame import Results
from rae.experiments.runner import run_study
from rae.experiments.upsampling import DIRECT, STUDY, UP

SMALL = {"image_size": 32, "input_size": 16, "enlarge": True, "decoder": [16, 1, 2, 32], "size": [16, 2, 1]}


def test_quick_form(encoder, tmp_path):
    # 4 x 4 tokens of 8 pixels, and 2 x 2 of 16: the sizes of the settings are for patches of 14
    sizes = {DIRECT: {"encoder_size": 32}, UP: {"encoder_size": 16}}
    study = dataclasses.replace(STUDY, settings=sizes)
    changes = {**SMALL, "encoder": str(encoder), "head": [16, 2, 1]}
    page = run_study(
        study, tmp_path / "out", seeds=1, quick=True, source="digits", work=tmp_path / "work", changes=changes
    )
    rows = [json.loads(line) for line in (tmp_path / "out/upsampling.jsonl").read_text().splitlines()]
    numbers = {row["setting"]: row["numbers"] for row in rows}
    assert {setting: n["tokens"] for setting, n in numbers.items()} == {DIRECT: 16, UP: 4}
    # the layers that see every token cost a quarter; time and label are embedded once, whatever the tokens
    assert 1 < numbers[DIRECT]["megaflops_dit"] / numbers[UP]["megaflops_dit"] < 4
    assert numbers[DIRECT]["psnr"] > 3
    assert 0 < numbers[UP]["ssim"] < 1
    for number in ("rfd_dino", "fd_dino"):  # of two things
        assert numbers[UP][number] != numbers[DIRECT][number]
    assert numbers[UP]["rfd_dino"] != numbers[UP]["fd_dino"]
    assert "quick form" in page.read_text()


def rows(**of_up) -> Results:
    """Three seeds of both settings; the up-sampling decoder's numbers are so much more than the direct one's."""
    base = {"rfd_dino": 20.0, "rfd_net": 5.0, "psnr": 20.0, "ragreement": 0.9, "fd_dino": 22.0, "fd_net": 6.0}
    base, found = base | {"megaflops_dit": 40.0}, []
    for seed in range(3):
        chance = 0.01 * seed
        found.append({"setting": DIRECT, "seed": seed, "numbers": base})
        numbers = {name: value + of_up[name] * (1 + chance) for name, value in base.items() if name in of_up} | {
            "megaflops_dit": 10.0
        }
        found.append({"setting": UP, "seed": seed, "numbers": numbers})
    return Results(found)


AS_PUBLISHED = {"rfd_dino": 10.0, "rfd_net": 3.0, "psnr": -2.0, "ragreement": -0.05, "fd_dino": 9.0, "fd_net": 2.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "agrees"),
        ({"rfd_dino": -1.0, "rfd_net": -1.0}, "does not agree"),
        ({"ragreement": -0.3}, "does not agree"),  # nothing to be seen any more
        ({"rfd_net": -1.0}, "cannot tell"),  # both metrics say the contrary of each other
        ({"psnr": 0.0}, "cannot tell"),
        ({"fd_dino": -1.0, "fd_net": -1.0}, "does not agree"),
        ({"fd_dino": 0.0}, "cannot tell"),
    ],
)
def test_every_outcome_of_the_rule(changes, says):
    verdict = upsampling.judge(rows(**AS_PUBLISHED | changes))
    assert verdict.says == says
    assert "4.0 times as much direct" in verdict.reason
