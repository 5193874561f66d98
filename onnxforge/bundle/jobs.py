"""Running pieces of work on an executor, as many at a time as fit into memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any

from onnxforge.bundle.tasks import Pulse, still
from onnxforge.errors import OnnxforgeError, from_system
from onnxforge.postponed import run_postponed

__all__ = ["Job", "Queue", "machine_memory"]


def machine_memory() -> int | None:
    """How much memory the machine has, in bytes; None where nobody tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@dataclass(frozen=True)
class Job:
    """A piece of work, and what follows from it.

    Attributes:
        task: What is run, perhaps in another process.
        memory: How many bytes it should take at most.
        then: Is told the result, in the process and thread of the queue.
        failed: Is told the error, likewise.
    """

    task: Callable[[Pulse], Any]
    memory: int
    then: Callable[[Any], None]
    failed: Callable[[OnnxforgeError], None]


class Queue:
    """Jobs to be run, which may add others when they are done."""

    def __init__(
        self, executor: Executor, max_memory: int | None = None, pulse: Pulse = still
    ) -> None:
        """Take what runs the jobs.

        Args:
            executor: Where they run.
            max_memory: What the jobs that run at a time may take together. One that takes
                more by itself runs alone.
            pulse: Handed to each task.
        """
        self._executor = executor
        self._limit = max_memory
        self._pulse = pulse
        self._waiting: list[Job] = []
        self._running: dict[Future[Any], Job] = {}

    def add(self, job: Job) -> None:
        """Add a job."""
        self._waiting.append(job)

    def run(self) -> None:
        """Run all jobs until there are no more.

        Raises:
            Exception: A task raised what is no error of a user.
        """
        try:
            while self._waiting or self._running:
                self._start()
                done, _ = wait(self._running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._end(self._running.pop(future), future)
        finally:
            for future in self._running:
                future.cancel()

    def _start(self) -> None:
        run_postponed()  # before there are threads
        taken = sum(job.memory for job in self._running.values())
        left = []
        for job in self._waiting:
            fits = self._limit is None or taken + job.memory <= self._limit
            if fits or not self._running:
                self._running[self._executor.submit(job.task, self._pulse)] = job
                taken += job.memory
            else:
                left.append(job)
        self._waiting = left

    def _end(self, job: Job, future: Future[Any]) -> None:
        try:
            with from_system():
                job.then(future.result())
        except OnnxforgeError as error:
            job.failed(error)
