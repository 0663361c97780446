"""convert, verify: the authors' files."""

from pathlib import Path

import click

from rae.cli.options import Size


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--weights", default="ema", show_default=True, type=click.Choice(["ema", "model"]))
@click.option("--encoder", help="Decoder: the encoder it was trained with (name, hub id or folder).")
@click.option("--image-size", type=Size(), help="Decoder: of the images that are encoded: 256 or 512 if published.")
@click.option("--statistics", help="Decoder: its stat.pt, a file of `rae stats`, or none.")
@click.option("--heads", type=click.IntRange(1), help="Decoder: attention heads, if its size is not a published one.")
@click.option("--shift", type=click.FloatRange(1), help="Stage 2: sqrt(C h w / 4096); 6.928 for DINOv2-B at 256.")
@click.option("--time-law", type=click.Choice(["uniform", "logit-normal"]), help="Stage 2: of the training times.")
@click.option("--autoencoder", help="Stage 2: the converted autoencoder whose latents it generates.")
@click.option("--class-names", help="Stage 2: a file of its classes' names, one a line, or .json.")
@click.option("--head-depth", type=click.IntRange(1), help="Stage 2: blocks of the head, if the widths do not tell.")
def convert(file: Path, out: Path, **settings) -> None:
    """Turn a FILE of the authors (.pt) into a folder of ours.

    FILE is a decoder, a whole autoencoder or a stage-2 model; its keys tell which. Only tensors are read from it.
    """
    from rae.interop.convert import convert

    convert(file, out, **settings)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.pass_context
def verify(context: click.Context, folder: Path) -> None:
    """Run the reference cases in FOLDER and print their errors.

    Exit status: 0 all passed, 1 one broke or is past its tolerance, 2 there is nothing to verify.
    """
    from rae.interop.verify import print_report, verify

    report = verify(folder)
    print_report(report)
    context.exit(report.exit_status)
