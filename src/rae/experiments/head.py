"""Tables 6, 16 and 17 in small: a head against none at equal compute, and how wide and how deep it should be.

All heads stand on one trunk, half as wide as its n = 384 numbers a token. The plain DiT and the DiT-DH of equal compute
are those of `ingredients`: where that study has run, they are there.
"""

from rae.evaluation import flops
from rae.evaluation.report import Piece
from rae.experiments import ingredients, world
from rae.experiments.claims import AGAIN, DINO, HEADINGS, NET, RULE, better, by_setting, decide
from rae.experiments.frame import Config, Numbers, Place, Results, Study, Verdict

PLAIN, SAME = "no head", "384 wide"  # of equal compute
NARROW, WIDE, DEEP = "288 wide", "512 wide", "384 wide, 2 blocks"
SETTINGS = {
    PLAIN: ingredients.SETTINGS[ingredients.WIDE],
    SAME: ingredients.SETTINGS[ingredients.HEAD],
    NARROW: {"head": [288, 6, 1]},
    WIDE: {"head": [512, 8, 1]},
    DEEP: {"head": [384, 6, 2]},
}


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """One network."""
    model = world.load(world.train(config, seed, place), config)
    z, labels = world.sample(model, config, seed, place)
    images = world.decode(world.decoder(config, seed, place), z)
    numbers = world.judge(images, labels, config, place) | {"fd_latent": world.latent_distance(z, config, place)}
    parts = flops.dit(model.config.network).values()
    return numbers | {"megamacs": flops.total(parts).macs / 1e6, "parameters": flops.total(parts).parameters / 1e6}


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""
    return decide(
        [
            better(results, "a head is better than none at equal compute", SAME, PLAIN),
            better(results, "a head as wide as the tokens is better than a narrower one", SAME, NARROW),
            better(results, "a wider head is better than that", WIDE, SAME),
            better(results, "at equal compute a wide head is better than a deep one", WIDE, DEEP),
        ]
    )


def figures(results: Results) -> list[Piece]:
    return by_setting(results, SETTINGS, {"fd_dino": DINO, "fd_net": NET})


STUDY = Study(
    name="head",
    question="Is a shallow, wide head worth its compute, how wide must it be, and is width worth more than depth?",
    claim=(
        "arXiv 2510.11690, gFID: DiT-XL against DiT-DH-XL 3.50 and 2.42 on DINOv2-S, 4.28 and 2.16 on B (Table 6); "
        "heads of 6 x 1152, 4 x 2048, 2 x 2048 (blocks x width) 2.36, 2.31, 2.16 (Table 16); widths of 768, 1536, "
        "2048, 2688 on S (n = 384) 2.66, 2.47, 2.42, 2.43, on B (n = 768) 2.49, 2.24, 2.16, 2.22 (Table 17)."
    ),
    protocol=world.WORLD,
    settings=SETTINGS,
    quick=world.QUICK,
    cost="about 45 min of one core beyond ingredients",
    rule=(
        f"{RULE} Claims: (1) DiT-DH with a head of 384 is better than the plain DiT of equal "
        "compute; (2) that head is better than one of 288, which is narrower than the tokens; (3) a head "
        "of 512 is better than one of 384, on the same trunk, though it costs more; (4) a block of 512 is better than "
        "two of 384, which cost about as much."
        f" {AGAIN}"
    ),
    judge=judge,
    run=run,
    shown={
        **HEADINGS,
        "agreement": "read as asked",
        "fd_latent": "FD, latents",
        "megamacs": "M multiply-adds",
        "parameters": "M parameters",
    },
    figures=figures,
    source=world.SOURCE,
    pairs=[("fd_dino", a, b) for a, b in ((PLAIN, SAME), (NARROW, SAME), (SAME, WIDE), (DEEP, WIDE))],
)
