"""Stage 1: what the loop computes, what it saves, and how it refuses."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import decoder_recipe, lines, log

from rae import RAE, Decoder, load_encoder
from rae.autoencoder.latents import tokens_to_map
from rae.config import ConfigError, load_recipe
from rae.data.images import ImageError, Views, open_split, to_unit
from rae.evaluation.lpips import LPIPS
from rae.sources import SourceError
from rae.training.decoder import DecoderRecipe, _of_law, train_decoder
from rae.training.perceptual import feature_distance
from rae.training.run import Run
from rae.training.run_folder import TrainingError


def test_reconstructions_get_better(encoder, tmp_path):
    recipe = decoder_recipe(
        encoder, run__duration="150st", run__log_every="10st", run__save_every="100%", optim__lr=3e-3
    )
    folder = train_decoder(recipe, tmp_path / "run")
    assert log(folder, "l1")[-1] < 0.6 * log(folder, "l1")[0]
    assert log(folder, "held_out_l1")[-1] < 0.6 * log(folder, "held_out_l1")[0] + 0.1
    assert log(folder, "perceptual")[-1] < log(folder, "perceptual")[0]


def test_saved_model_holds_the_average_of_the_weights(encoder, finished):
    torch.manual_seed(0)
    rae = RAE.from_pretrained(finished)
    ema = Decoder(rae.decoder.config).state_dict()
    steps = sorted((finished / "checkpoints").iterdir())
    assert len(steps) == 12
    for step in steps:
        online = load_file(step / "train/weights.safetensors")
        ema = {name: 0.9 * value + 0.1 * online[name] for name, value in ema.items()}
    for name, value in rae.decoder.state_dict().items():
        torch.testing.assert_close(value, ema[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, online[name])


def test_saved_model_holds_the_exact_statistics(encoder, finished):
    recipe = decoder_recipe(encoder)
    images, _ = open_split(recipe.data)
    views = Views(images, recipe.data, (16, 16))
    network = load_encoder(encoder, image_size=(16, 16))
    x = to_unit(torch.stack([views[i]["image"] for i in range(len(images))]))
    z = tokens_to_map(network(x), network.grid).double()
    rae = RAE.from_pretrained(finished)
    torch.testing.assert_close(rae.latent_mean.double(), z.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rae.latent_var.double(), z.var(0, correction=0), rtol=1e-5, atol=1e-6)


def test_small_micro_batches_compute_the_large_batch(encoder, finished, tmp_path):
    recipe = decoder_recipe(encoder, run__micro_batch=3, run__log_every="1st")
    parts = train_decoder(recipe, tmp_path / "parts")
    whole = train_decoder(decoder_recipe(encoder, run__log_every="1st"), tmp_path / "whole")
    for figure in ("loss", "l1", "perceptual"):
        assert log(parts, figure) == pytest.approx(log(whole, figure), rel=1e-3)
    assert log(parts, "grad_norm")[1:] == pytest.approx(log(whole, "grad_norm")[1:], rel=1e-2)
    assert log(parts, "loss")[0] == pytest.approx(log(whole, "loss")[0], rel=1e-6)


def test_accelerates_own_settings_do_not_change_the_numbers(encoder, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert log(train_decoder(decoder_recipe(encoder), tmp_path / "run"), "loss") == log(finished, "loss")


def test_upsampling_decoder_and_bf16(encoder, tmp_path):
    recipe = decoder_recipe(encoder, decoder__patch_size=16, run__precision="bf16", encoder__precision="bf16")
    rae = RAE.from_pretrained(train_decoder(recipe, tmp_path / "run"))
    assert (rae.image_size, rae.output_size) == ((16, 16), (32, 32))
    with Image.open(tmp_path / "run/samples/000000096.png") as sheet:
        assert sheet.size == (8 * 32, 2 * 32)


def test_statistics_are_those_of_float32_weights_whatever_the_encoder_computes_in(encoder, tmp_path):
    means = [
        RAE.from_pretrained(train_decoder(decoder_recipe(encoder, encoder__precision=p), tmp_path / p)).latent_mean
        for p in ("fp32", "bf16")
    ]
    assert torch.equal(*means)


@pytest.mark.parametrize("patch_size", [8, 16])  # 16: an up-sampling decoder, whose encoder sees resized images
def test_tokens_in_memory_are_those_encoded_online(encoder, tmp_path, patch_size):
    changes = {"data__flip": True, "run__log_every": "1st", "decoder__patch_size": patch_size}
    online = train_decoder(decoder_recipe(encoder, **changes), tmp_path / "online")
    memory = train_decoder(decoder_recipe(encoder, **changes, tokens="memory"), tmp_path / "memory")
    assert log(memory, "loss") == pytest.approx(log(online, "loss"), rel=1e-4)


def test_laws_of_sigma():
    u = (torch.arange(100_000, dtype=torch.float64) / 100_000).float()
    assert torch.equal(_of_law("uniform", u), u)
    n = _of_law("half-normal", u)
    assert n.isfinite().all()
    assert n[0] == 0
    assert n.mean() == pytest.approx((2 / torch.pi) ** 0.5, abs=1e-3)  # of |N(0, 1)|
    assert n.square().mean() == pytest.approx(1, abs=1e-3)


def test_feature_distance_is_zero_at_the_image_and_pulls_towards_it(encoder):
    network = load_encoder(encoder, image_size=(16, 16))
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = network(x)
    assert feature_distance(network, network.normalise(x), tokens).tolist() == pytest.approx([0] * 3, abs=1e-10)
    other = network.normalise(1 - x).requires_grad_()
    distance = feature_distance(network, other, tokens)
    distance.sum().backward()
    step = other.detach() - 0.1 * other.grad
    assert (feature_distance(network, step, tokens) < distance).all()
    assert all(p.grad is None for p in network.parameters())


# --- perceptual term


def test_perceptual_term_from_its_start(encoder, tmp_path):
    folder = train_decoder(
        decoder_recipe(encoder, loss__perceptual__start="2st", run__log_every="1st"), tmp_path / "run"
    )
    for step, line in enumerate(lines(folder)[:4]):
        assert ("perceptual" in line) == (step >= 2)
        assert line["loss"] == pytest.approx(line["l1"] + 0.1 * line.get("perceptual", 0))


def test_lpips_as_the_perceptual_term(encoder, tmp_path, monkeypatch, capsys):
    lpips = LPIPS((4, 4, 4, 4, 4))
    for weight in lpips.weights:
        weight.fill_(1)
    monkeypatch.setattr("rae.training.objective.load_lpips", lambda vgg16, heads: lpips)
    recipe = decoder_recipe(
        encoder, loss__perceptual__kind="lpips", run__duration="2st", run__log_every="1st", run__micro_batch=3
    )
    folder = train_decoder(recipe, tmp_path / "run")
    assert "L1 + 0.1 x perceptual (LPIPS (VGG16), from 0st)" in capsys.readouterr().err
    assert log(folder, "judge_perceptual") == ["LPIPS (VGG16)"]
    for line in lines(folder):
        assert line["loss"] == pytest.approx(line["l1"] + 0.1 * line["perceptual"])


def test_lpips_that_cannot_be_had_names_the_fallback_before_training(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"vgg16.* could not be downloaded .*loss\.perceptual\.kind=encoder"):
        train_decoder(decoder_recipe(encoder, loss__perceptual__kind="lpips"), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


# --- saving


def test_best_names_the_saved_checkpoint_that_did_best(encoder, tmp_path, monkeypatch):
    figures = iter([9, 4, 1, 3, 8, 5, 2, 6])  # the third and the seventh step's are not saved
    monkeypatch.setattr("rae.training.decoder.held_out_figures", lambda *_: {"held_out_fd": next(figures)})
    changes = {"run__duration": "8st", "run__evaluate_every": "1st", "run__save_every": "2st", "run__keep": 1}
    folder = train_decoder(decoder_recipe(encoder, **changes), tmp_path / "run")
    assert (folder / "best").read_text() == "000000032\n"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"000000032", "000000064"}
    RAE.from_pretrained(folder / "checkpoints/000000032/model")


def test_best_stays_over_an_interruption(encoder, tmp_path, monkeypatch):
    figures = iter([3, 5, 4, 2])
    monkeypatch.setattr("rae.training.decoder.held_out_figures", lambda *_: {"held_out_fd": next(figures)})
    bests = []
    for duration in ("1st", "2st", "3st", "4st"):
        changes = {"run__duration": duration, "run__evaluate_every": "1st", "run__save_every": "1st", "run__keep": 1}
        folder = train_decoder(decoder_recipe(encoder, **changes), tmp_path / "run")
        bests.append((folder / "best").read_text().strip())
    assert bests == ["000000008", "000000008", "000000008", "000000032"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000000032"]


def test_one_checkpoint_is_a_model(finished):
    earlier = RAE.from_pretrained(finished / "checkpoints/000000040").decoder.state_dict()
    expected = load_file(finished / "checkpoints/000000040/model/decoder.safetensors")
    assert all(torch.equal(earlier[name], expected[name]) for name in expected)


# --- refusals


def test_broken_image_is_fatal_or_reported_once(encoder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    (tmp_path / "images/2.png").write_bytes((tmp_path / "images/2.png").read_bytes()[:45])
    recipe = decoder_recipe(encoder, data__source=str(tmp_path / "images"), data__held_out=0.0)
    with pytest.raises(ImageError, match=r"2\.png: cannot be decoded"):
        train_decoder(recipe, tmp_path / "fatal")
    skipping = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_broken": "skip"})})
    train_decoder(skipping, tmp_path / "run")
    assert [Path(name).name for name in log(tmp_path / "run", "broken")] == ["2.png"]
    assert capsys.readouterr().err.count("cannot be read; the next image takes its place") == 1


def test_loss_that_is_not_finite_stops_the_run(encoder, tmp_path):
    recipe = decoder_recipe(encoder, optim__lr=1e30, run__save_every="1st")
    with pytest.raises(
        TrainingError, match=r"the (loss|gradient's norm) is (nan|inf) in step \d+ \(images .* lower optim\.lr"
    ):
        train_decoder(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder__patch_size": 5},
            r"make images of 10 x 10, the encoder takes 16 x 16.*patch_size=8 makes them equal",
        ),
        ({"decoder__size": (16, 1, 3, 32)}, "width 16 is not a multiple of its 3 heads"),
        ({"run__duration": "7img"}, "less than one batch of 8 images"),
    ],
)
def test_impossible_recipes(encoder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_decoder(decoder_recipe(encoder, **changes), tmp_path / "run")


def test_misspelt_key_names_the_nearest(encoder, tmp_path, finished):
    text = (finished / "recipe.yaml").read_text().replace("micro_batch:", "microbatch:")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.microbatch: unknown key; did you mean 'micro_batch'"):
        load_recipe(DecoderRecipe, tmp_path / "r.yaml")


def test_folders_that_are_not_free(encoder, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(TrainingError, match="holds files but no run"):
        train_decoder(decoder_recipe(encoder), tmp_path / "mine")
    with (
        Run(tmp_path / "run", decoder_recipe(encoder), epoch=10),
        pytest.raises(TrainingError, match="another process"),
    ):
        train_decoder(decoder_recipe(encoder), tmp_path / "run")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(TrainingError, match="pip install wandb"):
        train_decoder(decoder_recipe(encoder, run__trackers=("wandb",)), tmp_path / "tracked")
