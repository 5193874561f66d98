"""Which tensor goes into which file, and where in it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from onnxforge.core import Fate, Finding
from onnxforge.errors import ModelError
from onnxforge.lazy import FileTensor, identity, root
from onnxforge.model_io import MAX_PROTO_BYTES
from onnxforge.options import ByteSize
from onnxforge.skeleton import SOURCE, Skeleton, Source, set_external, skeleton
from onnxforge.storage import wire
from onnxforge.storage.extents import overlapping
from onnxforge.storage.writer import Part
from onnxforge.weights import Weight, Weights

if TYPE_CHECKING:
    import onnx

__all__ = [
    "CODES",
    "PLACEMENT",
    "DataFilePlan",
    "Division",
    "Layout",
    "Placement",
    "divide",
    "pack",
]

Layout = Literal["keep", "inline", "sidecar"]

PLACEMENT = "onnxforge.placement"
"""Key of ``ir.Model.meta`` under which a pass leaves a `Placement` that saving obeys."""

CODES: Mapping[str, str] = {
    "OF321": "The weight goes into a data file.",
    "OF322": "The weight is smaller than `inline_below`.",
    "OF323": "A runtime needs the value when it loads the model, and not from a data file.",
    "OF324": "Text and tensors without elements have no bytes to put into a data file.",
    "OF325": "The weight is in a node; `lift=true` makes an initializer of a Constant node.",
    "OF326": "The weight is in a body of If, Loop or Scan, where browsers load no data file.",
}
"""What the codes mean that say where weights go."""


@dataclass(frozen=True)
class Placement:
    """How weights are to be laid out in data files.

    Attributes:
        single: One data file for all, ``<model>_data``; else ``<model>.data.000`` and on.
        max_bytes: Most bytes of a data file, None for any size.
        digits: At least so many in the number of a data file.
        inline_below: Smaller tensors stay in the model file.
        align: Offsets are multiples of this many bytes.
        order: ``graph`` keeps the order of the model, ``size`` puts the largest first.
        bodies: Where the weights of If, Loop and Scan bodies go; ``keep`` leaves them there.
        model_bytes: Most bytes of the model file, None for what protobuf can hold.
        manifest: Also write the SHA-256 of each file, to ``<model>.sha256``.
    """

    single: bool = True
    max_bytes: int | None = None
    digits: int = 3
    inline_below: ByteSize = ByteSize(wire.PAYLOAD_BYTES)
    align: int = 64
    order: Literal["graph", "size"] = "graph"
    bodies: Literal["keep", "outside", "inside"] = "keep"
    model_bytes: int | None = None
    manifest: bool = False

    def names(self, model: str, count: int) -> list[str]:
        """Names of the data files of a model with the given file name."""
        if self.single:
            return [f"{model}_data"][:count]
        return [f"{model}.data.{number:0{self.digits}}" for number in range(count)]


@dataclass(frozen=True)
class Division:
    """What of a model goes outside and what stays inside.

    Attributes:
        content: The serialized graph.
        outside: Numbers of the tensors that go into data files, with their paths.
        findings: One for each weight.
    """

    content: Skeleton
    outside: Mapping[int, str]
    findings: tuple[Finding, ...] = ()

    @property
    def inside(self) -> int:
        """Size of the model file in bytes, but for a few bytes for each tensor."""
        tensors = enumerate(self.content.tensors)
        payloads = sum(tensor.nbytes for i, tensor in tensors if i not in self.outside)
        size: int = self.content.proto.ByteSize()
        return size + payloads + 16 * len(self.content.tensors)


@dataclass(eq=False)
class DataFilePlan:
    """A data file to be written.

    Attributes:
        parts: What to write where; a tensor has one place, however many names it has.
        size: Size in bytes.
        payload: Bytes of it that belong to tensors.
        stubs: The tensors in the models that lie in it, their offsets and sizes in bytes.
    """

    parts: list[Part] = field(default_factory=list)
    size: int = 0
    payload: int = 0
    stubs: list[tuple[onnx.TensorProto, int, int]] = field(default_factory=list)

    def next(self, align: int) -> int:
        """The next free aligned offset."""
        return -(-self.size // align) * align

    def add(self, unit: _Unit, align: int) -> None:
        """Put something at the end."""
        offset, size = self.next(align), unit.tensor.nbytes
        self.parts.append(Part(offset, unit.tensor))
        self.stubs += [(stub, offset + at, length) for stub, at, length in unit.members]
        self.size = offset + size
        self.payload += size

    def point(self, location: str) -> None:
        """Point the tensors of the models to the file of this name."""
        for stub, offset, length in self.stubs:
            entries = {"location": location, "offset": str(offset), "length": str(length)}
            set_external(stub, entries)


def divide(
    model: ir.Model, layout: Layout = "keep", placement: Placement | None = None
) -> Division:
    """Decide which tensors go into data files.

    Args:
        model: The model.
        layout: ``keep`` uses data files if the model was loaded from some, or would not fit
            into one file of 2 GB.
        placement: The rules; those that a pass left with the model if None.

    Raises:
        ModelError: The layout contradicts the placement, or the model does not fit it.
    """
    asked: Placement | None = placement or model.meta.get(PLACEMENT)
    placement = asked or Placement()
    limit = placement.model_bytes or MAX_PROTO_BYTES
    if asked and layout != "keep":
        raise ModelError(f"a pass has said where weights go: leave out the {layout} layout")
    external = model.meta.get(SOURCE, Source()).external
    if not asked and (layout == "inline" or (layout == "keep" and not external)):
        found = Division(skeleton(model), {})
        if found.inside <= limit:
            return found
        if layout == "inline":
            raise ModelError(
                "the weights do not fit into one file of 2 GB: use the sidecar layout"
            )
    # Bodies and nodes keep theirs inside: not every runtime loads those from a data file.
    for everything in (False, True):
        found = _divided(model, placement, everything=everything)
        if found.inside <= limit:
            return found
    raise ModelError(
        f"what has to stay in the model file does not fit there: {found.inside} bytes, at most"
        f" {limit}"
    )


def _divided(model: ir.Model, placement: Placement, *, everything: bool) -> Division:
    weights = Weights(model)
    names = Counter(identity(weight.tensor) for weight in weights)
    findings: list[Finding] = []
    outside: dict[int, str] = {}
    inside: set[int] = set()
    for weight in weights:
        tied = names[identity(weight.tensor)] > 1
        why = _why_inside(weight, placement, tied=tied, everything=everything)
        if why is None:
            outside[id(weight.tensor)] = weight.where
        else:
            inside.add(id(weight.tensor))
        code, message = why or ("OF321", "goes into a data file")
        fate = Fate.SKIPPED if why else Fate.TREATED
        findings.append(Finding(code, weight.where, message, weight.nbytes, fate))
    outside = {key: where for key, where in outside.items() if key not in inside}
    content = skeleton(model, also=outside)
    numbers = {
        i: outside[id(tensor)]
        for i, tensor in enumerate(content.tensors)
        if id(tensor) in outside
    }
    return Division(content, numbers, tuple(findings))


def _why_inside(
    weight: Weight, placement: Placement, *, tied: bool, everything: bool
) -> tuple[str, str] | None:
    in_body = weight.scope.parent is not None
    is_initializer = weight.value is not None and weight.node is None
    if weight.dtype == ir.DataType.STRING or not weight.nbytes:
        return "OF324", "has no bytes of its own"
    if weight.is_needed_constant:
        return "OF323", "a runtime needs its value at load time"
    if in_body and placement.bodies == "inside":
        return "OF326", "is in a body"
    was_outside = _was_outside(weight.tensor)
    # Inside, a tensor with two names is stored twice, however small it has become.
    if weight.nbytes < placement.inline_below and not (tied and was_outside):
        return "OF322", f"smaller than {placement.inline_below}"
    if was_outside or (is_initializer and (placement.bodies == "outside" or not in_body)):
        return None
    is_tensor = (
        weight.node is None or weight.value is None or "value" in weight.node.attributes
    )
    return None if everything and is_tensor else ("OF325", "is in a node")


def _was_outside(tensor: ir.TensorProtocol) -> bool:
    stored = root(tensor)
    return isinstance(stored, FileTensor) and bool(stored.external)


@dataclass
class _Unit:
    """Bytes that are stored in one piece, and the tensors that lie in it."""

    where: str
    tensor: ir.TensorProtocol
    members: list[tuple[onnx.TensorProto, int, int]] = field(default_factory=list)


def pack(
    divisions: Iterable[Division],
    placement: Placement,
    same: Callable[[ir.TensorProtocol], Hashable] = identity,
) -> list[DataFilePlan]:
    """Give every tensor that goes outside its place in a data file.

    Args:
        divisions: The models that use the data files.
        placement: The rules.
        same: Equal for tensors that are to be stored once.

    Raises:
        ModelError: A tensor is larger than a data file may be.
    """
    limit = placement.max_bytes or sys.maxsize
    units = _units(divisions, same)
    if placement.order == "size":
        units.sort(key=lambda unit: -unit.tensor.nbytes)
    smallest = min((unit.tensor.nbytes for unit in units), default=0)
    files: list[DataFilePlan] = []
    room: list[DataFilePlan] = []  # files that may take one more
    for unit in units:
        size = unit.tensor.nbytes
        if size > limit:
            able = placement.model_bytes is None or size <= placement.model_bytes
            way = f"max_bytes={size} or more" if able else "a smaller type, by an earlier pass"
            raise ModelError(
                f"tensor {unit.where!r}: {size} bytes are too many for a data file of {limit};"
                f" it takes {way}"
            )
        fits = (file for file in room if file.next(placement.align) + size <= limit)
        file = next(fits, None)
        if file is None:
            file = DataFilePlan()
            files.append(file)
            # In graph order only the last file is open, so that neighbours stay together.
            if placement.order == "graph":
                room.clear()
            room.append(file)
        file.add(unit, placement.align)
        if file.next(placement.align) + smallest > limit:
            room.remove(file)
    if placement.single and len(files) > 1:
        raise ModelError(f"the weights do not fit into one data file of at most {limit} bytes")
    return files


def _units(
    divisions: Iterable[Division], same: Callable[[ir.TensorProtocol], Hashable]
) -> list[_Unit]:
    units: dict[Hashable, _Unit] = {}
    for division in divisions:
        content = division.content
        wholes = _wholes([content.tensors[i] for i in division.outside])
        for i, where in division.outside.items():
            tensor = content.tensors[i]
            whole = wholes.get(id(tensor), tensor)
            unit = units.setdefault(same(whole), _Unit(where, whole))
            at = 0
            if isinstance(tensor, FileTensor) and isinstance(whole, FileTensor):
                at = tensor.offset - whole.offset
            unit.members.append((content.stubs[i], at, tensor.nbytes))
    return list(units.values())


def _wholes(tensors: Sequence[ir.TensorProtocol]) -> dict[int, FileTensor]:
    """For tensors that overlap in their file: all that they cover together, in one piece."""
    wholes: dict[int, FileTensor] = {}
    for group in overlapping(tensors):
        first = group[0]
        size = max(tensor.offset + tensor.nbytes for tensor in group) - first.offset
        like = ir.ExternalTensor(
            "", first.offset, size, ir.DataType.UINT8, shape=ir.Shape([size]), name=""
        )
        whole = FileTensor(first.file, first.offset, like, external=first.external)
        wholes.update((id(tensor), whole) for tensor in group)
    return wholes
