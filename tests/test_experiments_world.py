"""The small world of the studies: each part once, a function of its keys alone; a judge that judges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import decoder_recipe, same_bits, save_encoder

from rae.autoencoder.latents import map_to_tokens, unstandardise
from rae.data.image_set import ImageError, Images
from rae.data.images import open_split, to_unit
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.experiments import metric, world
from rae.experiments.frame import Place
from rae.training.decoder import train_decoder
from rae.training.latents import LatentCache, cache_tokens

SEED = 1


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place("digits", tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(place) -> dict:
    encoder = save_encoder(place.work / "encoder")
    size = {"image_size": 16, "input_size": 16, "data": "the digits"}
    return {**world.WORLD, **world.QUICK, **size, "encoder": str(encoder), "keep_at": ["40%", "80%"]}


def grey(values, labels, classes=("dark", "bright")) -> Images:
    """Images of 8 x 8 pixels, each of one grey."""
    names = [str(i) for i in range(len(values))]
    return Images(names, labels, list(classes), "grey", lambda i: np.full((8, 8, 3), values[i], np.uint8))


# --- parts are functions of their keys


def test_a_part_lies_by_its_keys_and_seed_and_by_nothing_else(config, place):
    def folder(changes, seed=0):
        return world.folder_of("decoder", {**config, **changes}, world.DECODER, place, seed=seed)

    assert folder({}) == folder({"steps": 99, "shift": 9.0}), "a decoder knows nothing of diffusion"
    others = [folder({"tau": 0.3}), folder({"sigma_law": "half-normal"}), folder({"data": "others"}), folder({}, 1)]
    assert len({folder({}), *others}) == 5


def test_every_key_of_the_world_decides_some_part_or_the_sampling():
    """A key that no part depends on would be changed without effect."""
    sampled = {"samples", "sampling_steps", "judge_steps"}
    assert {*world.DECODER, *world.MODEL} | sampled == {*world.WORLD, "data"}


def test_no_image_is_in_both_parts_and_the_draw_is_the_same_again(config, place, tmp_path):
    files = world.data(config, place)
    train, held_out = (world.pictures(config, place, part)[0] for part in ("train", "held_out"))
    assert (len(train), len(held_out)) == (config["images"], config["held_out"])
    assert train.shape[1:] == (3, 16, 16)
    assert not (train[:, None] == held_out[None]).flatten(2).all(2).any()
    assert files.open("train").class_names == [str(digit) for digit in range(10)]
    again = world.pictures(config, Place("digits", tmp_path), "train")[0]
    assert torch.equal(train, again)


def test_too_few_images_are_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(ImageError, match=r"1,797 images; the study takes 48 to train with and 9,999 to judge by"):
        world.data({**config, "held_out": 9999}, Place("digits", tmp_path))
    assert not list(tmp_path.iterdir())


def test_small_images_are_enlarged_only_where_that_is_asked_for(config, tmp_path):
    with pytest.raises(ImageError, match=r"8 x 8 pixels .* smaller than the 16 x 16 asked for"):
        world.data({**config, "enlarge": False}, Place("digits", tmp_path))


def test_kept_latents_are_those_of_the_space_and_give_back_the_tokens(config, place):
    base, images = world.space(config, place), to_unit(world.pictures(config, place, "train")[0])
    z = world.open_cache(world.latents(config, place)).gather(range(len(images)), [False] * len(images)).to("cpu")
    expected = base.encode(images)
    torch.testing.assert_close(z, expected, atol=3e-3, rtol=1e-3)  # fp16
    tokens = map_to_tokens(unstandardise(z, base.latent_mean, base.latent_var))
    torch.testing.assert_close(tokens, base.tokens(images), atol=3e-3, rtol=1e-3)
    assert expected.mean(0).abs().max() < 1e-4, "standardised over the training images"


def test_all_decoders_of_a_space_decode_its_models_latents(config, place):
    model = world.load(world.train(config, SEED, place), config)
    z, labels = world.sample(model, config, SEED, place)
    assert labels.tolist() == [i % 10 for i in range(20)]
    for tau in (0.0, 0.8):
        decoder = world.decoder({**config, "tau": tau}, SEED, place)
        model.check_autoencoder(decoder)
        assert world.decode(decoder, z).shape == (20, 3, 16, 16)


def test_a_second_call_trains_nothing(config, place):
    run = world.train(config, SEED, place)
    before = (run / "log.jsonl").read_bytes()
    assert world.train({**config, "tau": 0.1}, SEED, place) == run, "the decoder's keys are not the model's"
    assert (run / "log.jsonl").read_bytes() == before
    assert world.train(config, SEED + 1, place) != run


def test_a_plain_dit_does_not_depend_on_the_head_that_it_has_not(config, place):
    plain = {**config, "network": "dit"}
    run = world.train(plain, SEED, place)
    assert world.train({**plain, "head": [32, 2, 1]}, SEED, place) == run
    assert world.load(run, plain).config.network.kind == "dit"


def test_the_shift_is_the_one_that_is_asked_for(config, place):
    model = world.load(world.train({**config, "network": "dit", "shift": 1.0}, SEED, place), config)
    assert model.flow.shift == 1
    assert world.load(world.train(config, SEED, place), config).flow.shift == pytest.approx(2.5, rel=0.02)


def test_kept_models_come_in_the_order_of_time(config, place):
    run = world.train(config, SEED, place)
    early, later, last = (world.load(run, config, kept=k).network.state_dict() for k in (0, 1, None))
    step = [(early[n] - later[n]).norm() + (later[n] - last[n]).norm() - (early[n] - last[n]).norm() for n in early]
    assert all(value > -1e-6 for value in step)
    folders = sorted(path.name for path in (run / "kept").iterdir())
    assert [int(name) for name in folders] == [8, 16]  # 40 % and 80 % of 20 images


def test_all_settings_begin_at_the_same_noise_and_seeds_at_others(config, place):
    run = world.train(config, SEED, place)
    model, early = world.load(run, config), world.load(run, config, kept=0)
    z, _ = world.sample(model, config, SEED, place)
    assert torch.equal(world.sample(model, config, SEED, place, guidance=CFG(1.0))[0], z)
    assert not torch.equal(world.sample(model, config, SEED, place, guidance=AutoGuidance(early, 2.0))[0], z)
    assert not torch.equal(world.sample(model, config, SEED + 1, place)[0], z)


# --- judging


def test_the_held_out_images_are_at_no_distance_from_themselves(config, place):
    images, labels = world.pictures(config, place, "held_out")
    found = world.judge(images, labels, config, place)
    assert found["fd_dino"] < 1e-6
    assert found["fd_net"] < 1e-6
    assert found["agreement"] == world.judge_accuracy(config, place)
    assert "agreement" not in world.judge(images, None, config, place)


def test_both_distances_see_other_images(config, place):
    images, labels = world.pictures(config, place, "held_out")
    worse = world.judge(255 - images, labels, config, place)
    real = world.judge(world.pictures(config, place, "train")[0], None, config, place)
    assert worse["fd_dino"] > real["fd_dino"]
    assert worse["fd_net"] > real["fd_net"]


def test_latents_of_the_held_out_images_are_at_no_distance(config, place):
    images, _ = world.pictures(config, place, "held_out")
    z = world.encode(world.space(config, place), images)
    assert world.latent_distance(z, config, place) < 1e-6
    assert world.latent_distance(z + 1, config, place) == pytest.approx(z.shape[1], rel=1e-3)  # |1|^2 over n numbers


def test_reconstructions_are_judged_once_for_a_decoder(config, place):
    found = world.reconstruction(config, SEED, place)
    assert found.keys() == {"fd_dino", "fd_net", "psnr"}
    keys = (*world.DECODER, "samples", "judge_steps")
    file = world.folder_of("reconstruction", config, keys, place, seed=SEED).with_suffix(".json")
    file.write_text(json.dumps(found | {"psnr": -1.0}))
    assert world.reconstruction(config, SEED, place)["psnr"] == -1.0
    for key in ("decoder_steps", "samples", "judge_steps"):  # nor for another one, or by another judge
        changed = {**config, key: config[key] - 1}
        assert world.reconstruction(changed, SEED, place)["psnr"] > 0, key


def test_the_judge_learns_what_can_be_told_apart_and_is_the_same_again(tmp_path):
    images = grey([40, 200] * 16, [0, 1] * 16)
    judge, again = (metric.train_judge(images, steps=60, batch=8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), again.state_dict().values()))
    pictures = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (30, 60, 180, 220)])
    assert metric.read(judge, pictures)["classes"].tolist() == [0, 0, 1, 1]
    metric.save_judge(judge, tmp_path / "judge.safetensors")
    loaded = metric.load_judge(tmp_path / "judge.safetensors", (8, 8), 2)
    assert torch.equal(metric.read(loaded, pictures)["features"], metric.read(judge, pictures)["features"])


def test_the_judges_training_leaves_the_processes_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    metric.train_judge(grey([40, 200], [0, 1]), steps=1, batch=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_judge_of_one_class_is_refused():
    with pytest.raises(ValueError, match=r"classes \['dark'\]; a judge of classes needs two or more"):
        metric.train_judge(grey([40], [0], ["dark"]), steps=1)


# --- stage 1 on tokens that are there already


def test_a_decoder_on_given_tokens_is_the_one_that_encodes_them_itself(encoder, tmp_path):
    short = {"run__duration": "4st", "run__evaluate_every": "100%", "data__flip": True}
    recipe = decoder_recipe(encoder, tokens="memory", **short)
    train_decoder(recipe, tmp_path / "own")
    images, _ = open_split(recipe.data)
    tokens = cache_tokens(world.load_encoder(str(encoder), image_size=16), images, recipe.data, (16, 16))
    train_decoder(recipe, tmp_path / "given", tokens=tokens)
    assert same_bits(tmp_path / "own", tmp_path / "given")


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (1, 1617, 4, 16), "tokens: online; take tokens: memory"),
        (
            {"tokens": "memory"},
            (1, 9, 4, 16),
            r"\[1, 9, 4, 16\] are given, the recipe's images make \[1, 1617, 4, 16\]",
        ),
        ({"tokens": "memory", "data__flip": True}, (1, 1617, 4, 16), r"make \[2, 1617, 4, 16\]"),
    ],
)
def test_tokens_that_do_not_fit_the_recipe_are_refused(encoder, tmp_path, changes, shape, message):
    tokens = LatentCache(torch.zeros(shape), torch.zeros(shape[1], dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        train_decoder(decoder_recipe(encoder, **changes), tmp_path / "run", tokens=tokens)
    assert not Path(tmp_path / "run" / "checkpoints").exists()
