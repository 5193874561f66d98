"""The words every pass is written in: Pass, Effect, Result, Finding."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from onnxforge.options import coerced, to_spec

if TYPE_CHECKING:
    import os

    from onnxforge.spec import PassSpec

__all__ = ["FILES", "Effect", "Fate", "Finding", "Pass", "Result"]

FILES = "onnxforge.files"
"""Key of ``ir.Model.meta`` under which a pass finds what the files it names hold."""


class Effect(enum.Enum):
    """What a pass may do; it selects the laws that the pass is held to."""

    CHECK = "check"
    """Reads; the model's digest is the same afterwards."""

    LAYOUT = "layout"
    """Moves bytes; every payload and the graph stay the same."""

    STORAGE = "storage"
    """Stores weights in another form; bit-equal to the parent with the decoded weights."""

    APPROX = "approx"
    """Changes arithmetic; each rewritten node equals an independent reference of it."""


class Fate(enum.Enum):
    """What became of a weight."""

    TREATED = "treated"
    EXCLUDED = "excluded"
    SKIPPED = "skipped"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a pass has to say about one place of a model.

    Attributes:
        code: Stable code, ``OF`` and three digits; ``onnxforge explain CODE`` tells more.
        where: Path of the node or weight inside the model.
        message: The reason, lower case, without a trailing stop; the same for all alike.
        nbytes: Size in bytes of the weight this is about, 0 for other findings.
        fate: What became of the weight or product, None for other findings.
        level: ``info``, ``warning`` or ``error``.
        detail: What is special to this place, such as the value that does not fit.
        op: The operator, if this is about a node that the pass could have rewritten.
    """

    code: str
    where: str
    message: str
    nbytes: int = 0
    fate: Fate | None = None
    level: str = "info"
    detail: str = ""
    op: str = ""

    def __str__(self) -> str:
        """Code, place and reason in one line."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.code} {self.where}: {self.message}{detail}"


@dataclasses.dataclass
class Result(ir.passes.PassResult):
    """What a pass gives back.

    Attributes:
        model: The model, the same object that went in.
        modified: Whether anything in the model differs from before.
        stats: Numbers worth a line in the summary, by name.
        findings: One entry for each weight and for each remark.
        decoded: Of a pass that stores weights in another form: what their stored values
            decode to, by the path of the weight.
        again: Whether the pass could do more after a later one; then it runs again once such
            a pass has changed the model.
        retyped: Inputs and outputs of the model that have another type of elements now, by
            name; nothing else of the interface may change.
    """

    stats: Mapping[str, int] = dataclasses.field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    decoded: Mapping[str, ir.TensorProtocol] = dataclasses.field(default_factory=dict)
    again: bool = False
    retyped: Mapping[str, ir.DataType] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pass(ir.passes.PassBase):
    """Base of all passes: a frozen dataclass whose fields are its options.

    A subclass sets ``name`` (its module name in kebab-case), ``effect`` and ``codes``, and
    defines ``call``. It does no I/O, prints nothing and keeps no state. It is a pass of
    onnx_ir as well and runs in onnx_ir's own managers.

    Attributes:
        name: The word that stands for the pass in a pipeline text.
        effect: What the pass may do.
        codes: What each finding code of the pass means.
        files: Names of the options that name files, of statistics or of samples. They are read
            before the pass runs, which gets what they hold by `onnxforge.known.handed`.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    codes: ClassVar[Mapping[str, str]] = {}
    files: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Give every option the type of its field.

        Raises:
            SpecError: An option has a value that its field does not admit.
        """
        for name, value in coerced(self).items():
            object.__setattr__(self, name, value)

    @property
    def in_place(self) -> bool:
        """Every pass returns the model object it was given."""
        return True

    @property
    def changes_input(self) -> bool:
        """Only checks leave the model alone."""
        return self.effect is not Effect.CHECK

    @abc.abstractmethod
    def call(self, model: ir.Model) -> Result:
        """Run the pass on ``model``, in place."""

    def apply(self, model: Any, base_dir: str | os.PathLike[str] | None = None) -> Any:
        """Run this one pass; see ``PassManager.apply``."""
        from onnxforge.manager import PassManager

        return PassManager([self]).apply(model, base_dir)

    def spec(self, *, full: bool = False) -> PassSpec:
        """The pass and its options as data; ``full`` also writes options at their default."""
        return to_spec(self, full=full)

    def __str__(self) -> str:
        """The pipeline text of this pass, options at their default left out."""
        return str(self.spec())
