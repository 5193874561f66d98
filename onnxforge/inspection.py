"""What a model is: operators, versions, interface and weights, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from onnxforge import model_io
from onnxforge.errors import ModelError
from onnxforge.lazy import FileTensor
from onnxforge.manager import PIPELINE_KEY
from onnxforge.storage.remote import is_address
from onnxforge.walk import scopes
from onnxforge.weights import Weight, Weights

if TYPE_CHECKING:
    import os

    import onnx_ir as ir

_Key = TypeVar("_Key", bound=tuple[str, ...])

__all__ = ["Inspection", "Port", "ReaderGroup", "WeightGroup", "inspect"]


@dataclass(frozen=True)
class Port:
    """An input or output: its name, type and shape as text."""

    name: str
    type: str
    shape: str


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one type in one kind of place.

    Attributes:
        dtype: Type of their elements.
        place: ``initializer``, ``Constant node`` or ``attribute``, and where: ``main graph``,
            ``body`` or ``function``.
        stored: ``inline`` or ``data file``.
        count: How many.
        nbytes: Their size in bytes.
    """

    dtype: str
    place: str
    stored: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class ReaderGroup:
    """Weights of one type that the same operators read.

    Attributes:
        readers: These operators, looking through Cast, Transpose and the like;
            ``graph output``, ``default of a function`` or ``nothing`` where there is none.
        dtype: Type of their elements.
        count: How many.
        nbytes: Their size in bytes.
    """

    readers: str
    dtype: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What a model is.

    Attributes:
        ir_version: Version of the file format.
        opsets: Imported version of each operator set; those of functions are named after them.
        producer: Name and version of the tool that exported it.
        pipeline: The onnxforge passes it went through, empty if none.
        files: Size in bytes of the model and of each data file, by path or address.
        inputs: Graph inputs.
        outputs: Graph outputs.
        weights: Weights by type and place, the largest first.
        readers: Weights by the operators that read them and by type, the largest first.
        ops: Number of nodes by operator, in all graphs, the most frequent first.
    """

    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    pipeline: str
    files: Mapping[str, int]
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    weights: Sequence[WeightGroup]
    readers: Sequence[ReaderGroup]
    ops: Mapping[str, int]


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look at a model file, also behind an address of http, of which only the header is read.

    Raises:
        OnnxforgeError: The model cannot be read.
    """
    files: Mapping[str, int]
    if is_address(path):
        model, files = model_io.load_header(str(path))
    else:
        model = model_io.load(path, editable=False)
        files = {str(file): size for file, size in model_io.files(model).items()}
    ops = Counter(_operator(node) for scope in scopes(model) for node in scope.graph)
    opsets = {domain or "ai.onnx": version for domain, version in model.opset_imports.items()}
    for scope in scopes(model):
        if scope.function is not None and scope.parent is None:
            for domain, version in scope.opset_imports.items():
                opsets[scope.path + (domain or "ai.onnx")] = version
    try:
        weights = Weights(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return Inspection(
        ir_version=model.ir_version,
        opsets=opsets,
        producer=" ".join(filter(None, [model.producer_name, model.producer_version])),
        pipeline=model.metadata_props.get(PIPELINE_KEY, ""),
        files=files,
        inputs=[_port(value) for value in model.graph.inputs],
        outputs=[_port(value) for value in model.graph.outputs],
        weights=[WeightGroup(*key, *size) for key, size in _sums(weights, _kind)],
        readers=[ReaderGroup(*key, *size) for key, size in _sums(weights, _readers)],
        ops=dict(ops.most_common()),
    )


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _port(value: ir.Value) -> Port:
    return Port(value.name or "", str(value.type), str(value.shape))


def _sums(
    weights: Weights, key: Callable[[Weight], _Key]
) -> list[tuple[_Key, tuple[int, int]]]:
    """Number and bytes of the weights with each key."""
    counts: Counter[_Key] = Counter()
    sizes: Counter[_Key] = Counter()
    for weight in weights:
        counts[found := key(weight)] += 1
        sizes[found] += weight.nbytes
    return [(found, (counts[found], size)) for found, size in sizes.most_common()]


def _kind(weight: Weight) -> tuple[str, str, str]:
    return weight.dtype.name.lower(), _place(weight), _stored(weight)


def _readers(weight: Weight) -> tuple[str, str]:
    if weight.value is not None:
        names = sorted({_operator(node) for node in weight.consumers})
    else:
        names = [_operator(weight.node) if weight.node else "default of a function"]
    if weight.is_output:
        names.append("graph output")
    return ", ".join(names) or "nothing", weight.dtype.name.lower()


def _place(weight: Weight) -> str:
    if weight.value is None:
        kind = "attribute"
    else:
        kind = "initializer" if weight.node is None else "Constant node"
    scope = weight.scope
    outer = "function" if scope.function else "body" if scope.parent else "main graph"
    return f"{kind}, {outer}"


def _stored(weight: Weight) -> str:
    tensor = weight.tensor
    return "data file" if isinstance(tensor, FileTensor) and tensor.external else "inline"
