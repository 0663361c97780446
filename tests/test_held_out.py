"""What stage 1 says of held-out images: by its own encoder, by another, by Inception; their features are taken once."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny import decoder_recipe, log
from torch import nn

from rae import RAE
from rae.config import ConfigError
from rae.data.images import Views, open_images, open_split, subset, to_bytes, to_unit
from rae.evaluation import features as features_module
from rae.evaluation.features import Extractor, open_extractor
from rae.evaluation.frechet import frechet_distance
from rae.sources import SourceError
from rae.training.decoder import DecoderRecipe, train_decoder
from rae.training.held_out import spread
from rae.training.run_folder import TrainingError

ONCE = {"run__duration": "2st", "run__evaluate_every": "2st", "run__save_every": "1st"}


def both_sets(recipe: DecoderRecipe, folder: Path) -> tuple[RAE, torch.Tensor, torch.Tensor]:
    """The model of a run, the 16 held-out images that judge it, and their reconstructions in [0,1]."""
    held_out = spread(open_split(recipe.data)[1], 16)
    views = Views(held_out, recipe.data, (16, 16))
    image = to_unit(torch.stack([views[i]["image"] for i in range(16)]))
    rae = RAE.from_pretrained(folder)
    with torch.no_grad():
        return rae, image, rae.decode_tokens(rae.tokens(image)).clamp(0, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(*(m for x in (a.double(), b.double()) for m in (x.mean(0), x.T.cov())))


def test_the_run_s_own_encoder_judges_by_its_mean_tokens(encoder, tmp_path):
    recipe = decoder_recipe(encoder, **ONCE)
    folder = train_decoder(recipe, tmp_path / "run")
    rae, *both = both_sets(recipe, folder)
    with torch.no_grad():
        expected = distance(*(rae.tokens(x).mean(1) for x in both))
    assert log(folder, "held_out_fd") == [pytest.approx(expected, rel=1e-5)]
    assert expected > 0.01


def test_another_encoder_judges_as_rae_evaluate_would_and_chooses_the_best(encoder, tmp_path):
    (tmp_path / "other").symlink_to(encoder)
    recipe = decoder_recipe(encoder, **ONCE, evaluation__features=str(tmp_path / "other"))
    folder = train_decoder(recipe, tmp_path / "run")
    extractor = open_extractor(str(encoder))
    _, *both = both_sets(recipe, folder)
    expected = distance(*(extractor(to_bytes(x))["features"] for x in both))
    assert log(folder, "held_out_fd_other") == [pytest.approx(expected, rel=1e-5)]
    assert log(folder, "held_out_fd") == []
    assert log(folder, "judge_held_out") == [f"{tmp_path / 'other'} ({extractor.identity[:12]})"]
    assert (folder / "best").read_text() == "000000016\n"


class Network(nn.Module):
    """In Inception's place: three random projections of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 16 * 16, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": to_unit(images).flatten(1) @ self.weight}


def test_inception_s_figure_is_rfid_and_its_weights_are_those_named(encoder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(features_module, "load_inception", lambda weights: asked.append(weights) or Network())
    recipe = decoder_recipe(encoder, **ONCE, evaluation__features="inception", evaluation__weights="file.pth")
    folder = train_decoder(recipe, tmp_path / "run")
    _, *both = both_sets(recipe, folder)
    expected = distance(*(Network()(to_bytes(x))["features"].detach() for x in both))
    assert log(folder, "held_out_rfid") == [pytest.approx(expected, rel=1e-5)]
    assert asked == ["file.pth"]


def test_images_are_spread_evenly_over_a_set_that_lies_class_by_class():
    digits = open_images("digits")
    ordered = subset(digits, sorted(range(len(digits)), key=digits.labels.__getitem__))
    found = spread(ordered, 40)
    assert (len(found), set(found.labels)) == (40, set(range(10)))
    assert all(3 <= found.labels.count(label) <= 5 for label in range(10))
    assert spread(found, 40) is found
    assert spread(ordered, 40).identity == found.identity != spread(ordered, 41).identity


def test_features_of_the_originals_are_taken_once(encoder, tmp_path, monkeypatch):
    looked, forward = [], Extractor.forward
    monkeypatch.setattr(Extractor, "forward", lambda self, images: looked.append(len(images)) or forward(self, images))
    changes = {"run__evaluate_every": "1st", "run__save_every": "1st", "evaluation__features": str(encoder)}
    name = f"held_out_fd_{encoder.name}"
    for duration, times in (("2st", 3), ("3st", 4)):  # the originals once, and reconstructions in every step
        folder = train_decoder(decoder_recipe(encoder, **changes, run__duration=duration), tmp_path / "run")
        assert looked == [16] * times
    looked.clear()
    whole = train_decoder(decoder_recipe(encoder, **changes, run__duration="3st"), tmp_path / "whole")
    assert log(whole, name) == log(folder, name)
    (kept,) = folder.glob("held-out-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"held-out-.*cannot be read .*Remove it: it is made anew"):
        train_decoder(decoder_recipe(encoder, **changes, run__duration="4st"), folder)


def test_a_run_begun_before_there_was_a_choice_goes_on_and_may_choose(encoder, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["evaluation"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    changes = {"run__save_every": "1st", "run__keep": 99, "run__evaluate_every": "1st"}
    train_decoder(decoder_recipe(encoder, **changes, run__duration="13st"), folder)
    assert "found anew" not in capsys.readouterr().err
    changes |= {"run__duration": "14st", "evaluation__features": str(encoder)}
    train_decoder(decoder_recipe(encoder, **changes), folder)
    assert "held-out images, or what judges them, are not those of before" in capsys.readouterr().err
    assert (folder / "best").read_text() == f"{14 * 8:09d}\n"


def test_weights_that_cannot_be_had_end_the_run_before_anything_is_computed(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    for changes, told in (
        ({"features": "inception"}, r"could not be downloaded .*file, or folder, is evaluation\.weights"),
        ({"features": "inception", "weights": "gone.pth"}, r"gone\.pth: no such file"),
        ({"features": "incepton"}, "no extractor 'incepton'; did you mean 'inception'"),
    ):
        with pytest.raises(SourceError, match=rf"evaluation\.features: .*{told}"):
            train_decoder(decoder_recipe(encoder, evaluation=changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_recipes_that_contradict_themselves(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"weights x\.pth are of features, which are not given"):
        decoder_recipe(encoder, evaluation__weights="x.pth")
    with pytest.raises(ValueError, match=r"evaluation\.features inception is for held-out images, and data\.held_out"):
        decoder_recipe(encoder, evaluation__features="inception", data__held_out=0.0)
    other = decoder_recipe(encoder, evaluation__features=str(encoder.parent))
    with pytest.raises((SourceError, ConfigError), match=r"evaluation\.features: "):
        train_decoder(other, tmp_path / "run")
