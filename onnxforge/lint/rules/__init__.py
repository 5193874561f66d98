"""The rules of lint, one module for each family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxforge.lint.rules import (
    data,
    files,
    forms,
    graph,
    lists,
    metadata,
    operators,
    runtimes,
    tiers,
    versions,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from onnxforge.lint.finding import Rule

__all__ = ["FAMILIES", "RULES"]

_MODULES = (
    versions,
    operators,
    data,
    files,
    graph,
    weights,
    runtimes,
    forms,
    tiers,
    lists,
    metadata,
)

FAMILIES: Mapping[str, ModuleType] = {m.__name__.rpartition(".")[2]: m for m in _MODULES}
"""The module of each family."""

RULES: tuple[Rule, ...] = tuple(rule for module in _MODULES for rule in module.RULES)
"""All rules, in the order of their codes."""
