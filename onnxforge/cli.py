"""The command line; the only module that prints or exits."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import logging
import math
import shlex
import sys
import time
import traceback
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxforge.errors import CheckFailed, OnnxforgeError, SpecError
from onnxforge.interrupts import Interrupted, interruptible
from onnxforge.memory import peak_memory
from onnxforge.progress import progress
from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxforge.jobs import Job
    from onnxforge.manager import PassManager, Report
    from onnxforge.placement import Layout

__all__ = ["main"]

_FAILED_CHECK, _FAILED_RUN, _INTERRUPTED = 1, 2, 130
_WORKER_BYTES = 8 << 20  # blocks of source and result that a writing thread holds
_OTHER_BYTES = 16 << 20  # the graph, and the threads that look weights through
_PATH = click.Path(path_type=Path, readable=False)  # we say ourselves what is wrong with it
_FORMAT = click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What to print on stdout.",
)


_EXAMPLES = """\b
Examples:
  onnxforge run --passes 'fp16w,assert-pure' in.onnx out.onnx
  onnxforge list
  onnxforge explain fp16w
  onnxforge inspect in.onnx
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXAMPLES)
@click.version_option(package_name="onnxforge")
def _cli() -> None:
    """Turn an exported ONNX model into the tiers a publisher ships."""


@_cli.command()
@click.argument("files", nargs=-1, required=True, type=_PATH)
@click.option("--passes", required=True, metavar="PIPELINE", help="Passes, as in 'a,b{c=1}'.")
@click.option("--out-dir", type=_PATH, help="Folder for many results.")
@click.option("--share", is_flag=True, help="One set of data files for all results.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--check-laws", is_flag=True, help="Hold each pass to its law on this model.")
@click.option("--inputs", type=_PATH, help=".npz to run the laws on.")
@click.option(
    "--layout",
    type=click.Choice(["keep", "inline", "sidecar"]),
    default="keep",
    show_default=True,
    help="Where weights go: as in the input, all into the model, or into a data file.",
)
@_FORMAT
@click.option("--report", type=_PATH, help="Write the report as JSON.")
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
    layout: Layout,
    style: str,
    report: Path | None,
    dry_run: bool,
    workers: int | None,
    max_memory: str | None,
    verbose: bool,
) -> None:
    """Run passes on IN and write OUT, or on many files with --out-dir."""
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
        refuse_report(report, jobs, force=force)
    laws: Any = {"check_laws": check_laws, "inputs": _inputs(inputs)}
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
            _write_text(report, text + "\n")


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
            runs.append(_record(source, None, told or Report(), 0.0) | {"error": str(error)})
        raise
    except Exception as error:
        sources = [str(source) for source, _ in group]
        command = shlex.join(["onnxforge", "run", "--passes", passes, *sources])
        error.add_note(f"this is a bug; reproduce it with: {command} --dry-run")
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
    if share and all(target is not None for _, target in jobs):
        return [list(jobs)]
    refuse_entangled(jobs)
    return [[job] for job in jobs]


def _inputs(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    import numpy as np

    try:
        with path.open("rb") as file, zipfile.ZipFile(file):
            return dict(np.load(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OnnxforgeError(f"{path}: no .npz of inputs ({error})") from None


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


@_cli.command("list")
@_FORMAT
def list_passes(style: str) -> None:
    """List all passes, built in and installed."""
    from onnxforge.registry import entries, pass_class

    rows = []
    for name, entry in entries().items():
        try:
            cls = pass_class(name)
            rows.append((name, cls.effect.value, _summary(cls), entry.distribution))
        except OnnxforgeError as error:
            rows.append((name, "broken", str(error), entry.distribution))
    if style == "json":
        keys = ("name", "effect", "summary", "distribution")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    width = max(len(row[0]) for row in rows)
    for name, effect, summary, _ in rows:
        click.echo(f"{name:<{width}}  {effect:<8} {summary}")


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


@_cli.command()
@click.argument("topic", metavar="PASS|CODE")
def explain(topic: str) -> None:
    """Explain a pass, or the code of a finding."""
    import inspect

    from onnxforge.manager import PassManager
    from onnxforge.registry import entries, pass_class

    if topic[:2].upper() == "OF" and topic[2:].isdigit():
        sources: list[Any] = [PassManager, *(pass_class(name) for name in entries())]
        meanings = {code: text for source in sources for code, text in source.codes.items()}
        if topic.upper() not in meanings:
            raise SpecError(f"no finding has the code {topic.upper()}")
        click.echo(f"{topic.upper()}: {meanings[topic.upper()]}")
        return
    cls = pass_class(topic)
    click.echo(f"{cls.name} ({cls.effect.value})\n\n{inspect.getdoc(cls)}")
    if cls.codes:
        click.echo("\nFindings:")
        for code, text in sorted(cls.codes.items()):
            click.echo(f"    {code}: {text}")


@_cli.command("inspect")
@click.argument("model", type=_PATH)
@click.option("--layout", "mapped", is_flag=True, help="Map each data file byte by byte.")
@_FORMAT
def inspect_model(model: Path, mapped: bool, style: str) -> None:
    """Show what a model is: operators, versions, interface, weights, files."""
    from onnxforge import inspection, layout, report

    found: Any = layout.layout(model) if mapped else inspection.inspect(model)
    as_dict: Any = report.layout_as_dict if mapped else report.inspection_as_dict
    as_text: Any = report.layout_as_text if mapped else report.inspection_as_text
    click.echo(json.dumps(as_dict(found), indent=2) if style == "json" else as_text(found))


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise OnnxforgeError(f"{path}: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check said no, 2 the run itself failed."""
    # Collecting while modules load, and again at exit, takes a third of a short run.
    gc.disable()
    try:
        with interruptible():
            sys.exit(_exit_code(arguments))
    except Interrupted as end:  # before the command began, or when it had ended
        sys.exit(end.exit_code)
    finally:
        gc.freeze()
        gc.enable()


def _exit_code(arguments: Sequence[str] | None) -> int:
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # what matters, we say ourselves
    try:
        _cli.main(args=arguments, prog_name="onnxforge", standalone_mode=False)
    except click.exceptions.Abort as end:
        return getattr(end.__cause__, "exit_code", _INTERRUPTED)
    except click.ClickException as error:
        error.show()
        return _FAILED_RUN
    except SystemExit:  # click's answer to a closed pipe: the reader has seen enough
        return _FAILED_RUN
    except OnnxforgeError as error:
        text = f"onnxforge: {error}"
        lines = text.split("\n") if isinstance(error, CheckFailed | SpecError) else [text]
        click.echo("\n".join(map(printable, lines)), err=True)
        return _FAILED_CHECK if isinstance(error, CheckFailed) else _FAILED_RUN
    except Exception as bug:  # exit 1 would mean that a check said no
        traceback.print_exc()
        raise SystemExit(_FAILED_RUN) from bug
    return 0
