"""Everything that onnxforge raises on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxforge.core import Finding
    from onnxforge.manager import Report

__all__ = [
    "BrokenPass",
    "CheckFailed",
    "ModelError",
    "OnnxforgeError",
    "Refused",
    "RuntimeFailed",
    "SpecError",
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
        return "\n".join([super().__str__(), *(f"  {finding}" for finding in self.findings)])


class BrokenPass(OnnxforgeError):
    """A pass broke its own law: our bug, or the bug of whoever wrote the pass."""
