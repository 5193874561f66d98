"""Loading and running a model on the installed runtime, to see whether it does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onnxforge import model_io
from onnxforge.compare.drawing import drawn
from onnxforge.errors import DataError, Refused, RuntimeFailed
from onnxforge.runtime.session import Session, Setup, write_all

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

__all__ = ["Trial", "tried"]

Outcome = Literal["runs", "loads", "does not load", "does not run"]


@dataclass(frozen=True)
class Trial:
    """What became of a model on the installed runtime.

    Attributes:
        version: Version of onnxruntime, None where it did not get so far as to tell.
        providers: The execution providers that were really used.
        outcome: ``runs``; ``loads`` where no inputs could be made for it.
        message: What the runtime said, or why no inputs could be made.
    """

    version: str | None
    providers: tuple[str, ...]
    outcome: Outcome
    message: str = ""

    @property
    def failed(self) -> bool:
        """Whether it did not load or run."""
        return self.outcome.startswith("does not")


def tried(path: Path, setup: Setup | None = None) -> Trial:
    """Load a model in a child process and run it once on inputs drawn at random.

    Raises:
        ModelError: The model cannot be read.
        RuntimeFailed: onnxruntime is not installed.
    """
    feeds = _feeds(model_io.load(path, editable=False))
    why_not = feeds if isinstance(feeds, str) else ""
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
        session = Session(path, Path(folder), setup)
        try:
            _run(session, None if isinstance(feeds, str) else feeds, Path(folder))
        except RuntimeFailed as error:
            outcome: Outcome = "does not run" if session.version else "does not load"
            return Trial(session.version, session.providers, outcome, str(error))
    return Trial(session.version, session.providers, "loads" if why_not else "runs", why_not)


def _run(session: Session, feeds: dict[str, np.ndarray] | None, folder: Path) -> None:
    with session:
        if feeds is not None:
            session.run(write_all(folder, "in", feeds))


def _feeds(model: ir.Model) -> dict[str, np.ndarray] | str:
    try:
        return dict(next(drawn(model, 1)).feeds)
    except (DataError, Refused) as error:
        return str(error)
