"""`rae report`: runs, samples, reconstructions and evaluations side by side, as one HTML file and as markdown.

folders --read_all--> what is on disk --a section of each kind--> report.html, report.md, report-files/
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from rae.commands.compare_figures import figures
from rae.commands.compare_nearest import Nearest, nearest_images, sources
from rae.commands.compare_pictures import reconstructions, samples
from rae.commands.compare_read import Compared, read_all
from rae.commands.compare_runs import runs
from rae.evaluation.report import Piece, ReportError, check_plots, markdown, page, table
from rae.folders import aside, check_outside

TITLES = {1: "Stage 1: decoders", 2: "Stage 2: diffusion transformers"}


def write_report(folders: Sequence[Path], out: Path, near: Nearest | None = None) -> Path:
    """Compare what is in the folders, and write it down.

    Args:
        folders: of runs, samples, reconstructions, evaluations, in any mixture; differences are to the first one.
        out: an .html file; or a folder, for report.html in it. Beside it come the same as .md, and the pictures of that
            one in a folder of the same name ending in -files.
        near: which images to look for samples' neighbours in; None = no such section.

    Returns:
        The HTML file.

    Raises:
        ReportError: nothing to compare, matplotlib is missing, or `out` cannot be written to.
        ValueError: `out` is inside a folder of images that is read, or of pictures that are compared.
    """
    check_plots()
    compared = read_all(folders)
    pictures = (found for each in compared for found in (each.samples, each.reconstructions) if found)
    for folder in (*(found.folder for found in pictures), *(sources(near) if near else ())):
        check_outside(out, folder)
    html = check_out(out)
    sections = {"": overview(compared), "Figures": figures(compared)}
    for stage, title in TITLES.items():
        if own := [each for each in compared if each.run and each.run.stage == stage]:
            sections[title] = runs(own)
    sections["Reconstructions"] = reconstructions(compared)
    sections["Samples"] = samples(compared)
    if near:
        sections["New, or remembered?"] = nearest_images(compared, near, _files(html) / "features")
    first, *others = (each.name for each in compared)
    title = " and ".join([first, *(others if len(others) < 3 else [f"{len(others)} others"])])
    _write(html, title, {name: pieces for name, pieces in sections.items() if pieces})
    return html


def overview(compared: Sequence[Compared]) -> list[Piece]:
    """What is compared: a row for each folder."""
    rows = [[f"{each.name}\n{each.folder}", "; ".join(each.kinds), _far(each)] for each in compared]
    return [table(["name", "what", "how far"], rows)]


def _far(each: Compared) -> str:
    if each.run:
        recipe, lines = each.run.recipe, each.run.lines
        asked = f"asked for: {recipe['run.duration']}" if "run.duration" in recipe else "no length asked for"
        last = f", {lines[-1]['time'][:16].replace('T', ' ')}" if lines and "time" in lines[-1] else ""
        return f"{each.run.seen:,} images seen{last}\n{asked}"
    of = each.samples or each.reconstructions
    return f"{of.protocol['images']:,} images" if of else f"{each.evaluation.subject.images:,} images"


# --- files -----------------------------------------------------------------------------------------------------------


def check_out(out: Path) -> Path:
    """The HTML file; its folder is made.

    Raises:
        ReportError: it cannot be written.
    """
    out = out.expanduser()
    html = out if out.suffix == ".html" and not out.is_dir() else out / "report.html"
    if any(parent.is_file() for parent in html.parents) or html.is_dir():
        raise ReportError(f"{html} cannot be written; give a folder, or a file ending in .html.")
    html.parent.mkdir(parents=True, exist_ok=True)
    return html


def _files(html: Path) -> Path:
    return html.with_name(f"{html.stem}-files")


def _write(html: Path, title: str, sections: dict[str, list[Piece]]) -> None:
    files = _files(html)
    files.mkdir(exist_ok=True)
    for old in files.glob("[0-9][0-9][0-9].*"):  # of an earlier report
        old.unlink()
    names = (f"{number:03d}" for number in itertools.count(1))

    def save(data: bytes, kind: str) -> str:
        path = files / f"{next(names)}.{kind}"
        path.write_bytes(data)
        return quote(f"{files.name}/{path.name}")

    for path, text in ((html.with_suffix(".md"), markdown(title, sections, save)), (html, page(title, sections))):
        with aside(path) as hidden:
            hidden.write_text(text)
    console = Console()
    for path in (html, html.with_suffix(".md")):
        console.print(f"written: {path}", highlight=False, markup=False, soft_wrap=True)
