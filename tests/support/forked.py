"""Commands on models, each in a fork of one process that has everything imported.

So a crash, a hang and memory are results like any other, and a start costs nothing. As a
script it serves: each line on stdin is a job, each line on stdout what became of it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60
NOBODY = 65534


@dataclass(frozen=True)
class Done:
    """What became of a command.

    Attributes:
        code: Its exit code, or less than 0: the signal that ended it, SIGALRM for a hang.
        out: What it printed.
        err: What it printed on stderr.
        memory: The most memory it had, in bytes.
    """

    code: int
    out: str
    err: str
    memory: int


class Server:
    """The process that forks."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], text=True, **pipes)

    def ask(
        self,
        words: Sequence[str | Path],
        *,
        files: int | None = None,
        unprivileged: bool = False,
    ) -> Done:
        """Give words to the command line, or two paths to Python after the word ``api``.

        Args:
            words: The words.
            files: How many files may be open at once.
            unprivileged: Give up the rights of root.
        """
        job = {"words": list(map(str, words)), "files": files, "unprivileged": unprivileged}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def import_all() -> None:
    """Import what commands import later, when nobody may not be allowed to read it."""
    from onnxforge import cli, inspection, jobs, manager, registry, report  # noqa: F401

    for name in registry.entries():
        registry.pass_class(name)


def become_nobody() -> None:
    """Give up the rights of root, for which permissions mean nothing."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _serve() -> None:
    import_all()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asdict(_forked(json.loads(line)))) + "\n")
        sys.stdout.flush()


def _forked(job: dict[str, Any]) -> Done:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_code(job))
        _, status, usage = os.wait4(child, 0)
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err)]
    unit = 1 if sys.platform == "darwin" else 1024
    return Done(os.waitstatus_to_exitcode(status), *texts, usage.ru_maxrss * unit)


def _code(job: dict[str, Any]) -> int:
    """Do the work and return its exit code; what is no exit keeps its traceback."""
    signal.alarm(PATIENCE)
    if job["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (job["files"], job["files"]))
    if job["unprivileged"]:
        become_nobody()
    try:
        work(job["words"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def work(words: list[str]) -> None:
    from onnxforge import PassManager, cli
    from onnxforge.errors import OnnxforgeError

    if words[0] != "api":
        cli.main(words)
    try:
        PassManager("fp16w").run(*words[1:])
    except OnnxforgeError as error:
        sys.stderr.write(f"onnxforge: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    _serve()
