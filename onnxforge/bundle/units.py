"""What a build makes, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxforge.errors import SpecError
from onnxforge.options import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePosixPath

    from onnxforge.bundle.recipe import Recipe, Tier, Variant

__all__ = ["Unit", "units"]


@dataclass(frozen=True, eq=False)
class Unit:
    """Graphs of a tier that are written together.

    Attributes:
        tier: The tier.
        graphs: Names of the graphs; one alone unless they share their data.
    """

    tier: Tier
    graphs: tuple[str, ...]

    def __str__(self) -> str:
        """Its name, as ``--only`` takes it."""
        return f"{self.tier.name}/{'*' if self.tier.weights == 'shared' else self.graphs[0]}"

    @property
    def variants(self) -> list[Variant]:
        """Its graphs in this tier."""
        return [self.tier.graphs[name] for name in self.graphs]

    @property
    def folder(self) -> PurePosixPath:
        """Where its files are in the bundle."""
        return self.variants[0].path.parent


def units(recipe: Recipe, only: Iterable[str] = ()) -> list[Unit]:
    """The units of a recipe.

    Args:
        recipe: The recipe.
        only: Names of tiers, or ``tier/graph``; all if there are none.

    Raises:
        SpecError: Something is not in the recipe.
    """
    found: list[Unit] = []
    for tier in recipe.tiers.values():
        names = tuple(tier.graphs)
        groups = [names] if tier.weights == "shared" else [(name,) for name in names]
        found += [Unit(tier, group) for group in groups]
    wanted = list(only)
    known = [*recipe.tiers, *(f"{u.tier.name}/{name}" for u in found for name in u.graphs)]
    for each in wanted:
        if each not in known:
            raise SpecError(f"--only {each}: not in the recipe{did_you_mean(each, known)}")

    def is_wanted(unit: Unit) -> bool:
        names = {unit.tier.name, *(f"{unit.tier.name}/{name}" for name in unit.graphs)}
        return not wanted or not names.isdisjoint(wanted)

    return [unit for unit in found if is_wanted(unit)]
