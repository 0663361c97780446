"""`rae stats`: exact statistics of an encoder's latents over a set of images."""

from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from rae.autoencoder.encoders import load_encoder
from rae.autoencoder.latents import tokens_to_map
from rae.data.images import DataConfig, open_images
from rae.training.latents import latent_statistics


def write_statistics(
    encoder: str,
    data: DataConfig,
    image_size: tuple[int, int],
    input_size: tuple[int, int] | None,
    out: Path,
    batch: int,
) -> None:
    """`rae stats`: exact mean and variance of an encoder's latents over centre crops, as `LatentStats.save` writes."""
    images = open_images(data.source)
    network = load_encoder(encoder, image_size=image_size, input_size=input_size).to(PartialState().device)
    shape = (network.width, *network.grid)
    stats = latent_statistics(
        lambda x: tokens_to_map(network(x), network.grid), shape, images, data, image_size, batch=batch
    )
    if not PartialState().is_main_process:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    stats.save(out)
    table = Table("images", "latents (C, h, w)", "mean", "mean variance", "written")
    mean, var = f"{stats.mean.mean():.4f}", f"{stats.var.mean():.4f}"
    table.add_row(f"{stats.count:,}", str(shape), mean, var, str(out))
    Console().print(table)
