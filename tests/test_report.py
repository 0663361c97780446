"""The report's pieces: what goes in comes out, escaped and without anything from outside."""

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rae.evaluation.report import (
    Figure,
    ReportError,
    beside,
    check_plots,
    code,
    curves,
    dots,
    figures_table,
    folded,
    heading,
    markdown,
    note,
    page,
    paragraph,
    sheet,
    table,
)


class Reader(HTMLParser):
    """Collects images, cells and anything that a browser would fetch; checks that tags close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.cells, self.fetched, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v[:1] != "#"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.fixture
def rows() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4, 3), dtype=np.uint8))


def test_images_come_back_in_order_and_exactly(rows):
    reader = Reader(sheet(rows, "six", names=["real", "made"], columns=["0", "1", "2"]).html)
    np.testing.assert_array_equal([decode(image["src"]) for image in reader.images], np.concatenate(rows))
    assert [image["alt"] for image in reader.images][3] == "made, 0"


def test_a_page_is_one_file_of_closed_tags(rows):
    plot = curves({"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, "curve", "images", "loss")
    text = page("a & b", {"": [sheet(rows, "<script>")], "plots": [beside(plot, plot), code("x < y", "recipe")]})
    reader = Reader(text)
    assert all(source.startswith("data:image/png;base64,") for source in reader.fetched)
    assert len(reader.fetched) == 6
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    assert "<title>a &amp; b</title>" in text
    assert "&lt;script&gt;" in text


def test_a_plot_takes_its_text_colour_from_the_page_and_shows_every_point():
    plot = curves(
        {"loss": ([0, 1, 2], [3.0, 2.0, 1.0]), "held-out": ([0, 2], [3.0, 2.0])}, "curve", "images", "loss"
    ).html
    assert "currentColor" in plot
    assert "#010203" not in plot
    assert {"loss", "held-out", "images", "curve"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", plot))


def test_a_plot_of_many_lines_shows_all_that_have_points():
    series = {f"line {i}": ([0, 1], [i, i + 1]) for i in range(6)} | {"nothing yet": ([], [])}
    plot = curves(series, "curve", "images", "loss").html
    assert {text for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot) if "line" in text} == {*list(series)[:6]}
    assert "nothing yet" not in plot
    assert "curve" in curves({"nothing yet": ([], [])}, "curve", "images", "loss").html


def test_a_figure_without_a_protocol_is_refused():
    with pytest.raises(ValueError, match="protocol"):
        Figure(name="rFID", value="0.5", protocol="")
    figure = Figure(name="PSNR", value="21.3 dB", protocol="180 held-out images, 8-bit")
    assert Reader(figures_table([figure]).html).cells == ["PSNR", "21.3 dB", "180 held-out images, 8-bit"]


# --- plots -----------------------------------------------------------------------------------------------------------


def strokes(plot: str) -> set[str]:
    """Colours of what a plot draws, without text and axes."""
    return set(re.findall(r"stroke: (#[0-9a-f]{6})", plot)) - {"#808080"}


def test_a_line_keeps_its_colour_where_another_has_no_values():
    both = {"a": ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}
    first = strokes(curves({"a": both["a"]}, "c", "x", "y").html)
    second = strokes(curves(both | {"a": ([], [])}, "c", "x", "y").html)
    assert first | second == strokes(curves(both, "c", "x", "y").html)
    assert not first & second


def test_many_lines_differ():
    series = {f"line {i}": ([0, 1], [i, i + 1]) for i in range(10)}
    styles = re.findall(r'style="fill: none; ([^"]*)"', curves(series, "c", "x", "y").html)
    assert len({style for style in styles if "stroke-width: 1.6" in style}) >= 10


def test_dots_name_what_they_are_of_and_draw_an_error_where_there_is_one():
    plot = dots({"one run": (1.0, 0.5), "another": (2.0, None)}, "FD", "lower is better").html
    assert {"one run", "another", "FD", "lower is better"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", plot))
    assert plot.count("LineCollection") == 1


def test_any_name_is_drawn_as_it_is():
    names = ["_base", "a$_$", r"a$\foo$", r"b\$c", "$"]
    lines = curves({name: ([0, 1], [0, i]) for i, name in enumerate(names)}, "$_$", "x$^$", "$y$").html
    ends = dots({name: (1.0 + i, 0.5) for i, name in enumerate(names)}, "$_$", "x$^$").html
    for plot in (lines, ends):
        drawn = {text.lstrip("\N{ZERO WIDTH SPACE}") for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot)}
        assert {*names, "$_$", "x$^$"} <= drawn


def test_plots_say_what_is_missing(monkeypatch):
    check_plots()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install 'rae\[demo\]'"):
        check_plots()


# --- markdown --------------------------------------------------------------------------------------------------------


class Saved:
    """Pictures by the link that stands for them."""

    def __init__(self) -> None:
        self.files = {}

    def __call__(self, data: bytes, kind: str) -> str:
        link = f"files/{len(self.files)}.{kind}"
        self.files[link] = data
        return link


def test_markdown_says_the_same_as_the_page(rows):
    saved = Saved()
    plot = curves({"loss": ([0, 1], [1.0, 0.5])}, "curve", "images", "loss")
    sections = {
        "": [paragraph("held_out_loss of *two* | a <b>"), note("few")],
        "Part": [
            heading("Sub"),
            table(["key", "a_b"], [["x|y", "1 ± 2\nbetter"], ["z", "-"]]),
            beside(plot, plot),
            folded("more", code("k: `v`", "recipe")),
            sheet(rows, "six", names=["real", "made"], columns=["p", "q", "r"], under=[[], ["1", "2", "3"]]),
        ],
    }
    text = markdown("a & b", sections, saved)
    assert text.startswith("# a & b\n\nheld_out_loss of \\*two\\* \\| a \\<b\\>\n\n> few\n\n## Part\n\n### Sub\n\n")
    assert "| key | a_b |\n| --- | --- |\n| x\\|y | 1 ± 2<br><small>better</small> |\n| z | - |\n" in text
    assert "<details><summary>more</summary>\n\n<details><summary>recipe</summary>\n\n```\nk: `v`\n```" in text
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == list(saved.files)
    assert [link[-3:] for link in links] == ["svg", "svg", "png", "png"]
    for link, row in zip(links[2:], rows):
        picture = np.asarray(Image.open(io.BytesIO(saved.files[link])))
        np.testing.assert_array_equal(picture, np.concatenate(row, axis=1))
    assert "<br><small>1 · 2 · 3</small>" in text
    assert "prefers-color-scheme:dark" in saved.files[links[0]].decode()
    html = page("a & b", sections)
    for said in ("better", "few", "Sub", "six", "k: `v`"):
        assert said in html


def test_a_block_of_code_may_hold_one():
    text = markdown("t", {"": [code("```\nx\n```")]}, Saved())
    assert "````\n```\nx\n```\n````" in text


def test_small_lines_of_a_cell_and_values_under_images_are_escaped(rows):
    reader = Reader(table(["h"], [["a\n<b>"]]).html)
    assert reader.cells == ["a"]
    assert "<small>&lt;b&gt;</small>" in table(["h"], [["a\n<b>"]]).html
    text = sheet(rows, "c", under=[["<1>", "2", "3"], []]).html
    assert text.count("under") == 3
    assert "&lt;1&gt;" in text


def test_only_pixels_that_are_enlarged_stay_sharp(rows):
    assert "pixels" not in sheet(rows, "c", size=7).html
    assert sheet(rows, "c", size=8).html.count('class="pixels"') == 6


def test_titles_longer_than_the_plot_are_broken():
    title, axis = "a title that says of what and by what and " * 2 + "is long", "what is measured, in what units"
    html = curves({"a": ([0, 1], [1, 2])}, title, "x", axis).html
    lines = re.findall(r"<text[^>]*>([^<]*)</text>", html)
    assert not {title, axis} & set(lines)
    assert max(len(line) for line in lines) <= 62
    for text in (title, axis):
        first = next(number for number, line in enumerate(lines) if line and text.startswith(line))
        assert " ".join(lines[first : first + 2]) == text
    assert len(lines) > 4


def test_a_logarithmic_axis_of_dots():
    values = {"a": (2.0, 0.1), "b": (200.0, None)}
    linear, log = (dots(values, "FD", "lower is better", log=log).html for log in (False, True))
    labels = [re.findall(r"<text[^>]*>(\d+)</text>", html) for html in (linear, log)]
    assert {"50", "100", "150"} <= set(labels[0])
    assert {"2", "5", "10", "20", "50", "100", "200"} <= set(labels[1])
    assert "150" not in labels[1]
    far = dots(values | {"c": (50_000.0, None)}, "FD", "lower is better", log=True).html  # labels would overlap
    labels = re.findall(r"<text[^>]*>([\d.]+)</text>", far)
    assert {"10", "100", "1000", "10000"} <= set(labels)
    assert not {"2", "20", "50", "500", "2000"} & set(labels)
