"""Time passes as whole processes beside its peers, on models larger than their memory limits.

Every command is a child process; the clock runs from before its start until a sync after
its exit, and its peak resident memory is what the kernel reports for it. Ours and a plain
copy of the input alternate in pairs, peers run fewer times. This driver stays small on
purpose: the kernel carries the memory of a parent at the fork into the peak of its child.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = "onnxforge"
COPY = "cp"
MIB = 1 << 20
SHARD_BYTES = 1_500_000_000
READ_BLOCK = 4 * MIB
FLOOR_BLOCK = 2 * MIB
KEPT_REASON = 90
JOBS = ("fp16w", "dynamic-int8")


@dataclasses.dataclass(frozen=True)
class Input:
    """One model to measure on.

    Attributes:
        arguments: What benchmarks/synthetic.py is told.
        inline: Whether the weights are in the model file itself.
    """

    arguments: tuple[str, ...]
    inline: bool = False

    def files(self, path: Path) -> list[Path]:
        """The files the model consists of."""
        return [path] if self.inline else [path, Path(f"{path}_data")]


INPUTS = {
    "tiny": Input(("--blocks", "1", "--vocab", "1000", "--dim", "256")),
    "1.6GB": Input(("--blocks", "6", "--vocab", "50000")),
    "2.3GB": Input(("--blocks", "9", "--vocab", "59000")),
    "5.2GB": Input(("--blocks", "24", "--vocab", "50000")),
    "inline": Input(("--blocks", "6", "--vocab", "36000", "--inline"), inline=True),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished child process.

    Attributes:
        seconds: From before the start of the process to the end of the sync.
        peak: Peak resident memory in bytes.
        written: Bytes of all files it left.
        failure: Why it failed, empty when it did not.
    """

    seconds: float
    peak: int
    written: int
    failure: str = ""


def _converter_common(source: str, target: str, *, bare: bool = False) -> None:
    import onnx
    from onnxconverter_common import float16

    model = onnx.load(source)
    converted = float16.convert_float_to_float16(model, disable_shape_infer=bare)
    _save(converted, source, target)


def _onnxruntime(source: str, target: str, *, bare: bool = False) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    converted = convert_float_to_float16(model, disable_shape_infer=bare)
    _save(converted, source, target)


def _onnx_load_save(source: str, target: str) -> None:
    import onnx

    _save(onnx.load(source), source, target)


def _onnx_ir_load_save(source: str, target: str) -> None:
    import onnx_ir

    data = f"{Path(target).name}_data" if Path(f"{source}_data").exists() else None
    onnx_ir.save(onnx_ir.load(source), target, external_data=data)


def _save(model: object, source: str, target: str) -> None:
    import onnx

    if Path(f"{source}_data").exists():
        data = f"{Path(target).name}_data"
        onnx.save(model, target, save_as_external_data=True, location=data)
    else:
        onnx.save(model, target)


def _onnx_ir_shards(source: str, target: str) -> None:
    import onnx_ir

    data = f"{Path(target).name}_data"
    onnx_ir.save(
        onnx_ir.load(source), target, external_data=data, max_shard_size_bytes=SHARD_BYTES
    )


def _bare_numpy(source: str, target: str) -> None:
    """Rewrite the file with the weights as if all of it were float32, on every core."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    data = Path(f"{source}_data")
    inline = not data.exists()
    data = Path(source) if inline else data
    count = data.stat().st_size // 4
    # Inline weights lie at odd offsets; read in fours from 0 they are NaNs and subnormals,
    # on which the conversion is many times slower. Ordinary values stand in for them.
    ordinary = np.full(FLOOR_BLOCK // 4, 0.02, np.float32)
    with data.open("rb") as reader, Path(target).open("wb") as writer:
        os.ftruncate(writer.fileno(), 2 * count)

        def rewrite(start: int) -> None:
            block = os.pread(reader.fileno(), FLOOR_BLOCK, 4 * start)
            values = np.frombuffer(block, np.float32, len(block) // 4)
            half = (ordinary[: values.size] if inline else values).astype(np.float16)
            os.pwrite(writer.fileno(), half.data, 2 * start)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(rewrite, range(0, count, FLOOR_BLOCK // 4)))


def _quantize_dynamic(source: str, target: str) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=Path(f"{source}_data").exists(),
    )


# By default both converters infer shapes, which serialises the model: more than 2 GB fail.
HALF_PEERS: dict[str, Callable[[str, str], None]] = {
    "onnxconverter-common float16": _converter_common,
    "onnxconverter-common, no shapes": functools.partial(_converter_common, bare=True),
    "onnxruntime float16": _onnxruntime,
    "onnxruntime float16, no shapes": functools.partial(_onnxruntime, bare=True),
    "onnx load + save": _onnx_load_save,
    "onnx_ir load + save": _onnx_ir_load_save,
    "onnx_ir load + save in shards": _onnx_ir_shards,
    "bare numpy rewrite": _bare_numpy,
}
INT8_PEERS: dict[str, Callable[[str, str], None]] = {
    "onnxruntime quantize_dynamic": _quantize_dynamic,
}
PEERS = HALF_PEERS | INT8_PEERS


def command(
    name: str, source: Path, target: Path, passes: str, options: argparse.Namespace
) -> list[str]:
    """The command line that makes ``target`` from ``source``."""
    if name == OURS:
        run = [*options.onnxforge.split(), "run", "--passes", passes, "--force"]
        return [*run, str(source), str(target)]
    if name == COPY:
        data = Path(f"{source}_data")
        files = [source, data] if data.exists() else [source]
        return ["cp", *map(str, files), str(target.parent)]
    return [sys.executable, __file__, "--peer", name, str(source), str(target)]


def measure(arguments: list[str], output: Path, timeout: float) -> Run:
    """Run one command into the empty folder ``output`` and sync, on the clock."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    os.sync()
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        try:
            child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log)
        except OSError as error:
            return Run(0, 0, 0, str(error))
        status, peak, late = _wait(child.pid, start + timeout)
        os.sync()
        seconds = time.perf_counter() - start
        log.seek(0)
        lines = log.read().decode(errors="replace").split("\n")
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return Run(seconds, peak, written, _failure(status, lines, late))


def _wait(pid: int, deadline: float) -> tuple[int, int, bool]:
    """Exit status, peak resident bytes, and whether it was killed at the deadline."""
    late = False
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            unit = 1 if sys.platform == "darwin" else 1024
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit, late
        if not late and time.perf_counter() > deadline:
            os.kill(pid, 9)
            late = True
        time.sleep(0.002)


def _failure(status: int, lines: list[str], late: bool) -> str:
    if status == 0:
        return ""
    if late:
        return "over the time limit"
    said = [line.strip() for line in lines if line.strip()]
    reason = said[-1].replace("|", "/")[:KEPT_REASON] if said else "no message"
    return f"exit {status}: {reason}"


def warm(files: list[Path]) -> None:
    """Read the input once, so that every run finds it in the page cache."""
    buffer = bytearray(READ_BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def bench(
    source: Path, files: list[Path], passes: str, options: argparse.Namespace
) -> dict[str, list[Run]]:
    """All runs of all commands that do one job, on one model."""
    output = options.dir / "out"
    target = output / source.name
    # The first large write after making the input may wait for the disk to grow.
    measure(command(COPY, source, target, passes, options), output, options.timeout)
    named = options.only.split(",")
    peers = INT8_PEERS if "int8" in passes else HALF_PEERS
    chosen = [n for n in (OURS, COPY, *peers) if any(word in n for word in named)]
    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    for round_number in range(max(options.pairs, options.peer_runs)):
        warm(files)
        for name in chosen:
            wanted = options.pairs if name in (OURS, COPY) else options.peer_runs
            if round_number >= wanted or any(run.failure for run in runs[name]):
                continue
            arguments = command(name, source, target, passes, options)
            run = measure(arguments, output, options.timeout)
            runs[name].append(run)
            print(f"  {name}: {run.seconds:.2f} s {run.failure}", file=sys.stderr, flush=True)
    shutil.rmtree(output, ignore_errors=True)
    return runs


def table(runs: dict[str, list[Run]]) -> list[str]:
    """The markdown table of one model."""
    lines = [
        "| command | runs | seconds (median) | min to max | peak MB | written MB "
        "| to cp | to ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in runs.items():
        good = [run for run in found if not run.failure]
        if not good:
            reason = found[-1].failure if found else "not run"
            lines.append(f"| {name} | {len(found)} | {reason} | | | | | |")
            continue
        seconds = [run.seconds for run in good]
        cells = [
            name,
            str(len(good)),
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
            f"{max(run.peak for run in good) / 1e6:.0f}",
            f"{good[-1].written / 1e6:.0f}",
            ratio(good, runs.get(COPY, [])),
            ratio(good, runs.get(OURS, [])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ratio(runs: list[Run], base: list[Run]) -> str:
    """Median ratio of the pairs; of the medians where runs and base are not in pairs."""
    good = [run.seconds for run in base if not run.failure]
    if not good:
        return "-"
    if len(runs) != len(good):
        return (
            f"{statistics.median(run.seconds for run in runs) / statistics.median(good):.2f}"
        )
    return f"{statistics.median(a.seconds / b for a, b in zip(runs, good, strict=True)):.2f}"


def report(options: argparse.Namespace) -> None:
    """Make each input, measure on it, print its table."""
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name in options.sizes.split(","):
        chosen = INPUTS[name]
        source = options.dir / name / "model.onnx"
        maker = [sys.executable, str(HERE / "synthetic.py"), str(source), *chosen.arguments]
        subprocess.run(maker, check=True)
        files = chosen.files(source)
        total = sum(file.stat().st_size for file in files)
        print(f"{name}: {total / 1e9:.2f} GB", file=sys.stderr, flush=True)
        for passes in options.passes or JOBS:
            runs = bench(source, files, passes, options)
            heading = f"### {name} ({total / 1e6:.0f} MB), {passes}"
            print("\n".join(["", heading, "", *table(runs)]), flush=True)


def main() -> None:
    """Run one peer when told so by the driver, otherwise be the driver."""
    if len(sys.argv) > 1 and sys.argv[1] == "--peer":
        PEERS[sys.argv[2]](sys.argv[3], sys.argv[4])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    beside = Path(sys.executable).with_name("onnxforge")
    add = parser.add_argument
    add("--sizes", default="1.6GB,5.2GB,inline", help=f"of {','.join(INPUTS)}")
    add("--pairs", type=int, default=5, help="runs of ours and of cp, in turn")
    add("--peer-runs", type=int, default=1)
    add("--only", default="", help="only commands whose name contains one of these")
    add("--passes", action="append", help=f"what onnxforge is to do; {' and '.join(JOBS)}")
    add("--timeout", type=float, default=600, help="seconds for one command")
    add("--onnxforge", default=str(beside), help="the command to measure")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()) / "onnxforge-bench")
    report(parser.parse_args())


if __name__ == "__main__":
    main()
