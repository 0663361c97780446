"""`rae stats`: exact statistics of an encoder's latents over a set of images."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from rae.autoencoder.encoders import load_encoder
from rae.autoencoder.latents import tokens_to_map
from rae.commands.pictures import check_file
from rae.data.images import DataConfig, open_images
from rae.processes import accelerator
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
    check_file(out)
    processes, images = accelerator(), open_images(data.source, data.image, data.label)
    network = load_encoder(encoder, image_size=image_size, input_size=input_size).to(processes.device)
    shape = (network.width, *network.grid)

    def encode(x: Tensor) -> Tensor:
        return tokens_to_map(network(x), network.grid)

    stats = latent_statistics(encode, shape, images, data, image_size, batch=batch, accelerator=processes)
    if not processes.is_main_process:
        return
    stats.save(out)
    table = Table("images", "latents (C, h, w)", "mean", "mean variance", "written")
    mean, var = f"{stats.mean.mean():.4f}", f"{stats.var.mean():.4f}"
    table.add_row(f"{stats.count:,}", str(shape), mean, var, escape(str(out)))
    Console().print(table)
