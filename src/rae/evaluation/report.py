"""Pieces of a report: one HTML file that needs nothing else, readable in light and dark, on wide and narrow screens.

Each function returns HTML; `page` puts sections together. Text is escaped, images become data URIs, plots inline SVG.
"""

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from pydantic import Field

from rae.config import Config

_INK = "#010203"  # drawn by matplotlib, then replaced by the colour of the page's text
_COLOURS = ("#c8553d", "#3d7ea6", "#6a994e", "#9a6fb0")  # readable on white and on black

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --page: #fff; --faint: #6b6b70; --line: #d9d9de; --soft: #f4f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --page: #141416; --faint: #9c9ca3; --line: #38383d; --soft: #1f1f23; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .3rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
p { max-width: 46rem; margin: .4rem 0; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
figure { margin: .8rem 0 1.2rem; }
figcaption { font-size: .9rem; color: var(--faint); max-width: 46rem; margin-top: .4rem; }
.sheet { display: grid; gap: 3px; align-items: center; font-size: .8rem; color: var(--faint); }
.sheet img { width: 100%; display: block; border-radius: 2px; }
.sheet span { overflow-wrap: anywhere; line-height: 1.2; padding-right: .3rem; }
.sheet .top { text-align: center; padding: 0; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
td:first-child { min-width: 8rem; }
pre { background: var(--soft); padding: .7rem .9rem; border-radius: 4px; overflow-x: auto; font-size: .82rem; }
summary { cursor: pointer; color: var(--faint); }
.note { border-left: 3px solid #d08700; padding-left: .8rem; }
@media (max-width: 480px) { td, th { font-size: .8rem; padding-right: .5rem; } td:first-child { min-width: 5rem; } }
"""


class Figure(Config):
    """A measured number and how it was measured.

    Attributes:
        name: what was measured.
        value: with its unit.
        protocol: number of images, labels, steps, grid, guidance, precision, reference: whatever it depends on.
    """

    name: str
    value: str
    protocol: str = Field(min_length=1)


def page(title: str, sections: Mapping[str, Sequence[str]]) -> str:
    """A whole document.

    Args:
        title: of the page.
        sections: heading -> pieces of HTML; "" holds what stands before the first heading.
    """
    body = "".join((f"<h2>{_text(name)}</h2>\n" if name else "") + "\n".join(sections[name]) for name in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{_text(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h3>{_text(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def note(text: str) -> str:
    """A paragraph that limits what the page says."""
    return f'<p class="note">{_text(text)}</p>'


def code(text: str, title: str | None = None) -> str:
    """Lines of code; with a title, folded away under it."""
    lines = f"<pre>{_text(text)}</pre>"
    return f"<details><summary>{_text(title)}</summary>{lines}</details>" if title else lines


def beside(*pieces: str) -> str:
    """Pieces side by side where there is room, else below each other."""
    return '<div class="side">' + "".join(f"<div>{piece}</div>" for piece in pieces) + "</div>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def figures_table(figures: Sequence[Figure]) -> str:
    return table(["figure", "value", "protocol"], [[f.name, f.value, f.protocol] for f in figures])


def sheet(
    rows: Sequence[np.ndarray], caption: str, *, names: Sequence[str] = (), columns: Sequence[str] = (), size: int = 56
) -> str:
    """Images in rows.

    Args:
        rows: each uint8 [n, h, w, 3], all with the same n.
        caption: what they show.
        names: one for each row, in front of it; none if empty.
        columns: one for each column, above it; none if empty.
        size: largest width of an image on the screen, in pixels.
    """
    cells = []
    if columns:
        cells += [
            *(["<span></span>"] if names else []),
            *(f'<span class="top">{_text(name)}</span>' for name in columns),
        ]
    for r, row in enumerate(rows):
        cells += [f"<span>{_text(names[r])}</span>"] if names else []
        for c, image in enumerate(row):
            alt = ", ".join([*names[r : r + 1], *columns[c : c + 1]]) or f"row {r + 1}, column {c + 1}"
            cells.append(f'<img alt="{_text(alt)}" src="{data_uri(image)}">')
    template = ("fit-content(5.5rem) " if names else "") + f"repeat({len(rows[0])}, minmax(0, {size}px))"
    grid = f'<div class="sheet" style="grid-template-columns: {template}">{"".join(cells)}</div>'
    return f"<figure>{grid}<figcaption>{_text(caption)}</figcaption></figure>"


def data_uri(image: np.ndarray) -> str:
    """uint8 [h, w, 3] -> the PNG as a data URI."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x: str, y: str) -> str:
    """Lines over a common axis, as SVG that takes the page's font and text colour.

    Args:
        series: name -> (x values, y values); one without values is left out.
        title, x, y: of the plot and its axes.
    """
    import matplotlib
    from matplotlib.figure import Figure as Plot

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 10}
    file = io.StringIO()
    with matplotlib.rc_context(ink | style):
        plot = Plot(figsize=(5, 2.9), layout="constrained")
        axes = plot.add_subplot()
        drawn = {name: points for name, points in series.items() if len(points[0])}
        for (name, (xs, ys)), colour in zip(drawn.items(), itertools.cycle(_COLOURS)):
            axes.plot(xs, ys, label=name, color=colour, linewidth=1.6, marker="o" if len(xs) < 30 else "", markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
        if drawn:
            axes.legend(frameon=False)
        plot.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return "<figure>" + text[text.index("<svg") :].replace(_INK, "currentColor") + "</figure>"


def _text(text: str) -> str:
    return html.escape(text)
