"""Modules that are run when something of them is used, and not when they are imported."""

from __future__ import annotations

import contextlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from importlib.util import LazyLoader
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["postponed", "run_postponed"]


class _Finder(MetaPathFinder):
    """Finds some modules as the interpreter would, and postpones them."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module, to be run later; None for all others."""
        spec = PathFinder.find_spec(name, path, target) if name in self.names else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def postponed(*names: str) -> Iterator[None]:
    """Postpone modules that are imported first within a ``with`` block.

    Args:
        names: Full names of modules.
    """
    finder = _Finder(frozenset(names))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def run_postponed() -> None:
    """Run what is postponed: two threads that begin to use it at a time would break it."""
    for finder in sys.meta_path:
        for name in sorted(finder.names) if isinstance(finder, _Finder) else ():
            if name in sys.modules:
                hasattr(sys.modules[name], "__name__")  # any look at a module runs it
