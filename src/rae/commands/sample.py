"""`rae sample`: new images as PNGs and one .npz for the ADM evaluator, with the protocol that they were made by.

labels, seeds --generate--> images [B,3,H,W] --to_bytes--> 000000.png, 000001.png, ... --pack--> .npz
"""

import dataclasses
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rae.autoencoder.rae import RAE
from rae.commands.pictures import (
    OutputError,
    Rounding,
    aside,
    check_file,
    checksum,
    claim,
    is_there,
    picture_name,
    read_picture,
    save_picture,
)
from rae.config import ConfigError, load_recipe
from rae.data.images import to_bytes
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.model import DiffusionModel
from rae.diffusion.sampling import generate
from rae.processes import process_state
from rae.training.display import progress
from rae.training.dit import DiTRecipe
from rae.training.run import DTYPES


def sample_to_folder(
    model: str,
    *,
    out: Path,
    autoencoder: str | None,
    labels: str | None,
    num: int | None,
    per_class: int | None,
    seed: int,
    steps: int,
    grid: str,
    sampler: str,
    cfg: float | None,
    autoguidance: tuple[str, float] | None,
    interval: tuple[float, float],
    precision: str,
    batch: int,
    rounding: Rounding,
    npz: Path | None,
) -> None:
    """`rae sample`: load the models, sample what is not in `out` yet, and say what is there.

    Args:
        autoencoder: folder or hub id; None = the one that the run folder `model` was trained with.
        labels, num, per_class: see `choose_labels`.
        interval: of shifted times, for either guidance.
        The others are those of `generate` and `write_samples`.
    """
    state = process_state()
    if npz:
        check_file(npz)
    console, device = Console(stderr=True, quiet=not state.is_main_process), state.device
    diffusion = DiffusionModel.from_pretrained(model, dtype=DTYPES[precision]).to(device)
    chosen = choose_labels(diffusion, labels, num, per_class)
    guidance = CFG(cfg, *interval) if cfg is not None else None
    if autoguidance:
        weak = DiffusionModel.from_pretrained(autoguidance[0], dtype=DTYPES[precision]).to(device)
        guidance = AutoGuidance(weak, autoguidance[1], *interval)
    autoencoder = autoencoder or autoencoder_of(model)
    console.print(f"autoencoder: {autoencoder}", highlight=False, markup=False, soft_wrap=True)
    rae = RAE.from_pretrained(autoencoder).to(device)
    if npz:
        _check_room(npz, 3 * rae.output_size[0] * rae.output_size[1] * len(chosen))
    settings = {"steps": steps, "grid": grid, "sampler": sampler, "guidance": guidance}
    write_samples(diffusion, rae, chosen, out, seed=seed, batch=batch, rounding=rounding, **settings)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    if npz:
        pack([out / picture_name(i) for i in range(len(chosen))], npz)
    table, (height, width) = Table("written", "what"), rae.output_size
    table.add_row(escape(f"{out}/{picture_name(0)} ..."), f"{len(chosen):,} images of {height} x {width} pixels")
    table.add_row(escape(f"{out}/samples.json"), "how they were made")
    if npz:
        table.add_row(escape(str(npz)), f"the same, {npz.stat().st_size / 2**20:,.1f} MiB")
    console.print(table)


def autoencoder_of(run: str | Path) -> str:
    """The autoencoder that a run of `rae train-dit` was trained with.

    Raises:
        ConfigError: not a run folder, so nothing says which; or neither a folder seen from here, nor downloaded before.
    """
    recipe = Path(run) / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{run} is not the folder of a run, which would name its autoencoder; give --autoencoder.")
    name = load_recipe(DiTRecipe, recipe).rae
    if not Path(name).expanduser().is_dir() and not _downloaded(name):
        raise ConfigError(
            f"{run} was trained with autoencoder {name!r}, which is not here; start from the folder it was trained in, "
            "or give --autoencoder."
        )
    return name


def _downloaded(name: str) -> bool:
    """Whether `name` is a hub id of which this machine has a copy; a relative folder looks the same."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def choose_labels(model: DiffusionModel, labels: str | None, num: int | None, per_class: int | None) -> list[int]:
    """One class index per image; the classes take turns, so any number of images is balanced to within one.

    Args:
        labels: names or indices with commas between; None = all classes. Where a name is a number, names only: an
            unknown one would otherwise be taken for the index of another class.
        num: images in all; None = one for each of `labels`, or 16 without them.
        per_class: images of each class, in place of `num`.

    Raises:
        ValueError: an unknown class, or classes asked of an unconditional model.
    """
    if model.null_label == 0:  # unconditional: no classes, the null label for every image
        if labels or per_class:
            raise ValueError("this model is unconditional: it knows no classes; give --num alone.")
        return [model.null_label] * (num or 16)
    names, classes, default = model.config.class_names or (), list(range(model.null_label)), 16
    if labels:
        indices = not any(name.isdecimal() for name in names)
        asked = [int(text) if indices and text.isdecimal() else text for text in map(str.strip, labels.split(","))]
        classes, default = [model.label_indices([label]).item() for label in asked], len(asked)
    count = per_class * len(classes) if per_class else num or default
    return [classes[i % len(classes)] for i in range(count)]


def write_samples(
    model: DiffusionModel,
    rae: RAE,
    labels: Sequence[int],
    folder: Path,
    *,
    seed: int = 0,
    batch: int = 32,
    rounding: Rounding = "nearest",
    **settings: Any,
) -> None:
    """Image i, of class labels[i] and seed `seed + i`, becomes `folder`/00000i.png; those that exist are left alone.

    Every process of a distributed job takes its share. `samples.json` keeps the protocol: another one is refused, but
    images may be added.

    Args:
        model, rae: as for `generate`.
        labels: one class per image; for an unconditional model its null label.
        folder: made if it does not exist.
        seed: of the first image.
        batch: images at a time; changes nothing but rounding errors.
        rounding: from [0,1] to 8 bits, see `to_bytes`.
        settings: steps, grid, sampler and guidance of `generate`.

    Raises:
        OutputError: the folder holds samples made in another way, or something else, or an empty picture.
        FloatingPointError: a sample is not finite.
        KeyboardInterrupt: with what is there.
    """
    state, seeds, conditional = process_state(), range(seed, seed + len(labels)), model.null_label > 0
    # Arguments that do not fit each other are found here, before anything is written.
    generate(model, rae, labels if conditional else None, seeds, **settings)
    if state.is_main_process:
        protocol = _protocol(model, rae, labels, seed, rounding, settings)
        claim(folder, "samples.json", protocol, grows=("images", "labels"))  # image i needs no other
    state.wait_for_everyone()
    mine = range(state.process_index, len(labels), state.num_processes)
    missing = [i for i in mine if not is_there(folder / picture_name(i))]
    if not missing:
        return
    chosen = [labels[i] for i in missing] if conditional else None
    samples = generate(model, rae, chosen, [seeds[i] for i in missing], batch_size=batch, **settings)
    console = Console(stderr=True, quiet=not state.is_main_process)
    try:
        with progress("samples", len(mine), start=len(mine) - len(missing), console=console) as advance:
            done = len(mine) - len(missing)
            for part in samples:
                if not part.images.isfinite().all():
                    raise FloatingPointError(f"a sample of seeds {part.seeds.tolist()} is not finite; try fp32.")
                pictures = to_bytes(part.images, rounding).permute(0, 2, 3, 1).cpu().numpy()  # -> uint8 [B,H,W,3]
                for picture, number in zip(pictures, part.seeds.tolist()):
                    save_picture(picture, folder / picture_name(number - seed))
                done += len(pictures)
                advance(done, "")
    except KeyboardInterrupt:
        there = len(list(folder.glob("*.png")))
        raise KeyboardInterrupt(
            f"{there:,} of {len(labels):,} images are in {folder}; run the same command again to make the others"
        ) from None


def pack(files: Sequence[Path], npz: Path) -> None:
    """PNGs of one size -> an .npz whose `arr_0` is uint8 [N,H,W,3], one image in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *read_picture(files[0]).shape)}
    with (
        aside(npz) as hidden,
        zipfile.ZipFile(hidden, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            array.write(read_picture(file).tobytes())


def _check_room(file: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(file.parent).free):
        raise OutputError(
            f"{file} will take {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free there; make room, give "
            "another place, or leave --npz out."
        )


def _protocol(model, rae, labels, seed, rounding, settings) -> dict[str, Any]:
    """Everything that decides the pixels, up to rounding errors."""
    guidance = settings["guidance"]
    if guidance:
        fields = {field.name: getattr(guidance, field.name) for field in dataclasses.fields(guidance)}
        weak = {"weak": checksum(fields["weak"].network)} if "weak" in fields else {}
        guidance = {"kind": type(guidance).__name__} | fields | weak
    return {
        "images": len(labels),
        "size": list(rae.output_size),
        "first_seed": seed,
        "rounding": rounding,
        "precision": str(model.dtype).removeprefix("torch."),
        **{key: settings[key] for key in ("sampler", "steps", "grid")},
        "guidance": guidance,
        "model": checksum(model.network),
        "decoder": checksum(rae.decoder),
        "latents": rae.latent_identity,
        "class_names": model.config.class_names and list(model.config.class_names),
        "labels": list(labels),
    }
