"""`rae reconstruct`: images beside what an autoencoder makes of them, with PSNR and SSIM of each.

images --reconstruct--> 000000.png, 000001.png, ... --measure--> figures.json
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rae.autoencoder.latents import add_noise
from rae.autoencoder.rae import RAE
from rae.commands.pictures import (
    Rounding,
    checksum,
    claim,
    is_there,
    picture_name,
    read_picture,
    save_picture,
)
from rae.commands.run_record import check_outside_data
from rae.data.images import DataConfig, Views, loader, open_images, subset, to_bytes, to_tensor, to_unit
from rae.data.order import noise_draws
from rae.evaluation.reconstruction import WINDOW, psnr, ssim
from rae.folders import aside, check_outside
from rae.processes import process_state
from rae.training.display import progress


@torch.no_grad()
def write_reconstructions(
    model: str | Path,
    data: DataConfig,
    out: Path,
    *,
    num: int | None = None,
    noise: float = 0.0,
    batch: int = 32,
    rounding: Rounding,
) -> list[dict[str, Any]]:
    """`rae reconstruct`: each image (centre crop) beside its reconstruction, and their PSNR and SSIM, of 8-bit images.

    Writes `out`/000000.png ... and `out`/figures.json, prints the means and the first rows, and of how many images of
    the source these are: the first `num`, where it holds more. Unreadable ones are named and left out where
    `data.on_broken` is "skip". Pictures that exist are left alone; every process of a distributed job makes its share
    of the others, the first one measures all. `noise` times normal noise, the same for an image whatever its batch, is
    added to the tokens.

    Returns:
        One row per image: file, image, psnr, ssim (None for images smaller than SSIM's window).

    Raises:
        OutputError: `out` holds pictures made in another way, or something else, or a damaged picture.
        ValueError: `out` is inside the folder of images, or of those that the model was trained on.
    """
    check_outside(out, data.source)
    check_outside_data(out, model)
    # labels play no part, and `rae report` pairs reconstructions by the identity of their images
    state, source = process_state(), open_images(data.source, data.image, "")
    images = source if num is None else subset(source, range(min(num, len(source))))
    rae = RAE.from_pretrained(model).to(state.device)
    protocol = {"images": len(images), "size": list(rae.output_size), "rounding": rounding, "source": source.identity}
    protocol |= {"decoder": checksum(rae.decoder), "latents": rae.latent_identity, "noise": noise}
    if state.is_main_process:
        claim(out, "reconstructions.json", protocol, grows=("images",))
        if num is not None and num != len(source):
            more = f", of which --num {num:,} asks for more" if num > len(source) else ""
            _warn(f"{len(images):,} of {len(source):,} images of {data.source}{more}")
    state.wait_for_everyone()
    files = [out / picture_name(i) for i in range(len(images))]
    starts = range(0, len(images), batch)[state.process_index :: state.num_processes]
    chunks = [range(start, min(start + batch, len(images))) for start in starts]
    # What is left of a chunk is done in the company of the rest, which rounding errors depend on.
    chunks = [chunk for chunk in chunks if not all(is_there(files[i]) for i in chunk)]
    resize = rae.output_size != rae.image_size  # up-sampling decoder: the encoder sees fewer pixels
    with progress("reconstruct", sum(map(len, chunks))) as advance:
        done = 0
        for chunk, part in zip(chunks, loader(Views(images, data, rae.output_size), chunks, data)):
            image = to_unit(part["image"].to(state.device))
            tokens = rae.tokens(image, resize=resize)
            if noise:
                normals, _ = noise_draws(chunk, 0, tokens.shape[1:])
                tokens = add_noise(tokens, torch.full((len(tokens),), noise).to(tokens), normals.to(tokens))
            decoded = to_bytes(rae.decode_tokens(tokens), rounding)
            pairs = torch.cat([part["image"], decoded.cpu()], dim=3).permute(0, 2, 3, 1).numpy()
            for wanted, index, pair in zip(chunk, part["index"].tolist(), pairs):
                # A broken image has no picture; another one was read in its place.
                if index == wanted and not files[wanted].exists():
                    save_picture(pair, files[wanted])
            done += len(chunk)
            advance(done, "")
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    rows = measure([i for i, file in enumerate(files) if is_there(file)], images.names, out, state.device)
    broken = [name for name, file in zip(images.names, files) if not file.exists()]
    means = {key: float(np.mean([row[key] for row in rows])) for key in ("psnr", "ssim") if rows[0][key] is not None}
    protocol |= {"images": len(rows), "source_images": len(source), "unreadable": broken}
    with aside(out / "figures.json") as hidden:
        hidden.write_text(json.dumps(protocol | {"mean": means, "rows": rows}, indent=1) + "\n")
    for name in broken:
        _warn(f"left out: {name} cannot be read")
    _print_figures(rows, means, len(source), out)
    return rows


def measure(indices: Sequence[int], names: Sequence[str], folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Figures of the pictures in `folder`, from nothing but the pictures: the same whenever they were made.

    Args:
        indices: which pictures.
        names: of all images.
    """
    rows = []
    with progress("PSNR, SSIM", len(indices)) as advance:
        for i in indices:
            file = picture_name(i)
            pair = to_unit(to_tensor(read_picture(folder / file)).to(device))  # -> [3,H,2W]: image, reconstruction
            image, decoded = pair[None].chunk(2, dim=3)
            similarity = ssim(decoded, image).item() if min(image.shape[2:]) >= WINDOW else None
            rows.append({"file": file, "image": names[i], "psnr": psnr(decoded, image).item(), "ssim": similarity})
            advance(len(rows), "")
    return rows


def _warn(text: str) -> None:
    Console(stderr=True).print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _print_figures(rows: list[dict[str, Any]], means: dict[str, float], count: int, out: Path) -> None:
    images = f"{len(rows):,} images" if len(rows) == count else f"{len(rows):,} of {count:,} images"
    table = Table("picture", "image", title=f"{images} and their reconstructions: {escape(str(out))}")
    for header in ("PSNR / dB", "SSIM"):
        table.add_column(header, justify="right")
    for row in rows[:10]:
        table.add_row(row["file"], escape(Path(row["image"]).name), f"{row['psnr']:.2f}", _rounded(row["ssim"]))
    if len(rows) > 10:
        table.add_row("...", f"{len(rows) - 10} more in figures.json", "", "")
    table.add_section()
    table.add_row("mean", "", f"{means['psnr']:.2f}", _rounded(means.get("ssim")))
    Console().print(table)


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
