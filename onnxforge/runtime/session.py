"""Running a model on onnxruntime, in a process of its own: it crashes on some models."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxforge.errors import OnnxforgeError, RuntimeFailed, SpecError

__all__ = ["ArrayFile", "Level", "Session", "Setup", "read_all", "run", "write_all"]

Level = Literal["all", "extended", "basic", "none"]

_CHILD = Path(__file__).with_name("child.py")
_LEVELS: Mapping[Level, str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}


@dataclass(frozen=True)
class Setup:
    """How a model is run.

    Attributes:
        providers: Execution providers, the preferred first.
        threads: Threads that work on one operator; 0 leaves it to the runtime.
        optimization: Which rewritings of the graph the runtime may do.
        python: The interpreter whose onnxruntime runs it, Python 3.11 or newer.
        timeout: Seconds that loading, or one run, may take before the process is killed; None
            for no limit.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int = 1
    optimization: Level = "all"
    python: str = sys.executable
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            SpecError: ``threads`` is negative, or ``timeout`` not positive, or endless.
        """
        if self.threads < 0:
            raise SpecError(f"threads: wanted at least 0, not {self.threads}")
        if self.timeout is not None and not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise SpecError(
                f"timeout: wanted a positive number of seconds, not {self.timeout}"
            )


@dataclass(frozen=True)
class ArrayFile:
    """An array on disk.

    Attributes:
        path: A .npy file; types that numpy lacks are in it as unsigned integers.
        dtype: Type of the elements.
    """

    path: Path
    dtype: ir.DataType

    @classmethod
    def write(cls, path: Path, array: np.ndarray) -> ArrayFile:
        """Write an array.

        Raises:
            OnnxforgeError: There is no room.
        """
        dtype = ir.DataType.from_numpy(array.dtype)
        try:
            np.save(path, array.view(f"u{array.itemsize}") if _is_foreign(dtype) else array)
        except OSError as error:
            why = error.strerror or error
            raise OnnxforgeError(f"{path}: {why}; TMPDIR may name another folder") from None
        return cls(path, dtype)

    def open(self) -> np.ndarray:
        """Map the array; the pages that were read stay in memory until it is dropped."""
        return np.asarray(np.load(self.path, mmap_mode="r")).view(self.dtype.numpy())


def _is_foreign(dtype: ir.DataType) -> bool:
    return dtype.numpy().isbuiltin != 1


class Session:
    """A model that is open in a child process, for a ``with`` block.

    Attributes:
        version: Version of onnxruntime.
        providers: The execution providers that are really used.
        load_seconds: How long the model took to load.
        run_seconds: How long each run took.
        peak_memory: Most bytes the process had resident so far.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        setup: Setup | None = None,
        *,
        data: Path | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            model: The model file.
            folder: Where outputs go; no other session may write there.
            setup: How to run it.
            data: Folder that the model's data files are found from, if not its own.

        Raises:
            RuntimeFailed: onnxruntime is missing.
        """
        setup = setup or Setup()
        if setup.python == sys.executable and importlib.util.find_spec("onnxruntime") is None:
            raise RuntimeFailed("onnxruntime is missing: pip install onnxruntime")
        self._model = model.absolute()
        self._folder = folder
        self._setup = setup
        self._data = data
        self.version: str | None = None
        self.providers: tuple[str, ...] = ()
        self.load_seconds: float | None = None
        self.run_seconds: list[float] = []
        self.peak_memory: int | None = None
        self._too_late = False

    def __enter__(self) -> Session:
        """Load the model.

        Raises:
            RuntimeFailed: onnxruntime raised, crashed or hung; the message says which.
        """
        setup = self._setup
        self._words = (self._folder / "stderr.txt").open("w+", encoding="utf-8")
        try:
            self._child = subprocess.Popen(
                [setup.python, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                cwd=self._data,
                encoding="utf-8",
            )
        except OSError as error:
            self._words.close()
            raise RuntimeFailed(f"{setup.python}: {error.strerror}") from None
        answer = self._ask(
            model=str(self._model),
            from_memory=self._data is not None,
            providers=setup.providers,
            threads=setup.threads,
            level=_LEVELS[setup.optimization],
        )
        self.version = answer["version"]
        self.providers = tuple(answer["providers"])
        self.load_seconds = answer["seconds"]
        return self

    def run(self, feeds: Mapping[str, ArrayFile]) -> dict[str, ArrayFile]:
        """Run the model once.

        Args:
            feeds: Value of each input.

        Returns:
            Value of each output that is a tensor of numbers.

        Raises:
            RuntimeFailed: onnxruntime raised, crashed or hung.
        """
        prefix = self._folder / f"{len(self.run_seconds)}-"
        answer = self._ask(
            prefix=str(prefix.absolute()),
            feeds={
                name: (
                    str(file.path.absolute()),
                    file.dtype.value if _is_foreign(file.dtype) else 0,
                )
                for name, file in feeds.items()
            },
        )
        self.run_seconds.append(answer["seconds"])
        return {
            name: ArrayFile(Path(path), ir.DataType[kind.upper()])
            for name, (path, kind) in answer["outputs"].items()
        }

    def __exit__(self, *exception: object) -> None:
        """End the process."""
        self._child.kill()
        self._child.communicate()
        self._words.close()

    def _ask(self, **order: Any) -> dict[str, Any]:
        with self._limited():
            answer = self._answer(json.dumps(order))
        self.peak_memory = answer.get("peak", self.peak_memory)
        if "error" in answer:
            self.__exit__()
            raise RuntimeFailed(answer["error"])
        return answer

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Kill the process if the block takes longer than is allowed."""
        if self._setup.timeout is None:
            yield
            return
        timer = threading.Timer(self._setup.timeout, self._kill_late)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill_late(self) -> None:
        self._too_late = True
        self._child.kill()

    def _answer(self, order: str) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(order + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it died, and may have said why
        line = self._child.stdout.readline()
        return dict(json.loads(line)) if line else {"error": self._epitaph()}

    def _epitaph(self) -> str:
        code = self._child.wait()
        if self._too_late:
            what = "load the model" if self.load_seconds is None else "end the run"
            return f"onnxruntime did not {what} in {self._setup.timeout:g} s and was killed"
        self._words.seek(0)
        said = [line.strip() for line in self._words if line.strip()]
        if code >= 0:
            return said[-1] if said else "onnxruntime failed"
        last = f": {said[-1]}" if said else ""
        return f"onnxruntime died with {signal.Signals(-code).name}{last}"


def write_all(
    folder: Path, prefix: str, arrays: Mapping[str, np.ndarray]
) -> dict[str, ArrayFile]:
    """Write arrays into a folder, as files whose names begin with a prefix."""
    numbered = enumerate(arrays.items())
    return {
        k: ArrayFile.write(folder / f"{prefix}{i}.npy", array) for i, (k, array) in numbered
    }


def read_all(files: Mapping[str, ArrayFile]) -> dict[str, np.ndarray]:
    """Read arrays into memory."""
    return {name: np.array(file.open()) for name, file in files.items()}


def run(model: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a model on the installed onnxruntime, processor only, on one thread.

    Args:
        model: The model file.
        inputs: Value of each input.

    Returns:
        Value of each output that is a tensor of numbers.

    Raises:
        RuntimeFailed: onnxruntime is missing, raised, or crashed; the message says which.
    """
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as name:
        feeds = write_all(Path(name), "in", inputs)
        with Session(model, Path(name)) as session:
            return read_all(session.run(feeds))
