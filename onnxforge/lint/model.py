"""A model as rules see it: its header, its graphs, its place in a bundle."""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from onnxforge.errors import ModelError
from onnxforge.lint.held import Held, held
from onnxforge.lint.view import graphs
from onnxforge.storage import wire

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxforge.lint.files import Files
    from onnxforge.lint.view import Call, Graph, Node, Tensor

__all__ = ["Header", "Model"]

_POINTER = b"version https://git-lfs"
_STRING, _MESSAGE = FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE


@dataclass(frozen=True)
class Header:
    """A model file without its large tensors.

    Attributes:
        proto: The model.
        payloads: Where what was taken out lies in the file.
        location: How tensors are marked that something was taken out of.
    """

    proto: onnx.ModelProto
    payloads: Sequence[wire.Payload]
    location: str

    @classmethod
    def read(cls, files: Files, name: str) -> Header:
        """Read the header of a file.

        Raises:
            ModelError: The file is no model; the message does not name it.
        """
        size = files.size(name)
        if size is None:
            raise ModelError("no such file")
        location = secrets.token_hex(16)
        with files.slices(name) as content:
            if content[0 : min(size, len(_POINTER))] == _POINTER:
                raise ModelError("is a pointer of Git LFS, not the model: run git lfs pull")
            skeleton, payloads = wire.excise("", content, size, location)
        try:
            proto = onnx.ModelProto.FromString(skeleton)
        except DecodeError:
            raise ModelError("not an ONNX model (damaged protobuf)") from None
        if not proto.HasField("graph"):
            raise ModelError("not an ONNX model (it holds no graph)")
        if any(isinstance(text, bytes) for text in _texts(proto)):
            raise ModelError("a name in it is no text (UTF-8)")
        return cls(proto, payloads, location)


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    """All that should be text; what cannot be decoded comes as bytes."""
    waiting: list[Message] = [proto]
    while waiting:
        for field, value in waiting.pop().ListFields():
            if field.type == _MESSAGE:
                waiting += [value] if isinstance(value, Message) else value
            elif field.type == _STRING and field.name != "doc_string":
                yield from [value] if isinstance(value, str | bytes) else value


class Model:
    """A model file of a bundle.

    Attributes:
        files: The files it is among.
        name: Its name among them.
        stem: The graph it is, without what names the tier.
        tier: The tier it is of, empty where nothing names one.
    """

    def __init__(self, files: Files, name: str) -> None:
        """Name the file; it is read when something of it is asked for."""
        self.files = files
        self.name = name
        self.stem = name.rpartition("/")[2].removesuffix(".onnx")
        self.tier = ""

    @functools.cached_property
    def _read(self) -> Header | str:
        try:
            return Header.read(self.files, self.name)
        except ModelError as error:
            return str(error).removeprefix(": ")

    @property
    def broken(self) -> str | None:
        """Why it cannot be read, None if it can."""
        return self._read if isinstance(self._read, str) else None

    @property
    def header(self) -> Header:
        """What the file says; ask only a model that is not broken."""
        assert isinstance(self._read, Header), "a broken model has no header"
        return self._read

    @property
    def proto(self) -> onnx.ModelProto:
        """The model, its large tensors without their bytes."""
        return self.header.proto

    @functools.cached_property
    def graphs(self) -> list[Graph]:
        """All its graphs, the main one first."""
        return graphs(self.proto, self.header.payloads, self.header.location)

    @property
    def owners(self) -> Iterator[Graph]:
        """The main graph and the functions: what has imports of its own."""
        return (graph for graph in self.graphs if graph.parent is None)

    @functools.cached_property
    def functions(self) -> dict[Call, Graph]:
        """The functions, by what calls them."""
        return {graph.call: graph for graph in self.graphs if graph.call is not None}

    @property
    def nodes(self) -> Iterator[Node]:
        """All its nodes, those of outer graphs first."""
        return (node for graph in self.graphs for node in graph.nodes)

    @property
    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        return [tensor for graph in self.graphs for tensor in graph.tensors]

    @functools.cached_property
    def held(self) -> list[Held]:
        """Those of its tensors that lie in data files."""
        return held(self)

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        """What it says of itself."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @property
    def folder(self) -> str:
        """The folder it is in, with a slash at its end, empty for the root."""
        return self.name[: self.name.rfind("/") + 1]
