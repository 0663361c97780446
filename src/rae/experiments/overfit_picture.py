"""The picture of `overfit`: what networks narrower and wider than their tokens make of photographs, decoded.

    images --crops--> training images --world.decoder--> decoder
    photograph --learn--> network --sample--> tokens --decoder--> picture

The networks are those of the rows, trained again by their seeds; the decoder is the picture's alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae.autoencoder.latents import map_to_tokens
from rae.autoencoder.rae import RAE
from rae.data.crops import center_crop
from rae.data.images import open_images, to_bytes, to_unit
from rae.evaluation.reconstruction import psnr
from rae.experiments import world
from rae.experiments.drawing import sheet
from rae.experiments.frame import Config, Place, Results, draws
from rae.experiments.one_image import image, image_latents, learn, relative_error, sample
from rae.folders import aside

PROTOCOL: Config = {
    "seeds": [0, 1],  # each a photograph, and a row of the picture
    "images": 600,  # crops that the decoder is trained on
    "held_out": 16,
    "least": 0.7,  # side of a crop, of the image's shorter one
    "decoder": [192, 3, 4, 768],  # width, depth, heads, MLP
    "sigma_law": "uniform",
    "tau": 0.2,
    "decoder_steps": 1000,
    "decoder_batch": 32,
    "decoder_lr": 3e-3,  # Muon's, as a cosine to a hundredth
}
QUICK: Config = {"seeds": [0], "images": 8, "held_out": 4}
QUICK |= {"decoder": [16, 1, 2, 32], "decoder_steps": 2, "decoder_batch": 4}


def draw(
    own: Config, configs: dict[str, Config], results: Results, place: Place, say: Callable[[str], object]
) -> tuple[np.ndarray, str]:
    """Photograph, what its own tokens decode to, a sample of each of `settings`; the caption says how it was made."""
    first = configs[own["settings"][0]]
    autoencoder = decoder(own, first, place)
    rows, texts, apart = [], [], 0.0
    for seed in own["seeds"]:
        pixels, x = image(first, seed, place.source), image_latents(first, seed, place.source)
        exact = _decode(autoencoder, x)
        row, under = [pixels[None], exact], ["", f"{psnr(to_unit(exact), to_unit(pixels[None])).item():.1f} dB"]
        for setting in own["settings"]:
            samples = samples_of(x, configs[setting], setting, seed, place)
            error, was = relative_error(samples, x), results.values(setting, "sample_error")[seed]
            apart = max(apart, abs(error - was))
            say(f"picture of {setting}, photograph {seed}: error {error:.4f}, that of the row {was:.4f}")
            row.append(_decode(autoencoder, samples[:1]))
            under.append(f"error {error:.2f}")
        rows.append(torch.cat(row))
        texts.append(under)
    above = ["photograph", "its own tokens,\ndecoded"]
    for setting in own["settings"]:
        above.append(setting.replace(": ", "\n") + f"\n(n − d)/n = {results[setting, 'bound'].mean:.2f}")
    agreement = "equal those of the rows" if apart == 0 else f"are within {apart:.2g} of those of the rows"
    return sheet(rows, above, texts), (
        f"Each row: a photograph at {first['image_size']} pixels a side, what its own tokens decode to, and a sample "
        "of each network that learnt it, decoded alike. Under a sample the error |sample − x|² / |x|² over "
        f"{first['samples']} samples, of which it is the first. The networks were trained again by the rows' seeds; "
        f"their errors {agreement}. The decoder was trained for {own['decoder_steps']:,} steps on {own['images']:,} "
        f"crops of the study's images, these photographs among them, with little noise (tau = {own['tau']:g}), so "
        "that it shows the noise of samples."
    )


def samples_of(x: Tensor, config: Config, setting: str, seed: int, place: Place) -> Tensor:
    """The samples of the row of (setting, seed), kept in `place.work`: its network is trained again."""
    said = {**config, "setting": setting}
    file = world.folder_of("overfit", said, tuple(said), place, seed=seed).with_suffix(".safetensors")
    if not file.exists():
        samples = sample(*learn(x, config, setting, seed), x, config, seed)
        place.work.mkdir(parents=True, exist_ok=True)
        with aside(file) as hidden:
            save_file({"samples": samples}, hidden)
    return load_file(file)["samples"]


# --- decoder ---------------------------------------------------------------------------------------------------------


def decoder(own: Config, config: Config, place: Place) -> RAE:
    """The encoder of a setting with a decoder for crops of its images: the small world's, kept in `place.work`."""
    side, data = config["image_size"], f"squares of {own['least']:g} to 1 of the shorter side, of {config['data']}"
    described = {**world.WORLD, **own, "encoder": config["encoder"], "image_size": side, "input_size": side}
    described["data"] = data
    file = world.folder_of("crops", described, world.DATA, place).with_suffix(".npz")
    if not file.exists():
        place.work.mkdir(parents=True, exist_ok=True)
        with aside(file) as hidden, hidden.open("wb") as stream:
            np.savez(stream, *crops(place.source, own["images"] + own["held_out"], side, own["least"]))
    return world.decoder(described, 0, Place(str(file), place.work))


def crops(source: str, count: int, side: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Images in turn, each a square of `least` to 1 of its shorter side, anywhere in it: uint8 [N,side,side,3], [N]."""
    images, generator, found = open_images(source), draws("overfit", "crops"), []
    for k in range(count):
        pixels = images.read(k % len(images))
        share, down, right = torch.rand(3, generator=generator).tolist()
        length = round(min(pixels.shape[:2]) * (least + (1 - least) * share))
        top, left = (int(u * (size - length + 1)) for u, size in zip((down, right), pixels.shape))
        found.append(center_crop(pixels[top : top + length, left : left + length], (side, side)))
    return np.stack(found), np.arange(count) % len(images)


@torch.no_grad()
def _decode(autoencoder: RAE, z: Tensor) -> Tensor:
    """Tokens as a map [N,n,h,w] -> uint8 [N,3,H,W]; both on the CPU."""
    device = next(autoencoder.decoder.parameters()).device
    return to_bytes(autoencoder.decode_tokens(map_to_tokens(z).to(device))).cpu()
