"""Constant operands traced to what is stored, and scales mapped back to what is seen."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper, parser

from onnxforge import model_io
from onnxforge.numerics.channels import Channels, absmax
from onnxforge.operands import Operand, channel_axes, ends, trace, weight_channels
from onnxforge.weights import Weights

Axes = tuple[int, ...]
NODES = """<ir_version: 9, opset_import: ["" : {opset}, "org.example" : 1]>
g (float[n,4] x, int64[2] s, float[1] f) => (float y) <{initializers}> {{ {body} }}"""


def model(body: str, initializers: str, opset: int = 18) -> ir.Model:
    """A model around nodes that make y."""
    text = NODES.format(body=body, initializers=initializers, opset=opset)
    return model_io.from_proto(parser.parse_model(text))


def numbers(name: str, *shape: int, dtype: str = "float") -> str:
    values = ",".join(str(i % 100 + 1) for i in range(math.prod(shape)))
    dims = f"[{','.join(map(str, shape))}]" if shape else ""
    return f"{dtype}{dims} {name} = {{{values}}}"


def ints(name: str, *values: int) -> str:
    return f"int64[{len(values)}] {name} = {{{','.join(map(str, values))}}}"


def reader(of: ir.Model, output: str = "y") -> ir.Node:
    """The node that makes a value, wherever it is."""
    graphs = [of.graph, *(function.graph for function in of.functions.values())]
    nodes = [node for graph in graphs for node in graph.all_nodes()]
    return next(n for n in nodes if any(o.name == output for o in n.outputs))


def traced(of: ir.Model, index: int = 1, output: str = "y") -> Operand | None:
    return trace(reader(of, output), index, Weights(of))


# --- what is looked through ----------------------------------------------------------------

OPERATOR = re.compile(r"= (\w+)")
SEEN = [
    ("t = Identity(w)", "", 18, (4, 6)),
    ("t = Transpose(w)", "", 18, (6, 4)),
    ("t = Transpose<perm=[1,0]>(w)", "", 18, (6, 4)),
    ("t = Transpose<perm=[0,1]>(w)", "", 18, (4, 6)),
    ("t = Reshape(w, r)", ints("r", 6, 4), 18, (6, 4)),
    ("t = Reshape(w, r)", ints("r", 8, -1), 18, (8, 3)),
    ("t = Reshape(w, r)", ints("r", 0, -1, 2), 18, (4, 3, 2)),
    ("t = Reshape(w, r)", ints("r", 0, 0), 18, (4, 6)),
    ("t = Reshape(w, r)", ints("r", -1), 18, (24,)),
    ("t = Reshape<allowzero=0>(w, r)", ints("r", 0, 6), 18, (4, 6)),
    ("t = Reshape<allowzero=1>(w, r)", ints("r", 2, -1), 18, (2, 12)),
    ("t = Reshape<shape=[3,8]>(w)", "", 4, (3, 8)),
    ("t = Unsqueeze(w, r)", ints("r", 0, -1), 18, (1, 4, 6, 1)),
    ("t = Unsqueeze<axes=[1]>(w)", "", 11, (4, 1, 6)),
    ("u = Unsqueeze(w, r) t = Squeeze(u)", ints("r", 0, 2), 18, (4, 6)),
    ('u = Unsqueeze(w, r) t = Squeeze(u, "")', ints("r", 0, 2), 18, (4, 6)),
    (
        "u = Unsqueeze(w, r) t = Squeeze(u, q)",
        ints("r", 0, 2) + ", " + ints("q", -2),
        18,
        (1, 4, 6),
    ),
    ("u = Unsqueeze<axes=[0,2]>(w) t = Squeeze<axes=[0]>(u)", "", 11, (4, 1, 6)),
    ("u = Unsqueeze<axes=[0,2]>(w) t = Squeeze(u)", "", 11, (4, 6)),
    ("t = Cast<to=1>(w)", "", 18, (4, 6)),
    ("r = Constant<value_ints=[2,12]>() t = Reshape(w, r)", "", 18, (2, 12)),
]


def test_a_weight_that_is_read_at_once_has_no_path() -> None:
    found = traced(model("y = MatMul(x, w)", numbers("w", 4, 6)))
    assert found is not None
    assert (found.path, found.shapes, found.shape) == ((), ((4, 6),), (4, 6))


@pytest.mark.parametrize(("body", "more", "opset", "shape"), SEEN)
def test_what_moves_elements_is_looked_through(
    body: str, more: str, opset: int, shape: Axes
) -> None:
    weights = ", ".join(filter(None, [numbers("w", 4, 6), more]))
    found = traced(model(f"{body} y = MatMul(x, t)", weights, opset))
    assert found is not None
    assert (found.weight.where, found.index) == ("w", 1)
    path = [operator for operator in OPERATOR.findall(body) if operator != "Constant"]
    assert [node.op_type for node in found.path] == path
    assert found.shape == shape
    assert found.shapes[0] == (4, 6)
    assert len(found.shapes) == len(path) + 1
    assert (found.scale, found.restored) == (None, ())


UNSEEN = {
    "an activation": ("y = MatMul(x, x)", "", 18),
    "arithmetic": ("t = Neg(w) y = MatMul(x, t)", "", 18),
    "computed shape": ("t = Reshape(w, s) y = MatMul(x, t)", "", 18),
    "computed axes": ("t = Unsqueeze(w, s) y = MatMul(x, t)", "", 18),
    "moved activation": ("t = Transpose(x) y = MatMul(x, t)", "", 18),
    "zero that is no zero": (
        "t = Reshape<allowzero=1>(w, r) y = MatMul(x, t)",
        ints("r", 0, 6),
        18,
    ),
    "wrong shape": ("t = Reshape(w, r) y = MatMul(x, t)", ints("r", 5, 5), 18),
    "shape that does not divide": (
        "t = Reshape(w, r) y = MatMul(x, t)",
        ints("r", 5, -1),
        18,
    ),
    "squeezed what is longer": ("t = Squeeze(w, r) y = MatMul(x, t)", ints("r", 0), 18),
    "squeezed of too many": ("t = Squeeze(w, r) y = MatMul(x, t)", ints("r", 0, 1, 2), 18),
    "new axis twice": ("t = Unsqueeze(w, r) y = MatMul(x, t)", ints("r", 0, 0), 18),
    "no order": ("t = Transpose<perm=[0,0]>(w) y = MatMul(x, t)", "", 18),
    "order of what is not there": ("t = Transpose<perm=[0,2]>(w) y = MatMul(x, t)", "", 18),
    "order of another rank": ("t = Transpose<perm=[0,2,1]>(w) y = MatMul(x, t)", "", 18),
    "narrowed": ("h = Cast<to=10>(w) t = Cast<to=1>(h) y = MatMul(x, t)", "", 18),
    "other type": ("t = Cast<to=11>(w) y = MatMul(x, t)", "", 18),
    "foreign": ("t = org.example.Transpose(w) y = MatMul(x, t)", "", 18),
    "no such input": ("y = MatMul(x)", "", 18),
    "input left out": ('y = MatMul(x, "")', "", 18),
    "nothing to move": ("t = Identity() y = MatMul(x, t)", "", 18),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_is_computed_or_unknown_is_no_constant(case: str) -> None:
    body, more, opset = UNSEEN[case]
    weights = ", ".join(filter(None, [numbers("w", 4, 6), more]))
    assert traced(model(body, weights, opset)) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("first", [True, False])
def test_half_precision_is_looked_through_on_either_side_of_a_transpose(
    dtype: str, first: bool
) -> None:
    moves = (
        "a = Cast<to=1>(w) t = Transpose(a)" if first else "a = Transpose(w) t = Cast<to=1>(a)"
    )
    of = model(f"{moves} y = MatMul(x, t)", numbers("w", 4, 6, dtype=dtype))
    found = traced(of)
    assert found is not None
    assert {node.op_type for node in found.path} == {"Cast", "Transpose"}
    assert found.shape == (6, 4)
    assert found.weight.dtype == getattr(ir.DataType, dtype.upper())


INT8 = numbers("w", 4, 6, dtype="int8")


@pytest.mark.parametrize(
    ("body", "scale", "is_found"),
    [
        ("c = Cast<to=1>(w) t = Mul(c, k)", "float[1,6] k = {1,2,3,4,5,6}", True),
        ("c = Cast<to=1>(w) m = Mul(c, k) t = Transpose(m)", "float k = {2}", True),
        ("c = Cast<to=1>(w) t = Mul(c, f)", "float k = {2}", False),
        ("c = Cast<to=1>(w) t = Mul(k, c)", "float k = {2}", False),
        ("c = Cast<to=1>(w) t = Identity(c)", "float k = {2}", False),
        ("c = Cast<to=10>(w) t = Mul(c, k)", "float16 k = {2}", False),
        ("d = DequantizeLinear(w, k) t = Identity(d)", "float k = {2}", False),
        ("c = Cast<to=1>(w) m = Mul(c, k) t = Mul(m, k)", "float k = {2}", False),
        ("c = Cast<to=1>(w) m = Mul(c, k) t = Cast<to=1>(m)", "float k = {2}", False),
        ("c = Identity(w) t = Mul(c, k)", "int8 k = {2}", False),
        ("c = Cast<to=1>(w) t = Mul(c)", "float k = {2}", False),
        ("c = Cast<to=1>() t = Mul(c, k)", "float k = {2}", False),
    ],
)
def test_int8_is_restored_by_a_cast_and_a_scale(body: str, scale: str, is_found: bool) -> None:
    found = traced(model(f"{body} y = MatMul(x, t)", f"{INT8}, {scale}"))
    assert (found is not None) == is_found
    if found is not None:
        assert found.scale is not None
        assert (found.weight.where, found.scale.where) == ("w", "k")
        assert [node.op_type for node in found.restored] == ["Cast", "Mul"]
        assert not {*found.restored} & {*found.path}


@pytest.mark.parametrize("name", ["r", "k"])
def test_what_a_caller_may_override_is_not_relied_on(name: str) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
g (float[n,4] x, int64[2] s) => (float y)
  <{INT8}, float k = {{2}}, int64[2] r = {{6,4}}> {{
  c = Cast<to=1>(w) m = Mul(c, k) t = Reshape(m, r) y = MatMul(x, t)
}}"""
    proto = parser.parse_model(text)
    assert traced(model_io.from_proto(proto)) is not None
    kind = TensorProto.FLOAT if name == "k" else TensorProto.INT64
    shape = [] if name == "k" else [2]
    proto.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    assert traced(model_io.from_proto(proto)) is None


FUNCTION = """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
g (float[n,4] x) => (float[n,6] y) {{ y = local.f{given}(x) }}
<domain: "local", opset_import: ["" : 18]> f {formal} (u) => (v) {{
  w = Constant<value = {tensor}>()
  t = {move}(w)
  v = MatMul(u, t)
}}"""


@pytest.mark.parametrize(
    ("move", "given", "formal", "is_found"),
    [
        ("Transpose<perm=[1,0]>", "", "", True),
        ("Transpose<perm:ints=@p>", "<p=[1,0]>", "<p>", False),
        ("Cast<to=1>", "", "", True),
        ("Cast<to:int=@p>", "<p=1>", "<p>", False),
    ],
)
def test_a_reference_to_an_attribute_of_a_function_is_unknown(
    move: str, given: str, formal: str, is_found: bool
) -> None:
    values = ",".join(map(str, range(24)))
    tensor = f"float[6,4] {{{values}}}"
    text = FUNCTION.format(given=given, formal=formal, tensor=tensor, move=move)
    found = traced(model_io.from_proto(parser.parse_model(text)), output="v")
    assert (found is not None) == is_found
    if found is not None:
        assert found.weight.where == "local::f/w"


def test_a_weight_of_an_outer_graph_is_found_from_a_body() -> None:
    body = """c = Cast<to=9>(f) q = Squeeze(c) t = Transpose(w)
y = If(q) <then_branch = a () => (float p) { i = Identity(t) p = MatMul(x, i) },
           else_branch = b () => (float o) { o = MatMul(x, t) }>"""
    of = model(body, numbers("w", 6, 4))
    for output, path in (("p", ["Transpose", "Identity"]), ("o", ["Transpose"])):
        found = traced(of, output=output)
        assert found is not None
        assert found.weight.where == "w"
        assert [node.op_type for node in found.path] == path


# --- scales, there and back ----------------------------------------------------------------


@dataclass
class Chain:
    """A weight, nodes that move its elements, and numpy's view of each of their results."""

    weight: np.ndarray
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)

    @property
    def last(self) -> str:
        return f"v{len(self.nodes)}" if self.nodes else "w"

    def add(self, operator: str, places: np.ndarray, given=None, **attributes) -> None:
        """Add a node; ``given`` is its list, an input from opset 13 on."""
        inputs = [self.last]
        if given is not None and (self.opset >= 13 or operator == "Reshape"):
            name = f"c{len(self.nodes)}"
            self.constants.append(numpy_helper.from_array(np.array(given, np.int64), name))
            inputs.append(name)
        elif given is not None:
            attributes["axes"] = given
        output = f"v{len(self.nodes) + 1}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        self.places.append(places)

    def operand(self) -> Operand:
        """What a reader of the last value finds."""
        end = helper.make_node("Neg", [self.last], ["y"])
        stored = self.weight.reshape(self.places[0].shape)
        graph = helper.make_graph(
            [*self.nodes, end],
            "g",
            [],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(stored, "w"), *self.constants],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        of = model_io.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))
        weights = Weights(of)
        found = trace(reader(of), 0, weights)
        assert found is not None
        assert ends(found.weight, weights) == [(reader(of), 0)]
        return found


def factors(draw: st.DrawFn, size: int) -> list[int]:
    """Draw a shape of so many elements."""
    shape = []
    while size > 1 and draw(st.booleans()):
        n = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape.append(n)
        size //= n
    return [*shape, size]


def reshape(draw: st.DrawFn, chain: Chain) -> None:
    places = chain.places[-1]
    shape = factors(draw, places.size)
    told = list(shape)
    for i, n in enumerate(shape):
        if i < places.ndim and places.shape[i] == n and draw(st.booleans()):
            told[i] = 0
    if draw(st.booleans()):
        told[draw(st.integers(0, len(told) - 1))] = -1
    chain.add("Reshape", places.reshape(shape), told)


def transpose(draw: st.DrawFn, chain: Chain) -> None:
    places = chain.places[-1]
    if not places.ndim or draw(st.booleans()):
        chain.add("Transpose", places.T)
    else:
        order = draw(st.permutations(range(places.ndim)))
        chain.add("Transpose", places.transpose(order), perm=order)


def squeeze(draw: st.DrawFn, chain: Chain) -> None:
    places = chain.places[-1]
    ones = [i for i, n in enumerate(places.shape) if n == 1]
    if draw(st.booleans()):
        chain.add("Squeeze", places.squeeze())
    elif ones:
        gone = draw(st.lists(st.sampled_from(ones), min_size=1, unique=True))
        told = [i - places.ndim if draw(st.booleans()) else i for i in gone]
        chain.add("Squeeze", places.squeeze(tuple(gone)), told)


def unsqueeze(draw: st.DrawFn, chain: Chain) -> None:
    places = chain.places[-1]
    count = draw(st.integers(1, 2))
    rank = places.ndim + count
    new = draw(st.lists(st.integers(0, rank - 1), min_size=count, max_size=count, unique=True))
    told = [i - rank if draw(st.booleans()) else i for i in new]
    chain.add("Unsqueeze", np.expand_dims(places, tuple(new)), told)


def identity(draw: st.DrawFn, chain: Chain) -> None:
    chain.add("Identity", chain.places[-1])


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.standard_normal(shape)
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    chain = Chain(values.astype(dtype), draw(st.sampled_from([11, 12, 13, 18])))
    chain.places.append(np.arange(values.size).reshape(shape))
    moves = st.sampled_from([reshape, transpose, squeeze, unsqueeze, identity])
    steps = draw(st.lists(moves, max_size=5))
    cast = draw(st.integers(0, len(steps))) if dtype is not np.float32 else None
    for i in range(len(steps) + 1):
        if i == cast:
            chain.add("Cast", chain.places[-1], to=TensorProto.FLOAT)
        if i < len(steps):
            steps[i](draw, chain)
    return chain


def groups(numbers: np.ndarray) -> set[frozenset[int]]:
    """Which elements have the same number."""
    flat = numbers.reshape(-1).tolist()
    return {frozenset(i for i, n in enumerate(flat) if n == m) for m in set(flat)}


def along_axes(numbers: np.ndarray) -> bool:
    """Whether elements have the same number exactly where they differ along some axes."""
    wanted, axes = groups(numbers), range(numbers.ndim)
    for size in range(numbers.ndim + 1):
        for shared in itertools.combinations(axes, size):
            scales = [1 if axis in shared else n for axis, n in enumerate(numbers.shape)]
            ids = np.arange(math.prod(scales)).reshape(scales)
            if groups(np.broadcast_to(ids, numbers.shape)) == wanted:
                return True
    return False


def owners_at_each_step(chain: Chain, shared: Axes) -> list[np.ndarray]:
    """The numbers of the scales of all elements, in each of the shapes of a chain."""
    seen = chain.places[-1]
    scales = [1 if axis in shared else n for axis, n in enumerate(seen.shape)]
    ids = np.broadcast_to(np.arange(math.prod(scales)).reshape(scales), seen.shape)
    owner = np.empty(seen.size, int)
    owner[seen.reshape(-1)] = ids.reshape(-1)
    return [owner[places] for places in chain.places]


def mapped(operand: Operand, shared: Axes) -> np.ndarray | None:
    """Scales found in the stored tensor, as the reader sees them."""
    channels = operand.channels(shared)
    if channels is None:
        return None
    scales = absmax(operand.weight.tensor, channels).reshape(channels.scale_shape)
    return operand.seen(scales, shared)


def seen_by_numpy(chain: Chain, shared: Axes) -> np.ndarray:
    effective = chain.weight.reshape(-1)[chain.places[-1]].astype(np.float32)
    return np.abs(effective).max(axis=shared, keepdims=True) if shared else abs(effective)


@given(chains(), st.data())
def test_scales_of_what_is_stored_are_those_of_what_is_seen(
    chain: Chain, data: st.DataObject
) -> None:
    operand = chain.operand()
    assert operand.shapes == tuple(places.shape for places in chain.places)
    rank = len(operand.shape)
    shared = tuple(axis for axis in range(rank) if data.draw(st.booleans()))
    found, wanted = mapped(operand, shared), seen_by_numpy(chain, shared)
    torn = not all(along_axes(owner) for owner in owners_at_each_step(chain, shared))
    assert (found is None) == (torn or 2 * wanted.size > chain.weight.size)
    if found is not None:
        assert found.shape == wanted.shape
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_scales_follow_every_order_of_three_axes(order: Axes, shared: Axes) -> None:
    values = np.random.default_rng(4).standard_normal((2, 3, 4)).astype(np.float32)
    chain = Chain(values, 18, places=[np.arange(24).reshape(2, 3, 4)])
    chain.add("Transpose", chain.places[0].transpose(order), perm=order)
    found = mapped(chain.operand(), shared)
    assert found is not None
    assert np.array_equal(found, seen_by_numpy(chain, shared))


@given(chains(), st.data())
def test_scales_along_other_axes_are_told_apart(chain: Chain, data: st.DataObject) -> None:
    operand = chain.operand()
    long = [axis for axis, n in enumerate(operand.shape) if n > 1]
    assume(len(long) > 1)
    one, other = data.draw(st.permutations(long))[:2]
    found = mapped(operand, (one,))
    assume(found is not None)
    assert not np.array_equal(found, seen_by_numpy(chain, (other,)))


TORN = [
    ((4, 6), (8, 3), (0,), None),
    ((4, 6), (8, 3), (1,), None),
    ((4, 6), (24,), (0,), (0, 1)),
    ((4, 6), (2, 2, 6), (2,), (1,)),
    ((4, 6), (2, 2, 6), (0, 1), (0,)),
    ((4, 6), (2, 2, 6), (0,), None),
    ((4, 6), (2, 2, 6), (1,), None),
    ((4, 6), (4, 1, 6), (0, 1), (0,)),
    ((2, 2, 6), (4, 6), (0,), (0, 1)),
    ((2, 2, 6), (4, 6), (1,), (2,)),
    ((2, 3, 2, 2), (6, 4), (1,), (2, 3)),
    ((6, 4), (4, 6), (1,), None),
    ((1, 24), (24, 1), (0,), (1,)),
    ((12, 2), (2, 12), (0, 1), (0, 1)),
]


@pytest.mark.parametrize(("stored", "seen", "shared", "wanted"), TORN)
def test_a_reshape_tears_an_axis_or_does_not(
    stored: Axes, seen: Axes, shared: Axes, wanted: Axes | None
) -> None:
    weights = numbers("w", *stored) + ", " + ints("r", *seen)
    found = traced(model("t = Reshape(w, r) y = MatMul(x, t)", weights))
    assert found is not None
    expected = None if wanted is None else Channels(stored, wanted)
    assert found.channels(shared) == expected


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_weight_without_elements_has_no_channels(shape: Axes) -> None:
    found = traced(model("t = Transpose(w) y = MatMul(x, t)", numbers("w", *shape)))
    assert found is not None
    assert found.channels((0,)) is None


def test_an_axis_of_a_scalar_is_no_trouble() -> None:
    of = model("t = Squeeze(w, r) y = Mul(x, t)", "float w = {2}, " + ints("r", 0))
    found = traced(of)
    assert found is not None
    assert found.shape == ()


def test_a_scalar_has_no_channels() -> None:
    found = traced(model("t = Transpose(w) y = Mul(x, t)", "float w = {2}"))
    assert found is not None
    assert found.shape == ()
    assert found.channels(()) is None


# --- who sums over what --------------------------------------------------------------------

SUMS = [
    ("MatMul", 1, 2, {}, (0,)),
    ("MatMul", 1, 3, {}, (1,)),
    ("MatMul", 0, 2, {}, (1,)),
    ("MatMul", 0, 4, {}, (3,)),
    ("MatMul", 1, 1, {}, None),
    ("MatMul", 0, 1, {}, None),
    ("Gemm", 1, 2, {}, (0,)),
    ("Gemm", 1, 2, {"transB": 0}, (0,)),
    ("Gemm", 1, 2, {"transB": 1}, (1,)),
    ("Gemm", 1, 2, {"transA": 1}, (0,)),
    ("Gemm", 0, 2, {}, (1,)),
    ("Gemm", 0, 2, {"transA": 1, "transB": 1}, (0,)),
    ("Gemm", 2, 2, {}, None),
    ("Conv", 1, 4, {}, (1, 2, 3)),
    ("Conv", 1, 3, {"group": 4}, (1, 2)),
    ("Conv", 0, 4, {}, None),
    ("Conv", 2, 2, {}, None),
    ("ConvTranspose", 1, 4, {}, (0, 2, 3)),
    ("Gather", 0, 2, {}, (1,)),
    ("Gather", 0, 3, {"axis": 1}, (0, 2)),
    ("Gather", 0, 3, {"axis": -1}, (0, 1)),
    ("Gather", 1, 2, {}, None),
    ("LSTM", 1, 3, {"hidden_size": 4}, (2,)),
    ("GRU", 2, 3, {"hidden_size": 4}, (2,)),
    ("RNN", 3, 2, {"hidden_size": 4}, None),
    ("Add", 1, 2, {}, None),
]


@pytest.mark.parametrize(("operator", "index", "rank", "attributes", "axes"), SUMS)
def test_the_axes_that_a_reader_sums_over(
    operator: str, index: int, rank: int, attributes: dict[str, int], axes: Axes | None
) -> None:
    node = ir.node(operator, [], attributes)
    assert channel_axes(node, index, rank) == axes
    assert channel_axes(ir.node(operator, [], domain="org.example"), index, rank) is None


def test_the_axes_that_an_unknown_attribute_decides_are_unknown() -> None:
    node = ir.Node("", "Gemm", [], [ir.RefAttr("transB", "p", ir.AttributeType.INT)])
    assert channel_axes(node, 1, 2) is None


# --- who reads a weight in the end ---------------------------------------------------------


def read_by(of: ir.Model, name: str = "w") -> list[str]:
    weights = Weights(of)
    weight = next(weight for weight in weights if weight.where == name)
    return [
        "output" if end is None else f"{end[0].op_type} {end[1]}"
        for end in ends(weight, weights)
    ]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = MatMul(x, w)", ["MatMul 1"]),
        ("y = Identity(w)", ["output"]),
        ("a = MatMul(x, w) t = Transpose(w) y = MatMul(a, t)", ["MatMul 1", "MatMul 1"]),
        ("y = Add(w, w)", ["Add 0", "Add 1"]),
        ("a = Reshape(x, s) t = Transpose(w) y = Gemm(t, a, w)", ["Gemm 2", "Gemm 0"]),
        ("t = Mul(w, f) y = MatMul(x, t)", ["Mul 0"]),
        ("t = Cast<to=10>(w) y = MatMul(x, t)", ["Cast 0"]),
        ("t = Cast<to=1>(w) y = MatMul(x, t)", ["MatMul 1"]),
        ("t = org.example.Identity(w) y = MatMul(x, t)", ["Identity 0"]),
        ("t = Transpose(w) y = Neg(x)", []),
        ("t = Transpose(w) u = Identity(t) v = Neg(t) y = Exp(u)", ["Neg 0", "Exp 0"]),
    ],
)  # fmt: skip
def test_the_readers_of_a_weight_behind_what_is_looked_through(
    body: str, found: list[str]
) -> None:
    assert read_by(model(body, numbers("w", 4, 4))) == found


def test_the_readers_of_int8_are_behind_its_scale() -> None:
    body = "c = Cast<to=1>(w) m = Mul(c, k) t = Transpose(m) y = MatMul(x, t)"
    of = model(body, numbers("w", 4, 4, dtype="int8") + ", float k = {2}")
    assert read_by(of) == ["MatMul 1"]
    assert read_by(of, "k") == ["Mul 1"]


def test_readers_in_bodies_and_body_outputs_are_readers() -> None:
    body = """c = Cast<to=9>(f) q = Squeeze(c) t = Transpose(w)
y = If(q) <then_branch = a () => (float p) { p = MatMul(x, t) },
           else_branch = b () => (float o) { o = Transpose(w) }>"""
    assert sorted(read_by(model(body, numbers("w", 4, 4)))) == ["MatMul 1", "output"]


def test_a_tensor_in_an_attribute_has_no_readers_to_look_for() -> None:
    text = NODES.format(body="y = org.example.Table(x)", initializers="", opset=18)
    proto = parser.parse_model(text)
    table = numpy_helper.from_array(np.ones((4, 4), np.float32))
    proto.graph.node[0].attribute.append(helper.make_attribute("table", table))
    weights = Weights(model_io.from_proto(proto))
    (weight,) = weights
    assert ends(weight, weights) == []
    assert weight_channels(weight, weights) is None


def test_the_shape_of_a_reshape_is_not_looked_through() -> None:
    of = model("t = Reshape(x, r) y = Neg(t)", ints("r", -1, 2))
    assert read_by(of, "r") == ["Reshape 1"]


@pytest.mark.parametrize(
    ("body", "shared"),
    [
        ("y = MatMul(x, w)", (0,)),
        ("t = Transpose(w) y = MatMul(x, t)", (1,)),
        ("b = Neg(w) y = MatMul(x, w)", (0,)),
        ("y = Add(x, w)", None),
        ("y = Gather(w, s)", (1,)),
        ("y = Gather(w, s) z = MatMul(x, w)", (1,)),
        ("z = MatMul(x, w) y = Gather(w, s)", (0,)),
        ("r = Constant<value_ints=[2,8]>() t = Reshape(w, r) y = MatMul(x, t)", None),
    ],
)
def test_the_channels_of_a_weight_are_those_of_its_first_reader_that_sums(
    body: str, shared: Axes | None
) -> None:
    weights = Weights(model(body, numbers("w", 4, 4)))
    weight = next(weight for weight in weights if weight.where == "w")
    expected = None if shared is None else Channels((4, 4), shared)
    assert weight_channels(weight, weights) == expected
