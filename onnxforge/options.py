"""Options of a pass: words to the fields of its dataclass and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

from onnxforge.errors import BrokenPass, SpecError
from onnxforge.spec import OptionSpec, PassSpec, Word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)

__all__ = ["ByteSize", "coerced", "defaults", "did_you_mean", "from_spec", "to_spec"]

_UNITS: Final = {
    "GiB": 1 << 30,
    "GB": 10**9,
    "MiB": 1 << 20,
    "MB": 10**6,
    "KiB": 1 << 10,
    "KB": 10**3,
    "B": 1,
}
_FACTORS: Final = {"": 1} | {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf)")
_BOOLS: Final = {"true": True, "false": False}
_NONE: Final = Word("none")
_EMPTY: Final = Word("()")


class ByteSize(int):
    """A number of bytes that reads and prints with its unit, ``64KiB`` or ``1500MB``.

    KB, MB and GB are powers of 1000, KiB, MiB and GiB powers of 1024, upper or lower case;
    a bare number counts bytes. A fraction must give whole bytes.
    """

    def __new__(cls, value: int | str = 0) -> Self:
        """Take a number of bytes or a text.

        Raises:
            ValueError: The text is no size, the size is negative or not a whole number.
        """
        count = _count_bytes(value) if isinstance(value, str) else value
        if count < 0:
            raise ValueError("a size in bytes cannot be negative")
        return super().__new__(cls, count)

    def __str__(self) -> str:
        """The size in the largest unit that gives a whole number."""
        if not self:
            return "0B"
        unit = next(unit for unit, factor in _UNITS.items() if self % factor == 0)
        return f"{self // _UNITS[unit]:d}{unit}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self)})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A half sentence that suggests the known word nearest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_spec(cls: type[T], spec: PassSpec, text: str = "") -> T:
    """Make an instance of a dataclass from the options of a pass.

    Args:
        cls: A dataclass; the annotation of a field decides how its words are read.
        spec: The pass as parsed; its name is only used in messages.
        text: The pipeline text that ``spec`` came from, for the caret.

    Raises:
        SpecError: An option is unknown, missing or has a bad value.
        BrokenPass: A field has an annotation that no word can express.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values: dict[str, Any] = {}
    for option in spec.options:
        key = option.key.text.replace("-", "_")
        if key not in fields:
            message = f"{spec.name.text!r} has no option {option.key.text!r}"
            raise _error(message + did_you_mean(key, fields), text, option.key)
        try:
            values[key] = _read(hints[key], option.values)
        except _BadValue as error:
            span = error.words or (option.key,)
            message = f"option {option.key.text!r} of {spec.name.text!r} {error}"
            raise _error(message, text, *span) from None
    missing = [repr(n) for n, f in fields.items() if n not in values and _required(f)]
    if missing:
        message = f"{spec.name.text!r} needs the option {' and '.join(missing)}"
        raise _error(message, text, spec.name)
    try:
        return cls(**values)
    except ValueError as error:
        raise _error(f"{spec.name.text!r}: {error}", text, spec.name) from error


def to_spec(instance: DataclassInstance, full: bool = False) -> PassSpec:
    """The pass and its options as data.

    Args:
        instance: A dataclass with a ``name``.
        full: Also write the options that are at their default.

    Raises:
        BrokenPass: A field has an annotation that no word can express.
    """
    hints = typing.get_type_hints(type(instance))
    options = [
        OptionSpec(Word(field.name), _write(hints[field.name], value))
        for field in dataclasses.fields(instance)
        if field.init
        for value in [getattr(instance, field.name)]
        if full or _required(field) or value != _default(field)
    ]
    return PassSpec(Word(typing.cast("Any", instance).name), tuple(options))


def defaults(cls: type[DataclassInstance]) -> dict[str, str | None]:
    """What each option is where it is not given, as a pipeline says it; None if it must be."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: None
        if _required(field)
        else str(
            OptionSpec(Word(field.name), _write(hints[field.name], _default(field)))
        ).partition("=")[2]
        for field in dataclasses.fields(cls)
        if field.init
    }


def coerced(instance: DataclassInstance) -> dict[str, Any]:
    """The options of a pass made in Python, each of the type that its field wants.

    Lists become tuples and texts such as ``64KiB`` are read.

    Raises:
        SpecError: A value is not of the type that the field wants.
    """
    hints = typing.get_type_hints(type(instance))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        try:
            values[field.name] = _coerce(hints[field.name], value)
        except (_BadValue, AttributeError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, _BadValue) else f"cannot be {value!r}"
            name = typing.cast("Any", instance).name
            raise SpecError(f"option {field.name!r} of {name!r} {reason}") from None
    return values


def _coerce(annotation: Any, value: Any) -> Any:
    inner, _ = _without_none(annotation)
    if _element(inner) is not None:
        if isinstance(value, str):
            raise _BadValue("takes a tuple of values, not one text")
        value = tuple(value)
    text = isinstance(value, str) and inner is not str
    return _read(annotation, (Word(value),) if text else _write(annotation, value))


class _BadValue(Exception):
    """Words that the annotation of a field does not admit."""

    def __init__(self, message: str, *words: Word) -> None:
        super().__init__(message)
        self.words = words


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """How one kind of value is asked for, read from a word and written as one."""

    wanted: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]


def _read(annotation: Any, words: tuple[Word, ...]) -> Any:
    inner, optional = _without_none(annotation)
    if optional and words == (_NONE,):
        return None
    element = _element(inner)
    if element is None:
        return _read_one(inner, words)
    if words == (_EMPTY,):
        return ()
    scalar = _scalar(element)
    if not words:
        raise _BadValue(f"wants {scalar.wanted}, or several separated by commas")
    return tuple(_read_word(scalar, word) for word in words)


def _read_one(annotation: Any, words: tuple[Word, ...]) -> Any:
    scalar = _scalar(annotation)
    if not words and annotation is bool:
        return True
    if not words:
        raise _BadValue(f"wants {scalar.wanted}, not a bare flag")
    if len(words) > 1:
        raise _BadValue(f"takes one value, not {len(words)}", words[0], words[-1])
    return _read_word(scalar, words[0])


def _read_word(scalar: _Scalar, word: Word) -> Any:
    try:
        return scalar.read(word.text)
    except ValueError:
        raise _BadValue(f"wants {scalar.wanted}, not {word.text!r}", word) from None


def _write(annotation: Any, value: Any) -> tuple[Word, ...]:
    inner, optional = _without_none(annotation)
    if value is None and optional:
        return (_NONE,)
    element = _element(inner)
    scalar = _scalar(inner if element is None else element)
    if element is None:
        value = (value,)
    words = tuple(Word(scalar.write(item)) for item in value) or (_EMPTY,)
    # Quotes tell the string from the bare word that means None or the empty tuple.
    if (optional and words == (_NONE,)) or (element and value and words == (_EMPTY,)):
        return (Word(words[0].text, quoted=True),)
    return words


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) in {types.UnionType, typing.Union}:
        inner = [arg for arg in typing.get_args(annotation) if arg is not types.NoneType]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


def _element(annotation: Any) -> Any:
    """``T`` of ``tuple[T, ...]``, None for anything else."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and args[1:] == (...,):
        return args[0]
    return None


def _scalar(annotation: Any) -> _Scalar:
    if typing.get_origin(annotation) is Literal:
        members = {_spell(member): member for member in typing.get_args(annotation)}
        return _Scalar(" or ".join(members), lambda text: _lookup(members, text), _spell)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    raise BrokenPass(f"no word of a pipeline can express an option of type {annotation}")


def _spell(member: Any) -> str:
    return member if isinstance(member, str) else str(member).lower()


def _lookup(members: Mapping[str, Any], text: str) -> Any:
    if text not in members:
        raise ValueError
    return members[text]


def _read_int(text: str) -> int:
    if not _INT.fullmatch(text):
        raise ValueError
    return int(text)


def _read_float(text: str) -> float:
    # No nan: it differs from itself, and a pass must equal the pass its text stands for.
    number = float(text) if _FLOAT.fullmatch(text) else math.nan
    if math.isnan(number) or (math.isinf(number) and "inf" not in text):
        raise ValueError
    return number


def _count_bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size such as 64KiB or 1.5GB")
    count = Fraction(match[1]) * factor
    if count.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(count)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _error(message: str, text: str, first: Word, last: Word | None = None) -> SpecError:
    return SpecError(message, text, first.start, (last or first).end)


_SCALARS: Final[Mapping[Any, _Scalar]] = {
    int: _Scalar("a whole number", _read_int, lambda value: str(int(value))),
    float: _Scalar("a number", _read_float, lambda value: repr(float(value))),
    bool: _Scalar("true or false", lambda text: _lookup(_BOOLS, text), _spell),
    str: _Scalar("a word", str, str),
    ByteSize: _Scalar(
        "whole bytes, such as 64KiB or 1.5GB", ByteSize, lambda value: str(ByteSize(value))
    ),
}
