"""How large the values of a model become on samples, also those in bodies and functions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxforge.compare.samples import Sample, fit
from onnxforge.errors import Refused
from onnxforge.runtime.session import Session, Setup, write_all
from onnxforge.saving import save
from onnxforge.surgery import Surgery
from onnxforge.walk import Scope, bodies
from onnxforge.weights import Weights

__all__ = ["Watched", "peaks"]

_FLOAT = ir.DataType.FLOAT
_OPSET = 9  # of Where


@dataclass(frozen=True, eq=False)
class Watched:
    """A float32 value of a model that is to be watched.

    Attributes:
        value: The value.
        scope: Its graph.
    """

    value: ir.Value
    scope: Scope


def peaks(
    model: ir.Model,
    watched: Sequence[Watched],
    samples: Iterable[Sample],
    setup: Setup | None = None,
) -> list[float]:
    """Run a model on samples and see how large some of its values become.

    Args:
        model: The model; it is changed and of no use afterwards.
        watched: The values.
        samples: What to run it on.
        setup: How.

    Returns:
        The largest finite magnitude of each, over all samples.

    Raises:
        Refused: The opset is too old to tell infinity from the rest.
        DataError: A sample does not fit the model.
        RuntimeFailed: onnxruntime is missing, or does not run the model.
    """
    if not watched:
        return []
    lift = _Lift(model)
    found = [list(lift.out(one)) for one in watched]
    lift.finish([value for values in found for value in values])
    ends = np.cumsum([len(values) for values in found])
    highest = np.zeros(int(ends[-1]), np.float32)
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as name:
        folder = Path(name)
        save(model, folder / "watched.onnx")
        with Session(folder / "watched.onnx", folder, setup) as session:
            for sample in samples:
                feeds = write_all(folder, "in", fit(sample, model))
                (output,) = session.run(feeds).values()
                np.maximum(highest, output.open(), out=highest)
                output.path.unlink()
    return [float(max(part, default=0)) for part in np.split(highest, ends[:-1])]


class _Lift:
    """Brings how large values are out of the bodies they are in."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        weights = Weights(model)
        self._unique = weights.unique
        self._surgery = Surgery(weights)
        self._owners: dict[ir.Graph, tuple[ir.Node, Scope]] = {}
        self._calls: dict[ir.Graph, list[tuple[ir.Node, Scope]]] = {}
        functions = {f.identifier(): f.graph for f in model.functions.values()}
        for scope in weights.scopes:
            if not 0 < _OPSET <= scope.opset_imports.get("", _OPSET):
                raise Refused(f"opset {scope.opset_imports['']}: needs {_OPSET}")
            for node in scope.graph:
                for _, body in bodies(node):
                    self._owners[body] = node, scope
                if (called := functions.get(node.op_identifier())) is not None:
                    self._calls.setdefault(called, []).append((node, scope))

    def out(self, one: Watched) -> Iterator[ir.Value]:
        """How large a value is, as values of the main graph: one, or one for each call."""
        return self._lifted(self._largest(one.value, one.scope.graph), one.scope.graph)

    def finish(self, values: Sequence[ir.Value]) -> None:
        """Make the values, and nothing else, the output of the model."""
        graph = self._model.graph
        (peak,) = self._add(graph, "Concat", values, {"axis": 0})
        graph.outputs.clear()
        graph.outputs.append(peak)
        peak.type, peak.shape = ir.TensorType(_FLOAT), ir.Shape([len(values)])

    def _add(
        self,
        graph: ir.Graph,
        operator: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, object] | None = None,
    ) -> Sequence[ir.Value]:
        node = self._surgery.node(operator, inputs, self._unique("peak"), _FLOAT, attributes)
        graph.append(node)
        return node.outputs

    def _constant(self, graph: ir.Graph, content: np.ndarray) -> ir.Value:
        tensor = ir.tensor(content)
        (value,) = self._add(graph, "Constant", [], {"value": tensor})
        value.type = ir.TensorType(tensor.dtype)
        return value

    def _largest(self, value: ir.Value, graph: ir.Graph) -> ir.Value:
        """The largest finite magnitude, of shape [1]; 0 where there is none."""
        flat = self._constant(graph, np.array([-1], np.int64))
        zero = self._constant(graph, np.zeros(1, np.float32))
        endless = self._constant(graph, np.array([np.inf], np.float32))
        (whole,) = self._add(graph, "Reshape", [value, flat])
        (sizes,) = self._add(graph, "Abs", [whole])
        (finite,) = self._add(graph, "Less", [sizes, endless])
        finite.type = ir.TensorType(ir.DataType.BOOL)
        (kept,) = self._add(graph, "Where", [finite, sizes, zero])
        (some,) = self._add(graph, "Concat", [kept, zero], {"axis": 0})
        return self._add(graph, "ReduceMax", [some], {"keepdims": 1})[0]

    def _lifted(self, peak: ir.Value, graph: ir.Graph) -> Iterator[ir.Value]:
        if graph is self._model.graph:
            yield peak
        elif graph in self._calls:
            graph.outputs.append(peak)
            for node, scope in self._calls[graph]:
                yield from self._lifted(self._output(node), scope.graph)
        elif graph in self._owners:
            node, scope = self._owners[graph]
            peak.shape = ir.Shape([1])
            graph.outputs.append(peak)
            for _, other in bodies(node):
                if other is not graph:
                    zero = self._constant(other, np.zeros(1, np.float32))
                    zero.shape = ir.Shape([1])
                    other.outputs.append(zero)
            given = self._output(node)
            if node.op_type != "If":  # one of each iteration
                given = self._largest(given, scope.graph)
            yield from self._lifted(given, scope.graph)

    def _output(self, node: ir.Node) -> ir.Value:
        node.resize_outputs(len(node.outputs) + 1)
        value = node.outputs[-1]
        value.name = self._unique("peak")
        value.type = ir.TensorType(_FLOAT)
        return value
