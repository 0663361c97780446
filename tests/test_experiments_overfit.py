"""The study `overfit`: widths, latents of several layers, what is evaluated on networks that are known, the verdict."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import png, save_encoder

from rae.autoencoder.encoders import load_encoder
from rae.data.images import open_images
from rae.diffusion.dit import DiTDHConfig
from rae.diffusion.flow import Flow
from rae.experiments import overfit_picture
from rae.experiments.drawing import ABOVE, GAP, SCALE, read_picture
from rae.experiments.frame import Place, Results
from rae.experiments.one_image import evaluate, image_latents, network_config, relative_error, sample
from rae.experiments.overfit import NARROW_HEAD, PAIRS, SETTINGS, STUDY, WIDE_HEAD, judge
from rae.experiments.runner import run_study

TINY = {"image_size": 16, "steps": 3, "batch": 2, "evaluated": 8, "samples": 2, "sampling_steps": 2, "heads": 1}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two images, as a source."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(2):
        (folder / f"{seed}.png").write_bytes(png(seed))
    return folder


def config(encoder, setting="d = n", **changes) -> dict:
    return {**STUDY.protocol, **SETTINGS[setting], **TINY, "encoder": str(encoder), "depth": 1} | changes


# --- latents and networks


def test_latents_are_those_of_the_encoder(encoder, pictures):
    x = image_latents(config(encoder), 1, str(pictures))
    assert x.shape == (1, 16, 2, 2)
    tokens = x.flatten(2).mT
    assert torch.allclose(tokens.mean(2), torch.zeros(1, 4), atol=1e-6)  # the last LayerNorm, without its weights
    assert torch.allclose(tokens.square().mean(2), torch.ones(1, 4), atol=1e-3)  # |x|^2 = n
    assert not torch.equal(x, image_latents(config(encoder), 0, str(pictures)))


def test_layers_stand_side_by_side(tmp_path, pictures):
    import transformers

    folder = save_encoder(tmp_path)
    shape = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**shape)).save_pretrained(folder)
    both = image_latents(config(folder, layers=2), 0, str(pictures))
    assert both.shape == (1, 32, 2, 2)
    assert torch.equal(both[:, 16:], image_latents(config(folder), 0, str(pictures)))
    encoder = load_encoder(str(folder), image_size=16, input_size=16)
    assert encoder.config.depth == 2
    assert not torch.equal(both[:, :16], both[:, 16:])
    with pytest.raises(ValueError, match=r"3 layers of .*, which has 2"):
        image_latents(config(folder, layers=3), 0, str(pictures))


def test_an_image_that_is_not_there_is_no_other_image(encoder, pictures):
    with pytest.raises(ValueError, match=r"seed 2 is image 2, and .* has 2; fewer --seeds"):
        image_latents(config(encoder), 2, str(pictures))


def test_the_packaged_photographs_are_enough_for_seven_seeds():
    assert len(open_images(STUDY.source)) == 8  # the eighth is the one that the protocol was chosen on


@pytest.mark.parametrize(
    ("setting", "n", "width", "output_width"),
    [
        ("d = n/2", 384, 192, 192),
        ("d = 2n/3", 384, 256, 256),
        ("d = 5n/6", 384, 320, 320),
        ("d = 7n/6", 384, 448, 448),
        (WIDE_HEAD, 384, 192, 384),
        (NARROW_HEAD, 384, 384, 192),
        ("3 layers, d = 3n/8", 1152, 432, 432),
    ],
)
def test_widths_are_fractions_of_the_tokens(setting, n, width, output_width):
    found = network_config({**STUDY.protocol, **SETTINGS[setting]}, (n, 4, 4))
    assert (found.width, found.output_width, found.in_channels) == (width, output_width, n)
    assert isinstance(found, DiTDHConfig) == setting.startswith("DiT-DH")


# --- what is evaluated


def to_the_image(x):
    """v = (x_t - x) / t, which is right at every time."""
    return lambda x_t, t, y: (x_t - x) / t[:, None, None, None]


def sample_error(network, x, **asked) -> float:
    return relative_error(sample(network, Flow(shift=1.0), x, TINY | asked, 0), x)


def half_blind(x):
    """The same without the second half of the numbers, which are left at their mean over the noise: -x."""

    def network(x_t, t, y):
        v = to_the_image(x)(x_t, t, y)
        v[:, x.shape[1] // 2 :] = -x[:, x.shape[1] // 2 :]
        return v

    return network


@pytest.fixture
def latents() -> torch.Tensor:
    x = torch.randn(1, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    return F.layer_norm(x.movedim(1, -1), (64,)).movedim(-1, 1)


def test_a_network_that_knows_the_image_has_no_loss_and_no_error(latents):
    assert evaluate(to_the_image(latents), Flow(shift=1.0), latents, 64, 0) == (pytest.approx(0, abs=1e-9),) * 2
    assert sample_error(to_the_image(latents), latents, sampling_steps=5) < 1e-9


def test_a_network_of_half_the_width_has_half_the_noise(latents):
    loss, late = evaluate(half_blind(latents), Flow(shift=1.0), latents, 256, 0)
    chance = 4 * (2 / (256 * 4 * 32)) ** 0.5  # four standard deviations, of a mean of squares of normal numbers
    assert loss == pytest.approx(0.5, abs=0.5 * chance)
    assert late == pytest.approx(0.5, abs=0.6 * chance)
    error = sample_error(half_blind(latents), latents, samples=64, sampling_steps=5)
    assert error == pytest.approx(0.5, abs=1.0 * chance)


def test_the_error_of_pure_noise_is_two(latents):
    nothing = sample_error(lambda x_t, t, y: torch.zeros_like(x_t), latents, samples=64)
    assert nothing == pytest.approx(2, abs=0.1)  # |noise|^2 + |x|^2


def test_a_run_is_made_again_to_the_same_numbers(encoder, pictures):
    place = Place(str(pictures), pictures)
    first, again = (STUDY.run(config(encoder), "d = n", 0, place) for _ in range(2))
    assert first == again
    assert first["bound"] == 0
    assert first["loss"] != STUDY.run(config(encoder), "d = n", 1, place)["loss"]
    narrow = STUDY.run(config(encoder, "d = n/2"), "d = n/2", 0, place)
    assert (narrow["width"], narrow["bound"]) == (8, pytest.approx(0.5))


def test_a_few_steps_of_every_setting_and_a_picture(encoder, pictures, tmp_path, monkeypatch):
    changes = {"encoder": str(encoder), "image_size": 16, "layers": 1, "heads": 1}
    asked = {"seeds": 1, "quick": True, "source": str(pictures), "work": tmp_path / "work", "changes": changes}
    page = run_study(STUDY, tmp_path, **asked)
    assert "QUICK" in page.read_text()
    assert "![What the models make](overfit.png)" in page.read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"overfit.jsonl", "overfit.svg", "overfit-3.svg"}
    found = read_picture(tmp_path / "overfit.png")
    assert "their errors equal those of the rows" in found.caption
    assert found.made_of["protocol"]["seeds"] == [0]

    before = (tmp_path / "overfit.png").read_bytes()
    (tmp_path / "overfit.png").unlink()
    monkeypatch.setattr(overfit_picture, "learn", None)  # its samples are there
    run_study(STUDY, tmp_path, **asked)
    with Image.open(io.BytesIO(before)) as old, Image.open(tmp_path / "overfit.png") as new:
        assert old.tobytes() == new.tobytes()


# --- the picture


def test_a_picture_says_how_far_its_samples_are_from_those_of_the_rows(encoder, pictures, tmp_path):
    own = {**STUDY.drawing.protocol, **STUDY.drawing.quick, "settings": ["d = n/2"]}
    configs, place = {"d = n/2": config(encoder, "d = n/2", data="two")}, Place(str(pictures), tmp_path / "work")
    numbers = STUDY.run(configs["d = n/2"], "d = n/2", 0, place)
    numbers["sample_error"] += 0.25
    row = {"setting": "d = n/2", "seed": 0, "numbers": numbers, "config": {}}
    pixels, caption = overfit_picture.draw(own, configs, Results([row]), place, print)
    assert "their errors are within 0.25 of those of the rows." in caption
    assert pixels.shape[2] == 3
    photograph = overfit_picture.image(configs["d = n/2"], 0, str(pictures)).permute(1, 2, 0).numpy()
    top, left, pixel = ABOVE, GAP, SCALE
    drawn = pixels[top : top + 16 * pixel, left : left + 16 * pixel]
    assert (drawn == photograph.repeat(pixel, 0).repeat(pixel, 1)).all()


def test_samples_are_kept_by_setting_and_seed(encoder, pictures, tmp_path):
    described, place = config(encoder), Place(str(pictures), tmp_path / "work")
    x = image_latents(described, 0, str(pictures))
    kept = [overfit_picture.samples_of(x, described, *key, place) for key in (("a", 0), ("b", 0), ("a", 1), ("a", 0))]
    assert torch.equal(kept[0], kept[3])
    assert not torch.equal(kept[0], kept[1]), "weights start by the setting's name"
    assert not torch.equal(kept[0], kept[2])
    assert len(list(place.work.iterdir())) == 3


def test_crops_are_squares_of_the_images_in_turn(pictures):
    found, labels = overfit_picture.crops(str(pictures), 5, 16, 0.5)
    assert found.shape == (5, 16, 16, 3)
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert not (found[0] == found[2]).all()
    assert (overfit_picture.crops(str(pictures), 5, 16, 0.5)[0] == found).all()
    whole = open_images(str(pictures)).read(0)
    side = min(whole.shape[:2])
    full, _ = overfit_picture.crops(str(pictures), 1, side, 1.0)  # nothing is scaled: a window of the image
    windows = np.lib.stride_tricks.sliding_window_view(whole, (side, side, 3)).reshape(-1, side, side, 3)
    assert any((window == full[0]).all() for window in windows)


def test_the_decoder_learns_the_crops(encoder, pictures, tmp_path):
    own = {**STUDY.drawing.protocol, **STUDY.drawing.quick, "decoder_steps": 1}
    place, described = Place(str(pictures), tmp_path), config(encoder, data="two")

    def error(steps):
        found = overfit_picture.decoder({**own, "decoder_steps": steps, "tau": 0.0}, described, place)
        x = image_latents(described, 0, str(pictures))
        exact = overfit_picture.image(described, 0, str(pictures))[None]
        return (overfit_picture._decode(found, x).float() - exact.float()).abs().mean()

    assert error(60) < 0.8 * error(1)
    assert len(list(tmp_path.glob("crops-*.npz"))) == 1


# --- the verdict


def results(**changes) -> Results:
    """Three seeds of every setting, all 0.05 above their bounds; a change is added to loss and error of a setting."""
    found = []
    for name, own in SETTINGS.items():
        bound = max(0.0, 1 - own.get("head_width", own["width"]))
        for seed in range(3):
            number = bound + 0.05 + 0.001 * seed + changes.get(name, (0, 0, 0))[seed]
            numbers = {"bound": bound, "loss": number, "sample_error": number}
            found.append({"setting": name, "seed": seed, "config": {}, "numbers": numbers})
    return Results(found)


def test_the_verdict_follows_the_rule():
    assert judge(results()).says == "agrees"
    too_low = judge(results(**{"d = n/2": (0, -0.07, 0)}))
    assert too_low.says == "does not agree"
    assert too_low.reason == "d = n/2, seed 1: loss 0.4810, bound 0.5000."
    assert judge(results(**{"d = n/2": (0, -0.055, 0)})).says == "agrees"  # by chance, in one run of three


@pytest.mark.parametrize(("narrow", "wide"), PAIRS)
def test_every_pair_counts(narrow, wide):
    own = SETTINGS[narrow]
    half = (1 - own.get("head_width", own["width"])) / 2
    no_gain = judge(results(**{wide: (2 * half,) * 3}))
    assert no_gain.says == "does not agree"
    assert f"loss of {narrow} less that of {wide}" in no_gain.reason
    scattered = judge(results(**{wide: (0, 2 * half, half)}))
    assert scattered.says == "cannot tell"
