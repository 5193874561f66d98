"""Products of integers in a model, and what each has to give: numpy and exact sums.

Nothing here uses onnxforge.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator, op_run

INTEGER = ("MatMulInteger", "ConvInteger")
BEHIND = ("Cast", "Mul", "Add")  # what makes float32 of the integers, in this order
# Runtimes may round the product with its scale and the bias in another order; a level of
# one activation moves a sum a hundred times as far.
TOLERANCE = 2.0**-20
EXACT = np.float64  # sums of products of 8 bits are whole numbers below 2^53


@dataclasses.dataclass(frozen=True)
class Product:
    """A rewritten product: quantization, integer sums, scale and a constant bias.

    Attributes:
        name: Name of the integer node.
        source: The activation, float32.
        target: What comes out, float32.
        model: The nodes between the two, with their constants.
    """

    name: str
    source: str
    target: str
    model: ModelProto

    def expected(self, activation: np.ndarray) -> np.ndarray:
        """What has to come out."""
        operators: list[Any] = [MatMulInteger, ConvInteger]
        session = ReferenceEvaluator(self.model, new_ops=operators)
        (result,) = session.run(None, {self.source: activation})
        return np.asarray(result)


class MatMulInteger(op_run.OpRun):
    """The operator, by BLAS on float64."""

    op_domain = ""

    def _run(self, a: Any, b: Any, a_zero: Any = 0, b_zero: Any = 0) -> tuple[np.ndarray]:
        product = (a.astype(EXACT) - a_zero) @ (b.astype(EXACT) - b_zero)
        return (product.astype(np.int32),)


class ConvInteger(op_run.OpRun):
    """The operator, as a product of the windows with the kernel."""

    op_domain = ""

    def _run(
        self, x: Any, w: Any, x_zero: Any = 0, w_zero: Any = 0, **given: Any
    ) -> tuple[np.ndarray]:
        rank = w.ndim - 2
        if given["auto_pad"] not in (None, "NOTSET", "VALID"):
            raise NotImplementedError(given["auto_pad"])
        pads = given["pads"] or [0] * 2 * rank
        strides, dilations = given["strides"] or [1] * rank, given["dilations"] or [1] * rank
        x, w = x.astype(EXACT) - x_zero, w.astype(EXACT) - w_zero
        x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
        reach = [d * (n - 1) + 1 for d, n in zip(dilations, w.shape[2:], strict=True)]
        windows = sliding_window_view(x, reach, axis=tuple(range(2, 2 + rank)))
        steps = [slice(None, None, step) for step in (*strides, *dilations)]
        windows = windows[:, :, *steps]
        groups = given["group"] or 1
        found = []
        for part, kernel in zip(
            np.split(windows, groups, 1), np.split(w, groups), strict=True
        ):
            axes = [1, *range(2 + rank, 2 + 2 * rank)], [*range(1, 2 + rank)]
            found.append(np.moveaxis(np.tensordot(part, kernel, axes), -1, 1))
        return (np.concatenate(found, 1).astype(np.int32),)


@dataclasses.dataclass
class _Found:
    """Nodes in their order, their constants, and the activations they begin with."""

    nodes: list[NodeProto] = dataclasses.field(default_factory=list)
    tensors: list[TensorProto] = dataclasses.field(default_factory=list)
    begins: set[str] = dataclasses.field(default_factory=set)
    seen: set[str] = dataclasses.field(default_factory=set)


class _Graph:
    """Who makes a value of the main graph, and who reads it."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._held = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made = {name: node for node in model.graph.node for name in node.output}

    def product(self, integer: NodeProto) -> Product:
        """The product that an integer node is the heart of."""
        target = integer.output[0]
        found = self._between(target)
        for op_type in BEHIND:
            readers = [n for n in self._model.graph.node if target in n.input]
            if len(readers) != 1 or readers[0].op_type != op_type:
                break
            further = self._between(readers[0].output[0])
            if further.begins != found.begins:
                break
            found, target = further, readers[0].output[0]
        (source,) = found.begins
        graph = helper.make_graph(
            found.nodes, "product", [_real(source)], [_real(target)], found.tensors
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        return Product(integer.name, source, target, model)

    def _between(self, target: str) -> _Found:
        """All that a value is made of, back to constants and activations."""
        found = _Found()
        self._collect(target, found)
        return found

    def _collect(self, name: str, found: _Found) -> None:
        if not name or name in found.seen:
            return
        found.seen.add(name)
        if name in self._held:
            found.tensors.append(self._held[name])
        elif name not in self._made:
            found.begins.add(name)
        else:
            node = self._made[name]
            found.seen.update(node.output)
            if node.op_type == "DynamicQuantizeLinear":
                found.begins.update(node.input)
            else:
                for given in node.input:
                    self._collect(given, found)
            found.nodes.append(node)


def products(model: ModelProto) -> list[Product]:
    """The products of the main graph; the weights have to be in the model."""
    graph = _Graph(model)
    return [graph.product(node) for node in model.graph.node if node.op_type in INTEGER]


def inner(model: ModelProto) -> int:
    """How many products are in bodies and functions, where no output shows them."""
    waiting: list[Any] = [model.graph, *model.functions]
    found = 0
    while waiting:
        scope = waiting.pop()
        found += sum(node.op_type in INTEGER for node in scope.node)
        attributes = itertools.chain.from_iterable(node.attribute for node in scope.node)
        for attribute in attributes:
            waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    return found - sum(node.op_type in INTEGER for node in model.graph.node)


def show(model: ModelProto, found: list[Product]) -> list[str]:
    """Make what goes into products and comes out outputs of a model; all their names."""
    inputs = {value.name for value in model.graph.input}
    names = [value.name for value in model.graph.output]
    for name in itertools.chain.from_iterable((p.source, p.target) for p in found):
        if name not in names and name not in inputs:
            model.graph.output.append(_real(name))
            names.append(name)
    return names


def wrong(found: Sequence[Product], values: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Which products are further from what they have to give than rounding explains."""
    for product in found:
        given, wanted = values[product.target], product.expected(values[product.source])
        if given.shape != wanted.shape:
            yield f"{product.name} is {given.shape}"
            continue
        apart = np.abs(given.astype(EXACT) - wanted).max(initial=0)
        if not apart <= TOLERANCE * np.abs(wanted).max(initial=0):
            yield f"{product.name} is off by {apart:.2g} of {np.abs(wanted).max():.2g}"


def _real(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
