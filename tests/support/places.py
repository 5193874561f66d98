"""Where the tensors of a model lie outside of it, by onnx and plain reads only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto


class Place(NamedTuple):
    """Bytes of a data file."""

    location: str
    offset: int
    length: int


def places(path: Path) -> dict[str, Place]:
    """Return what lies outside of a model; a name that stands twice is numbered."""
    found: dict[str, Place] = {}
    for name, tensor in tensors(onnx.load(path, load_external_data=False)):
        if tensor.data_location == TensorProto.EXTERNAL:
            assert not tensor.raw_data
            assert [entry.key for entry in tensor.external_data] == [
                "location",
                "offset",
                "length",
            ]
            location, offset, length = (entry.value for entry in tensor.external_data)
            again = sum(key.partition(" #")[0] == name for key in found)
            key = f"{name} #{again + 1}" if again else name
            found[key] = Place(location, int(offset), int(length))
    return found


def tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield all tensors, those in attributes by the first output of the node."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[NodeProto]) -> Iterator[tuple[str, TensorProto]]:
    for node in nodes:
        for attribute in node.attribute:
            for tensor in [*([attribute.t] if attribute.HasField("t") else [])]:
                yield node.output[0], tensor
            for tensor in attribute.tensors:
                yield node.output[0], tensor
            for graph in [
                *([attribute.g] if attribute.HasField("g") else []),
                *attribute.graphs,
            ]:
                yield from _in_graph(graph)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_tidy(
    *models: Path, align: int, max_bytes: int | None = None, overlaps: bool = False
) -> dict[str, int]:
    """Fail unless the data files that models read are packed as they should be.

    Ranges stand apart from each other on aligned offsets; between them are zeros, no more
    than it takes to align; the last one ends with the file, which is not too large.

    Args:
        models: The models, in one folder.
        align: What offsets are multiples of.
        max_bytes: Most bytes of a file.
        overlaps: Allow ranges that begin inside of others.

    Returns:
        The sizes of the files.
    """
    ranges: Mapping[str, set[tuple[int, int]]] = defaultdict(set)
    for model in models:
        for place in places(model).values():
            ranges[place.location].add((place.offset, place.offset + place.length))
    sizes = {}
    for location, found in ranges.items():
        content = (models[0].parent / location).read_bytes()
        end = 0
        for start, stop in sorted(found):
            assert start < stop
            if start < end and overlaps:
                end = max(end, stop)
                continue
            assert start >= end, f"{location}: {start} lies inside of what ends at {end}"
            assert start % align == 0
            assert start - end < align
            assert not any(content[end:start])
            end = stop
        assert len(content) == end
        assert max_bytes is None or end <= max_bytes
        sizes[location] = end
    return sizes
