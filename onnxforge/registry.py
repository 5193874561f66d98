"""Names of passes, and the classes behind them, loaded on demand."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from importlib import metadata
from typing import TYPE_CHECKING

from onnxforge import spec
from onnxforge.errors import BrokenPass, OnnxforgeError, SpecError
from onnxforge.options import did_you_mean, from_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxforge.core import Pass

__all__ = ["Entry", "entries", "parse", "pass_class"]

_BUILT_IN = "onnxforge.passes"
_GROUP = "onnxforge.passes"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where the pass of one name comes from.

    Attributes:
        name: The word that stands for the pass in a pipeline text.
        target: Its module, for a third party's pass ``module:Class``.
        distribution: Name and version of the third party's package, None for built-ins.
        point: What loads a third party's pass, None for built-ins.
    """

    name: str
    target: str
    distribution: str | None = None
    point: metadata.EntryPoint | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        """Where the pass comes from, for messages."""
        return f"{self.target} ({self.distribution or 'built in'})"


def entries() -> dict[str, Entry]:
    """All passes by name, in alphabetical order; none of them is imported.

    Raises:
        SpecError: Two passes have the same name; the message gives both sources.
    """
    found: dict[str, Entry] = {}
    for entry in sorted([*_built_in(), *_third_party()], key=lambda entry: entry.name):
        if entry.name in found:
            first = found[entry.name]
            raise SpecError(f"two passes are called {entry.name!r}: {first} and {entry}")
        found[entry.name] = entry
    return found


def pass_class(name: str) -> type[Pass]:
    """Import the class of the pass called ``name``.

    Raises:
        SpecError: There is no such pass.
        BrokenPass: The module of a built-in pass breaks the house rules.
        OnnxforgeError: A third party's pass cannot be imported, or is no pass.
    """
    return _load(_entry(spec.Word(name), entries()))


def parse(text: str, *, third_party: bool = True) -> tuple[Pass, ...]:
    """Read a pipeline text and make its passes.

    Args:
        text: For example ``fp16w{min_bytes=64KiB},assert-pure``.
        third_party: Whether passes that are not built in may be in it.

    Raises:
        SpecError: The text, a pass name or an option is wrong.
        BrokenPass: The module of a built-in pass breaks the house rules.
        OnnxforgeError: A third party's pass cannot be imported, or is no pass.
    """
    passes = spec.parse(text).passes
    known = entries()
    found = [_entry(one.name, known, text) for one in passes]
    for one, entry in zip(passes, found, strict=True):
        if entry.point is not None and not third_party:
            message = f"{one.name.text!r} is of {entry.distribution}: give --passes to run it"
            raise SpecError(message, text, one.name.start, one.name.end)
    classes = [_load(entry) for entry in found]
    return tuple(from_spec(cls, one, text) for cls, one in zip(classes, passes, strict=True))


def _built_in() -> list[Entry]:
    # find_spec instead of an import: built-ins are not imported to be listed.
    package = importlib.util.find_spec(_BUILT_IN)
    folders = package.submodule_search_locations if package else None
    return [
        Entry(module.name.replace("_", "-"), f"{_BUILT_IN}.{module.name}")
        for module in pkgutil.iter_modules(folders or [])
        if not module.name.startswith("_")
    ]


def _third_party() -> list[Entry]:
    return [
        Entry(point.name, point.value, _distribution(point), point)
        for point in metadata.entry_points(group=_GROUP)
    ]


def _distribution(point: metadata.EntryPoint) -> str:
    if point.dist is None:
        return "unknown distribution"
    return f"{point.dist.name} {point.dist.version}"


def _entry(word: spec.Word, known: Mapping[str, Entry], text: str = "") -> Entry:
    if word.text not in known:
        message = f"there is no pass {word.text!r}{did_you_mean(word.text, known)}"
        raise SpecError(message, text, word.start, word.end)
    return known[word.text]


def _load(entry: Entry) -> type[Pass]:
    return _load_third_party(entry, entry.point) if entry.point else _load_built_in(entry)


def _load_built_in(entry: Entry) -> type[Pass]:
    from onnxforge.core import Pass

    module = importlib.import_module(entry.target)
    classes: list[type[Pass]] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise BrokenPass(f"{entry.target} must define exactly one pass; it has {names}")
    return _named(classes[0], entry, BrokenPass)


def _load_third_party(entry: Entry, point: metadata.EntryPoint) -> type[Pass]:
    from onnxforge.core import Pass

    try:
        loaded = point.load()
    except Exception as error:
        raise OnnxforgeError(
            f"cannot import the pass {entry.name!r} from {entry}: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise OnnxforgeError(
            f"{entry.name!r} from {entry} is not a subclass of onnxforge.Pass"
        )
    return _named(loaded, entry, OnnxforgeError)


def _named(cls: type[Pass], entry: Entry, error: type[OnnxforgeError]) -> type[Pass]:
    name = getattr(cls, "name", None)
    if name != entry.name:
        raise error(f"{cls.__name__} from {entry} must be named {entry.name!r}, not {name!r}")
    return cls
