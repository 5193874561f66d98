"""The page about a comparison: one file, safe, the same each time, with its plots."""

import dataclasses
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from onnxforge.compare.document import Document
from onnxforge.compare.evidence import LayerEvidence, Localization
from onnxforge.compare.page import as_html
from onnxforge.compare.plots import layer_plot, output_plot, range_plot
from onnxforge.errors import OnnxforgeError
from onnxforge.numerics.metrics import compare
from support import evidence

HOSTILE = "</td></table><script>alert(1)</script>\"' onload=x & $x_{ \x1b[2J\u202e \u6f22 %s"
TESTS = Path(__file__).parents[1]
VOID = {"meta", "path", "rect", "use"}


class Reader(HTMLParser):
    """Elements, their attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def page() -> str:
    return as_html(evidence.document())


@pytest.fixture(scope="module")
def hostile() -> str:
    return as_html(evidence.document(HOSTILE))


def values(reader: Reader, name: str) -> list[str]:
    return [value for key, value in reader.attributes if key == name]


def test_the_page_has_every_section(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Gates",
        "Error per output",
        "Largest error of each output",
        "Choices (argmax)",
        "Error per sample",
        "Error per layer",
        "Ranges",
        "Transcripts",
        "Decoding",
        "Weights by type",
        "Weights by operator",
        "Operators",
        "Models",
        "Files",
    ]
    assert reader.elements["caption"] == reader.elements["table"] == len(headings)
    assert reader.elements["svg"] == values(reader, "role").count("img") == 5
    assert "failed: the candidate did not run to the end" in reader.words
    for label in ("p99", "float16 ends", "entered", "SQNR of the worst output, dB"):
        assert label in reader.words


def test_the_page_loads_nothing_and_runs_nothing(hostile: str) -> None:
    reader = Reader(hostile)
    assert reader.open == []
    assert not reader.elements.keys() & {"script", "link", "img", "iframe", "object", "base"}
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert not {"src", "srcset", "action"} & {name for name, _ in reader.attributes}
    links = values(reader, "href") + values(reader, "xlink:href")
    assert links
    assert all(link.startswith("#") for link in links)
    assert set(re.findall(r"url\((.)", hostile)) <= {"#"}
    assert "@import" not in hostile
    assert "default-src 'none'" in hostile


def test_references_in_plots_are_unique_and_lead_somewhere(page: str) -> None:
    reader = Reader(page)
    ids = values(reader, "id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in values(reader, "xlink:href")} <= set(ids)


def test_plots_take_the_colours_of_the_page(page: str) -> None:
    drawn = "".join(re.findall(r"<svg .*?</svg>", page, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []
    used = set(re.findall(r"var\((--\w+)\)", drawn))
    light, dark = (page.split("prefers-color-scheme: dark")[i] for i in (0, 1))
    assert used
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_foreign_text_is_shown_as_it_is(hostile: str) -> None:
    words = Reader(hostile).words
    assert HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e") in words


def test_equal_evidence_gives_equal_pages(page: str) -> None:
    make = "from support import evidence; from onnxforge.compare.page import as_html; "
    command = [sys.executable, "-c", make + "print(as_html(evidence.document()))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS)
    assert done.stdout == f"{page}\n"


def test_what_cannot_be_drawn_is_left_out() -> None:
    found = evidence.document().comparison
    layers = found.localization
    assert layers is not None
    bare = dataclasses.replace(
        found,
        outputs=(evidence.output("same", 0), evidence.output("broken", math.nan)),
        localization=dataclasses.replace(layers, layers=()),
    )
    assert "<svg" not in as_html(Document(bare))
    assert "<svg" not in as_html(Document(None, text=evidence.document().text))


@pytest.mark.parametrize("value", [5e-324, 2e-99, 1.0, 5e98, 1.7e308])
def test_any_error_can_be_drawn(value: float) -> None:
    measured = compare(np.full(9, value), np.zeros(9))
    outputs = [dataclasses.replace(evidence.output("y", 0.1), overall=measured)]
    layers = (LayerEvidence("y", "y", "Add", 0, measured, measured),)
    found = Localization("a", 1, layers, (), (), (), ())
    assert bool(output_plot(outputs)) == (1e-99 < value < 1e99)
    assert bool(range_plot(found)) == (value < 1e99)
    assert bool(layer_plot(found)) == (1e-99 < value < 1e99)


def test_a_missing_matplotlib_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OnnxforgeError, match=r"pip install 'onnxforge\[html\]'"):
        as_html(evidence.document())
