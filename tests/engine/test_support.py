"""What loads where: told from tables, held to what releases really did."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, parser

from onnxforge import model_io
from onnxforge.cli import main
from onnxforge.errors import OnnxforgeError, SpecError
from onnxforge.runtime import kernels
from onnxforge.runtime.ceilings import ceiling
from onnxforge.runtime.support import Support, supported, versions
from onnxforge.runtime.uses import uses
from support import fixtures, unchanged
from support.measured import MEASURED, RELEASES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import _loads
import predicted

INSTALLED = ceiling(onnxruntime.__version__).release


def module(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "fixtures" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"onnxforge_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


FORMS = dict(module("forms").forms())


def answers(text: str, *asked: str, provider: kernels.Provider = "cpu") -> list[Support]:
    model = model_io.from_proto(parser.parse_model(text))
    return supported(model, asked or None, provider)


def one(text: str, release: str, provider: kernels.Provider = "cpu") -> Support:
    return answers(text, release, provider=provider)[0]


def written(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """A form, and its inputs, on disk."""
    form, own = FORMS[name], folder / name
    own.mkdir()
    for location, content in form.files.items():
        (own / location).write_bytes(content)
    (own / "model.onnx").write_bytes(form.model.SerializeToString())
    inputs = [own / f"{i}.npz" for i in range(len(form.samples))]
    for path, sample in zip(inputs, form.samples, strict=True):
        np.savez(path, **sample)
    return own / "model.onnx", inputs


# Forms, on every release.


# Said not to load although it does; the other way round nothing is allowed.
CAUTIOUS = {("outside_empty", "1.31")}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_told_as_every_release_took_it(name: str, tmp_path: Path) -> None:
    found = supported(model_io.load(written(name, tmp_path)[0], editable=False), RELEASES)
    wrong = {
        (name, release)
        for release, letter, answer in zip(RELEASES, MEASURED[name], found, strict=True)
        if answer.loads != (letter == ".")
    }
    assert wrong <= CAUTIOUS


def test_what_fails_when_it_runs_is_told_apart(tmp_path: Path) -> None:
    path = written("conv_s8_each", tmp_path)[0]
    old, new = supported(model_io.load(path, editable=False), ["1.23", "1.24"])
    assert (old.verdict, new.verdict) == ("does not load", "does not run")
    assert [reason.kind for reason in old.reasons] == ["kernel", "form"]
    assert old.reasons[0].text == "ConvInteger 17 of uint8, int8, uint8, int8: no kernel"
    assert new.reasons[0].node == "/y/ConvInteger"


# The installed release, as it is tried here.


def test_the_installed_release_does_what_is_told_of_it(tmp_path: Path) -> None:
    orders = [written(name, tmp_path) for name in FORMS]
    orders += [(fixtures.built(name), []) for name in fixtures.names()]
    backend = list(unchanged.backend_models(tmp_path))[::6]
    orders += [(path, []) for name, path in backend if not _is_local(name)]
    found = {}
    for path, _ in orders:
        try:
            model = model_io.load(path, editable=False)
        except OnnxforgeError:  # what onnx_ir cannot hold
            continue
        found[path] = supported(model, [INSTALLED])[0]
    assert len(found) > 350
    failures = dict(
        zip(
            [path for path, _ in orders],
            _loads.failures(Path(sys.executable), orders),
            strict=True,
        )
    )
    told = {path: predicted.verdict(answer, failures[path]) for path, answer in found.items()}
    assert [path for path, word in told.items() if word == "wrong: loads"] == []
    assert sum(word != "right" for word in told.values()) <= 4  # too careful


def _is_local(name: str) -> bool:
    return any(word in name for word in predicted.MACHINE)


def test_a_wrong_prediction_would_be_seen() -> None:
    yes = Support("1.17", "cpu", ())
    assert predicted.verdict(yes, None) == "right"
    assert predicted.verdict(yes, ("load", "no kernel")) == "wrong: loads"
    assert predicted.verdict(yes, ("crash", "SIGSEGV")) == "wrong: loads"
    no = one(MATMUL.format(kind="bfloat16", opset=13), "1.17")
    assert predicted.verdict(no, None) == "wrong: does not load"
    assert predicted.verdict(no, ("load", "no kernel")) == "right"


# Operators, types, graphs.

MATMUL = """<ir_version: 8, opset_import: ["" : {opset}]>
g ({kind}[N,4] x, {kind}[4,4] w) => ({kind}[N,4] y) {{ y = MatMul(x, w) }}"""


def test_without_a_kernel_bfloat16_does_not_load_and_float16_is_cast() -> None:
    told = [answer.loads for answer in answers(MATMUL.format(kind="bfloat16", opset=13))]
    assert told == [False] * len(kernels.releases())
    told = [answer.loads for answer in answers(MATMUL.format(kind="float16", opset=13))]
    assert told == [True] * len(kernels.releases())


def test_versions_are_the_first_reasons() -> None:
    text = """<ir_version: 13, opset_import: ["" : 25, "ai.onnx.ml" : 5, "mine" : 7]>
    g (float[N] x) => (float[N] y) { y = Relu(x) }"""
    old, new = answers(text, "1.17", "1.24")
    assert [(reason.kind, reason.text) for reason in old.reasons] == [
        ("ir", "IR version 13, at most 9"),
        ("opset", "ai.onnx 25, at most 20"),
        ("opset", "ai.onnx.ml 5, at most 4"),
    ]
    assert new.loads


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = NoSuch(x)", "NoSuch 17: no such operator"),
        ("y = mine.Other(x)", "mine::Other 1: no such operator"),
        ("y = Gelu(x)", "Gelu 17: no such operator"),
        (
            "h = Cast <to=16> (x) a = Neg(h) y = Cast <to=1> (a)",
            "Neg 17 of bfloat16: no kernel",
        ),
    ],
)
def test_what_no_release_has(body: str, reason: str) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>'
    text += f"g (float[N] x) => (float[N] y) {{ {body} }}"
    for answer in answers(text):
        assert [found.text for found in answer.reasons] == [reason]


NESTED = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[N] x, bool flag) => (float[N] y) {
  h = Cast <to=16> (x)
  b = If(flag) <
    then_branch = t () => (bfloat16[N] p) {
      three = Constant <value = int64 {3}> ()
      p = Loop(three, , h) <body = l (int64 i, bool go, s) => (bool go2, s2) {
        go2 = Identity(go) s2 = local.inner <kind=16> (s) }> },
    else_branch = e () => (bfloat16[N] q) { q = Identity(h) }>
  y = Cast <to=1> (b)
}
<domain: "local", opset_import: ["" : 17]>
inner <kind> (u) => (v) {
  f = Cast <to=1> (u)  g = Exp(f)  k = Cast <to: int = @kind> (g)  v = Exp(k) }"""


def test_types_are_found_in_bodies_and_in_functions_as_they_are_called() -> None:
    model = model_io.from_proto(parser.parse_model(NESTED))
    types = {use.where: (use.inputs, use.outputs) for use in uses(model)}
    assert types["local::inner/Exp#1"] == (("float",), ("float",))
    assert types["local::inner/Exp#3"] == (("bfloat16",), ("bfloat16",))
    assert types["Cast#2"] == (("bfloat16",), ("float",))
    (answer,) = supported(model, ["1.20"])
    assert [(r.node, r.text) for r in answer.reasons] == [
        ("local::inner/Exp#3", "Exp 17 of bfloat16: no kernel")
    ]


def test_nodes_in_any_order_give_the_same_types() -> None:
    path = fixtures.built("unsorted")
    model = model_io.load(path, editable=False)
    assert not [use for use in uses(model) if None in (*use.inputs, *use.outputs)]


@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_every_type_of_every_fixture_is_known(name: str) -> None:
    model = model_io.load(fixtures.built(name), editable=False)
    unknown = [use.where for use in uses(model) if None in (*use.inputs, *use.outputs)]
    assert unknown == []


def test_types_behind_an_operator_that_nobody_knows_are_told_to_be_unknown() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    g (float[N] x) => (float[N] y) { a = mine.Op(x) b = Neg(a) y = Cast <to=1> (b) }"""
    (answer,) = answers(text, "1.20")
    assert [reason.kind for reason in answer.reasons] == ["kernel", "unknown", "unknown"]
    assert answer.reasons[1].text == "Neg 17 of ?: the tables do not tell"


# Other providers.


def test_cuda_is_told_from_documents_and_unknown_beyond_them() -> None:
    text = MATMUL.format(kind="bfloat16", opset=20)
    last = kernels.documented()[-1]
    assert one(text, last, "cuda").loads
    assert one(text, last, "cuda").documented
    newest = one(text, kernels.releases()[-1], "cuda")
    assert (newest.verdict, newest.loads) == ("unknown", False)
    assert one(MATMUL.format(kind="float", opset=20), newest.version, "cuda").loads
    mean = """<ir_version: 9, opset_import: ["" : 20]>
    g (bfloat16[N,4] x) => (bfloat16[N] y) { y = ReduceMean <keepdims=0> (x) }"""
    assert one(mean, last, "cuda").verdict == "does not load"


def test_browsers_take_no_bfloat16_and_no_data_files_in_bodies() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }"""
    assert one(text, "1.21", "web").loads
    assert one(text, "1.22", "web").verdict == "does not load"
    assert one(text, "1.22", "cpu").loads


# The tables.


def test_a_kernel_without_an_end_takes_its_own_version_only() -> None:
    asked = ("", "Acos")
    assert kernels.has_kernel("1.17", "cpu", (*asked, 20), ["float"])
    assert kernels.has_kernel("1.32", "cpu", (*asked, 22), ["float"])
    assert kernels.has_kernel("1.17", "cpu", (*asked, 22), ["float"]) is False


def test_types_that_are_not_known_make_answers_unknown() -> None:
    operator = ("", "ConvInteger", 20)
    assert kernels.has_kernel("1.17", "cpu", operator, ["uint8", None]) is None
    assert kernels.has_kernel("1.17", "cpu", operator, ["uint8", "int8"]) is False
    assert kernels.has_kernel("1.24", "cpu", operator, ["uint8", "int8"])
    assert kernels.has_kernel("1.17", "cpu", ("mine", "Op", 1), ["float"]) is False
    assert kernels.has_kernel("1.32", "cuda", operator, ["uint8", "int8"]) is None


def test_the_table_holds_the_kernels_of_the_installed_release() -> None:
    if ".".join(onnxruntime.__version__.split(".")[:2]) != INSTALLED:
        pytest.skip("newer than the tables: make kernels")
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    for kernel in state.get_all_opkernel_def():
        since = kernel.version_range[0]
        rows = kernels._kernels("cpu", kernel.domain, kernel.op_name)
        wanted = {
            k: {kernels._plain(t) for t in v} for k, v in kernel.type_constraints.items()
        }
        assert any(
            row.fits(since, INSTALLED)
            and row.types.keys() == wanted.keys()
            and all(types <= row.types[name] for name, types in wanted.items())
            for row in rows
        ), (kernel.op_name, kernel.version_range, wanted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.17", ["1.17"]),
        ("1.17.3", ["1.17"]),
        ("1.17,1.20", ["1.17", "1.20"]),
        ("1.18..1.20", ["1.18", "1.19", "1.20"]),
        ("..1.18", ["1.17", "1.18"]),
        ("1.19..1.20,1.20,1.17", ["1.19", "1.20", "1.17"]),
        ("1.17..", list(kernels.releases())),
    ],
)
def test_releases_are_named_in_many_ways(text: str, expected: list[str]) -> None:
    assert list(versions(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "1", "1.16", "1.99", "1.20..1.17", "1.17,", "new", "1.17...1.18"]
)
def test_what_names_no_release_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        versions(text)


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["support", *arguments])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_the_command_tells_release_by_release(capsys: pytest.CaptureFixture[str]) -> None:
    path = fixtures.built("opset_21_int4")
    code, out, err = run(capsys, str(path), "--ort", "1.17..1.21")
    assert out.splitlines() == [
        "1.17        does not load",
        "              IR version 10, at most 9",
        "              ai.onnx 21, at most 20",
        "              packed: element type int4 is not known",
        "              and 1 more, see --format json",
        "1.18        does not load",
        "              packed: element type int4 is not known",
        "              /w/DequantizeLinear: DequantizeLinear 21 of int4, float: no kernel",
        "1.19..1.21  loads",
    ]
    assert code == 1
    assert err == f"onnxforge: {path}: of 5 releases, 1.17 does not load, 1.18 does not load\n"
    assert run(capsys, str(path), "--ort", "1.19..")[0] == 0


def test_the_command_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = fixtures.built("new_ir")
    code, out, _ = run(capsys, str(path), "--ort", "1.17,1.18", "--format", "json", "--try")
    told = json.loads(out)
    assert code == 1
    assert [(one["version"], one["verdict"]) for one in told["releases"]] == [
        ("1.17", "does not load"),
        ("1.18", "loads"),
    ]
    assert told["releases"][0]["reasons"][0]["kind"] == "ir"
    assert told["tried"]["outcome"] == "runs"
    assert told["tried"]["version"] == onnxruntime.__version__


def test_a_trial_that_fails_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = written("conv_u8_each", tmp_path)
    code, out, err = run(capsys, str(path), "--ort", "1.30..", "--try")
    last = out.splitlines()[-1]
    assert code == 1
    assert last.startswith(f"tried on onnxruntime {onnxruntime.__version__}")
    assert "does not run: " in last
    assert err.count("\n") == 1


def test_what_no_inputs_can_be_drawn_for_is_only_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.onnx"
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.STRING, [1]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [info[0]], [info[1]]
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    code, out, _ = run(capsys, str(path), "--try")
    assert code == 0
    assert ": loads: " in out.splitlines()[-1]


def test_the_command_fails_where_it_cannot_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(fixtures.built("new_ir"))
    assert run(capsys, str(tmp_path / "none.onnx"))[0] == 2
    assert run(capsys, path, "--ort", "1.16")[0] == 2
    assert run(capsys, path, "--provider", "web", "--try")[0] == 2


# How the tables are made.


def test_documents_are_read() -> None:
    import kernels as maker

    text = """## Operators implemented by CPUExecutionProvider
|**Operator Domain:** *ai.onnx*||||
|Abs|*in* X:**T**|13+|**T** = tensor(float)|

## Operators implemented by CUDAExecutionProvider
|Op Name|Parameters|OpSet Version|Types Supported|
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Add|*in* A:**T**|14+|**T** = tensor(bfloat16), tensor(float)|
|||[7, 12]|**T** = tensor(float)|
|Cast|*in* x:**T1**|13|**T1** = seq(tensor(bool))<br/> **T2** = tensor(float)|
|**Operator Domain:** *com.microsoft*||||
|BiasGelu|*in* A:**T**|1+|**T** = tensor(float16)|
"""
    found = maker.documented(text, "CUDAExecutionProvider")
    assert {kernel[:4] for kernel in found} == {
        ("", "Add", 14, maker.OPEN),
        ("", "Add", 7, 12),
        ("", "Cast", 13, 13),
        ("com.microsoft", "BiasGelu", 1, maker.OPEN),
    }
    (cast,) = [kernel for kernel in found if kernel[1] == "Cast"]
    assert dict(cast[4]) == {"T1": {"seq(bool)"}, "T2": {"float"}}
    assert maker.webgpu("| Pow | ai.onnx(7-11,12,13+) |  |\n") == {
        ("", "Pow", 7, 11, ()),
        ("", "Pow", 12, 12, ()),
        ("", "Pow", 13, maker.OPEN, ()),
    }


def test_rows_tell_each_kernel_of_each_release_and_no_other() -> None:
    import kernels as maker

    def kernel(first: int, last: int, **types: str) -> maker.Kernel:
        by = tuple((name, frozenset(text.split())) for name, text in types.items())
        return "", "Op", first, last, by

    held = {
        "1.17": {kernel(1, 6, T="float"), kernel(7, maker.OPEN, T="float", U="int64")},
        "1.18": {kernel(1, 6, T="float"), kernel(1, 6, T="double")},
        "1.19": {kernel(1, 6, T="float"), kernel(7, maker.OPEN, T="float", U="int64")},
    }
    rows = maker.Rows(list(held), {}).of(held)
    assert rows == {
        "": {
            "Op": [
                "1-6 T=float",
                "1-6 1.18..1.18 T=double",
                "7+ ..1.17 T=float U=int64",
                "7+ 1.19.. T=float U=int64",
            ]
        }
    }


def test_what_an_operator_is_made_of_by_its_shapes_is_unknown_without_them() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]>
        g (bfloat16{} x, bfloat16[4,8] c, bfloat16[4,8] s, int64[1,3] p) => (bfloat16 y)
        {{ y = RotaryEmbedding (x, c, s, p) }}"""
    assert one(text.format("[1,2,3,16]"), "1.32").verdict == "does not load"
    assert one(text.format(""), "1.32").verdict == "unknown"
