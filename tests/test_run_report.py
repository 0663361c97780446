"""`rae doctor RUN`: nothing is found in sound runs of either stage, and every damage is, with its remedy."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from rich.filesize import decimal
from tiny import adversarial, decoder_recipe

from rae import RAE
from rae.commands.cache import write_cache
from rae.commands.run_checks import findings
from rae.commands.run_record import read_run
from rae.commands.run_report import by_time, facts, print_report
from rae.data.latent_cache import open_cache
from rae.data.latent_format import shard_path
from rae.diffusion.flow import Flow
from rae.evaluation.flow_loss import mean_trivial_loss
from rae.training.decoder import train_decoder
from rae.training.run_folder import claim, size


def change_recipe(run: Path, **changes) -> None:
    """Dotted keys of recipe.yaml, as section__key=value."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = recipe
        for name in parents:
            section = section[name]
        section[last] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def change_state(run: Path, change: Callable[[dict], None]) -> None:
    """state.json of the newest checkpoint, as if it had been written so."""
    path = run / "checkpoints/000000048/train/state.json"
    state = json.loads(path.read_text())
    change(state)
    rewrite(path, json.dumps(state))


def rewrite(path: Path, text: str) -> None:
    """A file of a checkpoint, and what the manifest says of it."""
    path.write_text(text)
    manifest = json.loads((path.parents[1] / "manifest.json").read_text())
    fingerprint = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest["files"][f"{path.parent.name}/{path.name}"] = fingerprint
    (path.parents[1] / "manifest.json").write_text(json.dumps(manifest))


def write_log(run: Path, lines: list[dict]) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps({"time": "then", **line}) + "\n" for line in lines))


def steady(count: int = 20, **figures: Callable[[int], float]) -> list[dict]:
    """Lines up to the 48 images of the runs' last checkpoint, all at the same place but the last."""
    base = {"loss": lambda i: 1.0, "grad_norm": lambda i: 1.0, "images_per_second": lambda i: 100.0} | figures
    return [{"images": 24 if i < count - 1 else 48} | {n: f(i) for n, f in base.items()} for i in range(count)]


@pytest.fixture
def dit(runs, tmp_path) -> Path:
    return sound(runs / "dit", tmp_path / "dit")


@pytest.fixture
def decoder(runs, tmp_path) -> Path:
    return sound(runs / "decoder", tmp_path / "decoder")


def sound(run: Path, copy: Path) -> Path:
    """A copy, whose average of the weights is not longer than the six steps of the run."""
    shutil.copytree(run, copy)
    change_recipe(copy, optim__ema=0.5)
    return copy


def found(run: Path) -> list[str]:
    return findings(read_run(run))


def only(run: Path) -> str:
    (finding,) = found(run)
    return finding


# --- sound runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["decoder", "dit"])
def test_nothing_is_found_in_a_sound_run(stage, request, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    run = request.getfixturevalue(stage)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert print_report(run) == 0
    printed = capsys.readouterr().out
    assert ("Nothing else is wrong with it." if stage == "dit" else "Nothing is wrong with it.") in printed
    assert "6st, 6 steps of 8 images" in printed
    assert "6 steps, 48 images: finished" in printed
    assert "000000024" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_facts_are_those_of_the_log(dit):
    lines = [{"images": 24, "loss": 1.75, "images_per_second": 10.0}, {"images": 24, "held_out_loss": 1.5}]
    lines += [{"images": 48, "loss": 1.25, "images_per_second": 30.0}, {"images": 48, "held_out_loss": 1.375}]
    write_log(dit, lines)
    rows = facts(read_run(dit))
    assert rows["loss"] == "1.75 at first, 1.25 at its lowest, 1.25 now"
    assert rows["held_out_loss"] == "1.5 at first, best 1.375 at 48 images, 1.375 now"
    assert rows["images/s"] == "20"
    assert rows["samples"].startswith("1, the last one")
    assert rows["stage"].startswith("2: dit-dh (16, 2, 1) in the latents of")


def test_held_out_loss_by_time_is_shown_beside_the_trivial_one(dit, capsys):
    bins = {"held_out_loss/0.0": 0.5, "held_out_loss/0.9": 0.75, "trivial_loss/0.0": 1.0, "trivial_loss/0.9": 1.5}
    write_log(dit, [{"images": 48, "loss": 1.0, "held_out_loss": 0.6, "trivial_loss": 1.2} | bins])
    assert by_time(read_run(dit)) == [(0.0, 0.5, 1.0), (0.9, 0.75, 1.5)]
    print_report(dit)
    assert "50%" in capsys.readouterr().out


def test_that_no_loss_by_time_is_known_is_said(dit, decoder, capsys):
    for run, held_out, said in ((dit, 0.1, False), (dit, 0.0, True), (decoder, 0.0, False)):
        change_recipe(run, data__held_out=held_out)
        assert print_report(run) == 0  # it is no fault
        assert (
            "no held-out images: its loss by time is not known; data.held_out=0.1" in capsys.readouterr().out
        ) == said


def test_sizes_are_in_units_that_fit_them(dit):
    (dit / "checkpoints/000000048/model/config.json").write_bytes(b"x" * 5_000_000)
    assert size(dit / "checkpoints/000000048/model/config.json") == "5.0 MB"
    assert size(dit / "recipe.yaml").endswith((" bytes", " kB"))
    assert "0.0" not in facts(read_run(dit))["checkpoints"]


def test_what_is_no_run_is_refused(tmp_path, dit):
    with pytest.raises(ValueError, match=r"is not the folder of a run, it has no recipe.yaml. Give what"):
        read_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"It lies in one, give {dit}"):
        read_run(dit / "checkpoints/000000048")


def test_a_run_at_work_is_not_told_to_go_on(dit):
    change_recipe(dit, run__duration="100st")
    (dit / "checkpoints/.tmp-000000056").mkdir()
    with open(dit / "log.jsonl", "a") as log:
        log.write('{"images": 5')
    assert len(found(dit)) == 3
    with claim(dit):
        assert found(dit) == []
        assert facts(read_run(dit))["made"].endswith("at work now")


# --- damaged folders -------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("stage", ["decoder", "dit"])
@pytest.mark.parametrize(
    ("damage", "what", "remedy"),
    [
        (
            lambda run: cut(run / "checkpoints/000000048/train/weights.safetensors"),
            "000000048/train/weights.safetensors is damaged",
            "goes on from 000000024: rm -r",
        ),
        (
            lambda run: (run / "checkpoints/000000024/train/state.json").unlink(),
            "000000024/train/state.json is missing",
            "the run does not need it: rm -r",
        ),
        (
            lambda run: (run / "checkpoints/000000024/manifest.json").unlink(),
            "manifest.json cannot be read",
            "the run does not need it: rm -r",
        ),
        (
            lambda run: (run / "checkpoints/.tmp-000000056").mkdir(),
            ".tmp-000000056 .* is half a checkpoint: a process was killed",
            "The same command removes it",
        ),
        (lambda run: (run / "latest").unlink(), "latest is missing", "The same command writes it"),
        (
            lambda run: (run / "latest").write_text("000000056\n"),
            "latest names checkpoint '000000056', which is not there .000000024, 000000048",
            "The same command sets it right",
        ),
        (
            lambda run: (run / "latest").write_text("000000024\n"),
            "latest names checkpoint 000000024, and 000000048 is newer",
            "The same command sets it right",
        ),
        (
            lambda run: shutil.copytree(run / "checkpoints/000000024", run / "kept/000000032").joinpath("x").touch(),
            "kept/000000032/x is not part of the checkpoint",
            "Only a new run makes this model again",
        ),
        (lambda run: (run / "best").write_text("gone"), "best names checkpoint 'gone'", "Remove it: rm"),
        (lambda run: (run / "log.jsonl").unlink(), "log.jsonl is missing or empty after 48 images", "lost"),
        (
            lambda run: write_log(run, [line for line in read_run(run).lines if line["images"] < 48]),
            "ends at 24 images, the newest checkpoint is of 48, and a line is written every 24",
            "lost",
        ),
        (
            lambda run: (run / "log.jsonl").write_text("what?\n" + (run / "log.jsonl").read_text() + "[1]\n"),
            r"no figures can be read from line 1, \d",
            "cannot go on before that is taken out of the file: sed -i '1d;",
        ),
        (
            lambda run: (run / "log.jsonl").write_text((run / "log.jsonl").read_text() + '{"images": 4'),
            "ends in half a line",
            "The same command removes it",
        ),
        (
            lambda run: (run / "recipe.yaml").write_text("run: [unclosed"),
            "recipe.yaml: not valid YAML",
            "Training cannot go on without it",
        ),
        (
            lambda run: change_recipe(run, optim__momentun=0.9),
            "unknown key; did you mean 'momentum'",
            "Training cannot go on without it",
        ),
        (
            lambda run: change_state(run, lambda state: state.pop("schedules")),
            "train/state.json has no schedules: another version of rae wrote it",
            "take the version that began the run",
        ),
        (
            lambda run: change_recipe(run, run__duration="9st"),
            "it ended after 48 of 72 images",
            "The same command goes on from 48",
        ),
    ],
)
def test_damage_is_found(damage, what, remedy, stage, request):
    run = request.getfixturevalue(stage)
    damage(run)
    finding = only(run)
    *head, last = finding.split("\n")
    assert re.search(what, "\n".join(head))
    assert remedy in last


def test_two_damaged_checkpoints_leave_nothing_to_go_on_from(dit):
    for name in ("000000024", "000000048"):
        cut(dit / f"checkpoints/{name}/model/model.safetensors")
    first, second = found(dit)
    assert "the run does not need it" in first
    assert "begins anew, since no older one is intact" in second


def test_a_run_that_saved_nothing(dit):
    shutil.rmtree(dit / "checkpoints")
    (dit / "log.jsonl").unlink()
    for pointer in ("latest", "best"):
        (dit / pointer).unlink(missing_ok=True)
    assert only(dit) == "it ended after 0 of 48 images\nThe same command begins anew, since nothing is saved."
    change_recipe(dit, run__duration="1ep")
    assert only(dit).startswith("it ended after 0 images\nThe same")


def begun(run: Path) -> Path:
    """The run, killed before its first checkpoint."""
    for name in ("checkpoints", "log.jsonl", "latest", "best"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    return run


@pytest.mark.parametrize(
    ("stage", "changes", "what"),
    [
        (
            "dit",
            {"rae": "NOWHERE"},
            r"its autoencoder is not here: .*nowhere: no such folder.*\n`rae train-decoder` makes one; rae=FOLDER",
        ),
        ("dit", {"latents": "NOWHERE"}, r"latents .*nowhere: "),
        (
            "decoder",
            {"encoder__name": "NOWHERE"},
            r"its encoder is not here: .*nowhere: no such folder.*\nencoder.name=",
        ),
        ("decoder", {"data__source": "NOWHERE"}, r"data.source .*nowhere: there is no such folder"),
    ],
)
def test_a_run_that_cannot_begin(stage, changes, what, request, tmp_path):
    run = begun(request.getfixturevalue(stage))
    assert "\nThe same command begins anew" in only(run)
    change_recipe(run, **{key: str(tmp_path / "nowhere") for key in changes})
    ended, missing = found(run)
    assert ended.endswith("\nOnce the following is put right, the same command begins anew, since nothing is saved.")
    assert re.match(what, missing)


def test_steps_after_the_checkpoint_and_the_reason_of_the_end_are_told(dit):
    change_recipe(dit, run__duration="100st")
    lines = [json.loads(line) for line in (dit / "log.jsonl").read_text().splitlines()]
    write_log(dit, [*lines, {"images": 64, "stopped": "the loss is nan"}])
    finding = only(dit)
    assert "it ended after 64 of 800 images, 16 of them after what is saved: the loss is nan" in finding
    assert finding.endswith("goes on from 48, to the same end unless that is changed.")


def test_epochs_are_counted_where_a_checkpoint_says_how_many_images_they_have(dit):
    change_recipe(dit, run__duration="1ep")
    change_state(dit, lambda state: state.pop("epoch", None))
    assert read_run(dit).total is None
    assert found(dit) == []
    change_state(dit, lambda state: state.update(epoch=1617))
    assert read_run(dit).total == 1616  # whole batches
    assert "48 of 1,616 images" in only(dit)


def test_a_checkpoint_that_training_removes_meanwhile_is_no_damage(dit, monkeypatch):
    def find_damage(path: Path) -> str | None:
        if path.name == "000000024":
            shutil.rmtree(path)
            return f"{path} cannot be read."
        return None

    monkeypatch.setattr("rae.commands.run_record.find_damage", find_damage)
    assert found(dit) == []


def test_a_disk_that_the_next_checkpoint_does_not_fit(dit, monkeypatch):
    size = sum(path.stat().st_size for path in (dit / "checkpoints/000000048").rglob("*") if path.is_file())
    usage = shutil.disk_usage(dit)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    assert found(dit) == []  # it is finished
    change_recipe(dit, run__duration="9st")
    _, full = found(dit)
    assert f"{decimal(size)} are free on the disk; a checkpoint takes {decimal(size)}" in full
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
    assert len(found(dit)) == 1


# --- the autoencoder -------------------------------------------------------------------------------------------------


def test_an_autoencoder_that_is_gone(dit):
    change_recipe(dit, rae=str(dit / "gone"))
    assert re.search(r"its autoencoder .*gone is not here.*\n.*--autoencoder FOLDER", only(dit))
    (dit / "gone").mkdir()
    (dit / "gone/config.json").write_text("{}")
    assert re.search(r"its autoencoder .*gone cannot be read: .*config.json does not fit", only(dit))
    change_recipe(dit, rae="someone/on-the-hub")
    assert "is not here, nor was it downloaded from the hub" in only(dit)


def test_an_autoencoder_that_moved_together_with_the_run(dit, runs, monkeypatch):
    change_recipe(dit, rae="models/decoder")
    assert "its autoencoder models/decoder is not here" in only(dit)
    (dit.parent / "models").mkdir()
    (dit.parent / "models/decoder").symlink_to(runs / "decoder")
    assert found(dit) == []


def test_an_autoencoder_that_was_downloaded(dit, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *name: asked.append(name) or str(tmp_path))
    change_recipe(dit, rae="hub:someone/on-the-hub")
    assert found(dit) == []
    assert asked == [("someone/on-the-hub", "config.json")]


def test_baselines_need_no_folder_but_their_weights(dit, tmp_path):
    change_recipe(dit, rae="pixels@16")
    assert found(dit) == []
    change_recipe(dit, rae=f"sd-vae:{tmp_path}@16")
    assert found(dit) == []
    change_recipe(dit, rae="sd-vae:nowhere@16")
    assert re.search(r"its autoencoder sd-vae:nowhere@16 is not here.*\n.*--autoencoder sd-vae:FOLDER@SIZE", only(dit))


@pytest.mark.parametrize("name", ["someone/on-the-hub", "hub:someone/on-the-hub", "sd-vae:someone/vae@16", "pixels@16"])
def test_before_the_first_checkpoint_an_autoencoder_of_the_hub_is_still_to_be_fetched(dit, name):
    change_recipe(begun(dit), rae=name)
    assert only(dit) == "it ended after 0 of 48 images\nThe same command begins anew, since nothing is saved."


def test_before_the_first_checkpoint_the_remedy_is_that_of_training(dit, tmp_path):
    change_recipe(begun(dit), rae=f"sd-vae:{tmp_path}/nowhere@16")
    ended, finding = found(dit)
    assert ended.endswith("Once the following is put right, the same command begins anew, since nothing is saved.")
    assert re.search(r"its autoencoder is not here: .*/nowhere: no such.*\nrae=sd-vae:FOLDER@SIZE behind the", finding)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    change_recipe(dit, rae=str(tmp_path / "half"))
    assert re.search(
        r"(?s)its autoencoder .*half cannot be read: .*\n.*; rae=FOLDER behind the training", found(dit)[1]
    )


def test_an_autoencoder_that_is_another_one_now(dit, runs, tmp_path):
    recipe = decoder_recipe(runs / "encoder", statistics=False, run__duration="1st")
    other = train_decoder(recipe, tmp_path / "other")
    change_recipe(dit, rae=str(other))
    finding = only(dit)
    assert "is another one now" in finding
    assert RAE.from_pretrained(runs / "decoder").latent_identity[:12] in finding
    assert RAE.from_pretrained(other).latent_identity[:12] in finding


def test_an_encoder_that_is_gone(decoder):
    model = decoder / "checkpoints/000000048/model/config.json"
    config = json.loads(model.read_text())
    config["encoder"]["source"] = f"folder:{decoder / 'gone'}"
    rewrite(model, json.dumps(config))
    assert re.search(r"its encoder is not here: .*gone.\n.*encoder.name=FOLDER", only(decoder))


# --- images and latents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["source", "held_out"])
@pytest.mark.parametrize("stage", ["decoder", "dit"])
def test_images_that_are_gone(stage, key, request, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    run = request.getfixturevalue(stage)
    folder = tmp_path / "images"
    change_recipe(run, **{f"data__{key}": str(folder), "run__duration": "9st"})
    for there, told in ((None, "there is no such folder"), ("empty", "the folder is empty"), ("a.png", None)):
        if there:
            folder.mkdir(exist_ok=True)
        if there == "a.png":
            (folder / there).touch()
        gone = [finding for finding in found(run) if finding.startswith(f"data.{key} {folder}: ")]
        assert len(gone) == (told is not None)
        assert not told or re.search(rf"{told}\.\nStart from the folder .*data\.{key}=", gone[0])
    shutil.rmtree(folder)
    change_recipe(run, run__duration="6st")
    assert found(run) == []  # it is finished, and needs them no more
    assert print_report(run) == 0
    assert f"To train longer: data.{key} {folder}: there is no such folder." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "told"),
    [("gone.parquet", "no such file"), ("x-{000..003}.tar", "no such file, of 4"), ("hf:a/b", None), ("digits", None)],
)
def test_images_that_are_not_in_a_folder(decoder, source, told):
    change_recipe(decoder, data__source=source, run__duration="9st")
    assert [told in finding for finding in found(decoder) if finding.startswith("data.source")] == [True] * bool(told)


def test_a_latent_cache_that_is_gone_or_another(dit, runs, tmp_path):
    cache = write_cache(runs / "decoder", read_run(dit).recipe.data, tmp_path / "cache", batch=64)
    change_recipe(dit, latents=str(cache), run__duration="9st")
    change_state(dit, lambda state: state["identity"].update(cache=open_cache(cache).config.identity))
    assert len(found(dit)) == 1  # it is not finished
    change_state(dit, lambda state: state["identity"].update(cache="another"))
    assert re.search(r"latents .*cache: it is the cache \w{12} now, not another\.\n`rae cache`", found(dit)[1])
    shard_path(cache, 0).unlink()
    assert re.search(r"latents .*cache: .*missing(.|\n)*latents=FOLDER", found(dit)[1])
    shutil.rmtree(cache)
    assert re.search(r"latents .*cache: .*(no cache\.json|not a latent cache)", found(dit)[1])


# --- figures ---------------------------------------------------------------------------------------------------------


def test_steady_figures_are_sound(dit, decoder):
    for run in (dit, decoder):
        write_log(run, steady())
        assert found(run) == []


@pytest.mark.parametrize(
    ("lines", "what", "remedy"),
    [
        (steady(grad_norm=lambda i: float("nan") if i == 7 else 1.0), "grad_norm: not finite at 24 images", "optim.lr"),
        (steady(loss=lambda i: 1.0 if i < 15 else 1.5), "loss has risen: 1.5 .*, 1 at its lowest", "optim.clip=1.0"),
        (steady(grad_norm=lambda i: 1.0 if i < 15 else 20.0), "norm has grown to 20, 1 is usual", "optim.clip=1.0"),
        (
            steady(images_per_second=lambda i: 100.0 if i < 15 else 40.0),
            "slowed down to 40 images/s from 100",
            "machine",
        ),
        (
            [*steady(), {"images": 48, "broken": "a.png"}, {"images": 48, "broken": "b.png"}],
            "2 images cannot be read: a.png, b.png",
            "Restore them",
        ),
        (
            [
                *steady(loss=lambda i: 1.0 - i / 100),
                *({"images": 24 + 12 * i, "held_out_loss": 0.6 + i / 10} for i in range(3)),
            ],
            "held_out_loss was 0.6 at 24 images and is 0.8 now.*from 0.82 to 0.81: it learns its images by heart",
            "data.flip",
        ),
        (
            [*steady(), *({"images": 40 + i, "held_out_loss": 0.6 + i / 10} for i in range(3))],
            "from 1 to 1: training goes wrong",
            "Lower optim.lr",
        ),
    ],
)
def test_figures_that_go_wrong(lines, what, remedy, dit):
    write_log(dit, lines)
    head, last = only(dit).split("\n")
    assert re.search(what, head)
    assert remedy in last


@pytest.mark.parametrize(
    ("features", "figure"), [(None, "held_out_fd"), ("inception", "held_out_rfid"), ("a/dino", "held_out_fd_dino")]
)
def test_a_distance_that_rises_by_whichever_features(decoder, features, figure):
    change_recipe(decoder, evaluation__features=features)
    worse = [{"images": 24 + 12 * i, figure: 1 + i / 10} for i in range(3)]
    write_log(decoder, [*steady(), *worse])
    assert found(decoder) == []
    write_log(decoder, [*steady(), *worse, {"images": 48, figure: 1.3}])
    assert f"{figure} was 1 at 24 images and is 1.3 now" in only(decoder)
    assert facts(read_run(decoder))[figure] == "1 at first, best 1 at 24 images, 1.3 now"


def test_a_single_spike_or_a_short_log_is_no_trend(dit):
    write_log(dit, steady(loss=lambda i: 9.0 if i == 19 else 1.0, grad_norm=lambda i: 99.0 if i == 3 else 1.0))
    assert found(dit) == []
    write_log(dit, steady(count=4, loss=lambda i: 1.0 + i))
    assert found(dit) == []


def test_a_loss_above_the_trivial_one_is_found_after_a_while(dit):
    trivial = mean_trivial_loss(Flow(shift=1.0), torch.ones(1))
    change_recipe(dit, run__batch=1, run__duration="1000st")
    lines = [{"images": 400, "loss": 1.9}, {"images": 400, "width_bound": 1.5}]
    write_log(dit, lines)
    assert not any("linear guess" in finding for finding in found(dit))
    write_log(dit, [line | {"images": 600} for line in lines])
    (told,) = (finding for finding in found(dit) if "linear guess" in finding)
    assert "after 600 steps the loss is 1.9, and a linear guess that looks at each number" in told
    assert f"has {trivial:.4g}: samples will be noise" in told
    assert "below 1.5 (Theorem 1)" in told
    write_log(dit, [line | {"images": 600} for line in lines] + [{"images": 600, "trivial_loss": 1.95}])
    assert not any("linear guess" in finding for finding in found(dit))  # the run's own figure counts


@pytest.mark.parametrize(
    ("warmup", "steps", "made", "said"),
    [
        (0, 60, 60, r"learnt from step 100 on, and 60 steps are made\. It ends before that, at step 60\.\n"),
        (0, 1000, 99, r"they tell whether anything is learnt from step 500 on, and 99 steps are made\.\n"),
        (200, 150, 150, r"from step 200 on, and 150 steps are made\. It ends before that, at step 150\.\n"),
        (200, 300, 199, r"they tell whether anything is learnt from step 200 on, and 199 steps are made\.\n"),
        (200, 300, 200, None),
    ],
)
def test_losses_that_it_is_too_early_to_judge(dit, capsys, monkeypatch, warmup, steps, made, said):
    monkeypatch.setenv("COLUMNS", "500")
    change_recipe(dit, run__batch=1, run__duration=f"{steps}st")
    change_state(dit, lambda state: state["schedules"].update(optim=[0, warmup, steps]))
    write_log(dit, [{"images": made, "loss": 2.9}])
    print_report(dit)
    printed = capsys.readouterr().out
    assert ("too early" in printed) == (said is not None)
    assert re.search(said or "a linear guess", printed)
    assert "Nothing is wrong" not in printed


def test_warnings_of_the_settings_are_repeated_and_those_of_losses_judged_anew(dit):
    said = [{"about": "shift", "warning": "too little\nmore"}, {"about": "loss", "warning": "high\nlower"}]
    write_log(dit, [{"images": 0} | said[0], *steady(), {"images": 48} | said[1]])
    assert only(dit) == "too little\nmore"


def test_an_average_that_is_too_long_or_lags_behind(dit):
    change_recipe(dit, optim__ema=0.99)
    both = {"held_out_loss": 1.5, "held_out_loss_online": 1.0}
    write_log(dit, [*steady(), {"images": 48} | both])
    assert "EMA with decay 0.99 averages over 100 steps, the run has 6" in only(dit)
    change_recipe(dit, run__batch=1, run__duration="150st")
    write_log(dit, [*steady(), {"images": 140} | both])
    lags, _ = reversed(found(dit))
    assert "held-out loss is 1.5, that of the weights as they are now 1" in lags
    assert "140 are made" in lags


def test_terms_that_never_begin_are_told(runs, tmp_path):
    game = adversarial(runs / "encoder", start="3st", discriminator={"start": "1st"})
    changes = {"loss__adversarial": game, "loss__perceptual__start": "2st", "run__duration": "3st"}
    run = sound(train_decoder(decoder_recipe(runs / "encoder", **changes), tmp_path / "run"), tmp_path / "copy")
    assert only(run).startswith("loss.adversarial.start: 3st is not before the end of the run (3st): it will not begin")
    change_recipe(run, run__duration="4st")
    assert not any("will not begin" in finding for finding in found(run))


def test_the_discriminators_health_is_told_as_training_tells_it(runs, tmp_path):
    recipe = decoder_recipe(runs / "encoder", run__duration="1st", loss__adversarial=adversarial(runs / "encoder"))
    run = sound(train_decoder(recipe, tmp_path / "run"), tmp_path / "copy")
    change_recipe(run, optim__ema=0.0)
    won = {"d_accuracy": 0.999, "d_real": 1.0, "d_fake": -1.0, "lambda": 1.0}
    write_log(run, [{"images": 199 * 8, "loss": 1.0, **won}])
    assert not any("discriminator" in finding for finding in found(run))  # it has had no time
    write_log(run, [{"images": 200 * 8, "loss": 1.0, **won}])
    assert any("tells 99.9% of fakes" in finding for finding in found(run))
    write_log(
        run, [{"images": 200 * 8, "loss": 1.0, **won}, {"images": 201 * 8, "loss": 1.0, **won, "d_accuracy": 0.7}]
    )
    assert not any("discriminator" in finding for finding in found(run))
