"""stats, reconstruct, sample."""

from pathlib import Path

import click

from rae.cli.options import ROUNDING, Size, check_sampling, image_data, images_options, sampling_options


@click.command()
@click.argument("encoder")
@click.argument("images")
@click.option("--image-size", type=Size(), help="Of the images an encoder by name takes, such as 256 or 192x256.")
@click.option("--input-size", type=Size(), help="That the network sees.  [default: 14/16 of it for patches of 14]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write (.safetensors).")
@click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out.")
@images_options
def stats(encoder: str, images: str, image_size, input_size, out: Path, batch: int, **reading) -> None:
    """Measure mean and variance of an ENCODER's latents, exactly.

    ENCODER is a name (`rae encoders`), a hub id or a folder; or a run of train-decoder or another saved autoencoder,
    for its encoder. IMAGES is a folder of images, of .parquet, .arrow or .tar files, one file, hf:OWNER/NAME, `digits`
    or `photographs`.
    """
    from rae.commands.stats import write_statistics

    write_statistics(encoder, image_data(images, **reading), image_size, input_size, out, batch=batch)


@click.command()
@click.argument("model")
@click.argument("images")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--num", type=click.IntRange(1), help="The first so many images only.")
@click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out.")
@click.option("--noise", default=0.0, type=click.FloatRange(0), help="Add this times normal noise to the tokens first.")
@images_options
@ROUNDING
def reconstruct(
    model: str, images: str, out: Path, num: int | None, noise: float, batch: int, rounding, **reading
) -> None:
    """Show IMAGES beside what an autoencoder makes of them.

    With PSNR and SSIM. MODEL is a run of train-decoder, a folder of `rae convert` or a hub id. IMAGES is a folder of
    images, of .parquet, .arrow or .tar files, one file, hf:OWNER/NAME, `digits` or `photographs`.

    The same command again goes on where it was interrupted. With --noise, images show how well a decoder bears latents
    that are not quite right, as a diffusion model's are.
    """
    from rae.commands.reconstruct import write_reconstructions

    data = image_data(images, **reading)
    write_reconstructions(model, data, out, num=num, noise=noise, batch=batch, rounding=rounding)


@click.command()
@click.argument("model")
@sampling_options
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Images at a time.")
@ROUNDING
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for PNGs and samples.json.")
@click.option("--latents", is_flag=True, help="Also keep what was decoded: OUT/latents/000000.safetensors, ...")
@click.option(
    "--npz",
    type=click.Path(path_type=Path),
    help="Also one file for the ADM evaluator (arr_0 NHWC, arr_1 classes).",
)
@click.option("--no-pngs", is_flag=True, help="Remove the PNGs once they are all in --npz.")
def sample(model: str, **settings) -> None:
    """Make new images.

    MODEL is a run of train-dit, one of its checkpoints, or a folder of `rae convert`. The same command again goes on
    where it was interrupted, and a larger --num adds images. `torchrun --nproc_per_node 2 -m rae.cli -- sample ...`
    shares them between two processes: with the same --batch to the same bits (docs/sampling.md).
    """
    settings = check_sampling(**settings)
    if settings["no_pngs"] and not settings["npz"]:
        raise click.UsageError("--no-pngs needs --npz, which is to hold the images in their place.")
    from rae.commands.sample import sample_to_folder

    sample_to_folder(model, **settings)
