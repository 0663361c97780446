"""Pieces of a report, each as HTML and as markdown: one page that needs nothing else, and one with pictures beside it.

`page` puts pieces together as HTML, readable in light and dark, on wide and narrow screens: text is escaped, images
become data URIs, plots inline SVG. `markdown` puts the same ones together for an issue or a README.
"""

import base64
import html
import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field

from rae.config import Config

_INK = "#010203"  # drawn by matplotlib, then replaced by the colour of the page's text
# readable on white and on black; lines beyond the eighth are dashed
_COLOURS = ("#c8553d", "#3d7ea6", "#6a994e", "#9a6fb0", "#c58b1b", "#2a9d8f", "#8d6e63", "#d1699e")
_LINES = ("-", "--", ":", "-.")
WIDE = 10  # times the smallest value: what spans more is drawn on a logarithmic axis, where it may be
_LEGIBLE, _STRIP = 52, 416  # pixels: least width of an image with text about it, of a picture of many images

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
h1, h2, h3, p { overflow-wrap: break-word; }
p { max-width: 46rem; margin: .4rem 0; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
figure { margin: .8rem 0 1.2rem; }
figcaption { font-size: .9rem; color: var(--faint); max-width: 46rem; margin-top: .4rem; }
.sheet { display: grid; gap: 3px; align-items: center; font-size: .8rem; color: var(--faint); }
.sheet img { width: 100%; display: block; border-radius: 2px; }
.sheet img.pixels { image-rendering: pixelated; }
.sheet span { overflow-wrap: anywhere; line-height: 1.2; padding-right: .3rem; }
.sheet .name { position: sticky; left: 0; align-self: stretch; display: flex; align-items: center;
  overflow-wrap: break-word; background: var(--page); }
.sheet .top, .sheet .under { text-align: center; padding: 0; font-variant-numeric: tabular-nums; }
.sheet .under { margin-bottom: .4rem; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 7rem; }
td:first-child, th:first-child { min-width: 11rem; position: sticky; left: 0; background: var(--page); }
small { color: var(--faint); font-size: .85em; line-height: 1.35; }
pre { background: var(--soft); padding: .7rem .9rem; border-radius: 4px; overflow-x: auto; font-size: .82rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--faint); }
.note { border-left: 3px solid #d08700; padding-left: .8rem; }
@media (max-width: 480px) { td, th { font-size: .8rem; padding-right: .5rem; }
  td:first-child, th:first-child { min-width: 8rem; } }
"""


class ReportError(ValueError):
    """A report that cannot be made; the message says what to do."""


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


Save = Callable[[bytes, str], str]  # (what is in the file, "png" or "svg") -> how to link to it


class Piece(NamedTuple):
    """A part of a page.

    Attributes:
        html: as HTML.
        markdown: a function that writes its pictures by `Save` and gives it as markdown.
    """

    html: str
    markdown: Callable[[Save], str]


def page(title: str, sections: Mapping[str, Sequence[Piece]]) -> str:
    """A whole document of HTML.

    Args:
        title: of the page.
        sections: heading -> pieces; "" holds what stands before the first heading.
    """
    body = "".join(
        (f"<h2>{_text(name)}</h2>\n" if name else "") + "\n".join(piece.html for piece in sections[name])
        for name in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{_text(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def markdown(title: str, sections: Mapping[str, Sequence[Piece]], save: Save) -> str:
    """The same document as `page`, in GitHub's markdown.

    Args:
        title, sections: as of `page`.
        save: writes a picture and tells how to link to it.
    """
    parts = [f"# {_plain(title)}"]
    for name, pieces in sections.items():
        parts += [f"## {_plain(name)}"] if name else []
        parts += [piece.markdown(save) for piece in pieces]
    return "\n\n".join(parts) + "\n"


# --- text ------------------------------------------------------------------------------------------------------------


def heading(text: str) -> Piece:
    return Piece(f"<h3>{_text(text)}</h3>", lambda _: f"### {_plain(text)}")


def paragraph(text: str) -> Piece:
    return Piece(f"<p>{_text(text)}</p>", lambda _: _plain(text))


def note(text: str) -> Piece:
    """A paragraph that limits what the page says."""
    return Piece(f'<p class="note">{_text(text)}</p>', lambda _: f"> {_plain(text)}")


def code(text: str, title: str | None = None) -> Piece:
    """Lines of code; with a title, folded away under it."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text) or [""]))
    lines = Piece(f"<pre>{_text(text)}</pre>", lambda _: f"{fence}\n{text}\n{fence}")
    return folded(title, lines) if title else lines


def folded(title: str, *pieces: Piece) -> Piece:
    """Pieces that a click on their title shows."""
    begin, end = f"<details><summary>{_text(title)}</summary>", "</details>"
    return Piece(
        begin + "".join(piece.html for piece in pieces) + end,
        lambda save: "\n\n".join([begin, *(piece.markdown(save) for piece in pieces), end]),
    )


def beside(*pieces: Piece) -> Piece:
    """Pieces side by side where there is room, else below each other."""
    return Piece(
        '<div class="side">' + "".join(f"<div>{piece.html}</div>" for piece in pieces) + "</div>",
        lambda save: "\n\n".join(piece.markdown(save) for piece in pieces),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Piece:
    """Cells of text; what stands below the first line of a cell is written small."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell, _text)}</td>" for cell in row) + "</tr>\n" for row in rows)

    def lines(_: Save) -> str:
        cells = [list(header), ["---"] * len(header), *([_cell(cell, _plain) for cell in row] for row in rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)

    return Piece(f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>', lines)


def figures_table(figures: Sequence[Figure]) -> Piece:
    return table(["figure", "value", "protocol"], [[f.name, f.value, f.protocol] for f in figures])


# --- pictures --------------------------------------------------------------------------------------------------------


def sheet(
    rows: Sequence[np.ndarray],
    caption: str,
    *,
    names: Sequence[str] = (),
    columns: Sequence[str] = (),
    under: Sequence[Sequence[str]] = (),
    size: int = 56,
) -> Piece:
    """Images in rows.

    Args:
        rows: each uint8 [n, h, w, 3], all with the same n.
        caption: what they show.
        names: one for each row, in front of it; none if empty.
        columns: one for each column, above it; none if empty.
        under: for each row, what stands under each of its images; nothing under a row for which it is empty.
        size: largest width of an image on the screen, in pixels. Pixels that it more than doubles stay sharp.
    """
    cells = []
    if columns:
        cells += ["<span></span>"] if names else []
        cells += [f'<span class="top">{_text(name)}</span>' for name in columns]
    for r, row in enumerate(rows):
        cells += [f'<span class="name">{_text(names[r])}</span>'] if names else []
        pixels = ' class="pixels"' if size >= 2 * row.shape[2] else ""
        for c, image in enumerate(row):
            alt = ", ".join([*names[r : r + 1], *columns[c : c + 1]]) or f"row {r + 1}, column {c + 1}"
            cells.append(f'<img{pixels} alt="{_text(alt)}" src="{data_uri(image)}">')
        if under and under[r]:
            cells += ["<span></span>"] if names else []
            cells += [f'<span class="under">{_text(text)}</span>' for text in under[r]]
    least = min(size, _STRIP if len(rows[0]) == 1 else _LEGIBLE if columns or under else 0)
    template = ("fit-content(5.5rem) " if names else "") + f"repeat({len(rows[0])}, minmax({least}px, {size}px))"
    grid = (
        f'<div class="wide"><div class="sheet" style="grid-template-columns: {template}">{"".join(cells)}</div></div>'
    )

    def strips(save: Save) -> str:
        lines = []
        for r, row in enumerate(rows):
            texts = " · ".join(under[r]) if under else ""
            link = f"![{_plain(names[r] if names else caption)}]({save(_png(np.concatenate(row, axis=1)), 'png')})"
            cells = [_plain(names[r])] if names else []
            lines.append([*cells, link + (f"<br><small>{_plain(texts)}</small>" if texts else "")])
        header = [""] * len(lines[0])
        header[-1] = _plain(" · ".join(columns))
        both = [header, ["---"] * len(header), *lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in both) + f"\n\n{_plain(caption)}"

    return Piece(f"<figure>{grid}<figcaption>{_text(caption)}</figcaption></figure>", strips)


def data_uri(image: np.ndarray) -> str:
    """uint8 [h, w, 3] -> the PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return file.getvalue()


# --- plots -----------------------------------------------------------------------------------------------------------


def check_plots() -> None:
    """Look for what draws plots, before anything is computed.

    Raises:
        ReportError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReportError("plots need matplotlib, which is not installed: pip install 'rae[demo]'.") from error


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x: str,
    y: str,
    *,
    log: bool = False,
) -> Piece:
    """Lines over a common axis, as SVG that takes the page's font and text colour.

    Args:
        series: name -> (x values, y values); one without values is left out, and the others keep their colours.
        title, x, y: of the plot and its axes.
        log: whether y is logarithmic.
    """

    def draw(plot, axes) -> None:
        from matplotlib.ticker import EngFormatter

        styles = itertools.product(_LINES, _COLOURS)
        for (name, (xs, ys)), (line, colour) in zip(series.items(), itertools.cycle(styles)):
            if len(xs):
                marker = "o" if len(xs) < 30 else ""
                label = f"\N{ZERO WIDTH SPACE}{name}" if name[:1] == "_" else name  # or it is left out of the legend
                axes.plot(xs, ys, line, label=label, color=colour, linewidth=1.6, marker=marker, markersize=3)
        axes.set_xlabel(x)
        axes.set_ylabel(textwrap.fill(y, 24))  # as long as the axis is high
        if max((x for xs, _ in series.values() for x in xs), default=0) >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if log:
            _logarithmic(axes.yaxis)
        if any(len(xs) for xs, _ in series.values()):
            columns = max(1, min(3, 60 // (6 + max(map(len, series)))))
            plot.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)

    return _plot(draw, title, 2.9 + 0.16 * max(0, len(series) - 3))


def dots(values: Mapping[str, tuple[float, float | None] | None], title: str, x: str, *, log: bool = False) -> Piece:
    """A dot for each value with a bar of one standard error to either side, names in front, the first one on top.

    Args:
        values: name -> (value, standard error or None); one that is None is left out, and the others keep the colours
            that `curves` gives them.
        title, x: of the plot and its axis.
        log: whether the axis is logarithmic.
    """
    shown = {name: value for name, value in values.items() if value}

    def draw(_, axes) -> None:
        colours = dict(zip(values, itertools.cycle(_COLOURS)))
        for place, (name, (value, error)) in enumerate(shown.items()):
            axes.errorbar([value], [place], xerr=error, fmt="o", color=colours[name], capsize=3, markersize=5)
        axes.set_yticks(range(len(shown)), list(shown))
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel(x)
        if log:
            finite = [value for value, _ in shown.values() if math.isfinite(value)]
            # side by side, the labels of more than two decades would run into each other
            _logarithmic(axes.xaxis, (1,) if max(finite) > 100 * min(finite) else (1, 2, 5))

    return _plot(draw, title, 0.9 + 0.28 * len(shown))


def _logarithmic(axis, subs: Sequence[int] = (1, 2, 5)) -> None:
    """Make an axis logarithmic, with ticks at `subs` of each decade in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _plot(draw: Callable, title: str, height: float) -> Piece:
    import matplotlib
    from matplotlib.figure import Figure as Plot

    colours = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 10}
    style["text.parse_math"] = False  # a name with $ in it is no formula
    file, lines = io.StringIO(), textwrap.wrap(title, 62)  # as many letters as it is wide
    with matplotlib.rc_context(colours | style):
        plot = Plot(figsize=(5, height + 0.17 * (len(lines) - 1)), layout="constrained")
        axes = plot.add_subplot()
        draw(plot, axes)
        axes.set_title("\n".join(lines), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
        plot.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    drawing = text[text.index("<svg") :].replace(_INK, "currentColor")
    # a picture of its own knows no page whose colour it could take
    ink = "<style>svg{color:#1c1c1e}@media(prefers-color-scheme:dark){svg{color:#e8e8ea}}</style>"
    alone = re.sub("(<svg[^>]*>)", lambda tag: tag[1] + ink, drawing, count=1)
    return Piece(f"<figure>{drawing}</figure>", lambda save: f"![{_plain(title)}]({save(alone.encode(), 'svg')})")


# ---------------------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return html.escape(text)


def _plain(text: str) -> str:
    """Text that markdown shows as it is; an underscore inside a word is one."""
    return re.sub(r"[\\`*\[\]<>|~]|(?<!\w)_|_(?!\w)|^#", r"\\\g<0>", text).replace("\n", " ")


def _cell(text: str, escape: Callable[[str], str]) -> str:
    first, *rest = text.split("\n")
    return escape(first) + "".join(f"<br><small>{escape(line)}</small>" for line in rest)
