"""Tables 10 and 11 and Figure 6b in small: one DiT, one recipe, three latent spaces of the same images.

    RAE       tokens of the frozen encoder, 4 x 4 of n = 384
    KL-VAE    8 x 8 x 4 latents of a VAE trained here, in patches of 2: 4 x 4 tokens of 16
    pixels    28 x 28 x 3 numbers, in patches of 7: 4 x 4 tokens of 147

The DiT is as wide as the widest of these tokens and sees as many of them everywhere, so that all but its first and last
layer is the same and an image costs the same. Samples are judged at several moments of training, by what they show.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rae.autoencoder.baselines import Autoencoder, open_autoencoder
from rae.data.images import to_bytes, to_unit
from rae.diffusion.model import DiffusionModel
from rae.diffusion.sampling import generate
from rae.evaluation import flops
from rae.evaluation.reconstruction import psnr
from rae.evaluation.report import Piece, curves
from rae.experiments import vae, world
from rae.experiments.claims import HEADINGS, RULE, Claim, better, decide
from rae.experiments.frame import Config, Difference, Numbers, Place, Results, Study, Verdict
from rae.folders import aside
from rae.processes import process_state
from rae.training.dit import train_dit
from rae.training.dit_recipe import DiTRecipe

RAE, KL, PIXELS = "RAE", "KL-VAE", "pixels"
KEPT = ["15%", "30%", "60%"]  # moments that are judged besides the end
STEP = 3  # a forward and a backward pass, in forward passes


class Space(NamedTuple):
    """A latent space.

    Attributes:
        autoencoder: to and from it; its decoder is one that was trained.
        name: what a recipe calls the space.
        files: the images at the size that it takes.
        latents: of a recipe.
        margin: pixels to cut off every side of what it decodes.
    """

    autoencoder: Autoencoder
    name: str
    files: world.Data
    latents: str
    margin: int


def open_space(config: Config, seed: int, place: Place) -> Space:
    """The space that `config["space"]` names; what is trained of it is trained with this seed, where it is not yet."""
    if config["space"] == "rae":
        name = str(world.folder_of("space", config, world.SPACE, place))
        known = str(world.latents(config, place))
        return Space(world.decoder(config, seed, place), name, world.data(config, place), known, 0)
    device = process_state().device
    if config["space"] == "vae":
        name, margin = vae.vae_of(config, seed, place), config["vae_margin"]
        return Space(open_autoencoder(name).to(device), name, vae.data(config, place), "memory", margin)
    name = f"pixels@{config['image_size']}"
    return Space(open_autoencoder(name).to(device), name, world.data(config, place), "memory", 0)


def recipe_of(config: Config, space: Space, seed: int) -> DiTRecipe:
    """That of the small world, in this space and its patches; the shift is sqrt(m / base), 1 at the least, for all."""
    base = world.dit_recipe(config, seed, space.files, rae=Path(space.name), latents=Path(space.latents))
    network = base.network.model_dump() | {"patch_size": config["patch_size"], "allow_narrow": False}
    return DiTRecipe.model_validate(
        base.model_dump() | {"rae": space.name, "latents": space.latents, "network": network}
    )


# --- one run ---------------------------------------------------------------------------------------------------------


def model_keys(config: Config) -> tuple[str, ...]:
    """What a diffusion model of this study depends on: the decoder of its space only where that made the space too."""
    return (*world.MODEL, "space", "patch_size", *(vae.VAE if config["space"] == "vae" else ()))


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """Train in one space; judge reconstructions, and samples of every moment that is kept and of the end."""
    space = open_space(config, seed, place)
    folder = world.folder_of("spaces", config, model_keys(config), place, seed=seed)
    train_dit(recipe_of(config, space, seed), folder)
    kept = [int(path.name) for path in sorted((folder / "kept").iterdir())]
    numbers = {f"r{name}": value for name, value in _reconstruction(config, space, place).items()}
    models = {images: world.load(folder, config, kept=k) for k, images in enumerate(kept)}
    model = models[config["steps"] * config["batch"]] = world.load(folder, config)
    for images, each in models.items():
        found = _judged(each, images, config, space, seed, place)
        numbers |= {f"{name}@{images}": value for name, value in found.items()}
    numbers |= found
    macs = flops.total(flops.dit(model.config.network).values()).macs
    return numbers | {"gigaflops": STEP * 2 * macs / 1e9, "n": model.config.network.token_dim}


def _judged(
    model: DiffusionModel, images: int, config: Config, space: Space, seed: int, place: Place
) -> dict[str, float]:
    """fd_dino, fd_net and agreement of `samples` samples of the model that has seen `images`; kept in a file.

    They begin at the same seeds in every space.
    """
    keys = (*model_keys(config), *world.DECODER, "samples", "sampling_steps", "judge_steps")
    file = world.folder_of("judged", config, keys, place, seed=seed) / f"{images}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        count = config["samples"]
        labels = [i % model.config.network.num_classes for i in range(count)]
        asked = {"steps": config["sampling_steps"], "grid": "calls", "batch_size": 100}
        drawn = generate(model, space.autoencoder, labels, range(seed * count, (seed + 1) * count), **asked)
        samples = _inside(torch.cat([to_bytes(batch.images).cpu() for batch in drawn]), space.margin)
        found = world.judge(samples, torch.tensor(labels), config, place)
        with aside(file) as hidden:
            hidden.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _reconstruction(config: Config, space: Space, place: Place) -> dict[str, float]:
    """fd_dino, fd_net and psnr of the first `samples` held-out images, decoded again."""
    images = world.pictures(config, place, "held_out", config["samples"])[0]
    wider = vae.with_margin(images, space.margin)
    again = _inside(world.decode(space.autoencoder, world.encode(space.autoencoder, wider)), space.margin)
    return world.judge(again, None, config, place) | {"psnr": psnr(to_unit(again), to_unit(images)).mean().item()}


def _inside(images: Tensor, margin: int) -> Tensor:
    height, width = images.shape[2:]
    return images[:, :, margin : height - margin, margin : width - margin]


# --- judging ---------------------------------------------------------------------------------------------------------


def curve(numbers: Numbers, name: str) -> dict[int, float]:
    """Images seen => number, in the order of training."""
    found = {int(key.partition("@")[2]): value for key, value in numbers.items() if key.startswith(f"{name}@")}
    return dict(sorted(found.items()))


def images_to_reach(distances: dict[int, float], target: float) -> float:
    """Images after which a distance is `target` or less for the first time; infinite if it never is.

    Between two moments the logarithm of the distance is taken to be linear in that of the images.
    """
    before = None
    for images, distance in distances.items():
        if distance <= target:
            if before is None:
                return images
            (x, y), slope = before, math.log(images / before[0]) / math.log(distance / before[1])
            return x * math.exp(slope * math.log(target / y))
        before = images, distance
    return math.inf


def doublings(results: Results, name: str, this: str, than: str) -> Difference | None:
    """log2 of how many times fewer images `this` needs for what `than` has at the end, seed by seed; -1 for never."""
    first, second = (
        {row["seed"]: curve(row["numbers"], name) for row in results.rows if row["setting"] == setting}
        for setting in (this, than)
    )
    saved = {}
    for seed in first.keys() & second.keys():
        *_, (total, target) = second[seed].items()
        needed = images_to_reach(first[seed], target)
        saved[seed] = -1.0 if math.isinf(needed) else math.log2(total / needed)
    return Difference.between(saved, dict.fromkeys(saved, 0.0))


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""

    def half(than: str) -> Claim:
        found = [doublings(results, name, RAE, than) for name in ("fd_dino", "fd_net")]
        above = [d and d._replace(mean=d.mean - 1) for d in found]
        return Claim(f"RAE reaches {than}'s last FD with half of its images (doublings saved, less 1)", *above)

    claims = [better(results, f"samples are better on RAE than on {than}", RAE, than) for than in (KL, PIXELS)]
    return decide([*claims, half(KL)])


def figures(results: Results) -> list[Piece]:
    names = {"fd_dino": "FD of DINOv2's class tokens", "fd_net": "FD of the judge's features"}
    pieces = []
    for number, axis in names.items():
        lines = {s: _mean_curve(results, s, number) for s in (RAE, KL, PIXELS)}
        pieces.append(curves(lines, f"{axis}, by images seen", "images", axis, log=True))
    spent = {}
    for setting, (images, values) in ((s, _mean_curve(results, s, "fd_dino")) for s in (RAE, KL, PIXELS)):
        spent[setting] = [n * results[setting, "gigaflops"].mean / 1e3 for n in images], values
    axis = names["fd_dino"]
    return [*pieces, curves(spent, f"{axis}, by compute", "training the DiT / TFLOP", axis, log=True)]


def _mean_curve(results: Results, setting: str, number: str) -> tuple[Sequence[float], Sequence[float]]:
    """Images, and means over seeds."""
    found = [curve(row["numbers"], number) for row in results.rows if row["setting"] == setting]
    if not found:
        return [], []
    return list(found[0]), [statistics.fmean(each[images] for each in found) for images in found[0]]


STUDY = Study(
    name="spaces",
    question="Does a diffusion transformer learn faster and better among a frozen encoder's latents than elsewhere?",
    claim=(
        "arXiv 2510.11690, ImageNet 256, gFID: DiT-XL 4.28 on RAE latents (Table 6), 7.13 on SD-VAE's (Table 10), "
        "51.09 on pixels (Table 11). Figure 6b: RAE takes far fewer epochs to an FID than what is trained on "
        "SD-VAE's."
    ),
    protocol={
        **world.WORLD,
        **vae.VAE,
        "decoder_steps": 1500,
        "network": "dit",
        "size": [384, 6, 3],
        "head": None,
        "keep_at": KEPT,
    },
    settings={
        RAE: {"space": "rae", "patch_size": 1},
        KL: {"space": "vae", "patch_size": 2},
        PIXELS: {"space": "pixels", "patch_size": 7},
    },
    quick={**world.QUICK, **vae.QUICK, "size": [384, 6, 1], "head": None, "steps": 12},
    cost="about an hour of one core: nine models, three decoders, three KL autoencoders",
    rule=(
        f"{RULE} Claims: at the end of training samples are better in RAE's space than (1) in the KL-VAE's and (2) in "
        "pixels; (3) RAE reaches the FD that the KL-VAE ends with after at most half of the images, the logarithm of "
        "FD taken as linear in that of the images between the moments at which it is measured; where it never does "
        "it counts as needing twice all images. Whatever decoders lose is in all of it: the FD of reconstructions "
        "stands beside. The learning rate is that of the small world, chosen in trials on RAE latents alone, and the "
        "rate falls towards the end in all spaces alike. No sample of another space than RAE's was seen before the "
        "rule. The decoders are those of the first run of the other studies, of 1,500 steps, as many as the KL "
        "autoencoders have: about as long for each."
    ),
    judge=judge,
    run=run,
    shown={
        **HEADINGS,
        "agreement": "read as asked",
        "rfd_dino": "of reconstructions: FD, DINOv2",
        "rfd_net": "FD, judge",
        "rpsnr": "PSNR / dB",
        "gigaflops": "GFLOP to train on an image",
        "n": "n",
    },
    figures=figures,
    source=world.SOURCE,
    paper={RAE: {"fd_dino": 4.28}, KL: {"fd_dino": 7.13}, PIXELS: {"fd_dino": 51.09}},
    pairs=[(number, other, RAE) for number in ("fd_dino", "fd_net") for other in (KL, PIXELS)],
)
