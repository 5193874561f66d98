"""Giving the readers of a weight that is stored in another form its float32 back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import onnx_ir as ir

from onnxforge.surgery import Surgery, take_over
from onnxforge.weights import Use, Weight

__all__ = ["Form", "widen"]


class Form(Protocol):
    """How a weight is stored and made float32 again."""

    @property
    def word(self) -> str:
        """What new names end in."""

    @property
    def dtype(self) -> ir.DataType:
        """Type of what is stored."""

    def is_behind(self, use: Use) -> bool:
        """Whether a reader takes the stored form, and float32 is made of what it gives."""

    def whole(self, stored: ir.Value, output: str, surgery: Surgery) -> list[ir.Node]:
        """Nodes that make float32 of a stored tensor; the last has the output."""

    def taken(self, reader: ir.Node, output: str, surgery: Surgery) -> list[ir.Node]:
        """Nodes that make float32 of what such a reader gives; the last has the output."""


def widen(weight: Weight, form: Form, surgery: Surgery, *, share: bool = True) -> None:
    """Give every user of a weight, which is stored in its new form by now, float32.

    Where the form allows, as behind a Gather, only what is read of it is made float32.

    Args:
        weight: The weight.
        form: Its form.
        surgery: Adds the nodes.
        share: Once for all users in a graph; false does it for each.
    """
    direct = []
    for use in weight.uses:
        if form.is_behind(use):
            _behind(use.node, form, surgery)
        else:
            direct.append(use)
    assert weight.value is not None, "a stored weight is a value"
    for users in _sharing(direct, share=share):
        output = surgery.weights.unique(f"{weight.value.name}_{form.word}")
        nodes = form.whole(weight.value, output, surgery)
        users[0].scope.graph.insert_before(users[0].node, nodes)
        for use in users:
            use.node.replace_input_with(use.index, nodes[-1].outputs[0])


def _sharing(uses: Iterable[Use], *, share: bool) -> list[list[Use]]:
    """Uses that read one float32 form, in order: those of a graph, or of a node."""
    groups: dict[int, list[Use]] = {}
    for use in uses:
        reader = use.scope.graph if share else use.node
        groups.setdefault(id(reader), []).append(use)
    return list(groups.values())


def _behind(reader: ir.Node, form: Form, surgery: Surgery) -> None:
    """Widen what a reader gives; the last node takes over the name of the output."""
    taken, graph = reader.outputs[0], reader.graph
    name = taken.name or ""
    nodes = form.taken(reader, name, surgery)
    assert graph is not None, "a reader is part of the model"
    graph.insert_after(reader, nodes)
    whole = nodes[-1].outputs[0]
    take_over(taken, whole)
    taken.name = surgery.weights.unique(f"{name}_{form.word}")
    taken.type = ir.TensorType(form.dtype)
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is whole:
                node.replace_input_with(index, taken)
