"""Lay the weights out in data files of a bounded size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx
import onnx_ir as ir
from onnx_ir import serde

from onnxforge.core import Effect, Finding, Pass, Result
from onnxforge.errors import ModelError, Refused
from onnxforge.lazy import DerivedTensor, FileTensor
from onnxforge.options import ByteSize
from onnxforge.placement import (
    CODES,
    PLACEMENT,
    DataFilePlan,
    Division,
    Placement,
    divide,
    pack,
)
from onnxforge.skeleton import twin
from onnxforge.weights import Weight, Weights

__all__ = ["ExternalDataShardPass"]

_BROWSER_FILE = 2**31 - 2
_BROWSER_HEAP = 2**32
_MOST_DIGITS = 9  # file names end somewhere
_LIFTED = {"value", "value_floats", "value_ints"}  # a number alone is not worth a tensor


@dataclass(frozen=True)
class ExternalDataShardPass(Pass):
    """Move the weights into data files of a bounded size, or into one.

    A pure repack: no byte of a weight and nothing in the graph changes. The model says where
    each weight lies, `<model>.data.000` and on, when it is saved. Weights that no runtime
    loads from a data file stay in the model: small ones, shapes and other values that are
    needed at load time, tensors without elements, text.

    Attributes:
        max_bytes: Most bytes of a data file. A tensor that is larger is an error.
        digits: At least so many digits in the number of a data file.
        inline_below: Smaller tensors stay in the model.
        align: Offsets are multiples of this many bytes.
        order: ``graph`` keeps the order of the model, so that layers stay together; ``size``
            puts the largest first into the first file that has room, which makes fewer files.
        single: One data file of any size, `<model>_data`.
        target: ``browser`` also keeps the weights of If, Loop and Scan bodies in the model,
            makes no file of 2 GB or more, and reports the total beside the memory of a page.
        lift: Make initializers of the Constant nodes whose values can go outside; else they
            stay as they are.
        manifest: Write the SHA-256 of each file to `<model>.sha256`, for sha256sum --check.

    Example:
        onnxforge run --passes 'shard{max_bytes=1.5GB target=browser}' in.onnx out.onnx
    """

    name: ClassVar[str] = "shard"
    effect: ClassVar[Effect] = Effect.LAYOUT
    codes: ClassVar[Mapping[str, str]] = {
        **CODES,
        "OF327": "What a browser has to load, beside the 4 GiB that a page of WebAssembly can"
        " address; a session needs room for its activations as well.",
    }

    max_bytes: ByteSize = ByteSize("1.5GB")
    digits: int = 3
    inline_below: ByteSize = ByteSize(1024)
    align: ByteSize = ByteSize(64)
    order: Literal["graph", "size"] = "graph"
    single: bool = False
    target: Literal["any", "browser"] = "any"
    lift: bool = False
    manifest: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that make no file.

        Raises:
            ValueError: A size is zero, or more than a browser loads.
        """
        super().__post_init__()
        for option in ("max_bytes", "digits", "align"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1")
        if self.digits > _MOST_DIGITS:
            raise ValueError(f"digits must be at most {_MOST_DIGITS}")
        if self.target == "browser" and not self.single and self.max_bytes > _BROWSER_FILE:
            raise ValueError(f"browsers load files of at most {_BROWSER_FILE} bytes")

    def call(self, model: ir.Model) -> Result:
        """Leave word for saving, and say what it will do."""
        placement = self._placement()
        try:
            # Lifting changes the graph, so a copy shows first whether all will have room.
            plan = self._plan(twin(model) if self.lift else model, placement)
        except ModelError as error:
            raise Refused(str(error)) from None
        if plan.lifted:
            plan = self._plan(model, placement)
        model.meta[PLACEMENT] = placement
        outside = sum(file.size for file in plan.files)
        stats = {"data_files": len(plan.files), "bytes_in_data_files": outside}
        if self.lift:
            stats["lifted"] = plan.lifted
        findings = plan.division.findings
        if self.target == "browser":
            findings += (_heap(plan.division.inside + outside),)
        return Result(model, plan.lifted > 0, stats, findings)

    def _plan(self, model: ir.Model, placement: Placement) -> _Plan:
        division = divide(model, placement=placement)
        lifted = list(_liftable(model, division)) if self.lift else []
        for weight in lifted:
            _lift(weight)
        if lifted:
            division = divide(model, placement=placement)
        return _Plan(division, pack([division], placement), len(lifted))

    def _placement(self) -> Placement:
        browser = self.target == "browser"
        largest = _BROWSER_FILE if browser else None
        return Placement(
            single=self.single,
            max_bytes=largest if self.single else self.max_bytes,
            digits=self.digits,
            inline_below=self.inline_below,
            align=self.align,
            order=self.order,
            bodies="inside" if browser else "outside",
            model_bytes=largest,
            manifest=self.manifest,
        )


@dataclass(frozen=True)
class _Plan:
    """Where the weights go, and how many had to be lifted for that."""

    division: Division
    files: list[DataFilePlan]
    lifted: int


def _liftable(model: ir.Model, division: Division) -> Iterator[Weight]:
    """Weights in Constant nodes that as initializers could go outside."""
    able = {f.where for f in division.findings if f.code in ("OF321", "OF325")}
    names: dict[ir.Graph, set[str | None]] = {}
    for weight in Weights(model):
        # Nobody can read what has no name.
        node = weight.node if weight.value is not None and weight.value.name else None
        if node is None or weight.where not in able:
            continue
        in_constant = len(node.attributes) == 1 and not _LIFTED.isdisjoint(node.attributes)
        # Functions have no initializers, and before IR 4 those are inputs of the graph.
        fixed = weight.scope.function is not None or weight.is_output or model.ir_version < 4
        if in_constant and not fixed and not _shadows(weight, names):
            yield weight


def _shadows(weight: Weight, names: dict[ir.Graph, set[str | None]]) -> bool:
    """Whether an outer graph has the name too: nodes before the Constant may mean that."""
    assert weight.value is not None
    scope = weight.scope.parent
    while scope is not None:
        graph = scope.graph
        if graph not in names:
            made = (output.name for node in graph for output in node.outputs)
            names[graph] = {*made, *graph.initializers, *(v.name for v in graph.inputs)}
        if weight.value.name in names[graph]:
            return True
        scope = scope.parent
    return False


def _lift(weight: Weight) -> None:
    """Make an initializer of a Constant node."""
    node, value = weight.node, weight.value
    assert node is not None and value is not None  # noqa: PT018
    tensor = _own(weight.tensor, weight.tensor.doc_string or node.doc_string)
    tensor.name = value.name
    tensor.metadata_props.update(node.metadata_props)
    initializer = ir.Value(
        name=value.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        doc_string=value.doc_string,
        const_value=tensor,
    )
    initializer.meta.update(value.meta)
    initializer.metadata_props.update(value.metadata_props)
    ir.convenience.replace_all_uses_with(value, initializer)
    graph = weight.scope.graph
    graph.remove(node)
    graph.register_initializer(initializer)


def _own(tensor: ir.TensorProtocol, doc_string: str | None) -> ir.TensorProtocol:
    """The same tensor again: another model, or the proto that it is from, keeps its name."""
    if isinstance(tensor, serde.TensorProtoTensor):
        proto = onnx.TensorProto()
        proto.CopyFrom(tensor.raw)
        if doc_string:
            proto.doc_string = doc_string
        return serde.TensorProtoTensor(proto)
    if isinstance(tensor, FileTensor | DerivedTensor):
        again = copy.copy(tensor)
        again.doc_string = doc_string
        again.metadata_props = dict(tensor.metadata_props)
        return again
    return ir.LazyTensor(
        lambda: tensor,
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        doc_string=doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _heap(total: int) -> Finding:
    message = f"{total / 1e9:.2f} GB to load, of {_BROWSER_HEAP / 1e9:.2f} GB at most"
    level = "info" if total < _BROWSER_HEAP else "warning"
    return Finding("OF327", "model", message, level=level)
