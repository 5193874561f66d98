"""Recipes: what they may say, and at which line they are wrong."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxforge.bundle.reading import read_recipe
from onnxforge.bundle.recipe import Targets
from onnxforge.bundle.toml import positions
from onnxforge.compare.gates import Gate
from onnxforge.errors import OnnxforgeError, SpecError
from onnxforge.lint.config import configured
from support.bundles import FULL, written

ODD = '''\
a = 1
"b c" = { d = [1, 2], e.f = true }  # a comment = 3
text = """
g = 1
[h]
"""
list = [
  { k = 1 },
  # l = 2
  { k = 2 },
]

[m]
n.o = 1

[[p]]
q = 1
[p.r]
s = 1
[[p]]
  q = 2
[[p.t]]
u = 1
[[p.t]]
u = 2
'''


def test_lines_of_keys() -> None:
    assert tomllib.loads(ODD)
    assert positions(ODD) == {
        ("a",): 1,
        ("b c",): 2,
        ("b c", "d"): 2,
        ("b c", "d", 0): 2,
        ("b c", "d", 1): 2,
        ("b c", "e"): 2,
        ("b c", "e", "f"): 2,
        ("text",): 3,
        ("list",): 7,
        ("list", 0): 7,
        ("list", 0, "k"): 7,
        ("list", 1): 7,
        ("list", 1, "k"): 7,
        ("m",): 13,
        ("m", "n"): 14,
        ("m", "n", "o"): 14,
        ("p",): 16,
        ("p", 0): 16,
        ("p", 0, "q"): 17,
        ("p", 0, "r"): 18,
        ("p", 0, "r", "s"): 19,
        ("p", 1): 20,
        ("p", 1, "q"): 21,
        ("p", 1, "t"): 22,
        ("p", 1, "t", 0): 22,
        ("p", 1, "t", 0, "u"): 23,
        ("p", 1, "t", 1): 24,
        ("p", 1, "t", 1, "u"): 25,
    }


WORDS = st.text("abc", min_size=1, max_size=3)
VALUES = ["1", "'x = 1'", "[1,\n2]", "'''\n[z]\n'''", "{ i = 1 }", '"#"']


@given(
    st.dictionaries(
        WORDS, st.lists(st.tuples(WORDS, st.sampled_from(VALUES)), unique_by=lambda x: x[0])
    ),
    st.lists(st.sampled_from(["", "# c = 1", "  "]), max_size=3),
)
def test_every_key_stands_where_it_was_written(
    tables: dict[str, list[tuple[str, str]]], between: list[str]
) -> None:
    lines: list[str] = []
    expected: dict[tuple[str | int, ...], int] = {}
    for name, entries in tables.items():
        lines += [*between, f"[{name}]"]
        expected[name,] = len(lines)
        for key, value in entries:
            expected[name, key] = len(lines) + len(between) + 1
            lines += [*between, *f"{key} = {value}".split("\n")]
    text = "\n".join(lines)
    found = positions(text)
    assert {path: line for path, line in found.items() if len(path) <= 2} == expected
    assert tomllib.loads(text).keys() == tables.keys()


def test_a_recipe_in_full(tmp_path: Path) -> None:
    recipe = read_recipe(
        written(
            tmp_path,
            """\
name = "speech"
output = "dist"
work = "cache"
layout = "{graph}-model.{tier}.onnx"
license = "MIT"
md5 = true
golden = "test/fixtures"
statistics = "ranges"
files = ["a/tokenizer.json", { source = "b", path = "c/d", link = true }]

[run]
providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
threads = 2
timeout = 60

[targets]
onnxruntime = "1.20"
providers = ["CPUExecutionProvider"]
browser = ["flat"]

[graphs.encoder]
source = "e.onnx"
golden = 2
parity = { data = ["x", "y.npz"], random = 3, seed = 1, argmax = { logits = -1 }, top = 3 }
calibration.data = "w.wav"
calibration.preprocessor = "mel.onnx"
calibration.seconds = 30
calibration.op-types = ["Conv"]
calibration.rows = 8

[graphs.embed]
source = "t.onnx"
parity = { random = 2, sizes = { time = 7 }, cache = "filled" }

[tiers.flat]
layout = "{graph}.onnx"
weights = "inline"
targets.providers = "CUDAExecutionProvider"

[tiers.int8]
pipeline = "dynamic-int8"
gates = { max-abs = { logits = 1e-3, 'a b' = 2 }, min-sqnr = 40 }
graphs.embed = { pipeline = "gather-int8", gates = { min-cosine = 0.9 } }
""",
        )
    )
    assert (recipe.name, recipe.license, recipe.md5) == ("speech", "MIT", True)
    assert (recipe.output, recipe.work) == (tmp_path / "dist", tmp_path / "cache/speech")
    assert recipe.golden == PurePosixPath("test/fixtures")
    assert [(e.source.name, str(e.path), e.link) for e in recipe.extras] == [
        ("tokenizer.json", "tokenizer.json", False),
        ("b", "c/d", True),
    ]
    assert (recipe.setup.threads, recipe.setup.timeout) == (2, 60.0)
    assert recipe.targets == Targets(("1.20",), ("CPUExecutionProvider",))
    assert recipe.browser == ("flat",)
    encoder, embed = recipe.graphs.values()
    assert encoder.parity is not None
    assert encoder.parity.data.paths == (tmp_path / "x", tmp_path / "y.npz")
    assert (encoder.parity.data.count, encoder.parity.top) == (3, 3)
    assert encoder.parity.argmax == {"logits": -1}
    assert encoder.calibration is not None
    assert encoder.calibration.data.preprocessor == tmp_path / "mel.onnx"
    assert (encoder.calibration.op_types, encoder.calibration.rows) == (("Conv",), 8)
    assert embed.parity is not None
    assert (embed.parity.data.sizes, embed.parity.data.cache) == ({"time": 7}, "filled")
    assert str(recipe.statistics_of(encoder)) == "ranges/encoder.safetensors"
    flat, int8 = recipe.tiers.values()
    assert flat.targets == Targets(("1.20",), ("CUDAExecutionProvider",))
    assert int8.targets == recipe.targets
    assert str(flat.graphs["embed"].path) == "embed.onnx"
    assert str(int8.graphs["embed"].path) == "embed-model.int8.onnx"
    assert [step.name for step in int8.graphs["embed"].passes] == ["gather-int8"]
    assert [step.name for step in int8.graphs["encoder"].passes] == ["dynamic-int8"]
    assert int8.graphs["embed"].gates == (Gate("min-cosine", 0.9),)
    assert int8.graphs["encoder"].gates == (
        Gate("max-abs", 1e-3, "logits"),
        Gate("max-abs", 2, "a b"),
        Gate("min-sqnr", 40),
    )


def test_a_table_in_pyproject(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(
        '[project]\nname = "x"\n[tool.onnxforge.bundle]\nname = "y"\n'
        'graphs.a.source = "a.onnx"\ntiers.fp32.pipelin = ""\n'
    )
    with pytest.raises(SpecError) as caught:
        read_recipe(path)
    assert str(caught.value) == (
        f"{path}:6: tool.onnxforge.bundle.tiers.fp32.pipelin: there is no such key;"
        " did you mean 'pipeline'?"
    )
    path.write_text(path.read_text().replace("pipelin", "pipeline"))
    assert read_recipe(path).name == "y"
    path.write_text("[tool]\n")
    with pytest.raises(SpecError, match=r"holds no table \[tool\.onnxforge\.bundle\]"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "pair"\n', "", "1: lacks the key 'name'"),
        ('"pair"', '"a/b"', "1: name: 'a/b' is no name: letters, digits and ._- make one"),
        ('"pair"', "3", "1: name: wanted text, not 3"),
        ('"out"', "[1]", "2: output: wanted text, not a list"),
        ('"Apache-2.0"', "[", "4: Invalid value"),
        ('license = "Apache', '\nlicence = "Apache', "4: licence: there is no such key; did "),
        ('["notes.txt"]', "[3]", "4: files.0: wanted a table, not 3"),
        ('["notes.txt"]', '"x"', "4: files: wanted a list, not 'x'"),
        ('["notes.txt"]', '[{ path = "a" }]', "4: files.0: lacks the key 'source'"),
        ('["notes.txt"]', '["b/metadata.json"]', "4: files.0: metadata.json is the place of "),
        ('["notes.txt"]', '["a", "b/A"]', "4: files.1: A is the place of a"),
        ('["notes.txt"]', '[{source="a",path="../b"}]', "4: files.0.path: '../b' is no place"),
        ('["notes.txt"]', r'["a\n"]', r"4: files.0.path: 'a\n' is no place"),
        ('["notes.txt"]', r'["a\u0000"]', r"4: files.0.source: 'a\x00' is no path"),
        (
            '["notes.txt"]',
            '[{source="a",path="fp32"}]',
            "4: files.0: fp32 is both a file and a folder, of fp32/one",
        ),
        (
            '["notes.txt"]',
            '[{source="a",path="fp32/one.onnx_data"}]',
            "4: files.0: fp32/one.onnx_data is the place of fp32/one",
        ),
        (
            '["notes.txt"]',
            '[{source="a",path="golden/one/0/inputs/x.npy"}]',
            "4: files.0: golden/one/0/inputs/x.npy is both a file and a folder, of golden",
        ),
        ("[tiers.fp32]", "[tiers.'PARITY.md']", "15: tiers.PARITY.md: PARITY.md/one.onnx is"),
        ('"out"', r'"a\u0000"', r"2: output: 'a\x00' is no path"),
        ("min-sqnr = 40", f"min-sqnr = {'9' * 400}", "19: tiers.fp16w.graphs.one.gates.min-"),
        ("golden = 1", "golden = -1", "8: graphs.one.golden: wanted at least 0, not -1"),
        ("golden = 1", "golden = true", "8: graphs.one.golden: wanted a whole number, not "),
        ("parity.data", "parity.dat", "10: graphs.one.parity.dat: there is no such key"),
        ('parity.data = "samples"', "parity.random = 0", "10: graphs.one.parity: has no sam"),
        ('parity.data = "samples"', "parity.cache = 'x'", "10: graphs.one.parity.cache: wan"),
        (
            'parity.data = "samples"',
            "parity = {random = 1, seconds = 0}",
            "10: graphs.one.parity: windows of 0.0 s: wanted at least one value in each",
        ),
        ('parity.data = "samples"', "parity.argmax.x = 'y'", "10: graphs.one.parity.argmax.x"),
        ('parity.data = "samples"', "parity.top = 0", "10: graphs.one.parity.top: wanted 1"),
        ('parity.data = "samples"\n', "", "8: graphs.one.golden: golden values are made of"),
        ("[graphs.two]", "[graphs.'a/b']", "12: graphs.a/b: 'a/b' is no name"),
        ('source = "source/two', 'sourc = "source/two', "12: graphs.two: lacks the key 'sou"),
        ("[tiers.fp32]\n", "[tiers.fp32]\nweights = 'x'\n", "16: tiers.fp32.weights: wanted"),
        (
            "[tiers.fp32]\n",
            "[tiers.fp32]\nlayout = '{x}/{graph}.onnx'\n",
            "16: tiers.fp32.layout: '{x}' stands for nothing: {tier} and {graph} do",
        ),
        ("[tiers.fp32]\n", "[tiers.fp32]\nlayout = '{graph}'\n", "16: tiers.fp32.layout: wan"),
        ("[tiers.fp32]\n", "[tiers.fp32]\nlayout = 'fp16w/{graph}.onnx'\n", "18: tiers.fp16w"),
        ("[tiers.fp32]\n", "[tiers.fp32]\nlayout = '/{graph}.onnx'\n", "16: tiers.fp32.layo"),
        (
            "[tiers.fp32]\n",
            "[tiers.fp32]\nlayout = '{graph}/m.onnx'\nweights = 'shared'\n",
            "17: tiers.fp32.weights: graphs that share data go into one folder",
        ),
        (
            "[tiers.fp32]\n",
            "[tiers.fp32]\nlayout = '../source/{graph}.onnx'\n",
            "16: tiers.fp32.layout: '../source/{graph}.onnx' is no place in the bundle",
        ),
        ('"fp16w"\n', '"fp16x"\n', "18: tiers.fp16w.pipeline: there is no pass 'fp16x'"),
        (
            '"fp16w"\n',
            '"smoothquant{stats=@calibration}"\n',
            "18: tiers.fp16w.pipeline: 'two'",
        ),
        ("graphs.one.gates", "gates", "19: tiers.fp16w.gates: 'two' has no parity, which "),
        (
            "graphs.one.gates",
            "graphs.on.gates",
            "19: tiers.fp16w.graphs.on: there is no such ",
        ),
        ("min-sqnr = 40", "min-snr = 40", "19: tiers.fp16w.graphs.one.gates.min-snr: there"),
        ("min-sqnr = 40", "min-sqnr = 'x'", "19: tiers.fp16w.graphs.one.gates.min-sqnr: wan"),
        (
            "[tiers",
            "[targets]\nonnxruntime = ['x']\n[tiers",
            "16: targets.onnxruntime: 'x' is",
        ),
        (
            "[tiers",
            "[targets]\nbrowser = 'fp33'\n[tiers",
            "16: targets.browser: there is no t",
        ),
        (
            "graphs.one.gates",
            "targets.browser = 1\ngraphs.one.gates",
            "19: tiers.fp16w.targets.browser: there is no such key",
        ),
        ("[graphs.one]", "statistics = '..'\n[graphs.one]", "6: statistics: '..' is no "),
        ("[tiers", "[run]\nthreads = -1\n[tiers", "16: run.threads: wanted at least 0"),
        ("[tiers", "[run]\ntimeout = 0\n[tiers", "15: run: timeout: wanted a positive number"),
    ],
)
def test_what_is_wrong_is_told_at_its_line(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in FULL
    path = written(tmp_path, FULL.replace(old, new, 1))
    with pytest.raises(SpecError) as caught:
        read_recipe(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:{said}"), text
    assert len(re.findall("\n", text)) in (0, 2), "one line, and a caret for a pipeline"


@pytest.mark.parametrize("missing", ["graphs", "tiers"])
def test_without_graphs_or_tiers_there_is_no_recipe(tmp_path: Path, missing: str) -> None:
    lines = [line for line in FULL.splitlines() if not line.startswith(f"[{missing}")]
    text = "\n".join(lines[:5] if missing == "graphs" else FULL.split("[tiers")[:1])
    path = written(tmp_path, text)
    with pytest.raises(SpecError, match=rf":1: lacks {missing}: \[{missing}\.NAME\]"):
        read_recipe(path)


def test_lint_is_configured_in_the_same_file(tmp_path: Path) -> None:
    path = written(tmp_path, f'{FULL}\n[lint]\nignore = ["no-kernel"]\n')
    assert read_recipe(path).name == "pair"
    assert configured(path, {}).ignore == ("no-kernel",)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000 + "]" * 3000])
def test_digits_and_brackets_without_end(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"md5 = {value}\n{FULL}")
    with pytest.raises(SpecError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(OnnxforgeError, match=r"onnxforge\.toml: "):
        configured(path, {})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.toml: No such file"):
        read_recipe(tmp_path / "none.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b"name = '\xe9'\n")
    with pytest.raises(SpecError, match=r"latin\.toml: no text in UTF-8"):
        read_recipe(path)


def test_a_tier_would_replace_its_source(tmp_path: Path) -> None:
    text = FULL.replace('"out"', '"."').replace("source/", "fp16w/")
    with pytest.raises(SpecError, match=r"tiers\.fp16w: fp16w/one\.onnx would replace its"):
        read_recipe(written(tmp_path, text))
