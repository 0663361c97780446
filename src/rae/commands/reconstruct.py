"""`rae reconstruct`: images beside what an autoencoder makes of them, with PSNR and SSIM of each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rae.autoencoder.rae import RAE
from rae.commands.pictures import Rounding, checksum, make_empty, picture_name, save_picture
from rae.data.images import DataConfig, Views, loader, open_images, subset, to_bytes, to_unit
from rae.evaluation.reconstruction import WINDOW, psnr, ssim
from rae.training.display import progress


@torch.no_grad()
def write_reconstructions(
    model: str | Path, data: DataConfig, out: Path, *, num: int | None = None, batch: int = 32, rounding: Rounding
) -> list[dict[str, Any]]:
    """`rae reconstruct`: each image (centre crop) beside its reconstruction, and their PSNR and SSIM, of 8-bit images.

    Writes `out`/000000.png ... and `out`/figures.json, prints the means and the first rows. Unreadable images are named
    and left out where `data.on_broken` is "skip".

    Returns:
        One row per image: file, image, psnr, ssim (None for images smaller than SSIM's window).

    Raises:
        OutputError: `out` is not empty.
    """
    images = open_images(data.source)
    images = images if num is None else subset(images, range(min(num, len(images))))
    rae = RAE.from_pretrained(model).to(PartialState().device)
    make_empty(out)
    resize = rae.output_size != rae.image_size  # up-sampling decoder: the encoder sees fewer pixels
    chunks, rows, broken = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)], [], []
    with progress("reconstruct", len(images)) as advance:
        for chunk, part in zip(chunks, loader(Views(images, data, rae.output_size), chunks, data)):
            image = to_unit(part["image"].to(PartialState().device))
            decoded = to_bytes(rae.reconstruct(image, resize=resize), rounding)
            decibels = psnr(to_unit(decoded), image)
            similarity = ssim(to_unit(decoded), image) if min(rae.output_size) >= WINDOW else [None] * len(image)
            pairs = torch.cat([part["image"], decoded.cpu()], dim=3).permute(0, 2, 3, 1).numpy()
            for wanted, index, pair, p, s in zip(chunk, part["index"].tolist(), pairs, decibels, similarity):
                if index != wanted:  # another image was read in its place
                    broken.append(images.names[wanted])
                    continue
                row = {"file": picture_name(index), "image": images.names[index], "psnr": float(p)}
                rows.append(row | {"ssim": None if s is None else float(s)})
                save_picture(pair, out / row["file"])
            advance(chunk.stop, "")
    means = {key: float(np.mean([row[key] for row in rows])) for key in ("psnr", "ssim") if rows[0][key] is not None}
    protocol = {"images": len(rows), "size": list(rae.output_size), "rounding": rounding, "source": images.identity}
    protocol |= {"decoder": checksum(rae.decoder), "latents": rae.latent_identity, "unreadable": broken}
    (out / "figures.json").write_text(json.dumps(protocol | {"mean": means, "rows": rows}, indent=1) + "\n")
    for name in broken:
        Console(stderr=True).print(f"[yellow]left out: {escape(name)} cannot be read", highlight=False, soft_wrap=True)
    _print_figures(rows, means, out)
    return rows


def _print_figures(rows: list[dict[str, Any]], means: dict[str, float], out: Path) -> None:
    table = Table("picture", "image", title=f"{len(rows)} images and their reconstructions: {out}")
    for header in ("PSNR / dB", "SSIM"):
        table.add_column(header, justify="right")
    for row in rows[:10]:
        table.add_row(row["file"], Path(row["image"]).name, f"{row['psnr']:.2f}", _rounded(row["ssim"]))
    if len(rows) > 10:
        table.add_row("...", f"{len(rows) - 10} more in figures.json", "", "")
    table.add_section()
    table.add_row("mean", "", f"{means['psnr']:.2f}", _rounded(means.get("ssim")))
    Console().print(table)


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
