"""Appendix I in small: guidance by classes, by classes within an interval, and by worse models, and what each costs.

The guided model is the DiT-DH of `ingredients`; two of its own earlier states guide it, and a smaller model. Samples of
all settings begin at the same noise.
"""

import time
from pathlib import Path

from rae.diffusion.guidance import CFG, AutoGuidance, inside_interval
from rae.diffusion.model import DiffusionModel
from rae.diffusion.sampling import time_grid
from rae.evaluation import flops
from rae.evaluation.report import Piece, curves
from rae.experiments import ingredients, world
from rae.experiments.claims import AGAIN, DINO, HEADINGS, NET, RULE, better, decide
from rae.experiments.frame import Config, Numbers, Place, Results, Study, Verdict

SCALES = (1.5, 2.5)
SMALL: Config = {"size": [96, 2, 2], "head": [384, 6, 1], "steps": 300, "keep_at": []}
KINDS = {
    "CFG": {"guide": "classes", "t_max": 1.0},
    "CFG up to 0.8": {"guide": "classes", "t_max": 0.8},
    "AutoGuidance, early": {"guide": "early", "t_max": 1.0},
    "AutoGuidance, later": {"guide": "later", "t_max": 1.0},
    "AutoGuidance, small": {"guide": "small", "t_max": 1.0},
}
NONE = "unguided"
SETTINGS = {NONE: {"guide": "none", "scale": 1.0, "t_max": 1.0}} | {
    f"{kind} {scale:g}": {**settings, "scale": scale} for kind, settings in KINDS.items() for scale in SCALES
}


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """One kind of guidance at one scale, with its cost."""
    folder = world.train(config, seed, place)
    model = world.load(folder, config)
    guidance, weak = None, None
    if config["guide"] == "classes":
        guidance, weak = CFG(config["scale"], t_max=config["t_max"]), model
    elif config["guide"] != "none":
        weak = guide(config, folder, seed, place)
        guidance = AutoGuidance(weak, config["scale"], t_max=config["t_max"])
    begun = time.process_time()
    z, labels = world.sample(model, config, seed, place, guidance=guidance)
    seconds = (time.process_time() - begun) / config["samples"]
    images = world.decode(world.decoder(config, seed, place), z)
    times = time_grid(config["sampling_steps"], model.flow.shift, "calls")[:-1]
    weak_calls = inside_interval(times, guidance).sum().item() if guidance else 0
    operations = len(times) * macs(model) + (weak_calls * macs(weak) if weak else 0)
    cost = {"calls": len(times), "weak_calls": weak_calls, "gigamacs": operations / 1e9, "seconds": seconds}
    return world.judge(images, labels, config, place) | cost


def guide(config: Config, folder: Path, seed: int, place: Place) -> DiffusionModel:
    """The model that guides the one of a run's folder: its own of `keep_at`, or a smaller one."""
    if config["guide"] == "small":
        own = {**config, **config["small"]}
        return world.load(world.train(own, seed, place), own)
    return world.load(folder, config, kept=("early", "later").index(config["guide"]))


def macs(model: DiffusionModel) -> int:
    """Multiply-adds of one call with one image."""
    return flops.total(flops.dit(model.config.network).values()).macs


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""
    early = f"AutoGuidance, early {SCALES[0]:g}"
    claims = [better(results, f"{early} is better than no guidance", early, NONE)]
    for scale in SCALES:
        says = f"CFG {scale:g} is better within an interval"
        claims.append(better(results, says, f"CFG up to 0.8 {scale:g}", f"CFG {scale:g}"))
    best = min(SETTINGS, key=lambda setting: results[setting, "fd_dino"].mean)
    return decide(claims, f"The least mean FD of all settings has {best}.")


def figures(results: Results) -> list[Piece]:
    def by_scale(kind: str, number: str) -> tuple[list[float], list[float]]:
        there = {1.0: NONE} | {scale: f"{kind} {scale:g}" for scale in SCALES}
        there = {scale: setting for scale, setting in there.items() if results.seeds(setting)}
        return list(there), [results[setting, number].mean for setting in there.values()]

    titles = {"fd_dino": DINO, "fd_net": NET, "agreement": "read as asked"}
    return [
        curves({kind: by_scale(kind, number) for kind in KINDS}, f"{title}, by the scale of guidance", "scale", title)
        for number, title in titles.items()
    ]


STUDY = Study(
    name="guidance",
    question="Which guidance helps, at what scale, by which guide, and what does it cost?",
    claim=(
        "arXiv 2510.11690, App. I: CFG helps only within an interval of times; AutoGuidance by a smaller model of an "
        "early epoch (scale 1.42, DiT-DH-S of 14 epochs) takes gFID from 1.51 to 1.13 (Table 8); DiT-XL on DINOv2-S "
        "from 1.87 to 1.41 with CFG in an interval."
    ),
    protocol={**world.WORLD, **ingredients.SETTINGS[ingredients.HEAD], "small": SMALL},
    settings=SETTINGS,
    quick={**world.QUICK, "small": {"size": [16, 2, 1], "head": [16, 2, 1], "steps": 2, "keep_at": []}},
    cost="about 25 min of one core beyond ingredients",
    rule=(
        f"{RULE} Claims: (1) AutoGuidance at 1.5 by the model's own early state is better than no guidance; CFG at (2) "
        "1.5 and (3) 2.5 is better within t <= 0.8 than at all times. Which setting has the least distance is reported "
        "and decides nothing: the best of eleven is chosen by chance too."
        f" {AGAIN}"
    ),
    judge=judge,
    run=run,
    shown={
        **HEADINGS,
        "agreement": "read as asked",
        "calls": "calls",
        "weak_calls": "of the guide",
        "gigamacs": "G multiply-adds",
        "seconds": "s an image",
    },
    figures=figures,
    source=world.SOURCE,
    pairs=[("fd_dino", setting, NONE) for setting in SETTINGS if setting != NONE],
)
