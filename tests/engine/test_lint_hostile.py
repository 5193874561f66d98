"""Damaged and hostile models, lists and metadata: told as findings, or refused in a line."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxforge.errors import OnnxforgeError
from onnxforge.lint import Options, lint
from onnxforge.lint.render import FORMATS
from onnxforge.lint.view import BITS
from support import faultless, fixtures, hostile
from support.hostile import REFUSED, WORKS, Refused, Works

# Functions that double with each call are refused for their size, which no rule is about.
ROWS = {k: row for k, row in REFUSED.items() if not row.unprivileged and k != "doubling"}

SLOW = {"100,000 nodes", "20,000 tensors in 500 files"}  # ten seconds, nothing else in them
ODD = {k: row for k, row in WORKS.items() if k not in SLOW}

FORMED = (
    "Attention", "Cast", "CastLike", "ConvInteger", "DFT", "DequantizeLinear", "GRU", "Gemm",
    "GridSample", "LSTM", "MatMul", "MatMulInteger", "Mul", "QuantizeLinear", "Relu",
    "Sigmoid", "Transpose",
)  # fmt: skip
"""Operators whose forms are looked at, and those in front of them."""

posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and forks of POSIX")


@posix
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_what_is_refused_has_a_finding(row: Refused) -> None:
    with hostile.built(row.build) as (_, path), contextlib.suppress(OnnxforgeError):
        report = lint([path], Options(min_ort="1.17", browser=True))
        assert [f for f in report.findings if f.level == "error"]
        for form in FORMATS.values():
            form(report)


@posix
@pytest.mark.parametrize("row", ODD.values(), ids=ODD.keys())
def test_what_is_odd_and_works_is_looked_at(row: Works) -> None:
    harmless = {"unused-import", "orphaned-bytes", "overlapping-data", "unsorted"}
    with hostile.built(row.build) as (_, path):
        found = {f.rule for f in lint([path]).findings}
    assert found <= harmless | {"dead-node", "missing-import"}


@settings(suppress_health_check=list(HealthCheck), max_examples=150)
@given(st.sampled_from(fixtures.names()), st.data())
def test_a_damaged_model_never_ends_lint(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"lint-{name}"
    path = folder / f"{name}.onnx" if folder.exists() else fixtures.copied(name, folder)
    content = bytearray(fixtures.built(name).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    FORMATS["text"](lint([path], Options(min_ort="1.17", browser=True)))


def odd_text(model: onnx.ModelProto, place: str) -> None:
    """Write qqqq where a text belongs."""
    node = model.graph.node[0]
    tensor = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
    tensor.CopyFrom(onnx.TensorProto(dims=[1], data_type=1, data_location=1))
    tensor.external_data.add(key="location", value="qqqq" if place == "location" else "w")
    if place == "dimension":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "qqqq"
    if place == "node metadata":
        node.metadata_props.add(key="k", value="qqqq")
    if place == "doc_string":
        node.doc_string = "qqqq"


@pytest.mark.parametrize("place", ["location", "dimension", "node metadata", "doc_string"])
def test_what_is_no_text_is_told_wherever_it_is(tmp_path: Path, place: str) -> None:
    ports = [faultless.value(name, ["n", 8]) for name in "xy"]
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = faultless.model(nodes, ports[:1], ports[1:])
    odd_text(model, place)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString().replace(b"qqqq", b"\xff\xfe\xff\xfe"))
    found = {finding.rule for finding in lint([path]).findings}
    assert ("unreadable" in found) == (place != "doc_string")


@pytest.mark.parametrize("op", FORMED)
def test_nodes_that_lack_all_they_need_are_told(tmp_path: Path, op: str) -> None:
    dtypes = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16
    for dtype, made in itertools.product(dtypes, (["h"], [])):
        ports = [faultless.value(name, [8, 8], dtype) for name in "xy"]
        bare = [helper.make_node(op, [], made), helper.make_node("Identity", [], ["i"])]
        reader = helper.make_node("MatMul", ["h" if made else "x", "i"], ["y"])
        lone = [helper.make_node(other, [], []) for other in ("DequantizeLinear", "MatMul")]
        proto = faultless.model([*bare, reader, *lone], ports[:1], ports[1:])
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        assert "misfit" in {finding.rule for finding in lint([path]).findings}


def test_a_weight_that_says_to_be_larger_than_its_file(tmp_path: Path) -> None:
    ports = [faultless.value(name, [64, 64]) for name in "xy"]
    weights = {name: np.ones((64, 64), np.float32) for name in ("a", "b")}
    nodes = [helper.make_node("Sum", ["x", "a", "b"], ["y"])]
    proto = faultless.model(nodes, ports[:1], ports[1:], weights)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert "stored-twice" in {finding.rule for finding in lint([path]).findings}
    for tensor in proto.graph.initializer:
        tensor.dims[:] = [2**31, 2**31]
    path.write_bytes(proto.SerializeToString())
    found = {finding.rule for finding in lint([path]).findings}
    assert "wrong-length" in found
    assert "stored-twice" not in found


@pytest.mark.parametrize("version", [2**63 - 1, 2**31, -1, -(2**63)])
def test_an_operator_set_of_any_number_is_looked_up(tmp_path: Path, version: int) -> None:
    ports = [faultless.value(name, [8]) for name in "xy"]
    model = faultless.model([helper.make_node("Relu", ["x"], ["y"])], ports[:1], ports[1:])
    model.opset_import[0].version = version
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    wanted = "opset-too-new" if version > 0 else "missing-import"
    assert wanted in {f.rule for f in lint([path], Options(min_ort="1.17")).findings}


@pytest.mark.parametrize("dtype", [99, -1])
def test_an_element_type_of_any_number_is_told(tmp_path: Path, dtype: int) -> None:
    root = faultless.clean(tmp_path / "bundle")
    with faultless.edit(root / "int8/encoder.onnx") as proto:
        proto.graph.output[0].type.tensor_type.elem_type = dtype
        proto.graph.node.append(helper.make_node("Cast", ["x"], ["odd"], to=dtype))
        proto.graph.node.append(helper.make_node("Cast", ["odd"], ["back"], to=1))
    found = lint([root], Options(hash=False)).findings
    told = {finding.rule for finding in found if f"type {dtype}" in finding.message}
    assert told == {"casts-undone", "interface-differs", "metadata-untrue"}


def test_types_that_the_onnx_package_does_not_know_have_a_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The onnx package 1.19 has no int2, which lint knows all the same."""
    to_field = helper.tensor_dtype_to_field
    for dtype in (*BITS, onnx.TensorProto.STRING):
        tensor = onnx.TensorProto(dims=[8], data_type=dtype, name="w")
        values = getattr(tensor, to_field(dtype))
        values.extend([b"" if dtype == onnx.TensorProto.STRING else 0] * 8)
        path = tmp_path / "model.onnx"
        nodes = [helper.make_node("Identity", ["w"], ["y"])]
        model = faultless.model(nodes, [], [faultless.value("y", [8])])
        model.graph.initializer.append(tensor)
        path.write_bytes(model.SerializeToString())
        with monkeypatch.context() as patch:
            patch.setattr(helper, "tensor_dtype_to_field", {1: "float_data"}.__getitem__)
            found = [str(f) for f in lint([path], Options(select=("OF414",))).findings]
        assert not [text for text in found if "field" in text]


def test_a_graph_may_be_the_default_of_a_function(tmp_path: Path) -> None:
    """What it reads is needed, and no node can be said to come too late for it."""
    body = helper.make_graph(
        [helper.make_node("Neg", ["b"], ["c"])], "body", [], [faultless.value("c", [8])]
    )
    nodes = [helper.make_node(op, ["a"], [to]) for op, to in (("Abs", "b"), ("Relu", "d"))]
    function = helper.make_function(
        "custom", "F", ["a"], ["d"], nodes, [helper.make_opsetid("", 20)]
    )
    function.attribute_proto.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
    ports = [faultless.value(name, [8]) for name in "xy"]
    call = helper.make_node("F", ["x"], ["y"], domain="custom")
    model = faultless.model([call], ports[:1], ports[1:])
    model.functions.append(function)
    model.opset_import.add(domain="custom", version=1)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert lint([path], Options(ignore=("OF450", "OF451"))).findings == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def replaced(found: Any, steps: list[int], value: Any) -> Any:
    """Plain data in which one part, reached by choices, is another."""
    found = copy.deepcopy(found)
    at, last = found, None
    for step in steps:
        if not isinstance(at, dict | list) or not at:
            break
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        last = at, keys[step % len(keys)]
        at = at[last[1]]
    if last is None:
        return value
    last[0][last[1]] = value
    return found


@settings(suppress_health_check=list(HealthCheck), max_examples=150)
@given(st.sampled_from(["metadata.json", "manifest.json"]), st.lists(st.integers(0, 9)), JSON)
def test_damaged_metadata_never_end_lint(
    tmp_path_factory: pytest.TempPathFactory, name: str, steps: list[int], value: Any
) -> None:
    root = tmp_path_factory.getbasetemp() / "lint-json"
    if not root.exists():
        faultless.clean(root)
    good = (root / name).read_text()
    (root / name).write_text(json.dumps(replaced(json.loads(good), steps, value)))
    try:
        lint([root], Options(hash=False, ignore=("OF450", "OF451")))
    finally:
        (root / name).write_text(good)
