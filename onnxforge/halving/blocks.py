"""What stays float32, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from onnxforge.errors import Refused
from onnxforge.halving.norms import ROOTS, uses_root

if TYPE_CHECKING:
    from onnxforge.halving.parts import Part, Parts
    from onnxforge.halving.targets import Target

__all__ = ["PRODUCTS", "block", "keep_interface", "usual"]

PRODUCTS = frozenset(
    {
        "Attention",
        "Conv",
        "ConvTranspose",
        "DeformConv",
        "Einsum",
        "GRU",
        "Gemm",
        "LSTM",
        "MatMul",
        "RNN",
    }
)
"""Operators with learned weights, which are what half precision is for."""

_USUAL = (
    "CumSum",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "Pow",
    "RMSNormalization",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Reciprocal",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Softmax",
    "Sqrt",
)
# Kernels for CUDA compute these in float32 inside: rounding around them is all there is.
_WIDE_INSIDE = {"LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax"}

_LARGE = 1024  # elements; what reads such a matrix does so in half precision
_ELEMENTWISE = frozenset({"Pow", "Reciprocal", "Sqrt"})
_COMPARE = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
# Operators that make something else of a position if it is rounded.
_PLACED = _COMPARE | {"Ceil", "Cos", "CumSum", "Floor", "Mod", "Range", "Round", "Sin"}

_INTEGER = ("OF267", "an integer is computed from it")
_POSITION = ("OF268", "computes with positions or lengths")


def keep_interface(parts: Parts, keep_io: tuple[str, ...]) -> None:
    """Fix the precision of the inputs and outputs of the model.

    Args:
        parts: The parts.
        keep_io: ``all``, ``none``, or globs on the names of those that stay float32.

    Raises:
        Refused: A glob matches no input and no output.
    """
    graph = parts.model.graph
    names = {value.name or "" for value in (*graph.inputs, *graph.outputs)}
    globs = {"all": ("*",), "none": ()}.get(keep_io[0] if len(keep_io) == 1 else "", keep_io)
    for glob in globs if globs is keep_io else ():
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise Refused(f"keep_io: {glob!r} matches no input and no output")
    for part in (*parts.inputs, *parts.outputs):
        if any(fnmatch.fnmatchcase(part.where, glob) for glob in globs):
            part.keep("OF264", "is kept by keep_io")
        else:
            part.fixed = True
    for part in parts.outputs:  # what is an input and an output has one type
        for made in parts.before(part):
            if made in parts.inputs:
                part.reason, part.fixed = made.reason, made.fixed


def usual(target: Target) -> set[str]:
    """The operators that stay float32 on a target unless a pipeline says otherwise."""
    return set(_USUAL) - (_WIDE_INSIDE if target in ("cuda", "tensorrt") else set())


def block(parts: Parts, op_types: Collection[str], nodes: Collection[str]) -> None:
    """Find what has to stay float32 for its operator or what it is for.

    Args:
        parts: The parts.
        op_types: Operators that stay.
        nodes: Globs on names and paths of nodes that stay.

    Raises:
        Refused: A glob matches no node.
    """
    _by_name(parts, nodes)
    counted = _counted(parts)
    _by_operator(parts, op_types, counted)
    _integers(parts, counted)
    _positions(parts, counted)
    for part in parts:
        is_large = any(parts.matrix(value) >= _LARGE for value in part.reads)
        if part.reason is None and (is_large or part.op_type in PRODUCTS):
            part.fixed = True


def _by_name(parts: Parts, globs: Collection[str]) -> None:
    unmatched = set(globs)
    for part in parts:
        if part.node is None or not globs:
            continue
        names = (part.node.name or part.where, part.where)
        found = {g for g in globs if any(fnmatch.fnmatchcase(name, g) for name in names)}
        unmatched -= found
        if found:
            part.keep("OF264", "is blocked by name")
    if unmatched:
        raise Refused(f"block_nodes: {min(unmatched)!r} matches no node of float32 values")


def _by_operator(parts: Parts, op_types: Collection[str], counted: set[Part]) -> None:
    """Keep operators by name, but roots of lengths, which scale and are no statistics."""
    for part in parts:
        op = part.op_type
        of_length = op in _ELEMENTWISE and (part in counted or not any(parts.before(part)))
        if op in op_types and not of_length:
            part.keep("OF264", f"{op} is blocked")
        if op == "Mul" and "Pow" in op_types and len(set(part.reads)) == 1:
            part.keep("OF264", "a square is blocked, as Pow is")
        if ROOTS.issubset(op_types) and uses_root(part, parts) and part not in counted:
            roots = [p for p in parts.before(part) if p.op_type in ROOTS]
            if not counted.issuperset(roots):
                part.keep("OF264", "the use of a root is blocked, as Sqrt is")


def _counted(parts: Parts) -> set[Part]:
    """Parts that make numbers from integers and constants alone."""
    found: set[Part] = set()
    waiting = [part for part in parts if _starts_count(part, parts)]
    while waiting:
        part = waiting.pop()
        if part in found:
            continue
        found.add(part)
        waiting += [next_ for next_ in parts.after(part) if _is_counted(next_, parts, found)]
    return found


def _starts_count(part: Part, parts: Parts) -> bool:
    if part.node is None or not part.makes:
        return False
    if part.op_type == "Range":
        return True
    if part.op_type != "Cast" or not part.node.inputs or part.node.inputs[0] is None:
        return False
    given = parts.elements.type(part.node.inputs[0])
    return given is not None and given.dtype.is_integer()


def _is_counted(part: Part, parts: Parts, found: set[Part]) -> bool:
    values = [value for value in part.reads if not parts.is_constant(value)]
    return bool(values) and all(parts.makers.get(value) in found for value in values)


def _integers(parts: Parts, counted: set[Part]) -> None:
    """Keep all that an integer or a size is computed from, up to the products before it."""
    for part in list(parts):
        node = part.node
        to_integer = part.op_type == "Cast" and part.reads and _gives_integer(part, parts)
        compared = part.op_type in _COMPARE and any(p in counted for p in parts.before(part))
        if node is not None and (to_integer or compared or part.op_type == "Range"):
            _keep_before([part], parts, _INTEGER)
    _keep_before(parts.before(parts.always), parts, ("OF267", "a size is computed from it"))


def _gives_integer(part: Part, parts: Parts) -> bool:
    assert part.node is not None
    made = parts.elements.type(part.node.outputs[0])
    return made is not None and made.dtype.is_integer()


def _keep_before(start: Iterable[Part], parts: Parts, why: tuple[str, str]) -> None:
    seen: set[Part] = set()
    waiting = list(start)
    while waiting:
        part = waiting.pop()
        if part in seen or part.op_type in PRODUCTS or part in parts.inputs:
            continue
        seen.add(part)
        part.keep(*why)
        waiting += parts.before(part)


def _positions(parts: Parts, counted: set[Part]) -> None:
    """Keep positions and what is made of them, up to where they become waves or bits."""
    waiting = [
        part
        for part in parts
        if part.op_type in _PLACED and any(p in counted for p in parts.before(part))
    ]
    seen: set[Part] = set()
    while waiting:
        part = waiting.pop()
        if part in seen:
            continue
        seen.add(part)
        part.keep(*_POSITION)
        waiting += [before for before in parts.before(part) if before in counted]
