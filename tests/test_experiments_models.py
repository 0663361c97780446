"""Studies about trained models: their quick forms run, and their rules can come out in all three ways."""

import json

import pytest
import torch
from tiny import save_encoder

from rae.experiments import find_study, guidance, ingredients, labels
from rae.experiments.claims import Claim, decide
from rae.experiments.frame import Difference, Results, draws
from rae.experiments.runner import run_study

STUDIES = ("ingredients", "noise", "head", "guidance", "labels", "unconditional")
ABOVE, BELOW, OPEN = Difference(2.0, 0.1, 3), Difference(-2.0, 0.1, 3), Difference(2.0, 5.0, 3)
ONE_SEED = Difference(2.0, None, 1)


# --- claims


@pytest.mark.parametrize(
    ("first", "second", "finding"),
    [
        (ABOVE, ABOVE, "holds"),
        (ABOVE, OPEN, "holds"),
        (ABOVE, None, "holds"),
        (ABOVE, BELOW, "open"),  # the second metric objects
        (BELOW, BELOW, "fails"),
        (BELOW, OPEN, "fails"),
        (BELOW, ABOVE, "open"),
        (OPEN, ABOVE, "open"),
        (OPEN, BELOW, "open"),
        (ONE_SEED, ONE_SEED, "open"),
        (None, None, "open"),
    ],
)
def test_a_claim_is_decided_by_one_metric_and_not_against_the_other(first, second, finding):
    assert Claim("x is better", first, second).finding == finding


def test_a_verdict_needs_all_claims_and_one_can_overthrow_it():
    holds, fails, undecided = (Claim("it is so", each) for each in (ABOVE, BELOW, OPEN))
    assert decide([holds, holds]).says == "agrees"
    assert decide([holds, undecided]).says == "cannot tell"
    assert decide([holds, undecided, fails]).says == "does not agree"
    reason = decide([holds, fails], "Besides.").reason
    assert reason == "it is so: holds (+2, ± 0.1, 3 seeds); it is so: fails (-2, ± 0.1, 3 seeds). Besides."


# --- rules of the studies


def numbers(name: str, quality: float, seed: int) -> dict[str, float]:
    """All that a study may ask for of a setting; distances fall with its quality."""
    noise = torch.rand((), generator=draws("rules", seed)).item()  # common to all settings of a seed
    found = dict.fromkeys(("fd_dino", "fd_net", "fd_latent"), 50 + noise - quality) | {"agreement": 0.5}
    for tau in ingredients.TAUS:
        for fd in ("fd_dino", "fd_net"):
            found |= {f"{fd}, tau {tau:g}": 60 - quality * (1 + tau) - noise, f"r{fd}, tau {tau:g}": 20 + quality * tau}
    found |= {f"r{fd}": 20 + quality + noise for fd in ("fd_dino", "fd_net")}  # the study noise
    return found


def judged(name: str, quality: dict[str, float]) -> str:
    study = find_study(name)
    rows = [
        {"setting": setting, "seed": seed, "numbers": numbers(name, quality[setting] + 0.01 * seed, seed)}
        for seed in range(3)
        for setting in study.settings
    ]
    study.figures(Results(rows))
    return study.judge(Results(rows)).says


BETTER = {  # what the paper says is better, later in the list
    "ingredients": [
        ingredients.NARROW,
        ingredients.WIDE_PLAIN,
        ingredients.HEAD_PLAIN,
        ingredients.WIDE,
        ingredients.HEAD,
    ],
    "noise": ["no noise", "tau 0.8, uniform", "tau 0.8, half-normal"],
    "head": ["no head", "288 wide", "384 wide, 2 blocks", "384 wide", "512 wide"],
    "guidance": ["CFG 1.5", "CFG 2.5", "unguided", "CFG up to 0.8 1.5", "CFG up to 0.8 2.5", "AutoGuidance, early 1.5"],
    "labels": ["random", "balanced"],
    "unconditional": ["unconditional", "unconditional, AutoGuidance", "by class"],
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_rule_agrees_where_everything_is_as_the_paper_says(name):
    order = dict.fromkeys(find_study(name).settings, 3.0) | {s: 5.0 + k for k, s in enumerate(BETTER[name])}
    assert judged(name, order) == "agrees"


@pytest.mark.parametrize("name", STUDIES)
def test_the_rule_disagrees_where_the_order_is_turned_round(name):
    order = dict.fromkeys(find_study(name).settings, 3.0) | {s: 15.0 - k for k, s in enumerate(BETTER[name])}
    assert judged(name, order) == "does not agree"


@pytest.mark.parametrize("name", STUDIES)
def test_the_rule_cannot_tell_where_all_are_alike(name):
    assert judged(name, dict.fromkeys(find_study(name).settings, 5.0)) == "cannot tell"


def test_networks_that_are_compared_at_equal_compute_have_it():
    from rae.diffusion.dit import DiTConfig, DiTDHConfig
    from rae.evaluation import flops

    def macs(settings) -> int:
        kind = DiTDHConfig if settings["network"] == "dit-dh" else DiTConfig
        width, heads, depth = settings["size"]
        shape = {"in_channels": 384, "grid": (4, 4), "num_classes": 10, "allow_narrow": True}
        shape |= {"width": width, "heads": heads, "depth": depth}
        if kind is DiTDHConfig:
            shape |= dict(zip(("head_width", "head_heads", "head_depth"), settings["head"]))
        return flops.total(flops.dit(kind(**shape)).values()).macs

    costs = [macs(settings) for settings in ingredients.NETWORKS.values()]
    assert max(costs) < 1.03 * min(costs)
    head = find_study("head")
    wide, deep = (macs({**head.protocol, **head.settings[name]}) for name in ("512 wide", "384 wide, 2 blocks"))
    assert wide == pytest.approx(deep, rel=0.04)


def test_studies_share_the_models_that_they_have_in_common():
    head, guided = find_study("head"), find_study("guidance")
    shared = ingredients.SETTINGS[ingredients.HEAD]
    assert {**head.protocol, **head.settings["384 wide"]}.items() >= shared.items()
    assert all({**guided.protocol, **settings}.items() >= shared.items() for settings in guidance.SETTINGS.values())


# --- labels


def test_balanced_counts_are_even_and_random_ones_are_not():
    assert labels.class_counts(50, 10, False, draws("even")) == [5] * 10
    counts = labels.class_counts(5000, 10, True, draws("random"))
    assert sum(counts) == 5000
    assert 300 < torch.tensor(counts).double().var() < 700 * 2  # of a multinomial: 5000 x 0.1 x 0.9 = 450


def test_rows_are_of_the_classes_that_are_asked_for_and_none_twice():
    pool = torch.arange(60) % 3
    rows = labels.choose(pool, [4, 0, 7], draws("rows"))
    assert pool[rows].bincount(minlength=3).tolist() == [4, 0, 7]
    assert len(set(rows.tolist())) == 11
    with pytest.raises(ValueError, match="21 samples of class 1 of 20 are asked for; set samples to more"):
        labels.choose(pool, [0, 21, 0], draws("rows"))


# --- quick forms


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Shared by the studies, as the default one is."""
    folder = tmp_path_factory.mktemp("work")
    save_encoder(folder / "encoder")
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_the_quick_form_runs_every_setting_and_shows_every_number(name, work, tmp_path):
    study = find_study(name)
    small = {"encoder": str(work / "encoder"), "image_size": 16, "input_size": 16}
    page = run_study(study, tmp_path, seeds=1, quick=True, source="digits", work=work / "parts", changes=small)
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["setting"] for row in rows] == list(study.settings)
    assert all(row["numbers"].keys() >= study.shown.keys() for row in rows)
    assert "QUICK" in page.read_text()
    if name == "guidance":
        cost = {row["setting"]: row["numbers"] for row in rows}
        assert cost["unguided"]["weak_calls"] == 0
        assert cost["CFG 1.5"]["weak_calls"] == cost["CFG 1.5"]["calls"] == 2
        assert cost["CFG up to 0.8 1.5"]["weak_calls"] == 1
        assert cost["CFG 1.5"]["gigamacs"] == 2 * cost["unguided"]["gigamacs"]
