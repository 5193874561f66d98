"""What onnxforge does with every hostile model, next to onnx.load and onnx_ir.

    python tests/sweeps/hostile.py [PATTERN]

Every cell of the table is a process of its own, with limits on its time and memory. The
peers load the model and read all its tensors; onnx_ir a second time by a relative path.
"""

from __future__ import annotations

import fnmatch
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import forked, hostile
from support.forked import Done
from support.hostile import REFUSED, WORKS, Refused, Works

SECONDS, ADDRESSES = 20, 8 << 30
MOST_SECONDS = {Refused: 2, Works: 10}
OURS = "from onnxforge.cli import main; main()"
AS_NOBODY = "from support import forked; forked.import_all(); forked.become_nobody(); "
PEERS = {"onnx.load": "onnx", "onnx_ir": "ir", "onnx_ir, relative path": "ir relative"}
# What a library raises when it has understood that something is wrong.
REFUSALS = {"DecodeError", "SerdeError", "ValidationError", "ValueError", "OSError"}
HEAD = ("case", "onnxforge run", "onnxforge inspect", *PEERS)


@dataclass(frozen=True)
class Cell:
    """What became of one model in one tool.

    Attributes:
        text: What the table says.
        good: Whether that is as it should be.
    """

    text: str
    good: bool = True


def read(tool: str, path: str, nobody: str) -> None:
    """Load a model with a peer and read all its tensors."""
    import onnx
    import onnx_ir

    from onnxforge.walk import proto_tensors, replace_tensors

    if nobody:
        forked.become_nobody()
    if tool == "onnx":
        folder = str(Path(path).parent)
        for tensor in proto_tensors(onnx.load(path)):
            onnx.numpy_helper.to_array(tensor, folder)
    else:
        model = onnx_ir.load(path)

        def look(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
            tensor.numpy()
            return tensor

        replace_tensors(model, look)


def limited() -> None:
    """Limit this process and what it becomes."""
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def run(command: list[str], folder: Path) -> tuple[Done, float]:
    """Run a command in a folder; what became of it, and how many seconds it took."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            stdout=out,
            stderr=err,
            preexec_fn=limited,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err)]
    return Done(child.returncode, *texts, usage.ru_maxrss * 1024), seconds


def ours(row: Refused | Works, words: list[str], path: Path) -> Cell:
    """What the command line makes of a model."""
    nobody = isinstance(row, Refused) and row.unprivileged
    done, seconds = run(["-c", (AS_NOBODY if nobody else "") + OURS, *words], path.parent)
    if isinstance(row, Refused):
        wrong = hostile.objection(done, path, row.reason)
    else:
        is_large = done.memory >= row.megabytes * 1e6
        wrong = "takes too much memory" if is_large else None
        wrong = f"ended with {done.code}" if done.code else wrong
    if wrong is None and seconds >= MOST_SECONDS[type(row)]:
        wrong = "is too slow"
    word = wrong or ("refused" if isinstance(row, Refused) else "works")
    return Cell(f"{word}, {seconds:.1f} s, {done.memory / 1e6:.0f} MB", wrong is None)


def theirs(row: Refused | Works, tool: str, path: Path) -> Cell:
    """What another tool makes of a model."""
    tool, _, relative = tool.partition(" ")
    nobody = "nobody" if isinstance(row, Refused) and row.unprivileged else ""
    words = ["--read", tool, path.name if relative else str(path), nobody]
    done, _ = run([__file__, *words], path.parent)
    if not done.code:
        return Cell("reads it")
    if done.code < 0:
        hangs = -done.code == signal.SIGALRM
        return Cell("hangs" if hangs else f"crashes ({signal.Signals(-done.code).name})")
    error = done.err.strip().splitlines()[-1]
    return Cell("refused" if error in REFUSALS else f"raises {error}")


def cells(row: Refused | Works) -> list[Cell]:
    """A line of the table."""
    with hostile.built(row.build) as (folder, path):
        target = str(folder / "out.onnx")
        commands = ["run", "--passes", "fp16w", str(path), target], ["inspect", str(path)]
        found = [ours(row, words, path) for words in commands]
        return found + [theirs(row, tool, path) for tool in PEERS.values()]


def main(pattern: str = "*") -> int:
    """Print the table and the counts; return the exit status."""
    rows = {n: row for n, row in (REFUSED | WORKS).items() if fnmatch.fnmatch(n, pattern)}
    say("| " + " | ".join(HEAD) + " |\n" + "| --- " * len(HEAD) + "|")
    tried = {}
    for name, row in rows.items():
        tried[name] = cells(row)
        texts = (f"`{name}`".replace("|", "\\|"), *(cell.text for cell in tried[name]))
        say("| " + " | ".join(texts) + " |")
    say("")
    good, counts = Counter(), Counter(type(row) for row in rows.values())
    for name, row in rows.items():
        good[type(row)] += all(cell.good for cell in tried[name])
    for i, peer in enumerate(PEERS, start=2):
        for kind in (Refused, Works):
            words = Counter(tried[n][i].text for n, row in rows.items() if type(row) is kind)
            what = "what must be refused" if kind is Refused else "what must work"
            say(f"{peer}, {what}: {', '.join(f'{w} {c}' for w, c in words.most_common())}")
    say(
        f"{good[Refused]} of {counts[Refused]} refused as they should be;"
        f" {good[Works]} of {counts[Works]} work"
    )
    return int(good != counts)


def say(line: str) -> None:
    """Print a line at once: the table takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] != ["--read"]:
        sys.exit(main(*sys.argv[1:]))
    try:
        read(*sys.argv[2:])
    except OSError:
        sys.exit("OSError")
    except Exception as error:
        sys.exit(type(error).__name__)
