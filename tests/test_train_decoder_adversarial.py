"""Stage 1 with a discriminator: when it plays, what is logged, and that the way of computing changes nothing."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import adversarial, decoder_recipe, lines, log, same_bits, save_encoder, tensors, train_all_in_processes

from rae import RAE, Decoder
from rae.commands.run_record import read_run
from rae.commands.run_report import facts
from rae.config import ConfigError
from rae.training.adversarial import open_frozen
from rae.training.decoder import DecoderRecipe, train_decoder
from rae.training.run_folder import TrainingError

GAME = ("adversarial", "lambda", "d_loss", "d_real", "d_fake", "d_accuracy")


def gan(encoder, *, adapt_at="last-layer", discriminator: dict | None = None, **changes) -> DecoderRecipe:
    """Six steps; the discriminator is trained from the second one on and used from the third one on."""
    section = adversarial(
        encoder, start="2st", adapt_at=adapt_at, discriminator={"start": "1st"} | (discriminator or {})
    )
    return decoder_recipe(
        encoder, loss__adversarial=section, **{"run__duration": "6st", "run__log_every": "1st"} | changes
    )


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


def test_the_judges_are_named_on_the_screen_in_the_log_and_in_the_checkpoint(encoder, tmp_path, capsys):
    for duration in ("1st", "2st"):  # once in a run, however often it goes on
        train_decoder(gan(encoder, run__duration=duration, data__held_out=0.1), tmp_path / "run")
    features = f"features of the encoder, {encoder}"
    opponent = f"discriminator on {encoder} ({open_frozen(str(encoder), 16).identity()[:12]})"
    named = {"perceptual": features, "adversarial": opponent, "held_out": f"mean tokens of the encoder, {encoder}"}
    for term, network in named.items():
        assert log(tmp_path / "run", f"judge_{term}") == [network]
    state = json.loads((tmp_path / "run/checkpoints/000000008/train/state.json").read_text())
    assert state["judges"] == named
    told = facts(read_run(tmp_path / "run"))["judged by"]
    assert told.splitlines() == [f"{term}: {network}" for term, network in named.items()]


def test_settings_that_contradict_each_other_are_refused_before_any_network_is_opened(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("rae.training.decoder.open_encoder", None)
    with pytest.raises(ConfigError, match="starts at 2st, before its discriminator is trained, at 3st"):
        train_decoder(gan(encoder, discriminator={"start": "3st"}), tmp_path / "run")


def test_the_screen_says_what_a_loss_is_made_of(encoder, tmp_path, capsys):
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


# --- refusals


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


def test_terms_that_never_begin_are_named(encoder, tmp_path, capsys):
    section = adversarial(encoder, start="8ep")
    train_decoder(decoder_recipe(encoder, loss__adversarial=section), tmp_path / "run")
    said = capsys.readouterr().err
    assert "loss.adversarial.start: 8ep is not before the end of the run (12st): it will not begin" in said
