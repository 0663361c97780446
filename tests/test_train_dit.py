"""Stage 2: what the loop computes, what it saves, and how it refuses."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import decoder_recipe, dit_recipe, lines, log, save_encoder

from rae import RAE, DiffusionModel, generate
from rae.config import ConfigError, load_recipe
from rae.data.images import ImageError, open_split
from rae.data.latent_format import store
from rae.data.order import image_index, mirrored, noise_draws
from rae.training import dit
from rae.training.decoder import DecoderRecipe, train_decoder
from rae.training.dit import train_dit
from rae.training.dit_recipe import DiTRecipe
from rae.training.latents import cache_latents, cached_latents
from rae.training.run import Run
from rae.training.run_folder import TrainingError


@pytest.fixture(scope="module")
def rae(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stage1")
    return train_decoder(decoder_recipe(save_encoder(root / "encoder")), root / "run")


def test_loss_falls_and_the_model_samples(rae, tmp_path):
    length = {"run__duration": "300st", "run__log_every": "50st", "run__save_every": "100%"}
    recipe = dit_recipe(rae, **length, run__evaluate_every="50%", latents="memory", optim__lr=3e-3)
    folder = train_dit(recipe, tmp_path / "run")
    assert log(folder, "loss")[-1] < 0.9 * log(folder, "loss")[0]
    assert log(folder, "held_out_loss")[-1] < log(folder, "held_out_loss")[0]
    model, autoencoder = DiffusionModel.from_pretrained(folder), RAE.from_pretrained(rae)
    (batch,) = generate(model, autoencoder, ["3", "7"], seeds=[0, 1], steps=3)
    assert batch.images.shape == (2, 3, 16, 16)
    assert model.config.latent_identity == autoencoder.latent_identity
    with Image.open(folder / "samples/000002400.png") as sheet:
        assert sheet.size == (2 * 16, 2 * 16)  # a row without and one with guidance


def test_every_saved_model_is_its_average_of_the_weights(rae, tmp_path):
    decays = {"model": 0.9, "model-ema0.5": 0.5, "model-ema0.99": 0.99}
    recipe = dit_recipe(rae, optim__ema=list(decays.values()), run__save_every="1st", run__keep=99)
    folder = train_dit(recipe, tmp_path / "run")
    torch.manual_seed(0)
    start = DiffusionModel(DiffusionModel.from_pretrained(folder).config).network.state_dict()
    steps = sorted((folder / "checkpoints").iterdir())
    history = [load_file(step / "train/weights.safetensors") for step in steps]
    n = len(history)
    for name, decay in decays.items():
        saved = DiffusionModel.from_pretrained(steps[-1] / name).network.state_dict()
        for key, value in saved.items():
            # decay^n start + (1 - decay) sum_k decay^(n-1-k) w_k
            weighted = [decay ** (n - 1 - k) * weights[key].double() for k, weights in enumerate(history)]
            expected = decay**n * start[key].double() + (1 - decay) * sum(weighted)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    newest = DiffusionModel.from_pretrained(folder).network.state_dict()  # a run stands for its first average
    first = DiffusionModel.from_pretrained(steps[-1] / "model").network.state_dict()
    assert all(torch.equal(value, newest[key]) for key, value in first.items())


def test_every_average_goes_on_from_a_checkpoint(rae, tmp_path):
    recipe = dit_recipe(rae, optim__ema=[0.9, 0.99], run__duration="2st")
    folder = train_dit(recipe, tmp_path / "run")
    train_dit(dit_recipe(rae, optim__ema=[0.9, 0.99], run__duration="4st"), folder)
    whole = train_dit(dit_recipe(rae, optim__ema=[0.9, 0.99], run__duration="4st"), tmp_path / "whole")
    for file in ("model/model.safetensors", "model-ema0.99/model.safetensors"):
        ends = [load_file(run / "checkpoints/000000032" / file) for run in (folder, whole)]
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_models_of_named_steps_stay(rae, tmp_path, monkeypatch):
    every = train_dit(dit_recipe(rae, run__save_every="1st", run__keep=99), tmp_path / "every")
    recipe = dit_recipe(rae, run__keep_at=["2st", "50%"], run__save_every="3st", run__keep=1)

    def kill(run: Run, write) -> None:
        if run.seen == 6 * 8:
            raise KeyboardInterrupt  # after the models were kept, before the checkpoint is there
        original(run, write)

    original = Run.save
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            train_dit(recipe, tmp_path / "run")
    folder = train_dit(recipe, tmp_path / "run")
    assert sorted(path.name for path in (folder / "kept").iterdir()) == ["000000016", "000000048"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000000096"]
    for step in ("000000016", "000000048"):
        kept, then = (DiffusionModel.from_pretrained(path / step) for path in (folder / "kept", every / "checkpoints"))
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), then.parameters()))


def test_moments_that_cannot_be_kept_are_named(rae, tmp_path, capsys):
    folder = train_dit(dit_recipe(rae, run__duration="4st", run__keep_at=["2st", "1ep"]), tmp_path / "run")
    assert "run.keep_at: 1ep is after the end of the run (4st)" in capsys.readouterr().err
    train_dit(dit_recipe(rae, run__duration="6st", run__keep_at=["3st", "5st"]), folder)
    said = capsys.readouterr().err
    assert "run.keep_at: 3st was step 3, which is past and not kept" in said
    assert "5st" not in said
    assert sorted(path.name for path in (folder / "kept").iterdir()) == ["000000016", "000000040"]
    with pytest.raises(ConfigError, match=r"run\.keep_at 7img is less than one batch of 8"):
        train_dit(dit_recipe(rae, run__keep_at=["7img"]), tmp_path / "none")


def test_first_step_computes_the_flow_loss_of_its_images(rae, tmp_path):
    recipe = dit_recipe(rae, run__duration="1st", drop_labels=0.0, sheet__cfg=None)
    folder = train_dit(recipe, tmp_path / "run")
    # A fresh model puts out 0, so the loss is the mean square of noise - latents: nothing else of the loop enters.
    cache = cache_latents(RAE.from_pretrained(rae), *_images(recipe))
    n = cache.latents.shape[1]
    noise, _ = noise_draws(range(8), recipe.seed, cache.latents.shape[2:])
    views = [int(mirrored(p, recipe.seed)) for p in range(8)]
    x = cache.latents[views, [image_index(p, n, recipe.seed) for p in range(8)]]
    assert set(views) == {0, 1}
    assert log(folder, "loss")[0] == pytest.approx(float((noise - x).square().mean()), rel=1e-5)


def _images(recipe):
    return open_split(recipe.data)[0], recipe.data


def test_latents_in_memory_are_those_encoded_online(rae, tmp_path):
    online = train_dit(dit_recipe(rae, run__log_every="1st"), tmp_path / "online")
    memory = train_dit(dit_recipe(rae, run__log_every="1st", latents="memory"), tmp_path / "memory")
    assert log(memory, "loss") == pytest.approx(log(online, "loss"), rel=1e-4)


def test_an_encoder_in_bf16_trains_on_its_own_latents_and_the_log_says_how_far_they_are(rae, tmp_path, capsys):
    settings = {"run__duration": "1st", "run__log_every": "1st", "drop_labels": 0.0, "sheet__cfg": None}
    recipe = dit_recipe(rae, **settings, encoder__precision="bf16")
    runs = [train_dit(recipe, tmp_path / "online")]
    assert "the encoder computes in bf16: its latents differ from those of fp32 by" in capsys.readouterr().err
    runs.append(train_dit(recipe.model_copy(update={"latents": "memory"}), tmp_path / "memory"))
    images, data = _images(recipe)
    exact, autoencoder = RAE.from_pretrained(rae), RAE.from_pretrained(rae)
    autoencoder.encoder.to(torch.bfloat16)
    caches = [cache_latents(encoder, images, data) for encoder in (exact, autoencoder)]
    # as in the first step of float32 above, and all else in the loop is the same
    noise, _ = noise_draws(range(8), recipe.seed, caches[0].latents.shape[2:])
    expected = [float((noise - cache.take(range(8), recipe.seed)[0]).square().mean()) for cache in caches]
    assert abs(expected[0] - expected[1]) > 1e-4
    for run in runs:
        assert log(run, "loss")[0] == pytest.approx(expected[1], rel=1e-6)
    z, rounded = (cache_latents(encoder, open_split(data)[1], data).latents[0] for encoder in (exact, autoencoder))
    z, rounded = (latents[[i * len(latents) // 64 for i in range(64)]] for latents in (z, rounded))
    error = (rounded - z).square().mean().item()
    (noted,) = lines(runs[0], "precision")
    assert noted["latent_error"] == pytest.approx(error, rel=1e-5)
    assert noted["latent_snr"] == pytest.approx(10 * math.log10(z.square().mean().item() / error), rel=1e-5)
    assert (noted["about"], noted["precision"]) == ("encoder", "bf16")
    # more than latents that are rounded once, as a cache does, for the network rounds at every layer; less than 3 %
    assert store(z, "bf16").to("cpu").sub(z).square().mean() < error < 1e-3
    longer = dit_recipe(rae, **settings | {"run__duration": "2st"}, encoder__precision="bf16")
    assert len(lines(train_dit(longer, runs[0]), "precision")) == 1  # once in a run
    with pytest.raises(ConfigError, match=r"begun with another recipe:\n  encoder\.precision: 'bf16' -> 'fp32'\n"):
        train_dit(dit_recipe(rae, **settings), runs[0])


def test_an_encoder_in_fp32_says_nothing_of_precision(pretrained):
    assert not lines(pretrained, "precision")


def test_a_run_keeps_to_the_way_its_latents_are_taken(rae, pretrained, tmp_path):
    folder = shutil.copytree(pretrained, tmp_path / "run")
    said = r"was begun with latents: online, and the recipe says latents: memory\. Ask for the same, or begin a new run"
    with pytest.raises(TrainingError, match=said):
        train_dit(dit_recipe(rae, run__duration="5st", latents="memory"), folder)


def test_small_micro_batches_compute_the_large_batch(rae, tmp_path):
    whole = train_dit(dit_recipe(rae, run__log_every="1st"), tmp_path / "whole")
    for latents in ("online", "memory"):
        recipe = dit_recipe(rae, run__log_every="1st", run__micro_batch=3, latents=latents)
        parts = train_dit(recipe, tmp_path / latents)
        assert log(parts, "loss") == pytest.approx(log(whole, "loss"), rel=1e-4)
        assert log(parts, "grad_norm") == pytest.approx(log(whole, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network__kind": "dit"}, "network.head .* belongs to dit-dh"),
        ({"network__unconditional": True, "sheet__cfg": 2.0}, "guides by classes, which network.unconditional ignores"),
        ({"latents": "memory", "data__crop": "random"}, "set latents: online"),
        ({"encoder__precision": "bf16", "latents": "caches/x"}, r"caches/x holds those of `rae cache`.*precision=fp32"),
        ({"encoder__precision": "bf16", "rae": "pixels@16"}, r"is an RAE's; pixels@16 computes in fp32"),
        ({"drop_labels": 0.0}, "needs the null label, which drop_labels 0 never trains"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(rae, changes, message):
    with pytest.raises(ValueError, match=message):
        dit_recipe(**{"rae": rae} | changes)


def test_cached_parts_follow_the_stream(rae):
    images, data = _images(dit_recipe(rae))
    cache = cache_latents(RAE.from_pretrained(rae), images, data)
    ((first, second),) = (list(p) for p in cached_latents(cache, [range(5, 9)], 3, 3, torch.device("cpu")))
    assert first[2] + second[2] == [5, 6, 7, 8]
    assert first[1].tolist() == [images.labels[image_index(p, len(images), 3)] for p in (5, 6, 7)]


def test_names_of_a_file_travel_with_the_model_and_must_stay(rae, tmp_path):
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "names.txt").write_text("\n".join(words))
    recipe = dit_recipe(rae, data__class_names=str(tmp_path / "names.txt"), run__duration="1st")
    folder = train_dit(recipe, tmp_path / "run")
    model = DiffusionModel.from_pretrained(folder)
    assert model.config.class_names == tuple(words)
    assert model.label_indices(["seven"]).tolist() == [7]
    (tmp_path / "names.txt").rename(tmp_path / "moved.txt")
    moved = {"data__class_names": str(tmp_path / "moved.txt"), "run__duration": "2st"}
    train_dit(dit_recipe(rae, **moved), folder)
    (tmp_path / "moved.txt").write_text("\n".join(words[::-1]))
    with pytest.raises(TrainingError, match=r"was trained on class names \w{12} and finds class names \w{12}:"):
        train_dit(dit_recipe(rae, **moved | {"run__duration": "3st"}), folder)


def first_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run of one step began with: EMA = 0.9 first + 0.1 weights."""
    ema = DiffusionModel.from_pretrained(folder).network.state_dict()
    online = load_file(folder / "checkpoints/000000008/train/weights.safetensors")
    return {name: (value - 0.1 * online[name]) / 0.9 for name, value in ema.items()}


@pytest.fixture(scope="module")
def pretrained(rae, tmp_path_factory) -> Path:
    return train_dit(dit_recipe(rae, run__duration="4st"), tmp_path_factory.mktemp("stage2") / "run")


def test_a_run_begins_with_the_averaged_weights_of_another_for_other_classes(rae, pretrained, tmp_path, capsys):
    for name in ("7", "cup"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"images/{name}/{i}.png")
    source = tmp_path / "source"
    source.symlink_to(pretrained)
    changes = {"network__init": str(source), "data__source": str(tmp_path / "images"), "data__held_out": 0.25}
    folder = train_dit(dit_recipe(rae, **changes, run__duration="1st"), tmp_path / "run")
    said = "1 of 2 classes are known by name, the others begin as its null class"
    assert f"the model starts from {source}; {said}" in capsys.readouterr().err
    assert DiffusionModel.from_pretrained(folder).config.class_names == ("7", "cup")
    expected = DiffusionModel.from_pretrained(pretrained).network.state_dict()
    expected["labels.weight"] = expected["labels.weight"][[7, 10, 10]]
    for name, value in first_weights(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    source.unlink()
    train_dit(dit_recipe(rae, **changes, run__duration="2st"), folder)  # a resumed run does not begin again
    assert "starts from" not in capsys.readouterr().err


def test_a_run_begins_with_another_s_weights_at_a_higher_resolution(rae, pretrained, tmp_path, capsys):
    larger = {"encoder__image_size": (32, 32), "run__duration": "2st"}
    autoencoder = train_decoder(decoder_recipe(save_encoder(tmp_path / "encoder"), **larger), tmp_path / "rae")
    changes = {"network__init": str(pretrained), "run__duration": "1st", "flow__shift_base": 32}
    folder = train_dit(dit_recipe(autoencoder, **changes), tmp_path / "run")
    said = capsys.readouterr().err
    assert "the latent space (encoder, image size, latent statistics) is another" in said
    assert "the shift of the times is another: 1 -> 2.828; positions are resized: (2, 2) -> (4, 4) tokens" in said
    expected = DiffusionModel.from_pretrained(pretrained).network.state_dict()
    for name, value in first_weights(folder).items():
        if name != "position":
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_models_that_cannot_be_started_from(rae, pretrained, tmp_path):
    wider = dit_recipe(rae, network__init=str(pretrained), network__size=(32, 2, 1))
    with pytest.raises(
        ConfigError, match=r"network\.init: .*width 32 cannot start from one of 16; take network\.size="
    ):
        train_dit(wider, tmp_path / "wider")
    with pytest.raises(ConfigError, match=r"network\.init: .*holds the autoencoder that `rae train-decoder` makes"):
        train_dit(dit_recipe(rae, network__init=str(rae)), tmp_path / "rae")


def test_images_without_classes_make_an_unconditional_model(rae, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    recipe = dit_recipe(rae, data__source=str(tmp_path / "images"), data__held_out=0.5)
    model = DiffusionModel.from_pretrained(train_dit(recipe, tmp_path / "run"))
    assert (model.null_label, model.config.class_names) == (0, None)
    recipe = dit_recipe(rae, network__unconditional=True, sheet__cfg=None, run__precision="bf16", optim__name="muon")
    assert DiffusionModel.from_pretrained(train_dit(recipe, tmp_path / "digits")).null_label == 0


def test_first_images_that_cannot_be_read_are_named_before_the_first_step(rae, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    for i in range(2):
        (tmp_path / f"images/{i}.png").write_bytes((tmp_path / f"images/{i}.png").read_bytes()[:45])
    monkeypatch.setattr(dit, "LOOK", 2)  # the images 0 and 1
    changes = {"data__source": str(tmp_path / "images"), "data__held_out": 0.0, "data__on_broken": "skip"}
    with pytest.raises(ImageError, match=r"none of the 2 images can be read; the first is .*0\.png"):
        train_dit(dit_recipe(rae, **changes), tmp_path / "run")


def test_another_autoencoder_is_refused_on_resume(rae, tmp_path):
    link = tmp_path / "rae"
    link.symlink_to(rae)
    train_dit(dit_recipe(link), tmp_path / "run")
    link.unlink()
    encoder = save_encoder(tmp_path / "encoder")
    other = train_decoder(decoder_recipe(encoder, statistics=False), tmp_path / "other")
    link.symlink_to(other)
    with pytest.raises(TrainingError, match="was trained on latents"):
        train_dit(dit_recipe(link), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network__head": (8, 2, 1)}, "Theorem 1"),
        ({"network__size": (18, 3, 1)}, "multiple of 4"),
    ],
)
def test_impossible_recipes(rae, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_dit(dit_recipe(rae, **changes), tmp_path / "run")


def test_the_other_kind_of_model_or_recipe_is_named_in_one_line(rae, tmp_path):
    run = train_dit(dit_recipe(rae), tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds the diffusion model that `rae train-dit` makes; what is needed here"):
        RAE.from_pretrained(run)
    with pytest.raises(ValueError, match="holds the autoencoder that `rae train-decoder` makes"):
        DiffusionModel.from_pretrained(rae)
    with pytest.raises(ConfigError, match="this is a recipe of stage 2; `rae train-dit` takes it"):
        load_recipe(DecoderRecipe, run / "recipe.yaml")
    with pytest.raises(ConfigError, match="this is a recipe of stage 1; `rae train-decoder` takes it"):
        load_recipe(DiTRecipe, rae / "recipe.yaml")
