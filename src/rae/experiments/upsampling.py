"""Table 9 in small: half as many tokens a side and a decoder whose patches are twice as large, against all tokens.

    direct         56 px into the encoder, 4 x 4 tokens, a decoder of patches of 7: images of 28 px
    up-sampling    28 px into the encoder, 2 x 2 tokens, a decoder of patches of 14: images of 28 px (Sec. 6.1)

Both decoders are as deep and wide, and learn from the same images as long; what is compared are reconstructions, and
what a diffusion model costs on as many tokens.
"""

from rae.data.images import to_unit
from rae.evaluation import flops
from rae.evaluation.reconstruction import psnr, ssim
from rae.evaluation.report import Piece
from rae.experiments import world
from rae.experiments.claims import AGAIN, HEADINGS, RULE, Claim, by_setting, decide
from rae.experiments.frame import Config, Difference, Numbers, Place, Results, Study, Verdict
from rae.training.dit_recipe import describe_model

DIRECT, UP = "direct", "up-sampling"
READABLE = 0.1  # by how much less of its reconstructions may be read as what they show


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """Train a decoder, judge what it makes of held-out images; every judge sees them as large as for all settings."""
    made = {**config, "input_size": config["encoder_size"]}
    rae = world.decoder(made, seed, place)
    images, labels = world.pictures(config, place, "held_out", config["samples"])
    again = world.decode(rae, world.encode(rae, images))
    numbers = world.judge(again, labels, config, place)
    numbers |= {metric.__name__: metric(to_unit(again), to_unit(images)).mean().item() for metric in (psnr, ssim)}
    files, nowhere = world.data(config, place), place.work
    recipe = world.dit_recipe(made, seed, files, rae=nowhere, latents=nowhere)
    network = describe_model(recipe, rae, files.open("train").class_names).network
    size = {"image_size": config["image_size"], "input_size": config["encoder_size"]}
    costs = {
        "encoder": flops.encoder(config["encoder"], **size)[1],
        "decoder": flops.decoder(rae.decoder.config),
        "dit": flops.total(flops.dit(network).values()),
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
        Claim("reconstructions from all tokens are better", *(more(fd, UP, DIRECT) for fd in ("fd_dino", "fd_net"))),
        Claim("and nearer to the images, in dB", more("psnr", DIRECT, UP)),
        Claim("up-sampled ones are read as what they show at most 10 % less", more("agreement", UP, DIRECT, READABLE)),
    ]
    whole, part = (results[setting, "megaflops_dit"].mean for setting in (DIRECT, UP))
    return decide(claims, f"A diffusion model as in the other studies costs {whole / part:.1f} times as much direct.")


def figures(results: Results) -> list[Piece]:
    titles = {"fd_dino": "FD of DINOv2's class tokens", "fd_net": "FD of the judge's features", "psnr": "PSNR / dB"}
    return by_setting(results, (DIRECT, UP), titles)


STUDY = Study(
    name="upsampling",
    question="What is lost if the decoder doubles the resolution, and a quarter of the tokens is left to generate?",
    claim=(
        "Table 9 (arXiv 2510.11690), ImageNet 512: with 1,024 tokens rFID 0.53, gFID 1.13; with 256 tokens and a "
        "decoder of patches twice as large rFID 0.97, gFID 1.61, for a quarter of the tokens to generate."
    ),
    protocol=world.WORLD,
    settings={DIRECT: {"encoder_size": 56}, UP: {"encoder_size": 28}},
    quick=world.QUICK,
    cost="about 50 minutes of one core: six decoders, three of them those of `ingredients`",
    rule=(
        f"{RULE} Claims, of reconstructions of held-out images: (1) the direct decoder's have a lower FD, (2) and a "
        "higher PSNR; (3) of those made of a quarter of the tokens, the small network reads no more than a tenth of "
        "all images less as what they show. The paper's samples are not made again: no diffusion model is trained. "
        "No run came before the rule."
        f" {AGAIN}"
    ),
    judge=judge,
    run=run,
    shown={
        **HEADINGS,
        "psnr": "PSNR / dB",
        "ssim": "SSIM",
        "agreement": "read as what they show",
        "tokens": "tokens",
        "megaflops_encoder": "MFLOP, encoder",
        "megaflops_decoder": "decoder",
        "megaflops_dit": "a call of the DiT",
    },
    figures=figures,
    source=world.SOURCE,
    paper={DIRECT: {"fd_dino": 0.53}, UP: {"fd_dino": 0.97}},
    pairs=[(number, UP, DIRECT) for number in ("fd_dino", "fd_net", "psnr", "agreement")],
)
