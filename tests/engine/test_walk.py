"""Every graph and every tensor of a model has a path."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper, parser

from onnxforge import model_io
from onnxforge.walk import label, proto_graphs, proto_tensors, replace_tensors, scopes
from support import fixtures

HIDING_PLACES = [
    "",
    "/y_if_own/If/then_branch/",
    "/y_if_own/If/else_branch/",
    "/y_if_captured/If/then_branch/",
    "/y_if_captured/If/else_branch/",
    "/y_if_constant/If/then_branch/",
    "/y_if_constant/If/else_branch/",
    "/y_if_handed_out/If/then_branch/",
    "/y_if_handed_out/If/else_branch/",
    "/last_loop/Loop/body/",
    "/y_scan/Scan/body/",
    "/last_nest/Loop/body/",
    "/last_nest/Loop/body//sc_nest/If/then_branch/",
    "/last_nest/Loop/body//sc_nest/If/else_branch/",
    "local::project/",
]
MANY = """<ir_version: 9, opset_import: ["" : 18, "local" : 1, "org.example" : 1]>
g (float[2] x, bool flag) => (float[2] y) <float[2] w = {1,2}> {
  a = If(flag) <then_branch = t () => (float[2] b) <float[2] w_t = {3,4}> { b = Add(x, w_t) },
                else_branch = e () => (float[2] c) { c = Add(x, w) }>
  d = local.f(a)
  y = org.example.Mix(d)
}
<domain: "local", opset_import: ["" : 18]>
f (u) => (v) {
  k = Constant <value = float[2] {5,6}> ()
  flag = Constant <value = bool {1}> ()
  v = If(flag) <then_branch = ft () => (float[2] m) { m = Add(u, k) },
                else_branch = fe () => (float[2] n) <float[2] w_f = {7,8}> { n = Add(u, w_f) }>
}"""
TENSORS = {"w", "w_t", "w_f", "k", "flag", "first", "second"}


def many() -> onnx.ModelProto:
    """Tensors as initializers, in Constant nodes, lists, bodies and functions."""
    proto = parser.parse_model(MANY)
    pair = [numpy_helper.from_array(np.ones(2, np.float32), n) for n in ("first", "second")]
    proto.graph.node[-1].attribute.append(helper.make_attribute("tables", pair))
    return proto


def graphs(proto: onnx.ModelProto) -> list[str]:
    return [graph.name for graph in proto_graphs(proto)]


def test_all_graphs_come_outer_before_inner_and_functions_last() -> None:
    found = list(scopes(model_io.load(fixtures.built("hiding_places"))))
    assert [scope.path for scope in found] == HIDING_PLACES
    for scope in found:
        assert scope.parent is None or found.index(scope.parent) < found.index(scope)
        assert (scope.function is not None) == scope.path.startswith("local::")


def test_the_path_of_a_body_begins_with_that_of_its_parent() -> None:
    for name in fixtures.names():
        for scope in scopes(model_io.load(fixtures.built(name))):
            assert scope.parent is None or scope.path.startswith(scope.parent.path)
            assert scope.path == "" or scope.path.endswith("/")


@pytest.mark.parametrize("name", fixtures.names())
def test_a_model_has_as_many_scopes_as_its_proto_has_graphs_and_functions(name: str) -> None:
    proto = onnx.load(fixtures.built(name), load_external_data=False)
    found = list(scopes(model_io.load(fixtures.built(name))))
    assert len(found) == len(graphs(proto)) + len(proto.functions)
    assert len({scope.path for scope in found}) == len(found)


def test_overloads_of_a_function_have_paths_of_their_own() -> None:
    found = scopes(model_io.load(fixtures.built("really_new_ir")))
    assert [scope.path for scope in found] == ["", "local::dense:grow/", "local::dense:keep/"]


def test_a_body_in_a_function_knows_its_function() -> None:
    model = model_io.from_proto(many())
    inner = [scope for scope in scopes(model) if scope.path == "local::f/If#2/else_branch/"]
    (function,) = model.functions.values()
    assert [scope.function for scope in inner] == [function]


def test_a_node_without_a_name_is_called_by_operator_and_position() -> None:
    node = ir.node("Neg", [])
    assert label(node, 3) == "Neg#3"
    node.name = "mine"
    assert label(node, 3) == "mine"


def test_the_graphs_of_a_proto_are_found_also_in_functions() -> None:
    assert graphs(many()) == ["g", "t", "e", "ft", "fe"]


def test_the_tensors_of_a_proto_are_found_wherever_they_are() -> None:
    proto = many()
    for function in proto.functions:
        for node in function.node[:2]:
            node.attribute[0].t.name = node.output[0]
    names = [tensor.name for tensor in proto_tensors(proto)]
    assert sorted(names) == sorted(TENSORS)


def test_defaults_of_function_attributes_are_tensors_of_a_proto() -> None:
    proto = many()
    default = numpy_helper.from_array(np.ones(2, np.float32), "default")
    proto.functions[0].attribute_proto.append(helper.make_attribute("bias", default))
    assert "default" in {tensor.name for tensor in proto_tensors(proto)}


def test_every_tensor_of_a_model_can_be_replaced() -> None:
    model = model_io.from_proto(many())

    def zeros(old: ir.TensorProtocol) -> ir.TensorProtocol:
        return ir.tensor(np.zeros_like(old.numpy()), name=old.name)

    replace_tensors(model, zeros)
    before = list(proto_tensors(many()))
    after = list(proto_tensors(model_io.to_proto(model)))
    assert len(after) == len(TENSORS)
    assert [(t.name, t.data_type, t.dims) for t in after] == [
        (t.name, t.data_type, t.dims) for t in before
    ]
    assert all(numpy_helper.to_array(t).any() for t in before)
    assert not any(numpy_helper.to_array(t).any() for t in after)


def test_replacing_a_tensor_by_itself_keeps_the_attributes() -> None:
    model = model_io.from_proto(many())
    nodes = [node for scope in scopes(model) for node in scope.graph]
    before = [attribute for node in nodes for attribute in node.attributes.values()]
    replace_tensors(model, lambda tensor: tensor)
    after = [attribute for node in nodes for attribute in node.attributes.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))
