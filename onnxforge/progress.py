"""A bar on stderr for work that takes its time."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["counted", "progress"]


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

    def show(phase: str) -> None:
        bar.update(task, description=f"{name}: {phase}")

    def advance(written: int, total: int) -> None:
        bar.update(task, advance=written, total=total)

    with _shown(bar):
        yield _Phases(show), advance


@contextlib.contextmanager
def counted(name: str, things: str) -> Iterator[Callable[[int], None]]:
    """A count for work of more than a second, on a terminal only.

    Args:
        name: What is worked on.
        things: What is counted.

    Yields:
        What is told how many there are so far.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    text = TextColumn(
        "{task.description}: {task.completed} {task.fields[things]}", markup=False
    )
    bar = Progress(SpinnerColumn(), text, console=Console(stderr=True), transient=True)
    task = bar.add_task(printable(name), total=None, things=things)
    with _shown(bar):
        yield lambda done: bar.update(task, completed=done)


@contextlib.contextmanager
def _shown(bar: Any) -> Iterator[None]:
    timer = threading.Timer(1.0, bar.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        bar.stop()
