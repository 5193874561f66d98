"""What the onnxruntime releases that a model is for cannot load or run, by their tables."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from onnxforge.errors import ModelError
from onnxforge.lint.finding import Problem, Rule
from onnxforge.lint.rules.operators import lack
from onnxforge.runtime.ceilings import ceiling
from onnxforge.runtime.kernels import Provider, kernels_of, releases

if TYPE_CHECKING:
    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Node
    from onnxforge.runtime.support import Support

__all__ = ["RULES"]

_NAMES: Mapping[Provider, str] = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "web": "onnxruntime-web",
    "webgpu": "onnxruntime-web on WebGPU",
}


def no_kernel(model: Model, options: Options) -> Iterator[Problem]:
    """A release that has to load the model has no kernel for a node.

    What it does:
        Looks operator, version and element types of every node up in the kernels of the
        releases from `min-ort` on, or of the newest one: those of the processor, or of each
        of the `providers`, and of onnxruntime-web with `browser`. What the tables do not tell
        is not told.

    Why it is bad:
        The release refuses the model.

    Example:
        `ConvInteger 14 of uint8, int8, uint8, int8: no kernel in onnxruntime 1.17 to 1.23`

    How to mend:
        `onnxforge support model.onnx` shows which releases load it, and why others do not.
        Claim those, or make the node of operators that older ones have: the pass
        `dynamic-int8` stores weights of convolutions as uint8.

    Fix:
        None.
    """
    yield from _problems(model, options, ("kernel", "type"))


def failing_form(model: Model, options: Options) -> Iterator[Problem]:
    """A release that has to run the model fails on a form in it.

    What it does:
        Looks for forms of nodes that were found to fail, in releases from `min-ort` on, or in
        the newest one, although each operator has a kernel: zero points of ConvInteger and
        MatMulInteger in shapes that no kernel takes, batches of dequantized weights, fusions
        that break, and others.

    Why it is bad:
        The model loads and then fails, or ends the process.

    Example:
        A tool gives ConvInteger a zero point for each output channel, all of them 128.

    How to mend:
        `onnxforge support model.onnx` tells which releases fail. One zero point for a whole
        weight is taken by all; scales of channels go into the Mul behind.

    Fix:
        None.
    """
    yield from _problems(model, options, ("form",))


def _problems(model: Model, options: Options, kinds: Sequence[str]) -> Iterator[Problem]:
    providers = dict.fromkeys(map(kernels_of, options.providers or ("",)))
    if options.browser:
        providers["web"] = None
    found: dict[tuple[str, str], dict[Provider, list[str]]] = {}
    for support in _answers(model, options.min_ort, tuple(providers)):
        for reason in support.reasons:
            if reason.kind in kinds:
                lacking = found.setdefault((reason.node, reason.text), {})
                lacking.setdefault(support.provider, []).append(support.version)
    told = {node.where for node in model.nodes if _is_told(node, options)}
    for (where, text), lacking in found.items():
        places = " and ".join(
            f"{_NAMES[provider]} {_span(names)}" for provider, names in lacking.items()
        )
        if where not in told:
            yield Problem(f"{text} in {places}", where)


def _is_told(node: Node, options: Options) -> bool:
    """Whether other rules say that there is no such operator."""
    if node.domain:
        return node.domain not in options.allow
    return bool(lack(node.proto.op_type, node.graph.imports.get("", 0)))


@functools.lru_cache(maxsize=1)  # two rules ask the same
def _answers(
    model: Model, oldest: str | None, providers: tuple[Provider, ...]
) -> list[Support]:
    """What each release makes of a model, but those that lack its operator set."""
    from onnx_ir import serde

    from onnxforge.cycles import refuse_cycles
    from onnxforge.runtime.support import Question

    known = releases()
    first = None if oldest is None else ceiling(oldest).release
    asked = known[known.index(first) :] if first in known else known[-1:]
    try:
        with warnings.catch_warnings(action="ignore"):
            graph = serde.deserialize_model(model.proto)
        refuse_cycles(graph)
        question = Question(graph)
        found = [question.answer(each, place) for place in providers for each in asked]
    except (serde.SerdeError, ModelError, ValueError, TypeError, KeyError):
        return []  # what is wrong with such a graph other rules tell
    return [each for each in found if all(reason.kind != "opset" for reason in each.reasons)]


def _span(names: Sequence[str]) -> str:
    """Releases in a row as the first and the last."""
    known = releases()
    start = known.index(names[0])
    if len(names) > 1 and tuple(names) == known[start : start + len(names)]:
        return f"{names[0]} to {names[-1]}"
    return ", ".join(names)


RULES = (
    Rule("OF450", "no-kernel", "error", no_kernel),
    Rule("OF451", "failing-form", "error", failing_form),
)
