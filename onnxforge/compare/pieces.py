"""Pieces of a model that run by themselves, with the weights where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxforge.lazy import FileTensor
from onnxforge.skeleton import set_external, skeleton
from onnxforge.walk import proto_graphs, proto_tensors

__all__ = ["Pieces"]

# Bytes; constants that a runtime has to see when it loads a model are smaller.
_COPIED = 1 << 16


class Pieces:
    """A model that can be cut.

    A piece is loaded from memory, in the folder ``folder``, and reads its weights from the
    files of the model, also those that lie inside the model file. Only small tensors and
    those in bodies, which cannot lie outside of what is loaded from memory, are copied.

    Attributes:
        folder: What the locations in pieces are relative to.
        made: Nodes that depend on the inputs of the model, each by what it makes, in order.
        bodies: Names of those that hold graphs.
    """

    def __init__(self, model: ir.Model) -> None:
        """Look at a model, which stays as it is."""
        content = skeleton(model, mend=False)
        graph = content.proto.graph
        self._proto = content.proto
        self._location = content.location
        self._tensors = content.tensors
        self._in_bodies = {
            int(tensor.external_data[1].value)
            for body in list(proto_graphs(content.proto))[1:]
            for tensor in proto_tensors(onnx.ModelProto(graph=body))
            if self._is_stub(tensor)
        }
        files = [t.file.path.resolve() for t in content.tensors if isinstance(t, FileTensor)]
        self.folder = Path(os.path.commonpath([f.parent for f in files] or [Path.cwd()]))
        self._nodes = list(graph.node)
        self._inputs = {value.name: value for value in graph.input}
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {o: i for i, n in enumerate(self._nodes) for o in n.output if o}
        depending = [(i, self._nodes[i]) for i in self._depending()]
        self.made = {o: (i, node) for i, node in depending for o in node.output if o}
        self.bodies = [n.name or n.op_type for _, n in depending if _bodies(n)]

    def _depending(self) -> list[int]:
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(self._nodes):
            for name in _reads(node):
                readers.setdefault(name, []).append(i)
        found: set[int] = set()
        names = list(self._inputs)
        while names:
            new = {i for i in readers.get(names.pop(), ()) if i not in found}
            found |= new
            names += [name for i in new for name in self._nodes[i].output if name]
        return sorted(found)

    def needs(self, wanted: Iterable[str], given: Mapping[str, object]) -> set[str]:
        """Which of the given values it takes to make the wanted ones."""
        return self._walk(wanted, given)[1] & given.keys()

    def _walk(
        self, wanted: Iterable[str], given: Mapping[str, object]
    ) -> tuple[list[int], set[str]]:
        """The nodes that make values from given ones, and all that these nodes read."""
        nodes: set[int] = set()
        read: set[str] = set()
        ahead = [self._makers[name] for name in wanted]
        while ahead:
            i = ahead.pop()
            if i in nodes:
                continue
            nodes.add(i)
            names = _reads(self._nodes[i])
            read |= names
            ahead += [self._makers[n] for n in names if n not in given and n in self._makers]
        return sorted(nodes), read

    def piece(
        self, wanted: Mapping[str, str], given: Mapping[str, ir.DataType]
    ) -> tuple[onnx.ModelProto, set[str]]:
        """Cut out what makes some values.

        Args:
            wanted: Values to make, and what each is called as an output of the piece: not its
                own name if it is given too.
            given: Values that are fed, and their types.

        Returns:
            The piece, and the names of its inputs.
        """
        nodes, read = self._walk(wanted, given)
        inputs = read & given.keys()
        proto = onnx.ModelProto(ir_version=self._proto.ir_version)
        proto.opset_import.extend(self._proto.opset_import)
        proto.functions.extend(self._proto.functions)
        graph = proto.graph
        graph.name = "piece"
        for name in sorted(inputs):
            graph.input.append(self._inputs.get(name) or onnx.ValueInfoProto(name=name))
            graph.input[-1].type.tensor_type.elem_type = given[name].value
        graph.initializer.extend(self._weights[n] for n in sorted(read & self._weights.keys()))
        for i in nodes:
            node = graph.node.add()
            node.CopyFrom(self._nodes[i])
            node.output[:] = [
                wanted.get(name) or (f"{name}/made" if name in given else name)
                for name in node.output
            ]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted.values())
        for tensor in proto_tensors(proto):
            if self._is_stub(tensor):
                self._place(tensor)
        return proto, inputs

    def _is_stub(self, tensor: onnx.TensorProto) -> bool:
        entries = tensor.external_data
        return len(entries) > 0 and entries[0].value == self._location

    def _place(self, stub: onnx.TensorProto) -> None:
        number = int(stub.external_data[1].value)
        tensor = self._tensors[number]
        outside = isinstance(tensor, FileTensor) and tensor.nbytes >= _COPIED
        if isinstance(tensor, FileTensor) and outside and number not in self._in_bodies:
            place = tensor.file.path.resolve().relative_to(self.folder).as_posix()
            where = {"location": place, "offset": tensor.offset, "length": tensor.nbytes}
            set_external(stub, {key: str(value) for key, value in where.items()})
            return
        stub.ClearField("external_data")
        stub.ClearField("data_location")
        stub.raw_data = tensor.tobytes()


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    single = [a.g for a in node.attribute if a.HasField("g")]
    return single + [graph for a in node.attribute for graph in a.graphs]


def _reads(node: onnx.NodeProto) -> set[str]:
    """All that a node reads, in its bodies too."""
    names = {name for name in node.input if name}
    for body in _bodies(node):
        names |= {output.name for output in body.output}
        names.update(*(_reads(inner) for inner in body.node))
    return names
