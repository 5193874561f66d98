"""What a rule is, and what it finds."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from onnxforge.lint.config import Options

__all__ = ["HEADINGS", "Finding", "Level", "Problem", "Report", "Rule"]

Level = Literal["info", "warning", "error"]

HEADINGS = ("What it does", "Why it is bad", "Example", "How to mend", "Fix")
"""What the docstring of every rule has, in this order, below its first line."""


@dataclass(frozen=True)
class Problem:
    """What a rule says about one place.

    Attributes:
        message: The reason, lower case, without a trailing stop.
        where: Path of the node or value inside the model, empty for the file as a whole.
        file: The file it is about, if that is not the model that was looked at.
        passes: The pipeline that mends it and changes no result, None if there is none.
        level: If it is not that of the rule.
    """

    message: str
    where: str = ""
    file: str | None = None
    passes: str | None = None
    level: Level | None = None


@dataclass(frozen=True)
class Rule:
    """One thing that lint looks for.

    Attributes:
        code: ``OF`` and three digits.
        name: In words, joined by hyphens.
        level: How grave it is, if the configuration does not say otherwise.
        check: Finds problems in a model or in a bundle; its docstring explains the rule.
        of: What it looks at; a model that cannot be read is for rules of bundles alone.
        reads: Whether it reads weights or whole files; such rules are left out over http.
    """

    code: str
    name: str
    level: Level
    check: Callable[[Any, Options], Iterable[Problem]]
    of: Literal["model", "bundle"] = "model"
    reads: bool = False

    @property
    def summary(self) -> str:
        """What it says, in one line."""
        return inspect.cleandoc(self.check.__doc__ or "").partition("\n")[0]

    @property
    def sections(self) -> dict[str, str]:
        """The parts of its docstring, by heading."""
        text = inspect.cleandoc(self.check.__doc__ or "")
        parts = re.split(r"^(\w[\w ]*):\n", text, flags=re.MULTILINE)[1:]
        return {
            name: inspect.cleandoc(f"\n{body}")
            for name, body in zip(parts[::2], parts[1::2], strict=True)
        }

    def matches(self, words: Iterable[str]) -> bool:
        """Whether one of some words means it: its name, its code, or how its code begins."""
        return any(word == self.name or self.code.startswith(word.upper()) for word in words)


@dataclass(frozen=True)
class Finding:
    """A problem of a file.

    Attributes:
        code: That of the rule.
        rule: Name of the rule.
        level: How grave it is.
        path: The file, as the caller would name it.
        where: Path of the node or value inside, empty for the file as a whole.
        message: The reason.
        passes: The pipeline that mends it, None if there is none.
    """

    code: str
    rule: str
    level: Level
    path: str
    where: str
    message: str
    passes: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a baseline knows it by."""
        return self.path, self.code, self.where, self.message

    def __str__(self) -> str:
        """All in one line."""
        where = f" {self.where}:" if self.where else ""
        return f"{self.path}: {self.code}{where} {self.message}"


@dataclass
class Report:
    """What lint found.

    Attributes:
        findings: By file, then by code.
        notes: What was not looked at, and why.
        models: The models that were looked at.
        known: Number of findings that the baseline has.
        fixed: What was mended, by file: the pipeline.
    """

    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()
    models: Sequence[str] = ()
    known: int = 0
    fixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing but remarks was found."""
        return all(finding.level == "info" for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each level."""
        found = Counter(finding.level for finding in self.findings)
        return {level: found[level] for level in ("error", "warning", "info")}
