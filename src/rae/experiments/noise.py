"""Table 15c in small: how much noise a decoder is trained on, and by which law of sigma.

One decoder for each tau and law decodes the samples of one model, the DiT-DH of `ingredients`, and held-out images. The
paper draws sigma as |N(0, tau^2)|, of mean 0.8 tau; its code as tau U(0,1), of mean 0.5 tau.
"""

from rae.evaluation.report import Piece, curves
from rae.experiments import ingredients, world
from rae.experiments.claims import AGAIN, DINO, HEADINGS, NET, RULE, Claim, better, decide
from rae.experiments.frame import Config, Numbers, Place, Results, Study, Verdict

TAUS = (0.5, 0.8, 1.0)
LAWS = ("uniform", "half-normal")
CLEAN = "no noise"
SETTINGS = {CLEAN: {"tau": 0.0}} | {
    f"tau {tau:g}, {law}": {"tau": tau, "sigma_law": law} for tau in TAUS for law in LAWS
}
PAPER = ((4.81, 0.49), (4.39, 0.54), (4.28, 0.57), (4.20, 0.60))  # gFID, rFID of tau 0, 0.5, 0.8, 1


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """One decoder."""
    model = world.load(world.train(config, seed, place), config)
    z, labels = world.sample(model, config, seed, place)
    found = world.judge(world.decode(world.decoder(config, seed, place), z), labels, config, place)
    return found | {f"r{name}": value for name, value in world.reconstruction(config, seed, place).items()}


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""
    claims = []
    for law in LAWS:
        noisy = f"tau 0.8, {law}"
        claims.append(better(results, f"samples are better with noise of tau 0.8, {law}", noisy, CLEAN))
        worse = (results.difference(number, noisy, CLEAN) for number in ("rfd_dino", "rfd_net"))
        claims.append(Claim("and reconstructions worse", *worse))
    laws = [
        better(results, f"at tau {t:g} the paper's is better", *(f"tau {t:g}, {law}" for law in LAWS[::-1]))
        for t in TAUS
    ]
    return decide(claims, f"Of the laws of sigma, {'; '.join(map(str, laws))}.")


def figures(results: Results) -> list[Piece]:
    def by_tau(law: str, number: str) -> tuple[list[float], list[float]]:
        there = {0.0: CLEAN} | {tau: f"tau {tau:g}, {law}" for tau in TAUS}
        there = {tau: setting for tau, setting in there.items() if results.seeds(setting)}
        return list(there), [results[setting, number].mean for setting in there.values()]

    axes = {"dino": DINO, "net": NET}
    kinds = {"samples": "fd", "reconstructions": "rfd"}
    return [
        curves(
            {f"{kind}, {law}": by_tau(law, f"{fd}_{name}") for kind, fd in kinds.items() for law in LAWS},
            f"{axis}, by the noise that decoders were trained on",
            "tau",
            axis,
        )
        for name, axis in axes.items()
    ]


STUDY = Study(
    name="noise",
    question="How much noise should a decoder be trained on, and by the paper's law of sigma or by its code's?",
    claim=(
        "arXiv 2510.11690, Table 15c: tau 0, 0.5, 0.8, 1: gFID "
        f"{', '.join(f'{g:.2f}' for g, _ in PAPER)}; rFID {', '.join(f'{r:.2f}' for _, r in PAPER)}. The text "
        "draws sigma by the half-normal law, the code by the uniform one."
    ),
    protocol={**world.WORLD, **ingredients.SETTINGS[ingredients.HEAD]},
    settings=SETTINGS,
    quick=world.QUICK,
    cost="about 2 h 10 min of one core beyond ingredients: 15 decoders",
    rule=(
        f"{RULE} Claims, for either law: (1, 3) samples are better by the decoder of tau 0.8 than by that of no noise, "
        "(2, 4) and reconstructions worse. Which law is better is reported and decides nothing: the paper compares "
        "none. Seen before this was written: what `ingredients` says of one run with decoders of tau 0.8 and 0."
        f" {AGAIN}"
    ),
    judge=judge,
    run=run,
    shown={
        **HEADINGS,
        "agreement": "read as asked",
        "rfd_dino": "of reconstructions: FD, DINOv2",
        "rfd_net": "FD, judge",
        "rpsnr": "PSNR / dB",
    },
    figures=figures,
    source=world.SOURCE,
    pairs=[("fd_dino", setting, CLEAN) for setting in SETTINGS if setting != CLEAN],
)
