"""Half precision on any processor: float32 models whose values are rounded as a tier's are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxforge.elements import MOVES, TYPE_ATTRIBUTES, Elements
from onnxforge.lazy import DerivedTensor
from onnxforge.surgery import Surgery, take_over
from onnxforge.walk import Scope, label, scopes
from onnxforge.weights import Weight, Weights

__all__ = ["Rounding", "calculates", "computes_in", "emulate"]

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FLOAT = ir.DataType.FLOAT

# What is rounded stays so behind them; ScatterND may add, and bodies round inside.
_MOVES = MOVES - {"ScatterElements", "ScatterND"} | {
    "ConstantOfShape",
    "If",
    "Loop",
    "Max",
    "MaxPool",
    "Min",
    "Neg",
    "Relu",
    "Scan",
    "TopK",
}
_BOUNDARIES = _MOVES | {"Cast", "Constant", "Shape", "Size"}


@dataclass(frozen=True, eq=False)
class Rounding:
    """A place where a value is rounded.

    Attributes:
        name: Name of the value.
        where: Path of the node that makes it, or name of the input.
        exact: The value before.
        scope: Its graph.
        dtype: What it is rounded to.
    """

    name: str
    where: str
    exact: ir.Value
    scope: Scope
    dtype: ir.DataType


def calculates(node: ir.Node) -> bool:
    """Whether a node gives values that it was not given."""
    return node.op_type not in _BOUNDARIES or bool(node.domain)


def computes_in(model: ir.Model) -> set[ir.DataType]:
    """The half types that a model computes in, rather than only stores and moves."""
    all_scopes = list(scopes(model))
    elements = Elements(model, all_scopes)
    found = set()
    for scope in all_scopes:
        for node in scope.graph:
            if calculates(node):
                found |= {_half(elements, v) for v in (*node.inputs, *node.outputs)}
    return {dtype for dtype in found if dtype is not None}


def _half(elements: Elements, value: ir.Value | None) -> ir.DataType | None:
    found = None if value is None else elements.type(value)
    return found.dtype if found is not None and found.dtype in HALVES else None


def emulate(model: ir.Model) -> list[Rounding]:
    """Turn a model that computes in half precision into float32 that rounds as it does.

    Each value of a half type becomes float32 that is cast down and up again where it is made;
    each node then computes in float32 with rounded inputs, as kernels with float32 sums do.
    Weights and inputs are float32 of the same values. The names of values stay.

    Args:
        model: The model, changed in place.

    Returns:
        The places where it rounds.
    """
    return _Emulation(model).run()


class _Emulation:
    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._weights = Weights(model)
        self._elements = Elements(model, self._weights.scopes)
        self._surgery = Surgery(self._weights)
        self._calls = set(model.functions)

    def run(self) -> list[Rounding]:
        elements = self._elements
        halves: list[tuple[Scope, str, ir.Value, ir.DataType, bool]] = []
        for scope in self._weights.scopes:
            for value, where, exact in self._values(scope):
                if (dtype := _half(elements, value)) is not None:
                    halves.append((scope, where, value, dtype, exact))
        for weight in self._weights:
            self._widen(weight)
        for scope in self._weights.scopes:
            self._retype(scope)
        return [
            self._round(scope, where, value, dtype)
            for scope, where, value, dtype, exact in halves
            if not exact
        ]

    def _values(self, scope: Scope) -> Iterator[tuple[ir.Value, str, bool]]:
        """What a graph makes, and whether it is rounded already."""
        is_main = scope.parent is None and scope.function is None
        for value in scope.graph.inputs:
            yield value, value.name or "", not is_main
        for position, node in enumerate(scope.graph):
            moves = node.op_type in _MOVES or node.op_type == "Constant"
            exact = (moves and not node.domain) or node.op_identifier() in self._calls
            for value in () if _rounds(node) else node.outputs:
                yield value, scope.path + label(node, position), exact

    def _widen(self, weight: Weight) -> None:
        if weight.dtype not in HALVES:
            return
        wide = DerivedTensor(weight.tensor, _FLOAT, _Widen())
        if weight.value is not None:
            weight.store(wide)
        elif weight.node is not None:
            for name, attribute in list(weight.node.attributes.items()):
                if not attribute.is_ref() and attribute.value is weight.tensor:
                    weight.node.attributes[name] = ir.AttrTensor(name, wide)

    def _retype(self, scope: Scope) -> None:
        graph = scope.graph
        values = [*graph.inputs, *graph.outputs]
        for node in graph:
            values += () if _rounds(node) else node.outputs
            name = TYPE_ATTRIBUTES.get(node.op_type, "")
            attribute = node.attributes.get(name) if not node.domain else None
            if attribute is None or attribute.is_ref() or attribute.value not in HALVES:
                continue
            if node.op_type != "Cast":  # that one rounds by itself
                node.attributes[name] = ir.AttrInt64(name, _FLOAT.value)
        for value in values:
            if value.type is not None and value.type.dtype in HALVES:
                value.type = _as_float(value.type)

    def _round(
        self, scope: Scope, where: str, value: ir.Value, dtype: ir.DataType
    ) -> Rounding:
        node, surgery = value.producer(), self._surgery
        unique, name = self._weights.unique, value.name or ""
        down = surgery.node("Cast", [value], unique(f"{name}_half"), dtype, {"to": dtype})
        up = surgery.node("Cast", down.outputs, unique(f"{name}_wide"), _FLOAT, {"to": _FLOAT})
        # A Max of one value is that value. Without it a runtime fuses the cast into a norm,
        # and then has no kernel for that.
        end = surgery.node("Max", up.outputs, unique(f"{name}_rounded"), _FLOAT)
        nodes = [down, up, end]
        if node is not None and node.op_type == "Cast":
            up.replace_input_with(0, value)
            nodes = [up, end]
        rounded = end.outputs[0]
        if node is None and not len(scope.graph):
            scope.graph.extend(nodes)
        else:
            surgery.insert_behind(value, nodes)
        if node is None:
            self._reread(value, rounded, nodes[0])
            return Rounding(name, where, value, scope, dtype)
        take_over(value, rounded)
        value.name = unique(f"{name}_exact")
        value.type = ir.TensorType(dtype if node.op_type == "Cast" else _FLOAT)
        nodes[0].replace_input_with(0, value)
        exact = node.inputs[0] if node.op_type == "Cast" else value
        assert exact is not None, "a Cast has an input"
        return Rounding(name, where, exact, scope, dtype)

    def _reread(self, value: ir.Value, rounded: ir.Value, but: ir.Node) -> None:
        """Let all readers of an input read it rounded."""
        for use in list(value.uses()):
            if use.node is not but:
                use.node.replace_input_with(use.idx, rounded)
        rounded.shape = None if value.shape is None else value.shape.copy()


def _rounds(node: ir.Node) -> bool:
    """Whether a node casts down only to be cast up again."""
    if node.op_type != "Cast" or node.domain or node.outputs[0].is_graph_output():
        return False
    users = [use.node for use in node.outputs[0].uses()]
    return bool(users) and all(
        user.op_type == "Cast" and not user.domain and user.attributes.get_int("to", 0) == 1
        for user in users
    )


def _as_float(type_: ir.TypeProtocol) -> ir.TypeProtocol:
    inner = type_.elem_type
    if isinstance(inner, ir.DataType):
        return ir.TensorType(_FLOAT)
    wrapper = ir.SequenceType if isinstance(type_, ir.SequenceType) else ir.OptionalType
    return wrapper(_as_float(inner))


@dataclass(frozen=True)
class _Widen:
    """A half type to float32, exact."""

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        np.copyto(out, block.astype(np.float32))
