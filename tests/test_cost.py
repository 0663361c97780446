"""`rae flops`: the recipes' headers, folders, phases, memory, hours and money; what it says and what it refuses."""

import json
import math
import os
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_recipes import IMAGENET, ROOT, header
from tiny import adversarial, decoder_recipe, dit_recipe

from rae import RAE, DiffusionModel
from rae.commands import cost
from rae.commands.cost import GIB, SHARE, latent_bytes, memory, plan, print_cost, print_published, report
from rae.commands.cost_devices import DEVICES, Measurement, describe_machine, find_device, measure
from rae.commands.cost_subject import open_subject
from rae.config import ConfigError
from rae.data.latent_format import CacheSettings, Origin, shard_bytes

STAGE1 = ["dinov2-b_vit-xl_256", "dinov2-b_vit-b_256_tau0", "siglip2-b_vit-xl_256", "dinov2-b_vit-xl_512"]
STAGE2 = ["dit-xl_dinov2-b_256", "ditdh-xl_dinov2-b_256_head-6x1152", "ditdh-xl_dinov2-b_512", "dit-xl_sd-vae_256"]
STAGE2 += ["ditdh-xl_pixels_256", "ditdh-s_dinov2-b_256_unconditional", "ditdh-l_dinov2-b_256"]
MAIN = ROOT / "recipes/stage2/ditdh-xl_dinov2-b_256.yaml"


def recipe(stage: int, name: str, *overrides: str):
    return open_subject(str(ROOT / f"recipes/stage{stage}/{name}.yaml"), overrides, None, None)


def told(capsys, *names, **settings) -> dict:
    print_cost([str(name) for name in names], as_json=True, **settings)
    return json.loads(capsys.readouterr().out)[0]


def write(path: Path, recipe) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


# --- the recipes' headers say what this counts -----------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGE1)
def test_headers_of_stage_1(name):
    subject = recipe(1, name)
    found, text = report(subject), header(ROOT / f"recipes/stage1/{name}.yaml")
    assert found["training"]["flops"] == pytest.approx(float(re.search(r"Cost: ([\d.]+)e18", text)[1]) * 1e18, rel=0.02)
    said = float(re.search(r"Memory: about (\d+) GiB", text)[1])
    assert math.ceil(sum(found["memory"]["bytes"].values()) / GIB) == said
    assert found["training"]["images"] == 16 * IMAGENET // 512 * 512


@pytest.mark.parametrize("name", STAGE2)
def test_headers_of_stage_2(name):
    text = header(ROOT / f"recipes/stage2/{name}.yaml")
    plain, again = (
        float(re.search(rf"([\d.,]+)e18 {words}", text)[1].replace(",", ""))
        for words in ("operations", "with run.recompute")
    )
    for wanted, recompute in ((plain, "false"), (again, "true")):
        subject = recipe(2, name, f"run.recompute={recompute}")
        assert report(subject)["training"]["flops"] == pytest.approx(wanted * 1e18, rel=0.02)
    said = float(re.search(r"Memory: about (\d+) GiB", text)[1])
    assert sum(report(subject)["memory"]["bytes"].values()) / GIB == pytest.approx(said, abs=0.51)


def test_activations_are_those_of_the_pages():
    subject = recipe(2, "ditdh-xl_dinov2-b_256")
    size, _ = plan(subject, 1)
    key = "activations"

    def an_image(recompute: bool) -> float:
        one, two = (memory(subject, size, micro=n, recompute=recompute)[key] for n in (512, 1024))
        return (two - one) / 512 / 2**20

    assert an_image(True) == pytest.approx(49 + 38, abs=1)
    assert an_image(False) == pytest.approx(509, abs=1.5)
    subject = recipe(1, "dinov2-b_vit-xl_256")
    size, _ = plan(subject, 1)
    assert an_image(True) == pytest.approx(34 + 122 * 4 / 3, abs=1)
    assert an_image(False) == pytest.approx(273 + 122 * 4 / 3, abs=1)


# --- what is counted -------------------------------------------------------------------------------------------------


def test_folders_have_the_parameters_of_their_models(runs):
    kept = open_subject(str(runs / "decoder/checkpoints/000000048/model"), [], None, None)
    decoder = RAE.from_pretrained(runs / "decoder").decoder
    assert kept.parts["decoder"].parameters == sum(p.numel() for p in decoder.parameters())
    network = DiffusionModel.from_pretrained(runs / "dit").network
    for name in ("dit/checkpoints/000000048/model", "dit"):  # a model, and the run with its recipe
        parts = open_subject(str(runs / name), [], None, None).parts
        count = sum(cost.parameters for part, cost in parts.items() if part.startswith("DiT"))
        assert count == sum(p.numel() for p in network.parameters())
    assert kept.recipe is None
    assert set(parts) == {"encoder", "decoder", "DiT-DH trunk", "DiT-DH head"}


def test_the_images_that_are_here_are_counted(runs, tmp_path):
    subject = open_subject(str(runs / "dit.yaml"), [], None, None)
    assert (subject.images, subject.model.network.num_classes, subject.notes) == (1617, 10, ())
    subject = open_subject(str(runs / "dit.yaml"), [], 500, None)
    assert (subject.images, subject.model.network.num_classes) == (500, 10)


def test_what_is_not_here_is_said():
    notes = recipe(2, "ditdh-xl_dinov2-b_256").notes
    assert "counted as ImageNet, 1,281,167 images of 1,000 classes" in notes[0]
    assert "dinov2-b_vit-xl_256.yaml describes it" in notes[1]


def test_phases_of_the_adversarial_run(runs, tmp_path):
    game = adversarial(runs / "encoder", start="75%", discriminator={"start": "50%"})
    path = write(tmp_path / "gan.yaml", decoder_recipe(runs / "encoder", loss__adversarial=game, run__micro_batch=4))
    subject = open_subject(str(path), [], None, None)
    _, phases = plan(subject, 1)
    names = ["L1 + perceptual", "L1 + perceptual + discriminator", "L1 + perceptual + discriminator + adversarial"]
    assert [phase.name for phase in phases] == names
    assert [phase.images for phase in phases] == [48, 24, 24]
    parts = {name: cost.flops for name, cost in subject.parts.items()}
    always = parts["encoder"] + 3 * parts["decoder"] + 2 * parts["encoder"]  # its own features are the judge
    plays = 2 * parts["discriminator's network"] + parts["decoder"]  # and the heads, both ways or forwards and back
    wanted = [always, always + plays + 6 * parts["its heads"], always + 2 * plays + 8 * parts["its heads"]]
    assert [sum(work.flops for work in phase.work) for phase in phases] == wanted
    whole = plan(open_subject(str(path), ["run.micro_batch=null"], None, None), 1)[1]
    assert sum(work.flops for work in whole[2].work) == wanted[2] - parts["decoder"]  # lambda needs no second decoding


def test_kept_latents_are_not_encoded(runs):
    online, kept = (
        plan(open_subject(str(runs / "dit.yaml"), [f"latents={latents}"], None, None), 1)[1][0].work
        for latents in ("online", "memory")
    )
    assert [work.name for work in online] == ["encoder", "network, both ways"]
    assert kept == online[1:]


@pytest.mark.parametrize("flip", [False, True])
def test_latent_cache_is_as_large_as_the_format_makes_it(flip):
    subject = recipe(2, "ditdh-xl_dinov2-b_256", f"data.flip={str(flip).lower()}")
    ids = dict.fromkeys(("latents", "encoder", "images", "labels"), "")
    origin = Origin(**ids, image_size=(256, 256), crop="center", enlarge=False)
    for dtype, size in latent_bytes(subject).items():
        about = {"autoencoder": "", "class_names": None, "origin": origin, "count": 1, "shard_rows": 1}
        settings = CacheSettings(dtype=dtype, flip=flip, shape=(768, 16, 16), **about)
        assert size == IMAGENET * shard_bytes(settings, 1)


def test_devices_share_a_batch(runs):
    size, _ = plan(recipe(2, "ditdh-xl_dinov2-b_256"), 8)
    assert (size.batch, size.local, size.micro) == (1024, 128, 32)
    whole = memory(recipe(2, "ditdh-xl_dinov2-b_256"), size)
    sharded = memory(recipe(2, "ditdh-xl_dinov2-b_256", "run.sharding=full"), size)
    name = "weights, gradients, moments, averages"
    assert sharded[name] == whole[name] / 8
    with pytest.raises(ConfigError, match=r"run.batch 1024 cannot be shared by 3 devices"):
        plan(recipe(2, "ditdh-xl_dinov2-b_256"), 3)


# --- what is estimated -----------------------------------------------------------------------------------------------


def test_hours_and_money_of_a_data_sheet(capsys):
    found = told(capsys, MAIN, device="h100", devices=8, price=2.5)
    training, estimate = found["training"], found["estimate"]
    assert all(type(size) is int for size in found["memory"]["bytes"].values())
    (phase,) = training["phases"]
    encode, network = (work["flops"] for work in phase["work"])
    seconds = encode / (SHARE * 67e12) + network / (SHARE * 989e12)
    assert estimate["images_per_second"] == [pytest.approx(8 / seconds)]
    assert estimate["hours"] == pytest.approx(training["images"] * seconds / 8 / 3600)
    assert estimate["device_hours"] == pytest.approx(8 * estimate["hours"])
    assert estimate["money"] == pytest.approx(2.5 * estimate["device_hours"])
    assert "assumed: 35% of the peaks in the H100 data sheet" in estimate["basis"]
    half = told(capsys, MAIN, device="h100", devices=8, share=0.175)["estimate"]
    assert half["hours"] == pytest.approx(2 * estimate["hours"])
    assert "money" not in half


def test_largest_micro_batch_is_the_last_that_fits(capsys):
    estimate = told(capsys, MAIN, device="4090")["estimate"]
    subject = recipe(2, "ditdh-xl_dinov2-b_256")
    size, _ = plan(subject, 1)
    for recompute in (False, True):
        largest = estimate["largest_micro_batch"][f"run.recompute={str(recompute).lower()}"]
        need = [sum(memory(subject, size, micro=n, recompute=recompute).values()) for n in (largest, 2 * largest)]
        assert need[0] <= 0.95 * 24 * GIB < need[1]
    assert estimate["fits"]
    small = told(capsys, ROOT / "recipes/stage2/ditdh-xl_dinov2-b_256_head-2x2688.yaml", device="4090")["estimate"]
    assert not small["fits"]


def test_this_machine_is_measured_by_the_networks_own_passes(runs, capsys, monkeypatch):
    calls = []

    def measured(run, device, *, most):
        run(2)  # the passes themselves must work
        calls.append(most)
        return Measurement(2, 4.0)

    monkeypatch.setattr(cost, "measure", measured)
    monkeypatch.setattr(cost, "WHOLE", 10)  # parameters
    deep = ["network.size=[16,2,5]", "run.precision=bf16", "encoder.precision=fp32"]
    found = told(capsys, runs / "dit.yaml", *deep, device="here")
    encode, network = (work["flops"] for work in found["training"]["phases"][0]["work"])
    short = open_subject(str(runs / "dit.yaml"), ["network.size=[16,2,2]"], None, None)
    passes = 3 * sum(cost.flops for name, cost in short.parts.items() if name.startswith("DiT")) * 2 / 4.0
    estimate = found["estimate"]
    assert estimate["flops_per_second"] == {"bf16": passes, "fp32": passes}
    assert estimate["images_per_second"] == [pytest.approx(passes / (encode + network))]
    assert "measured" in estimate["basis"]
    assert "2 of its 5 blocks" in estimate["basis"]
    assert "assumed: all else" in estimate["basis"]
    assert calls == [8, 8]
    stage1 = told(capsys, runs / "decoder.yaml", device="here")["estimate"]
    assert "the whole of it" in stage1["basis"]


def test_measuring_grows_until_a_pass_says_something(monkeypatch):
    asked = []
    monkeypatch.setattr(time, "perf_counter", lambda: sum(asked) / 100)  # a pass takes 10 ms for an image
    found = measure(asked.append, torch.device("cpu"), most=1000, patience=0.5)
    assert found.images == 64  # 0.64 s
    assert found.seconds == pytest.approx(0.64)
    assert measure(asked.append, torch.device("cpu"), most=20, patience=0.5).images == 20


def test_a_busy_machine_is_said_to_be_busy(monkeypatch):
    cores = os.cpu_count()
    for load, said in ((0.5, False), (cores + 0.9, False), (cores + 1, True), (1e3, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        assert ("busy with other work" in describe_machine(torch.device("cpu"))) == said


def test_sheets_are_ordered_as_hardware_is():
    for device in DEVICES.values():
        assert device.peak("fp32") < 1.01 * device.peak("tf32") < device.peak("bf16")
        assert "sheet" in device.sheet or "paper" in device.sheet
    assert find_device("H100") is DEVICES["h100"]
    assert find_device("here") is None


# --- what is said and refused ----------------------------------------------------------------------------------------


def test_tables_name_what_is_counted_and_what_is_assumed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_cost([str(MAIN)], device="a100", price=1.0)
    text = capsys.readouterr().out
    for words in ("counted, one image forwards", "by account", "assumed: 35%", "not in it", "money", "latent cache"):
        assert words in text
    assert "673,705,216" in text
    assert "of one device" not in text  # which says nothing new of one
    print_cost([str(MAIN)], device="a100", devices=8)
    assert "of one device" in capsys.readouterr().out
    print_published()
    assert "55%" in capsys.readouterr().out


def test_several_recipes_and_overrides(capsys):
    recipes = [str(ROOT / f"recipes/stage2/{name}.yaml") for name in ("dit-xl_dinov2-b_256", "dit-xl_pixels_256")]
    print_cost([*recipes, "run.duration=1ep"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [report["training"]["images"] for report in found] == [IMAGENET // 1024 * 1024] * 2
    assert set(found[1]["networks"]) == {"DiT"}
    assert all(math.isfinite(report["training"]["flops"]) for report in found)


def test_a_path_with_an_equals_sign_is_no_override(runs, capsys, monkeypatch, tmp_path):
    (tmp_path / "lr=1e-3").symlink_to(runs / "dit")
    monkeypatch.chdir(tmp_path)
    found = told(capsys, "lr=1e-3", "run.batch=16")
    assert (found["name"], found["training"]["batch"]) == ("lr=1e-3", 16)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["run.batch=8"], {}, "changes a recipe; name one"),
        (["nothing.yaml"], {}, "no such recipe"),
        ([MAIN], {"device": "h10"}, "did you mean h100"),
        ([MAIN], {"price": 2.0}, "add --device"),
        ([MAIN], {"devices": 2}, "add --device"),
        ([MAIN], {"device": "here", "share": 0.5}, "this machine is measured"),
        ([MAIN, "run.batsh=8"], {}, "did you mean 'batch'"),
        ([MAIN, "rae=runs/none"], {}, "give rae=FOLDER"),
        ([MAIN, "rae=pixels@x"], {}, "pixels@SIZE"),
        ([MAIN, "data.source=here/none"], {}, "--images N --classes K"),
        ([MAIN, "data.source=hf:owner/name"], {"images": 100}, "the hub's, which is not asked"),
        ([MAIN, "run.duration=1img"], {}, "less than one batch"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(names, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        print_cost([str(name) for name in names], **settings)


def test_what_is_published_is_shown_alone(run, refused):
    assert "55%" in run("flops", "--published")
    for option in (["--devices", 1], ["--device", "h100"], ["--images", 5], ["--json"], [MAIN]):
        assert "or --published alone" in refused("flops", "--published", *option)
    assert "or --published alone" in refused("flops")


def test_saved_models_tell_nothing_of_training(runs):
    model = str(runs / "dit/checkpoints/000000048/model")
    with pytest.raises(ConfigError, match="tells nothing of training"):
        print_cost([model], device="h100")
    with pytest.raises(ConfigError, match="changes a recipe"):
        print_cost([model, "run.batch=8"])
    with pytest.raises(ConfigError, match="neither a recipe"):
        print_cost([str(runs / "encoder")])


def test_a_recipe_of_stage_1_in_place_of_the_autoencoder(runs, tmp_path):
    path = write(tmp_path / "dit.yaml", dit_recipe(runs / "decoder.yaml"))
    by_recipe = open_subject(str(path), [], None, None)
    by_run = open_subject(str(runs / "dit.yaml"), [], None, None)
    assert by_recipe.parts == by_run.parts
    assert by_recipe.notes == ()
