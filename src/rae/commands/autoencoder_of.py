"""Which autoencoder a run of `rae train-dit` was trained with, wherever both lie now."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from rae.autoencoder.baselines import Autoencoder, is_baseline, open_autoencoder
from rae.commands.doctor import in_hub_cache
from rae.config import ConfigError, load_recipe
from rae.diffusion.model import DiffusionModel
from rae.folders import run_of
from rae.sources import SourceError
from rae.training.dit_recipe import DiTRecipe


def autoencoder_of(model: DiffusionModel, run: str | Path, say: Callable[[str], object]) -> tuple[str, Autoencoder]:
    """The autoencoder that the recipe of a run names, and where it was found.

    A relative path is looked for in the current folder, then from each folder above the run, upwards: /data/x/runs/dit
    that was trained with runs/decoder finds /data/x/runs/decoder. One of another latent space is passed over.

    Args:
        model: the run's, already loaded.
        run: a run folder; one of its checkpoints, or the model in it; its `best` or `latest`.
        say: is told what was found and not taken, and why.

    Raises:
        ConfigError: not part of a run, so nothing says which; or none is here, nor was it downloaded before.
        ValueError, SourceError: of what was found, the first reason why it was not taken.
    """
    if not (folder := _run_of(run)):
        raise ConfigError(f"{run} is not the folder of a run, which would name its autoencoder; give --autoencoder.")
    name = _trained_with(folder)
    if is_baseline(name):
        return name, open_autoencoder(name)
    errors = []
    for place in places_of(name, folder):
        try:
            rae = open_autoencoder(place)
            model.check_autoencoder(rae)
        except (ValueError, SourceError) as error:
            say(f"{place} is not taken: {error}")
            errors.append(error)
        else:
            return str(place), rae
    if errors:
        raise errors[0]
    if is_downloaded(name):
        return name, open_autoencoder(name)
    raise ConfigError(
        f"{run} was trained with autoencoder {name!r}, which is not here, nor in a folder above the run; start from "
        "the folder it was trained in, or give --autoencoder."
    )


def other_autoencoder(name: str, model: DiffusionModel, run: str | Path) -> Autoencoder:
    """The autoencoder `name`, which is to take the place of the one that the recipe of a run names.

    Args:
        name: of `open_autoencoder`.
        model, run: as above; nothing is asked of a model that is not part of a run.

    Raises:
        ValueError, SourceError: as `open_autoencoder`.
        ConfigError: it has another latent space than the model; names the one that was trained with.
    """
    rae = open_autoencoder(name)
    try:
        model.check_autoencoder(rae)
    except ValueError as error:
        trained = ""
        with contextlib.suppress(ConfigError):  # of a recipe that cannot be read nothing is said; the model still can
            if folder := _run_of(run):
                trained = f" {run} was trained with {_trained_with(folder)}, which is taken without --autoencoder."
        raise ConfigError(f"--autoencoder {name}: {error}{trained}") from error
    return rae


def _run_of(path: str | Path) -> Path | None:
    return run_of(Path(os.path.abspath(Path(path).expanduser())))


def _trained_with(run: Path) -> str:
    return load_recipe(DiTRecipe, run / "recipe.yaml").rae


def places_of(name: str, run: Path) -> list[Path]:
    """The folders called `name` that are there: from the current folder, then from each folder above the run, upwards.

    One that several ways lead to is told once.
    """
    found = {}
    for place in (Path(name).expanduser(), *(above / name for above in Path(os.path.abspath(run)).parents)):
        if place.is_dir():
            found.setdefault(os.path.realpath(place), place)
    return list(found.values())


def is_downloaded(name: str) -> bool:
    """Whether `name` is a hub id of which this machine has a copy; a relative folder looks the same."""
    return in_hub_cache(name.removeprefix("hub:"), "config.json") is not None
