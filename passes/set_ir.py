"""Lower the IR version of a model, so that older runtimes load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from onnxforge.core import Effect, Finding, Pass, Result
from onnxforge.errors import Refused
from onnxforge.skeleton import skeleton

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor

__all__ = ["SetIrVersionPass"]

_LOWEST, _NEWEST = 4, 14
_SHOWN = 5  # places that a refusal names


@dataclass(frozen=True)
class SetIrVersionPass(Pass):
    """Lower the IR version where a model uses nothing newer.

    Exporters write the newest IR version they know, and a runtime refuses a model above its
    own: opset 20 at IR 10 loads on no onnxruntime 1.17, at IR 9 it does. A model that is at
    ``max`` or below stays as it is. The operator set is no obstacle: runtimes hold it and
    the IR version against separate limits.

    The pass refuses a model with something that the lower version does not define, even where
    a lenient runtime would not look: element types, optional and sparse types, sparse
    tensors, functions with their overloads and default attributes, training graphs,
    quantization annotations and device configurations. What older readers skip without harm
    stays and is reported: metadata, and types of values inside of functions. The latter move
    to the main graph, under names that exporters use for them below IR 10. IR 3 and older
    are out of reach, since weights had to be graph inputs there.

    Attributes:
        max: The IR version that the model may have at most, 4 or more.

    Example:
        onnxforge run --passes 'set-ir{max=9}' in.onnx out.onnx
    """

    name: ClassVar[str] = "set-ir"
    effect: ClassVar[Effect] = Effect.LAYOUT
    codes: ClassVar[Mapping[str, str]] = {
        "OF311": "Metadata of graphs, nodes, values, tensors or functions stays, although only"
        " IR 10 defines it; older readers skip it.",
        "OF312": "Types of values inside of a function are written to the main graph, as"
        " `domain::function/value`: functions have no room for them before IR 10.",
    }

    max: int

    def __post_init__(self) -> None:
        """Refuse versions that no model with weights can have.

        Raises:
            ValueError: ``max`` is too low.
        """
        super().__post_init__()
        if self.max < _LOWEST:
            raise ValueError(f"max must be at least {_LOWEST}, not {self.max}")

    def call(self, model: ir.Model) -> Result:
        """Lower the version, or say what is in the way."""
        version = model.ir_version
        if version <= self.max:
            return Result(model, False)
        if version > _NEWEST:
            raise Refused(
                f"the model has IR version {version}; what is new in it is not known here,"
                f" {_NEWEST} is the newest known"
            )
        # The graph as it would be written, with what onnx_ir has no room for.
        proto = skeleton(model).proto
        if needs := [need for need in _needs(proto, "") if need.ir > self.max]:
            raise Refused(_refusal(version, self.max, needs))
        findings = tuple(_kept(proto)) if version >= 10 > self.max else ()
        model.ir_version = self.max
        return Result(model, True, {"from": version, "to": self.max}, findings)


@dataclass(frozen=True)
class _Need:
    """Something in a model that an IR version brought.

    Attributes:
        ir: The version.
        where: Path of what has it.
        what: What it is.
        way: How to get rid of it.
    """

    ir: int
    where: str
    what: str
    way: str


_TYPES: Mapping[int, int] = {
    ir.DataType.FLOAT8E4M3FN: 9,
    ir.DataType.FLOAT8E4M3FNUZ: 9,
    ir.DataType.FLOAT8E5M2: 9,
    ir.DataType.FLOAT8E5M2FNUZ: 9,
    ir.DataType.UINT4: 10,
    ir.DataType.INT4: 10,
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.UINT2: 13,
    ir.DataType.INT2: 13,
    ir.DataType.FLOAT6E2M3: 14,
    ir.DataType.FLOAT6E3M2: 14,
}
"""The IR version that brought an element type; types not listed came by IR 4."""

_TYPE_FIELDS = ("TensorProto.data_type", "Tensor.elem_type", "SparseTensor.elem_type")

# Integer attributes of ai.onnx operators that name an element type.
_TYPE_ATTRIBUTES = frozenset(
    {
        "dtype",
        "output_datatype",
        "output_dtype",
        "precision",
        "softmax_precision",
        "stash_type",
        "to",
    }
)

_INLINE = "inline the functions"
_FIELDS: Mapping[str, tuple[int, str, str]] = {
    "GraphProto.quantization_annotation": (5, "has a quantization annotation", "remove it"),
    "GraphProto.sparse_initializer": (6, "is a sparse weight", "make it dense"),
    "AttributeProto.sparse_tensor": (6, "is a sparse tensor", "make it dense"),
    "AttributeProto.sparse_tensors": (6, "is in a list of sparse tensors", "make it dense"),
    "ModelProto.training_info": (7, "is a training graph", "remove it"),
    "ModelProto.functions": (8, "is a function", _INLINE),
    "TypeProto.optional_type": (8, "has an optional type", "remove it"),
    "TypeProto.sparse_tensor_type": (8, "has a sparse type", "make it dense"),
    "FunctionProto.attribute_proto": (9, "has a default for an attribute", _INLINE),
    "FunctionProto.overload": (10, "is an overload", _INLINE),
    "NodeProto.overload": (10, "calls an overload", _INLINE),
    "ModelProto.configuration": (11, "is a device configuration", "remove it"),
    "NodeProto.device_configurations": (11, "has a device configuration", "remove it"),
}
"""Fields of the protobuf messages: the IR version that brought them, as onnx.proto says.

Not among them are those that older readers skip without harm, and all that IR 4 knows.
"""


def _needs(message: Message, where: str) -> Iterator[_Need]:
    """All that a message and those inside it need a newer IR version for."""
    for field, value, places in _fields(message, where):
        key = f"{message.DESCRIPTOR.name}.{field.name}"
        if key in _FIELDS:
            version, what, way = _FIELDS[key]
            yield from (_Need(version, place, what, way) for place in places or [where])
        if key in _TYPE_FIELDS:
            yield from _type_needs(value, where, "is")
        for place, child in zip(places, _children(field, value), strict=True):
            yield from _needs(child, place)
    if isinstance(message, onnx.NodeProto) and message.domain in ("", "ai.onnx"):
        for attribute in message.attribute:
            if attribute.name in _TYPE_ATTRIBUTES:
                yield from _type_needs(attribute.i, where, f"asks by {attribute.name!r} for")


def _type_needs(number: int, where: str, how: str) -> Iterator[_Need]:
    if number in _TYPES:
        name = ir.DataType(number).name
        yield _Need(_TYPES[number], where, f"{how} {name}", "use another type")


def _kept(model: onnx.ModelProto) -> Iterator[Finding]:
    """What IR 10 brought and stays, or moves."""
    if count := sum(_metadata(message) for message in (model.graph, *model.functions)):
        message = f"metadata stays in {count} place{'s' if count > 1 else ''}"
        yield Finding("OF311", "model", message)
    for function in model.functions:
        if count := len(function.value_info):
            message = (
                f"types of {count} value{'s' if count > 1 else ''} move to the main graph"
            )
            yield Finding("OF312", _named("", function, 0), message)


def _metadata(message: Message) -> int:
    """Number of messages with metadata among a message and those inside it."""
    own = int(bool(getattr(message, "metadata_props", None)))
    return own + sum(
        _metadata(child)
        for field, value in message.ListFields()
        for child in _children(field, value)
    )


def _refusal(version: int, target: int, needs: list[_Need]) -> str:
    unique = list(dict.fromkeys(needs))
    shown = [f"{need.where} {need.what} (IR {need.ir})" for need in unique[:_SHOWN]]
    if len(unique) > _SHOWN:
        shown.append(f"{len(unique) - _SHOWN} more")
    lowest = max(need.ir for need in unique)
    ways = [*([f"max={lowest}"] if lowest < version else []), *(need.way for need in unique)]
    return (
        f"IR version {version} cannot become {target}: {', '.join(shown)};"
        f" {' or '.join(dict.fromkeys(ways))}"
    )


def _fields(message: Message, where: str) -> Iterator[tuple[FieldDescriptor, Any, list[str]]]:
    """The fields that are set, their values, and the paths of the messages in them."""
    for field, value in message.ListFields():
        children = enumerate(_children(field, value))
        yield field, value, [_named(where, child, index) for index, child in children]


def _children(field: FieldDescriptor, value: Any) -> Sequence[Message]:
    if field.message_type is None:
        return ()
    return (value,) if isinstance(value, Message) else value


def _named(where: str, child: Message, index: int) -> str:
    """Path of a message inside the one at ``where``; mere structure adds nothing to it."""
    name = ""
    if isinstance(child, onnx.NodeProto):
        name = child.name or f"{child.op_type}_{index}"
    elif isinstance(child, onnx.FunctionProto):
        name = f"{child.domain}::{child.name}" + (
            f":{child.overload}" if child.overload else ""
        )
    elif isinstance(child, onnx.SparseTensorProto):
        name = child.values.name
    elif isinstance(child, onnx.TensorAnnotation):
        name = child.tensor_name
    elif isinstance(child, onnx.TrainingInfoProto):
        name = f"training_info[{index}]"
    elif not isinstance(child, onnx.GraphProto):
        name = getattr(child, "name", "")
    return "/".join(part for part in (where, name) if part)
