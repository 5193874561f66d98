"""The rules of lint, one module for each family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxforge.lint.rules import versions

if TYPE_CHECKING:
    from onnxforge.lint.finding import Rule

__all__ = ["FAMILIES", "RULES"]

FAMILIES = {"versions": versions.RULES}
"""Rules by family."""

RULES: tuple[Rule, ...] = tuple(rule for rules in FAMILIES.values() for rule in rules)
"""All rules, in the order of their codes."""
