"""Whatever fails, and whenever: the old pair or the new pair is there, never a mixture.

As a script, it saves models and dies in the middle: `crashed` starts it so.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxforge import lazy, model_io, placement, saving
from onnxforge.errors import ModelError
from onnxforge.lazy import DerivedTensor
from onnxforge.placement import PLACEMENT, Placement
from onnxforge.storage import writer
from onnxforge.storage.whole import copy_file
from support import payload

NAME, DATA = "model.onnx", "model.onnx_data"
SIZES = (512, 700)
posix = pytest.mark.skipif(os.name == "nt", reason="the calls of POSIX")


class Case(NamedTuple):
    """What is there before, and what is written."""

    before: placement.Layout | None
    after: placement.Layout
    in_place: bool = False

    def __str__(self) -> str:
        place = "in place" if self.in_place else self.before or "nothing"
        return f"{self.after} over {place}"


CASES = [
    Case(None, "inline"),
    Case(None, "sidecar"),
    Case("inline", "inline"),
    Case("sidecar", "sidecar"),
    Case("inline", "sidecar"),
    Case("sidecar", "inline"),
    Case("inline", "inline", in_place=True),
    Case("sidecar", "sidecar", in_place=True),
]
in_every_case = pytest.mark.parametrize("case", CASES, ids=str)


def proto(tag: str, factor: float) -> onnx.ModelProto:
    weights = [
        numpy_helper.from_array(np.arange(n, dtype=np.float32) * factor, f"w{n}")
        for n in SIZES
    ]
    held = numpy_helper.from_array(np.arange(300, dtype=np.float32))
    node = helper.make_node("Constant", [], ["c"], value=held)
    return helper.make_model(helper.make_graph([node], tag, [], [], weights), ir_version=9)


OLD, NEW = proto("old", 1), proto("new", 2)


def doubled(block: np.ndarray, out: np.ndarray, start: int) -> None:
    del start
    np.multiply(block, 2, out=out)


def to_new(model: ir.Model) -> ir.Model:
    """Make the old model the new one; its weights are computed from those on disk."""
    model.graph.name = "new"
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, lazy.FileTensor):
            value.const_value = DerivedTensor(value.const_value, ir.DataType.FLOAT, doubled)
    return model


@cache
def expected(tag: str) -> dict[str, str]:
    model = {"old": OLD, "new": NEW}[tag]
    pairs = payload.payloads(model, Path())
    return {place: payload.hashlib.sha256(content).hexdigest() for place, content in pairs}


def found(folder: Path) -> str:
    """Which pair is there: its tag, after every weight was looked at."""
    path = folder / NAME
    if not path.exists():
        return "nothing"
    tag = onnx.load(path, load_external_data=False).graph.name
    assert payload.tensor_digests(path) == expected(tag), f"model {tag} with other weights"
    weights = model_io.load(path).graph.initializers
    for tensor in {"old": OLD, "new": NEW}[tag].graph.initializer:
        value = weights[tensor.name].const_value
        assert value is not None
        assert value.tobytes() == tensor.raw_data
    return tag


def prepared(folder: Path, case: Case) -> Path:
    """Put what is there before into a folder and return the model to change."""
    out = folder / "out"
    out.mkdir(parents=True)
    source = folder / "source.onnx"
    source.write_bytes(OLD.SerializeToString())
    if case.before is not None:
        saving.save(model_io.load(source), out / NAME, layout=case.before)
    return out / NAME if case.in_place else source


def save_new(folder: Path, case: Case, source: Path, workers: int = 1) -> saving.Saved:
    model = to_new(model_io.load(source))
    path = folder / "out" / NAME
    return saving.save(model, path, layout=case.after, force=True, workers=workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def temporaries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


def referred(folder: Path) -> set[str]:
    """The data files that the model there points to."""
    if not (folder / NAME).exists():
        return set()
    model = onnx.load(folder / NAME, load_external_data=False)
    entries = [e for t in model.graph.initializer for e in t.external_data]
    return {entry.value for entry in entries if entry.key == "location"}


CALLS: list[tuple[Any, str]] = [
    (Path, "replace"),
    (Path, "unlink"),
    (os, "link"),
    (os, "fsync"),
    (os, "pwrite"),
    (os, "posix_fallocate"),
    (os, "ftruncate"),
    (shutil, "copyfile"),
]


@dataclass
class Tripwire:
    """Counts the steps of a save, and does something at one of them."""

    at: int = 0
    act: Callable[[], object] = lambda: None
    only: Callable[[str], bool] = lambda _: True
    steps: list[str] = field(default_factory=list)

    def step(self, name: str) -> None:
        if self.only(name):
            self.steps.append(name)
            if len(self.steps) == self.at:
                self.act()

    @contextlib.contextmanager
    def laid(self) -> Iterator[Tripwire]:
        with contextlib.ExitStack() as stack:
            for owner, name in CALLS:
                if hasattr(owner, name):
                    wrapped = self._wrapped(getattr(owner, name), name)
                    stack.enter_context(mock.patch.object(owner, name, wrapped))
            yield self

    def _wrapped(self, call: Callable[..., object], name: str) -> Callable[..., object]:
        def wrapped(*arguments: Any, **options: Any) -> object:
            kind = name
            if name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                kind = "fsync of the folder"
            self.step(f"before {kind}")
            result = call(*arguments, **options)
            self.step(f"after {kind}")
            return result

        return wrapped


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# All goes well.


@in_every_case
@pytest.mark.parametrize("workers", [1, 4])
def test_the_new_pair_has_its_names_and_no_other_file_is_left(
    tmp_path: Path, case: Case, workers: int
) -> None:
    source = prepared(tmp_path, case)
    result = save_new(tmp_path, case, source, workers)
    out = tmp_path / "out"
    assert found(out) == "new"
    assert referred(out) == ({DATA} if case.after == "sidecar" else set())
    assert temporaries(out) == set()
    assert set(result.files) == {out / NAME, *(out / name for name in referred(out))}


@posix
def test_without_hard_links_the_data_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("sidecar", "sidecar")
    results = []
    for links in (True, False):
        source = prepared(tmp_path / str(links), case)
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: fail())
        save_new(tmp_path / str(links), case, source)
        results.append(contents(tmp_path / str(links) / "out"))
        assert found(tmp_path / str(links) / "out") == "new"
        assert (tmp_path / str(links) / "out" / DATA).stat().st_nlink == 1
    assert results[0] == results[1]
    assert set(results[0]) == {NAME, DATA}


@posix
@in_every_case
@pytest.mark.parametrize("links", [True, False])
def test_nothing_gets_its_name_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, links: bool
) -> None:
    flushed: set[int] = set()
    folder_is_flushed = True
    real = {name: getattr(owner, name) for owner, name in CALLS}
    renamed = []

    def fsync(fd: int) -> None:
        nonlocal folder_is_flushed
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            folder_is_flushed = True
        flushed.add(status.st_ino)
        real["fsync"](fd)

    def pwrite(fd: int, content: memoryview, offset: int) -> int:
        flushed.discard(os.fstat(fd).st_ino)
        return real["pwrite"](fd, content, offset)

    def replace(source: Path, target: Path) -> Path:
        nonlocal folder_is_flushed
        assert source.stat().st_ino in flushed, f"{source.name} is not on the disk"
        assert folder_is_flushed, "the rename before is not on the disk"
        folder_is_flushed = False
        renamed.append(target.name)
        return real["replace"](source, target)

    source = prepared(tmp_path, case)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(Path, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: fail())
    save_new(tmp_path, case, source)
    assert folder_is_flushed
    assert renamed[-1] == NAME
    assert renamed.count(DATA) == (case.after == "sidecar")


# A step fails.


def after_each_failure(
    folder: Path, case: Case, only: Callable[[str], bool], failure: Callable[[], object] = fail
) -> Iterator[tuple[Path, str, dict[str, bytes]]]:
    """Fail at each step in turn; give the folder, the step and what was there before."""
    for at in itertools.count(1):
        here = folder / str(at)
        source = prepared(here, case)
        before = contents(here / "out")
        with Tripwire(at, failure, only).laid() as wire:
            try:
                save_new(here, case, source)
            except ModelError as error:
                told = str(error)
            else:
                told = ""
        if len(wire.steps) < at:
            assert not told
            assert at > 1
            return
        assert not told or told.startswith(f"{here / 'out' / NAME}: ")
        yield here / "out", wire.steps[at - 1], before


def can_fail(step: str) -> bool:
    return step.startswith("before ") and step != "before fsync of the folder"


@in_every_case
def test_after_any_failure_the_old_pair_or_the_new_pair_is_there(
    tmp_path: Path, case: Case
) -> None:
    seen = set()
    for out, step, _ in after_each_failure(tmp_path, case, can_fail):
        seen.add(found(out))
        if step != "before unlink":
            assert temporaries(out) <= referred(out), step
    assert seen == {"old" if case.before else "nothing", "new"}


@in_every_case
def test_a_failure_before_the_first_rename_changes_nothing(tmp_path: Path, case: Case) -> None:
    for out, step, before in after_each_failure(tmp_path, case, can_fail):
        assert contents(out) == before, step
        if step == "before replace":
            return
    raise AssertionError("nothing was renamed")


@in_every_case
def test_a_save_after_a_failure_ends_under_the_right_names(tmp_path: Path, case: Case) -> None:
    for out, _, _ in after_each_failure(tmp_path, case, can_fail):
        tag = found(out)
        if tag != "nothing":
            model = model_io.load(out / NAME)
            saving.save(to_new(model) if tag == "old" else model, out / NAME, force=True)
            assert found(out) == "new"
            assert referred(out) <= {DATA}


# The process dies.


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, in it one for each step at which a save of it died."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    folder = tmp_path_factory.mktemp("crashed")
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": tests}
    command = [sys.executable, __file__, str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return folder


def can_die(step: str) -> bool:
    return step not in ("after pwrite", "after ftruncate")  # those are as before the next


def _main() -> None:
    """Save every case again and again, and die one step later each time."""
    os.fsync = lambda fd: None  # a process dies here, not a disk
    for i, case in enumerate(CASES):
        for at in itertools.count(1):
            folder = Path(sys.argv[1]) / str(i) / str(at)
            source = prepared(folder, case)
            if _dies_at(at, can_die, partial(save_new, folder, case, source)) == 0:
                break
    _save_bundles(Path(sys.argv[1]) / "bundles")


def _dies_at(at: int, only: Callable[[str], bool], save: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        with Tripwire(at, lambda: os._exit(9), only).laid():
            save()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 9):
        raise RuntimeError(f"a save ended with {code} at step {at}")
    return code


@in_every_case
def test_after_a_crash_at_any_step_the_old_pair_or_the_new_pair_is_there(
    crashed: Path, case: Case
) -> None:
    folders = sorted((crashed / str(CASES.index(case))).iterdir(), key=lambda p: int(p.name))
    assert len(folders) > 10
    states = [found(folder / "out") for folder in folders]
    before = "old" if case.before else "nothing"
    assert set(states) == {before, "new"}
    assert states == sorted(states, key=[before, "new"].index), "new, and then old again"
    assert temporaries(folders[-1] / "out") == set()


@in_every_case
def test_a_save_after_a_crash_ends_under_the_right_names(crashed: Path, case: Case) -> None:
    for folder in (crashed / str(CASES.index(case))).iterdir():
        out = shutil.copytree(folder / "out", folder / "again" / "out")
        save_new(folder / "again", case, folder / "source.onnx")
        assert found(out) == "new"
        assert referred(out) <= {DATA}


# The disk is full.


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, but there is no space at the call of this number."""
    calls = itertools.count(1)

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            no_space()
        return function(*arguments, **options)

    return counted


def assert_no_space(folder: Path, case: Case, source: Path, workers: int) -> None:
    before = contents(folder / "out")
    with pytest.raises(ModelError) as raised:
        save_new(folder, case, source, workers)
    out = folder / "out"
    assert str(raised.value) == f"{out / NAME}: {os.strerror(errno.ENOSPC)}"
    assert contents(out) == before


@posix
@in_every_case
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "ftruncate"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, case: Case, workers: int, call: str
) -> None:
    if not hasattr(os, call):
        pytest.skip(f"no {call} here")
    for number in (1, 2) if call == "pwrite" or case.after == "sidecar" else (1,):
        source = prepared(tmp_path / str(number), case)
        with mock.patch.object(os, call, on_call(getattr(os, call), number)):
            assert_no_space(tmp_path / str(number), case, source, workers)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every weight has many, and is copied by the kernel."""
    for module in (lazy, writer):
        monkeypatch.setattr(module, "BLOCK_BYTES", 256)
    monkeypatch.setattr(writer, "_COPY_BYTES", 1000)


def unchanged(folder: Path, layout: placement.Layout) -> Path:
    """Save the old model as it is, so that its bytes are copied."""
    folder.mkdir(exist_ok=True)
    (folder / "source.onnx").write_bytes(OLD.SerializeToString())
    (folder / "out").mkdir(exist_ok=True)
    model = model_io.load(folder / "source.onnx")
    saving.save(model, folder / "out" / NAME, layout=layout, force=True)
    return folder / "out"


@posix
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no copy inside the kernel")
def test_a_disk_that_fills_while_the_kernel_copies_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(unchanged(tmp_path, "sidecar"))
    monkeypatch.setattr(os, "copy_file_range", no_space)
    for layout in ("inline", "sidecar"):
        with pytest.raises(ModelError, match=os.strerror(errno.ENOSPC)):
            unchanged(tmp_path, layout)
        assert contents(tmp_path / "out") == before


# Other systems.


def _missing(patch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        patch.delattr(os, name, raising=False)


def _no_kernel_copy(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    patch.setattr(os, "copy_file_range", refuse, raising=False)


def _kernel_copies_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "copy_file_range", lambda *_: 0, raising=False)


def _kernel_copies_little(patch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range

    def little(source: int, target: int, size: int, start: int, at: int) -> int:
        return real(source, target, min(size, 100), start, at)

    patch.setattr(os, "copy_file_range", little)


def _no_reservation(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    patch.setattr(os, "posix_fallocate", refuse, raising=False)


def _short_writes(patch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    patch.setattr(os, "pwrite", lambda fd, content, at: real(fd, content[:100], at))


@posix
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "system",
    [
        lambda patch: _missing(patch, "posix_fallocate"),
        lambda patch: _missing(patch, "copy_file_range"),
        lambda patch: _missing(patch, "copy_file_range", "pwrite"),
        lambda patch: _missing(
            patch, "posix_fallocate", "copy_file_range", "pwrite", "fchmod", "O_CLOEXEC"
        ),
        _no_kernel_copy,
        _kernel_copies_nothing,
        pytest.param(
            _kernel_copies_little,
            marks=pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no copy"),
        ),
        _no_reservation,
        _short_writes,
    ],
)
@pytest.mark.parametrize("layout", ["inline", "sidecar"])
def test_a_poorer_system_writes_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: Callable[[pytest.MonkeyPatch], None],
    layout: placement.Layout,
) -> None:
    rich = contents(unchanged(tmp_path / "rich", layout))
    with monkeypatch.context() as patch:
        system(patch)
        poor = unchanged(tmp_path / "poor", layout)
    assert contents(poor) == rich
    assert found(poor) == "old"


# What else goes wrong.


@in_every_case
def test_a_kernel_that_fails_leaves_what_was_there(tmp_path: Path, case: Case) -> None:
    source = prepared(tmp_path, case)
    before = contents(tmp_path / "out")
    model = model_io.load(source)

    def fails(block: np.ndarray, out: np.ndarray, start: int) -> None:
        raise ZeroDivisionError(f"{len(block)} {len(out)} {start}")

    weight = model.graph.initializers["w700"]
    assert weight.const_value is not None
    weight.const_value = DerivedTensor(weight.const_value, ir.DataType.FLOAT, fails)
    with pytest.raises(ZeroDivisionError):
        saving.save(model, tmp_path / "out" / NAME, layout=case.after, force=True)
    assert contents(tmp_path / "out") == before


@in_every_case
def test_progress_that_fails_leaves_what_was_there(tmp_path: Path, case: Case) -> None:
    source = prepared(tmp_path, case)
    before = contents(tmp_path / "out")

    def cancel(written: int, total: int) -> None:
        raise KeyboardInterrupt(f"{written} of {total}")

    model = model_io.load(source)
    with pytest.raises(KeyboardInterrupt):
        saving.save(
            model, tmp_path / "out" / NAME, layout=case.after, force=True, progress=cancel
        )
    assert contents(tmp_path / "out") == before


@posix
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    case = Case(None, "sidecar")
    source = prepared(tmp_path, case)
    (tmp_path / "out").chmod(0o555)
    try:
        if os.access(tmp_path / "out", os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(ModelError, match="Permission denied"):
            save_new(tmp_path, case, source)
        assert contents(tmp_path / "out") == {}
    finally:
        (tmp_path / "out").chmod(0o755)


def test_a_file_that_may_not_be_created_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("sidecar", "sidecar")
    source = prepared(tmp_path, case)
    before = contents(tmp_path / "out")
    real = os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ModelError, match="Permission denied") as raised:
        save_new(tmp_path, case, source)
    monkeypatch.undo()
    assert "\n" not in str(raised.value)
    assert contents(tmp_path / "out") == before


# Two at once.


def test_of_two_inline_saves_at_once_one_is_there_whole(tmp_path: Path) -> None:
    case = Case(None, "inline")
    prepared(tmp_path, case)
    path = tmp_path / "out" / NAME

    def save(tag: str) -> None:
        model = model_io.load(tmp_path / "source.onnx")
        saving.save(to_new(model) if tag == "new" else model, path, force=True)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            list(pool.map(save, ["old", "new"]))
            assert found(tmp_path / "out") in ("old", "new")
            assert set(contents(tmp_path / "out")) == {NAME}


def interrupt() -> None:
    raise KeyboardInterrupt


@in_every_case
@pytest.mark.parametrize("failure", [fail, interrupt])
def test_after_any_interruption_the_old_pair_or_the_new_pair_is_there(
    tmp_path: Path, case: Case, failure: Callable[[], None]
) -> None:
    """Also when the folder cannot be flushed, or when Ctrl-C comes right after a rename."""
    for at in itertools.count(1):
        here = tmp_path / str(at)
        source = prepared(here, case)
        before = contents(here / "out")
        quiet = contextlib.suppress(ModelError, KeyboardInterrupt)
        with Tripwire(at, failure).laid() as wire, quiet:
            save_new(here, case, source)
        if len(wire.steps) < at:
            return
        step = wire.steps[at - 1]
        state = found(here / "out")
        assert state in ("old" if case.before else "nothing", "new"), step
        if "unlink" not in step:
            assert temporaries(here / "out") <= referred(here / "out"), step
        if state == "nothing":
            assert contents(here / "out") == before, step


def test_of_two_saves_at_once_one_is_there_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save gets all the time it can use while the first is about to end."""
    case = Case("sidecar", "sidecar")
    source = prepared(tmp_path, case)
    path = tmp_path / "out" / NAME

    def second() -> None:
        model = model_io.load(tmp_path / "source.onnx")
        saving.save(model, path, layout="sidecar", force=True)

    other = threading.Thread(target=second)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if not other.ident and self.name.endswith(".tmp"):
            other.start()
            other.join(1)  # or it waits for the first
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    save_new(tmp_path, case, source)
    other.join()
    assert found(tmp_path / "out") in ("old", "new")
    assert temporaries(tmp_path / "out") == set()


# Several data files, and several models that share them.

FIRST, SECOND = "first.onnx", "second.onnx"


def asked(max_bytes: int | None = None, *, manifest: bool = False) -> Placement:
    return Placement(single=max_bytes is None, max_bytes=max_bytes, manifest=manifest)


class Bundle(NamedTuple):
    """Models that one call writes: how they lay before, and how they are to lie."""

    before: Placement | None
    after: Placement
    models: tuple[str, ...] = (NAME,)
    in_place: bool = False
    shared: bool = True  # before

    def __str__(self) -> str:
        before = "nothing" if self.before is None else self.before.max_bytes or "one"
        texts = [f"{self.after.max_bytes or 'one'} over {before}", "in place" * self.in_place]
        texts += ["together" * (len(self.models) > 1), "apart before" * (not self.shared)]
        texts.append("with hashes" * self.after.manifest)
        return " ".join(filter(None, texts))


PAIR = (FIRST, SECOND)
# The weights of a model are 2048, 2800 and 2400 bytes; the first two are those of the other.
MANY, FEW = asked(3000), asked(5000)
BUNDLES = [
    Bundle(None, MANY),
    Bundle(asked(), MANY),
    Bundle(MANY, asked()),
    Bundle(MANY, FEW, in_place=True),
    Bundle(asked(5000, manifest=True), asked(3000, manifest=True)),
    Bundle(None, asked(manifest=True), PAIR),
    Bundle(asked(), asked(), PAIR),
    Bundle(asked(3000, manifest=True), asked(5000, manifest=True), PAIR, in_place=True),
    Bundle(FEW, MANY, PAIR),
    Bundle(asked(), FEW, PAIR, shared=False),
]
in_every_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=str)


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps fail here and no power, so nobody has to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@cache
def member(name: str, tag: str) -> onnx.ModelProto:
    """A model of a bundle: two weights that all have and one of its own."""
    model = proto(tag, 1 if tag == "old" else 2)
    start, factor = PAIR.index(name) if name in PAIR else 0, 1 if tag == "old" else 2
    own = np.arange(start, start + 600, dtype=np.float32) * factor
    model.graph.initializer.append(numpy_helper.from_array(own, "own"))
    return model


def put(models: list[tuple[ir.Model, Path]], placement: Placement, shared: bool) -> None:
    for model, _ in models:
        model.meta[PLACEMENT] = placement
    if shared and len(models) > 1:
        saving.save_shared(models, force=True, workers=1)
    else:
        for model, path in models:
            saving.save(model, path, force=True, workers=1)


def laid_out(folder: Path, bundle: Bundle) -> None:
    """Put what is there before into a folder."""
    out = folder / "out"
    out.mkdir(parents=True)
    for name in bundle.models:
        (folder / name).write_bytes(member(name, "old").SerializeToString())
    if bundle.before is not None:
        jobs = [(model_io.load(folder / name), out / name) for name in bundle.models]
        put(jobs, bundle.before, bundle.shared)


def save_bundle(folder: Path, bundle: Bundle) -> None:
    out = folder / "out"
    sources = [(out if bundle.in_place else folder) / name for name in bundle.models]
    jobs = [(to_new(model_io.load(source)), out / source.name) for source in sources]
    put(jobs, bundle.after, shared=True)


def state(folder: Path, bundle: Bundle) -> tuple[str, ...]:
    """What is there under the name of each model, after every weight and hash was checked."""
    tags = []
    for name in bundle.models:
        tag = "nothing"
        if (folder / name).exists():
            tag = onnx.load(folder / name, load_external_data=False).graph.name
            pairs = payload.payloads(member(name, tag), Path())
            shas = {place: payload.hashlib.sha256(data).hexdigest() for place, data in pairs}
            assert payload.tensor_digests(folder / name) == shas, f"{name} with other weights"
            assert model_io.load(folder / name)  # no file has a name too many
        tags.append(tag)
    for manifest in folder.glob("*.sha256"):
        told = dict(line.split("  ")[::-1] for line in manifest.read_text().splitlines())
        content = {
            n: payload.hashlib.sha256(b).hexdigest() for n, b in contents(folder).items()
        }
        assert {**content, **told} == content, "a hash is wrong"
        assert set(bundle.models) <= set(told)
    return tuple(tags)


def data_of(folder: Path, bundle: Bundle) -> set[str]:
    """The data files that the models there point to."""
    there = [folder / name for name in bundle.models if (folder / name).exists()]
    models = [onnx.load(path, load_external_data=False) for path in there]
    entries = [e for model in models for t in model.graph.initializer for e in t.external_data]
    return {entry.value for entry in entries if entry.key == "location"}


def named(bundle: Bundle) -> set[str]:
    """The data files that there are to be."""
    base = NAME if len(bundle.models) == 1 else "shared.onnx"
    if bundle.after.single:
        return {f"{base}_data"}
    # Two of them fit into 5000 bytes, in whichever order, and none but one into 3000.
    count = 2 + len(bundle.models) if bundle.after.max_bytes == 3000 else 2
    return {f"{base}.data.{number:03}" for number in range(count)}


@pytest.mark.usefixtures("no_flush")
@in_every_bundle
def test_the_new_bundle_has_its_names_and_is_all_there_is_new(
    tmp_path: Path, bundle: Bundle
) -> None:
    laid_out(tmp_path, bundle)
    out = tmp_path / "out"
    before = contents(out)
    save_bundle(tmp_path, bundle)
    assert state(out, bundle) == ("new",) * len(bundle.models)
    assert data_of(out, bundle) == named(bundle)
    manifests = {"model.onnx.sha256", "shared.onnx.sha256"} & set(contents(out))
    assert bool(manifests) == bundle.after.manifest
    assert set(contents(out)) == {*bundle.models, *named(bundle), *manifests} | set(before)
    for manifest in manifests:
        lines = (out / manifest).read_text().splitlines()
        assert [line[66:] for line in lines] == [*bundle.models, *sorted(named(bundle))]


def moves(step: str) -> bool:
    return step.split(" ", 1)[1] in ("replace", "unlink", "link")


def fails_at(
    folder: Path, bundle: Bundle, only: Callable[[str], bool], act: Callable[[], object]
) -> Iterator[tuple[Path, str, dict[str, bytes]]]:
    """Fail at each step in turn; give the folder, the step and what was there before."""
    for at in itertools.count(1):
        here = folder / str(at)
        laid_out(here, bundle)
        before = contents(here / "out")
        quiet = contextlib.suppress(ModelError, KeyboardInterrupt)
        with Tripwire(at, act, only).laid() as wire, quiet:
            save_bundle(here, bundle)
        if len(wire.steps) < at:
            assert at > len(bundle.models)
            return
        yield here / "out", wire.steps[at - 1], before


@pytest.mark.usefixtures("no_flush")
@in_every_bundle
@pytest.mark.parametrize("act", [fail, interrupt])
def test_after_any_failure_each_model_has_its_own_data(
    tmp_path: Path, bundle: Bundle, act: Callable[[], None]
) -> None:
    def only(step: str) -> bool:
        return moves(step) and step.startswith("before" if act is fail else "after")

    was = ("old" if bundle.before else "nothing",) * len(bundle.models)
    moved = False
    for out, step, before in fails_at(tmp_path, bundle, only, act):
        now = state(out, bundle)
        assert set(now) <= {was[0], "new"}, step
        if "unlink" not in step:  # data go together: one that is read keeps the others
            assert not temporaries(out) or temporaries(out) & data_of(out, bundle), step
        if not moved and step in ("before replace", "before link"):
            assert contents(out) == before, "nothing had been moved"
            moved = True
    assert moved or act is interrupt


@pytest.mark.usefixtures("no_flush")
@pytest.mark.parametrize("bundle", [b for b in BUNDLES if b.models == PAIR], ids=str)
@pytest.mark.parametrize("stuck", [*PAIR, "shared.onnx_data", "shared.onnx.data.000"])
def test_a_place_that_cannot_be_written_keeps_what_all_read(
    tmp_path: Path, bundle: Bundle, stuck: str
) -> None:
    """Also on the way back from the failure, when it fails once more."""
    laid_out(tmp_path, bundle)
    out, real = tmp_path / "out", Path.replace

    def replace(source: Path, target: Path) -> Path:
        if target.name == stuck:
            fail()
        return real(source, target)

    stops = stuck in {*PAIR, *named(bundle)}
    with mock.patch.object(Path, "replace", replace):
        with pytest.raises(ModelError) if stops else contextlib.nullcontext():
            save_bundle(tmp_path, bundle)
        was = "old" if bundle.before else "nothing"
        assert set(state(out, bundle)) <= {was, "new"}
    save_bundle(tmp_path, bundle) if not bundle.in_place else None
    if not bundle.in_place:
        assert state(out, bundle) == ("new", "new")
        assert temporaries(out) == set()


def can_die_in_a_bundle(step: str) -> bool:
    return moves(step) and step.startswith("before")  # what is after one is before the next


def _save_bundles(folder: Path) -> None:
    """The same with every bundle."""
    for i, bundle in enumerate(BUNDLES):
        for at in itertools.count(1):
            here = folder / str(i) / str(at)
            laid_out(here, bundle)
            save = partial(save_bundle, here, bundle)
            if _dies_at(at, can_die_in_a_bundle, save) == 0:
                break


@pytest.mark.usefixtures("no_flush")
@in_every_bundle
def test_after_a_crash_at_any_step_each_model_has_its_own_data(
    crashed: Path, bundle: Bundle
) -> None:
    folders = sorted(
        (crashed / "bundles" / str(BUNDLES.index(bundle))).iterdir(), key=lambda p: int(p.name)
    )
    assert len(folders) > 4 * len(bundle.models)
    states = [state(folder / "out", bundle) for folder in folders]
    was = "old" if bundle.before else "nothing"
    assert states[0] == (was,) * len(bundle.models)
    assert states[-1] == ("new",) * len(bundle.models)
    for tags in zip(*states, strict=True):
        assert list(tags) == sorted(tags, key=[was, "new"].index), "new, and then old again"
    assert temporaries(folders[-1] / "out") == set()
    for folder in folders:
        if not bundle.in_place or set(state(folder / "out", bundle)) == {"old"}:
            save_bundle(folder, bundle)
            assert state(folder / "out", bundle) == ("new",) * len(bundle.models)
            assert data_of(folder / "out", bundle) == named(bundle)


@posix
@in_every_bundle
@pytest.mark.parametrize("links", [True, False])
def test_no_file_of_a_bundle_gets_its_name_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Bundle, links: bool
) -> None:
    laid_out(tmp_path, bundle)
    flushed = {path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    pending: list[str] = []  # what was done to the folder since it was flushed
    real = Path.replace

    def fsync(fd: int) -> None:
        status = os.fstat(fd)
        flushed.add(status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            pending.clear()

    def replace(source: Path, target: Path) -> Path:
        assert source.stat().st_ino in flushed, f"{source.name} is not on the disk"
        assert not pending
        pending.append(target.name)
        return real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: fail())
    save_bundle(tmp_path, bundle)
    assert pending == []
    assert state(tmp_path / "out", bundle) == ("new",) * len(bundle.models)
    assert {path.stat().st_nlink for path in (tmp_path / "out").iterdir()} == {1}


# Hashes.


@pytest.mark.usefixtures("no_flush")
@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_hashes_are_those_of_the_files(tmp_path: Path, mask: int) -> None:
    bundle = Bundle(None, asked(3000, manifest=True))
    laid_out(tmp_path, bundle)
    before = os.umask(mask)
    try:
        save_bundle(tmp_path, bundle)
    finally:
        os.umask(before)
    out = tmp_path / "out"
    files = [NAME, *(f"{NAME}.data.00{i}" for i in range(3))]
    lines = [
        f"{payload.hashlib.sha256((out / f).read_bytes()).hexdigest()}  {f}" for f in files
    ]
    manifest = out / f"{NAME}.sha256"
    assert manifest.read_text() == "\n".join([*lines, ""])
    assert manifest.stat().st_mode & 0o7777 == 0o644
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", manifest.name]
        subprocess.run(command, cwd=out, check=True, capture_output=True)
        (out / files[2]).write_bytes(b"damaged")
        assert subprocess.run(command, cwd=out, check=False, capture_output=True).returncode


@pytest.mark.usefixtures("no_flush")
def test_hashes_of_what_was_replaced_are_replaced_or_told(tmp_path: Path) -> None:
    bundle = Bundle(asked(3000, manifest=True), asked(5000, manifest=True))
    laid_out(tmp_path, bundle)
    out = tmp_path / "out"
    manifest, model = out / f"{NAME}.sha256", model_io.load(tmp_path / NAME)
    before = contents(out)
    (out / NAME).unlink()
    model.meta[PLACEMENT] = bundle.after
    with pytest.raises(ModelError, match=r"data\.000: exists; --force"):
        saving.save(model, out / NAME)
    (out / NAME).write_bytes(before[NAME])
    saved = saving.save(model, out / NAME, force=True)
    assert saved.left == (out / f"{NAME}.data.002",)
    assert saved.files[manifest] == manifest.stat().st_size
    assert manifest.read_bytes() != before[manifest.name]
    model = model_io.load(tmp_path / NAME)
    model.meta[PLACEMENT] = asked(5000)
    assert saving.save(model, out / NAME, force=True).left == (manifest,)
    model = model_io.load(tmp_path / NAME)
    model.meta[PLACEMENT] = bundle.after
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / manifest.name).write_text("precious")
    with pytest.raises(
        ModelError, match=r"model\.onnx\.sha256: exists; --force overwrites it"
    ):
        saving.save(model, tmp_path / "new" / NAME)
    assert contents(tmp_path / "new") == {manifest.name: b"precious"}


if __name__ == "__main__":
    _main()


def _kernel_stops(patch: pytest.MonkeyPatch) -> None:
    """The kernel copies some bytes and then refuses, as it does at the border of a disk."""
    counts = iter([100])

    def refuse(source: int, target: int, size: int) -> int:
        if (count := next(counts, None)) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.write(target, os.read(source, count))

    patch.setattr(os, "copy_file_range", refuse, raising=False)


@pytest.mark.parametrize(
    "system",
    [
        lambda patch: None,
        lambda patch: _missing(patch, "copy_file_range"),
        _no_kernel_copy,
        _kernel_copies_nothing,
        _kernel_stops,
    ],
)
@pytest.mark.parametrize("size", [0, 5000, 3 << 20])
def test_a_copy_is_whole_whatever_the_kernel_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: Callable[[pytest.MonkeyPatch], None],
    size: int,
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(np.random.default_rng(1).bytes(size))
    with monkeypatch.context() as patch:
        system(patch)
        copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(FileExistsError):
        copy_file(source, target)


@posix
def test_a_copy_that_has_no_room_is_no_copy(tmp_path: Path) -> None:
    """The last piece that is written is a part of what was to be, and no error."""
    import resource

    source = tmp_path / "a"
    source.write_bytes(bytes(3 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((5 << 20) // 2, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            copy_file(source, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
