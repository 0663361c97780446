"""Arguments and options that several commands share, each a decorator, and what they come to."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource


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


def given(context: click.Context, names: Collection[str]) -> list[str]:
    """Which of the options of these names stand on the command line, as they are written there."""
    found = (option for option in context.command.params if option.name in names)
    here = ParameterSource.COMMANDLINE
    return [option.opts[0] for option in found if context.get_parameter_source(option.name) is here]


def recipe_options(command):
    """RECIPE [KEY=VALUE]... --out FOLDER."""
    out = click.option(
        "--out", required=True, type=click.Path(path_type=Path), help="Run folder; an interrupted run goes on there."
    )
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    return click.argument("recipe", type=click.Path(path_type=Path))(overrides(out(command)))


def images_options(command):
    """How a set of images is read."""
    for option in (
        click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Images at a time."),
        click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes that decode."),
        click.option("--enlarge", is_flag=True, help="Allow images smaller than the model's (bicubic)."),
        click.option("--image", metavar="COLUMN", help="Which column of a table holds the images.  [default: the one]"),
    ):
        command = option(command)
    return command


def image_data(source: str, image: str | None, workers: int, enlarge: bool, skip_broken: bool = False):
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


def sampling_options(command):
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
SAMPLING += ("autoguidance", "interval", "precision")  # of `sampling_options`, without --num


def check_sampling(interval: tuple[float, float] | None, **settings: Any) -> dict[str, Any]:
    """What `sample_to_folder` is told by `sampling_options`."""
    if settings["cfg"] is not None and settings["autoguidance"] is not None:
        raise click.UsageError("--cfg and --autoguidance exclude each other.")
    if interval and settings["cfg"] is None and settings["autoguidance"] is None:
        raise click.UsageError("--interval is of --cfg or --autoguidance; without them it has no effect.")
    if settings["per_class"] and settings["num"]:
        raise click.UsageError("--num and --per-class exclude each other.")
    if settings["per_class"] and settings["random_labels"]:
        raise click.UsageError("--per-class and --random-labels exclude each other; with --num, classes are drawn.")
    return settings | {"interval": interval or (0.0, 1.0)}


def judging_options(command):
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
        click.option(
            "--label",
            metavar="COLUMN",
            help="What holds the classes; '' leaves them alone.  [default: where there is one]",
        ),
        click.option("--skip-broken", is_flag=True, help="Name the images that cannot be read, and leave them out."),
    )
    for option in reversed(options):
        command = option(command)
    return images_options(command)
