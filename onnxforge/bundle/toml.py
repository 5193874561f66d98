"""Tables of a TOML file that say what is wrong with them at file and line."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from onnxforge.errors import OnnxforgeError, SpecError
from onnxforge.options import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Table", "positions", "read"]

_Path = tuple[str | int, ...]
_REQUIRED: Any = object()
_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def read(path: Path, *inside: str) -> Table:
    """Read a file.

    Args:
        path: The file.
        inside: Names of the tables, one in another, in which all that matters stands.

    Raises:
        SpecError: The file cannot be read or is no TOML, or such a table is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: no text in UTF-8") from None
    try:
        content: Any = tomllib.loads(text)
        lines = positions(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(_PLACE.sub("", f"{path}:{_line(error, text)}: {error}")) from None
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise SpecError(f"{path}: {error}") from None
    for name in inside:
        content = content.get(name)
        if not isinstance(content, dict):
            raise SpecError(f"{path}: holds no table [{'.'.join(inside)}]")
    return Table(path, lines, inside, content)


def _line(error: tomllib.TOMLDecodeError, text: str) -> int:
    place = _PLACE.search(str(error))
    return int(place[1]) if place and place[1] else text.count("\n") + 1


def positions(text: str) -> dict[_Path, int]:
    """The line in which each key of a TOML text first stands.

    A statement is the fewest lines that are TOML by themselves, so that no more of the
    grammar needs to be known here than how a header begins.
    """
    lines: dict[_Path, int] = {}
    counts: Counter[_Path] = Counter()
    header: _Path = ()
    statement: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        statement.append(line)
        try:
            content = tomllib.loads("\n".join(statement))
        except tomllib.TOMLDecodeError:
            continue
        first = number - len(statement) + 1
        if statement[0].lstrip().startswith("["):
            header = _header(content, counts)
            for end in range(1, len(header) + 1):
                lines.setdefault(header[:end], first)
        else:
            for path in _paths(content, header):
                lines.setdefault(path, first)
        statement.clear()
    return lines


def _header(content: Mapping[str, Any], counts: Counter[_Path]) -> _Path:
    """The table that a header begins; in a list of tables the last one is meant."""
    path: _Path = ()
    node: Any = content
    while node:
        ((key, node),) = node.items()
        path += (key,)
        if isinstance(node, list):
            counts[path] += 1
            node = None
        if counts[path]:
            path += (counts[path] - 1,)
    return path


def _paths(content: Any, path: _Path) -> Iterator[_Path]:
    inside = enumerate(content) if isinstance(content, list) else ()
    for key, value in content.items() if isinstance(content, dict) else inside:
        yield (*path, key)
        yield from _paths(value, (*path, key))


class Table:
    """A table; what is not asked for by the end is refused.

    Attributes:
        content: What is in it.
    """

    def __init__(
        self, file: Path, lines: Mapping[_Path, int], path: Sequence[str | int], content: Any
    ) -> None:
        """Take the part of a file that stands at ``path``."""
        self._file, self._lines, self._path = file, lines, tuple(path)
        if not isinstance(content, dict):
            self.fail(f"wanted a table, not {_shown(content)}")
        self.content: dict[str, Any] = content
        self._asked: set[str] = set()

    def fail(self, message: str, key: str | None = None) -> NoReturn:
        """Refuse the table, or what stands at a key.

        Raises:
            SpecError: Always; with file and line.
        """
        raise SpecError(f"{self.place(key)}{message}")

    def place(self, key: str | None = None) -> str:
        """File, line and name of the table, or of what stands at a key, for messages."""
        path = self._path if key is None else (*self._path, key)
        known = (path[:end] for end in range(len(path), 0, -1))
        line = next((self._lines[each] for each in known if each in self._lines), 1)
        name = ".".join(str(part) for part in path)
        return f"{self._file}:{line}: {name + ': ' if name else ''}"

    @contextlib.contextmanager
    def about(self, key: str | None = None) -> Iterator[None]:
        """Say of errors in this block where in the file their cause stands."""
        try:
            yield
        except OnnxforgeError as error:
            message = f"{self.place(key)}{error.args[0]}"
            span = (error.text, error.start, error.end) if isinstance(error, SpecError) else ()
            raise SpecError(message, *span) from None

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A text."""
        return self._value(key, default, str, "text")

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._value(key, default, bool, "true or false"))

    def whole(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number, not below zero."""
        value = self._value(key, default, int, "a whole number")
        if isinstance(value, int) and value < 0:
            self.fail(f"wanted at least 0, not {value}", key)
        return value

    def real(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number."""
        value = self._value(key, default, int | float, "a number")
        try:
            return value if value is None else float(value)
        except OverflowError:
            self.fail("wanted a number that a float holds", key)

    def texts(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        """Texts; one alone may stand without brackets."""
        value = self._value(key, default, str | list | tuple, "text or a list of text")
        found = (value,) if isinstance(value, str) else tuple(value)
        if wrong := [each for each in found if not isinstance(each, str)]:
            self.fail(f"wanted text, not {_shown(wrong[0])}", key)
        return found

    def file(self, key: str, default: str | None = None) -> Any:
        """A path, from the folder of the TOML file."""
        text = self.text(key, default)
        return None if text is None else self._path_of(text, key)

    def files(self, key: str) -> tuple[Path, ...]:
        """Paths, from the folder of the TOML file."""
        return tuple(self._path_of(text, key) for text in self.texts(key))

    def _path_of(self, text: str, key: str) -> Path:
        if "\0" in text:
            self.fail(f"{text!r} is no path", key)
        return self._file.parent / text

    def table(self, key: str) -> Table:
        """A table in this one; an empty one if it is missing."""
        self._asked.add(key)
        return self._inside(self.content.get(key, {}), key)

    def tables(self, key: str, short: str) -> list[Table]:
        """A list of tables; none if it is missing.

        Args:
            key: The list.
            short: The only key of a table that is written as a text alone.
        """
        content = self._value(key, [], list, "a list")
        full = [{short: each} if isinstance(each, str) else each for each in content]
        return [self._inside(each, key, number) for number, each in enumerate(full)]

    def entries(self) -> Iterator[tuple[str, Table]]:
        """All entries, each of which is a table."""
        for key in self.content:
            yield key, self.table(key)

    def close(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            SpecError: There is an unknown key.
        """
        for key in self.content:
            if key not in self._asked:
                hint = did_you_mean(key, sorted(self._asked))
                self.fail(f"there is no such key{hint}", key)

    def _value(self, key: str, default: Any, kind: Any, wanted: str) -> Any:
        self._asked.add(key)
        if key not in self.content:
            if default is _REQUIRED:
                self.fail(f"lacks the key {key!r}")
            return default
        value = self.content[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(f"wanted {wanted}, not {_shown(value)}", key)
        return value

    def _inside(self, content: Any, *keys: str | int) -> Table:
        return Table(self._file, self._lines, (*self._path, *keys), content)


def _shown(value: Any) -> str:
    kinds = {dict: "a table", list: "a list", bool: str(value).lower()}
    return kinds.get(type(value)) or repr(value)
