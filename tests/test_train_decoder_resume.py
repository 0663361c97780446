"""Stage 1 goes on: after a signal, for longer, from another run's weights; and what must be as it was."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny import decoder_recipe, lines, log, same_bits

from rae import RAE
from rae.config import ConfigError, load_recipe
from rae.sources import SourceError
from rae.training.decoder import DecoderRecipe, train_decoder
from rae.training.run import Run
from rae.training.run_folder import TrainingError

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


def test_signal_in_the_last_step_ends_what_comes_after(encoder, tmp_path, monkeypatch):
    interrupt_at(11, signal.SIGTERM, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        train_decoder(decoder_recipe(encoder), tmp_path / "run")
    assert stopped.value.code == 143
    assert (tmp_path / "run/latest").read_text() == "000000096\n"


def test_signal_before_the_first_step_ends_at_once(encoder, finished, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("rae.training.decoder.latent_statistics", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            train_decoder(decoder_recipe(encoder), tmp_path / "run")
    assert stopped.value.code == 143
    assert "ended before the first step" in capsys.readouterr().err
    train_decoder(decoder_recipe(encoder), tmp_path / "run")
    assert same_bits(tmp_path / "run", finished)


# --- the same command, and a longer run


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


def test_shorter_run_than_the_one_that_is_there(encoder, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    shorter = decoder_recipe(encoder, run__duration="6st", run__save_every="1st", run__keep=99)
    train_decoder(shorter, tmp_path / "run")
    assert "12 steps are made already, more than the 6 asked for" in capsys.readouterr().err
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


# --- what must be as it was


def test_another_recipe_is_refused_with_the_difference(encoder, finished):
    with pytest.raises(ConfigError, match=r"begun with another recipe:\n  noise\.tau: 0\.8 -> 0\.5\n  optim\.lr: "):
        train_decoder(decoder_recipe(encoder, noise__tau=0.5, optim__lr=1e-4), finished)


def test_how_a_step_is_computed_may_change(encoder, finished, tmp_path, capsys):
    """Out of memory when the adversarial term starts: the run goes on in smaller parts."""
    folder = shutil.copytree(finished, tmp_path / "run")
    changed = {"run__micro_batch": 3, "run__recompute": True}
    train_decoder(decoder_recipe(encoder, run__duration="13st", run__save_every="1st", run__keep=99, **changed), folder)
    said = capsys.readouterr().err
    assert "run.micro_batch is another than before: from here on sums are rounded otherwise" in said
    assert load_recipe(DecoderRecipe, folder / "recipe.yaml").run.micro_batch == 3
    assert log(folder, "loss")[-1] < 2


def test_a_run_that_begins_anew_forgets_what_was_said_of_the_attempt_before(encoder, tmp_path):
    recipe = decoder_recipe(encoder, run__duration="2st")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    earlier = {"images": 0, "about": "judge of x: another", "judge_x": "another"}
    stopped = {"images": 0, "stopped": "the loss is nan"}
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (earlier, stopped)))
    train_decoder(recipe, tmp_path / "run")
    assert log(tmp_path / "run", "judge_x") == log(tmp_path / "run", "stopped") == []
    assert lines(tmp_path / "run", "l1")


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


def test_a_damaged_line_of_the_log_is_refused_before_anything_is_computed(encoder, finished, tmp_path):
    folder, recipe = shutil.copytree(finished, tmp_path / "run"), {"run__save_every": "1st", "run__keep": 99}
    path = folder / "log.jsonl"
    sound = path.read_text()
    first, second, *rest = sound.splitlines(keepends=True)
    path.write_text("".join([first, "xx" + second, *rest]))
    longer = decoder_recipe(encoder, **recipe, run__duration="13st")
    with pytest.raises(TrainingError, match=r"no figures can be read from line 2\.\nTraining") as refused:
        train_decoder(longer, folder)
    subprocess.run(str(refused.value).partition("file: ")[2], shell=True, check=True)
    assert path.read_text() == "".join([first, *rest])
    path.write_text(sound + '{"images": 9')  # as a kill leaves it
    train_decoder(longer, folder)
    assert [line["images"] for line in lines(folder, "l1")][-1] == 104


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
