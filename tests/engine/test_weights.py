"""Every constant of a model is found, with its place and its readers, and can be chosen."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper, parser

from onnxforge import PassManager, model_io
from onnxforge.core import Fate
from onnxforge.errors import Refused
from onnxforge.needs import needs_constant
from onnxforge.options import ByteSize
from onnxforge.selection import CODES, Selection
from onnxforge.weights import Weight, Weights, for_each
from support import fixtures, oracle, payload

FLOAT = frozenset({ir.DataType.FLOAT})
FORMS = ("value", "value_float", "value_floats", "value_int", "value_ints")
NEST = "/last_nest/Loop/body/"
IF = "/y_if_{}/If/{}_branch/"
NEST_IF = "/sc_nest/If/{}_branch/"

# Of the fixture hiding_places: path of each weight, and who reads it at which input.
INITIALIZERS = {
    "matrix": ["/m_floats/Reshape 1", "/m_reshape/Reshape 1"],
    "first": ["/m_squeeze/Squeeze 1", "/m_unsqueeze/Unsqueeze 1"],
    "three": ["/last_loop/Loop 0", "/last_nest/Loop 0"],
    "w_initializer": ["/y_initializer/MatMul 1"],
    "w_graph_input": ["/y_graph_input/MatMul 1"],
    "w_graph_output": ["/y_graph_output/MatMul 1"],
    "w_same_first": ["/a_same/MatMul 1"],
    "w_same_second": ["/b_same/MatMul 1"],
    "w_twice": ["/m_twice/Mul 0", "/m_twice/Mul 1"],
    "w_no_consumer": [],
    "w_both": ["/rows_both/Gather 0", "/dense_both/MatMul 1"],
    "w_gather": ["/y_gather_output/Gather 0"],
    "w_identity": ["/m_identity/Identity 0"],
    "w_cast": ["/m_cast/Cast 0"],
    "w_transpose": ["/m_transpose/Transpose 0"],
    "w_reshape": ["/m_reshape/Reshape 0"],
    "w_squeeze": ["/m_squeeze/Squeeze 0"],
    "w_unsqueeze": ["/m_unsqueeze/Unsqueeze 0"],
    "w_dequantize": ["/m_dequantize/DequantizeLinear 0"],
    "q_scale": ["/m_dequantize/DequantizeLinear 1"],
    "w_captured": [
        IF.format("captured", "then") + "/t_cap/MatMul 1",
        IF.format("captured", "else") + "/n_cap/Neg 0",
    ],
    "w_handed": [
        IF.format("handed_out", "then") + "/t_han/Identity 0",
        IF.format("handed_out", "else") + "/e_han/Neg 0",
    ],
    "w_loop_captured": ["/last_loop/Loop/body//b_loop/MatMul 1"],
    "w_scan_captured": ["/y_scan/Scan/body//b_scan/MatMul 1"],
    "w_nest_outer": [NEST + NEST_IF.format("else") + "/m_nest/Mul 1"],
    IF.format("own", "then") + "w_own": [IF.format("own", "then") + "/t_own/MatMul 1"],
    IF.format("own", "else") + "w_own": [IF.format("own", "else") + "/e_own/MatMul 1"],
    "/last_loop/Loop/body/w_loop_own": ["/last_loop/Loop/body//a_loop/MatMul 1"],
    "/y_scan/Scan/body/w_scan_own": ["/y_scan/Scan/body//a_scan/MatMul 1"],
    NEST + "w_nest_loop": [NEST + NEST_IF.format("else") + "/m_nest/Mul 0"],
    NEST + NEST_IF.format("then") + "w_nest": [
        NEST + NEST_IF.format("then") + "/t_nest/MatMul 1"
    ],
}
CONSTANTS = {
    "w_value": ["/y_value/MatMul 1"],
    "w_floats": ["/m_floats/Reshape 0"],
    "w_float": ["/y_value_float/Mul 1"],
    IF.format("constant", "then") + "w_con_then": [
        IF.format("constant", "then") + "/t_con/MatMul 1"
    ],
    IF.format("constant", "else") + "w_con_else": [
        IF.format("constant", "else") + "/e_con/MatMul 1"
    ],
    "local::project/w_function": ["local::project//p_function/MatMul 1"],
}


def weights_of(fixture: str) -> Weights:
    return Weights(model_io.load(fixtures.built(fixture)))


def model(body: str, initializers: str = "", opset: int = 18) -> ir.Model:
    """A model around nodes that read x, and make y."""
    text = f"""<ir_version: 9, opset_import: ["" : {opset}, "org.example" : 1]>
g (float[N,4] x, int64[1] n, bool flag) => (float y) <{initializers}> {{ {body} }}"""
    return model_io.from_proto(parser.parse_model(text))


def value(of: ir.Model, name: str) -> ir.Value:
    made = {v.name: v for node in of.graph.all_nodes() for v in node.outputs}
    made |= {v.name: v for v in of.graph.inputs} | dict(of.graph.initializers)
    return made[name]


def by_path(weights: Weights) -> dict[str, Weight]:
    found = {weight.where: weight for weight in weights}
    assert len(found) == len(weights)
    return found


def uses(weight: Weight) -> list[str]:
    return [f"{use.where} {use.index}" for use in weight.uses]


def test_every_weight_is_found_in_its_place_with_its_readers() -> None:
    found = by_path(weights_of("hiding_places"))
    assert {path: uses(weight) for path, weight in found.items()} == INITIALIZERS | CONSTANTS


def test_a_use_is_the_node_input_that_reads_the_value() -> None:
    for weight in weights_of("hiding_places"):
        for use in weight.uses:
            assert use.node.inputs[use.index] is weight.value
            assert list(use.scope.graph)[use.position] is use.node


def test_a_weight_says_what_holds_it() -> None:
    for path, weight in by_path(weights_of("hiding_places")).items():
        held = None if weight.node is None else weight.node.op_type
        assert held == ("Constant" if path in CONSTANTS else None)
        assert weight.value is not None
        assert path == weight.scope.path + (weight.value.name or "")


def test_a_weight_of_a_body_belongs_to_the_scope_of_the_body() -> None:
    found = by_path(weights_of("hiding_places"))
    nested = found[NEST + NEST_IF.format("then") + "w_nest"].scope
    assert nested.parent is not None
    assert nested.parent is found[NEST + "w_nest_loop"].scope
    assert nested.parent.parent is found["three"].scope
    function = found["local::project/w_function"].scope
    assert function.parent is None
    assert function.function is not None
    assert function.function.name == "project"


def test_the_opset_of_a_body_is_that_of_its_model_and_a_function_has_its_own() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
g (float[N] x, bool flag) => (float[N] y) {
  z = If(flag) <then_branch = t () => (float[N] a) { c = Constant <value_float = 1.0> ()
                                                     a = Add(x, c) },
                else_branch = e () => (float[N] b) { b = Identity(x) }>
  y = local.f(z)
}
<domain: "local", opset_import: ["" : 17]>
f (u) => (v) { k = Constant <value_float = 2.0> () v = Mul(u, k) }"""
    weights = Weights(model_io.from_proto(parser.parse_model(text)))
    versions = [(w.where, w.scope.opset_imports[""]) for w in weights]
    assert versions == [("If#0/then_branch/c", 18), ("local::f/k", 17)]


def test_outputs_overridable_and_needed_constants_are_known() -> None:
    found = by_path(weights_of("hiding_places"))
    assert [p for p, w in found.items() if w.is_output] == ["w_graph_output"]
    assert [p for p, w in found.items() if w.is_overridable] == ["w_graph_input"]
    needed = [path for path, weight in found.items() if weight.is_needed_constant]
    assert needed == ["matrix", "first", "q_scale"]


def test_scales_and_bounds_of_old_opsets_are_needed_constants() -> None:
    found = by_path(weights_of("old_opset_11"))
    needed = {path for path, weight in found.items() if weight.is_needed_constant}
    assert needed == {"empty", "roi", "part_scales", "scales", "low", "high"}


def test_a_weight_that_a_body_gives_back_is_an_output() -> None:
    (weight,) = weights_of("captured_output")
    assert weight.is_output
    assert uses(weight) == ["/w/If/else_branch//turned/Neg 0"]


def test_a_constant_that_its_body_gives_back_is_an_output() -> None:
    made = model(
        """y = If(flag) <
          then_branch = t () => (float a) { a = Constant <value_float = 1.0> () },
          else_branch = e () => (float b) { b = Neg(w) }>""",
        "float w = {2}",
    )
    outputs = {weight.where: weight.is_output for weight in Weights(made)}
    assert outputs == {"w": False, "If#0/then_branch/a": True}


def test_an_inner_name_that_hides_an_outer_one_is_another_weight() -> None:
    made = model(
        """z = If(flag) <then_branch = t () => (float a) <float w = {1}> { a = Neg(w) },
                         else_branch = e () => (float b) <float w = {2}> { b = Neg(w) }>
           y = Add(x, z)""",
    )
    found = {w.where: (w.tensor.numpy().item(), uses(w)) for w in Weights(made)}
    assert found == {
        "If#0/then_branch/w": (1.0, ["If#0/then_branch/Neg#0 0"]),
        "If#0/else_branch/w": (2.0, ["If#0/else_branch/Neg#0 0"]),
    }


@pytest.mark.parametrize("name", fixtures.names())
def test_no_weight_is_missed_and_none_is_found_twice(name: str) -> None:
    def named(place: str) -> str:
        *_, before, last = place.split(" > ")
        return before if last in FORMS else last

    digests = payload.tensor_digests(fixtures.built(name))
    expected = Counter((named(place), sha) for place, sha in digests.items())
    found = Counter(
        (weight.value.name, hashlib.sha256(weight.tensor.tobytes()).hexdigest())
        for weight in weights_of(name)
        if weight.value is not None
    )
    assert found == expected


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = float[2,1] {1, 2}", np.array([[1], [2]], np.float32)),
        ("value = int32 {7}", np.array(7, np.int32)),
        ("value_float: float = 1.5", np.array(1.5, np.float32)),
        ("value_floats = [1.0, 0.1]", np.array([1, 0.1], np.float32)),
        ("value_int: int = 9007199254740993", np.array(2**53 + 1, np.int64)),
        ("value_ints = [-1, 2, 3]", np.array([-1, 2, 3], np.int64)),
        ("value_ints: ints = []", np.array([], np.int64)),
    ],
)
def test_every_form_of_a_constant_is_a_tensor(attribute: str, expected: np.ndarray) -> None:
    (weight,) = Weights(model(f"c = Constant <{attribute}> () y = Mul(x, c)"))
    seen = weight.tensor.numpy()
    assert (weight.where, uses(weight)) == ("c", ["Mul#1 1"])
    assert (seen.dtype, seen.shape) == (expected.dtype, expected.shape)
    assert seen.tobytes() == expected.tobytes()
    assert weight.nbytes == expected.nbytes


@pytest.mark.parametrize(
    ("attribute", "shape", "content"),
    [
        ('value_string = "abc"', (), [b"abc"]),
        ('value_strings = ["a", "", "bcd"]', (3,), [b"a", b"", b"bcd"]),
    ],
)
def test_strings_are_weights_too(
    attribute: str, shape: tuple[int, ...], content: list[bytes]
) -> None:
    (weight,) = Weights(model(f"c = Constant <{attribute}> () y = Identity(c)"))
    assert weight.dtype == ir.DataType.STRING
    assert weight.tensor.shape.numpy() == shape
    assert list(weight.tensor.numpy().ravel()) == content
    assert weight.nbytes == sum(map(len, content))


def test_a_constant_that_a_function_takes_as_an_attribute_is_no_weight() -> None:
    # The function of this fixture has `value_float: float = @gain` beside its weight.
    inside = [w.where for w in weights_of("hiding_places") if w.scope.function]
    assert inside == ["local::project/w_function"]


def test_tensors_in_attributes_of_other_nodes_are_weights_without_a_value() -> None:
    made = model("c = ConstantOfShape <value = float[1] {3}> (n) y = org.example.Mix(c)")
    mix = made.graph[1]
    tables = [ir.tensor(np.full(n, n, np.float32)) for n in (2, 3)]
    mix.attributes.add(ir.AttrTensors("tables", tables))
    found = by_path(Weights(made))
    sizes = {path: weight.nbytes for path, weight in found.items()}
    assert sizes == {
        "ConstantOfShape#0.value": 4,
        "Mix#1.tables[0]": 8,
        "Mix#1.tables[1]": 12,
    }
    for weight in found.values():
        assert weight.value is None
        assert weight.uses == ()
        assert not weight.is_overridable
    assert found["Mix#1.tables[0]"].node is mix


def test_a_constant_of_another_domain_is_an_operator_like_any_other() -> None:
    made = model("c = org.example.Constant <value = float[1] {3}> () y = Mul(x, c)")
    (weight,) = Weights(made)
    assert (weight.where, weight.value) == ("Constant#0.value", None)


def test_only_ai_onnx_operators_need_constants() -> None:
    assert needs_constant("", "Reshape") == needs_constant("ai.onnx", "Reshape") == (1,)
    assert needs_constant("", "MatMul") == ()
    assert needs_constant("com.microsoft", "Reshape") == ()


BEHIND = {
    "": [],
    "v = Identity(w)": ["Identity"],
    "v = Cast <to=10> (w)": ["Cast"],
    "v = Transpose <perm=[1,0]> (w)": ["Transpose"],
    "v = Reshape(w, shape)": ["Reshape"],
    "s = Constant <value_ints = [3,2]> () v = Reshape(w, s)": ["Reshape"],
    "a = Unsqueeze(w, zero) v = Squeeze(a, zero)": ["Unsqueeze", "Squeeze"],
    "v = DequantizeLinear(q, scale)": ["DequantizeLinear"],
    "v = DequantizeLinear(q, scale, point)": ["DequantizeLinear"],
    "a = DequantizeLinear(q, scale) b = Transpose(a) c = Reshape(b, shape)"
    " d = Cast <to=10> (c) v = Identity(d)": [
        "DequantizeLinear",
        "Transpose",
        "Reshape",
        "Cast",
        "Identity",
    ],
}
STOCK = """float[2,3] w = {1,2,3,4,5,6}, int8[2] q = {1,2}, float scale = {0.5},
  int8 point = {1}, int64[2] shape = {3,2}, int64[1] zero = {0}"""


@pytest.mark.parametrize(("nodes", "operators"), BEHIND.items())
def test_the_weight_behind_a_value_is_seen_with_the_way(
    nodes: str, operators: list[str]
) -> None:
    source = "q" if "(q," in nodes else "w"
    made = model(f"{nodes} y = Mul(x, {'v' if nodes else 'w'})", STOCK)
    origin = Weights(made).behind(value(made, "v" if nodes else "w"))
    assert origin is not None
    assert origin.weight.where == source
    assert [node.op_type for node in origin.path] == operators
    previous = origin.weight.value
    for node in origin.path:
        assert node.inputs[0] is previous
        previous = node.outputs[0]


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param("v = Neg(w)", id="arithmetic"),
        pytest.param("a = Neg(w) v = Identity(a)", id="arithmetic further up"),
        pytest.param("v = Add(w, w)", id="a sum of constants"),
        pytest.param("v = Identity(x)", id="a graph input"),
        pytest.param("v = org.example.Identity(w)", id="an unknown operator"),
        pytest.param("v = Reshape(w, n)", id="a shape from outside"),
        pytest.param("v = DequantizeLinear(q, x)", id="a scale from outside"),
        pytest.param(
            "v = If(flag) <then_branch = t () => (float a) { a = Identity(w) },"
            " else_branch = e () => (float b) { b = Neg(w) }>",
            id="a branch",
        ),
    ],
)
def test_nothing_is_behind(nodes: str) -> None:
    made = model(f"{nodes} y = Mul(x, v)", STOCK)
    assert Weights(made).behind(value(made, "v")) is None


def test_nothing_is_behind_an_input_of_a_function() -> None:
    weights = weights_of("hiding_places")
    function = next(iter(weights.model.functions.values()))
    assert weights.behind(function.inputs[0]) is None
    assert weights.behind(None) is None
    assert weights.of(None) is None
    assert weights.of(function.inputs[0]) is None


def test_the_weight_behind_is_seen_from_inside_a_body() -> None:
    weights = weights_of("hiding_places")
    node = next(u.node for w in weights for u in w.uses if u.node.op_type == "Identity")
    origin = weights.behind(node.outputs[0])
    assert origin is not None
    captured = next(w for w in weights if w.where == "w_handed")
    inner = captured.uses[0].node
    assert inner.graph is not captured.scope.graph
    seen = weights.behind(inner.outputs[0])
    assert seen is not None
    assert seen.weight is captured
    assert seen.path == (inner,)


def names_of(proto: onnx.ModelProto) -> Iterator[str]:
    def in_nodes(nodes: list[onnx.NodeProto]) -> Iterator[str]:
        for node in nodes:
            yield from (node.name, *node.input, *node.output)
            for attribute in node.attribute:
                for graph in [*attribute.graphs, *([attribute.g] * attribute.HasField("g"))]:
                    yield from in_graph(graph)

    def in_graph(graph: onnx.GraphProto) -> Iterator[str]:
        for entries in (graph.input, graph.output, graph.initializer, graph.value_info):
            yield from (entry.name for entry in entries)
        yield from in_nodes(graph.node)

    yield from in_graph(proto.graph)
    for function in proto.functions:
        yield from (*function.input, *function.output)
        yield from in_nodes(function.node)


@pytest.mark.parametrize("name", ["hiding_places", "merged_decoder", "captured_output"])
def test_a_new_name_repeats_no_name_of_any_scope_and_no_new_one(name: str) -> None:
    taken = set(names_of(onnx.load(fixtures.built(name), load_external_data=False)))
    weights = weights_of(name)
    for old in sorted(taken - {""}):
        for _ in range(2):
            new = weights.unique(old)
            assert new not in taken
            taken.add(new)


def test_a_name_that_is_free_is_given_as_it_is() -> None:
    weights = weights_of("nameless")
    assert [weights.unique("up_w_half") for _ in range(3)] == [
        "up_w_half",
        "up_w_half_1",
        "up_w_half_2",
    ]
    assert weights.unique("up_w") == "up_w_1"


def test_a_name_that_only_value_info_has_is_taken() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
g (float[4] x) => (float[4] y) { y = Neg(x) }"""
    proto = parser.parse_model(text)
    proto.graph.value_info.add().CopyFrom(
        onnx.helper.make_tensor_value_info("ghost", onnx.TensorProto.FLOAT, [4])
    )
    assert Weights(model_io.from_proto(proto)).unique("ghost") == "ghost_1"


def half(weight: Weight) -> ir.TensorProtocol:
    return ir.tensor(weight.tensor.numpy().astype(np.float16), name="whatever")


def test_an_initializer_takes_another_tensor_and_its_type() -> None:
    made = model("c = Cast <to=1> (w) y = Mul(x, c)", "float[2] w = {1,2}")
    (weight,) = Weights(made)
    tensor = half(weight)
    weight.store(tensor)
    assert weight.tensor is tensor
    assert weight.dtype == made.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert made.graph.initializers["w"].const_value is tensor
    (stored,) = model_io.to_proto(made).graph.initializer
    assert (stored.name, stored.data_type) == ("w", onnx.TensorProto.FLOAT16)
    assert stored.raw_data == np.array([1, 2], np.float16).tobytes()
    assert [w.tensor for w in Weights(made)] == [tensor]


@pytest.mark.parametrize(
    "attribute", ["value = float[2] {1, 2}", "value_floats = [1.0, 2.0]", "value_float = 1.0"]
)
def test_a_constant_node_takes_another_tensor_whatever_its_form(attribute: str) -> None:
    made = model(f"c = Constant <{attribute}> () f = Cast <to=1> (c) y = Mul(x, f)")
    (weight,) = Weights(made)
    tensor = half(weight)
    weight.store(tensor)
    node = model_io.to_proto(made).graph.node[0]
    assert [a.name for a in node.attribute] == ["value"]
    assert node.attribute[0].t.data_type == onnx.TensorProto.FLOAT16
    assert value(made, "c").dtype == ir.DataType.FLOAT16
    (again,) = Weights(made)
    assert again.tensor is tensor
    assert (again.where, uses(again)) == ("c", ["Cast#1 0"])


def test_work_on_threads_comes_back_in_order() -> None:
    assert for_each(lambda n: n * n, range(100)) == [n * n for n in range(100)]


REASONS = {
    "good": None,
    "small": "OF203",
    "whole": "OF204",
    "scales": "OF205",
    "y2": "OF206",
    "override": "OF207",
    "unread": "OF208",
    "Mix#5.table": "OF209",
    "left_out": "OF202",
}


def every_reason() -> ir.Model:
    text = """<ir_version: 9, opset_import: ["" : 18, "org.example" : 1]>
g (float[4] x, float[4] override, float[1,1,4] z) => (float[4] y, float[4] y2, float[1,1,N] r)
<float[4] good = {1,2,3,4}, float[1] small = {1}, int32[4] whole = {1,2,3,4},
 float[4] scales = {1,1,1,1}, float[4] y2 = {1,1,1,1}, float[4] override = {1,1,1,1},
 float[4] unread = {1,1,1,1}, float[4] left_out = {1,1,1,1}> {
  a = Add(x, good)  b = Mul(a, small)  c = Cast <to=1> (whole)  d = Add(b, c)
  r = Resize(z, , scales)
  e = org.example.Mix <table = float[4] {1,2,3,4}> (d)
  f = Add(e, override) h = Add(f, y2)  y = Add(h, left_out)
}"""
    return model_io.from_proto(parser.parse_model(text))


def test_every_reason_to_leave_a_weight_has_its_code() -> None:
    selection = Selection(FLOAT, ByteSize(16), exclude=("left_*",))
    weights = Weights(every_reason())
    chosen, findings = selection.split(weights)
    codes = {finding.where: finding.code for finding in findings}
    assert {w.where: None for w in chosen} | codes == REASONS
    assert set(codes.values()) <= set(CODES)
    sizes = {weight.where: weight.nbytes for weight in weights}
    assert {f.where: f.nbytes for f in findings} == {p: sizes[p] for p in codes}


def test_what_is_excluded_is_told_from_what_is_skipped() -> None:
    _, findings = Selection(FLOAT, exclude=("left_*", "whole")).split(Weights(every_reason()))
    excluded = {f.where for f in findings if f.fate is Fate.EXCLUDED}
    assert excluded == {"left_out", "whole"}
    assert {f.fate for f in findings} == {Fate.EXCLUDED, Fate.SKIPPED}


@pytest.mark.parametrize("name", fixtures.names())
@pytest.mark.parametrize("options", [{}, {"include": ("*w*",)}, {"exclude": ("*w*",)}])
def test_every_weight_is_either_chosen_or_reported(
    name: str, options: dict[str, tuple[str, ...]]
) -> None:
    weights = weights_of(name)
    chosen, findings = Selection(FLOAT, ByteSize(64), **options).split(weights)
    paths = [weight.where for weight in chosen] + [finding.where for finding in findings]
    assert sorted(paths) == sorted(weight.where for weight in weights)
    total = sum(w.nbytes for w in chosen) + sum(f.nbytes for f in findings)
    assert total == sum(weight.nbytes for weight in weights)


def chosen_of(weights: Weights, include: str, exclude: tuple[str, ...] = ()) -> list[str]:
    chosen, _ = Selection(FLOAT, include=(include,), exclude=exclude).split(weights)
    return [weight.where for weight in chosen]


OWN_THEN, OWN_ELSE = (IF.format("own", branch) + "w_own" for branch in ("then", "else"))


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("w_both", ["w_both"]),
        ("w_same_*", ["w_same_first", "w_same_second"]),
        ("w_own", [OWN_THEN, OWN_ELSE]),
        (OWN_ELSE, [OWN_ELSE]),
        ("*/then_branch/w_own", [OWN_THEN]),
        ("/dense_both/MatMul", ["w_both"]),
        ("/t_own/MatMul", [OWN_THEN]),
        ("*/else_branch//e_own/*", [OWN_ELSE]),
        ("/b_loop/MatMul", ["w_loop_captured"]),
        ("local::*", ["local::project/w_function"]),
        ("/M_TWICE/*", None),
        ("w_sam?", None),
    ],
)
def test_a_glob_matches_names_and_paths_of_weights_and_of_their_readers(
    glob: str, expected: list[str] | None
) -> None:
    weights = weights_of("hiding_places")
    if expected is None:
        with pytest.raises(Refused):
            chosen_of(weights, glob)
    else:
        assert chosen_of(weights, glob) == expected


def test_a_node_without_a_name_is_called_by_operator_and_position() -> None:
    assert chosen_of(weights_of("nameless"), "MatMul#0") == ["up_w"]


def test_exclude_wins_over_include() -> None:
    assert chosen_of(weights_of("nameless"), "*_w", ("up_*",)) == ["down_w"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error_that_names_it(option: str) -> None:
    selection = Selection(FLOAT, **{option: ("up_w", "lm_head*")})
    with pytest.raises(Refused, match=r"'lm_head\*' matches no weight"):
        selection.split(weights_of("nameless"))


def test_a_glob_that_matches_only_what_cannot_be_treated_is_no_error() -> None:
    chosen, findings = Selection(FLOAT, include=("matrix",)).split(weights_of("hiding_places"))
    assert chosen == []
    assert Counter(f.code for f in findings) == {"OF202": 36, "OF204": 1}


def test_nothing_is_behind_a_node_without_inputs() -> None:
    made = model("v = Identity() y = Mul(x, v)", STOCK)
    assert Weights(made).behind(value(made, "v")) is None


def with_a_default() -> onnx.ModelProto:
    """A function whose attribute has a weight as its default."""
    default = numpy_helper.from_array(np.full((16, 24), 0.1, np.float32), "t")
    constant = helper.make_node("Constant", [], ["c"], "c")
    constant.attribute.append(onnx.AttributeProto(name="value", ref_attr_name="w", type=4))
    function = helper.make_function(
        "local",
        "f",
        ["u"],
        ["v"],
        [constant, helper.make_node("MatMul", ["u", "c"], ["v"], "mm")],
        [helper.make_opsetid("", 18)],
        attribute_protos=[helper.make_attribute("w", default)],
    )
    infos = [helper.make_tensor_value_info(n, 1, ["N", w]) for n, w in (("x", 16), ("y", 8))]
    nodes = [
        helper.make_node("f", ["x"], ["a"], "call", domain="local"),
        helper.make_node("MatMul", ["a", "m"], ["y"], "mm"),
    ]
    more = numpy_helper.from_array(np.full((24, 8), 0.3, np.float32), "m")
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [more])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)


@pytest.mark.parametrize("layout", ["inline", "sidecar"])
def test_the_default_of_a_function_attribute_is_not_lost(tmp_path: Path, layout) -> None:
    proto = with_a_default()
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(proto.SerializeToString())
    PassManager("fp16w{min_bytes=0}").run(source, target, layout=layout)
    inputs = {"x": np.ones((2, 16), np.float32)}
    oracle.assert_bit_equal(
        oracle.run(target, inputs), oracle.run(oracle.round_weights_fp16(proto, ["m"]), inputs)
    )


def test_the_default_of_a_function_attribute_is_a_weight(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(with_a_default().SerializeToString())
    assert len(Weights(model_io.load(source))) == 2
