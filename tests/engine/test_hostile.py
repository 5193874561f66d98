"""Every row of the hostile table is refused in one line, whatever command meets it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if os.name == "nt":
    pytest.skip("links, pipes and forks of POSIX", allow_module_level=True)

from onnxforge import PassManager, manager, report
from onnxforge.errors import ModelError
from onnxforge.inspection import inspect
from onnxforge.lazy import DataFile
from support import fixtures, forked, hostile, payload
from support.forked import Done, Server
from support.hostile import REFUSED, WORKS, Refused, Works, objection

COMMANDS = ("run", "inspect", "api")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Runs commands one after the other, each in a process."""
    with contextlib.closing(Server()) as found:
        yield found


def words(command: str, path: Path, target: Path) -> list[str]:
    if command == "inspect":
        return ["inspect", str(path)]
    before = ["run", "--passes", "fp16w"] if command == "run" else ["api"]
    return [*before, str(path), str(target)]


def snapshot(folder: Path) -> dict[Path, object]:
    """All that is in a folder; what cannot be read or is a pipe is not opened."""

    def content(path: Path) -> object:
        if path.is_symlink():
            return path.readlink()
        is_read = path.is_file() and os.access(path, os.R_OK)
        return path.read_bytes() if is_read else path.stat().st_mode

    return {path: content(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused_in_a_line(server: Server, row: Refused) -> None:
    with hostile.built(row.build) as (folder, path):
        before = snapshot(folder)
        for command in COMMANDS:
            asked = words(command, path, folder / "out.onnx")
            done = server.ask(asked, unprivileged=row.unprivileged)
            assert objection(done, path, row.reason) is None, (command, done)
            assert snapshot(folder) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_sound_model_is_no_refusal(server: Server, command: str) -> None:
    with hostile.built(hostile.whole(hostile.sound)) as (folder, path):
        asked = words(command, path, folder / "out.onnx")
        for unprivileged in (False, True):
            done = server.ask(asked, unprivileged=unprivileged)
            assert (done.code, done.err) == (0, "")
            assert objection(done, path, "") == "ended with 0"
            assert (folder / "out.onnx").exists() == (command != "inspect")
            (folder / "out.onnx").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["UNDEFINED", "INT"])
def test_a_constant_that_is_no_tensor_is_refused_in_a_line(tmp_path: Path, kind: str) -> None:
    model = hostile.sound()
    held = model.graph.node.add(op_type="Constant", output=["c"], name="c").attribute.add()
    held.name, held.i, held.type = "value", 1, onnx.AttributeProto.AttributeType.Value(kind)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=f"^{path}: c: attribute 'value' is no TENSOR$"):
        inspect(path)


def test_what_is_no_refusal_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    right = Done(2, "", f"onnxforge: {path}: tensor 'w': is absolute\n", 100_000_000)
    assert objection(right, path, "tensor 'w': is absolute") is None
    for wrong in (
        {"code": 0},
        {"code": 1},
        {"code": -14},
        {"out": "something\n"},
        {"err": ""},
        {"err": "onnxforge: tensor 'w': is absolute\n"},
        {"err": f"onnxforge: {path}: tensor 'v': is absolute\n"},
        {"err": f"Traceback (most recent call last):\n{right.err}"},
        {"memory": 200_000_000},
    ):
        done = dataclasses.replace(right, **wrong)
        assert objection(done, path, "tensor 'w': is absolute") is not None
    before = snapshot(tmp_path)
    path.touch()
    assert snapshot(tmp_path) != before


def test_a_crash_a_bug_and_memory_are_seen(server: Server, tmp_path: Path) -> None:
    bug = server.ask(["api", tmp_path / "a\0b", tmp_path / "out"])
    assert (bug.code, bug.err.splitlines()[0]) == (1, "Traceback (most recent call last):")
    path = hostile.written(tmp_path, hostile.chain(20_000))
    more = server.ask(["inspect", path]).memory - bug.memory
    assert more > 20e6


def weights(path: Path) -> Counter[bytes]:
    """How often each weight is in a model."""
    model = onnx.load(path, load_external_data=False)
    return Counter(content for _, content in payload.payloads(model, path.parent))


def halved(content: bytes) -> bytes:
    if len(content) < hostile.BYTES:
        return content
    return np.frombuffer(content, "<f4").astype("<f2").tobytes()


@pytest.mark.parametrize("row", WORKS.values(), ids=WORKS.keys())
def test_it_works(server: Server, row: Works) -> None:
    with hostile.built(row.build) as (folder, path):
        before, target = snapshot(folder), folder / path.name
        for command in ("inspect", "run"):
            done = server.ask(words(command, path, target), files=256)
            assert (done.code, done.err) == (0, ""), done
            assert done.memory < row.megabytes * 1e6
        assert row.says in done.out
        assert before.items() <= snapshot(folder).items()
        expected = weights(path)
        if row.halves:
            expected = Counter(halved(content) for content in expected.elements())
        assert weights(target) == expected


# While it is read.


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_and_filled(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def aged(build: hostile.Build, folder: Path) -> tuple[Path, Path]:
    """A model and its data, old enough for a change to have another time."""
    (folder / "in").mkdir()
    path = build(folder / "in")
    data = path.with_name("data.bin")
    os.utime(data, ns=(1, 1))
    return path, data


@pytest.mark.parametrize("change", [Path.unlink, cut, cut_and_filled, replaced])
@pytest.mark.parametrize("command", ["run", "api"])
def test_data_that_change_before_they_are_read_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    command: str,
) -> None:
    path, data = aged(hostile.located("data.bin"), tmp_path)
    save = manager.save

    def late(*arguments: Any, **options: Any) -> Any:
        change(data)
        return save(*arguments, **options)

    monkeypatch.setattr(manager, "save", late)
    with pytest.raises(SystemExit) as end:
        forked.work(words(command, path, tmp_path / "out.onnx"))
    done = Done(int(end.value.code or 0), *capsys.readouterr(), memory=0)
    reason = "^tensor 'w': (changed since the model was loaded|No such file)"
    assert objection(done, data, reason) is None, done
    assert {found.name for found in tmp_path.iterdir()} == {"in", "outside", "secret.bin"}


@pytest.mark.parametrize("change", [Path.unlink, cut, cut_and_filled, replaced])
@pytest.mark.parametrize("pipeline", ["fp16w", "fp16w{exclude=w}"])
def test_data_that_change_while_they_are_read_make_no_mixture(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    pipeline: str,
) -> None:
    side = 1024
    content = (np.arange(side * side) % 1000).astype("<f4").tobytes()
    weight = hostile.outside(("location", "data.bin"), dims=(side, side))
    build = hostile.with_data(
        weight, prepare=lambda folder: (folder / "data.bin").write_bytes(content)
    )
    path, data = aged(build, tmp_path)
    opened, pending = DataFile.open, [change]

    @contextlib.contextmanager
    def interrupted(file: DataFile, tensor: str | None = None) -> Iterator[Any]:
        with opened(file, tensor) as stream:
            if file.path == data and pending:
                pending.pop()(data)
            yield stream

    monkeypatch.setattr(DataFile, "open", interrupted)
    target = tmp_path / "out.onnx"
    lossy = change in (cut, cut_and_filled)
    refused = pytest.raises(ModelError, match=re.escape(f"{data}: tensor 'w': "))
    with refused if lossy else contextlib.suppress(ModelError):
        PassManager(pipeline).run(path, target)
    if target.exists():  # of a file without a name, or with another, nothing is lost
        expected = content if "exclude" in pipeline else halved(content)
        assert not lossy
        assert weights(target) == Counter([expected])
    else:
        assert {found.name for found in tmp_path.iterdir()} == {"in", "outside", "secret.bin"}
    assert not pending


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(fixtures.names()), st.data())
def test_a_damaged_model_is_inspected_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"inspected-{name}"
    path = folder / f"{name}.onnx" if folder.exists() else fixtures.copied(name, folder)
    content = bytearray(fixtures.built(name).read_bytes())
    positions = st.integers(0, len(content) - 1)
    for at in data.draw(st.lists(positions, min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        found = inspect(path)
        json.dumps(report.inspection_as_dict(found))
        report.inspection_as_text(found)
