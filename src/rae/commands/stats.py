"""`rae stats`: exact statistics of an encoder's latents over a set of images."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from rae.autoencoder.encoders import Encoder, load_encoder
from rae.autoencoder.latents import tokens_to_map
from rae.autoencoder.rae import RAE
from rae.commands.pictures import OutputError, check_file
from rae.config import ConfigError
from rae.data.images import DataConfig, open_images
from rae.folders import saved_kind
from rae.processes import accelerator
from rae.training.latents import latent_statistics


def write_statistics(
    encoder: str,
    data: DataConfig,
    image_size: tuple[int, int] | None,
    input_size: tuple[int, int] | None,
    out: Path,
    batch: int,
) -> None:
    """`rae stats`: exact mean and variance of an encoder's latents over centre crops, as `LatentStats.save` writes.

    Args:
        encoder: a name, hub id or folder; or an autoencoder, whose encoder and sizes are taken.
        data: which images, and how they are read.
        image_size, input_size: of the encoder; None for those of the autoencoder.
        out: a .safetensors file.
        batch: images at a time.

    Raises:
        ConfigError: sizes that are missing, or given although the autoencoder has its own.
        OutputError: `out` cannot be written.
    """
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: statistics are a safetensors file; call it {out.with_suffix('.safetensors').name}.")
    check_file(out)
    processes, images = accelerator(), open_images(data.source, data.image, data.label)
    network = _open(encoder, image_size, input_size).to(processes.device)
    shape, size, broken = (network.width, *network.grid), network.config.image_size, []

    def encode(x: Tensor) -> Tensor:
        return tokens_to_map(network(x), network.grid)

    stats = latent_statistics(
        encode, shape, images, data, size, batch=batch, accelerator=processes, left_out=broken.append
    )
    for name in broken:  # each process names its own
        Console(stderr=True).print(f"[yellow]left out: {escape(name)} cannot be read", highlight=False, soft_wrap=True)
    if not processes.is_main_process:
        return
    about = {"encoder": network.config.model_dump_json(), "encoder_checksum": network.checksum()}
    stats.save(out, about | {"images": data.source, "images_identity": images.identity})
    table = Table("images", "latents (C, h, w)", "mean", "mean variance", "written")
    mean, var = f"{stats.mean.mean():.4f}", f"{stats.var.mean():.4f}"
    table.add_row(f"{stats.count:,}", str(shape), mean, var, escape(str(out)))
    Console().print(table)


def _open(name: str, image_size: tuple[int, int] | None, input_size: tuple[int, int] | None) -> Encoder:
    if saved_kind(name):  # an encoder's folder, of transformers, tells no kind
        if image_size or input_size:
            raise ConfigError(f"{name} is a model, which has its sizes; leave --image-size and --input-size out.")
        return RAE.from_pretrained(name).encoder
    if image_size is None:
        raise ConfigError(f"the encoder {name} takes images of many sizes; say which with --image-size.")
    return load_encoder(name, image_size=image_size, input_size=input_size)
