"""Hypothesis strategy: a model with one product, and its weight in a random place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from support import integers

Array = np.ndarray

KINDS = ("right", "left", "batched", "Gemm", "Gemm left", "Conv")
SCOPES = ("main", "captured", "branch", "loop", "loop captured", "function")
PATHS = ("", "Transpose", "Reshape", "Unsqueeze", "Cast", "Identity", "Transpose Cast")
_OPSET, _IR = 17, 8
_OPSETS = [helper.make_opsetid("", _OPSET), helper.make_opsetid("local", 1)]


@dataclass
class Case:
    """A model of one product that is read once or twice.

    Attributes:
        node: The product; its inputs are "x" and "w", in the order of the operator, and "c".
        index: Which input is the weight.
        x: The activation, an input of the model.
        w: The weight, as the product sees it.
        c: What is added, an input of the model or a constant; None for nothing.
        scope: Where the product is.
        path: What lies between it and the stored tensor.
        held: Whether the tensor is an ``initializer`` or in a ``Constant`` node.
        fixed: Whether what is added is a constant.
        tied: Whether another product in the main graph reads the same weight.
        gathered: Whether a Gather does.
        flag: Which branch runs.
        plus: A vector that an Add behind the product adds; None for no Add.
        swapped: Whether the vector comes first there.
    """

    node: NodeProto
    index: int
    x: Array
    w: Array
    c: Array | None = None
    scope: str = "main"
    path: str = ""
    held: str = "initializer"
    fixed: bool = True
    tied: bool = False
    gathered: bool = False
    flag: bool = True
    plus: Array | None = None
    swapped: bool = False
    _nodes: list[NodeProto] = field(default_factory=list)
    _weights: dict[str, Array] = field(default_factory=dict)

    def is_worthwhile(self, rules: integers.Rules = integers.DEFAULT) -> bool:
        """Whether scales are half as many as elements or fewer."""
        axes = integers.summed_axes(self.node, self.index, self.w.ndim)
        shared = axes if rules.per_channel else range(self.w.ndim)
        return math.prod(self.w.shape[axis] for axis in shared) >= 2

    @property
    def needs_rank(self) -> bool:
        """Whether the rank of the activation has to be known."""
        return self.node.op_type == "MatMul" and (self.index == 0 or self.w.ndim > 2)

    @property
    def inputs(self) -> dict[str, Array]:
        """Inputs of the model."""
        given = {"x": self.x, "flag": np.array(self.flag), "ids": np.array([0, -1, 0])}
        if self.c is not None and not self.fixed:
            given["c"] = self.c
        return given

    def operands(self) -> list[Array | None]:
        """What the product reads."""
        order = [self.x, self.w] if self.index else [self.w, self.x]
        return [*order, *([] if self.c is None else [self.c])]

    def expected(self, rules: integers.Rules = integers.DEFAULT) -> dict[str, Array]:
        """The outputs of the model when its products multiply integers."""
        y = self._y(rules)
        outputs = {"y": np.stack([y, y]) if self.scope.startswith("loop") else y}
        if self.is_tied:
            outputs["z"] = y
        return outputs

    @property
    def is_tied(self) -> bool:
        """Whether the main graph can and does read the weight as well."""
        return self.tied and self.scope in ("main", "captured", "loop captured")

    def model(self, *, decoded: bool = False) -> ModelProto:
        """The model; its weight holds what its integers stand for if it is to be decoded."""
        if decoded:
            axes = integers.summed_axes(self.node, self.index, self.w.ndim)
            return replace(self, w=integers.decoded(self.w, axes)).model()
        self._nodes, self._weights = [], {}
        build = {
            "main": self._main,
            "captured": self._branches,
            "branch": self._branches,
            "loop": self._loop,
            "loop captured": self._loop,
            "function": self._function,
        }
        functions = build[self.scope]() or []
        if self.is_tied:
            self._nodes += self._product("z")
        outputs = [_info(n, a) for n, a in self.expected().items()]
        if self.gathered:
            self._nodes.append(helper.make_node("Gather", ["stored", "ids"], ["rows"], "rows"))
            outputs.append(
                helper.make_tensor_value_info("rows", 1, [3, *self._stored().shape[1:]])
            )
        weights = [numpy_helper.from_array(v, n) for n, v in self._weights.items()]
        ports = [_info(name, value) for name, value in self.inputs.items()]
        graph = helper.make_graph(self._nodes, "g", ports, outputs, weights)
        return helper.make_model(
            graph, functions=functions, opset_imports=_OPSETS, ir_version=_IR
        )

    # The parts.

    def _stored(self) -> Array:
        stored = self.w
        if "Transpose" in self.path:
            stored = stored.transpose(_back(stored.ndim))
        if self.path == "Reshape":
            first, *rest = stored.shape
            factor = next(n for n in (3, 2, 1) if first % n == 0)
            stored = stored.reshape(factor, first // factor, *rest)
        if self.path == "Unsqueeze":
            stored = stored.reshape(stored.shape[1:]) if stored.shape[0] == 1 else stored
        if "Cast" in self.path:
            stored = stored.astype(np.float16)
        return np.ascontiguousarray(stored)

    def _hold(
        self, name: str, value: Array, nodes: list[NodeProto], weights: dict[str, Array]
    ) -> None:
        if self.held == "Constant" or self.scope == "function":
            tensor = numpy_helper.from_array(value)
            nodes.append(helper.make_node("Constant", [], [name], name, value=tensor))
        else:
            weights[name] = value

    def _weight(self, nodes: list[NodeProto], weights: dict[str, Array]) -> None:
        """Add the weight and what lies between it and the product."""
        self._hold("stored", self._stored(), nodes, weights)
        name = "stored"
        for step in (self.path or "Identity").split():
            more: Sequence[str] = []
            options: dict[str, Any] = {}
            if step == "Transpose":
                back = _back(self.w.ndim)
                options["perm"] = [back.index(i) for i in range(self.w.ndim)]
            if step == "Cast":
                options["to"] = TensorProto.FLOAT
            if step == "Reshape":
                shape = [-1, *self.w.shape[1:]]
                more = self._number("shape", shape, nodes, weights)
            if step == "Unsqueeze":
                if self._stored().ndim == self.w.ndim:
                    step = "Identity"
                else:
                    more = self._number("axes", [0], nodes, weights)
            following = "w" if step == (self.path or "Identity").split()[-1] else "between"
            following = "w" if self.path == "Unsqueeze" else following
            nodes.append(
                helper.make_node(step, [name, *more], [following], following, **options)
            )
            name = following
        if not self.path:
            nodes.pop()

    def _number(
        self, name: str, value: list[int], nodes: list[NodeProto], weights: dict[str, Array]
    ) -> list[str]:
        self._hold(name, np.array(value), nodes, weights)
        return [name]

    def _product(self, output: str, names: Mapping[str, str] = {}) -> list[NodeProto]:
        copy = NodeProto()
        copy.CopyFrom(self.node)
        names = {"w": "stored" if not self.path else "w", **names}
        copy.input[:] = [names.get(n, n) for n in copy.input]
        copy.output[:] = [output if self.plus is None else f"{output}_before"]
        copy.name = f"product_{output}"
        if self.plus is None:
            return [copy]
        terms = [copy.output[0], "plus"][:: -1 if self.swapped else 1]
        return [copy, helper.make_node("Add", terms, [output], f"add_{output}")]

    def _added(self, nodes: list[NodeProto], weights: dict[str, Array]) -> None:
        if self.c is not None and self.fixed:
            self._hold("c", self.c, nodes, weights)
        if self.plus is not None:
            self._hold("plus", self.plus, nodes, weights)

    def _main(self) -> None:
        self._added(self._nodes, self._weights)
        self._weight(self._nodes, self._weights)
        self._nodes += self._product("y")

    def _branches(self) -> None:
        """An If whose branches are alike, on the same outer weight or on their own."""
        self._added(self._nodes, self._weights)
        if self.scope == "captured":
            self._weight(self._nodes, self._weights)
        branches = {}
        for word in ("then", "else"):
            nodes: list[NodeProto] = []
            weights: dict[str, Array] = {}
            if self.scope == "branch":
                self._weight(nodes, weights)
            nodes += self._product(f"y_{word}")
            branches[f"{word}_branch"] = self._body(word, [], nodes, weights, [f"y_{word}"])
        self._nodes.append(helper.make_node("If", ["flag"], ["y"], "if", **branches))

    def _body(
        self,
        name: str,
        ports: list[ValueInfoProto],
        nodes: list[NodeProto],
        weights: dict[str, Array],
        outputs: list[str],
    ) -> GraphProto:
        y = self._y()
        infos = [_info(n, {"go2": np.array(True), "s2": self.x}.get(n, y)) for n in outputs]
        tensors = [numpy_helper.from_array(v, n) for n, v in weights.items()]
        return helper.make_graph(nodes, name, ports, infos, tensors)

    def _y(self, rules: integers.Rules = integers.DEFAULT) -> Array:
        y = integers.product(self.node, self.operands(), self.index, rules).result
        return y if self.plus is None else y + self.plus

    def _loop(self) -> None:
        """A Loop that computes the product twice, of the same values."""
        self._added(self._nodes, self._weights)
        self._weights["twice"] = np.array(2)
        nodes = [
            helper.make_node("Identity", ["go"], ["go2"], "go_on"),
            helper.make_node("Identity", ["s"], ["s2"], "same"),
        ]
        weights: dict[str, Array] = {}
        if self.scope == "loop":
            self._weight(nodes, weights)
        else:
            self._weight(self._nodes, self._weights)
        nodes += self._product("y_body", {"x": "s"})
        ports = [_info("i", np.array(0)), _info("go", np.array(True)), _info("s", self.x)]
        body = self._body("body", ports, nodes, weights, ["go2", "s2", "y_body"])
        self._nodes.append(
            helper.make_node("Loop", ["twice", "", "x"], ["last", "y"], "loop", body=body)
        )

    def _function(self) -> list[Any]:
        nodes: list[NodeProto] = []
        self._added(nodes, {})
        self._weight(nodes, {})
        nodes += self._product("y_function")
        names = [n for n in ("x", "c") if n in self.inputs]
        self._nodes.append(helper.make_node("f", names, ["y"], "call", domain="local"))
        return [helper.make_function("local", "f", names, ["y_function"], nodes, _OPSETS[:1])]


def _back(rank: int) -> list[int]:
    """A permutation that differs from its own inverse where there are three axes."""
    return [*range(1, rank), 0]


def _info(name: str, like: Array) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(like.dtype)
    return helper.make_tensor_value_info(name, kind, list(like.shape))


def floats(seed: int, *shape: int) -> Array:
    """Values of different sizes along the first and the last axis; a slice of zeros."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal(shape) * rng.choice([0.01, 1, 3], shape[-1:])
    if shape[0] > 2:
        found *= rng.choice([0.1, 1, 5], (shape[0], *[1] * (len(shape) - 1)))
        found[rng.integers(shape[0])] *= rng.integers(2)
    # Also in float16, so that a Cast loses nothing.
    return found.astype(np.float16).astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case."""
    kind = draw(st.sampled_from(KINDS))
    seed = draw(st.integers(0, 2**20))
    made = _conv(draw, seed) if kind == "Conv" else _matrix(draw, kind, seed)
    made.scope = draw(st.sampled_from(SCOPES))
    made.path = draw(st.sampled_from(PATHS))
    made.held = draw(st.sampled_from(["initializer", "Constant"]))
    made.fixed = draw(st.booleans())
    made.tied = draw(st.booleans())
    made.flag = draw(st.booleans())
    if draw(st.booleans()):
        made.plus = floats(seed + 3, made.expected()["y"].shape[-1])
        made.swapped = draw(st.booleans())
    return made


def _matrix(draw: st.DrawFn, kind: str, seed: int) -> Case:
    m, n = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    k = draw(st.integers(1, 7))
    if kind.startswith("Gemm"):
        return _gemm(draw, (m, k, n), seed, left=kind == "Gemm left")
    batch = draw(st.sampled_from([(), (2,), (3, 1)]))
    if kind == "left":
        x, w = floats(seed, *batch, k, n), floats(seed + 1, m, k)
        return Case(helper.make_node("MatMul", ["w", "x"], ["y"]), 0, x, w)
    w = floats(seed + 1, *([draw(st.sampled_from([1, 2]))] * (kind == "batched")), k, n)
    x = floats(seed, *batch, m, k)
    if kind == "right" and draw(st.booleans()):
        x = floats(seed, k)
    if kind == "batched" and batch == (2,):
        x = floats(seed, 1, m, k)
    return Case(helper.make_node("MatMul", ["x", "w"], ["y"]), 1, x, w)


def _gemm(draw: st.DrawFn, sizes: tuple[int, int, int], seed: int, *, left: bool) -> Case:
    m, k, n = sizes
    turned = {name: draw(st.integers(0, 1)) for name in ("transA", "transB")}
    factors = st.sampled_from([1.0, 0.5, -2.0, 0.3])
    options = {**turned, "alpha": draw(factors), "beta": draw(factors | st.just(0.0))}
    kept = {name: v for name, v in options.items() if draw(st.booleans())}
    a = floats(seed, *((k, m) if kept.get("transA") else (m, k)))
    b = floats(seed + 1, *((n, k) if kept.get("transB") else (k, n)))
    shapes = [(m, n), (1, n), (m, 1), (1, 1), (n,), (1,), ()]
    shape = draw(st.sampled_from([None, *shapes]))
    c = None if shape is None else floats(seed + 2, *shape or (1,)).reshape(shape)
    names = ["w", "x"] if left else ["x", "w"]
    node = helper.make_node("Gemm", [*names, *([] if c is None else ["c"])], ["y"], **kept)
    return Case(node, 0 if left else 1, *((b, a) if left else (a, b)), c)


def _conv(draw: st.DrawFn, seed: int) -> Case:
    rank, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ins, outs = group * draw(st.integers(1, 2)), group * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    options: dict[str, Any] = {"strides": [draw(st.integers(1, 2)) for _ in range(rank)]}
    auto = draw(st.sampled_from(["", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto:
        options["auto_pad"] = auto
    else:
        options["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
        options["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
    if group > 1:
        options["group"] = group
    if draw(st.booleans()):
        options["kernel_shape"] = kernel
    w = floats(seed + 1, outs, ins // group, *kernel)
    x = floats(seed, draw(st.integers(1, 2)), ins, *[draw(st.integers(5, 6))] * rank)
    c = floats(seed + 2, outs) if draw(st.booleans()) else None
    names = ["x", "w", *([] if c is None else ["c"])]
    return Case(helper.make_node("Conv", names, ["y"], **options), 1, x, w, c)
