"""The study of latent spaces: quick form, what all spaces share, the speed-up in closed form, every outcome."""

import json
import math

import pytest

from rae.experiments import spaces
from rae.experiments.frame import Place, Results
from rae.experiments.runner import run_study
from rae.experiments.spaces import KL, PIXELS, RAE, STUDY, images_to_reach, open_space, recipe_of

# 2 x 2 tokens of 16 numbers; 6 x 6 of 16, of a VAE that sees 24 pixels; 4 x 4 of 48
TINY = {
    "image_size": 16,
    "input_size": 16,
    "enlarge": True,
    "vae_margin": 4,
    "size": [48, 2, 1],
    "decoder": [16, 1, 2, 32],
}
PATCHES = {RAE: 1, KL: 1, PIXELS: 4}


def config(encoder, setting: str, **changes) -> dict:
    """Of the quick form, smaller still."""
    own = STUDY.settings[setting] | {"patch_size": PATCHES[setting]}
    return {**STUDY.protocol, **STUDY.quick, **TINY, **own, "encoder": str(encoder), "data": "digits", **changes}


@pytest.fixture(scope="module")
def ran(encoder, tmp_path_factory):
    """Rows of the quick form by setting, its page and its place."""
    root = tmp_path_factory.mktemp("spaces")
    changes = {**TINY, "encoder": str(encoder), "patch_size": 1, "size": [48, 2, 1]}
    page = run_study(STUDY, root / "out", seeds=1, quick=True, source="digits", work=root / "work", changes=changes)
    rows = [json.loads(line) for line in (root / "out/spaces.jsonl").read_text().splitlines()]
    return {row["setting"]: row for row in rows}, page, Place("digits", root / "work")


def test_quick_form(ran):
    rows, page, _ = ran
    assert list(rows) == [RAE, KL, PIXELS]
    for row in rows.values():
        # 12 steps of 4 images; 15, 30 and 60 % of them in whole steps, and the end
        assert list(spaces.curve(row["numbers"], "fd_dino")) == [4, 12, 28, 48]
        assert row["numbers"]["fd_net@48"] == row["numbers"]["fd_net"]
        assert all(math.isfinite(value) for value in row["numbers"].values())
    assert [row["numbers"]["n"] for row in rows.values()] == [16, 4, 3]
    text = page.read_text()
    assert "quick form" in text
    assert "spaces-3.svg" in text


def test_what_is_there_is_not_made_again(ran):
    rows, _, place = ran
    made = [path for kind in ("*.safetensors", "judged-*/*.json") for path in place.work.rglob(kind)]
    before = [path.stat().st_mtime_ns for path in made]
    for setting in (RAE, KL, PIXELS):
        assert spaces.run(rows[setting]["config"], setting, 0, place) == rows[setting]["numbers"]
    assert before == [path.stat().st_mtime_ns for path in made]
    assert len([path for path in made if path.parent.name.startswith("judged")]) == 12


def test_samples_are_judged_again_for_another_decoder(ran):
    rows, _, place = ran
    was = rows[RAE]
    found = spaces.run({**was["config"], "decoder_lr": 10 * was["config"]["decoder_lr"]}, RAE, 0, place)
    for number in ("fd_dino", "rfd_dino", "fd_dino@4"):
        assert found[number] != was["numbers"][number], number
    assert found["gigaflops"] == was["numbers"]["gigaflops"]


def test_the_same_network_and_images_in_every_space(encoder, ran):
    _, _, place = ran
    found = {}
    for setting in (RAE, KL, PIXELS):
        space = open_space(config(encoder, setting), 0, place)
        recipe = recipe_of(config(encoder, setting), space, 0)
        found[setting] = space, recipe
    for part in ("optim", "run", "drop_labels", "seed"):
        assert len({str(getattr(recipe, part)) for _, recipe in found.values()}) == 1, part
    networks = [recipe.network.model_dump(exclude={"patch_size"}) for _, recipe in found.values()]
    assert networks[0] == networks[1] == networks[2]
    # sqrt(m / base): the RAE's 2.5, and of fewer numbers less
    shifts = {
        setting: math.sqrt(math.prod(space.autoencoder.latent_shape) / recipe.flow.shift_base)
        for setting, (space, recipe) in found.items()
    }
    assert shifts[RAE] == pytest.approx(2.5, rel=0.1)
    assert shifts[PIXELS] / shifts[RAE] == pytest.approx(math.sqrt(768 / 64))
    plain, wide = found[PIXELS][0].files.open("train"), found[KL][0].files.open("train")
    assert plain.labels == wide.labels
    assert (wide.read(7)[4:-4, 4:-4] == plain.read(7)).all()


def test_a_narrow_network_is_refused(encoder, ran):
    _, _, place = ran
    narrow = config(encoder, PIXELS, patch_size=8)
    with pytest.raises(ValueError, match="width 48 cannot denoise tokens of 192"):
        spaces.run(narrow, PIXELS, 0, place)


def test_images_to_reach_a_distance_in_closed_form():
    # FD = 1000 / images, a power law, on which the interpolation is exact
    distances = {10: 100.0, 20: 50.0, 80: 12.5}
    assert images_to_reach(distances, 100.0) == 10
    assert images_to_reach(distances, 200.0) == 10  # there at the first moment: no more is known
    assert images_to_reach(distances, 50.0) == pytest.approx(20, rel=1e-12)
    assert images_to_reach(distances, 25.0) == pytest.approx(40, rel=1e-12)
    assert images_to_reach(distances, 12.4) == math.inf
    # up again and down: the first time counts
    assert images_to_reach({10: 100.0, 20: 50.0, 40: 90.0, 80: 45.0}, 50.0) == pytest.approx(20)


def rows(last: dict[str, list[float]], fd_net: dict[str, list[float]] | None = None) -> Results:
    """FD falls as 1 / images to these last values, seed by seed."""
    made = []
    for setting, values in last.items():
        for seed, value in enumerate(values):
            net = (fd_net or last)[setting][seed]
            curve = {f"fd_dino@{n}": value * 80 / n for n in (10, 20, 40, 80)}
            curve |= {f"fd_net@{n}": net * 80 / n for n in (10, 20, 40, 80)}
            numbers = {"fd_dino": value, "fd_net": net, "gigaflops": 1.0} | curve
            made.append({"setting": setting, "seed": seed, "numbers": numbers})
    return Results(made)


FAR = {RAE: [10.0, 11.0, 9.0], KL: [40.0, 45.0, 35.0], PIXELS: [80.0, 70.0, 90.0]}


def test_doublings_saved_in_closed_form():
    found = spaces.doublings(rows(FAR), "fd_dino", RAE, KL)
    expected = [math.log2(k / r) for k, r in zip(FAR[KL], FAR[RAE])]
    assert found.mean == pytest.approx(sum(expected) / 3, rel=1e-9)
    assert found.count == 3
    assert spaces.doublings(rows(FAR), "fd_dino", KL, RAE).mean == -1  # never


@pytest.mark.parametrize(
    ("last", "fd_net", "says"),
    [
        (FAR, None, "agrees"),
        (FAR | {RAE: [50.0, 52.0, 48.0]}, None, "does not agree"),  # behind the VAE
        (FAR | {RAE: [32.0, 36.0, 28.0]}, None, "does not agree"),  # ahead, by a third of a doubling
        (FAR | {RAE: [20.0, 30.0, 10.0]}, None, "cannot tell"),  # how much ahead is not clear
        (FAR, FAR | {RAE: [95.0, 99.0, 91.0]}, "cannot tell"),  # the second metric says the contrary
    ],
)
def test_every_outcome_of_the_rule(last, fd_net, says):
    assert spaces.judge(rows(last, fd_net)).says == says


def test_figures_of_few_rows():
    some = Results([row for row in rows(FAR).rows if row["setting"] == RAE])
    assert len(spaces.figures(some)) == 3
