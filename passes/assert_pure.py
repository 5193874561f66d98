"""Refuse models that need more than the standard ONNX operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxforge.core import Effect, Finding, Pass, Result
from onnxforge.errors import CheckFailed
from onnxforge.runtime.ceilings import ceiling
from onnxforge.runtime.support import supported
from onnxforge.walk import Scope, label, scopes

__all__ = ["AssertPureAiOnnx"]


@dataclass(frozen=True)
class AssertPureAiOnnx(Pass):
    """Fail unless every operator is a standard one of ai.onnx.

    Every node is looked at, in the graph, in bodies of If, Loop and Scan, and in functions,
    and all offending ones are listed. A call of a function that the model defines is as pure
    as its body. ``ai.onnx.ml`` and ``ai.onnx.preview.training`` are domains of their own, so
    allow them by name. Operators used without an import of ai.onnx are an offence: every
    runtime would take another version of them. Training graphs are not looked at.

    Attributes:
        opset: Version of ai.onnx that the model and its functions have to import.
        max_opset: Newest version of ai.onnx that they may import.
        max_ir: Newest IR version that the model may have.
        min_ort: Oldest onnxruntime that has to load the model, such as 1.17, on the
            processor: it limits IR and opset, and operators of ai.onnx need a kernel there.
        allow: Domains that are fine too.
        forbid: Operators that are not fine, as ``Op`` in any domain or as ``domain::Op``.
        imports: ``used`` warns of imports of other domains that no node uses, ``all`` takes
            every import of another domain for an offence.
        functions: ``warn`` reports functions of the model, ``forbid`` takes them for
            offences.

    Example:
        onnxforge run --passes 'fp16w,assert-pure{opset=20 min_ort=1.17}' in.onnx out.onnx
    """

    name: ClassVar[str] = "assert-pure"
    effect: ClassVar[Effect] = Effect.CHECK
    codes: ClassVar[Mapping[str, str]] = {
        "OF101": "The operator is neither of ai.onnx, nor of an allowed domain, nor a function"
        " of the model. Only runtimes that know its domain run it.",
        "OF102": "An operator set is imported that is neither ai.onnx nor allowed. Where no"
        " node uses it that is a warning, unless imports=all.",
        "OF103": "The version of ai.onnx is not the wanted one, is newer than the limit, or is"
        " missing although its operators are used.",
        "OF104": "The IR version is newer than the limit. The pass set-ir lowers it where the"
        " model uses nothing newer.",
        "OF105": "The operator is forbidden by the option `forbid`.",
        "OF106": "The model defines a function. Runtimes inline it, but other tools may not"
        " read it; functions=forbid makes it an offence.",
        "OF107": "The onnxruntime asked for is newer than the table of what each can load; the"
        " limits of the newest known one were used.",
        "OF108": "The onnxruntime asked for does not load or run the node: it has no kernel"
        " for these types, or the form is known to fail. `onnxforge support` tells of other"
        " releases.",
    }

    opset: int | None = None
    max_opset: int | None = None
    max_ir: int | None = None
    min_ort: str | None = None
    allow: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    imports: Literal["used", "all"] = "used"
    functions: Literal["warn", "forbid"] = "warn"

    def __post_init__(self) -> None:
        """Refuse options that can never hold.

        Raises:
            ValueError: A version is not positive, onnxruntime's is none or too old, or what
                is forbidden is no operator.
        """
        super().__post_init__()
        for option in ("opset", "max_opset", "max_ir"):
            version = getattr(self, option)
            if version is not None and version < 1:
                raise ValueError(f"{option} must be at least 1, not {version}")
        if self.min_ort is not None:
            ceiling(self.min_ort)
        for operator in self.forbid:
            if not operator.rpartition("::")[2]:
                raise ValueError(f"{operator!r} in forbid is no operator")

    def call(self, model: ir.Model) -> Result:
        """Look at every node and every import."""
        owners = list(_owners(model))
        rules = _Rules(self, model)
        findings = [
            *rules.of_model(),
            *rules.of_runtime(),
            *(finding for owner in owners for finding in rules.of_owner(owner)),
        ]
        offences = [finding for finding in findings if finding.level == "error"]
        if offences:
            count = f"{len(offences)} offence{'s' if len(offences) > 1 else ''}"
            raise CheckFailed(f"the model is not pure ai.onnx: {count}", offences)
        stats = {
            "nodes": sum(len(owner.nodes) for owner in owners),
            "functions": len(model.functions),
        }
        return Result(model, False, stats, tuple(findings))


@dataclass
class _Owner:
    """The main graph or a function: what has imports, and all nodes that they hold for."""

    where: str
    function: ir.Function | None
    imports: Mapping[str, int]
    nodes: list[tuple[str, ir.Node]] = field(default_factory=list)


def _owners(model: ir.Model) -> Iterator[_Owner]:
    owner = None
    for scope in scopes(model):
        if scope.parent is None:
            if owner is not None:
                yield owner
            owner = _owner(scope)
        assert owner is not None, "the first scope is the main graph"
        nodes = enumerate(scope.graph)
        owner.nodes += [(scope.path + label(node, index), node) for index, node in nodes]
    if owner is not None:
        yield owner


def _owner(scope: Scope) -> _Owner:
    imports: dict[str, int] = {}
    for domain, version in scope.opset_imports.items():
        # Of two versions of one set the higher one holds.
        key = _standard(domain)
        imports[key] = max(version, imports.get(key, 0))
    return _Owner(scope.path.removesuffix("/") or "model", scope.function, imports)


def _standard(domain: str) -> str:
    """The domain, "" for ai.onnx however it is written."""
    return "" if domain == "ai.onnx" else domain


class _Rules:
    """The options, made ready for one model."""

    def __init__(self, options: AssertPureAiOnnx, model: ir.Model) -> None:
        self._options = options
        self._model = model
        self._ort = ceiling(options.min_ort) if options.min_ort else None
        self._pure = {"", *map(_standard, options.allow)}
        self._local = {domain for domain, _, _ in model.functions}
        self._forbidden = {_operator(entry) for entry in options.forbid}

    def of_model(self) -> Iterator[Finding]:
        if self._ort is not None and not self._ort.is_known:
            message = (
                f"onnxruntime {self._options.min_ort} is not known yet, the limits are those"
                f" of {self._ort.release}"
            )
            yield Finding("OF107", "model", message, level="warning")
        version = self._model.ir_version
        if reason := self._over(version, "max_ir"):
            yield Finding(
                "OF104", "model", f"has IR version {version}, {reason}", level="error"
            )

    def of_runtime(self) -> Iterator[Finding]:
        """What the tables say of operators, once the versions are fine."""
        if self._ort is None:
            return
        (answer,) = supported(self._model, [self._ort.release])
        if any(reason.kind in ("ir", "opset") for reason in answer.reasons):
            return
        for reason in answer.reasons:
            if reason.kind != "unknown" and not reason.domain:
                message = f"{reason.text} (onnxruntime {self._ort.release})"
                yield Finding("OF108", reason.node, message, level="error")

    def of_owner(self, owner: _Owner) -> Iterator[Finding]:
        if owner.function is not None:
            level = "error" if self._options.functions == "forbid" else "warning"
            yield Finding("OF106", owner.where, "is a function of the model", level=level)
        yield from self._opset(owner)
        yield from self._imports(owner)
        for where, node in owner.nodes:
            yield from self._node(where, node)

    def _opset(self, owner: _Owner) -> Iterator[Finding]:
        version, wanted = owner.imports.get(""), self._options.opset
        if version is None:
            if any(self._is_standard(node) for _, node in owner.nodes):
                message = "uses operators of ai.onnx and does not import it"
                yield Finding("OF103", owner.where, message, level="error")
            return
        reason = self._over(version, "max_opset")
        if wanted is not None and version != wanted:
            reason = f"wanted is {wanted}"
        if reason:
            message = f"imports ai.onnx {version}, {reason}"
            yield Finding("OF103", owner.where, message, level="error")

    def _imports(self, owner: _Owner) -> Iterator[Finding]:
        used = {node.domain for _, node in owner.nodes}
        for domain, version in owner.imports.items():
            if domain in self._pure or domain in self._local:
                continue
            message = f"imports {domain} {version}"
            if self._options.imports == "all":
                yield Finding("OF102", owner.where, message, level="error")
            elif domain not in used:
                message += ", which no node uses"
                yield Finding("OF102", owner.where, message, level="warning")

    def _node(self, where: str, node: ir.Node) -> Iterator[Finding]:
        operator = f"{_standard(node.domain) or 'ai.onnx'}::{node.op_type}"
        is_local = node.op_identifier() in self._model.functions
        if _standard(node.domain) not in self._pure and not is_local:
            yield Finding("OF101", where, f"is {operator}", level="error")
        if self._forbidden & {(None, node.op_type), (_standard(node.domain), node.op_type)}:
            yield Finding("OF105", where, f"is {operator}, which is forbidden", level="error")

    def _over(self, version: int, option: Literal["max_ir", "max_opset"]) -> str | None:
        """Why a version is too new, by the tighter of the two limits, or None."""
        limits: list[tuple[int, str]] = []
        if (own := getattr(self._options, option)) is not None:
            limits.append((own, option))
        if self._ort is not None:
            limits.append((getattr(self._ort, option), f"onnxruntime {self._ort.release}"))
        limit, source = min(limits, default=(version, ""))
        return f"at most {limit} ({source})" if version > limit else None

    def _is_standard(self, node: ir.Node) -> bool:
        return not _standard(node.domain) and node.op_identifier() not in self._model.functions


def _operator(entry: str) -> tuple[str | None, str]:
    domain, separator, op_type = entry.rpartition("::")
    return (_standard(domain) if separator else None), op_type
