"""Table 14 in small: as many samples of each class, or classes at random.

A distance of N samples is too large, by more the more samples vary; how often each class is drawn is a part of that.
So as not to ask chance about chance, subsets of N are drawn from a pool of samples again and again, of equal numbers of
each class, or of numbers that are random.
"""

import functools
import json
import statistics

import torch
from torch import Tensor

from rae.evaluation.frechet import distance_between, normal_of
from rae.evaluation.report import Piece
from rae.experiments import ingredients, world
from rae.experiments.claims import AGAIN, DINO, HEADINGS, RULE, better, by_setting, decide
from rae.experiments.frame import Config, Numbers, Place, Results, Study, Verdict, draws

SETTINGS = {"balanced": {"random": False}, "random": {"random": True}}


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """Means over `subsets` of N samples."""
    found, labels = _pool(json.dumps({**config, "random": None}), seed, place)
    real = {name: normal_of(world.held_out(config, place)[name]) for name in ("dino", "net")}
    classes, distances = int(labels.max()) + 1, {"fd_dino": [], "fd_net": []}
    for number in range(config["subsets"]):
        counts = class_counts(config["subset"], classes, config["random"], draws("labels", seed, number, "counts"))
        rows = choose(labels, counts, draws("labels", seed, number, "rows"))
        for name, reference in real.items():
            distances[f"fd_{name}"].append(distance_between(normal_of(found[name][rows]), reference))
    return {name: statistics.fmean(values) for name, values in distances.items()}


@functools.lru_cache(maxsize=1)
def _pool(config: str, seed: int, place: Place) -> tuple[dict[str, Tensor], Tensor]:
    """Features of `samples` samples, every class in turn, and their labels; both settings draw from it."""
    said = json.loads(config)
    model = world.load(world.train(said, seed, place), said)
    z, labels = world.sample(model, said, seed, place)
    return world.features(world.decode(world.decoder(said, seed, place), z), said, place), labels


def class_counts(count: int, classes: int, random: bool, generator: torch.Generator) -> list[int]:
    """How many of each class: as even as can be, or each of `count` samples of a class at random."""
    drawn = torch.randint(classes, (count,), generator=generator) if random else torch.arange(count) % classes
    return drawn.bincount(minlength=classes).tolist()


def choose(labels: Tensor, counts: list[int], generator: torch.Generator) -> Tensor:
    """Rows of the pool, `counts` of each class, none twice.

    Raises:
        ValueError: the pool has fewer of a class.
    """
    rows = []
    for label, count in enumerate(counts):
        own = (labels == label).nonzero().flatten()
        if len(own) < count:
            raise ValueError(f"{count} samples of class {label} of {len(own)} are asked for; set samples to more.")
        rows.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return torch.cat(rows)


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""
    return decide([better(results, "balanced labels give smaller distances than random ones", "balanced", "random")])


def figures(results: Results) -> list[Piece]:
    return by_setting(results, SETTINGS, {"fd_dino": DINO})


STUDY = Study(
    name="labels",
    question="How much smaller is a distance if every class is sampled equally often?",
    claim="arXiv 2510.11690, Table 14: 50,000 samples, gFID 1.51 with balanced and 1.60 with random labels.",
    protocol={**world.WORLD, **ingredients.SETTINGS[ingredients.HEAD], "samples": 2000, "subset": 500, "subsets": 50},
    settings=SETTINGS,
    quick={**world.QUICK, "samples": 60, "subset": 10, "subsets": 2},
    cost="about 10 min of one core beyond ingredients",
    rule=f"{RULE} The difference is that of means over subsets. {AGAIN}",
    judge=judge,
    run=run,
    shown=HEADINGS,
    figures=figures,
    source=world.SOURCE,
    pairs=[("fd_dino", "random", "balanced"), ("fd_net", "random", "balanced")],
)
