"""`rae demo`: real images in, new images out, on a CPU in minutes; ends with one page, report.html.

    encoder -> decoder (stage 1) -> reconstructions, latents -> diffusion transformer (stage 2) -> samples -> page

Everything goes through the functions that a user calls: `train_decoder`, `train_dit`, `generate`.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rae import __version__
from rae.autoencoder.encoders import load_encoder
from rae.config import Config, ConfigError, read_json
from rae.demo import studies
from rae.demo.measure import Findings, measure_decoder, measure_latents, measure_samples
from rae.demo.page import render
from rae.demo.parts import Parts, total
from rae.demo.studies import Study
from rae.folders import aside
from rae.training.decoder import train_decoder
from rae.training.dit import train_dit

PACKAGES = {"matplotlib": "matplotlib", "skimage": "scikit-image", "sklearn": "scikit-learn"}


class Asked(Config):
    """demo.json: what a demo's folder was begun with."""

    version: str
    quick: bool
    photos: str | None
    images: str | None  # identity of the photos


def run_demo(out: Path, photos: Path | None = None, quick: bool = False) -> Path:
    """Train, generate, measure and report. Called again with the same arguments, it goes on where it was stopped.

    Args:
        out: folder for everything that is made.
        photos: a folder of images in place of the built-in ones; its sub-folders, if any, are the classes. `out` must
            not be in it.
        quick: a few steps of everything, to see that all of it works; the figures mean nothing.

    Returns:
        The report.

    Raises:
        ConfigError, ImageError: before anything is downloaded, with what to do.
        SourceError: the encoder cannot be had.
        SystemExit: Ctrl-C or SIGTERM during training, after saving.
    """
    if missing := [package for module, package in PACKAGES.items() if find_spec(module) is None]:
        raise ConfigError(f"the demo needs {', '.join(missing)}, not installed here: pip install 'rae[demo]'.")
    photos = photos and photos.resolve()  # ./x and /abs/x are the same
    if photos and out.resolve().is_relative_to(photos):
        raise ConfigError(
            f"--out {out} is inside --photos {photos}, where the demo would take its own pictures for photos; give an "
            "--out beside it."
        )
    images = studies.check_photos(photos) if photos else None
    asked = {"quick": quick, "photos": str(photos) if photos else None, "images": images.identity if images else None}
    _claim(out, Asked(version=__version__, **asked))
    if images:
        chosen = [studies.own_photos(out, images, photos, quick)]
    else:
        chosen = [studies.digits(out, quick), studies.photographs(out, quick)]

    console = Console(stderr=True)
    parts = Parts(out / "parts", console)
    parts.run("encoder", f"Encoder {studies.ENCODER}", _fetch_encoder)
    found = [_carry_out(study, parts) for study in chosen]

    command = ["rae", "demo", "--out", str(out), *(["--photos", str(photos)] if photos else []), *["--quick"] * quick]
    path = out / "report.html"
    path.write_text(render(command, quick, list(zip(chosen, found)), parts.done), encoding="utf-8")
    _conclude(console, path, found, parts)
    return path


def _claim(out: Path, asked: Asked) -> None:
    """Note what the folder is for; refuse one that is for something else."""
    path = out / "demo.json"
    if path.exists():
        begun = read_json(Asked, path)
        if begun != asked:
            changed = [f"{name} {was!r} -> {now!r}" for (name, was), (_, now) in zip(begun, asked) if was != now]
            raise ConfigError(
                f"{out} was begun with other settings ({'; '.join(changed)}): give another --out, or remove it."
            )
    elif out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        raise ConfigError(f"{out} exists and is not a demo's folder; give another --out.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        with aside(path) as hidden:
            hidden.write_text(asked.model_dump_json(indent=1))


def _fetch_encoder() -> None:
    load_encoder(studies.ENCODER, image_size=112)


def _carry_out(study: Study, parts: Parts) -> Findings:
    """All parts of one study, in order: pictures and figures of all of them."""
    name = study.folder.name
    steps = [("images", "small images", study.prepare)] if study.prepare else []
    steps += [
        ("decoder", "stage 1, the decoder", partial(_train, train_decoder, study.decoder, study.folder / "decoder")),
        ("reconstructions", "reconstructions", partial(measure_decoder, study)),
    ]
    if study.whole:
        steps.append(("latents", "latents in colours", partial(measure_latents, study)))
    if study.dit:
        steps += [
            ("dit", "stage 2, the DiT-DH", partial(_train, train_dit, study.dit, study.folder / "dit")),
            ("samples", "samples and measures", partial(measure_samples, study)),
        ]
    found = [parts.run(f"{name}-{part}", f"{name}: {title}", work) for part, title, work in steps]
    return Findings(
        {key: picture for f in found for key, picture in f.pictures.items()}, [x for f in found for x in f.figures]
    )


def _train(train: Callable[[Config, Path], Path], recipe: Config, folder: Path) -> None:
    train(recipe, folder)


def _conclude(console: Console, path: Path, found: list[Findings], parts: Parts) -> None:
    table = Table("figure", "value", title="What the demo found")
    for findings in found:
        for figure in findings.figures:
            table.add_row(figure.name, figure.value)
        table.add_section()
    _, time, memory = total(parts.done).cost
    table.add_row("time and peak memory", f"{time}, {memory}")
    console.print(table)
    console.print(f"Report: {path.resolve()}", highlight=False, markup=False, soft_wrap=True)
