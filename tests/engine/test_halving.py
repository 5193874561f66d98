"""Half precision on random graphs: valid, stable, and rounded exactly where the types say."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxforge.errors import Refused
from support import halves, oracle

F32 = TensorProto.FLOAT
SHAPE = ["n", 4]
CONSTANTS = (0.0, -0.0, 0.1, -2.5, 1e-9, 1e-6, 7e4, -3.4e38, 3.4e38, np.inf, -np.inf, np.nan)
UNARY = ("Abs", "Ceil", "Floor", "Identity", "Neg", "Reciprocal", "Relu", "Sqrt")
BINARY = ("Add", "Div", "Mul", "Sub")
OWN = "own"

# An operator, which values it reads, a constant and where that is.
Step = tuple[str, int, int, float, int]
STEPS = st.tuples(
    st.sampled_from(
        [
            *UNARY,
            *BINARY,
            *("Scale", "Where", "Count", "Concat", "Resize"),
            *("If", "Loop", "Scan", "Function", "Mask"),
        ]
    ),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(CONSTANTS),
    st.integers(0, 3),
)


@dataclass
class Graph:
    """A graph that grows; a body sees what is outside of it."""

    names: list[int]
    seen: list[str]
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def name(self) -> str:
        self.names[0] += 1
        return f"v{self.names[0]}"

    def add(self, op: str, inputs: list[str], count: int = 1, **options: object) -> str:
        made = [self.name() for _ in range(count)]
        label = "" if self.names[0] % 5 == 0 else f"n_{made[0]}"
        self.nodes.append(helper.make_node(op, inputs, made, name=label, **options))
        return made[0]

    def weight(self, content: object, *, in_node: bool = False) -> str:
        tensor = numpy_helper.from_array(np.asarray(content), self.name())
        if in_node:
            return self.add("Constant", [], value=tensor)
        self.weights.append(tensor)
        return tensor.name

    def body(self, formals: list[str]) -> Graph:
        return Graph(self.names, [*self.seen, *formals], self.opset)

    def step(self, step: Step, depth: int) -> None:
        kind, first, second, number, place = step
        x, y = (self.seen[i % len(self.seen)] for i in (first, second))
        if kind in UNARY:
            made = self.add(kind, [x])
        elif kind in BINARY:
            made = self.add(kind, [x, y])
        elif kind in ("If", "Loop", "Scan"):
            made = self._nested(step, depth, x)
        else:
            made = getattr(self, f"_{kind.lower()}")(x, y, number, place)
        self.seen.append(made)

    def _scale(self, x: str, _: str, number: float, place: int) -> str:
        content = np.full([(), (1,), (4,), (3, 4)][place], number, np.float32)
        return self.add(BINARY[place], [x, self.weight(content, in_node=place % 2 == 0)])

    def _where(self, x: str, y: str, *_: object) -> str:
        return self.add("Where", [self.add("Less", [x, y]), x, y])

    def _count(self, x: str, *_: object) -> str:
        rounded = self.add("Max", [self.add("Min", [x, x]), x])
        whole = self.add("Cast", [rounded], to=TensorProto.INT32)
        return self.add("Cast", [whole], to=F32)

    def _concat(self, x: str, y: str, *_: object) -> str:
        both = self.add("Concat", [x, y], axis=0)
        options = {"num_outputs": 2} if self.opset >= 18 else {}
        return self.add("Split", [both], 2, axis=0, **options)

    def _resize(self, x: str, *_: object) -> str:
        scales = self.weight(np.ones(2, np.float32))
        return self.add("Resize", [x, "", scales], mode="nearest")

    def _function(self, x: str, y: str, *_: object) -> str:
        return self.add("scaled", [x, y], domain=OWN)

    def _mask(self, x: str, *_: object) -> str:
        lowest = self.weight(np.float32(-3.4e38))
        scores = self.add("Add", [x, self.add("Mul", [x, lowest])])
        return self.add("Relu", [self.add("Softmax", [scores], axis=1)])

    def _nested(self, step: Step, depth: int, x: str) -> str:
        kind, first, second, number, place = step
        inner: Step = (UNARY[first % 8] if depth else "Scale", second, first, number, place)
        more: Step = (("If", "Mul", "Function", "Count")[place], first, second, number, 1)
        steps = [inner, more] if depth == 0 else [inner]
        if kind == "If":
            branches = {}
            for name, chosen in (("then_branch", steps), ("else_branch", steps[:1])):
                body = self.body([])
                for one in chosen:
                    body.step(one, depth + 1)
                branches[name] = body.graph([], [body.seen[-1]])
            return self.add("If", ["c"], **branches)
        state = self.name()
        formals = [(state, F32, SHAPE)]
        body = self.body([state])
        for one in steps:
            body.step(one, depth + 1)
        result = body.add("Add", [state, body.seen[-1]])
        each = body.add("Identity", [result])
        if kind == "Scan":
            item = self.name()
            formals.append((item, F32, SHAPE))
            items = self.add("Unsqueeze", [x, self.weight(np.int64([0]))])
            graph = body.graph(formals, [result, each])
            return self.add("Scan", [x, items], 2, num_scan_inputs=1, body=graph)
        counter, go = self.name(), self.name()
        before = [(counter, TensorProto.INT64, []), (go, TensorProto.BOOL, [])]
        again = body.add("Identity", [go])
        graph = body.graph([*before, *formals], [again, result, each], TensorProto.BOOL)
        return self.add(
            "Loop", [self.weight(np.int64(2)), self.weight(np.bool_(True)), x], 2, body=graph
        )

    def graph(
        self, inputs: list[tuple[str, int, list]], outputs: list[str], first: int = F32
    ) -> onnx.GraphProto:
        given = [helper.make_tensor_value_info(*one) for one in inputs]
        open_ = [None, None]
        made = [helper.make_tensor_value_info(name, F32, open_) for name in outputs]
        if first != F32:
            made[0] = helper.make_tensor_value_info(outputs[0], first, [])
        return helper.make_graph(self.nodes, self.name(), given, made, self.weights)


def model(steps: list[Step], opset: int, *, overridable: bool) -> ModelProto:
    graph = Graph([0], ["x", "z"], opset)
    for step in steps:
        graph.step(step, 0)
    made = graph.graph([(n, F32, SHAPE) for n in "xz"] + [("c", TensorProto.BOOL, [])], [])
    for name in dict.fromkeys([graph.seen[-1], graph.seen[2]]):
        made.output.append(helper.make_tensor_value_info(name, F32, [None, None]))
    for tensor in made.initializer[:1] if overridable else ():
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        made.input.append(info)
    imports = [helper.make_opsetid("", opset)]
    small = numpy_helper.from_array(np.float32(1e-6), "k")
    inside = [
        helper.make_node("Constant", [], ["k"], value=small),
        helper.make_node("Mul", ["a", "k"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["r"]),
    ]
    function = helper.make_function(OWN, "scaled", ["a", "b"], ["r"], inside, imports)
    whole = [*imports, helper.make_opsetid(OWN, 1)]
    return helper.make_model(made, opset_imports=whole, ir_version=8, functions=[function])


@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(
    steps=st.lists(STEPS, min_size=1, max_size=7),
    opset=st.sampled_from([16, 17, 20, 22]),
    word=st.sampled_from(["fp16", "bf16"]),
    keep_io=st.sampled_from(["all", "none", "x"]),
    blocked=st.sampled_from(["default", "Sqrt", "Add,Mul"]),
    overridable=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_graphs(
    steps: list[Step],
    opset: int,
    word: str,
    keep_io: str,
    blocked: str,
    overridable: bool,
    seed: int,
) -> None:
    parent = model(steps, opset, overridable=overridable)
    onnx.checker.check_model(parent, full_check=True)
    options = f"{{keep_io={keep_io} block_op_types={blocked} target=cuda}}"
    try:
        tier, _ = halves.tier(parent, word + options)
    except Refused:  # nothing that calculates has a kernel
        if word == "fp16":
            raise
        return
    for before, after in zip(
        [*parent.graph.input, *parent.graph.output],
        [*tier.graph.input, *tier.graph.output],
        strict=True,
    ):
        was = before.type.tensor_type.elem_type
        stays = was != F32 or keep_io in ("all", before.name)
        assert after.type.tensor_type.elem_type == (was if stays else halves.ONNX[word])
    rng = np.random.default_rng(seed)
    feeds = {n: rng.standard_normal((3, 4)).astype(np.float32) * 9 for n in "xz"}
    feeds["c"] = np.array(seed % 2 == 0)
    given = {
        value.name: feeds[value.name].astype(halves.NUMPY[word])
        if value.type.tensor_type.elem_type in halves.HALVES
        else feeds[value.name]
        for value in tier.graph.input
        if value.name in feeds
    }
    with np.errstate(all="ignore"):
        wanted = ReferenceEvaluator(tier).run(None, given)
    found = halves.outputs(tier, feeds)
    for value, reference in zip(tier.graph.output, wanted, strict=True):
        exact = reference.astype(np.float32)
        assert np.array_equal(found[value.name], exact, equal_nan=True), value.name
    if word == "fp16":
        oracle.run(tier, given)
