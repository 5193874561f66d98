"""Protobuf wire format, as far as it takes to keep weight payloads out of memory.

A model file is walked without parsing it: `excise` copies everything but the large tensor
payloads into a small skeleton, in which every tensor that lost its payload says where the
payload lies. `splice` is the way back: it turns a serialized skeleton into pieces, literal
bytes and payloads by number, that make up the file.

Field numbers are those of onnx.proto; the encoding is described in the protocol buffers
documentation, "Encoding".
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from onnxforge.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["PAYLOAD_BYTES", "FileSlices", "Payload", "Slices", "excise", "splice"]

PAYLOAD_BYTES = 1024
"""Payloads of at least this many bytes stay on disk."""

_TENSOR = "tensor"
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: _TENSOR},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph"},
    "function": {7: "node", 11: "attribute"},
}
_FLOAT_DATA, _RAW_DATA, _DOUBLE_DATA = 4, 9, 10
_PAYLOADS = (_FLOAT_DATA, _RAW_DATA, _DOUBLE_DATA)  # their bytes are little-endian values
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 100  # protobuf's own parsers stop there


class _Malformed(Exception):
    """The bytes are no protobuf message; the caller knows the file."""


class Slices(Protocol):
    """Bytes that are read where they are asked for."""

    def __getitem__(self, index: slice) -> bytes:
        """The bytes from ``index.start`` to ``index.stop``, fewer at the end."""


@dataclass(frozen=True)
class Payload:
    """Where the values of a tensor lie.

    Attributes:
        offset: First byte in the model file.
        length: Number of bytes.
        field: The TensorProto field they came from (raw_data, float_data or double_data).
    """

    offset: int
    length: int
    field: int = _RAW_DATA


class FileSlices:
    """Slices of a file through a small window, so that skipping a payload reads nothing."""

    _WINDOW = 1 << 16

    def __init__(self, fd: int) -> None:
        """Take an open descriptor."""
        self._fd = fd
        self._start = 0
        self._window = b""

    def __getitem__(self, index: slice) -> bytes:
        """The bytes from ``index.start`` to ``index.stop``, fewer at the end."""
        start, stop = index.start - self._start, index.stop - self._start
        if start < 0 or stop > len(self._window):
            os.lseek(self._fd, index.start, os.SEEK_SET)
            chunks = []
            missing = max(self._WINDOW, index.stop - index.start)
            while missing > 0 and (chunk := os.read(self._fd, missing)):
                chunks.append(chunk)
                missing -= len(chunk)
            self._start, self._window = index.start, b"".join(chunks)
            start, stop = 0, index.stop - index.start
        return self._window[start:stop]


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    tag: int  # where the field starts
    start: int  # where its content starts
    end: int


def _varint(data: Slices, at: int) -> tuple[int, int]:
    chunk = data[at : at + 10]
    value = 0
    for i, byte in enumerate(chunk):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise _Malformed


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(number: int, wire: int) -> bytes:
    return _encoded(number << 3 | wire)


def _fields(data: Slices, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        key, start = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            _, stop = _varint(data, start)
        elif wire == _BYTES:
            size, start = _varint(data, start)
            stop = start + size
        elif wire in (_FIXED64, _FIXED32):
            stop = start + (8 if wire == _FIXED64 else 4)
        else:
            raise _Malformed
        if stop > end or key >> 3 == 0:
            raise _Malformed
        yield _Field(key >> 3, wire, at, start, stop)
        at = stop


class _Rewriter:
    """Copies a message and lets a subclass replace tensors inside; lengths follow.

    Content is collected as spans of the source and literal bytes; only messages that hold
    something to replace are opened.
    """

    def __init__(self, data: Slices) -> None:
        self.data = data

    def interesting(self, field: _Field) -> bool:
        raise NotImplementedError

    def tensor(self, start: int, end: int) -> list[_Piece] | None:
        raise NotImplementedError

    def message(self, kind: str, start: int, end: int, depth: int = 0) -> list[_Piece] | None:
        """The pieces of a rewritten message, or None when it stays as it is."""
        if depth > _MAX_DEPTH:
            raise _Malformed
        if kind == _TENSOR:
            return self.tensor(start, end)
        pieces: list[_Piece] = []
        copied = start
        children = _CHILDREN[kind]
        for field in _fields(self.data, start, end):
            child = children.get(field.number)
            if child is None or field.wire != _BYTES or not self.interesting(field):
                continue
            inner = self.message(child, field.start, field.end, depth + 1)
            if inner is None:
                continue
            pieces.append(_Span(copied, field.tag))
            header = _tag(field.number, _BYTES) + _encoded(sum(p.size for p in inner))
            pieces += [_Literal(header), *inner]
            copied = field.end
        if not pieces:
            return None
        return [*pieces, _Span(copied, end)]


@dataclass(frozen=True)
class _Span:
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class _Literal:
    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)


@dataclass(frozen=True)
class _Hole:
    index: int
    size: int


_Piece = _Span | _Literal | _Hole


class _Excise(_Rewriter):
    def __init__(self, data: Slices, location: str) -> None:
        super().__init__(data)
        self.location = location
        self.payloads: list[Payload] = []

    def interesting(self, field: _Field) -> bool:
        return field.end - field.start >= PAYLOAD_BYTES

    def tensor(self, start: int, end: int) -> list[_Piece] | None:
        value: _Field | None = None
        for field in _fields(self.data, start, end):
            if field.number in (_EXTERNAL_DATA, _DATA_LOCATION):
                return None
            if field.number in _PAYLOADS:
                # A packed field may come in several parts; protobuf joins those.
                if value is not None or field.wire != _BYTES:
                    return None
                value = field
        if value is None or value.end - value.start < PAYLOAD_BYTES:
            return None
        stub = _mark(self.location, len(self.payloads))
        self.payloads.append(Payload(value.start, value.end - value.start, value.number))
        return [_Span(start, value.tag), _Span(value.end, end), _Literal(stub)]


def _mark(location: str, index: int) -> bytes:
    """Encoded TensorProto fields that send the reader of a tensor to payload ``index``."""
    entries = b""
    for key, value in (("location", location), ("offset", str(index))):
        pair = b"".join(
            _tag(number, _BYTES) + _encoded(len(word)) + word
            for number, word in ((1, key.encode()), (2, value.encode()))
        )
        entries += _tag(_EXTERNAL_DATA, _BYTES) + _encoded(len(pair)) + pair
    return entries + _tag(_DATA_LOCATION, _VARINT) + b"\x01"


def excise(
    path: str, source: int | Slices, size: int, location: str
) -> tuple[bytes, list[Payload]]:
    """Read a model file without its large tensor payloads.

    Args:
        path: Name of the file, for messages.
        source: Open descriptor of the file, or what reads it.
        size: Size of the file in bytes.
        location: The external data location under which payloads are named; must not be
            guessable, as a file could otherwise name payloads itself.

    Returns:
        The serialized skeleton, and the payloads: a tensor whose location is ``location``
        has the payload whose index is its offset.

    Raises:
        ModelError: The file is no protobuf message.
    """
    walk = _Excise(FileSlices(source) if isinstance(source, int) else source, location)
    try:
        pieces = walk.message("model", 0, size) or [_Span(0, size)]
    except _Malformed:
        raise ModelError(f"{path}: not an ONNX model (damaged or cut protobuf)") from None
    except RecursionError:
        raise ModelError(f"{path}: graphs are nested too deep") from None
    parts = [_content(piece, walk.data) for piece in pieces if not isinstance(piece, _Hole)]
    return b"".join(parts), walk.payloads


def _content(piece: _Span | _Literal, source: Slices) -> bytes:
    return piece.content if isinstance(piece, _Literal) else source[piece.start : piece.end]


class _Splice(_Rewriter):
    def __init__(self, data: bytes, location: str, payloads: Mapping[int, Payload]) -> None:
        super().__init__(data)
        self.payloads = payloads
        self.marks = [m.start() for m in re.finditer(re.escape(location.encode()), data)]

    def interesting(self, field: _Field) -> bool:
        i = bisect.bisect_left(self.marks, field.start)
        return i < len(self.marks) and self.marks[i] < field.end

    def tensor(self, start: int, end: int) -> list[_Piece] | None:
        fields = list(_fields(self.data, start, end))
        entries = [f for f in fields if f.number == _EXTERNAL_DATA]
        if not entries:
            return None
        index = self._index(entries)
        payload = self.payloads.get(index)
        if payload is None:
            return None
        hole: list[_Piece] = [
            _Literal(_tag(payload.field, _BYTES) + _encoded(payload.length)),
            _Hole(index, payload.length),
        ]
        kept = [f for f in fields if f.number not in (_EXTERNAL_DATA, _DATA_LOCATION)]
        before = itertools.takewhile(lambda f: f.number < payload.field, kept)
        spans: list[_Piece] = [_Span(f.tag, f.end) for f in kept]
        cut = len(list(before))
        return [*spans[:cut], *hole, *spans[cut:]]

    def _index(self, entries: Sequence[_Field]) -> int:
        for entry in entries:
            words = [
                self.data[f.start : f.end] for f in _fields(self.data, entry.start, entry.end)
            ]
            if words[0] == b"offset":
                return int(words[1])
        raise AssertionError("a marked tensor has an offset")


def splice(
    skeleton: bytes, location: str, payloads: Mapping[int, Payload]
) -> list[bytes | int]:
    """Cut a serialized skeleton where payloads belong.

    Args:
        skeleton: A serialized ModelProto whose marked tensors have the location ``location``.
        location: See ``excise``.
        payloads: Size and field of each payload to put inside; tensors with another index
            stay as they are.

    Returns:
        The file in order: literal bytes, and for each payload its index.
    """
    walk = _Splice(skeleton, location, payloads)
    pieces = walk.message("model", 0, len(skeleton)) or [_Span(0, len(skeleton))]
    file: list[bytes | int] = []
    literal: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, _Hole):
            file += [b"".join(literal), piece.index]
            literal.clear()
        else:
            literal.append(_content(piece, skeleton))
    return [*file, b"".join(literal)]
