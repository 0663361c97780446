"""A folder of samples: made in fixed chunks by any number of processes, with its protocol; packed, seen at a glance.

chunk k = images [k batch, (k + 1) batch) --generate--> images [B,3,H,W] --to_bytes--> 000000.png, 000001.png, ...
                                                        latents [B,C,h,w] -----------> latents/000000.safetensors, ...

The chunks are the same for any number of processes and after any interruption, so every image is computed in the same
company: its bits depend on the size of the chunks and on nothing else.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, reduce
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from rae.autoencoder.baselines import Autoencoder
from rae.commands.pictures import Rounding, checksum, claim, is_there, picture_name, read_picture, save_picture
from rae.data.images import to_bytes
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.model import DiffusionModel
from rae.diffusion.sampling import generate
from rae.folders import aside
from rae.processes import process_state
from rae.training.display import progress

PROTOCOL = "samples.json"
OVERVIEW_ROWS, OVERVIEW_COLUMNS = 8, 8
_LABELS = "arr_1.npy"


def latent_name(index: int) -> str:
    """The file of the latents of image `index`, [C,h,w] float32 by the name `latent`."""
    return f"latents/{index:06d}.safetensors"


def keeps_latents(folder: Path) -> bool:
    """Whether the folder's samples have their latents beside them, which those that are added to it have then too."""
    return _read_protocol(folder).get("latents_kept") is True


def files_of(folder: Path, index: int, keep_latents: bool) -> list[Path]:
    """What there is of image `index` once it is made."""
    return [folder / name(index) for name in (picture_name, latent_name)[: 1 + keep_latents]]


def protocol_of(
    model: DiffusionModel,
    rae: Autoencoder,
    labels: Sequence[int],
    *,
    seed: int,
    rounding: Rounding,
    keep_latents: bool,
    **settings: Any,
) -> dict[str, Any]:
    """Everything that decides the pixels, up to rounding errors, as data; arguments as of `write_samples`."""
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
        "latents_kept": keep_latents,
        "class_names": model.config.class_names and list(model.config.class_names),
        "labels": list(labels),
    }


def write_samples(
    model: DiffusionModel,
    rae: Autoencoder,
    labels: Sequence[int],
    folder: Path,
    protocol: dict[str, Any],
    *,
    seed: int,
    batch: int,
    rounding: Rounding,
    keep_latents: bool,
    random_labels: bool,
    **settings: Any,
) -> dict[str, Any] | None:
    """Image i, of class labels[i] and seed `seed + i`, becomes `folder`/00000i.png; files that exist are left alone.

    Every process of a distributed job takes whole chunks of `batch` images in turn. A chunk of which anything is
    missing is computed again as a whole, and what is missing is written.

    `samples.json` keeps the protocol: another one is refused, but images may be added, and latents. Beside it, in
    `jobs`, stands what every start was: `batch`, `processes`, `device`, `random_labels`; and once it came to its end
    `images` written, `computed` (more where a chunk was in part there), `seconds`, and per image computed `calls` of
    the velocity by the sampler, `passes` through the model's network and `guiding_passes` through that of a guiding
    model.

    Args:
        model, rae: as for `generate`.
        labels: one class per image; for an unconditional model its null label.
        folder: made if it does not exist.
        protocol: of `protocol_of`, for the same arguments.
        seed: of the first image.
        batch: images at a time.
        rounding: from [0,1] to 8 bits, see `to_bytes`.
        keep_latents: also write what was decoded: `latents/00000i.safetensors`.
        random_labels: whether the labels were drawn, which decides errors of figures of the images, and not the images.
        settings: steps, grid, sampler and guidance of `generate`.

    Returns:
        In the main process what stands in `jobs` of this one; None in others, and where nothing was missing.

    Raises:
        OutputError: the folder holds samples made in another way, or something else, or an empty file.
        FloatingPointError: a sample is not finite.
        KeyboardInterrupt: with what is there.
    """
    state, seeds, conditional = process_state(), range(seed, seed + len(labels)), model.null_label > 0
    # Arguments that do not fit each other are found here, before anything is written.
    generate(model, rae, labels if conditional else None, seeds, batch_size=batch, **settings)
    console, before, job, chunks = Console(stderr=True), [], None, []
    if state.is_main_process:
        chunks = _missing_chunks(folder, len(labels), batch, keep_latents)
        if chunks:
            job = {"batch": batch, "processes": state.num_processes, "device": str(model.device)}
            job["random_labels"] = random_labels
        before = _claim(folder, protocol, job, console)
        if chunks and (there := len(labels) - sum(map(len, chunks))):
            console.print(f"{there:,} of {len(labels):,} are there", highlight=False)
        if keep_latents:
            (folder / latent_name(0)).parent.mkdir(exist_ok=True)
    # One process says what is missing: others might see it change, or late. All wait for its word.
    told = [chunks]
    broadcast_object_list(told)
    begun = time.perf_counter()
    # One call for all: only the last chunk can be short, so `generate` cuts where they end.
    wanted = [i for chunk in told[0][state.process_index :: state.num_processes] for i in chunk]
    chosen = [labels[i] for i in wanted] if conditional else None
    written = done = 0
    try:
        with count_passes(model, settings["guidance"]) as passes, progress("samples", len(wanted)) as advance:
            own = [seeds[i] for i in wanted]
            for part in generate(model, rae, chosen, own, batch_size=batch, **settings) if wanted else ():
                if not part.images.isfinite().all():
                    raise FloatingPointError(f"a sample of seeds {part.seeds.tolist()} is not finite; try fp32.")
                pictures = to_bytes(part.images, rounding).permute(0, 2, 3, 1).cpu().numpy()  # -> uint8 [B,H,W,3]
                for picture, latent, number in zip(pictures, part.latents.cpu(), part.seeds.tolist()):
                    written += _write(picture, latent, files_of(folder, number - seed, keep_latents))
                done += len(pictures)
                advance(done, "")
    except KeyboardInterrupt:
        there = len(list(folder.glob("*.png")))
        raise KeyboardInterrupt(
            f"{there:,} of {len(labels):,} images are in {folder}; run the same command again to make the others"
        ) from None
    counts = torch.tensor([written, len(wanted)], device=passes.device)
    counts = reduce(torch.cat([counts, passes]), reduction="sum").tolist()  # over all processes, which end here
    if job is None:
        return None
    written, computed, *passes = counts
    job |= {"images": written, "computed": computed, "seconds": round(time.perf_counter() - begun, 3)}
    job |= dict(zip(("calls", "passes", "guiding_passes"), (count / computed for count in passes)))
    with aside(folder / PROTOCOL) as hidden:
        hidden.write_text(json.dumps(protocol | {"jobs": [*before, job]}, indent=1) + "\n")
    return job


def _missing_chunks(folder: Path, count: int, batch: int, keep_latents: bool) -> list[range]:
    """Those of the chunks of `count` images of which a file is missing."""
    chunks = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return [c for c in chunks if not all(is_there(file) for i in c for file in files_of(folder, i, keep_latents))]


def _claim(
    folder: Path, protocol: dict[str, Any], job: dict[str, Any] | None, console: Console
) -> list[dict[str, Any]]:
    """Keep protocol and job in the folder, unless it holds another protocol; returns the jobs before."""
    before = _read_protocol(folder).get("jobs") or []
    jobs = before if job is None else [*before, job]
    # image i needs no other one
    claim(folder, PROTOCOL, protocol | {"jobs": jobs}, grows=("images", "labels", "latents_kept", "jobs"))
    if before and job and before[-1]["batch"] != job["batch"]:
        text = (
            f"what is there was made {before[-1]['batch']} images at a time, the others are made {job['batch']} at a "
            "time: the same up to rounding, not to the bit"
        )
        console.print(text, style="yellow", highlight=False, soft_wrap=True)
    return before


def _read_protocol(folder: Path) -> dict[str, Any]:
    """What samples.json says; nothing where there is none, or a damaged one, of which `claim` says what is wrong."""
    try:
        return dict(json.loads((folder / PROTOCOL).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _write(picture: np.ndarray, latent: Tensor, files: list[Path]) -> bool:
    """Write those of one image's files that are missing: uint8 [H,W,3] as PNG, [C,h,w] as safetensors."""
    missing = [file for file in files if not file.exists()]
    for file in missing:
        if file.suffix == ".png":
            save_picture(picture, file)
        else:
            with aside(file) as hidden:
                save_file({"latent": latent.contiguous()}, hidden)
    return bool(missing)


@contextlib.contextmanager
def count_passes(model: DiffusionModel, guidance: CFG | AutoGuidance | None) -> Iterator[Tensor]:
    """Count samples on their way through the networks: what an image costs, measured where it is paid.

    Yields:
        int64 [3]: velocities that the sampler asked for; passes through the model's network, which are more where CFG
        asks it twice; passes through the guiding model's.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=model.device)  # there, so that nobody waits for it

    def main(_, arguments) -> None:
        y = arguments[2]
        counts[0] += (y != model.null_label).sum() if isinstance(guidance, CFG) else len(y)
        counts[1] += len(y)

    def guiding(_, arguments) -> None:
        counts[2] += len(arguments[2])

    hooks = [model.network.register_forward_pre_hook(main)]
    if isinstance(guidance, AutoGuidance):
        hooks += [guidance.weak.network.register_forward_pre_hook(guiding)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


# --- what is made of the pictures ------------------------------------------------------------------------------------


def save_overview(folder: Path, labels: Sequence[int], file: Path) -> list[list[int]]:
    """The first 64 images, in the order of their classes, eight in a row, as one PNG.

    Returns:
        The indices of the images, row by row.
    """
    shown = sorted(range(min(len(labels), OVERVIEW_ROWS * OVERVIEW_COLUMNS)), key=lambda i: labels[i])
    rows = [shown[start : start + OVERVIEW_COLUMNS] for start in range(0, len(shown), OVERVIEW_COLUMNS)]
    height, width, _ = read_picture(folder / picture_name(0)).shape
    sheet = np.full((len(rows) * height, len(rows[0]) * width, 3), 255, dtype=np.uint8)  # white where there is none
    for row, indices in zip(np.split(sheet, len(rows), axis=0), rows):
        for column, i in zip(np.split(row, len(rows[0]), axis=1), indices):
            column[:] = read_picture(folder / picture_name(i))
    save_picture(sheet, file)
    return rows


def pack(files: Sequence[Path], labels: Sequence[int] | None, npz: Path, protocol: dict[str, Any]) -> None:
    """PNGs of one size -> an .npz: `arr_0` uint8 [N,H,W,3], one image in memory at a time; `arr_1`, labels int64 [N].

    Args:
        files: the PNGs, in their order.
        labels: the class of each; None = there are none, and no `arr_1`.
        npz: the file.
        protocol: how they were made.

    The file's comment, which NumPy does not look at, tells by what protocol they were made: see `is_packed`.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *read_picture(files[0]).shape)}
    with aside(npz) as hidden, zipfile.ZipFile(hidden, "w") as archive:
        archive.comment = _digest(protocol)
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for file in files:
                array.write(read_picture(file).tobytes())
        if labels is not None:
            _write_labels(archive, labels)


def is_packed(npz: Path, protocol: dict[str, Any]) -> bool:
    """Whether `npz` holds all images of this protocol, packed before; by an earlier version, without `arr_1`."""
    if not zipfile.is_zipfile(npz):
        return False
    with zipfile.ZipFile(npz) as archive:
        return archive.comment == _digest(protocol)


def has_labels(npz: Path) -> bool:
    """Whether a file of `pack` holds the classes."""
    with zipfile.ZipFile(npz) as archive:
        return _LABELS in archive.namelist()


def add_labels(npz: Path, labels: Sequence[int]) -> None:
    """Put the classes into a file that `pack` wrote without them; the images are copied as they are."""
    with aside(npz) as hidden:
        shutil.copyfile(npz, hidden)
        with zipfile.ZipFile(hidden, "a") as archive:  # which keeps the comment
            _write_labels(archive, labels)


def _write_labels(archive: zipfile.ZipFile, labels: Sequence[int]) -> None:
    with archive.open(_LABELS, "w") as array:
        np.lib.format.write_array(array, np.asarray(labels, np.int64))


def _digest(protocol: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest().encode()
