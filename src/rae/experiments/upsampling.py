"""Table 9 in small: half as many tokens a side and a decoder whose patches are twice as large, against all tokens.

    direct         56 px into the encoder, 4 x 4 tokens, a decoder of patches of 7: images of 28 px
    up-sampling    28 px into the encoder, 2 x 2 tokens, a decoder of patches of 14: images of 28 px (Sec. 6.1)

Both decoders are as deep and wide, and learn from the same images as long, and so do two DiT-DH of one size, the times
shifted by sqrt(m) as ever. What is compared are reconstructions, samples, and what a call of the DiT-DH costs.
"""

from rae.data.images import to_unit
from rae.evaluation import flops
from rae.evaluation.reconstruction import psnr, ssim
from rae.evaluation.report import Piece
from rae.experiments import ingredients, world
from rae.experiments.claims import AGAIN, DINO, NET, RULE, Claim, better, by_setting, decide
from rae.experiments.frame import Config, Difference, Numbers, Place, Results, Study, Verdict

DIRECT, UP = "direct", "up-sampling"
KINDS, METRICS = {"r": "reconstructions", "": "samples"}, {"fd_dino": DINO, "fd_net": NET}
READABLE = 0.1  # by how much less of its reconstructions may be read as what they show


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """One space: reconstructions of held-out images, and samples; judges see both as large as for all settings."""
    made = {**config, "input_size": config["encoder_size"]}
    rae = world.decoder(made, seed, place)
    images, labels = world.pictures(config, place, "held_out", config["samples"])
    again = world.decode(rae, world.encode(rae, images))
    numbers = {f"r{name}": value for name, value in world.judge(again, labels, config, place).items()}
    numbers |= {metric.__name__: metric(to_unit(again), to_unit(images)).mean().item() for metric in (psnr, ssim)}
    model = world.load(world.train(made, seed, place), made)
    z, labels = world.sample(model, made, seed, place)
    numbers |= world.judge(world.decode(rae, z), labels, config, place)
    size = {"image_size": config["image_size"], "input_size": config["encoder_size"]}
    costs = {
        "encoder": flops.encoder(config["encoder"], **size)[1],
        "decoder": flops.decoder(rae.decoder.config),
        "dit": flops.total(flops.dit(model.config.network).values()),
    }
    numbers |= {f"megaflops_{name}": cost.flops / 1e6 for name, cost in costs.items()}
    return numbers | {"tokens": rae.latent_shape[1] * rae.latent_shape[2]}


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(results: Results) -> Verdict:
    """By `STUDY.rule`."""

    def more(number: str, this: str, than: str, by: float = 0.0) -> Difference | None:
        found = results.difference(number, this, than)
        return found and found._replace(mean=found.mean + by)

    claims = [
        Claim("reconstructions from all tokens are better", *(more(fd, UP, DIRECT) for fd in ("rfd_dino", "rfd_net"))),
        Claim("and nearer to the images, in dB", more("psnr", DIRECT, UP)),
        Claim("up-sampled ones are read as what they show at most 10 % less", more("ragreement", UP, DIRECT, READABLE)),
        better(results, "samples from all tokens are better", DIRECT, UP),
    ]
    whole, part = (results[setting, "megaflops_dit"].mean for setting in (DIRECT, UP))
    return decide(claims, f"A call of the diffusion model costs {whole / part:.1f} times as much direct.")


def figures(results: Results) -> list[Piece]:
    titles = {f"{r}{fd}": f"{what}: {axis}" for r, what in KINDS.items() for fd, axis in METRICS.items()}
    return by_setting(results, (DIRECT, UP), titles)


STUDY = Study(
    name="upsampling",
    question="What is lost if the decoder doubles the resolution, and a quarter of the tokens is left to generate?",
    claim=(
        "Table 9 (arXiv 2510.11690), ImageNet 512: with 1,024 tokens rFID 0.53, gFID 1.13; with 256 tokens and a "
        "decoder of patches twice as large rFID 0.97, gFID 1.61, for a quarter of the tokens to generate."
    ),
    protocol={**world.WORLD, **ingredients.SETTINGS[ingredients.HEAD]},
    settings={DIRECT: {"encoder_size": 56}, UP: {"encoder_size": 28, "shift": 1.25}},  # m is a quarter
    quick=world.QUICK,
    cost="about 20 min of one core beyond ingredients: three decoders, three models",
    rule=(
        f"{RULE} Claims, of reconstructions of held-out images: (1) the direct decoder's have a lower FD, (2) and a "
        "higher PSNR; (3) of those made of a quarter of the tokens, the small network reads no more than a tenth of "
        "all images less as what they show. (4) Samples of the direct one have a lower FD. No run came before the rule "
        f"of (1) to (3). {AGAIN} No samples from a quarter of the tokens were seen before (4) was written."
    ),
    judge=judge,
    run=run,
    shown={
        "rfd_dino": "reconstructions: FD, DINOv2",
        "rfd_net": "reconstructions: FD, judge",
        "psnr": "PSNR / dB",
        "ssim": "SSIM",
        "ragreement": "read as what they show",
        "fd_dino": "samples: FD, DINOv2",
        "fd_net": "samples: FD, judge",
        "agreement": "read as asked",
        "tokens": "tokens",
        "megaflops_encoder": "MFLOP, encoder",
        "megaflops_decoder": "decoder",
        "megaflops_dit": "a call of the DiT",
    },
    figures=figures,
    source=world.SOURCE,
    paper={DIRECT: {"rfd_dino": 0.53, "fd_dino": 1.13}, UP: {"rfd_dino": 0.97, "fd_dino": 1.61}},
    pairs=[(number, UP, DIRECT) for number in ("rfd_dino", "rfd_net", "psnr", "ragreement", "fd_dino", "fd_net")],
)
