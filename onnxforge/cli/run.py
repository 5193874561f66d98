"""The command that runs passes."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxforge.cli.options import FORMAT, PATH
from onnxforge.errors import CheckFailed, OnnxforgeError
from onnxforge.memory import peak_memory
from onnxforge.progress import progress
from onnxforge.storage.whole import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxforge.jobs import Job
    from onnxforge.manager import PassManager, Report
    from onnxforge.placement import Layout

__all__ = ["run"]

_WORKER_BYTES = 8 << 20  # blocks of source and result that a writing thread holds
_OTHER_BYTES = 16 << 20  # the graph, and the threads that look weights through


@click.command()
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--passes", required=True, metavar="PIPELINE", help="Passes, as in 'a,b{c=1}'.")
@click.option("--out-dir", type=PATH, help="Folder for many results.")
@click.option("--share", is_flag=True, help="One set of data files for all results.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--check-laws", is_flag=True, help="Hold each pass to its law on this model.")
@click.option("--inputs", type=PATH, help=".npz to run the laws on.")
@click.option("--stats", type=PATH, multiple=True, help="For passes that name a SHA-256.")
@click.option(
    "--layout",
    type=click.Choice(["keep", "inline", "sidecar"]),
    default="keep",
    show_default=True,
    help="Where weights go: as in the input, all into the model, or into a data file.",
)
@FORMAT
@click.option("--report", type=PATH, help="Write the report as JSON.")
@click.option("--dry-run", is_flag=True, help="Run the passes and write nothing.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads that write.")
@click.option("--max-memory", metavar="SIZE", help="Most memory to use, such as 200MB.")
@click.option("-v", "--verbose", is_flag=True, help="Print every finding.")
def run(
    *,
    files: tuple[Path, ...],
    passes: str,
    out_dir: Path | None,
    share: bool,
    force: bool,
    check_laws: bool,
    inputs: Path | None,
    stats: tuple[Path, ...],
    layout: Layout,
    style: str,
    report: Path | None,
    dry_run: bool,
    workers: int | None,
    max_memory: str | None,
    verbose: bool,
) -> None:
    """Run passes on IN and write OUT, or on many with --out-dir."""
    from onnxforge.jobs import refuse_report
    from onnxforge.manager import PassManager
    from onnxforge.registry import parse

    steps = parse(passes)
    gc.freeze()
    gc.enable()
    if inputs is not None and not check_laws:
        raise click.UsageError("--inputs goes with --check-laws")
    only_checks = layout == "keep" and {step.effect.value for step in steps} == {"check"}
    jobs = _jobs(files, out_dir, writes=not (only_checks or dry_run))
    if dry_run:
        jobs = [(source, None) for source, _ in jobs]
    groups = _groups(jobs, share=share, named=out_dir is not None and layout == "keep")
    if report is not None:
        refuse_report(report, jobs, force=force, shared=share)
    laws: Any = {"check_laws": check_laws, "inputs": _inputs(inputs), "statistics": stats}
    saving: Any = {"force": force, "workers": _workers(workers, max_memory)}
    runs: list[dict[str, Any]] = []
    with _documented(runs, style, report):
        for group in groups:
            start = time.perf_counter()
            with progress(group[0][0].name) as (observer, advance), _told(group, passes, runs):
                manager = PassManager(steps, observers=[observer], **laws)
                kept = None if len(group) > 1 else layout
                reports = _executed(manager, group, kept, progress=advance, **saving)
            seconds = time.perf_counter() - start
            done = zip(group, reports, strict=True)
            runs += [_record(*job, told, seconds) for job, told in done]
            if style == "text":
                _print_summaries(runs[-len(group) :], reports, verbose=verbose)


def _executed(
    manager: PassManager, group: Sequence[Job], layout: Layout | None, **options: Any
) -> list[Report]:
    """Run the passes; None for a layout makes the results share their data files."""
    if layout is None:
        return manager.run_shared([(a, b) for a, b in group if b is not None], **options)
    return [manager.run(*job, layout=layout, **options) for job in group]


@contextlib.contextmanager
def _documented(runs: list[dict[str, Any]], style: str, report: Path | None) -> Iterator[None]:
    """Give out the runs as JSON at the end, also when a check said no."""
    try:
        yield
    finally:
        version = importlib.metadata.version("onnxforge")
        text = json.dumps({"schema": 1, "version": version, "runs": runs}, indent=2)
        if style == "json":
            click.echo(text)
        if report is not None:
            write_text(report, text + "\n")


def _record(source: Path, target: Path | None, done: Report, seconds: float) -> dict[str, Any]:
    from onnxforge.report import report_as_dict

    return {
        "source": str(source),
        "target": None if target is None else str(target),
        **report_as_dict(done),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(),
    }


def _print_summaries(
    records: Sequence[dict[str, Any]], reports: Sequence[Report], *, verbose: bool
) -> None:
    from onnxforge.report import report_as_text, sizes_as_text

    for record, done in zip(records, reports, strict=True):
        source, target, memory = record["source"], record["target"], record["peak_memory"]
        click.echo(f"{source} -> {target}" if target else source)
        click.echo(report_as_text(done, verbose=verbose))
        peak = f", peak memory {memory / 1e6:.0f} MB" if memory else ""
        click.echo(f"  {record['seconds']:.2f} s{peak}")
    if len(reports) > 1:
        click.echo(f"together: {sizes_as_text(reports)}")


@contextlib.contextmanager
def _told(group: Sequence[Job], passes: str, runs: list[dict[str, Any]]) -> Iterator[None]:
    """Record errors; what is no error of ours gets a command to repeat it."""
    from onnxforge.manager import Report

    try:
        yield
    except OnnxforgeError as error:
        told = error.report if isinstance(error, CheckFailed) else None
        for source, _ in group:
            its_own = len(group) == 1 or str(error).startswith(f"{source}: ")
            done = told if told and its_own else Report()
            runs.append(_record(source, None, done, 0.0) | {"error": str(error)})
        raise
    except Exception as error:
        words = ["onnxforge", "run", "--passes", passes, *(str(source) for source, _ in group)]
        target = group[0][1]
        if target is None:
            words.append("--dry-run")
        elif len(group) > 1:
            words += ["--share", "--out-dir", str(target.parent)]
        else:  # what passes compute is computed while it is written
            words.append(str(target))
        error.add_note(f"this is a bug; reproduce it with: {shlex.join(words)}")
        raise


def _jobs(
    files: Sequence[Path], out_dir: Path | None, *, writes: bool
) -> list[tuple[Path, Path | None]]:
    """Pairs of input and output."""
    if out_dir is not None:
        if not out_dir.is_dir():
            raise click.UsageError(f"--out-dir {out_dir}: no such folder")
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            raise click.UsageError("two inputs have the same name")
        return [(file, out_dir / file.name) for file in files]
    if len(files) == 2 and (writes or not files[1].exists()):
        return [(files[0], files[1])]
    if not writes:
        return [(file, None) for file in files]
    raise click.UsageError("give IN and OUT, or inputs and --out-dir")


def _groups(jobs: Sequence[Job], *, share: bool, named: bool) -> list[list[Job]]:
    """Jobs that are written together: those that share their data files, else each alone."""
    from onnxforge.jobs import refuse_entangled

    if share and not named:
        raise click.UsageError("--share goes with --out-dir and without --layout")
    if share:
        if any(target is None for _, target in jobs):
            raise click.UsageError("--share writes: leave out --dry-run")
        return [list(jobs)]
    refuse_entangled(jobs)
    return [[job] for job in jobs]


def _inputs(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from onnxforge.numerics.samples import read_archive

    return read_archive(path)


def _workers(workers: int | None, max_memory: str | None) -> int | None:
    """Number of threads that fit into the memory there is."""
    if max_memory is None:
        return workers
    from onnxforge.options import ByteSize
    from onnxforge.storage.writer import default_workers

    try:
        limit = ByteSize(max_memory)
    except ValueError as error:
        raise click.UsageError(f"--max-memory: {error}") from None
    used = peak_memory() or 0
    able = (limit - used - _OTHER_BYTES) // _WORKER_BYTES
    if able < 1:
        needed = f"{math.ceil((used + _OTHER_BYTES + _WORKER_BYTES) / 1e6)}MB"
        raise OnnxforgeError(f"--max-memory {max_memory} is too little; {needed} is the least")
    return min(workers or default_workers(), able)
