"""Faults planted in a bundle that has none, each found by exactly its rule."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxforge import PassManager
from onnxforge.lint import Options, lint
from onnxforge.lint.rules import RULES
from support import faultless
from support.faultless import SIDE, edit, edit_json, random, value

Plant = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """Something wrong, and where it is to be found.

    Attributes:
        rule: Name of the rule that finds it.
        plant: Puts it into a bundle.
        file: The file that the finding names, None for any.
        where: The place in it, None for any.
        options: What to look for in addition.
        relist: Whether lists of hashes and metadata are written again.
    """

    rule: str
    plant: Plant
    file: str | None = None
    where: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    relist: bool = True


FAULTS: list[Fault] = []


def fault(rule: str, file: str | None = None, where: str | None = None, **more: Any) -> Any:
    relist = more.pop("relist", True)

    def planted(plant: Plant) -> Plant:
        FAULTS.append(Fault(rule, plant, file, where, more, relist))
        return plant

    return planted


def beside(root: Path, proto: onnx.ModelProto) -> None:
    """Another model at the root of the bundle, which all tiers share."""
    (root / "vad.onnx").write_bytes(proto.SerializeToString())


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


X = value("x", ["batch", 8])
Y = value("y", ["batch", 8])
IDS = value("x", ["batch", 8], TensorProto.INT64)


# Versions.


@fault("foreign-operator", "int8/encoder.onnx", "Add")
def _a_contrib_operator(root: Path) -> None:
    with edit(root / "int8/encoder.onnx") as proto:
        next(n for n in proto.graph.node if n.name == "Add").domain = "com.microsoft"
        proto.opset_import.add(domain="com.microsoft", version=1)


@fault("foreign-operator", "int8/encoder.onnx", "If/then_branch/louder")
def _a_contrib_operator_in_a_body(root: Path) -> None:
    with edit(root / "int8/encoder.onnx") as proto:
        (branch,) = (n for n in proto.graph.node if n.op_type == "If")
        body = next(a.g for a in branch.attribute if a.name == "then_branch")
        next(n for n in body.node if n.name == "louder").domain = "com.microsoft"
        proto.opset_import.add(domain="com.microsoft", version=1)


@fault("unused-import", "fp32/editor.onnx")
def _an_import_for_nothing(root: Path) -> None:
    with edit(root / "fp32/editor.onnx") as proto:
        proto.opset_import.add(domain="ai.onnx.ml", version=3)


@fault("missing-import", "vad.onnx", allow=("ai.onnx.ml",))
def _no_import(root: Path) -> None:
    proto = faultless.model([node("Binarizer", ["x"], "y", domain="ai.onnx.ml")], [X], [Y])
    beside(root, proto)


@fault("ir-too-new", "fp16w/editor.onnx")
def _ir_10(root: Path) -> None:
    with edit(root / "fp16w/editor.onnx") as proto:
        proto.ir_version = 10


@fault("opset-too-new")
def _opset_21(root: Path) -> None:
    for tier in faultless.TIERS:
        with edit(root / tier / "embed_tokens.onnx") as proto:
            proto.opset_import[0].version = 21


@fault("unknown-operator", "int8/editor.onnx", "Relu")
def _an_operator_of_opset_24(root: Path) -> None:
    with edit(root / "int8/editor.onnx") as proto:
        next(n for n in proto.graph.node if n.op_type == "Relu").op_type = "Swish"


@fault("unknown-operator", "vad.onnx", "y")
def _a_deprecated_operator(root: Path) -> None:
    scales = np.ones(2, np.float32)
    beside(root, faultless.model([node("Upsample", ["x", "s"], "y")], [X], [Y], {"s": scales}))


@fault("recursive-function", "vad.onnx", "own::Twice")
def _a_function_that_calls_itself(root: Path) -> None:
    proto = faultless.model([node("Twice", ["x"], "y", domain="own")], [X], [Y])
    imports = [helper.make_opsetid("own", 1)]
    body = [node("Twice", ["a"], "b", domain="own")]
    proto.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], body, imports))
    proto.opset_import.add(domain="own", version=1)
    beside(root, proto)


@fault("misfit", "vad.onnx", "y")
def _axes_as_they_were_up_to_17(root: Path) -> None:
    beside(root, faultless.model([node("ReduceMean", ["x"], "y", axes=[1])], [X], [Y]))


@fault("misfit", "vad.onnx", "y")
def _no_axes_as_they_are_since_13(root: Path) -> None:
    beside(root, faultless.model([node("Unsqueeze", ["x"], "y")], [X], [Y]))


@fault("misfit", "vad.onnx", "y")
def _an_axis_that_is_a_float(root: Path) -> None:
    beside(root, faultless.model([node("Softmax", ["x"], "y", axis=1.0)], [X], [Y]))


@fault("misfit", "vad.onnx", "y")
def _an_attribute_that_stands_twice(root: Path) -> None:
    softmax = node("Softmax", ["x"], "y", axis=0)
    softmax.attribute.append(helper.make_attribute("axis", 1))
    beside(root, faultless.model([softmax], [X], [Y]))


def in_function(op: str, version: int, **attributes: Any) -> onnx.ModelProto:
    """A call of a function that is written for a version of ai.onnx."""
    proto = faultless.model([node("Inner", ["x"], "y", domain="own")], [X], [Y])
    imports = [helper.make_opsetid("", version)]
    body = [node(op, ["a"], "b", **attributes)]
    proto.functions.append(helper.make_function("own", "Inner", ["a"], ["b"], body, imports))
    proto.opset_import.add(domain="own", version=1)
    return proto


@fault("function-version", "vad.onnx", "own::Inner/b")
def _a_function_of_an_older_model(root: Path) -> None:
    beside(root, in_function("Squeeze", 11, axes=[0]))


@fault("function-version", "vad.onnx", "own::Inner/b")
def _another_default_in_the_model_around_it(root: Path) -> None:
    beside(root, in_function("Softmax", 11))


@fault("wrong-length", "vad.onnx", "w")
def _values_in_the_field_of_another_type(root: Path) -> None:
    weights = {"w": random(0, 8, 8)}
    proto = faultless.model([node("MatMul", ["x", "w"], "y")], [X], [Y], weights)
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].int64_data.extend(range(32))
    beside(root, proto)


# Weights in data files.


def first_external(proto: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.external_data)


def entry(tensor: onnx.TensorProto, key: str) -> Any:
    return next(e for e in tensor.external_data if e.key == key)


@fault("unreadable", "int8/encoder.onnx", relist=True)
def _a_cut_model(root: Path) -> None:
    path = root / "int8/encoder.onnx"
    path.write_bytes(path.read_bytes()[:-40])


@fault("unreadable", "int8/encoder.onnx")
def _a_pointer_of_git_lfs(root: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (root / "int8/encoder.onnx").write_text(text)


@fault("data-missing", "fp32/encoder.onnx", "w")
def _no_data(root: Path) -> None:
    (root / "fp32/encoder.onnx_data").unlink()


@fault("location-leaves", "fp32/encoder.onnx", "w")
def _data_in_another_folder(root: Path) -> None:
    (root / "fp32/encoder.onnx_data").rename(root / "encoder.bin")
    with edit(root / "fp32/encoder.onnx") as proto:
        for tensor in proto.graph.initializer:
            for each in tensor.external_data:
                if each.key == "location":
                    each.value = "../encoder.bin"


@fault("location-leaves", "fp32/embed_tokens.onnx", "table")
def _an_absolute_location(root: Path) -> None:
    (root / "fp32/embed_tokens.onnx_data").unlink()
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        entry(first_external(proto), "location").value = "/weights/table.bin"


@fault("bad-range", "fp32/embed_tokens.onnx", "table")
def _cut_data(root: Path) -> None:
    path = root / "fp32/embed_tokens.onnx_data"
    path.write_bytes(path.read_bytes()[:-4])


@fault("bad-range", "fp32/embed_tokens.onnx", "table")
def _an_offset_that_is_no_number(root: Path) -> None:
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        entry(first_external(proto), "length").value = "-8"


@fault("wrong-length", "fp32/embed_tokens.onnx", "table")
def _a_length_that_is_not_that_of_the_shape(root: Path) -> None:
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        entry(first_external(proto), "length").value = "8"


@fault("wrong-length", "vad.onnx", "w")
def _values_that_are_too_few(root: Path) -> None:
    proto = faultless.model(
        [node("MatMul", ["x", "w"], "y")], [X], [Y], {"w": random(0, 8, 8)}
    )
    proto.graph.initializer[0].raw_data = bytes(8)
    beside(root, proto)


@fault("unknown-data-key", "fp32/embed_tokens.onnx", "table")
def _a_key_of_somebody(root: Path) -> None:
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        first_external(proto).external_data.add(key="sha256", value="00")


@fault("unknown-data-key", "fp32/embed_tokens.onnx", "table")
def _a_key_that_stands_twice(root: Path) -> None:
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        first_external(proto).external_data.add(key="location", value="embed_tokens.onnx_data")


@fault("location-form", "fp32/embed_tokens.onnx", "table")
def _a_location_with_a_dot(root: Path) -> None:
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        entry(first_external(proto), "location").value = "./embed_tokens.onnx_data"


def outside(tensor: onnx.TensorProto, path: Path) -> None:
    """Put the bytes of a tensor into a file of their own."""
    path.write_bytes(tensor.raw_data)
    places = {"location": path.name, "offset": "0", "length": str(path.stat().st_size)}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in places.items():
        tensor.external_data.add(key=key, value=text)


@fault("must-be-inline", "vad.onnx", "shape")
def _a_shape_in_a_data_file(root: Path) -> None:
    proto = faultless.model(
        [node("Reshape", ["x", "shape"], "y")], [X], [Y], {"shape": np.array([-1, 8])}
    )
    outside(proto.graph.initializer[0], root / "vad.onnx_data")
    beside(root, proto)


@fault("must-be-inline", "vad.onnx", "none")
def _a_tensor_without_elements_in_a_data_file(root: Path) -> None:
    nodes = [node("Concat", ["x", "none"], "y", axis=0)]
    proto = faultless.model(nodes, [X], [Y], {"none": np.zeros((0, 8), np.float32)})
    outside(proto.graph.initializer[0], root / "vad.onnx_data")
    beside(root, proto)


@fault(
    "must-be-inline",
    "fp32/encoder.onnx",
    "If/then_branch/gain",
    browser=True,
)
def _a_body_that_a_browser_finds_no_data_for(root: Path) -> None:
    with edit(root / "fp32/encoder.onnx") as proto:
        (branch,) = (n for n in proto.graph.node if n.op_type == "If")
        body = next(a.g for a in branch.attribute if a.name == "then_branch")
        outside(body.initializer[0], root / "fp32/encoder.onnx.data")


@fault("orphaned-bytes", "fp16w/editor.onnx")
def _data_that_was_appended_to(root: Path) -> None:
    path = root / "fp16w/editor.onnx_data"
    path.write_bytes(path.read_bytes() * 2)


@fault("overlapping-data", "fp32/editor.onnx", "down")
def _offsets_that_overlap(root: Path) -> None:
    with edit(root / "fp32/editor.onnx") as proto:
        down = next(t for t in proto.graph.initializer if t.name == "down")
        offset = entry(down, "offset")
        offset.value = str(int(offset.value) - 64)
    path = root / "fp32/editor.onnx_data"
    path.write_bytes(path.read_bytes()[:-64])


# Files.


@fault("link", "fp32/embed_tokens.onnx")
def _a_link_to_another_folder(root: Path) -> None:
    path = root / "fp32/embed_tokens.onnx_data"
    elsewhere = root.parent / "elsewhere.bin"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


@fault("link", "fp32/embed_tokens.onnx")
def _another_name_in_another_folder(root: Path) -> None:
    (root.parent / "elsewhere.bin").hardlink_to(root / "fp32/embed_tokens.onnx_data")


@fault("orphaned-file", "int8/old.onnx_data")
def _data_of_a_model_that_is_gone(root: Path) -> None:
    (root / "int8/old.onnx_data").write_bytes(bytes(100))


@fault("too-large", "vad.onnx", hash=False)
def _a_model_of_3_gb(root: Path) -> None:
    """A real one: a tensor whose bytes are a hole in the file."""
    size = 3 << 30
    dims = [size // 4]
    proto = faultless.model([node("Gather", ["big", "x"], "y")], [IDS], [Y])
    inner = TensorProto(name="big", data_type=1, dims=dims).SerializeToString()
    inner += b"\x4a" + varint(size)  # raw_data
    graph = proto.graph.SerializeToString() + b"\x2a" + varint(len(inner) + size) + inner
    proto.ClearField("graph")
    with (root / "vad.onnx").open("wb") as file:
        file.write(proto.SerializeToString() + b"\x3a" + varint(len(graph) + size) + graph)
        file.truncate(file.tell() + size)


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


@fault(
    "too-large-for-browsers",
    "vad.onnx_data",
    hash=False,
    browser=True,
    ignore=("must-be-inline",),
)
def _data_of_3_gb(root: Path) -> None:
    size = 3 << 30
    proto = faultless.model([node("Gather", ["big", "x"], "y")], [IDS], [Y])
    big = proto.graph.initializer.add(name="big", data_type=1, dims=[size // 4])
    big.data_location = TensorProto.EXTERNAL
    big.external_data.add(key="location", value="vad.onnx_data")
    with (root / "vad.onnx_data").open("wb") as file:
        file.truncate(size)
    beside(root, proto)


@fault("data-name", "fp32/embed_tokens.onnx")
def _data_of_another_name(root: Path) -> None:
    (root / "fp32/embed_tokens.onnx_data").rename(root / "fp32/model.onnx_data")
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        entry(first_external(proto), "location").value = "model.onnx_data"


@fault("leftover", "int8/encoder.onnx_data.part")
def _half_a_download(root: Path) -> None:
    (root / "int8/encoder.onnx_data.part").write_bytes(bytes(10))


# Graphs.


@fault("unsorted", "fp32/editor.onnx", "Reshape")
def _nodes_in_another_order(root: Path) -> None:
    with edit(root / "fp32/editor.onnx") as proto:
        nodes = list(proto.graph.node)
        del proto.graph.node[:]
        proto.graph.node.extend([*nodes[1:], nodes[0]])


@fault("unsorted", "vad.onnx", "choice/then_branch/a")
def _a_body_that_reads_what_comes_later(root: Path) -> None:
    later = helper.make_graph([node("Neg", ["late"], "a")], "then", [], [value("a", [8])])
    other = helper.make_graph([node("Abs", ["x"], "b")], "else", [], [value("b", [8])])
    cond = value("c", [], TensorProto.BOOL)
    nodes = [
        node("If", ["c"], "choice", then_branch=later, else_branch=other),
        node("Relu", ["x"], "late"),
        node("Add", ["choice", "late"], "y"),
    ]
    beside(root, faultless.model(nodes, [X, cond], [Y]))


@fault("duplicate-value", "vad.onnx", "h")
def _a_value_made_twice(root: Path) -> None:
    nodes = [node("Relu", ["x"], "h"), node("Neg", ["h"], "h"), node("Abs", ["h"], "y")]
    nodes[1].name = "again"
    beside(root, faultless.model(nodes, [X], [Y]))


@fault("duplicate-node-name", "fp32/editor.onnx", "MatMul_up")
def _two_nodes_of_one_name(root: Path) -> None:
    with edit(root / "fp32/editor.onnx") as proto:
        next(n for n in proto.graph.node if n.name == "MatMul_down").name = "MatMul_up"


@fault("missing-value", "int8/editor.onnx", "Relu")
def _a_value_that_nobody_makes(root: Path) -> None:
    with edit(root / "int8/editor.onnx") as proto:
        relu = next(n for n in proto.graph.node if n.op_type == "Relu")
        relu.input[0] = "gone"
        maker = next(n for n in proto.graph.node if n.name == "MatMul_up")
        maker.output[0] = "act_too"
        down = next(n for n in proto.graph.node if n.name == "MatMul_down")
        down.input[0] = "sum"
        add = node("Add", ["act", "act_too"], "sum")
        proto.graph.node.insert(len(proto.graph.node) - 1, add)


@fault("missing-value", "vad.onnx", "y")
def _an_output_that_nobody_makes(root: Path) -> None:
    beside(root, faultless.model([node("Relu", ["x"], "z")], [X], [Y, value("z", [8])]))


@fault("dead-node", "vad.onnx", "dead")
def _a_node_for_nothing_that_leaves_out_an_output(root: Path) -> None:
    def lstm(name: str) -> onnx.NodeProto:
        words = ["x", "w", "r"]
        return helper.make_node("LSTM", words, ["", name], name=name, hidden_size=2)

    given = {"w": random(2, 1, 8, 4), "r": random(3, 1, 8, 2)}
    ports = [value("x", [1, 1, 4])], [value("h", [1, 1, 2])]
    beside(root, faultless.model([lstm("h"), lstm("dead")], *ports, given))


@fault("dead-node", "fp32/embed_tokens.onnx", "shape")
def _a_node_for_nothing(root: Path) -> None:
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        proto.graph.node.append(node("Shape", ["ids"], "shape"))


@fault("unused-initializer", "fp32/embed_tokens.onnx", "spare")
def _a_weight_for_nothing(root: Path) -> None:
    with edit(root / "fp32/embed_tokens.onnx") as proto:
        proto.graph.initializer.append(numpy_helper.from_array(random(9, 8), "spare"))


# Weights.


@fault("stored-twice", "vad.onnx", "w2")
def _a_tied_weight_written_twice(root: Path) -> None:
    weight = random(7, 64, 64)
    nodes = [node("MatMul", ["x", "w"], "h"), node("MatMul", ["h", "w2"], "y")]
    ports = [value("x", ["batch", 64])], [value("y", ["batch", 64])]
    beside(root, faultless.model(nodes, *ports, {"w": weight, "w2": weight}))


@fault("float64", "vad.onnx", "w")
def _a_weight_of_float64(root: Path) -> None:
    nodes = [node("Cast", ["w"], "narrow", to=1), node("MatMul", ["x", "narrow"], "y")]
    ports = [value("x", ["batch", 16])], [value("y", ["batch", 16])]
    beside(root, faultless.model(nodes, *ports, {"w": random(0, 16, 16).astype(np.float64)}))


def gathered(root: Path, op: str, table: np.ndarray, scale: list[str], **more: Any) -> None:
    nodes = [node(op, ["q", *scale], "table", **more), node("Gather", ["table", "ids"], "y")]
    weights = {"q": table, "s": np.array(0.1, np.float32)}
    used = {name: weights[name] for name in ("q", *scale)}
    ids = value("ids", ["batch"], TensorProto.INT64)
    beside(root, faultless.model(nodes, [ids], [value("y", ["batch", SIDE])], used))


@fault("dequantized-table", "vad.onnx", "table")
def _a_table_dequantized_as_a_whole(root: Path) -> None:
    gathered(root, "DequantizeLinear", np.ones((9, SIDE), np.int8), ["s"])


@fault("widened-table", "vad.onnx", "table")
def _a_table_widened_as_a_whole(root: Path) -> None:
    gathered(root, "Cast", np.ones((1024, SIDE), np.float16), [], to=1)


@fault("casts-undone", "vad.onnx", "back")
def _there_and_back(root: Path) -> None:
    nodes = [
        node("Cast", ["x"], "there", to=TensorProto.DOUBLE),
        node("Cast", ["there"], "back", to=TensorProto.FLOAT),
        node("Relu", ["back"], "y"),
    ]
    beside(root, faultless.model(nodes, [X], [Y]))


# Forms.


def integers(
    op: str, weight: np.ndarray, zeros: list[np.ndarray | None], rank: int = 2, **more: Any
) -> onnx.ModelProto:
    """A product of integers with zero points of the input and of the weight."""
    names = ["xq", "w"]
    weights = {"w": weight}
    for i, zero in enumerate(zeros):
        names.append("" if zero is None else f"z{i}")
        if zero is not None:
            weights[f"z{i}"] = zero
    kind = TensorProto.UINT8
    product = helper.make_node(op, names, ["y"], name="product", **more)
    ports = [value("xq", [None] * rank, kind)], [value("y", [None] * rank, TensorProto.INT32)]
    return faultless.model([product], *ports, weights)


UINT8 = np.array(128, np.uint8)


@fault("failing-form", "vad.onnx", "product")
def _a_zero_point_for_each_channel(root: Path) -> None:
    weight, zeros = np.ones((4, 2, 3), np.uint8), np.full(4, 128, np.uint8)
    beside(root, integers("ConvInteger", weight, [UINT8, zeros], 3))


@fault("failing-form", "vad.onnx", "product")
def _a_flat_zero_point_for_a_batch(root: Path) -> None:
    weight = np.ones((3, 4, 5), np.int8)
    beside(root, integers("MatMulInteger", weight, [UINT8, np.zeros(5, np.int8)], 3))


@fault("failing-form", "vad.onnx", "product")
def _a_zero_point_for_each_row(root: Path) -> None:
    weight = np.ones((4, 5), np.int8)
    beside(root, integers("MatMulInteger", weight, [np.full(3, 128, np.uint8)]))


@fault("no-kernel", "vad.onnx", "product")
def _int8_times_uint8(root: Path) -> None:
    proto = integers("MatMulInteger", np.ones((4, 5), np.uint8), [])
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    beside(root, proto)


@fault("no-kernel", "vad.onnx", "y")
def _scales_of_half_precision(root: Path) -> None:
    nodes = [node("Resize", ["x", "", "s"], "y")]
    ports = [value(name, ["n", "c", 4, 4]) for name in "xy"]
    beside(root, faultless.model(nodes, ports[:1], ports[1:], {"s": np.ones(4, np.float16)}))


@fault("failing-form", "vad.onnx", "product")
def _no_zero_point_of_the_input(root: Path) -> None:
    beside(root, integers("ConvInteger", np.ones((4, 2, 3), np.uint8), [None, UINT8], 3))


def dequantized(
    op: str, weight: np.ndarray, *, x: bool, zero: bool, bias: bool = False
) -> Any:
    """A product of dequantized operands."""
    channels = weight.shape[-1]
    weights = {"w": weight, "ws": np.ones(channels, np.float32), "b": random(0, channels)}
    ins = ["w", "ws"]
    if zero:
        weights["wz"] = np.zeros(channels, np.int8)
        ins.append("wz")
    nodes = [node("DequantizeLinear", ins, "wf", axis=weight.ndim - 1)]
    left = "x"
    if x:
        weights |= {"xs": np.array(0.1, np.float32), "xz": UINT8}
        nodes += [node("QuantizeLinear", ["x", "xs", "xz"], "xq")]
        nodes += [node("DequantizeLinear", ["xq", "xs", "xz"], "xf")]
        left = "xf"
    nodes.append(node(op, [left, "wf", "b"] if bias else [left, "wf"], "y"))
    if not bias:
        del weights["b"]
    ports = [value("x", [None, weight.shape[-2]])], [value("y", [None, channels])]
    return faultless.model(nodes, *ports, weights)


@fault("failing-form", "vad.onnx", "y")
def _a_batch_with_zero_points(root: Path) -> None:
    beside(root, dequantized("MatMul", np.ones((2, 8, 6), np.int8), x=True, zero=True))


@fault("slow-integers", "vad.onnx", "product")
def _int8_times_int8(root: Path) -> None:
    proto = integers("MatMulInteger", np.ones((4, 5), np.int8), [])
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    beside(root, proto)


@fault("slow-integers", "vad.onnx", "product", min_ort="1.24")
def _a_convolution_of_int8(root: Path) -> None:
    beside(root, integers("ConvInteger", np.ones((4, 2, 3), np.int8), [UINT8], 3))


@fault("wrong-products", "vad.onnx", "product")
def _columns_that_amx_gets_wrong(root: Path) -> None:
    beside(root, integers("MatMulInteger", np.ones((4, 50), np.int8), []))


@fault("gemm-bias", "vad.onnx", "y")
def _a_bias_of_float32(root: Path) -> None:
    weight = np.ones((8, 6), np.int8)
    beside(root, dequantized("Gemm", weight, x=True, zero=False, bias=True))


@fault("depthwise-integers", "vad.onnx", "product")
def _a_depthwise_convolution(root: Path) -> None:
    weight = np.ones((4, 1, 3), np.uint8)
    beside(root, integers("ConvInteger", weight, [UINT8, UINT8], 3, group=4))


def scaled(*operands: str) -> onnx.ModelProto:
    """A product whose scales are multiplied one after the other."""
    dynamic = helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], name="dyn")
    nodes = [
        dynamic,
        node("MatMulInteger", [*operands], "sum"),
        node("Cast", ["sum"], "cast", to=1),
        node("Mul", ["cast", "xs"], "half"),
        node("Mul", ["half", "ws"], "y"),
    ]
    weights = {"w": np.ones((8, 8), np.uint8), "ws": np.ones(8, np.float32)}
    return faultless.model(nodes, [X], [Y], weights)


@fault("unfused-scales", "vad.onnx", "y")
def _one_scale_after_the_other(root: Path) -> None:
    beside(root, scaled("xq", "w", "xz"))


@fault("weight-dequantized", "vad.onnx", "y")
def _a_weight_dequantized_in_every_run(root: Path) -> None:
    beside(root, dequantized("MatMul", np.ones((8, 6), np.int8), x=False, zero=False))


# Tiers.


@fault("missing-graph", "int8/editor.onnx")
def _a_tier_without_a_graph(root: Path) -> None:
    for name in ("encoder.onnx", "encoder.onnx_data"):
        (root / "int8" / name).unlink()


@fault("interface-differs", "int8/editor.onnx")
def _another_output(root: Path) -> None:
    with edit(root / "int8/editor.onnx") as proto:
        proto.graph.output.append(value("act", ["rows", SIDE]))


@fault("interface-differs", "int8/editor.onnx", "h")
def _another_shape(root: Path) -> None:
    with edit(root / "int8/editor.onnx") as proto:
        proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 256


@fault("interface-type", "fp16w/editor.onnx", "h")
def _another_float_type(root: Path) -> None:
    with edit(root / "fp16w/editor.onnx") as proto:
        proto.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        next(n for n in proto.graph.node if n.op_type == "Reshape").input[0] = "wide_h"
        proto.graph.node.insert(0, node("Cast", ["h"], "wide_h", to=TensorProto.FLOAT))


@fault("opset-differs", "int8/embed_tokens.onnx")
def _another_opset(root: Path) -> None:
    with edit(root / "int8/embed_tokens.onnx") as proto:
        proto.opset_import[0].version = 19


@fault("untrue-tier", "fp16w/editor.onnx")
def _the_wrong_file(root: Path) -> None:
    for name in ("editor.onnx", "editor.onnx_data"):
        shutil.copy(root / "int8" / name, root / "fp16w" / name)


@fault("float32-left", "int8/encoder.onnx", "w")
def _a_weight_that_was_left_out(root: Path) -> None:
    PassManager("gather-int8,int8w{exclude=w}").run(
        root / "fp32/encoder.onnx", root / "int8/encoder.onnx", force=True
    )
    with edit(root / "int8/encoder.onnx") as proto:
        del proto.metadata_props[:]
        extra = random(0, SIDE, SIDE).astype(np.int8)
        proto.graph.initializer.append(numpy_helper.from_array(extra, "q"))
        proto.graph.node.append(node("Cast", ["q"], "qf", to=1))
        last = next(n for n in proto.graph.node if n.op_type == "MatMul")
        proto.graph.node.append(node("Add", [last.input[1], "qf"], "sum"))
        proto.graph.output.append(value("sum", [SIDE, SIDE]))
    with edit(root / "fp32/encoder.onnx") as proto:
        proto.graph.output.append(value("sum", [SIDE, SIDE]))
        proto.graph.node.append(node("Identity", ["w"], "sum"))
    with edit(root / "fp16w/encoder.onnx") as proto:
        proto.graph.output.append(value("sum", [SIDE, SIDE]))
        proto.graph.node.append(node("Cast", ["w"], "sum", to=1))


@fault("not-derived", "int8/editor.onnx", derived=True)
def _a_weight_that_was_changed(root: Path) -> None:
    path = root / "int8/editor.onnx_data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


# Lists of hashes.


@fault("manifest-malformed", "manifest.json", relist=False)
def _no_sha256(root: Path) -> None:
    with edit_json(root / "manifest.json") as manifest:
        manifest["files"]["LICENSE"]["sha256"] = "?"
        manifest["files"]["LICENSE"]["bytes"] = 11
    (root / "LICENSE").unlink()
    with edit_json(root / "manifest.json") as manifest:
        manifest["files"].pop("LICENSE")
        manifest["files"]["../LICENSE"] = {"bytes": 1, "sha256": "0" * 64}


@fault("manifest-malformed", "SHA256SUMS")
def _a_line_that_is_none(root: Path) -> None:
    (root / "SHA256SUMS").write_text("hello\n")


@fault("listed-file-missing", "manifest.json", relist=False)
def _a_listed_file_that_is_gone(root: Path) -> None:
    (root / "LICENSE").unlink()


@fault("size-differs", "LICENSE", relist=False)
def _a_file_that_grew(root: Path) -> None:
    with (root / "LICENSE").open("a") as file:
        file.write("and more\n")


@fault("unlisted-file", "notes.txt", relist=False)
def _a_file_that_nobody_lists(root: Path) -> None:
    (root / "notes.txt").write_text("hello")


@fault("hash-differs", "int8/editor.onnx_data", relist=False)
def _a_flipped_bit(root: Path) -> None:
    _a_weight_that_was_changed(root)


@fault("hash-differs", "int8/editor.onnx_data")
def _a_flipped_bit_in_a_list_of_sha256sum(root: Path) -> None:
    (root / "int8/editor.sha256").write_text(f"{'0' * 64}  editor.onnx_data\n")


# Metadata.


def in_metadata(root: Path, change: Callable[[Any], None]) -> None:
    """Change metadata.json, and what the manifest says of it."""
    faultless.relist(root)
    with edit_json(root / "metadata.json") as found:
        change(found)
    faultless.relist_manifest(root)


def encoder_of(found: Any) -> Any:
    return found["tiers"]["int8"]["graphs"]["encoder"]


@fault("metadata-malformed", "metadata.json", relist=False)
def _no_pipeline(root: Path) -> None:
    in_metadata(root, lambda found: encoder_of(found).pop("pipeline"))


@fault("metadata-malformed", "metadata.json", relist=False)
def _metadata_that_is_no_json(root: Path) -> None:
    (root / "metadata.json").write_text("{")
    faultless.relist_manifest(root)


@fault("metadata-untrue", "metadata.json", relist=False)
def _another_ir_version(root: Path) -> None:
    in_metadata(root, lambda found: encoder_of(found).update(ir_version=8))


@fault("metadata-untrue", "metadata.json", relist=False)
def _another_input(root: Path) -> None:
    in_metadata(root, lambda found: encoder_of(found)["inputs"][0].update(name="audio"))


@fault("gate-failed", "metadata.json", relist=False)
def _a_gate_that_failed(root: Path) -> None:
    in_metadata(root, lambda found: encoder_of(found)["gates"][0].update(passed=False))


@fault("gate-missing", "metadata.json", relist=False)
def _no_gate(root: Path) -> None:
    in_metadata(root, lambda found: encoder_of(found).update(gates=[]))


@fault("named-file-missing", "metadata.json", relist=False)
def _a_shared_file_that_is_not_there(root: Path) -> None:
    in_metadata(root, lambda found: found["files"].append("mel_filters.npz"))


@fault("named-file-missing", "export_metadata.json")
def _a_file_in_metadata_of_somebody(root: Path) -> None:
    with (root / "export_metadata.json").open("w") as file:
        file.write('{"graphs": {"encoder": "encoder.onnx", "mel": "mel.onnx"}}')


@fault("licence-missing", relist=False)
def _no_licence(root: Path) -> None:
    (root / "LICENSE").unlink()
    in_metadata(root, lambda found: found.update(license=None))


def found(root: Path, **more: Any) -> Any:
    return lint([root], Options(**{"min_ort": "1.17", **more})).findings


def test_the_clean_bundle_has_no_finding(tmp_path: Path) -> None:
    root = faultless.clean(tmp_path / "bundle")
    assert list(map(str, found(root, derived=True))) == []
    for path in sorted(root.rglob("*.onnx")):
        assert list(map(str, lint([path], Options(min_ort="1.17")).findings)) == []


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.plant.__name__)
def test_a_fault_is_found_by_exactly_its_rule(case: Fault, tmp_path: Path) -> None:
    root = faultless.clean(tmp_path / "bundle")
    case.plant(root)
    if case.relist:
        faultless.relist(root, hashed=case.options.get("hash", True))
    findings = found(root, **case.options)
    assert {finding.rule for finding in findings} == {case.rule}, list(map(str, findings))
    paths = {Path(finding.path).relative_to(root).as_posix() for finding in findings}
    assert case.file is None or case.file in paths
    assert case.where is None or case.where in {finding.where for finding in findings}


def overloads() -> onnx.ModelProto:
    """A function that calls another one of the same name."""

    def function(overload: str, inner: onnx.NodeProto) -> onnx.FunctionProto:
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("custom", 1)]
        nodes = [inner, node("Identity", ["b"], "c")]
        return helper.make_function(
            "custom", "F", ["a"], ["c"], nodes, imports, overload=overload
        )

    calls = [node("F", [name], to, domain="custom") for name, to in ("xy", "ab")]
    for call, overload in zip(calls, ("outer", "inner"), strict=True):
        call.overload = overload
    proto = faultless.model(calls[:1], [X], [Y])
    proto.functions.append(function("inner", node("Neg", ["a"], "b")))
    del proto.functions[0].opset_import[1]
    proto.functions.append(function("outer", calls[1]))
    proto.opset_import.add(domain="custom", version=1)
    return proto


SOUND = {
    "a weight on the left, which no fusion takes": scaled("w", "xq", "", "xz"),
    "an operator of a function that only takes more types now": in_function("Relu", 13),
    "a default that is written out": in_function("Softmax", 11, axis=-1),
    "columns that AMX gets right": integers("MatMulInteger", np.ones((4, 48), np.int8), []),
}


@pytest.mark.parametrize("proto", SOUND.values(), ids=SOUND.keys())
def test_what_looks_like_a_fault_and_is_none(proto: onnx.ModelProto, tmp_path: Path) -> None:
    beside(tmp_path, proto)
    assert list(map(str, found(tmp_path))) == []


def test_a_function_may_call_another_overload(tmp_path: Path) -> None:
    beside(tmp_path, overloads())
    assert list(map(str, found(tmp_path, min_ort=None))) == []


def test_every_rule_has_a_fault() -> None:
    assert {case.rule for case in FAULTS} == {rule.name for rule in RULES}
    assert len(FAULTS) >= 40
