"""Every recipe fits its schema and its networks, and its header says what it costs and whether anyone has run it."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from tiny import save_encoder

from rae.autoencoder.decoder import DecoderConfig
from rae.autoencoder.encoders import EncoderConfig, _input_size
from rae.autoencoder.families import ENCODERS
from rae.config import load_recipe
from rae.training.decoder import DecoderRecipe, _check_sizes
from rae.training.dit_recipe import DiTRecipe
from rae.training.durations import best_warning, in_images

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PUBLISHED = sorted((ROOT / "recipes/stage1").glob("*.yaml"))
MAIN = ROOT / "recipes/stage1/dinov2-b_vit-xl_256.yaml"
SMALL = ROOT / "recipes/cpu/gan-decoder.yaml"
IMAGENET = 1_281_167  # images of its training part
ENCODER_NAMES = {
    "dinov2-s": "dinov2-small-reg",
    "dinov2-b": "dinov2-base-reg",
    "dinov2-l": "dinov2-large-reg",
    "siglip2-b": "siglip2-base",
    "mae-b": "mae-base",
}


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def load(path: Path) -> DecoderRecipe | DiTRecipe:
    return load_recipe(DiTRecipe if "network" in yaml.safe_load(path.read_text()) else DecoderRecipe, path)


def describe(recipe: DecoderRecipe) -> tuple[EncoderConfig, DecoderConfig]:
    """The recipe's networks, by the encoder's row alone: nothing is downloaded."""
    choice = recipe.encoder
    row = ENCODERS[choice.name]._asdict()
    mean, std = row.pop("normalisation")
    seen = _input_size(choice.image_size, choice.input_size, row["patch_size"])
    row |= {"mean": mean, "std": std, "family": "", "prefix_tokens": 0, "norm_eps": 1e-6}
    encoder = EncoderConfig(name=choice.name, image_size=choice.image_size, input_size=seen, **row)
    return encoder, recipe.decoder.describe(encoder)


def header(path: Path) -> str:
    """The comment at the top, its lines joined."""
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def test_the_recipes_are_found():
    assert len(PUBLISHED) == 16
    assert {MAIN, SMALL} < {*RECIPES}


@each(RECIPES)
def test_recipe_fits_its_schema_and_its_networks(path):
    recipe = load(path)
    if isinstance(recipe, DecoderRecipe):
        _check_sizes(*describe(recipe))


@each(RECIPES)
def test_durations_are_in_order(path):
    recipe = load(path)
    convert = {"batch": recipe.run.batch, "epoch": IMAGENET}
    total = in_images(recipe.run.duration, **convert)
    at = {
        name: in_images(duration, total=total, **convert)
        for name, duration in (("warmup", recipe.optim.warmup), ("decay_end", recipe.optim.decay_end))
    }
    assert at["warmup"] < at["decay_end"]
    if path.parent.name != "stage2":  # whose rows are stages of one long schedule
        assert at["decay_end"] <= total
    if isinstance(recipe, DecoderRecipe) and (adversarial := recipe.loss.adversarial):
        perceptual, discriminator = recipe.loss.perceptual, adversarial.discriminator
        starts = [in_images(part.start, total=total, **convert) for part in (perceptual, discriminator, adversarial)]
        assert starts == sorted(starts)
        assert starts[-1] < total


@each(RECIPES)
@pytest.mark.parametrize("batch", [None, 512, 1000, 1024])
def test_every_step_that_is_judged_is_saved(path, batch):
    """At ImageNet's size, by which no part of an epoch is a whole number of batches: `best` may be any of them."""
    run = load(path).run
    convert = {"batch": batch or run.batch, "epoch": IMAGENET}
    total = in_images(run.duration, **convert)
    warning, both = best_warning(run.evaluate_every, run.save_every, total=total, **convert)
    assert warning is None
    assert both > 0


@each(RECIPES)
def test_header_says_command_and_what_came_of_it(path):
    text, name = header(path), path.relative_to(ROOT).as_posix()
    command = "train-decoder" if isinstance(load(path), DecoderRecipe) else "train-dit"
    assert re.search(rf"rae {command} {re.escape(name)} .*--out runs/", text)
    published = path.parent.name in ("stage1", "stage2")
    for word in ("Paper: arXiv 2510.11690", "Cost:", "Memory:", "Differs", "Run:") if published else ("Measured",):
        assert word in text


# --- the published rows


@each(PUBLISHED)
def test_names_tell_what_is_inside(path):
    name = re.fullmatch(r"([a-z\d-]+)_(vit-[a-z]+)_(\d+)(_upsample)?(?:_tau([\d.]+))?", path.stem)
    encoder, decoder, pixels, upsample, tau = name.groups()
    recipe = load(path)
    seen, made = describe(recipe)
    assert (recipe.encoder.name, recipe.decoder.size.lower()) == (ENCODER_NAMES[encoder], decoder)
    assert made.output_size == (int(pixels), int(pixels))
    assert seen.image_size == ((256, 256) if upsample else made.output_size)
    assert made.patch_size == (32 if upsample else 16)
    assert recipe.noise.tau == float(tau or 0.8)


@each(PUBLISHED)
def test_rows_differ_in_encoder_decoder_and_noise_only(path):
    def rest(recipe: DecoderRecipe) -> dict:
        return recipe.model_dump(exclude={"encoder": True, "decoder": True, "noise": {"tau"}, "run": {"micro_batch"}})

    assert rest(load(path)) == rest(load(MAIN))


def test_settings_are_those_of_table_12():
    recipe = load(MAIN)
    perceptual, adversarial, optim = recipe.loss.perceptual, recipe.loss.adversarial, recipe.optim
    assert (recipe.run.duration, recipe.run.batch) == ("16ep", 512)
    assert (perceptual.kind, perceptual.weight, perceptual.start) == ("lpips", 1, "0ep")
    assert (adversarial.weight, adversarial.start, adversarial.discriminator.start) == (0.75, "8ep", "6ep")
    for section in (optim, adversarial.discriminator.optim):
        assert (section.lr, section.final_lr, section.schedule, section.warmup) == (2e-4, 2e-5, "cosine", "1ep")
        assert (section.betas, section.weight_decay, section.clip) == ((0.9, 0.95), 0, None)  # betas: the authors' code
    assert optim.ema == 0.9978


def vit(tokens: int, width: int, depth: int, mlp_width: int) -> float:
    """Multiplications of a forward pass over one image: linear layers and the two products of attention."""
    return depth * (tokens * (4 * width**2 + 2 * width * mlp_width) + 2 * tokens**2 * width)


def operations(recipe: DecoderRecipe) -> float:
    """Floating-point operations of a run over ImageNet, two for each multiplication of the networks.

    A frozen network costs as much backwards as forwards, a trained one twice as much.
    """
    encoder, decoder = describe(recipe)
    seen = math.prod(encoder.input_size) // encoder.patch_size**2
    encode = vit(seen, encoder.width, encoder.depth, 4 * encoder.width)
    decode = vit(1 + math.prod(decoder.grid), decoder.width, decoder.depth, decoder.mlp_width)
    vgg = 15.35e9 / 224**2 * math.prod(decoder.output_size)
    dino = vit(785, 384, 12, 1536)  # DINO-S/8 at 224 px
    heads = 5 * 784 * 384 * (384 * (1 + 9) + 1)
    # epochs, and the work of one image in each of them
    always = 16, encode + (3 + recipe.run.recompute) * decode + 3 * vgg
    discriminator = 10, decode + 2 * dino + 2 * 3 * heads  # fresh fakes; originals and fakes
    adversarial = 8, decode + 2 * dino + 2 * heads  # all micro-batches are judged first
    return 2 * IMAGENET * sum(epochs * work for epochs, work in (always, discriminator, adversarial))


@each(PUBLISHED)
def test_cost_in_the_header_is_what_counting_gives(path):
    found = re.search(
        r"Cost: ([\d.]+)e18 operations.*? (\d+) hours of one H100 .*?, (\d+) of a 24 GB card", header(path)
    )
    work, h100, small_card = map(float, found.groups())
    wanted = operations(load(path))
    assert work * 1e18 == pytest.approx(wanted, rel=0.02)
    assert h100 * 3600 == pytest.approx(wanted / 350e12, rel=0.03)
    assert small_card * 3600 == pytest.approx(wanted / 75e12, rel=0.03)


# --- the small form


def test_small_form_of_the_whole_objective_trains(run, tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    tiny = ["encoder.image_size=16", "decoder.size=[16,1,2,32]", "decoder.patch_size=8", "run.duration=2st"]
    tiny += ["run.evaluate_images=8", "statistics=false"]
    tiny += [f"encoder.name={encoder}", f"loss.adversarial.discriminator.features={encoder}"]
    tiny += [f"loss.adversarial.discriminator.{change}" for change in ("input_size=16", "depths=[0]", "kernel=3")]
    output = run("train-decoder", SMALL, *tiny, "--out", tmp_path / "run")
    assert f"discriminator on {encoder}" in output.replace("\n", "")
    figures = {}
    for line in (tmp_path / "run/log.jsonl").read_text().splitlines():
        figures |= json.loads(line)
    for name in ("l1", "perceptual", "adversarial", "lambda", "d_loss", "d_accuracy", "held_out_l1", "held_out_fd"):
        assert math.isfinite(figures[name])
    assert (tmp_path / "run/best").is_file()
