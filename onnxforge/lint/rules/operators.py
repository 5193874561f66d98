"""Nodes against the tables of operators, and functions as runtimes put them into models."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx

from onnxforge.lint.finding import Problem, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Call, Node

__all__ = ["RULES", "lack"]


def unknown_operator(model: Model, options: Options) -> Iterator[Problem]:
    """ai.onnx has no such operator at the imported version, or has it no more.

    What it does:
        Looks every operator of ai.onnx up in the tables of the onnx package.

    Why it is bad:
        No runtime has to run it, and the checker refuses the model. Some runtimes do run it,
        which hides the fault until the model meets another one.

    Example:
        A tool rewrites Erf and its neighbours to Gelu, which opset 20 brought, and leaves the
        import at 17.

    How to mend:
        Import the version that has the operator, if all others mean the same there.

    Fix:
        None.
    """
    newest = onnx.defs.onnx_opset_version()
    for node in _of_tables(model):
        version = node.graph.imports.get("", 0)
        known = not node.domain and 0 < version <= newest
        if known and (reason := lack(node.proto.op_type, version)):
            yield Problem(reason, node.where)


def recursive_function(model: Model, options: Options) -> Iterator[Problem]:
    """A function calls itself.

    What it does:
        Follows the calls from function to function, in bodies too.

    Why it is bad:
        Runtimes put the body of a function in the place of its call: they refuse the model,
        or do not come to an end.

    Example:
        A tool gives a function the name of the operator that it is made of.

    How to mend:
        Give the function a name, or a domain, of its own.

    Fix:
        None.
    """
    known = {
        call: {node.call for each in graph.inside for node in each.nodes}
        for call, graph in model.functions.items()
    }
    for start in known:
        seen: set[Call] = set()
        waiting = [*known[start]]
        while waiting:
            call = waiting.pop()
            if call in known and call not in seen:
                seen.add(call)
                waiting += known[call]
        if start in seen:
            yield Problem("calls itself", model.functions[start].path.removesuffix("/"))


def misfit(model: Model, options: Options) -> Iterator[Problem]:
    """A node does not fit its operator at the imported version.

    What it does:
        Holds the attributes of every node and their types, and the number of its inputs and
        outputs, against the tables of the onnx package.

    Why it is bad:
        Runtimes refuse the model. The number of an operator set says what nodes mean; whoever
        raises it has to convert them.

    Example:
        A tool writes `ai.onnx 21` into a model, whose ReduceMean has its axes in an attribute
        as it had up to 17.

    How to mend:
        Import the version that the nodes were written for, or convert the model:
        `onnx.version_converter.convert_version`.

    Fix:
        None.
    """
    for node in _of_tables(model):
        form = _form(node, node.graph.imports)
        if form is not None and (reason := _unfit(node, form)):
            yield Problem(f"{node.op} {form.version} {reason}", node.where)


def function_version(model: Model, options: Options) -> Iterator[Problem]:
    """A function is written for other operators than the model around it imports.

    What it does:
        Looks at functions whose import of a domain is not that of the model, for nodes that
        fit one version and not the other, and for attributes that are left out and have
        another default there.

    Why it is bad:
        onnxruntime puts the body of a function in the place of its call and reads it at the
        version of the model: it refuses it, or computes something else without a word.

    Example:
        The model imports ai.onnx 17, its function 11: a Softmax without `axis`, which meant
        all axes from the second on, sums over the last alone.

    How to mend:
        Convert the function to the version of the model. Many tools that raise the version of
        a model leave its functions alone.

    Fix:
        None.
    """
    main = model.graphs[0].imports
    for node in _of_tables(model):
        written, read = _form(node, node.graph.imports), _form(node, main)
        if written in (None, read) or node.domain not in main:
            continue
        if reason := "is no operator" if read is None else _other(node, written, read):
            there = f"{node.domain or 'ai.onnx'} {main[node.domain]}"
            text = f"{node.op} {written.version} in a model of {there}, where it {reason}"
            yield Problem(text, node.where)


def _of_tables(model: Model) -> Iterator[Node]:
    """Nodes that are no calls of functions of the model."""
    return (node for node in model.nodes if node.call not in model.functions)


def _other(node: Node, written: _Form, read: _Form) -> str | None:
    """What a node is at another version than that it was written for, None if the same."""
    given = {attribute.name for attribute in node.proto.attribute}
    for name in sorted(written.attributes.keys() & read.attributes.keys() - given):
        if written.attributes[name] != read.attributes[name]:
            return f"has another {name} by default"
    return _unfit(node, read)


def _unfit(node: Node, form: _Form) -> str | None:
    """How a node differs from all that its operator may be, or None."""
    given: set[str] = set()
    for attribute in node.proto.attribute:
        name = attribute.name
        if name not in form.attributes:
            return f"has no attribute {name!r}"
        if name in given:
            return f"has one attribute {name!r}, not two"
        given.add(name)
        types = attribute.type, form.attributes[name][0]
        if types[0] != types[1]:
            seen, wanted = (onnx.AttributeProto.AttributeType.Name(kind) for kind in types)
            return f"has {wanted} as attribute {name!r}, not {seen}"
    if lacking := sorted(form.required - given):
        return f"needs an attribute {lacking[0]!r}"
    for kind, count, (least, most) in (
        ("inputs", len(node.inputs), form.inputs),
        ("outputs", len(node.outputs), form.outputs),
    ):
        if count < least:
            return f"has at least {least} {kind}, not {count}"
        if count > most:
            return f"has at most {most} {kind}, not {count}"
    return None


@functools.cache
def lack(op_type: str, version: int) -> str:
    """Why ai.onnx has no operator at a version, empty if it has."""
    if not onnx.defs.has(op_type):
        return f"ai.onnx has no operator {op_type!r}"
    if version > onnx.defs.onnx_opset_version():
        return ""  # nobody knows
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return f"ai.onnx has {op_type} at a later version than {version} only"
    return f"ai.onnx {version} has {op_type} no more" if schema.deprecated else ""


@dataclass(frozen=True)
class _Form:
    """What the nodes of an operator look like.

    Attributes:
        version: The version that they are so from.
        attributes: Types of all attributes, and the values they have if they are left out.
        required: Attributes that may not be left out.
        inputs: Least and largest number of inputs.
        outputs: Likewise of outputs.
    """

    version: int
    attributes: Mapping[str, tuple[int, bytes]]
    required: frozenset[str]
    inputs: tuple[int, int]
    outputs: tuple[int, int]


def _form(node: Node, imports: Mapping[str, int]) -> _Form | None:
    return _known(node.proto.op_type, imports.get(node.domain, 0), node.domain)


@functools.cache
def _known(op_type: str, version: int, domain: str) -> _Form | None:
    """What the tables say of an operator at a version, None if nothing."""
    if not 0 < version < 1000:  # the tables take small numbers only
        return None
    try:
        schema: Any = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    known = schema.attributes
    return _Form(
        schema.since_version,
        {k: (v.type.value, v.default_value.SerializeToString()) for k, v in known.items()},
        frozenset(name for name in known if known[name].required),
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
    )


RULES = (
    Rule("OF406", "unknown-operator", "error", unknown_operator),
    Rule("OF407", "recursive-function", "error", recursive_function),
    Rule("OF408", "misfit", "error", misfit),
    Rule("OF409", "function-version", "error", function_version),
)
