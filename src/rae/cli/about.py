"""demo, encoders, doctor, flops, experiment: what there is, what it can do, what it costs, whether it is true."""

from pathlib import Path

import click

from rae.cli.options import given


@click.command()
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


@click.command()
def encoders() -> None:
    """List the encoders known by name, and which are here."""
    from rae.commands.doctor import print_encoders

    print_encoders()


@click.command()
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


@click.command()
@click.argument("subjects", nargs=-1)
@click.option("--device", metavar="NAME", help="Estimate hours on h100, a100, 4090, ... or here, which is measured.")
@click.option("--devices", default=1, show_default=True, type=click.IntRange(1), help="So many share a step.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), help="Of the data sheet's peak.  [default: 0.35]")
@click.option("--price", type=click.FloatRange(0), help="Of one device for an hour.")
@click.option("--images", type=click.IntRange(1), help="Training images.  [default: as they are; else ImageNet's]")
@click.option("--classes", type=click.IntRange(0), help="Of the training images.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list, in place of tables.")
@click.option("--published", is_flag=True, help="The paper's GFLOPs beside ours, and by which convention.")
@click.pass_context
def flops(context: click.Context, subjects: tuple[str, ...], published: bool, **settings) -> None:
    """Count what networks cost, and what training them would.

    In operations, parameters, memory, hours and money. SUBJECTS are recipes, runs or saved models; KEY=VALUE changes
    all of the recipes. Nothing is downloaded or trained.
    """
    from rae.commands.cost import print_cost, print_published

    if published == bool(subjects) or (published and given(context, settings)):
        raise click.UsageError("give a recipe, a run or a saved model, or --published alone.")
    if published:
        print_published()
    else:
        print_cost(subjects, **settings)


@click.command()
@click.argument("name")
@click.option("--quick", is_flag=True, help="Few steps of everything: shows that it runs; never into results/.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many, from 0.  [default: the study's own, mostly 3]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of rows and page. [default: results]")
@click.option("--data", "source", metavar="SOURCE", help="Images in place of the study's own.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for decoders, latents and models, which studies share. [default: experiments in the cache]",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the protocol; such rows need an --out of their own.",
)
def experiment(
    name: str,
    quick: bool,
    seeds: int | None,
    out: Path | None,
    source: str | None,
    work: Path | None,
    changes: tuple[str, ...],
) -> None:
    """Ask the paper a question in small: run the study NAME.

    `rae experiment list` says what there is. A study is declared before it runs: its question, protocol and how its
    rows decide are printed first. The same command again goes on where it was stopped; results/NAME.jsonl keeps a line
    for each setting and seed, results/NAME.md, .svg and .png say what they say.
    """
    from rae.experiments.command import list_studies, run_experiment

    if name == "list":
        list_studies()
    else:
        run_experiment(name, out, seeds=seeds, quick=quick, source=source, work=work, changes=changes)
