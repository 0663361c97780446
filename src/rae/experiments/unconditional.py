"""Table 18 in small: the same DiT-DH without classes, and AutoGuidance, which needs none."""

from rae.diffusion.guidance import AutoGuidance
from rae.evaluation.report import Piece
from rae.experiments import ingredients, world
from rae.experiments.claims import AGAIN, DINO, HEADINGS, RULE, better, by_setting, decide
from rae.experiments.frame import Config, Numbers, Place, Results, Study, Verdict

CLASSES, NONE, GUIDED = "by class", "unconditional", "unconditional, AutoGuidance"
SETTINGS = {
    CLASSES: {"scale": 1.0},
    NONE: {"unconditional": True, "scale": 1.0},
    GUIDED: {"unconditional": True, "scale": 1.5},
}


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """One model, guided by its own early state where the scale is not 1."""
    folder = world.train(config, seed, place)
    guide = world.load(folder, config, kept=0)
    guidance = AutoGuidance(guide, config["scale"])  # at scale 1 the model itself
    z, _ = world.sample(world.load(folder, config), config, seed, place, guidance=guidance)
    numbers = {"fd_latent": world.latent_distance(z, config, place)}
    return numbers | world.judge(world.decode(world.decoder(config, seed, place), z), None, config, place)


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""
    return decide(
        [
            better(results, "AutoGuidance helps a model without classes", GUIDED, NONE),
            better(results, "classes help, without guidance", CLASSES, NONE),
        ]
    )


def figures(results: Results) -> list[Piece]:
    return by_setting(results, SETTINGS, {"fd_dino": DINO})


STUDY = Study(
    name="unconditional",
    question="How good are samples without classes, and does AutoGuidance help them too?",
    claim=(
        "arXiv 2510.11690, App. L, Table 18: without labels in training and sampling, 200 epochs, AutoGuidance: gFID "
        "4.96, IS 123.1, where guided models of classes reach 1.13 (Table 8)."
    ),
    protocol={**world.WORLD, **ingredients.SETTINGS[ingredients.HEAD]},
    settings=SETTINGS,
    quick=world.QUICK,
    cost="about 20 min of one core beyond ingredients",
    rule=(
        f"{RULE} Claims: (1) AutoGuidance at 1.5 by the model's own early state is better "
        "than none for a model without classes; (2) a model of classes is better than one without, both "
        "unguided."
        f" {AGAIN}"
    ),
    judge=judge,
    run=run,
    shown={**HEADINGS, "fd_latent": "FD, latents"},
    figures=figures,
    source=world.SOURCE,
    pairs=[("fd_dino", NONE, GUIDED), ("fd_dino", NONE, CLASSES)],
)
