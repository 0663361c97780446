"""Stage 1: what the loop computes, what it saves, and how it refuses."""

import functools
import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import adversarial, decoder_recipe, save_encoder, train_all_in_processes

from rae import RAE, Decoder, load_encoder
from rae.autoencoder.latents import tokens_to_map
from rae.config import ConfigError, load_recipe
from rae.data.images import ImageError, Views, open_split, to_unit
from rae.sources import SourceError
from rae.training.decoder import DecoderRecipe, _of_law, train_decoder
from rae.training.lpips import LPIPS
from rae.training.perceptual import feature_distance
from rae.training.run import Run
from rae.training.run_folder import TrainingError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory) -> Path:
    """A run of 12 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs") / "decoder"
    return train_decoder(decoder_recipe(encoder, run__save_every="1st", run__keep=99), folder)


def log(folder: Path, figure: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[figure] for line in lines if figure in line]


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


# --- interruption


def interrupt_at(step: int, number: int, monkeypatch) -> None:
    """Let the signal arrive in the middle of a step."""

    def average(run: Run, losses: torch.Tensor) -> list[float]:
        if run.step == step:
            os.kill(os.getpid(), number)
        return original(run, losses)

    original = Run.average
    monkeypatch.setattr(Run, "average", average)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_the_same_command_goes_on(encoder, finished, tmp_path, monkeypatch, capsys, number, status):
    recipe = decoder_recipe(encoder, run__log_every="5st", run__save_every="100%")
    with monkeypatch.context() as patch:
        interrupt_at(6, number, patch)
        with pytest.raises(SystemExit) as stopped:
            train_decoder(recipe, tmp_path / "run")
    assert stopped.value.code == status
    assert (tmp_path / "run/latest").read_text() == "000000056\n"
    assert "Run the same command again to go on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train_decoder(recipe, tmp_path / "run")
    ends = [
        load_file(folder / "checkpoints/000000096/train/weights.safetensors") for folder in (tmp_path / "run", finished)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert log(tmp_path / "run", "loss") == log(train_decoder(recipe, tmp_path / "unbroken"), "loss")


def test_finished_run_says_so_and_changes_nothing(encoder, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")}
    train_decoder(decoder_recipe(encoder, run__save_every="1st", run__keep=99), finished)
    assert "finished, 96 images seen" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")}


def test_longer_run_says_where_the_learning_rate_goes(encoder, tmp_path, capsys):
    decaying = {"optim__schedule": "cosine", "optim__final_lr": 1e-5}
    train_decoder(decoder_recipe(encoder, **decaying), tmp_path / "run")
    train_decoder(decoder_recipe(encoder, **decaying, run__duration="24st"), tmp_path / "run")
    said = capsys.readouterr().err
    assert "goes on at 0.000505, not 1e-05. optim.warmup=0st optim.decay_end=12st keep the old ones" in said
    kept = decoder_recipe(encoder, **decaying, run__duration="26st", optim__decay_end="24st")
    train_decoder(kept, tmp_path / "run")
    assert "the learning rate goes on" not in capsys.readouterr().err


def test_moved_encoder_and_images_are_the_same_run(encoder, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    train_decoder(decoder_recipe(encoder, data__source=str(tmp_path / "images")), tmp_path / "run")
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "encoder").symlink_to(encoder)
    moved = {"data__source": str(tmp_path / "moved"), "run__duration": "14st"}
    train_decoder(decoder_recipe(tmp_path / "encoder", **moved), tmp_path / "run")
    assert (tmp_path / "run/latest").read_text() == "000000112\n"
    assert len(list((tmp_path / "run").glob("statistics-*"))) == 1


def test_longer_run_goes_on_from_a_finished_one(encoder, tmp_path):
    train_decoder(decoder_recipe(encoder), tmp_path / "run")
    train_decoder(decoder_recipe(encoder, run__duration="14st"), tmp_path / "run")
    assert (tmp_path / "run/latest").read_text() == "000000112\n"
    assert load_recipe(DecoderRecipe, tmp_path / "run/recipe.yaml").run.duration == "14st"


# --- refusals


def test_another_recipe_is_refused_with_the_difference(encoder, finished):
    with pytest.raises(ConfigError, match=r"begun with another recipe:\n  noise\.tau: 0\.8 -> 0\.5\n  optim\.lr: "):
        train_decoder(decoder_recipe(encoder, noise__tau=0.5, optim__lr=1e-4), finished)


def test_recipe_may_change_until_something_is_saved(encoder, tmp_path):
    with pytest.raises(ConfigError):
        train_decoder(decoder_recipe(encoder, decoder__patch_size=5), tmp_path / "run")
    train_decoder(decoder_recipe(encoder), tmp_path / "run")
    assert load_recipe(DecoderRecipe, tmp_path / "run/recipe.yaml").decoder.patch_size == 8


def test_other_images_are_refused_on_resume(encoder, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    recipe = decoder_recipe(encoder, data__source=str(tmp_path / "images"), data__held_out=0.0)
    train_decoder(recipe, tmp_path / "run")
    Image.new("RGB", (16, 16)).save(tmp_path / "images/4.png")
    with pytest.raises(TrainingError, match=r"trained on images .* files were added, removed or changed"):
        train_decoder(recipe, tmp_path / "run")


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


# --- the whole objective

GAME = ("adversarial", "lambda", "d_loss", "d_real", "d_fake", "d_accuracy")


def gan(encoder, *, adapt_at="last-layer", discriminator: dict | None = None, **changes) -> DecoderRecipe:
    """Six steps; the discriminator is trained from the second one on and used from the third one on."""
    section = adversarial(
        encoder, start="2st", adapt_at=adapt_at, discriminator={"start": "1st"} | (discriminator or {})
    )
    return decoder_recipe(
        encoder, loss__adversarial=section, **{"run__duration": "6st", "run__log_every": "1st"} | changes
    )


def lines(folder: Path) -> list[dict[str, float]]:
    """What was logged of training, without the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    clock = ("time", "images_per_second")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines if "loss" in line]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds."""
    newest = folder / "checkpoints" / (folder / "latest").read_text().strip()
    found = {}
    for path in newest.rglob("*.safetensors"):
        found |= {f"{path.relative_to(newest)}:{name}": value for name, value in load_file(path).items()}
    return found


def same_bits(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def close(a: Path, b: Path, rel: float) -> None:
    """Every figure of both logs."""
    first, second = lines(a), lines(b)
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for line, other in zip(first, second):
        for name, value in line.items():
            # a token's logits may change places by rounding, and with them the accuracy
            tolerance = {"abs": 0.05} if name == "d_accuracy" else {"rel": rel, "abs": 1e-5}
            assert other[name] == pytest.approx(value, **tolerance), (name, line["images"])


@pytest.fixture(scope="module")
def played(encoder, tmp_path_factory) -> Path:
    return train_decoder(gan(encoder), tmp_path_factory.mktemp("gan") / "run")


def test_figures_appear_with_their_players(encoder, played, tmp_path, capsys):
    assert len(lines(played)) == 6
    for step, line in enumerate(lines(played)):
        assert {name for name in GAME if name in line} == set(GAME[0 if step >= 2 else 2 :] if step >= 1 else ())
    names = {name.partition(":")[0] for name in tensors(played)}
    assert {"train/discriminator.safetensors", "train/discriminator_optimizer.safetensors"} < names


def test_the_log_names_the_judges(encoder, tmp_path, capsys):
    train_decoder(gan(encoder, run__duration="1st"), tmp_path / "run")
    said = capsys.readouterr().err
    assert f"0.1 x perceptual (features of the encoder, {encoder}, from 0st)" in said
    assert f"0.75 x lambda x adversarial (discriminator on {encoder}, trained from 1st, used from 2st)" in said
    names = {name.partition(":")[0] for name in tensors(tmp_path / "run")}
    assert "train/discriminator_optimizer.safetensors" not in names  # it has not learnt anything yet


def test_the_discriminator_leaves_the_decoder_alone_until_it_plays(encoder, played, tmp_path):
    alone = train_decoder(decoder_recipe(encoder, run__duration="6st", run__log_every="1st"), tmp_path / "alone")
    for step in range(2):
        with_it, without = lines(played)[step], lines(alone)[step]
        assert without == {name: with_it[name] for name in without}
    # the third step's loss is that of the same weights, its gradient is another one
    assert lines(alone)[2]["loss"] == lines(played)[2]["loss"]
    assert lines(alone)[2]["grad_norm"] != lines(played)[2]["grad_norm"]


def test_perceptual_term_from_its_start(encoder, tmp_path):
    folder = train_decoder(
        decoder_recipe(encoder, loss__perceptual__start="2st", run__log_every="1st"), tmp_path / "run"
    )
    for step, line in enumerate(lines(folder)[:4]):
        assert ("perceptual" in line) == (step >= 2)
        assert line["loss"] == pytest.approx(line["l1"] + 0.1 * line.get("perceptual", 0))


@pytest.mark.parametrize("adapt_at", ["last-layer", "image"])
@pytest.mark.parametrize("fakes", ["fresh", "reused"])
def test_micro_batches_of_the_whole_objective(encoder, tmp_path, adapt_at, fakes):
    settings = {"adapt_at": adapt_at, "discriminator": {"fakes": fakes, "augment": 0.5, "cutout": 0.2}}
    whole, parts = (
        train_decoder(gan(encoder, **settings, run__micro_batch=size, run__duration="4st"), tmp_path / f"{size}")
        for size in (None, 3)
    )
    close(whole, parts, rel=1e-2)
    assert lines(whole)[0]["grad_norm"] == pytest.approx(lines(parts)[0]["grad_norm"], rel=1e-4)


def test_fakes_fresh_and_reused(encoder, played, tmp_path):
    reused = train_decoder(gan(encoder, discriminator={"fakes": "reused"}), tmp_path / "reused")
    assert lines(reused)[1]["d_real"] == lines(played)[1]["d_real"]
    assert lines(reused)[1]["d_fake"] != lines(played)[1]["d_fake"]


def test_two_processes_compute_what_one_does(encoder, tmp_path):
    paper = {"fakes": "reused", "augment": 0.5}
    recipes = {
        "plain": decoder_recipe(encoder, run__duration="4st", run__log_every="1st", run__micro_batch=2),
        "code": gan(encoder, discriminator={"norm": "batch", "fakes": "fresh"}),
        "paper": gan(encoder, adapt_at="image", discriminator=paper, run__micro_batch=3),
    }
    train_all_in_processes(2, {tmp_path / name: recipe for name, recipe in recipes.items()})
    for name, recipe in recipes.items():
        alone = train_decoder(recipe, tmp_path / f"{name}-alone")
        close(alone, tmp_path / name, rel=1e-3 if name == "plain" else 1e-2)
        assert log(tmp_path / name, "loss") == pytest.approx(log(alone, "loss"), rel=1e-5 if name == "plain" else 1e-4)


def test_a_run_resumed_before_and_in_the_game_ends_in_the_same_bits(encoder, played, tmp_path):
    for duration in ("1st", "4st", "6st"):
        broken = train_decoder(gan(encoder, run__duration=duration), tmp_path / "run")
    assert same_bits(broken, played)
    assert lines(broken) == lines(played)


def test_recomputed_activations_change_no_bit(encoder, played, tmp_path):
    assert same_bits(train_decoder(gan(encoder, run__recompute=True), tmp_path / "run"), played)


def test_compiled_run_saves_the_average_of_its_weights(encoder, played, tmp_path, monkeypatch):
    """Traced and differentiated as ever; machine code is not made of it, which takes most of a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    changes = {"run__compile": True, "run__duration": "3st", "run__save_every": "1st", "run__keep": 9}
    folder = train_decoder(gan(encoder, **changes), tmp_path / "run")
    torch.manual_seed(0)
    rae = RAE.from_pretrained(folder)
    ema = Decoder(rae.decoder.config).state_dict()
    for step in sorted((folder / "checkpoints").iterdir()):
        online = load_file(step / "train/weights.safetensors")
        ema = {name: 0.9 * value + 0.1 * online[name] for name, value in ema.items()}
    assert online.keys() == ema.keys()
    for name, value in rae.decoder.state_dict().items():
        torch.testing.assert_close(value, ema[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, online[name])
    for mine, plain in zip(lines(folder), lines(played)):
        assert mine["loss"] == pytest.approx(plain["loss"], rel=1e-3)


def test_best_names_the_saved_checkpoint_that_did_best(encoder, tmp_path, monkeypatch):
    figures = iter([9, 4, 1, 3, 8, 5, 2, 6])  # the third and the seventh step's are not saved
    monkeypatch.setattr("rae.training.decoder._evaluate", lambda *_: {"held_out_fd": next(figures)})
    changes = {"run__duration": "8st", "run__evaluate_every": "1st", "run__save_every": "2st", "run__keep": 1}
    folder = train_decoder(decoder_recipe(encoder, **changes), tmp_path / "run")
    assert (folder / "best").read_text() == "000000032\n"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"000000032", "000000064"}
    RAE.from_pretrained(folder / "checkpoints/000000032/model")


def test_best_stays_over_an_interruption(encoder, tmp_path, monkeypatch):
    figures = iter([3, 5, 4, 2])
    monkeypatch.setattr("rae.training.decoder._evaluate", lambda *_: {"held_out_fd": next(figures)})
    bests = []
    for duration in ("1st", "2st", "3st", "4st"):
        changes = {"run__duration": duration, "run__evaluate_every": "1st", "run__save_every": "1st", "run__keep": 1}
        folder = train_decoder(decoder_recipe(encoder, **changes), tmp_path / "run")
        bests.append((folder / "best").read_text().strip())
    assert bests == ["000000008", "000000008", "000000008", "000000032"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000000032"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"adversarial": {"discriminator": {"norm": "batch"}}}, r"run\.micro_batch 3 is less than the 8"),
        (
            {"adversarial": {"discriminator": {"start": "3st"}, "start": "2st"}},
            "starts at 2st, before its discriminator",
        ),
    ],
)
def test_impossible_games(encoder, tmp_path, section, message):
    recipe = decoder_recipe(
        encoder, loss__adversarial=adversarial(encoder, **section["adversarial"]), run__micro_batch=3
    )
    with pytest.raises(ConfigError, match=message):
        train_decoder(recipe, tmp_path / "run")


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
    for line in lines(folder):
        assert line["loss"] == pytest.approx(line["l1"] + 0.1 * line["perceptual"])


def test_lpips_that_cannot_be_had_names_the_fallback_before_training(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"vgg16.* could not be downloaded .*loss\.perceptual\.kind=encoder"):
        train_decoder(decoder_recipe(encoder, loss__perceptual__kind="lpips"), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


# --- from another decoder


def first_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run of one step began with: EMA = 0.9 first + 0.1 weights."""
    ema = RAE.from_pretrained(folder).decoder.state_dict()
    online = load_file(folder / "checkpoints/000000008/train/weights.safetensors")
    return {name: (value - 0.1 * online[name]) / 0.9 for name, value in ema.items()}


def test_a_run_begins_with_the_averaged_weights_of_another(encoder, finished, tmp_path, capsys):
    recipe = decoder_recipe(encoder, decoder__init=str(finished), run__duration="1st")
    began = first_weights(train_decoder(recipe, tmp_path / "run"))
    assert f"the decoder starts from {finished}\n" in capsys.readouterr().err
    for name, value in RAE.from_pretrained(finished).decoder.state_dict().items():
        torch.testing.assert_close(began[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_begins_with_another_s_weights_at_a_higher_resolution(encoder, finished, tmp_path, capsys):
    changes = {"encoder__image_size": (32, 32), "decoder__init": str(finished), "run__duration": "1st"}
    began = first_weights(train_decoder(decoder_recipe(encoder, **changes), tmp_path / "run"))
    assert "positions are resized: (2, 2) -> (4, 4) tokens" in capsys.readouterr().err
    for name, value in RAE.from_pretrained(finished).decoder.state_dict().items():
        if name != "positions":
            torch.testing.assert_close(began[name], value, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_does_not_begin_again(encoder, finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    folder = train_decoder(decoder_recipe(encoder, decoder__init=str(source), run__duration="2st"), tmp_path / "run")
    shutil.rmtree(source)
    train_decoder(decoder_recipe(encoder, decoder__init=str(source), run__duration="4st"), folder)
    whole = decoder_recipe(encoder, decoder__init=str(finished), run__duration="4st")
    assert same_bits(folder, train_decoder(whole, tmp_path / "whole"))


def test_decoders_that_cannot_be_started_from(encoder, finished, tmp_path):
    wider = decoder_recipe(encoder, decoder__init=str(finished), decoder__size=(32, 1, 2, 32))
    with pytest.raises(
        ConfigError, match=r"decoder\.init: .*width 32 cannot start from one of 16; take .*\[16,1,2,32\]"
    ):
        train_decoder(wider, tmp_path / "wider")
    with pytest.raises(SourceError, match="no such folder"):
        train_decoder(decoder_recipe(encoder, decoder__init="/nowhere/at/all"), tmp_path / "nowhere")


def test_start_in_percent_cannot_move_once_it_has_come(encoder, tmp_path):
    section = adversarial(encoder, start="50%", discriminator={"start": "50%"})
    train_decoder(decoder_recipe(encoder, loss__adversarial=section, run__duration="6st"), tmp_path / "run")
    with pytest.raises(TrainingError, match=r"start was step 3 of this run, it is step 6 now.*start=3st keeps it"):
        train_decoder(decoder_recipe(encoder, loss__adversarial=section, run__duration="12st"), tmp_path / "run")
    kept = adversarial(encoder, start="3st", discriminator={"start": "3st"})
    train_decoder(decoder_recipe(encoder, loss__adversarial=kept, run__duration="12st"), tmp_path / "run")
    assert (tmp_path / "run/latest").read_text() == "000000096\n"


def test_other_weights_of_the_discriminators_network_are_refused(encoder, tmp_path):
    features = save_encoder(tmp_path / "features")
    recipe = decoder_recipe(encoder, loss__adversarial=adversarial(features))
    train_decoder(recipe, tmp_path / "run")
    weights = load_file(features / "model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1}, features / "model.safetensors", metadata={"format": "pt"})
    longer = decoder_recipe(encoder, loss__adversarial=adversarial(features), run__duration="14st")
    with pytest.raises(TrainingError, match="was trained on discriminator features"):
        train_decoder(longer, tmp_path / "run")


def test_refused_command_leaves_the_run_as_it_was(encoder, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    other = decoder_recipe(encoder, data__source=str(tmp_path / "images"), run__save_every="1st", run__keep=99)
    with pytest.raises(TrainingError, match="or the recipe names others"):
        train_decoder(other, tmp_path / "run")
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


def test_shorter_run_than_the_one_that_is_there(encoder, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    shorter = decoder_recipe(encoder, run__duration="6st", run__save_every="1st", run__keep=99)
    train_decoder(shorter, tmp_path / "run")
    assert "12 steps are made already, more than the 6 asked for" in capsys.readouterr().err
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


def test_signal_in_the_last_step_ends_what_comes_after(encoder, tmp_path, monkeypatch):
    interrupt_at(11, signal.SIGTERM, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        train_decoder(decoder_recipe(encoder), tmp_path / "run")
    assert stopped.value.code == 143
    assert (tmp_path / "run/latest").read_text() == "000000096\n"


def test_terms_that_never_begin_are_named(encoder, tmp_path, capsys):
    section = adversarial(encoder, start="8ep")
    train_decoder(decoder_recipe(encoder, loss__adversarial=section), tmp_path / "run")
    said = capsys.readouterr().err
    assert "loss.adversarial.start: 8ep is not before the end of the run (12st): it will not begin" in said


def test_one_checkpoint_is_a_model(finished):
    earlier = RAE.from_pretrained(finished / "checkpoints/000000040").decoder.state_dict()
    expected = load_file(finished / "checkpoints/000000040/model/decoder.safetensors")
    assert all(torch.equal(earlier[name], expected[name]) for name in expected)
