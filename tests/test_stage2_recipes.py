"""Recipes of the published stage-2 rows: models, schedules, shifts are the paper's, headers are what counting gives."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from test_baselines import make_vae
from test_recipes import IMAGENET, ROOT, describe, each, header, load, vit

from rae.autoencoder.baselines import is_baseline
from rae.diffusion.dit import DIT_SIZES, DiTConfig, DiTDHConfig, build
from rae.diffusion.model import DiffusionModelConfig
from rae.training.dit_recipe import DiTRecipe, describe_model

PUBLISHED = sorted((ROOT / "recipes/stage2").glob("*.yaml"))
GOLDEN = json.loads((ROOT / "tests/golden/param_counts.json").read_text())["models"]
TABLES = ROOT / "docs/stage2-recipes.md"
VARIANTS = {
    "dit": r"|_tau0|_no-fixes",
    "ditdh": r"|_head-(?P<depth>\d)x(?P<width>\d+)|_upsample|_unconditional",
}
CLASSES = [str(i) for i in range(1000)]


class Space:
    """What a recipe's autoencoder is, without its weights: latent shape, multiplications of `encode`, parameters."""

    def __init__(self, name: str) -> None:
        self.latent_identity = "none"
        if is_baseline(name):
            weights, size = re.fullmatch(r"(?:sd-vae:(.+)|pixels)@(\d+)", name).groups()
            self.size = self.output = int(size)
            self.latent_shape = (4, self.size // 8, self.size // 8) if weights else (3, self.size, self.size)
            parts = [GOLDEN[f"SD-VAE {half}"] for half in ("encode", "decode")] if weights else []
            self.encode = parts[0]["gflops_2mac"] / 2 * 1e9 if weights else 0
            self.parameters = sum(part["parameters"] for part in parts)
            self.stage1 = None
        else:
            self.stage1 = load(ROOT / f"recipes/stage1/{name.removeprefix('runs/')}.yaml")
            encoder, decoder = describe(self.stage1)
            self.size, self.output = encoder.image_size[0], decoder.output_size[0]
            side = encoder.input_size[0] // encoder.patch_size
            self.latent_shape = (encoder.width, side, side)
            self.encode = vit(side**2, encoder.width, encoder.depth, 4 * encoder.width)
            decoding = 4 * decoder.width**2 + 2 * decoder.width * decoder.mlp_width
            self.parameters = 12 * encoder.depth * encoder.width**2 + decoder.depth * decoding


@functools.cache
def described(path: Path) -> tuple[DiTRecipe, Space, DiffusionModelConfig]:
    recipe = load(path)
    space = Space(recipe.rae)
    return recipe, space, describe_model(recipe, space, None if recipe.network.unconditional else CLASSES)


@functools.cache
def parameters(path: Path) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(described(path)[2].network).parameters())


def rest(recipe: DiTRecipe, **exclude) -> dict:
    return recipe.model_dump(exclude={"rae": True, "network": True, "run": {"micro_batch", "duration"}} | exclude)


def test_the_recipes_are_found():
    assert len(PUBLISHED) == 34


# --- what is trained


@each(PUBLISHED)
def test_names_tell_what_is_inside(path):
    recipe, space, _ = described(path)
    kind, size, latents, pixels, variant = re.fullmatch(
        r"(dit|ditdh)-([a-z]+)_([a-z\d-]+)_(256|512)(_.*)?", path.stem
    ).groups()
    network, variant = recipe.network, re.fullmatch(VARIANTS[kind], variant or "")
    assert variant is not None
    assert (network.kind.replace("-", ""), network.size) == (kind, size.upper())
    if latents in ("pixels", "sd-vae"):
        assert recipe.rae.startswith(latents)
    else:
        tau0 = "_tau0" if path.stem.endswith(("_tau0", "_no-fixes")) else ""
        upsample = "_upsample" if path.stem.endswith("_upsample") else ""
        assert recipe.rae == f"runs/{latents}_vit-xl_{pixels}{upsample}{tau0}"
    assert space.output == int(pixels)
    assert space.size == (256 if path.stem.endswith("_upsample") else int(pixels))
    assert network.unconditional == path.stem.endswith("_unconditional")
    if kind == "ditdh" and variant["width"]:
        depth, width = int(variant["depth"]), int(variant["width"])
        heads = next(heads for other, heads, _ in DIT_SIZES.values() if other == width)  # as in Table 13
        assert network.head == (width, heads, depth)
    else:
        assert network.head is None


@each(PUBLISHED)
def test_tokens_and_shift_are_those_of_the_latents(path):
    recipe, space, model = described(path)
    network = model.network
    if space.stage1:
        size = re.search(r"small|base|large", space.stage1.encoder.name)[0]
        channels, side = {"small": 384, "base": 768, "large": 1024}[size], space.size // 16
        assert (network.patch_size, network.token_dim, network.token_grid) == (1, channels, (side, side))
    elif recipe.rae.startswith("pixels"):
        assert (network.patch_size, network.token_dim, network.token_grid) == (16, 768, (16, 16))
    else:
        assert (network.patch_size, network.token_dim, network.token_grid) == (2, 16, (16, 16))
    expected = {384: math.sqrt(24), 768: math.sqrt(48), 1024: 8.0, 16: 1.0}[network.token_dim] * space.size / 256
    assert model.flow.shift == (1.0 if path.stem.endswith("_no-fixes") else pytest.approx(expected))
    assert (model.flow.prediction, model.flow.time_law) == ("v", "uniform")
    narrow = path.stem == "dit-s_dinov2-b_256_no-fixes"
    assert (network.output_width < network.token_dim) == network.allow_narrow == narrow


@each(PUBLISHED)
def test_model_has_the_published_number_of_parameters(path):
    _, space, model = described(path)
    network, counted = model.network, parameters(path)
    assert re.search(r"(\d+) M parameters", header(path))[1] == f"{counted / 1e6:.0f}"
    name = path.stem.replace("ditdh", "DH")
    if space.latent_shape == (768, 16, 16) and network.num_classes and "head" not in name:
        kind, size = ("DiT-DH-" if network.kind == "dit-dh" else "DiT-"), described(path)[0].network.size
        assert counted == GOLDEN[f"{kind}{size}"]["parameters"]
    if path.stem in ("dit-xl_dinov2-s_256", "ditdh-xl_dinov2-b_256"):  # Table 8, rounded down
        assert counted == pytest.approx({"dit": 676e6, "dit-dh": 839e6}[network.kind], rel=1e-3)


@each(PUBLISHED)
def test_schedule_is_that_of_the_kind(path):
    recipe, _, _ = described(path)
    optim, run, data = recipe.optim, recipe.run, recipe.data
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adamw", 2e-4, (0.9, 0.95), 0)
    assert (run.batch, data.crop, data.flip, data.enlarge, recipe.drop_labels) == (1024, "center", True, True, 0.1)
    if recipe.network.kind == "dit":
        assert (optim.schedule, optim.clip, optim.warmup) == ("constant", None, "0st")
        assert yaml.safe_load(path.read_text())["optim"]["ema"] == 0.9999
    else:
        assert (optim.schedule, optim.clip, optim.final_lr) == ("linear", 1.0, 2e-5)
        assert (optim.warmup, optim.warmup_from_zero, optim.decay_end) == ("40ep", False, "800ep")
        assert yaml.safe_load(path.read_text())["optim"]["ema"] == 0.9995


@each(PUBLISHED)
def test_rows_differ_in_autoencoder_network_and_length_only(path):
    kind = described(path)[0].network.kind.replace("-", "")
    main = described(ROOT / f"recipes/stage2/{kind}-xl_dinov2-b_256.yaml")[0]
    exclude = {"flow": True} if path.stem.endswith("_no-fixes") else {}
    assert rest(described(path)[0], **exclude) == rest(main, **exclude)


# --- what the headers say


def rows() -> list[tuple[str, str, str]]:
    """(table, recipe, figure) of the page's table."""
    found = re.findall(r"^\| ([\w, ]+) \|.*\| `([\w.-]+)`[^|]*\| ([^|]+?) \|$", TABLES.read_text(), re.MULTILINE)
    return [(table, stem, figure) for tables, stem, figure in found for table in tables.split(", ")]


def test_page_lists_every_recipe():
    assert {stem for _, stem, _ in rows()} == {path.stem for path in PUBLISHED}


@pytest.mark.parametrize(("table", "stem", "figure"), rows())
def test_header_names_table_and_figure_of_the_page(table, stem, figure):
    paper = re.search(r"Paper: arXiv 2510.11690, (.*?) Cost:", header(ROOT / f"recipes/stage2/{stem}.yaml"))[1]
    tables = re.findall(r"\d+", " ".join(re.findall(r"\(Tables? ([^)]*)\)", paper)))
    assert table in tables or not table.isdecimal()
    for number in re.findall(r"\d+\.\d+", figure):
        assert number in paper


@each(PUBLISHED)
def test_header_has_commands_for_itself(path):
    text, recipe = header(path), described(path)[0]
    name = path.relative_to(ROOT).as_posix()
    assert f"rae train-dit {name} --out runs/{path.stem} " in text
    samples = re.findall(r"rae sample runs/(\S+) (.*?--npz \S+)", text)
    assert {stem for stem, _ in samples} == {path.stem}
    for _, options in samples:
        assert ("--num 50000" if recipe.network.unconditional else "--per-class 50") in options
        assert "--rounding truncate" in options
    for stem, epochs in re.findall(r"--autoguidance runs/(\S+)_(\d+)ep [\d.]+", text):
        guide = ROOT / f"recipes/stage2/{stem}.yaml"
        assert described(guide)[2].network.num_classes == described(path)[2].network.num_classes
        assert described(guide)[1].latent_shape == described(path)[1].latent_shape
        assert f"run.duration={epochs}ep --out runs/{stem}_{epochs}ep" in header(guide)
    for other in re.findall(r"--autoencoder runs/(\S+?)\.?(?=\s)", text):
        assert Space(f"runs/{other}").latent_shape == described(path)[1].latent_shape
    for word in ("Cost:", "Memory:", "Differs", "Run: nobody has run this recipe."):
        assert word in text


def dit(config: DiTConfig) -> float:
    """Multiplications of a forward pass over one image: linear layers and the two products of attention."""

    def blocks(depth: int, width: int, modulations: int) -> float:
        mlp = int(2 / 3 * int(config.mlp_ratio * width))
        return depth * (tokens * (4 * width**2 + 3 * width * mlp) + 2 * tokens**2 * width + modulations * 6 * width**2)

    tokens, width, n = math.prod(config.token_grid), config.width, config.token_dim
    always = 512 * width + width**2 + tokens * n * width + blocks(config.depth, width, 1)  # time, embedding, DiT
    if not isinstance(config, DiTDHConfig):
        return always + 2 * width**2 + tokens * width * n
    head = config.head_width
    ends = tokens * (2 * n * head + width * head * (width != head) + 2 * head**2)
    return always + blocks(config.head_depth, head, tokens) + ends


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("DiT")])
def test_counting_agrees_with_the_reference(name):
    kind, size = re.fullmatch(r"(DiT|DiT-DH)-([A-Z]+)", name).groups()
    config = (DiTDHConfig if kind == "DiT-DH" else DiTConfig).of_size(
        size, in_channels=768, grid=(16, 16), num_classes=1000, allow_narrow=True
    )
    assert 2 * dit(config) == pytest.approx(GOLDEN[name]["gflops_2mac"] * 1e9, rel=1e-4)


def operations(path: Path, *, recompute: bool) -> float:
    """Floating-point operations of a run over ImageNet, two for each multiplication; backwards costs twice forwards."""
    recipe, space, model = described(path)
    epochs = int(recipe.run.duration.removesuffix("ep"))
    return 2 * IMAGENET * epochs * (space.encode + (3 + recompute) * dit(model.network))


@each(PUBLISHED)
def test_cost_in_the_header_is_what_counting_gives(path):
    found = re.search(
        r"Cost: ([\d,.]+)e18 operations for (\d+) epochs, ([\d,.]+)e18 with run.recompute, "
        r".*? ([\d,.]+) hours of one H100 .*?, ([\d,.]+) of a 24 GB card",
        header(path),
    )
    plain, epochs, recomputed, h100, small_card = (float(number.replace(",", "")) for number in found.groups())
    assert f"{epochs:.0f}ep" == described(path)[0].run.duration
    wanted = [operations(path, recompute=recompute) for recompute in (False, True)]
    assert [plain * 1e18, recomputed * 1e18] == pytest.approx(wanted, rel=0.02)
    assert h100 * 3600 == pytest.approx(wanted[0] / 350e12, rel=0.03)
    assert small_card * 3600 == pytest.approx(wanted[1] / 75e12, rel=0.03)


def memory(path: Path) -> float:
    """GiB of a step on one card that does all of it, by the account of the page."""
    recipe, space, model = described(path)
    network, tokens = model.network, math.prod(model.network.token_grid)
    kept, block = network.width * (4 * network.depth + 13), 53.5 * network.width
    if isinstance(network, DiTDHConfig):
        kept += network.head_width * (4 * network.head_depth + 20)
        block = max(block, 75.4 * network.head_width)
    activations = recipe.run.micro_batch * tokens * (kept + block)
    count = parameters(path)
    return (20 * count + activations + 4 * space.parameters) / 2**30 + 0.5


@each(PUBLISHED)
def test_memory_in_the_header_is_that_of_the_account(path):
    assert described(path)[0].run.recompute
    assert float(re.search(r"Memory: about (\d+) GiB", header(path))[1]) == pytest.approx(memory(path), abs=0.51)
    disk = re.search(r"checkpoints takes (\d+) GB", header(path))[1]  # two, and the one being written
    assert float(disk) == pytest.approx(3 * 16 * parameters(path) / 1e9, abs=0.51)


# --- in small


@pytest.mark.parametrize(
    ("name", "autoencoder"),
    [
        ("stage2/dit-xl_dinov2-b_256", "RUN"),
        ("stage2/ditdh-xl_dinov2-b_256_unconditional", "RUN"),
        ("stage2/dit-xl_sd-vae_256", "sd-vae:VAE@16"),
        ("stage2/ditdh-xl_pixels_256", "pixels@16"),
        ("cpu/digits-dit", "RUN"),
        ("cpu/digits-pixels", "pixels@16"),
    ],
)
def test_recipes_train_in_small(run, finished, tmp_path, name, autoencoder):
    make_vae().save_pretrained(tmp_path / "vae")
    autoencoder = autoencoder.replace("RUN", str(finished)).replace("VAE", str(tmp_path / "vae"))
    tiny = [f"rae={autoencoder}", "network.size=[16,2,1]", "data.source=digits", "data.held_out=0.1", "data.workers=0"]
    tiny += ["run.batch=8", "run.micro_batch=4", "run.duration=2st", "run.evaluate_images=8", "sheet.steps=2"]
    tiny += ["network.head=[16,2,1]"] if "ditdh" in name else []
    tiny += ["network.patch_size=2"] if "pixels" in name else []
    run("train-dit", ROOT / f"recipes/{name}.yaml", *tiny, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    figures = functools.reduce(dict.__or__, lines)
    assert math.isfinite(figures["loss"])
    assert math.isfinite(figures["held_out_loss"])
