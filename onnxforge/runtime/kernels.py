"""Which kernels each release of onnxruntime has, by operator, version and element types.

The table is `kernels.json`, written by ``make kernels``: processor kernels as the releases
themselves tell them, CUDA and WebGPU as the documents of a release tell them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "PROVIDERS",
    "Provider",
    "Signature",
    "documented",
    "has_kernel",
    "kernels_of",
    "limit",
    "number",
    "releases",
    "signature",
    "type_known",
    "version_in",
    "within",
]

Provider = Literal["cpu", "cuda", "web", "webgpu"]
"""Where kernels run; ``web`` is onnxruntime-web, whose processor kernels are those of cpu."""

PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda", "web", "webgpu")

_KERNELS_OF: Mapping[str, Provider] = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",  # which takes what it does not
    "JsExecutionProvider": "webgpu",
    "WebGpuExecutionProvider": "webgpu",
}

_FILE = Path(__file__).with_name("kernels.json")
_ROW = re.compile(r"(\d+)(\+|-(\d+))(?: ([\d.]*\.\.[\d.]*))?((?: \w+=\S+)*)")


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads(_FILE.read_text(encoding="utf-8")))


@functools.cache
def releases() -> tuple[str, ...]:
    """The releases that are in the table, the oldest first."""
    return tuple(_table()["releases"])


@functools.cache
def documented() -> tuple[str, ...]:
    """The releases whose CUDA and WebGPU kernels are in the table."""
    return tuple(_table()["documented"])


def number(release: str) -> tuple[int, int]:
    """A release as numbers that can be compared."""
    major, minor = release.split(".")
    return int(major), int(minor)


def kernels_of(provider: str) -> Provider:
    """Whose kernels run what a provider of onnxruntime is given, by its name there.

    A processor takes what other providers leave; what those have is not in the table.
    """
    return _KERNELS_OF.get(provider, "cpu")


def limit(release: str, domain: str | None = None) -> int | None:
    """The newest version of a domain that a release loads, or of IR; None without a limit.

    Args:
        release: One of ``releases``.
        domain: Domain of an operator set, "" for ai.onnx; None asks for the IR version.
    """
    table = _table()
    steps: Mapping[str, int] = (
        table["ir"] if domain is None else table["opsets"].get(domain, {})
    )
    reached = [step for step in steps if number(step) <= number(release)]
    return steps[reached[-1]] if reached else None


def type_known(release: str, name: str) -> bool:
    """Whether a release knows an element type at all."""
    since: str | None = _table()["types"].get(name)
    return since is not None and number(since) <= number(release)


@dataclass(frozen=True)
class Port:
    """An input or output of an operator.

    Attributes:
        name: Its name.
        type: Its type, or the variable that stands for it.
        many: Whether it stands for any number of values; it is the last one then.
    """

    name: str
    type: str
    many: bool = False


@dataclass(frozen=True)
class Signature:
    """What goes into an operator and what comes out.

    Attributes:
        since: The version of the operator set that brought this form of it.
        inputs: What goes in.
        outputs: What comes out.
        choices: Types that a variable can stand for, where onnx tells.
        attributes: Names of its attributes, where onnx tells.
    """

    since: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    choices: Mapping[str, Sequence[str]]
    attributes: frozenset[str] = frozenset()

    def bound(
        self, inputs: Sequence[str | None], outputs: Sequence[str | None]
    ) -> dict[str, set[str | None]]:
        """The types that stand for each variable, and for each port by its name.

        Args:
            inputs: Types of the inputs; "" for one left out, None for one unknown.
            outputs: Types of the outputs.
        """
        found: dict[str, set[str | None]] = {}
        for ports, types in ((self.inputs, inputs), (self.outputs, outputs)):
            for i, kind in enumerate(types):
                if kind == "" or not ports:
                    continue
                if i >= len(ports) and not ports[-1].many:
                    continue
                port = ports[min(i, len(ports) - 1)]
                found.setdefault(port.type, set()).add(kind)
                found.setdefault(port.name, set()).add(kind)
        return found

    def admits(self, inputs: Sequence[str | None], outputs: Sequence[str | None]) -> bool:
        """Whether the operator may have such types, as far as they are known."""
        mixed = {port.type for port in (*self.inputs, *self.outputs) if port.many}
        for name, kinds in self.bound(inputs, outputs).items():
            known = kinds - {None}
            if name in self.choices and not known <= set(self.choices[name]):
                return False
            if name in self.choices and len(known) > 1 and name not in mixed:
                return False
        return True


@functools.cache
def signature(domain: str, op_type: str, version: int) -> Signature | None:
    """The signature of an operator at a version of its set, None where nobody knows it."""
    import onnx

    held: list[str] | None = _table()["signatures"].get(domain, {}).get(op_type)
    if held is not None:
        inputs, outputs = (tuple(map(_port, text.split())) for text in held)
        return Signature(1, inputs, outputs, {})
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    many = onnx.defs.OpSchema.FormalParameterOption.Variadic
    inputs, outputs = (
        tuple(Port(p.name, _plain(p.type_str), p.option == many) for p in ports)
        for ports in (schema.inputs, schema.outputs)
    )
    choices: dict[str, tuple[str, ...]]
    choices = {port.type: (port.type,) for port in (*inputs, *outputs)}  # those that are fixed
    choices |= {
        constraint.type_param_str: tuple(map(_plain, constraint.allowed_type_strs))
        for constraint in schema.type_constraints
    }
    return Signature(
        schema.since_version, inputs, outputs, choices, frozenset(schema.attributes)
    )


def version_in(release: str, operator: tuple[str, str, int]) -> int | None:
    """The version whose form of an operator a release takes, None where it has none of it.

    It is the imported one, but where onnx brought a form later than the release was made.
    """
    domain, op_type, version = operator
    known = signature(*operator)
    while known is not None:
        span = _table()["lacking"].get(domain, {}).get(f"{op_type} {known.since}")
        if span is None or not within(span, release):
            return version
        version = known.since - 1
        known = signature(domain, op_type, version) if version else None
    return None


def within(span: str, release: str) -> bool:
    """Whether a release is in ``1.17..1.19``, ``1.21..`` or, in an empty text, in all."""
    first, _, last = span.partition("..")
    low, high = first or releases()[0], last or releases()[-1]
    return number(low) <= number(release) <= number(high)


def _port(text: str) -> Port:
    name, _, kind = text.removesuffix("...").partition(":")
    return Port(name, kind, text.endswith("..."))


def _plain(type_name: str) -> str:
    """``seq(float)`` of ``seq(tensor(float))``: a type as the table writes it."""
    return re.sub(r"tensor\((\w+)\)", r"\1", type_name).replace(",", ":")


@dataclass(frozen=True)
class _Kernel:
    first: int
    last: int | None
    releases: str
    types: Mapping[str, frozenset[str]]

    def fits(self, since: int, release: str) -> bool:
        """Whether it is in a release and takes an operator as of a version.

        One without a last version takes only the very version it begins with: nobody knows
        whether it does what a later one asks for.
        """
        if not within(self.releases, release):
            return False
        if self.last is None:
            return since == self.first
        return self.first <= since <= self.last

    def takes(self, bound: Mapping[str, set[str | None]]) -> bool | None:
        answers = [
            None if kind is None else kind in allowed
            for name, allowed in self.types.items()
            for kind in bound.get(name, ())
        ]
        return False if False in answers else None if None in answers else True


@functools.cache
def _kernels(part: str, domain: str, op_type: str) -> tuple[_Kernel, ...]:
    rows: list[str] = _table()[part].get(domain, {}).get(op_type, [])
    return tuple(_parsed(row) for row in rows)


def _parsed(row: str) -> _Kernel:
    match = _ROW.fullmatch(row)
    assert match is not None, row
    types = dict(word.split("=") for word in match[5].split())
    return _Kernel(
        int(match[1]),
        None if match[2] == "+" else int(match[3]),
        match[4] or "",
        {name: _set(text) for name, text in types.items()},
    )


@functools.cache
def _set(text: str) -> frozenset[str]:
    named = _table()["sets"][text[1:]] if text.startswith("@") else text
    return frozenset(named.split(","))


def has_kernel(
    release: str,
    provider: Provider,
    operator: tuple[str, str, int],
    inputs: Sequence[str | None],
    outputs: Sequence[str | None] = (),
) -> bool | None:
    """Whether a release has a kernel for an operator with inputs and outputs of some types.

    That a model loads takes less: a provider's missing kernel may be one of the processor's,
    the operator may be made of others, and casts may be put around it. ``supported`` knows.

    Args:
        release: One of ``releases``.
        provider: Whose kernel; for CUDA and WebGPU what the documents of the release say.
        operator: Domain ("" for ai.onnx), name, and imported version of the operator set.
        inputs: Their types, such as ``float16`` or ``seq(float)``; "" for an input that is
            left out, None for a type that is not known.
        outputs: Their types; those of which nothing is said are taken to fit.

    Returns:
        None where it depends on a type that is not known, or on documents that are missing.
    """
    domain, op_type, version = operator
    part = "cpu" if provider == "web" else provider
    known = signature(domain, op_type, version)
    if known is None:
        return False
    if part != "cpu" and release not in documented():
        return None
    bound = known.bound(inputs, outputs)
    answers = {
        kernel.takes(bound)
        for kernel in _kernels(part, domain, op_type)
        if kernel.fits(known.since, release)
    }
    return True if True in answers else None if None in answers else False
