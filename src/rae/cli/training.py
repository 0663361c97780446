"""train-decoder, train-dit, cache."""

from pathlib import Path

import click

from rae.cli.options import recipe_options


@click.command("train-decoder")
@recipe_options
def train_decoder(recipe: Path, overrides: tuple[str, ...], out: Path) -> None:
    """Stage 1: train a decoder for a frozen encoder.

    RECIPE is a YAML file; KEY=VALUE changes one of its keys, as in run.batch=64. The same command again goes on with
    an interrupted run; on a CPU it ends in the same bits.
    """
    from rae.config import load_recipe
    from rae.training.decoder import DecoderRecipe, train_decoder

    train_decoder(load_recipe(DecoderRecipe, recipe, overrides), out)


@click.command("train-dit")
@recipe_options
def train_dit(recipe: Path, overrides: tuple[str, ...], out: Path) -> None:
    """Stage 2: train a diffusion transformer on latents.

    RECIPE is a YAML file; KEY=VALUE changes one of its keys, as in network.size=S. The same command again goes on with
    an interrupted run; on a CPU it ends in the same bits.
    """
    from rae.config import load_recipe
    from rae.training.dit import train_dit
    from rae.training.dit_recipe import DiTRecipe

    train_dit(load_recipe(DiTRecipe, recipe, overrides), out)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--dtype", default="fp16", show_default=True, type=click.Choice(["fp32", "fp16", "bf16", "int8"]))
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--verify", is_flag=True, help="Compare the SHA-256 of shards that are there; write damaged ones anew.")
def cache(recipe: Path, overrides: tuple[str, ...], **settings) -> None:
    """Write the latents of a recipe's training images.

    `rae train-dit RECIPE latents=FOLDER` then reads them. RECIPE is one of stage 2; its `rae` and `data` say what is
    encoded, mirrored as well where `data.flip`. The same command again goes on where it was interrupted. `torchrun
    --nproc_per_node 2 -m rae.cli -- cache ...` shares the images between two processes.
    """
    from rae.commands.cache import write_cache
    from rae.config import load_recipe
    from rae.training.dit_recipe import DiTRecipe

    described = load_recipe(DiTRecipe, recipe, overrides)
    write_cache(described.rae, described.data, **settings)
