"""The report's pieces: what goes in comes out, escaped and without anything from outside."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rae.evaluation.report import Figure, beside, code, curves, figures_table, page, sheet


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
    reader = Reader(sheet(rows, "six", names=["real", "made"], columns=["0", "1", "2"]))
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
    plot = curves({"loss": ([0, 1, 2], [3.0, 2.0, 1.0]), "held-out": ([0, 2], [3.0, 2.0])}, "curve", "images", "loss")
    assert "currentColor" in plot
    assert "#010203" not in plot
    assert {"loss", "held-out", "images", "curve"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", plot))


def test_a_plot_of_many_lines_shows_all_that_have_points():
    series = {f"line {i}": ([0, 1], [i, i + 1]) for i in range(6)} | {"nothing yet": ([], [])}
    plot = curves(series, "curve", "images", "loss")
    assert {text for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot) if "line" in text} == {*list(series)[:6]}
    assert "nothing yet" not in plot
    assert "curve" in curves({"nothing yet": ([], [])}, "curve", "images", "loss")


def test_a_figure_without_a_protocol_is_refused():
    with pytest.raises(ValueError, match="protocol"):
        Figure(name="rFID", value="0.5", protocol="")
    figure = Figure(name="PSNR", value="21.3 dB", protocol="180 held-out images, 8-bit")
    assert Reader(figures_table([figure])).cells == ["PSNR", "21.3 dB", "180 held-out images, 8-bit"]
