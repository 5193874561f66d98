"""Ranges of files that tensors share."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from onnxforge.lazy import FileTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import onnx_ir as ir

__all__ = ["overlapping"]


def overlapping(tensors: Iterable[ir.TensorProtocol]) -> Iterator[list[FileTensor]]:
    """Groups of tensors that share bytes of a file, but not all of them.

    Tensors with the very same range are no group by themselves: they are one tensor with many
    names. Each group is sorted by offset and hangs together without a hole.
    """
    by_file: dict[Path, list[FileTensor]] = defaultdict(list)
    for tensor in tensors:
        if isinstance(tensor, FileTensor) and tensor.nbytes:
            by_file[tensor.file.path].append(tensor)
    for found in by_file.values():
        found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        group: list[FileTensor] = []
        end = 0
        for tensor in found:
            if tensor.offset >= end:
                yield from _torn(group)
                group = []
            group.append(tensor)
            end = max(end, tensor.offset + tensor.nbytes)
        yield from _torn(group)


def _torn(group: list[FileTensor]) -> Iterator[list[FileTensor]]:
    if len({(tensor.offset, tensor.nbytes) for tensor in group}) > 1:
        yield group
