"""The `rae` command: each subcommand parses, imports what it needs, calls one function and prints.

Nothing heavy is imported here, so that `rae --help` is quick.
"""

import os
import sys

import click

from rae.cli import about, judging, models, official, training
from rae.cli.errors import Rae, leave


@click.group(cls=Rae, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rae", message="rae %(version)s")
def rae() -> None:
    """Representation autoencoders and the diffusion transformers in their latent space (arXiv 2510.11690)."""


for _command in (  # in the order of `rae --help`
    about.demo,
    about.encoders,
    about.doctor,
    training.train_decoder,
    training.train_dit,
    training.cache,
    models.stats,
    models.reconstruct,
    models.sample,
    judging.reference,
    judging.evaluate,
    judging.probe,
    judging.report,
    about.flops,
    about.experiment,
    official.convert,
    official.verify,
):
    rae.add_command(_command)


def main() -> None:
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        os.environ.setdefault("COLUMNS", "160")  # in a file or a pipe tables need not break at 80
    try:
        rae(prog_name="rae")
    except SystemExit as end:
        leave(end.code)
        raise
