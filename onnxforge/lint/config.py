"""What lint looks for, and how it is told."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from onnxforge.errors import OnnxforgeError, SpecError, about
from onnxforge.lint.finding import Level
from onnxforge.lint.rules import RULES
from onnxforge.options import did_you_mean
from onnxforge.runtime.ceilings import ceiling

if TYPE_CHECKING:
    from onnxforge.lint.finding import Rule

__all__ = ["Options", "configured", "find", "matches"]

_LEVELS = (*get_args(Level), "off")
_PLACES = (("onnxforge.toml", ("lint",)), ("pyproject.toml", ("tool", "onnxforge", "lint")))


@dataclass(frozen=True)
class Options:
    """What to look for.

    Attributes:
        select: Rules to apply, by name, by code, or by how the code begins; empty for all.
        ignore: Rules to leave out.
        per_path: Rules to leave out in files whose path matches a pattern.
        severity: Another level for a rule: info, warning, error, or off.
        exclude: Patterns of files that are not looked at.
        allow: Domains of operators that are fine beside ai.onnx.
        min_ort: Oldest onnxruntime that is to load the models.
        providers: Execution providers, each of which is to run them; none for the processor.
        browser: Whether they are to load in a browser.
        derived: Whether tiers are replayed from their fp32 parents.
        hash: Whether files and weights are read to be compared.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_path: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    severity: Mapping[str, Level | Literal["off"]] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    min_ort: str | None = None
    providers: tuple[str, ...] = ()
    browser: bool = False
    derived: bool = False
    hash: bool = True

    def level(self, rule: Rule) -> Level | None:
        """How grave a rule is, None if it is left out."""
        if (self.select and not rule.matches(self.select)) or rule.matches(self.ignore):
            return None
        given = [level for word, level in self.severity.items() if rule.matches([word])]
        level = given[-1] if given else rule.level
        return None if level == "off" else level

    def excludes(self, path: str) -> bool:
        """Whether a file is not looked at."""
        return any(matches(path, pattern) for pattern in self.exclude)

    def ignores(self, rule: Rule, path: str) -> bool:
        """Whether a rule is left out in a file."""
        return self.excludes(path) or any(
            matches(path, pattern) and rule.matches(words)
            for pattern, words in self.per_path.items()
        )

    def refuse_unknown(self) -> None:
        """Raise SpecError for a word that means no rule, and for an unknown release."""
        if self.min_ort is not None:
            ceiling(self.min_ort)
        words = {*self.select, *self.ignore, *self.severity}
        words.update(word for some in self.per_path.values() for word in some)
        for word in sorted(words):
            if not any(rule.matches([word]) for rule in RULES):
                names = [name for rule in RULES for name in (rule.name, rule.code)]
                raise SpecError(f"there is no rule {word!r}{did_you_mean(word, names)}")


def matches(path: str, pattern: str) -> bool:
    """Whether the end of a path is as a pattern says."""
    path = path.replace("\\", "/")
    return fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"*/{pattern}")


def find(paths: Iterable[Path]) -> Path | None:
    """The configuration next to the first of some paths, or above it."""
    start = next((path.absolute() for path in paths), None)
    folders = [] if start is None else [start, *start.parents]
    for folder, (name, keys) in itertools.product(folders, _PLACES):
        if _table(folder / name, keys) is not None:
            return folder / name
    return None


def configured(path: Path | None, changes: Mapping[str, Any]) -> Options:
    """The options of a configuration file, some of them changed.

    Args:
        path: The file, None for no file.
        changes: Options that are given otherwise; None leaves what the file says.

    Raises:
        OnnxforgeError: The file cannot be read, or it says what is not understood.
    """
    given: dict[str, Any] = {}
    if path is not None:
        given = _read(path)
        with about(path):
            Options(**given).refuse_unknown()
    given |= {name: value for name, value in changes.items() if value is not None}
    return Options(**given)


def _table(path: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """The table of a file, None if there is no such file or no such table."""
    try:
        found: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise OnnxforgeError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, digits without end
        raise OnnxforgeError(f"{path}: {error}") from None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _read(path: Path) -> dict[str, Any]:
    keys = next((keys for name, keys in _PLACES if name == path.name), ("lint",))
    table = _table(path, keys)
    if table is None:
        raise OnnxforgeError(f"{path}: has no table [{'.'.join(keys)}]")
    fields = {f.name.replace("_", "-"): f.name for f in dataclasses.fields(Options)}
    found = {}
    for key, value in table.items():
        if key not in fields:
            raise OnnxforgeError(f"{path}: lint has no option {key!r}")
        try:
            found[fields[key]] = _value(fields[key], value)
        except ValueError as error:
            raise OnnxforgeError(f"{path}: {key}: {error}") from None
    return found


def _value(name: str, value: object) -> Any:
    """What a file says of an option, as the option wants it."""
    default = getattr(Options(), name)
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise ValueError("wanted true or false")
    if isinstance(default, tuple):
        return _words(value)
    if name == "per_path" and isinstance(value, dict):
        return {pattern: _words(words) for pattern, words in value.items()}
    if name == "severity" and isinstance(value, dict):
        if wrong := [level for level in value.values() if level not in _LEVELS]:
            raise ValueError(f"{wrong[0]!r} is none of {', '.join(_LEVELS)}")
        return value
    if name == "min_ort" and isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is not what is wanted")


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise ValueError("wanted a list of words")
