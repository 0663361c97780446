"""The page that the demo ends with: what was found, how it was measured, how to do it again."""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from rae.autoencoder.rae import RAE
from rae.data.images import open_images, open_split
from rae.demo.measure import Findings
from rae.demo.parts import Part, total
from rae.demo.studies import Study
from rae.evaluation.report import beside, code, curves, figures_table, heading, note, page, paragraph, sheet, table

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "pillow", "scikit-learn", "scikit-image")


def render(command: Sequence[str], quick: bool, studies: list[tuple[Study, Findings]], parts: list[Part]) -> str:
    """The whole page.

    Args:
        command: the demo's own command line.
        quick: whether this was the run of a few steps.
        studies: each with its pictures and figures.
        parts: in the order in which they were done.
    """
    generated = [study for study, _ in studies if study.dit]
    encoder = studies[0][0].decoder.encoder.name
    intro = [
        paragraph(
            "A representation autoencoder takes a frozen, pretrained encoder and learns only the way back, from its "
            "tokens to pixels; a diffusion transformer then learns to make new tokens (arXiv 2510.11690). Everything "
            f"below was computed on one machine, from real images. Encoder: {encoder}. Decoders and diffusion "
            "transformers: from scratch."
        )
    ]
    if quick:
        intro.append(note("This is the quick run of a few steps: it shows that every part works, and nothing else."))
    intro += [_small_set(study) for study in generated if not study.judged]
    sections = {"": [piece for piece in intro if piece]}
    for study, found in studies:
        sections[study.title] = _study(study, found)
    sections["Figures"] = [
        piece
        for study, found in studies
        for piece in ([heading(study.title)] if len(studies) > 1 else []) + [figures_table(found.figures)]
    ]
    sections["Time and memory"] = [
        table(["part", "time", "peak memory"], [part.cost for part in [*parts, total(parts)]]),
        paragraph(f"On {_machine()}; shared with whatever else ran on it."),
    ]
    sections["Do it again"] = _again(command, [study for study, _ in studies])
    return page("Images in, new images out", sections)


def _study(study: Study, found: Findings) -> list[str]:
    pictures = found.pictures
    size = 64 if study.judged else 150
    height, width = study.decoder.encoder.image_size
    decoder_width, depth, *_ = study.decoder.decoder.size
    protocol = f"{height} x {width} px; the decoder is {decoder_width} wide and {depth} layers deep."
    pieces = [paragraph(study.images), heading("Reconstructions")]
    for name, what in (("held_out", "Held out: never seen in training"), ("seen", "Seen in training")):
        rows = [pictures[f"{name}_original"], pictures[f"{name}_decoded"]]
        pieces.append(sheet(rows, f"{what}. {protocol}", names=["original", "decoded"], size=size))
    if study.whole:
        caption = (
            "What the encoder sees: three principal components of the patch tokens, over all these images, as red, "
            "green and blue. Like colours are like parts; the axes are arbitrary."
        )
        pieces += [heading("Latents"), sheet([pictures["pca_images"], pictures["pca"]], caption, size=size)]
    if study.dit:
        pieces += _samples(study, pictures, size)
    pieces.append(heading("Losses"))
    pieces.append(beside(*_losses(study)))
    return pieces


def _samples(study: Study, pictures: dict[str, np.ndarray], size: int) -> list[str]:
    names = open_split(study.dit.data)[0].class_names or []
    captions = {
        "unguided": "Without guidance.",
        "CFG": f"Classifier-free guidance {study.sampling.cfg:g}: away from what the model makes of no class.",
        "AutoGuidance": f"AutoGuidance {study.sampling.autoguidance:g}: away from what an earlier checkpoint makes.",
    }
    by_class = "New images, a row for each class. " if names else "New images. "
    grids = [
        sheet(list(grid), by_class + captions[kind], names=names[: len(grid)], size=size)
        for kind in captions
        if (grid := pictures.get(f"samples_{kind}")) is not None
    ]
    times = [f"t = {t:.2g}" for t in pictures["strip_times"]]
    strip_names = ["state", *["expected"] * (len(pictures["strips"]) - 1)]
    best = "guided (CFG)" if names else "unguided"
    return [
        heading("Samples"),
        beside(*grids),
        heading("From noise to image"),
        sheet(
            list(pictures["strips"]),
            "Top: the state of the first sample, decoded as it is. Below: for five samples, the data that the model "
            f"expects at each time, x - t v, decoded; {best}. Time runs from noise (1) to data (0).",
            names=strip_names,
            columns=times,
            size=size,
        ),
        heading("New, or remembered?"),
        sheet(
            [pictures["nearest_to"], pictures["nearest"]],
            f"Samples, {best}, and below each the training image whose latent is nearest.",
            names=["sample", "nearest"],
            size=size,
        ),
    ]


def _losses(study: Study) -> list[str]:
    plots = []
    for stage, figures in (("decoder", ("l1", "held_out_l1")), ("dit", ("loss", "held_out_loss"))):
        log = study.folder / stage / "log.jsonl"
        if log.exists():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            series = {}
            for figure, name in zip(figures, ("training", "held out")):
                found = [line for line in lines if figure in line]
                series[name] = [line["images"] / 1000 for line in found], [line[figure] for line in found]
            title = {"decoder": "Stage 1: the decoder", "dit": "Stage 2: the diffusion transformer"}[stage]
            loss = {"decoder": "L1 at the image", "dit": "velocity, mean square"}[stage]
            plots.append(curves(series, f"{title} ({study.folder.name})", "thousand images seen", loss))
    return plots


def _small_set(study: Study) -> str:
    count = len(open_images(study.dit.data.source))
    if count >= 500:
        return ""
    return note(
        f"{count} images are too few to learn to generate: expect samples that repeat the training images or fall "
        "apart. Reconstructions and latents mean what they say; samples begin to mean something from some 500 images "
        "of one kind, and good ones take thousands and a GPU."
    )


def _again(command: Sequence[str], studies: list[Study]) -> list[str]:
    lines, recipes = [f"{shlex.join(command)}    # all of it", ""], []
    for study in studies:
        runs = f"runs/{study.folder.name}"
        recipe = study.folder / "decoder/recipe.yaml"
        lines.append(f"rae train-decoder {shlex.quote(str(recipe))} --out {runs}-decoder")
        recipes.append(code(recipe.read_text(), str(recipe)))
        if study.dit:
            recipe, dit = study.folder / "dit/recipe.yaml", study.folder / "dit"
            lines.append(f"rae train-dit {shlex.quote(str(recipe))} rae={runs}-decoder --out {runs}-dit")
            guidance = f" --cfg {study.sampling.cfg:g}" if study.dit.sheet.cfg else ""
            lines.append(
                f"rae sample {shlex.quote(str(dit))} --num 100 --steps {study.sampling.steps} --grid calls{guidance} "
                f"--out samples"
            )
            recipes.append(code(recipe.read_text(), str(recipe)))
    return [code("\n".join(lines)), *recipes, table(["what", "which"], _identity(studies[0]))]


def _identity(study: Study) -> list[tuple[str, str]]:
    rae = RAE.from_pretrained(study.folder / "decoder")
    return [
        ("encoder", f"{rae.encoder.config.name} ({rae.encoder.config.source})"),
        ("SHA-256 of its weights", rae.encoder.checksum()),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in ("rae", *PACKAGES)),
    ]


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores ({torch.get_num_threads()} threads used), {platform.system()}"
