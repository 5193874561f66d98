"""Tiers against each other: the same graphs and interfaces, and what their names promise."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING

import onnx

from onnxforge.errors import CheckFailed, DataError, ModelError, Refused, SpecError
from onnxforge.lint.bundle import is_reduced, named_statistics
from onnxforge.lint.finding import Problem, Rule
from onnxforge.lint.view import type_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxforge.lint.bundle import Bundle
    from onnxforge.lint.config import Options
    from onnxforge.lint.finding import Level
    from onnxforge.lint.model import Model

__all__ = ["RULES"]

_Type = onnx.TensorProto
_FLOATS = {_Type.FLOAT, _Type.FLOAT16, _Type.BFLOAT16}
_LARGE = 1 << 20
_KINDS = ("input", "output")
_PIPELINE = "onnxforge.pipeline"


def missing_graph(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A tier lacks a graph that other tiers have.

    What it does:
        Compares the graphs of all tiers, which are folders (`int8/encoder.onnx`) or endings of
        names (`encoder_int8.onnx`). With endings, a graph that has no other tier at all is
        shared by all.

    Why it is bad:
        Whoever chooses the tier cannot run it, or takes the graph from another tier without
        notice.

    Example:
        `int8/` holds encoder and editor, `fp32/` holds embed_tokens as well.

    How to mend:
        Make the graph for this tier, or copy it into its folder.

    Fix:
        None.
    """
    tiers = bundle.tiers
    counts = Counter(stem for graphs in tiers.values() for stem in graphs)
    wanted = [stem for stem, n in counts.items() if n > 1 or bundle.in_folders]
    for tier, graphs in tiers.items():
        for stem in wanted:
            if stem not in graphs:
                others = [name or "the unnamed" for name in tiers if stem in tiers[name]]
                text = f"tier {tier or 'without a name'} has no {stem}, but {_few(others)} has"
                yield Problem(text, file=next(iter(graphs.values())).name)


def interface_differs(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A graph has other inputs or outputs than the same graph of the first tier.

    What it does:
        Compares names, order, types and fixed dimensions of inputs and outputs with those of
        the fp32 tier, or of the first one. Names of open dimensions may differ; so may float
        types, which `interface-type` tells.

    Why it is bad:
        A program that runs one tier fails on the other.

    Example:
        The int8 tier was made from an older export, which had no `cache_position`.

    How to mend:
        Make all tiers from one export.

    Fix:
        None.
    """
    for (reference, model), kind in itertools.product(_pairs(bundle), _KINDS):
        wanted, seen = _ports(reference, kind), _ports(model, kind)
        if list(wanted) != list(seen):
            text = f"has the {kind}s {_few(list(seen))}, {reference.name} has"
            yield Problem(f"{text} {_few(list(wanted))}", file=model.name)
            continue
        reasons = {name: _difference(wanted[name], seen[name]) for name in wanted}
        for name, reason in reasons.items():
            if reason is not None:
                text = f"the {kind} is {reason} in {reference.name}"
                yield Problem(text, name, file=model.name)


def interface_type(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """An input or output has another float type than in the first tier.

    What it does:
        Compares float32, float16 and bfloat16 of inputs and outputs between tiers.

    Why it is bad:
        A caller has to convert, and to know it for each tier. For caches of keys and values it
        may be meant.

    Example:
        `past_key_values.0.key` is float16 in the fp16 tier.

    How to mend:
        Keep the interface float32 (`keep_io_types`), or ignore the rule for the tier.

    Fix:
        None.
    """
    for (reference, model), kind in itertools.product(_pairs(bundle), _KINDS):
        wanted, seen = _ports(reference, kind), _ports(model, kind)
        for name in (name for name in wanted if name in seen):
            if words := _other_float(seen[name], wanted[name]):
                text = f"the {kind} is {words[0]}, and {words[1]} in {reference.name}"
                yield Problem(text, name, file=model.name)


def _other_float(seen: onnx.TypeProto, wanted: onnx.TypeProto) -> list[str]:
    """The names of two types of floats that differ, else nothing."""
    types = [port.tensor_type.elem_type for port in (seen, wanted)]
    if types[0] == types[1] or not set(types) <= _FLOATS:
        return []
    return [type_name(number) for number in types]


def opset_differs(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A graph imports another version of ai.onnx than in the first tier.

    What it does:
        Compares the imports of the same graph in all tiers. A newer one is a remark only if
        the model says that onnxforge made it: no pass raises it unless it is told to.

    Why it is bad:
        A tier that needs a newer runtime than its parent surprises; one that is older was
        made from another export.

    Example:
        A converter raised int4 tiers to opset 21.

    How to mend:
        Make all tiers from one export, or ignore the rule where the tier needs it.

    Fix:
        None.
    """
    for reference, model in _pairs(bundle):
        versions = [each.graphs[0].imports.get("", 0) for each in (model, reference)]
        if versions[0] != versions[1]:
            text = f"imports ai.onnx {versions[0]}, {reference.name} {versions[1]}"
            raised = versions[0] > versions[1] and _PIPELINE in model.metadata
            yield Problem(text, file=model.name, level="info" if raised else None)


def untrue_tier(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A model holds nothing of the type that its tier is named after.

    What it does:
        Looks in models of int8, uint8, int4, fp16 and bf16 tiers for weights of 1 KiB and
        more of such a type (int4 may be packed into bytes), if their parent has float32
        weights of 1 MiB and more.

    Why it is bad:
        The wrong file was copied: mostly the fp32 one, and its size shows it to every user.

    Example:
        `int8/encoder.onnx` holds float32 weights only.

    How to mend:
        Make the tier again.

    Fix:
        None.
    """
    for reference, model in _pairs(bundle):
        wanted = _promised(model.tier)
        held = {t.dtype for t in model.tensors if t.nbytes >= 1024}
        large = any(t.dtype == _Type.FLOAT and t.nbytes >= _LARGE for t in reference.tensors)
        if wanted and large and not held & wanted:
            text = f"the tier is called {model.tier}, but no weight is of such a type"
            yield Problem(text, file=model.name)


def float32_left(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A large weight of a reduced tier is float32 still.

    What it does:
        Finds float32 weights of 1 MiB and more in tiers whose name promises less. If the model
        says that onnxforge made it, that is a remark only: its report gave a reason for each.

    Why it is bad:
        Tools leave weights out without a word: behind a Transpose or a Cast, in bodies, tied
        ones, all but MatMul. The tier is larger than it looks.

    Example:
        `quantize_dynamic` leaves the embedding of 822 MB as it is.

    How to mend:
        Treat it (`gather-int8` for tables, `int8w` for the rest), or ignore the rule for the
        file if it is meant.

    Fix:
        None.
    """
    for model in bundle.models:
        if model.broken is not None or not is_reduced(model.tier):
            continue
        level: Level | None = "info" if _PIPELINE in model.metadata else None
        for tensor in model.tensors:
            if tensor.dtype == _Type.FLOAT and tensor.nbytes >= _LARGE:
                text = f"{tensor.nbytes:,} bytes of float32 in tier {model.tier}"
                yield Problem(text, tensor.where, file=model.name, level=level)


def not_derived(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A tier is not what its pipeline makes of the fp32 tier.

    What it does:
        With `--derived`: replays on the fp32 model what the tier says it is made by, and
        compares graph and weights byte by byte, as `onnxforge verify` does. Reads both. A tier
        with calibrated ranges is replayed with the statistics that the bundle has.

    Why it is bad:
        The tier was made from another export, was changed by hand, or is something else.

    Example:
        `lm_head.weight: differs from byte 4096 of 822,083,584 on`

    How to mend:
        Make the tier again. If the statistics are missing: `statistics = "statistics"` in the
        recipe puts them into the bundle.

    Fix:
        None.
    """
    if not options.derived:
        return
    from onnxforge.replay import verify

    names = (name for name in named_statistics(bundle.said) if name in bundle.files.names)
    statistics = [path for name in names if (path := bundle.files.local(name)) is not None]
    for reference, model in _pairs(bundle):
        parent, child = (bundle.files.local(each.name) for each in (reference, model))
        if parent is None or child is None:
            continue
        try:
            found = verify(parent, child, statistics=statistics)
        except (CheckFailed, DataError, ModelError, Refused, SpecError) as error:
            yield Problem(f"cannot be replayed: {error}", file=model.name)
            continue
        if found.differences:
            more = f", and {len(found.differences) - 1} more" * (len(found.differences) > 1)
            yield Problem(f"{found.differences[0]}{more}", file=model.name)


def _pairs(bundle: Bundle) -> Iterator[tuple[Model, Model]]:
    """Each graph of each tier with the same graph of the first tier."""
    tiers = bundle.tiers
    first = next((name for name in ("fp32", "") if name in tiers), next(iter(tiers), ""))
    for tier, graphs in tiers.items():
        for stem, model in graphs.items() if tier != first else ():
            reference = tiers[first].get(stem)
            if reference and reference.broken is None and model.broken is None:
                yield reference, model


def _ports(model: Model, kind: str) -> Mapping[str, onnx.TypeProto]:
    """Inputs that a caller has to feed, or outputs, with their types."""
    defaults = {tensor.name for tensor in model.proto.graph.initializer}
    values = getattr(model.proto.graph, kind)
    return {value.name: value.type for value in values if value.name not in defaults}


def _difference(wanted: onnx.TypeProto, seen: onnx.TypeProto) -> str | None:
    """How a type differs in more than the width of floats, or None."""
    if (
        wanted.WhichOneof("value") != "tensor_type"
        or seen.WhichOneof("value") != "tensor_type"
    ):
        same = wanted.WhichOneof("value") == seen.WhichOneof("value")
        return None if same else f"{seen.WhichOneof('value')}, {wanted.WhichOneof('value')}"
    types = {each.tensor_type.elem_type for each in (wanted, seen)}
    if len(types) > 1 and not types <= _FLOATS:
        words = [type_name(each.tensor_type.elem_type) for each in (seen, wanted)]
        return f"{words[0]}, and {words[1]}"
    shapes = [_shape(each) for each in (seen, wanted)]
    if shapes[0] is None or shapes[1] is None:
        return None
    fixed = zip(*shapes, strict=False)
    clash = any(a != b for a, b in fixed if isinstance(a, int) and isinstance(b, int))
    if len(shapes[0]) != len(shapes[1]) or clash:
        return f"{_text(shapes[0])}, and {_text(shapes[1])}"
    return None


def _shape(kind: onnx.TypeProto) -> list[int | str] | None:
    if not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]


def _text(shape: list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _promised(tier: str) -> set[int]:
    """Types of weights of which a tier with this name has at least one."""
    name = tier.lower()
    bytes_: set[int] = {_Type.INT8, _Type.UINT8}
    if re.search(r"int8|q8|quantized", name):
        return bytes_
    if re.search(r"int4|q4|bnb4", name):
        return bytes_ | {_Type.INT4, _Type.UINT4}
    if "bf16" in name:
        return {_Type.BFLOAT16}
    return {_Type.FLOAT16} if "fp16" in name else set()


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


RULES = (
    Rule("OF470", "missing-graph", "error", missing_graph, of="bundle"),
    Rule("OF471", "interface-differs", "error", interface_differs, of="bundle"),
    Rule("OF472", "interface-type", "warning", interface_type, of="bundle"),
    Rule("OF473", "opset-differs", "warning", opset_differs, of="bundle"),
    Rule("OF474", "untrue-tier", "error", untrue_tier, of="bundle"),
    Rule("OF475", "float32-left", "warning", float32_left, of="bundle"),
    Rule("OF476", "not-derived", "error", not_derived, of="bundle"),
)
