"""Reports of comparisons: as text, as tables in Markdown, as JSON that keeps its schema."""

import dataclasses
import json
import re
from html import unescape
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from markdown_it import MarkdownIt

from onnxforge.compare import Gate, Options, Sample, compare
from onnxforge.compare.document import SCHEMA, Document, as_dict, names, verdict
from onnxforge.compare.evidence import GateResult
from onnxforge.compare.render import as_markdown, as_text
from onnxforge.compare.tables import tables
from onnxforge.inspection import inspect
from onnxforge.numerics.text import compare_texts
from onnxforge.text import printable
from support import evidence, pairs

HOSTILE = [
    "a|b",
    r"a\|b",
    "a\\",
    "``a`",
    "<img src=x onerror=alert(1)>",
    "[a](https://b.c) ![a](https://b.c)",
    "https://b.c www.b.c @b $$x$$ :x:",
    "*a* _a_ ~~a~~",
    "a\r\n| b |\n# c",
    "\x1b[2J\u202e",
    " ",
    "",
]


def schema() -> dict[str, Any]:
    text = resources.files("onnxforge.compare").joinpath("evidence.schema.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def closed(node: Any) -> Any:
    """A schema that lets nothing in that it does not name."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    more = {"additionalProperties": False} if isinstance(node.get("properties"), dict) else {}
    return {key: closed(value) for key, value in node.items()} | more


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """What is found about a model in which a NaN was planted."""
    folder = tmp_path_factory.mktemp("models")
    first = pairs.saved(folder / "a.onnx", pairs.model())
    second = pairs.saved(folder / "b.onnx", pairs.planted()["nan"])
    options = Options(argmax={"logits": -1}, gates=[Gate("max-abs", 1)], localize=True)
    found = compare(first, second, [Sample("one", {"x": pairs.sample()})], options)
    return Document(found, (inspect(first), inspect(second)))


def test_real_evidence_keeps_the_schema(real: Document) -> None:
    strict = Draft202012Validator(closed(schema()))
    made = evidence.document()
    for document in (real, made, Document(made.comparison), Document(None, text=made.text)):
        text = json.dumps(as_dict(document), allow_nan=False)
        strict.validate(json.loads(text))


def test_the_schema_refuses_what_is_not_there() -> None:
    Draft202012Validator.check_schema(schema())
    assert schema()["properties"]["schema"]["const"] == SCHEMA
    assert schema()["$id"].endswith(f":{SCHEMA}")
    kept = Draft202012Validator(schema())
    written = as_dict(evidence.document())
    assert kept.is_valid({**written, "new": 1})
    for key in written:
        assert not kept.is_valid({k: v for k, v in written.items() if k != key})
    del written["comparison"]["outputs"][0]["overall"]["cosine"]
    assert not kept.is_valid(written)


def test_numbers_of_real_evidence_are_in_the_tables(real: Document) -> None:
    found = {table.title: table for table in tables(real, 99, samples=True)}
    output = real.comparison.outputs[1]
    assert found["Error per output"].rows[1][0] == "hidden"
    nan = "inf", "inf"
    assert found["Error per output"].rows[0][1:3] == nan
    assert found["Error per output"].rows[0][-2:] == ("1/4", "no")
    assert found["Error per output"].rows[1][1] == f"{output.overall.max_abs:.3g}"
    low, high = pairs.logits().min(), pairs.logits().max()
    assert found["Ranges"].rows[0][2].split(" -> ")[0] == f"{low:.4g}"
    assert found["Ranges"].rows[0][3].split(" -> ")[0] == f"{high:.4g}"
    assert found["Ranges"].rows[0][4:] == ("0 -> 1", "0 -> 0", "1")
    assert [row[2] for row in found["Gates"].rows] == ["passed", "failed"]
    assert ("float", "3", "49,152", "100.0 %", "4", "50,176", "100.0 %") in [
        *found["Weights by type"].rows
    ]
    assert found["Weights by operator"].rows == [
        ("MatMul", "49,152", "float 100.0 %", "49,152", "float 100.0 %"),
        ("Add", "0", "-", "1,024", "float 100.0 %"),
    ]
    assert found["Operators"].rows == [
        ("Add", "1", "2"),
        ("Identity", "1", "0"),
        ("unchanged in number", "4", "4"),
    ]
    assert found["Models"].rows[0][:2] == ("reference", "a.onnx")
    assert found["Models"].note.startswith("Samples: 1;")
    assert "Transcripts" not in found
    assert "Error per layer" in found


def test_text_is_aligned_and_complete() -> None:
    text = as_text(evidence.document())
    lines = text.splitlines()
    assert lines[0] == "failed: the candidate did not run to the end"
    assert "failure of the candidate: logits" in lines
    assert "outputs of the candidate alone (2): logits, logits" in lines
    assert any(line.split() == ["side", "file", "bytes"] for line in lines)
    start = lines.index("Transcripts") + 1
    assert lines[start : start + 4] == [
        "clip     byte-exact        WER        CER  WER normalized  CER normalized",
        "all      0/2           25.00 %    12.50 %          0.00 %          0.00 %",
        "silence  no          undefined  undefined       undefined       undefined",
        "logits   no            25.00 %    12.50 %          0.00 %          0.00 %",
    ]


def test_what_is_wrong_is_not_cut_off() -> None:
    clips = {str(i): "abcd" for i in range(40)}
    found = compare_texts(clips, {**clips, "30": "abcx", "35": "wxyz"})
    (transcripts,) = tables(Document(None, text=found), 20)
    assert [row[:2] for row in transcripts.rows[:4]] == [
        ("all", "38/40"),
        ("35", "no"),
        ("30", "no"),
        ("0", "yes"),
    ]
    decoded = evidence.document().decode
    clips = dict(reversed(decoded.clips.items()))
    turned = Document(None, decode=dataclasses.replace(decoded, clips=clips))
    assert [row[0] for row in tables(turned, 9)[-1].rows] == ["all", "logits", "b"]


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (("a/m.onnx", "b/m.onnx"), ["a/m.onnx", "b/m.onnx"]),
        (("{}/a/m.onnx", "b/m.onnx"), ["a/m.onnx", "b/m.onnx"]),
        (("{}/m.onnx", "t.onnx"), ["m.onnx", "t.onnx"]),
        (("m.onnx", "m.onnx"), ["m.onnx", "m.onnx"]),
    ],
)
def test_folders_above_both_models_are_not_told(
    paths: tuple[str, str], shown: list[str]
) -> None:
    found = evidence.document().comparison
    sides = [
        dataclasses.replace(found.reference, path=path.format(Path.cwd())) for path in paths
    ]
    named = dataclasses.replace(found, reference=sides[0], candidate=sides[1])
    assert [Path(name).as_posix() for name in names(named)] == shown


def test_texts_alone_make_a_report() -> None:
    text = as_text(Document(None, text=evidence.document().text))
    assert text.splitlines()[:3] == ["compared without models", "", "Transcripts"]


def test_decoding_alone_makes_a_report() -> None:
    found = evidence.document().decode
    by_title = {table.title: table for table in tables(Document(None, decode=found), 9)}
    assert list(by_title) == ["Error per output", "Choices (argmax)", "Decoding"]
    assert by_title["Decoding"].rows == [
        ("all", "3", "1", "1/2 prompts", "-", "-", "-", "-"),
        ("logits", "3", "1", "1", "3", "3", "-", "1 x 2 at 1"),
        ("b", "0", "0", "-", "1", "1", "-", "-"),
    ]
    assert by_title["Error per output"].rows[0][0] == "decoding, all steps"


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ((), "compared without gates"),
        ((True, True), "passed: 2 of 2 gates hold"),
        ((True, False), "failed: 1 of 2 gates hold"),
    ],
)
def test_the_verdict(gates: tuple[bool, ...], expected: str) -> None:
    found = evidence.document().comparison
    made = tuple(GateResult("--max-abs 1", "y", passed, 0.5) for passed in gates)
    ran = dataclasses.replace(found, candidate=found.reference, gates=made)
    assert verdict(Document(ran)) == expected


def test_a_long_table_says_that_it_is_cut() -> None:
    found = evidence.document().comparison
    many = dataclasses.replace(found, outputs=found.outputs * 9)
    table = tables(Document(many), 20)[1]
    assert len(table.rows) == 20
    assert table.note.startswith("20 of 27 rows; JSON has all. ")


def shown(text: str) -> tuple[list[int], set[str]]:
    """How many cells each row of a rendered document has, and its elements."""
    html = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    rows = [row.count("<t") for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)]
    return rows, set(re.findall(r"<(\w+)", html))


@pytest.mark.parametrize("name", HOSTILE)
def test_foreign_names_stay_cells_in_markdown(name: str) -> None:
    plain = shown(as_markdown(evidence.document()))
    rows, elements = shown(as_markdown(evidence.document(name or "logits")))
    assert rows == plain[0]
    assert elements - plain[1] <= {"code"}


@given(st.text())
def test_markdown_gives_foreign_text_back(name: str) -> None:
    found = evidence.document().comparison
    named = dataclasses.replace(found, notes=(name,))
    text = as_markdown(Document(named))
    line = next(line for line in text.splitlines() if line.startswith("- note: "))
    html = MarkdownIt("gfm-like", {"linkify": False}).render(line)
    got = re.fullmatch(r"<ul>\n<li>note: ?(?:<code>(.*)</code>)?</li>\n</ul>\n", html)
    assert got
    assert unescape(got[1] or "") == printable(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_foreign_names_stay_in_their_line_of_text(name: str) -> None:
    lines = as_text(evidence.document(name or "logits")).split("\n")
    assert len(lines) == len(as_text(evidence.document()).split("\n"))
    assert all(map(str.isprintable, lines))
