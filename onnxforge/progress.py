"""A bar on stderr for work that takes its time."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["progress"]


class _Phases:
    """Shows which pass runs."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def before(self, step: Any, model: Any) -> None:
        self._show(step.name)

    def after(self, step: Any, result: Any) -> None:
        self._show("writing")

    def failed(self, step: Any, error: Exception) -> None:
        self._show(f"{step.name} failed")


@contextlib.contextmanager
def progress(name: str) -> Iterator[tuple[_Phases, Callable[[int, int], None]]]:
    """A bar for work of more than a second, on a terminal only.

    Args:
        name: What is worked on.

    Yields:
        An observer for a PassManager, and what is told of bytes written.
    """
    if not sys.stderr.isatty():
        yield _Phases(lambda phase: None), lambda written, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(name, total=None)
    timer = threading.Timer(1.0, bar.start)
    timer.start()

    def show(phase: str) -> None:
        bar.update(task, description=f"{name}: {phase}")

    def advance(written: int, total: int) -> None:
        bar.update(task, advance=written, total=total)

    try:
        yield _Phases(show), advance
    finally:
        timer.cancel()
        bar.stop()
