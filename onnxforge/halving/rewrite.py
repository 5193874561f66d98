"""Giving values, weights and attributes the precision that was decided on, and casts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxforge.core import Finding
from onnxforge.elements import TYPE_ATTRIBUTES
from onnxforge.halving.formats import Format, halved
from onnxforge.selection import skipped, treated
from onnxforge.surgery import Surgery

if TYPE_CHECKING:
    from onnxforge.halving.parts import Part, Parts, Read
    from onnxforge.weights import Weight, Weights

__all__ = ["Rewriter"]

_FLOAT = ir.DataType.FLOAT
_SMALL = 16  # elements; so small a constant is stored in both precisions where both read it


class Rewriter:
    """Changes a model as its parts were coloured.

    Attributes:
        casts: Number of casts added.
    """

    def __init__(
        self,
        parts: Parts,
        weights: Weights,
        form: Format,
        saturated: Mapping[ir.TensorProtocol, float],
    ) -> None:
        """Change nothing yet.

        Args:
            parts: The parts, coloured.
            weights: The weights of the model.
            form: The half format.
            saturated: What stands for values below the lowest one, by the weight's tensor.
        """
        self._parts = parts
        self._weights = weights
        self._form = form
        self._saturated = saturated
        self._surgery = Surgery(weights)
        self._main = weights.model.graph
        self.casts = 0

    def run(self) -> list[Finding]:
        """Change the model; what became of each weight of float32."""
        for part in self._parts:
            if part.half and part.node is not None:
                self._attribute(part.node, part)
        found = [self._weight(w) for w in self._weights if w.dtype == _FLOAT]
        for part in self._parts:
            for value in part.makes:
                self._value(value, part)
        self._surgery.settle()
        return found

    def _attribute(self, node: ir.Node, part: Part) -> None:
        name = TYPE_ATTRIBUTES.get(node.op_type, "")
        made = any(output in part.makes for output in node.outputs)
        if name and made and (name in node.attributes or node.op_type not in _LIKE):
            node.attributes[name] = ir.AttrInt64(name, self._form.dtype.value)
        if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            zero = ir.tensor(np.zeros(1, self._form.dtype.numpy()))
            node.attributes["value"] = ir.AttrTensor("value", zero)

    def _value(self, value: ir.Value, maker: Part) -> None:
        reads = self._parts.readers.get(value, [])
        if maker.half:
            value.type = ir.TensorType(self._form.dtype)
            self._retype(value, reads)
        other = [read for read in reads if read.part.half != maker.half]
        captured = [r for r in other if r.node is None and r.graph is not value.graph]
        for read in captured:
            self._cast_inside(value, read, half=not maker.half)
        if local := [read for read in other if read not in captured]:
            self._cast_for(value, local, half=not maker.half)

    def _retype(self, value: ir.Value, reads: Iterable[Read]) -> None:
        """An output that names a value from outside of its body says its type itself."""
        for read in reads:
            if read.node is None and read.graph.outputs[read.index] is not value:
                read.graph.outputs[read.index].type = ir.TensorType(self._form.dtype)

    def _cast(self, value: ir.Value, *, half: bool) -> ir.Node:
        dtype, word = (self._form.dtype, self._form.word) if half else (_FLOAT, "fp32")
        output = self._weights.unique(f"{value.name}_{word}")
        cast = self._surgery.node("Cast", [value], output, dtype, {"to": dtype})
        cast.outputs[0].shape = None if value.shape is None else value.shape.copy()
        self.casts += 1
        return cast

    def _surgery_behind(self, value: ir.Value, cast: ir.Node) -> None:
        graph = value.graph
        assert graph is not None, "a value that is read belongs to a graph"
        if value.producer() is None and not len(graph):
            graph.append(cast)
        else:
            self._surgery.insert_behind(value, [cast])

    def _cast_inside(self, value: ir.Value, read: Read, *, half: bool) -> None:
        """A body gives out a value from outside of it: it is cast in the body."""
        cast = self._cast(value, half=half)
        read.graph.append(cast)
        read.graph.outputs[read.index] = cast.outputs[0]

    def _rewire(self, value: ir.Value, new: ir.Value, reads: Sequence[Read]) -> None:
        for read in reads:
            if read.node is not None:
                read.node.replace_input_with(read.index, new)
            else:
                read.graph.outputs[read.index] = new
        if any(read.node is None and read.graph is self._main for read in reads):
            self._swap_names(value, new)

    def _swap_names(self, value: ir.Value, output: ir.Value) -> None:
        """An output of the model keeps its name, the value it is cast from gets another."""
        name, word = value.name, self._form.word if output.dtype == _FLOAT else "fp32"
        value.name = None
        output.name = name
        value.name = self._weights.unique(f"{name}_{word}")
        output.doc_string, value.doc_string = value.doc_string, None
        output.metadata_props.update(value.metadata_props)
        value.metadata_props.clear()
        for read in self._parts.readers.get(value, ()):
            given = read.graph.outputs[read.index] if read.node is None else None
            if given is not None and given.name == name and given is not output:
                given.name = value.name

    def _weight(self, weight: Weight) -> Finding:
        if weight.value is None:
            return self._inside_node(weight)
        if weight.is_overridable:
            part = self._parts.makers[weight.value]
            if not part.half:
                return skipped(weight, "OF207", "is also a graph input that stays float32")
            return self._store(weight)
        reads = self._parts.readers.get(weight.value, [])
        halves = [read for read in reads if read.part.half]
        wide = [read for read in reads if not read.part.half]
        if not reads:
            return skipped(weight, "OF208", "nothing reads it")
        if not halves:
            reason = wide[0].part.reason
            why = reason.message if reason else ""
            return skipped(weight, "OF260", "only what stays float32 reads it", why)
        if not wide:
            return self._store(weight)
        return self._shared(weight, halves, wide)

    def _shared(self, weight: Weight, halves: list[Read], wide: list[Read]) -> Finding:
        """Both precisions read a weight."""
        value = weight.value
        assert value is not None, "a weight that is read is a value"
        is_output = any(read.node is None and read.graph is self._main for read in wide)
        if not is_output and weight.tensor.size > _SMALL and not weight.is_needed_constant:
            found = self._store(weight, "stored as {}, widened where float32 is needed")
            self._cast_for(value, wide, half=False)
            return found
        if weight.is_needed_constant or weight.tensor.size <= _SMALL:
            content = self._halved(weight).numpy()
            name = f"{value.name}_{self._form.word}"
            self._rewire(value, self._surgery.constant(weight, name, content), halves)
            return treated(weight, "stored in both precisions, as both read it")
        self._cast_for(value, halves, half=True)
        return skipped(weight, "OF206", "is a graph output that stays float32")

    def _cast_for(self, value: ir.Value, reads: list[Read], *, half: bool) -> None:
        cast = self._cast(value, half=half)
        self._surgery_behind(value, cast)
        self._rewire(value, cast.outputs[0], reads)

    def _inside_node(self, weight: Weight) -> Finding:
        node = weight.node
        makers = [self._parts.makers.get(v) for v in node.outputs] if node else []
        if node is None or node.op_type != "ConstantOfShape" or node.domain:
            return skipped(weight, "OF209", "is an attribute of its node")
        if makers[0] is None or not makers[0].half:
            return skipped(weight, "OF260", "only what stays float32 reads it")
        found = treated(weight, f"stored as {self._form.dtype.name.lower()}")
        tensor = ir.tensor(self._halved(weight).numpy(), name=weight.tensor.name)
        node.attributes["value"] = ir.AttrTensor("value", tensor)
        return found

    def _store(self, weight: Weight, message: str = "stored as {}") -> Finding:
        found = treated(weight, message.format(self._form.dtype.name.lower()))
        weight.store(self._halved(weight))
        assert weight.value is not None, "a weight that is stored is a value"
        self._retype(weight.value, self._parts.readers.get(weight.value, ()))
        return found

    def _halved(self, weight: Weight) -> ir.TensorProtocol:
        return halved(weight.tensor, self._form, self._saturated.get(weight.tensor))


# Without the attribute their output is like an input, which was changed itself.
_LIKE = frozenset(
    {"Bernoulli", "DequantizeLinear", "EyeLike", "RandomNormalLike", "RandomUniformLike"}
)
