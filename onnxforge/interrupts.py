"""Signals that end a command unwind it, so that its temporary files go."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ["Interrupted", "interruptible"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is unknown on Windows
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_CLEANING_SECONDS = 5.0  # in which another signal does not break off the cleaning


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        exit_code: What a shell says of a command that the signal ended.
    """

    def __init__(self, number: int) -> None:
        """Take the number of the signal."""
        super().__init__()
        self.exit_code = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in this block when a signal asks to end.

    What whoever started us wants ignored, as nohup does, stays ignored. Python handles
    signals in the main thread; in others this does nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS if in_main}
    before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    came: float | None = None

    def unwind(number: int, frame: FrameType | None) -> None:
        nonlocal came
        now = time.monotonic()
        if came is not None and now < came + _CLEANING_SECONDS:
            return
        if _loads_modules(frame):
            os._exit(128 + number)
        came = now
        raise Interrupted(number)

    try:
        for number in before:
            signal.signal(number, unwind)
        yield
    finally:
        if came is None:  # otherwise the process is about to end, and is not to be disturbed
            for number, old in before.items():
                signal.signal(number, old)


def _loads_modules(frame: FrameType | None) -> bool:
    """Whether an exception would make a module crash that is just being loaded, as some do.

    Modules are loaded before anything is written, so that there is nothing to clean then.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
