"""Pieces of work: no more at a time than memory allows; files on their way to their places."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxforge import save
from onnxforge.bundle.jobs import Job, Queue, machine_memory
from onnxforge.bundle.place import move_file, move_models
from onnxforge.errors import DataError, OnnxforgeError
from onnxforge.model_io import load
from support import oracle, pairs


class Meter:
    """Counts what runs at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = 0

    def work(self, size: int) -> Callable[[Any], int]:
        def task(pulse: Callable[[], None]) -> int:
            pulse()
            with self.lock:
                self.now += size
                self.most = max(self.most, self.now)
            threading.Event().wait(0.01)
            with self.lock:
                self.now -= size
            return size

        return task


def test_jobs_fit_into_memory_and_one_that_does_not_runs_alone() -> None:
    meter, done = Meter(), []
    with ThreadPoolExecutor(8) as pool:
        queue = Queue(pool, 5)
        for size in [2, 3, 1, 9, 4, 1, 2]:
            queue.add(Job(meter.work(size), size, done.append, pytest.fail))
        queue.run()
    assert sorted(done) == [1, 1, 2, 2, 3, 4, 9]
    assert meter.most == 9, "the large one ran, and nothing beside it"


def test_without_a_limit_all_run_at_once() -> None:
    barrier = threading.Barrier(3, timeout=30)
    done: list[int] = []

    def task(pulse: object) -> int:
        return barrier.wait()

    with ThreadPoolExecutor(3) as pool:
        queue = Queue(pool)
        for _ in range(3):
            queue.add(Job(task, 10**12, done.append, pytest.fail))
        queue.run()
    assert sorted(done) == [0, 1, 2]


def test_errors_of_users_are_told_and_others_end_it() -> None:
    def bad(pulse: object) -> None:
        raise DataError("no")

    def worse(pulse: object) -> None:
        raise ZeroDivisionError

    failed: list[OnnxforgeError] = []
    with ThreadPoolExecutor(1) as pool:
        queue = Queue(pool)
        queue.add(Job(bad, 1, pytest.fail, failed.append))
        queue.run()
        assert [str(error) for error in failed] == ["no"]
        queue.add(Job(worse, 1, pytest.fail, failed.append))
        with pytest.raises(ZeroDivisionError):
            queue.run()


def test_the_pulse_reaches_the_work() -> None:
    def stop() -> None:
        raise OnnxforgeError("ended")

    failed: list[OnnxforgeError] = []
    with ThreadPoolExecutor(1) as pool:
        queue = Queue(pool, pulse=stop)
        queue.add(Job(Meter().work(1), 1, pytest.fail, failed.append))
        queue.run()
    assert [str(error) for error in failed] == ["ended"]


def test_the_machine_has_memory() -> None:
    memory = machine_memory()
    assert memory is None or memory > 1 << 27


def staged(folder: Path, ending: str) -> Path:
    """A model with a data file, in a folder."""
    folder.mkdir(parents=True)
    pairs.saved(folder / "source.onnx", pairs.model(ending))
    save(load(folder / "source.onnx"), folder / "m.onnx", layout="sidecar")
    (folder / "source.onnx").unlink()
    return folder


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", range(1, 9))
def test_a_crash_while_models_are_moved_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    old, new = "logits = Identity(made)", "logits = Neg(made)"
    move_models(staged(tmp_path / "a", old), tmp_path / "out", ["m.onnx"], ["m.onnx_data"])
    source = staged(tmp_path / "b", new)
    expected = [(source / name).read_bytes() for name in ("m.onnx", "m.onnx_data")]
    right, count = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == step:
            raise Crash
        return right(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    crashed = False
    try:
        move_models(source, tmp_path / "out", ["m.onnx"], ["m.onnx_data"])
    except Crash:
        crashed = True
    monkeypatch.undo()
    x = {"x": pairs.sample()}
    seen = oracle.run(tmp_path / "out/m.onnx", x)["logits"]
    sign = [oracle.run(pairs.model(ending), x)["logits"] for ending in (old, new)]
    assert any(seen.tobytes() == each.tobytes() for each in sign)
    onnx.checker.check_model(str(tmp_path / "out/m.onnx"))
    if not crashed:
        out = [(tmp_path / "out" / name).read_bytes() for name in ("m.onnx", "m.onnx_data")]
        assert out == expected
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "m.onnx",
            "m.onnx_data",
        ]


def test_a_file_that_cannot_be_moved_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    (tmp_path / "a").write_text("x")
    monkeypatch.setattr("onnxforge.bundle.place.copy_file", full)
    with pytest.raises(OnnxforgeError, match="No space left"):
        move_file(tmp_path / "a", tmp_path / "b/c")
    assert not list((tmp_path / "b").iterdir())


def test_a_linked_file_that_is_there_already(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("x")
    for _ in range(2):
        move_file(source, tmp_path / "b/c", link=True)
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["c"]
        assert (tmp_path / "b/c").stat().st_ino == source.stat().st_ino
    with pytest.raises(OnnxforgeError, match=r"none: No such file"):
        move_file(tmp_path / "none", tmp_path / "d")
