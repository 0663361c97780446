"""Table 1d in small: how much of an image's class a linear map and neighbours read from each latent space.

Three spaces of the same images: tokens of the frozen encoder, means of a KL autoencoder that was trained on them, and
their pixels. Nothing is generated, and no decoder has a part in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rae.autoencoder.baselines import Pixels, open_autoencoder
from rae.autoencoder.latents import tokens_to_map
from rae.data.images import to_unit
from rae.data.order import epoch_order
from rae.evaluation.probe import choose_decay, fit_path, measure_accuracy, neighbour_votes, part_of_each_class
from rae.evaluation.report import Piece, dots
from rae.experiments import world
from rae.experiments.claims import Claim, decide
from rae.experiments.frame import Config, Numbers, Place, Results, Study, Verdict
from rae.experiments.vae import QUICK, VAE, vae_of, with_margin
from rae.processes import process_state

RAE, KL, PIXELS = "RAE", "KL-VAE", "pixels"
POOLS = {"mean": lambda z: z.mean((2, 3)), "all": lambda z: z.flatten(1)}  # [B,C,h,w] -> [B,C], [B,C h w]
WORDS = {"mean": "means over positions", "all": "all numbers"}
CHOOSING = 0.2  # part of each class's training images that chooses the weight decay


def latents(config: Config, seed: int, place: Place, part: str, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Latents [N,C,h,w] of these images of "train" or "held_out", and their labels [N]."""
    (images, labels), device = world.pictures(config, place, part), process_state().device
    if config["space"] == "rae":
        network = world.encoder(config["encoder"], config["image_size"], config["input_size"]).to(device)
        found = [tokens_to_map(network(to_unit(x.to(device))), network.grid).cpu() for x in images[chosen].split(100)]
        return torch.cat(found), labels[chosen]
    if config["space"] == "vae":
        images, space = with_margin(images, config["vae_margin"]), open_autoencoder(vae_of(config, seed, place))
    else:
        space = Pixels(tuple(images.shape[2:]))
    return world.encode(space.to(device), images[chosen]), labels[chosen]


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """Probe one space: fitted on training images that the seed draws, the same in every space, tested on all others."""
    count = config["probe_images"]
    drawn = epoch_order(seed, 0, config["images"])[:count].tolist()
    fit, labels = latents(config, seed, place, "train", drawn)
    test, asked = latents(config, seed, place, "held_out", range(config["held_out"]))
    classes = int(labels.max()) + 1
    chooses = part_of_each_class(labels, torch.arange(count), CHOOSING, [str(c) for c in range(classes)])
    numbers = {"numbers": fit[0].numel()}
    for name, pool in POOLS.items():
        own, other = pool(fit), pool(test)
        decay, _ = choose_decay(own, labels, chooses, classes)
        (probe,) = fit_path(own, labels, classes, [decay])
        scores = {"linear": probe.scores(other), "neighbours": neighbour_votes(own, labels, other, classes)}
        for kind, values in scores.items():
            numbers[f"{kind}_{name}"] = 100 * measure_accuracy(values, asked).top1.value
    return numbers


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""
    claims = [
        Claim(f"of {words} RAE is read better than {other}", results.difference(f"linear_{pool}", RAE, other))
        for pool, words in WORDS.items()
        for other in (KL, PIXELS)
    ]
    near = []
    for pool, words in WORDS.items():
        shares = [f"{results[s, f'neighbours_{pool}'].mean:.1f} % of {s}" for s in (RAE, KL, PIXELS)]
        near.append(f"of {words} {', '.join(shares)}")
    return decide(claims, f"Neighbours read {'; '.join(near)}.")


def figures(results: Results) -> list[Piece]:
    pieces = []
    for kind, title in (("linear", "Linear probe"), ("neighbours", "20 nearest neighbours")):
        values = {}
        for pool, name in (("mean", "mean"), ("all", "all numbers")):
            for setting in (RAE, KL, PIXELS):
                if results.seeds(setting):
                    mean, std, count = results[setting, f"{kind}_{pool}"]
                    values[f"{setting}, {name}"] = (mean, None if std is None else std / count**0.5)
        pieces.append(dots(values, title, "held-out images read right / %, ± standard error"))
    return pieces


STUDY = Study(
    name="representation",
    question="Do the latents that diffusion works in tell what is in the image?",
    claim=(
        "Table 1d (arXiv 2510.11690): a linear probe on frozen latents reaches 84.5 % on ImageNet with DINOv2-B, "
        "79.1 % with SigLIP2-B, 68.0 % with MAE-B, and 8.0 % with SD-VAE."
    ),
    protocol={
        **{key: world.WORLD[key] for key in ("image_size", "images", "held_out", "enlarge", "encoder", "input_size")},
        **VAE,
        "probe_images": 4000,
        "probe": "logistic regression to its optimum, weight decay chosen on a fifth of the images it is fitted on",
        "neighbours": "20 by cosine, weighted, temperature 0.07",
    },
    settings={RAE: {"space": "rae"}, KL: {"space": "vae"}, PIXELS: {"space": "pixels"}},
    quick={"images": 60, "held_out": 30, "enlarge": True, "probe_images": 50, **QUICK},
    cost="about 20 minutes of one core, half of it three KL autoencoders",
    rule=(
        "A claim holds if the difference that it is about is above 0 by the interval of its mean over the seeds (± "
        "the 95 % quantile of Student's t times the standard error), fails if below, is open otherwise. Agrees if "
        "all hold, does not agree if one fails, cannot tell otherwise. Claims: of held-out images the linear probe "
        "reads more, in %, from RAE latents than (1) from those of the KL-VAE and (2) from pixels, of means over "
        "positions, and (3), (4) the same of all numbers. Neighbours are reported and decide nothing, for the paper "
        "has no such column. How far apart the spaces are is not asked: ten kinds of clothes can be told apart by "
        "their pixels as a thousand kinds of things cannot. No run came before the rule."
    ),
    judge=judge,
    run=run,
    shown={
        "linear_mean": "linear, mean / %",
        "linear_all": "linear, all numbers / %",
        "neighbours_mean": "neighbours, mean / %",
        "neighbours_all": "neighbours, all numbers / %",
        "numbers": "numbers of a latent",
    },
    figures=figures,
    source=world.SOURCE,
    paper={RAE: {"linear_mean": 84.5}, KL: {"linear_mean": 8.0}},
    pairs=tuple(
        (f"{kind}_{pool}", RAE, other) for kind in ("linear", "neighbours") for pool in POOLS for other in (KL, PIXELS)
    ),
)
