"""Writing under trouble, by real commands: what was there stays, or the new is there whole."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from onnxforge import PassManager, cli
from onnxforge.core import Pass, Result
from onnxforge.errors import ModelError
from support import trouble

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and file systems of POSIX")

NAME = "model.onnx"
TIMEOUT = 60
OPTIONS = {
    "inline": ("--passes", "fp16w"),
    "sidecar": ("--passes", "fp16w", "--layout", "sidecar"),
    "shards": ("--passes", "shard{max_bytes=2MB}"),
    "manifest": ("--passes", "shard{single=true manifest=true}"),
}
Files = dict[str, bytes]


class Tiers(NamedTuple):
    """What a command makes of the old model and of the new one."""

    old: Files
    new: Files


@dataclass(frozen=True)
class Case:
    """A command that overwrites an old result with a new one.

    Attributes:
        words: The command.
        out: The folder of the result.
        old: What is there before.
        new: What is there after it.
    """

    words: tuple[str | Path, ...]
    out: Path
    old: Files
    new: Files


class Done(NamedTuple):
    """What a command left: exit code and stderr."""

    code: int
    err: str


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def put(files: Files, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(Tiers._fields):
        trouble.write_model(folder / f"{name}.onnx", seed, weights=3 + seed)
    return {name: folder / f"{name}.onnx" for name in Tiers._fields}


@pytest.fixture(scope="module")
def tiers(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tiers]:
    made = {}
    for kind, options in OPTIONS.items():
        results = []
        for source in sources.values():
            folder = tmp_path_factory.mktemp(kind)
            with pytest.raises(SystemExit):
                cli.main(["run", *options, str(source), str(folder / NAME)])
            trouble.whole(folder / NAME)  # it loads
            results.append(contents(folder))
        made[kind] = Tiers(*results)
    return made


def a_case(kind: str, tiers: dict[str, Tiers], sources: dict[str, Path], out: Path) -> Case:
    put(tiers[kind].old, out)
    words = ("run", "--force", *OPTIONS[kind], sources["new"], out / NAME)
    return Case(words, out, *tiers[kind])


@pytest.fixture(params=OPTIONS)
def case(request: Any, tiers: Any, sources: Any, tmp_path: Path) -> Case:
    return a_case(request.param, tiers, sources, tmp_path / "out")


@pytest.fixture
def sidecar(tiers: Any, sources: Any, tmp_path: Path) -> Case:
    return a_case("sidecar", tiers, sources, tmp_path / "out")


def started(*words: str | Path, before: str = "") -> subprocess.Popen[str]:
    """Start the command line, after some Python of the test in the same process."""
    python, flag, code = trouble.COMMAND
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [python, flag, f"{before}\n{code}", *words]
    return subprocess.Popen(command, text=True, **pipes)


def told(process: subprocess.Popen[str]) -> str:
    """The next line on stdout."""
    assert process.stdout is not None
    return process.stdout.readline()


def go_on(process: subprocess.Popen[str]) -> None:
    """Give a process that waits for it a line on stdin."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def ended(process: subprocess.Popen[str]) -> Done:
    _, err = process.communicate(timeout=TIMEOUT)
    return Done(process.returncode, err)


def ran(*words: str | Path, before: str = "") -> Done:
    return ended(started(*words, before=before))


def assert_refused(done: Done, place: Path, reason: str | int) -> None:
    """The command said in one line which file made trouble, and which."""
    assert done.code == 2, done.err
    assert done.err.startswith("onnxforge: ")
    assert done.err.count("\n") == 1
    assert str(place) in done.err
    assert (os.strerror(reason) if isinstance(reason, int) else reason) in done.err


# The disk is full.

# No space after some bytes, on a file system that can neither reserve nor copy.
SMALL = """
import errno, os
left, pwrite = {room}, os.pwrite
def refuse(*_): raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
def write(fd, content, at):
    global left
    left -= len(content)
    if left < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pwrite(fd, content, at)
os.pwrite, os.posix_fallocate, os.copy_file_range = write, refuse, refuse
"""


def test_a_disk_without_room_for_the_model_keeps_what_was_there(case: Case) -> None:
    needed = [len(case.new[name]) for name in case.new if not name.endswith(".sha256")]
    done = ran(*case.words, before=SMALL.format(room=sum(needed) - 1))
    assert_refused(done, case.out, errno.ENOSPC)
    assert contents(case.out) == case.old


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is easily filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("kind", "enough"),
    [("inline", 0.5), ("shards", 0.5), ("shards", 1), ("sidecar", 1), ("manifest", 1)],
)
def test_a_full_disk_keeps_what_was_there(
    disk: Path, tiers: Any, sources: Any, kind: str, enough: float
) -> None:
    case = a_case(kind, tiers, sources, disk)
    status = os.statvfs(disk)
    page, used = status.f_frsize, status.f_blocks - status.f_bfree
    needed = sum(-(-len(content) // page) for content in case.new.values())
    size = (used + int(needed * enough)) * page
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    done = ran(*case.words)
    if done.code == 0 and enough == 1:  # it writes no file twice
        assert contents(disk) == case.new
    else:
        assert_refused(done, disk, errno.ENOSPC)
        assert contents(disk) == case.old


# The place is no place for files.

# Root may write everywhere until it gives up its rights; this keeps its files readable.
WITHOUT_RIGHTS = """
import ctypes
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
"""


def test_a_folder_that_may_not_be_written_is_told(sidecar: Case) -> None:
    if os.geteuid() == 0 and sys.platform != "linux":
        pytest.skip("root may write everywhere")
    sidecar.out.chmod(0o555)
    done = ran(*sidecar.words, before=WITHOUT_RIGHTS if os.geteuid() == 0 else "")
    sidecar.out.chmod(0o755)
    assert_refused(done, sidecar.out / NAME, errno.EACCES)
    assert contents(sidecar.out) == sidecar.old


def a_folder(place: Path) -> None:
    place.mkdir()


def nothing(place: Path) -> None:
    place.parent.rmdir()


def a_file_above(place: Path) -> None:
    place.parent.rmdir()
    place.parent.write_text("a file")


def a_device(place: Path) -> None:
    place.symlink_to(os.devnull)


@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        (a_folder, "is a folder"),
        (nothing, "no such folder"),
        (a_file_above, "no such folder"),
        (a_device, "is not a regular file"),
    ],
)
def test_what_is_no_place_for_a_model_is_told(
    tmp_path: Path, sources: Any, taken: Callable[[Path], None], reason: str
) -> None:
    place = tmp_path / "out" / NAME
    place.parent.mkdir()
    taken(place)
    before = sorted(tmp_path.rglob("*"))
    done = ran("run", "--force", *OPTIONS["sidecar"], sources["new"], place)
    assert_refused(done, place.parent if "folder" in reason else place, reason)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "name"), [("shards", f"{NAME}.data.003"), ("manifest", f"{NAME}.sha256")]
)
def test_a_folder_in_the_place_of_any_file_is_told(
    tiers: Any, sources: Any, tmp_path: Path, kind: str, name: str
) -> None:
    case = a_case(kind, tiers, sources, tmp_path / "out")
    assert name in case.new
    (case.out / name).unlink(missing_ok=True)
    (case.out / name).mkdir()
    before = contents(case.out)
    assert_refused(ran(*case.words), case.out / name, "is a folder")
    assert contents(case.out) == before
    assert not any((case.out / name).iterdir())


# Several at once.


@pytest.mark.parametrize("kinds", [["sidecar", "manifest"], list(OPTIONS)])
def test_of_commands_at_once_one_wins_whole(
    tiers: dict[str, Tiers], sources: Any, tmp_path: Path, kinds: list[str]
) -> None:
    cases = [a_case(kind, tiers, sources, tmp_path / "out") for kind in kinds]
    ready = "import onnxforge.jobs, onnxforge.manager; print('ready', flush=True); input()"
    commands = [started(*case.words, before=ready) for case in cases]
    assert {told(command) for command in commands} == {"ready\n"}
    for command in commands:
        go_on(command)
    assert {ended(command).code for command in commands} == {0}
    found = contents(tmp_path / "out")
    assert [kind for kind in kinds if found.items() >= tiers[kind].new.items()]
    assert found.keys() == set().union(*(case.old | case.new for case in cases))


def test_a_reader_finds_the_old_or_the_new_at_any_moment(case: Case, tmp_path: Path) -> None:
    """As would one that comes after a crash."""
    new = trouble.whole(put(case.new, tmp_path / "new") / NAME)
    steps = "".join(f"hold(pathlib.Path, {name!r})\n" for name in ("replace", "unlink"))
    found = [trouble.whole(case.out / NAME)]
    with started(*case.words, before=f"{HELD}{steps}hold(os, 'link')\n") as process:
        while (line := told(process)) and line in ("replace\n", "unlink\n", "link\n"):
            found.append(trouble.whole(case.out / NAME))
            go_on(process)
        assert ended(process).code == 0
    turn = found.index(new)
    assert turn > 1
    assert set(found[:turn]) == {found[0]}
    assert set(found[turn:]) == {new}


# The input changes.


def rewritten(path: Path) -> None:
    """Other bytes, as many, in the same file."""
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))


def replaced(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@dataclass
class Changing:
    """Changes a file after the first pass, or when the first block was written."""

    change: Callable[[Path], None]
    path: Path
    when: str

    def before(self, step: Pass, model: object) -> None:
        """Nothing has happened yet."""

    def failed(self, step: Pass, error: Exception) -> None:
        raise AssertionError from error

    def after(self, step: Pass, result: Result) -> None:
        self._now("after the pass")

    def progress(self, written: int, total: int) -> None:
        self._now("while writing")

    def _now(self, when: str) -> None:
        if when == self.when:
            self.change(self.path)
            self.when = "never again"


@pytest.mark.parametrize("kind", ["inline", "manifest"])
@pytest.mark.parametrize("when", ["after the pass", "while writing"])
@pytest.mark.parametrize("change", [rewritten, replaced, truncated, grown, Path.unlink])
@pytest.mark.parametrize("name", [NAME, f"{NAME}_data"])
def test_an_input_that_changes_is_noticed(
    tiers: Any, sources: Any, tmp_path: Path, kind: str, when: str, change: Any, name: str
) -> None:
    case = a_case(kind, tiers, sources, tmp_path / "out")
    source = put({NAME: sources["new"].read_bytes()}, tmp_path / "in") / NAME
    if name != NAME:
        PassManager("shard{single=true}").run(source, source, force=True)
    path = source.with_name(name)
    os.utime(path, (1e9, 1e9))
    changing = Changing(change, path, when)
    manager = PassManager(OPTIONS[kind][1], observers=[changing])
    options: Any = {"force": True, "workers": 1, "progress": changing.progress}
    with pytest.raises(ModelError, match=r"changed since|No such file") as raised:
        manager.run(source, case.out / NAME, **options)
    assert str(raised.value).startswith(f"{path}: ")
    assert contents(case.out) == case.old


# A pass after which a file is shorter.
CHANGED = """
import os
from onnxforge import core
call = core.Pass.__call__
def shortening(self, model):
    result = call(self, model)
    os.truncate({path!r}, 1000)
    return result
core.Pass.__call__ = shortening
"""


def test_an_input_that_changes_ends_a_command(
    sidecar: Case, sources: Any, tmp_path: Path
) -> None:
    source = put({NAME: sources["new"].read_bytes()}, tmp_path / "in") / NAME
    *words, _, target = sidecar.words
    done = ran(*words, source, target, before=CHANGED.format(path=str(source)))
    assert_refused(done, source, "changed since the model was loaded")
    assert contents(sidecar.out) == sidecar.old


# Somebody wants it to end.

# Calls that say that they are made, and go on when they get a line.
HELD = """
import os, pathlib, sys, time
from onnxforge import core, model_io
def hold(owner, name, wait=sys.stdin.readline):
    call = getattr(owner, name)
    def held(*arguments, **options):
        os.write(1, (name + "\\n").encode())
        wait()
        return call(*arguments, **options)
    setattr(owner, name, held)
"""
LOADING = HELD + "hold(model_io, 'load')\n"
IN_A_PASS = HELD + "hold(core.Pass, '__call__')\n"
PUBLISHING = HELD + "hold(pathlib.Path, 'replace')\n"
WRITING = HELD + "hold(os, 'pwrite', lambda: time.sleep(0.1))\n"  # in threads no signal wakes


def send(process: subprocess.Popen[str], at: str, *numbers: int) -> None:
    """Send signals when a call of this name is made."""
    while (line := told(process)) != f"{at}\n":
        assert line, f"{at} is not called: {ended(process)}"
    for number in numbers:
        process.send_signal(number)


def assert_gone(done: Done, number: int, case: Case) -> None:
    assert done.code == 128 + number
    assert done.err.strip() == ""
    assert contents(case.out) == case.old


@pytest.mark.parametrize(
    ("before", "at", "number"),
    [
        (LOADING, "load", signal.SIGINT),
        (IN_A_PASS, "__call__", signal.SIGINT),
        (WRITING, "pwrite", signal.SIGINT),
        (WRITING, "pwrite", signal.SIGTERM),
        (WRITING, "pwrite", signal.SIGHUP),
    ],
)
def test_a_signal_ends_a_command(sidecar: Case, before: str, at: str, number: int) -> None:
    with started(*sidecar.words, before=before) as process:
        send(process, at, number)
        assert_gone(ended(process), number, sidecar)


def test_ctrl_c_before_the_first_file_has_its_name_keeps_what_was_there(case: Case) -> None:
    with started(*case.words, before=PUBLISHING) as process:
        send(process, "replace", signal.SIGINT)
        assert_gone(ended(process), signal.SIGINT, case)


# Ctrl-C in the middle of an import, where some modules crash on an exception.
IMPORTING = """
import signal, sys
class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == "onnxforge.manager": signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


def test_ctrl_c_while_modules_are_loaded_ends_at_once(sidecar: Case) -> None:
    assert_gone(ran(*sidecar.words, before=IMPORTING), signal.SIGINT, sidecar)


def test_a_second_signal_does_not_break_off_the_cleaning(sidecar: Case) -> None:
    slow = WRITING + "hold(pathlib.Path, 'unlink', lambda: time.sleep(0.1))\n"
    with started(*sidecar.words, before=slow) as process:
        send(process, "pwrite", signal.SIGINT)
        send(process, "unlink", signal.SIGINT, signal.SIGTERM)
        send(process, "unlink", signal.SIGINT)
        assert_gone(ended(process), signal.SIGINT, sidecar)


def test_what_is_to_be_ignored_is_ignored(sidecar: Case) -> None:
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with started(*sidecar.words, before=nohup + WRITING) as process:
        send(process, "pwrite", signal.SIGHUP)
        assert ended(process).code == 0
    assert contents(sidecar.out) == sidecar.new


def test_a_program_that_calls_the_command_line_keeps_its_handlers() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit):
        cli.main(["list"])
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before


def test_the_command_line_works_in_any_thread() -> None:
    codes = []

    def run() -> None:
        with contextlib.suppress(SystemExit):
            cli.main(["list"])
        codes.append(0)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0]
