"""Pipeline text to data and back; every word remembers where it stood."""

from __future__ import annotations

import dataclasses
import re
from typing import NoReturn

from onnxforge.errors import SpecError

__all__ = ["OptionSpec", "PassSpec", "Pipeline", "Word", "parse"]

_BARE = re.compile(r'[^\s{}=,";]+')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_BLANK = re.compile(r"\s*")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_MARKS = "{}=,"


@dataclasses.dataclass(frozen=True)
class Word:
    r"""A bare or quoted word; ``"none"`` and ``none`` are different words.

    Inside quotes ``\"`` stands for a quote and ``\\`` for a backslash.

    Attributes:
        text: What the word says, without quotes and escapes.
        quoted: Whether it is written in quotes; text that needs quotes always is.
        start: Index of its first character in the pipeline text.
        end: Index behind its last character.
    """

    text: str
    quoted: bool = False
    start: int = dataclasses.field(default=0, compare=False, repr=False)
    end: int = dataclasses.field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not _BARE.fullmatch(self.text):
            object.__setattr__(self, "quoted", True)

    def __str__(self) -> str:
        if not self.quoted:
            return self.text
        return '"' + self.text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclasses.dataclass(frozen=True)
class OptionSpec:
    """One option: its key and its values, no values for a bare flag."""

    key: Word
    values: tuple[Word, ...] = ()

    def __str__(self) -> str:
        if not self.values:
            return str(self.key)
        return f"{self.key}={','.join(map(str, self.values))}"


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """One pass: its name and its options."""

    name: Word
    options: tuple[OptionSpec, ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return str(self.name)
        return f"{self.name}{{{' '.join(map(str, self.options))}}}"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run, at least one."""

    passes: tuple[PassSpec, ...]

    def __post_init__(self) -> None:
        if not self.passes:
            raise SpecError("the pipeline is empty")

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))


def parse(text: str) -> Pipeline:
    """Read a pipeline text; whether its passes and options exist is not looked at.

    Args:
        text: For example ``fp16w{min_bytes=64KiB},assert-pure``.

    Raises:
        SpecError: The text is not a pipeline; the error points at the offending characters.
    """
    return _Parser(text).pipeline()


@dataclasses.dataclass(frozen=True)
class _Mark:
    """One of ``{ } = ,``, or an empty mark for the end of the text."""

    text: str
    start: int
    end: int


class _Parser:
    """Recursive descent over the tokens of one text, one token ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.next: Word | _Mark = self.scan(0)

    def pipeline(self) -> Pipeline:
        if self.at(""):
            self.fail("the pipeline is empty")
        passes = [self.one_pass()]
        while not self.at(""):
            if not self.at(","):
                self.fail(f"wanted ',' between passes, not {self.seen()}")
            self.advance()
            passes.append(self.one_pass())
        return Pipeline(tuple(passes))

    def one_pass(self) -> PassSpec:
        name = self.word("the name of a pass")
        if not self.at("{"):
            return PassSpec(name)
        brace = self.advance()
        options: dict[str, OptionSpec] = {}
        while not self.at("}"):
            if self.at(""):
                self.fail("this brace is never closed", brace)
            option = self.option()
            key = option.key.text.replace("-", "_")
            if key in options:
                self.fail(f"option {option.key.text!r} is given twice", option.key)
            options[key] = option
        self.advance()
        if self.at("{"):
            self.fail(
                f"{name.text!r} already has its options; write them in one pair of braces"
            )
        return PassSpec(name, tuple(options.values()))

    def option(self) -> OptionSpec:
        if self.at(","):
            self.fail("options are separated by blanks; wanted an option, not ','")
        key = self.word("an option")
        if not self.at("="):
            return OptionSpec(key)
        self.advance()
        values = [self.word(f"a value for {key.text!r}")]
        while self.at(","):
            self.advance()
            values.append(self.word(f"a value for {key.text!r}"))
        if self.at("="):
            self.fail("options are separated by blanks, commas only make lists")
        return OptionSpec(key, tuple(values))

    def word(self, wanted: str) -> Word:
        token = self.next
        if not isinstance(token, Word):
            self.fail(f"wanted {wanted}, not {self.seen()}")
        self.advance()
        if isinstance(self.next, Word) and self.next.start == token.end:
            self.fail("two words need a blank between them", self.next)
        return token

    def at(self, mark: str) -> bool:
        return isinstance(self.next, _Mark) and self.next.text == mark

    def advance(self) -> Word | _Mark:
        token = self.next
        self.next = self.scan(token.end)
        return token

    def seen(self) -> str:
        return repr(self.next.text) if self.next.text else "the end"

    def scan(self, index: int) -> Word | _Mark:
        blank = _BLANK.match(self.text, index)
        start = blank.end() if blank else index
        char = self.text[start : start + 1]
        if not char or char in _MARKS:
            return _Mark(char, start, start + len(char))
        if char == '"':
            return self.scan_quoted(start)
        bare = _BARE.match(self.text, start)
        if bare is None:
            self.fail(f"{char!r} must be quoted", _Mark(char, start, start + 1))
        return Word(bare[0], False, start, bare.end())

    def scan_quoted(self, start: int) -> Word:
        quoted = _QUOTED.match(self.text, start)
        if quoted is None:
            self.fail("this quote is never closed", _Mark('"', start, start + 1))
        for escape in _ESCAPE.finditer(self.text, start + 1, quoted.end() - 1):
            if escape[1] not in '"\\':
                here = _Mark(escape[0], escape.start(), escape.end())
                self.fail("write \\\\ for a backslash inside quotes", here)
        return Word(_ESCAPE.sub(r"\1", quoted[1]), True, start, quoted.end())

    def fail(self, message: str, at: Word | _Mark | None = None) -> NoReturn:
        token = at or self.next
        raise SpecError(message, self.text, token.start, token.end)
