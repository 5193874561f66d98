"""Raising the operator set of a model whose own knows no half type."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import onnx_ir as ir

from onnxforge.errors import OnnxforgeError, Refused
from onnxforge.walk import Scope

__all__ = ["raise_opset"]


def raise_opset(model: ir.Model, version: int) -> bool:
    """Raise ai.onnx to a version if it is lower, with the converter of onnxscript.

    Functions are inlined by that.

    Args:
        model: The model, changed in place.
        version: The version.

    Returns:
        Whether it was raised.

    Raises:
        OnnxforgeError: onnxscript is missing.
        Refused: The converter cannot do it.
    """
    before = Scope(model.graph, "").opset_imports.get("", version)
    if before >= version:
        return False
    try:
        from onnxscript.version_converter import convert_version
    except ImportError:
        raise OnnxforgeError("onnxscript is missing: pip install onnxscript") from None
    ends = [(value.name, value.type, value.shape) for value in _ends(model)]
    with _quiet("onnxscript"):
        convert_version(model, version, fallback=True)
    after = Scope(model.graph, "").opset_imports.get("", 0)
    same = [value.name for value in _ends(model)] == [name for name, *_ in ends]
    if after != version or not same:
        raise Refused(f"raise_opset={version}: opset {before} cannot be raised to it")
    # The converter writes what it infers where the model said less, or nothing.
    for value, (_, type_, shape) in zip(_ends(model), ends, strict=True):
        value.type, value.shape = type_, shape
    return True


def _ends(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.outputs]


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from warning of what is checked behind it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
