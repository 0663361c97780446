"""What a training run does for every image, and what it keeps in memory: the accounts of docs/recipes.md (stage 1) and
docs/stage2-recipes.md (stage 2), which nobody has measured on a GPU.

A trained network costs twice its forward pass backwards, a frozen one once; `run.recompute` adds a pass forwards.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from rae.autoencoder.decoder import DecoderConfig
from rae.commands.cost_devices import Precision
from rae.config import ConfigError
from rae.diffusion.dit import DiTConfig, DiTDHConfig
from rae.evaluation.flops import Cost, total
from rae.training.decoder import DecoderRecipe
from rae.training.dit_recipe import DiTRecipe
from rae.training.durations import in_images
from rae.training.run import RunConfig

CUDA = 2**29  # bytes that it takes for itself
BYTES = {"fp32": 4, "bf16": 2}
ENCODER, DECODER, LPIPS, FROZEN, HEADS = "encoder", "decoder", "LPIPS (VGG16)", "discriminator's network", "its heads"


class Work(NamedTuple):
    """Done for an image: floating-point operations, two for each multiply-add, and what they are done in."""

    name: str
    flops: int
    precision: Precision


class Phase(NamedTuple):
    """Images of a run that all cost the same."""

    name: str
    images: int
    work: tuple[Work, ...]


class Length(NamedTuple):
    """In images: the run, a step, what a device has of it, what it takes at a time."""

    total: int
    batch: int
    local: int
    micro: int


def length(run: RunConfig, epoch: int, devices: int) -> Length:
    """Raises ConfigError: less than a step, or a batch that cannot be shared."""
    whole = in_images(run.duration, batch=run.batch, epoch=epoch)
    if not whole:
        raise ConfigError(f"run.duration {run.duration} is less than one batch of {run.batch} images.")
    if run.batch % devices:
        raise ConfigError(
            f"run.batch {run.batch} cannot be shared by {devices} devices; change run.batch or --devices."
        )
    local = run.batch // devices
    return Length(whole, run.batch, local, min(run.micro_batch or local, local))


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def dit_phases(recipe: DiTRecipe, parts: Mapping[str, Cost], size: Length) -> list[Phase]:
    """One phase; encoding is part of it unless latents are kept."""
    network = total(cost for name, cost in parts.items() if name.startswith("DiT"))
    work = [Work("network, both ways", (3 + recipe.run.recompute) * network.flops, recipe.run.precision)]
    if recipe.latents == "online":
        work = [*_encoding(parts, recipe.encoder.precision), *work]
    return [Phase("the run", size.total, tuple(work))]


def _encoding(parts: Mapping[str, Cost], precision: Precision) -> list[Work]:
    return [
        Work(name, cost.flops, "tf32" if name.startswith("SD-VAE") else precision)
        for name, cost in parts.items()
        if ENCODER in name
    ]


def dit_memory(
    recipe: DiTRecipe, network: DiTConfig, parts: Mapping[str, Cost], size: Length, *, micro: int, recompute: bool
) -> dict[str, float]:
    """What => bytes, on each device.

    Of every token autograd keeps, for a channel, 4 bytes in each block that is computed again, else 53.5 in a block
    modulated by time and label and 75.4 in one modulated by token, and 13 or 20 at the ends. bf16; fp32 twice, at most.
    Two moments are counted for each weight; Muon keeps one of its matrices.
    """
    count = total(cost for name, cost in parts.items() if name.startswith("DiT")).parameters
    others = total(parts.values()).parameters - count
    streams = [(network.width, network.depth, 53.5, 13)]
    if isinstance(network, DiTDHConfig):
        streams.append((network.head_width, network.head_depth, 75.4, 20))
    kept = sum(width * ((4 if recompute else block) * depth + ends) for width, depth, block, ends in streams)
    if recompute:
        kept += max(width * block for width, _, block, _ in streams)
    tokens, precision = network.token_grid[0] * network.token_grid[1], recipe.run.precision
    activations = micro * tokens * kept * BYTES[precision] / 2
    if precision == "bf16" and not recompute:
        activations += 2 * count  # the copies of the weights
    trained = count * (16 + 4 * len(recipe.optim.ema))
    if recipe.run.sharding == "full":
        trained *= size.local / size.batch
    return {
        "weights, gradients, moments, averages": trained,
        "encoder, decoder": 4 * others,
        "activations": activations,
        "CUDA itself": CUDA,
    }


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def decoder_phases(recipe: DecoderRecipe, parts: Mapping[str, Cost], size: Length, epoch: int) -> list[Phase]:
    """A phase for each set of terms of the loss that is on."""
    loss, end = recipe.loss, size.total
    perceived = trains = plays = end
    if loss.perceptual:
        perceived = in_images(loss.perceptual.start, batch=size.batch, epoch=epoch, total=end)
    if loss.adversarial:
        starts = loss.adversarial.discriminator.start, loss.adversarial.start
        trains, plays = (in_images(start, batch=size.batch, epoch=epoch, total=end) for start in starts)
    edges = sorted({0, end, *(min(start, end) for start in (perceived, trains, plays))})
    phases = []
    for begin, until in itertools.pairwise(edges):
        on = {"perceptual": begin >= perceived, "discriminator": begin >= trains, "adversarial": begin >= plays}
        name = " + ".join(["L1", *(term for term, is_on in on.items() if is_on)])
        phases.append(Phase(name, until - begin, tuple(_terms(recipe, parts, size, **on))))
    return phases


def _terms(
    recipe: DecoderRecipe, parts: Mapping[str, Cost], size: Length, *, perceptual: bool, discriminator: bool,
    adversarial: bool,
) -> list[Work]:  # fmt: skip
    run, passes = recipe.run, {name: cost.flops for name, cost in parts.items()}
    again = Work("decoder once more", passes[DECODER], run.precision)
    work = [] if recipe.tokens == "memory" else _encoding(parts, recipe.encoder.precision)
    work.append(Work("decoder, both ways", (3 + run.recompute) * passes[DECODER], run.precision))
    if perceptual and LPIPS in parts:  # the original, the reconstruction, and back to it
        work.append(Work(LPIPS, 3 * passes[LPIPS], "tf32"))
    elif perceptual:
        work.append(Work("encoder, on reconstructions", 2 * passes[ENCODER], recipe.encoder.precision))
    if not (discriminator or adversarial):
        return work
    own = recipe.loss.adversarial.discriminator
    if discriminator:  # originals and fakes; its heads are trained
        work += [again] * (own.fakes == "fresh")
        work += [Work(FROZEN, 2 * passes[FROZEN], own.precision), Work(HEADS, 6 * passes[HEADS], "tf32")]
    if adversarial:  # fakes, and back to them; lambda is of the whole batch
        work += [again] * (size.micro < size.local)
        work += [Work(FROZEN, 2 * passes[FROZEN], own.precision), Work(HEADS, 2 * passes[HEADS], "tf32")]
    return work


def decoder_memory(
    recipe: DecoderRecipe,
    config: DecoderConfig,
    parts: Mapping[str, Cost],
    size: Length,
    *,
    micro: int,
    recompute: bool,
) -> dict[str, float]:
    """What => bytes, on each device.

    Of every token autograd keeps 8.4 bytes for a channel at the ends and, in each block, 4 for a channel if it is
    computed again, else 20 and 4 more for each unit of the MLP (bf16; fp32 twice, at most); LPIPS 1,952 bytes for a
    pixel and a third of that more while it is taken back. The encoder as judge is not in the account.
    """
    count, own = parts[DECODER].parameters, recipe.loss.adversarial and recipe.loss.adversarial.discriminator
    pixels, tokens = config.output_size[0] * config.output_size[1], config.grid[0] * config.grid[1]
    block = 20 * config.width + 4 * config.mlp_width
    kept = (1 + tokens) * (8.4 * config.width + config.depth * (4 * config.width if recompute else block))
    kept *= BYTES[recipe.run.precision] / 2
    judging = (1 + tokens) * block if recompute else 0
    if LPIPS in parts:
        judging = max(judging, 1952 * pixels * 4 / 3)
    image, noisy = 4 * 3 * pixels, 4 * tokens * config.latent_channels
    frozen = BYTES[recipe.encoder.precision] * parts[ENCODER].parameters
    if LPIPS in parts:
        frozen += 4 * parts[LPIPS].parameters
    if own:
        frozen += BYTES[own.precision] * parts[FROZEN].parameters + 16 * parts[HEADS].parameters
    return {
        "weights, gradients, moments, average": 20 * count,
        "encoder and the networks that judge": frozen,
        "images and tokens of a step": size.local * (3 * image + 2 * noisy) if own else micro * (image + 2 * noisy),
        "activations": micro * (kept + judging),
        "CUDA itself": CUDA,
    }
