"""A network learns one image by heart, on latents of a frozen encoder; what the study `overfit` measures of it.

image --image_latents--> x [1,n,h,w] --learn--> network --evaluate--> losses
                                                   `--sample--> samples --relative_error--> |sample - x|^2 / |x|^2
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.autoencoder.encoders import Encoder, load_encoder
from rae.autoencoder.latents import tokens_to_map
from rae.data.crops import center_crop
from rae.data.images import open_images, to_tensor, to_unit
from rae.diffusion.dit import DiT, DiTConfig, DiTDHConfig, build
from rae.diffusion.flow import Flow
from rae.diffusion.sampling import euler, time_grid
from rae.evaluation.flow_loss import latent_moments, width_bound
from rae.experiments.frame import Config, Numbers, Place, draws, seed_of
from rae.training.run import DTYPES

EARLY = 1 / 8  # below it most of the loss of a wide network lies: it must amplify x_t by 1 / t


@functools.lru_cache(maxsize=1)
def _encoder(name: str, side: int) -> Encoder:
    return load_encoder(name, image_size=side, input_size=side)


def image(config: Config, seed: int, source: str) -> Tensor:
    """Image `seed` of a source, its centre crop: uint8 [3,h,w]."""
    images = open_images(source)
    if seed >= len(images):
        raise ValueError(
            f"seed {seed} is image {seed}, and {source} has {len(images)}; fewer --seeds, or other --data."
        )
    return to_tensor(center_crop(images.read(seed), (config["image_size"],) * 2))


@torch.no_grad()
def image_latents(config: Config, seed: int, source: str) -> Tensor:
    """Image `seed` of a source -> its tokens as a map [1,n,h,w].

    With k layers, n is k times the encoder's width: the tokens after blocks L/k, 2L/k, ..., L of L, each through a
    LayerNorm of its own, side by side. k = 1 is what the encoder puts out.
    """
    encoder = _encoder(config["encoder"], config["image_size"])
    # uint8 [3,h,w] -> [0,1] [1,3,h,w] -> network input
    x = encoder.preprocess(to_unit(image(config, seed, source)[None]))
    count, depth = config["layers"], encoder.config.depth
    if count > depth:
        raise ValueError(f"{count} layers of {encoder.config.name}, which has {depth}; take an encoder with more.")
    states = encoder.hidden_states(x, blocks=[depth * k // count - 1 for k in range(1, count + 1)])
    tokens = [F.layer_norm(state, (encoder.width,), eps=encoder.config.norm_eps) for state in states]
    return tokens_to_map(torch.cat(tokens, dim=2), encoder.grid)


def network_config(config: Config, shape: Sequence[int]) -> DiTConfig:
    """The network of a setting, for latents of a shape (n, h, w); widths are fractions of n, in steps of 4 a head."""
    n, step = shape[0], 4 * config["heads"]

    def width(fraction: float) -> int:
        return max(1, round(fraction * n / step)) * step

    settings = {"in_channels": n, "grid": tuple(shape[1:]), "num_classes": 0, "allow_narrow": True}
    settings |= {"width": width(config["width"]), "heads": config["heads"], "depth": config["depth"]}
    if config["network"] == "dit":
        return DiTConfig(**settings)
    head = {"head_width": width(config["head_width"]), "head_heads": config["heads"]}
    return DiTDHConfig(**settings, **head, head_depth=config["head_depth"])


def run(config: Config, setting: str, seed: int, place: Place) -> Numbers:
    """Train on image `seed` alone, evaluate on times and noise of its own, sample.

    All settings see the same times and noise in training, evaluation and sampling, so that their differences are those
    of the networks; the weights start at random for each.
    """
    x = image_latents(config, seed, place.source)
    network, flow = learn(x, config, setting, seed)
    described = network.config
    loss, late_times = evaluate(network, flow, x, config["evaluated"], seed)
    return {
        "n": len(x[0]),
        "width": described.output_width,
        "depth": described.depth,
        "bound": width_bound(latent_moments(x).covariance, described.output_width),
        "loss": loss,
        "loss_late_times": late_times,
        "sample_error": relative_error(sample(network, flow, x, config, seed), x),
    }


def learn(x: Tensor, config: Config, setting: str, seed: int) -> tuple[DiT, Flow]:
    """Train by AdamW; its rate rises for 20 steps and falls to 0 as a cosine. bf16 is of matrix products alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("overfit", setting, seed, "weights"))
        network = build(network_config(config, x.shape[1:]))
    flow = Flow(shift=config["shift"])
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=config["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / config["steps"])) / 2
    )
    predict = functools.partial(network, dtype=DTYPES[config["precision"]])
    generator = draws("overfit", seed, "training")
    batch, y = x.expand(config["batch"], -1, -1, -1), torch.zeros(config["batch"], dtype=torch.int64)
    for step in range(config["steps"]):
        t = flow.times(torch.rand(len(batch), generator=generator))
        noise = torch.randn(batch.shape, generator=generator)
        loss = flow.loss(predict, batch, y, t, noise).mean()
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; a lower lr than {config['lr']:g}.")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return network, flow


@torch.no_grad()
def evaluate(network: DiT, flow: Flow, x: Tensor, count: int, seed: int) -> tuple[float, float]:
    """Mean loss over times spread evenly by the flow's own law, with noise of their own; and of those past 1/8."""
    t = flow.times((torch.arange(count) + 0.5) / count)
    noise = torch.randn(count, *x.shape[1:], generator=draws("overfit", seed, "evaluation"))
    losses = []
    for times, normals in zip(t.split(32), noise.split(32)):
        y = torch.zeros(len(times), dtype=torch.int64)
        losses.append(flow.loss(network, x.expand_as(normals), y, times, normals))
    found = torch.cat(losses).double()
    return found.mean().item(), found[t > EARLY].mean().item()


@torch.no_grad()
def sample(network: DiT, flow: Flow, x: Tensor, config: Config, seed: int) -> Tensor:
    """Samples [S,n,h,w] by Euler, all model calls counted, ending at t = 0."""
    start = torch.randn(config["samples"], *x.shape[1:], generator=draws("overfit", seed, "samples"))
    times = time_grid(config["sampling_steps"], flow.shift, "calls")
    *_, samples = euler(network, start, torch.zeros(len(start), dtype=torch.int64), times)
    return samples


def relative_error(samples: Tensor, x: Tensor) -> float:
    """E |sample - x|^2 / |x|^2."""
    return ((samples - x).square().mean() / x.square().mean()).item()
