"""Which releases of onnxruntime load a model, predicted from tables, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxforge.errors import SpecError
from onnxforge.runtime.ceilings import ceiling
from onnxforge.runtime.expansion import has_builder
from onnxforge.runtime.forms import faults
from onnxforge.runtime.kernels import (
    Provider,
    has_kernel,
    limit,
    releases,
    signature,
    type_known,
    version_in,
)
from onnxforge.runtime.types import element
from onnxforge.runtime.uses import Use, uses
from onnxforge.walk import scopes

__all__ = ["Question", "Reason", "Support", "node_reason", "supported", "versions"]

Kind = Literal["ir", "opset", "kernel", "type", "form", "unknown"]
Verdict = Literal["loads", "does not load", "does not run", "unknown"]


@dataclass(frozen=True)
class Reason:
    """Why a release does not load or run a model.

    Attributes:
        kind: ``ir``, ``opset``, ``type`` (of elements), ``kernel``, ``form`` (one known to
            fail) or ``unknown`` (the tables do not tell).
        node: Path of the node, empty where it is about the whole model.
        text: The reason, in one line.
        at_run: Whether the model loads and then fails.
        domain: Domain of the node's operator, "" for ai.onnx or where it is about no node.
    """

    kind: Kind
    node: str
    text: str
    at_run: bool = False
    domain: str = ""


@dataclass(frozen=True)
class Support:
    """What a release makes of a model.

    Attributes:
        version: The release, such as ``1.17``.
        provider: Where it runs.
        reasons: Why it does not load or run, those of one kind and text once.
        documented: Whether the answer rests on documents alone, not on a release that ran.
    """

    version: str
    provider: Provider
    reasons: tuple[Reason, ...]
    documented: bool = False

    @property
    def verdict(self) -> Verdict:
        """The answer in words; ``unknown`` only where nothing is known to fail."""
        known = [reason for reason in self.reasons if reason.kind != "unknown"]
        if any(not reason.at_run for reason in known):
            return "does not load"
        if known:
            return "does not run"
        return "unknown" if self.reasons else "loads"

    @property
    def loads(self) -> bool:
        """Whether it is known to load, and no form in it is known to fail when it runs."""
        return self.verdict == "loads"


def supported(
    model: ir.Model, asked: Sequence[str] | None = None, provider: Provider = "cpu"
) -> list[Support]:
    """What each release makes of a model; nothing is run.

    Args:
        model: The model, the same afterwards; no weight is read.
        asked: Releases, as ``versions`` gives them; None for all that are in the tables.
        provider: Where it should run.
    """
    question = Question(model)
    return [question.answer(release, provider) for release in (asked or releases())]


def versions(text: str) -> tuple[str, ...]:
    """The releases that a text names: ``1.17``, ``1.17,1.20``, ``1.17..1.22`` or ``1.17..``.

    Raises:
        SpecError: A release is not in the tables.
    """
    found: list[str] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        known = releases()
        start = _position(first) if first or not dots else 0
        end = _position(last) if last else (len(known) - 1 if dots else start)
        if end < start:
            raise SpecError(f"{part.strip()}: the first release is newer than the last")
        found += [release for release in known[start : end + 1] if release not in found]
    return tuple(found)


def _position(text: str) -> int:
    found = ceiling(text)
    if not found.is_known:
        raise SpecError(
            f"onnxruntime {text} is not known; the newest known is {found.release}"
        )
    return releases().index(found.release)


class Question:
    """A model, made ready to be asked about."""

    def __init__(self, model: ir.Model) -> None:
        """Find all that is asked about in a model; no weight is read."""
        self._model = model
        first: dict[tuple[object, ...], Use] = {}
        for use in (found := list(uses(model))):
            first.setdefault(_key(use), use)
        self._faults = tuple(faults(model, found))
        self._uses = tuple(first.values())
        self._types = _element_types(model)
        self._imports: dict[tuple[str, int], str] = {}
        for scope in scopes(model):
            for item in scope.opset_imports.items():
                self._imports.setdefault(item, scope.path.removesuffix("/"))

    def answer(self, release: str, provider: Provider) -> Support:
        """What a release makes of the model where it should run; see `supported`."""
        reasons = list(self._of_model(release))
        seen: set[tuple[str, str]] = set()
        for use in self._uses:
            reason = node_reason(use, release, provider)
            if reason is not None and (reason.kind, reason.text) not in seen:
                seen.add((reason.kind, reason.text))
                reasons.append(reason)
        for fault in self._faults:
            if fault.holds(release, provider) and ("form", fault.text) not in seen:
                seen.add(("form", fault.text))
                reasons.append(Reason("form", fault.where, fault.text, fault.at_run))
        return Support(release, provider, tuple(reasons), provider != "cpu")

    def _of_model(self, release: str) -> Iterator[Reason]:
        newest = limit(release)
        if newest is not None and self._model.ir_version > newest:
            text = f"IR version {self._model.ir_version}, at most {newest}"
            yield Reason("ir", "", text)
        for (domain, version), where in self._imports.items():
            most = limit(release, domain)
            if most is not None and version > most:
                text = f"{domain or 'ai.onnx'} {version}, at most {most}"
                yield Reason("opset", where, text)
        for name, where in self._types.items():
            if not type_known(release, name):
                yield Reason("type", where, f"element type {name} is not known")


def _key(use: Use) -> tuple[object, ...]:
    node = use.node
    attributes = tuple(sorted(name for name in use.attributes))
    return (use.domain, node.op_type, use.version, use.inputs, use.outputs, attributes)


def _element_types(model: ir.Model) -> dict[str, str]:
    """Every element type that a value or a weight has, and one place of each."""
    found: dict[str, str] = {}
    for scope in scopes(model):
        values = [*scope.graph.inputs, *scope.graph.initializers.values()]
        for node in scope.graph:
            values += node.outputs
        for value in values:
            dtype = value.const_value.dtype if value.const_value else value.dtype
            if dtype is not None and dtype != ir.DataType.UNDEFINED:
                found.setdefault(element(dtype), f"{scope.path}{value.name}")
    return found


def node_reason(use: Use, release: str, provider: Provider = "cpu") -> Reason | None:
    """Why a release cannot place a node, None where it can.

    A node is placed where a kernel takes it as it is; else, if onnx makes the operator of
    others, where those are placed; else, on the processor, with casts from float16 to float.
    """
    name = f"{use.domain}::{use.node.op_type}" if use.domain else use.node.op_type
    version = _version(use, release)
    known = None if version is None else signature(use.domain, use.node.op_type, version)
    if version is None or known is None:
        asked = "" if use.version is None else f" {use.version}"
        return Reason(
            "kernel", use.where, f"{name}{asked}: no such operator", domain=use.domain
        )
    for attribute in use.attributes:
        if version != use.version and attribute not in known.attributes:
            return Reason(
                "kernel",
                use.where,
                f"{name} {version}: no attribute {attribute}",
                domain=use.domain,
            )
    answer = known.admits(use.inputs, use.outputs) and _placed(use, release, provider)
    if answer is True:
        return None
    types = ", ".join(kind or "?" for kind in use.inputs if kind != "")
    text = f"{name} {version} of {types or 'nothing'}"
    if answer is None:
        return Reason(
            "unknown", use.where, f"{text}: the tables do not tell", domain=use.domain
        )
    return Reason("kernel", use.where, f"{text}: no kernel", domain=use.domain)


def _placed(use: Use, release: str, provider: Provider) -> bool | None:
    version = _version(use, release)
    if version is None:
        return False
    operator = (use.domain, use.node.op_type, version)
    answers = []
    for place in dict.fromkeys((provider, "cpu")):
        answers.append(has_kernel(release, place, operator, use.inputs, use.outputs))
        if answers[-1]:
            return True
    if use.parts:
        parts = {_placed(part, release, provider) for part in use.parts}
        return False if False in parts else None if None in parts else True
    if has_builder(operator):  # of what depends on shapes that nobody knows
        answers.append(None)
    if _needs_casts(use):
        as_float = [_widened(types) for types in (use.inputs, use.outputs)]
        answers.append(has_kernel(release, "cpu", operator, *as_float))
    return True if True in answers else None if None in answers else False


def _version(use: Use, release: str) -> int | None:
    """The version a release takes; without an import that is the newest that it has."""
    asked = (limit(release, use.domain) or 1) if use.version is None else use.version
    return version_in(release, (use.domain, use.node.op_type, asked))


def _needs_casts(use: Use) -> bool:
    has_body = any(a.type == ir.AttributeType.GRAPH for a in use.attributes.values())
    return "float16" in use.inputs and not has_body


def _widened(types: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple("float" if kind == "float16" else kind for kind in types)
