"""Everything that onnxforge raises on purpose."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from onnxforge.core import Finding
    from onnxforge.manager import Report

__all__ = [
    "BrokenPass",
    "CheckFailed",
    "DataError",
    "ModelError",
    "OnnxforgeError",
    "Refused",
    "RuntimeFailed",
    "SpecError",
    "about",
    "from_system",
    "said",
]


class OnnxforgeError(Exception):
    """Base of all errors a user can cause and mend; the command line prints one message."""


class SpecError(OnnxforgeError, ValueError):
    """A pipeline text, a pass name or an option is wrong.

    Attributes:
        text: The whole pipeline text, empty when the error is not about a text.
        start: Index of the first offending character of ``text``.
        end: Index behind the last offending character of ``text``.
    """

    def __init__(self, message: str, text: str = "", start: int = 0, end: int = 0) -> None:
        """Keep the message and the span it is about."""
        super().__init__(message)
        self.text = text
        self.start = start
        self.end = end

    def __str__(self) -> str:
        """The message, and below it the text with carets under the span."""
        message = super().__str__()
        if not self.text:
            return message
        carets = " " * self.start + "^" * max(1, self.end - self.start)
        return f"{message}\n  {self.text}\n  {carets}"


class ModelError(OnnxforgeError):
    """A model cannot be read or written; the message names the file and the tensor."""


class DataError(OnnxforgeError):
    """Samples cannot be read or do not fit a model; the message names file and input."""


class Refused(OnnxforgeError):
    """A pass declines this model; the message gives node, reason and the way out."""


class RuntimeFailed(OnnxforgeError):
    """onnxruntime is missing, does not load or run a model, or died of it."""


class CheckFailed(OnnxforgeError):
    """A check says no.

    Attributes:
        findings: What it found, one entry for each offence.
        report: The whole run up to here, when a PassManager ran the check.
    """

    report: Report | None = None

    def __init__(self, message: str, findings: Sequence[Finding]) -> None:
        """Keep the findings beside the summary."""
        super().__init__(message)
        self.findings = tuple(findings)

    def __str__(self) -> str:
        """The summary and one line for each finding."""
        lines = [super().__str__(), *(f"  {finding}" for finding in self.findings)]
        return "\n".join(map(printable, lines))


class BrokenPass(OnnxforgeError):
    """A pass broke its own law: our bug, or the bug of whoever wrote the pass."""


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Put the file that work is about in front of the errors of that work."""
    try:
        yield
    except OnnxforgeError as error:
        # Errors about files name them already, by their whole path.
        named = isinstance(error, ModelError) and str(error).startswith(path.absolute().anchor)
        if not named:
            error.args = (f"{path}: {error.args[0]}", *error.args[1:])
        raise


def said(error: OSError) -> str:
    """What the system says, and of which file."""
    where = error.filename2 or error.filename
    return f"{where}: {error.strerror}" if where else str(error)


@contextlib.contextmanager
def from_system() -> Iterator[None]:
    """Tell what the system refuses, such as a full disk, as what a user can mend."""
    try:
        yield
    except OSError as error:
        raise OnnxforgeError(said(error)) from None
