"""Reports as text and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxforge.core import Fate, Finding
from onnxforge.text import aligned, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from onnxforge.inspection import Inspection
    from onnxforge.layout import FileLayout, ModelLayout, Range
    from onnxforge.manager import PassReport, Report

__all__ = [
    "inspection_as_dict",
    "inspection_as_text",
    "layout_as_dict",
    "layout_as_text",
    "report_as_dict",
    "report_as_text",
    "sizes_as_text",
]

_USUAL_ROWS = 20


def _human_bytes(count: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def report_as_dict(report: Report) -> dict[str, Any]:
    """A report as plain data, for JSON."""
    return {
        "passes": [
            {
                "pass": step.text,
                "effect": step.effect,
                "modified": step.modified,
                "seconds": round(step.seconds, 3),
                "stats": dict(step.stats),
                "weights": {
                    fate.value: dict(zip(("count", "bytes"), step.tally(fate), strict=True))
                    for fate in Fate
                },
                "findings": [_finding_as_dict(finding) for finding in step.findings],
            }
            for step in report.passes
        ],
        "findings": [_finding_as_dict(finding) for finding in report.findings],
        "read": report.source,
        "written": report.written,
        "layout": report.layout,
    }


def _finding_as_dict(finding: Finding) -> dict[str, Any]:
    fields = dataclasses.asdict(finding)
    fields["fate"] = finding.fate.value if finding.fate else None
    return fields


def report_as_text(report: Report, *, verbose: bool = False) -> str:
    """The closing summary: what each pass did to how many weights, and why not to others."""
    lines = [f"  warning: {finding}" for finding in report.findings]
    for step in report.passes:
        lines += _step_lines(step, verbose=verbose)
    if report.written:
        lines.append(f"  {sizes_as_text([report])}, {report.layout}")
    return "\n".join(map(printable, lines))


def sizes_as_text(reports: Sequence[Report]) -> str:
    """Size of all files read and of all written; those in several reports count once."""
    before = sum({k: v for report in reports for k, v in report.source.items()}.values())
    after = sum({k: v for report in reports for k, v in report.written.items()}.values())
    share = f" ({100 * after / before:.1f} %)" if before else ""
    return f"{_human_bytes(before)} -> {_human_bytes(after)}{share}"


def _step_lines(step: PassReport, *, verbose: bool) -> Iterator[str]:
    name = step.text.partition("{")[0]
    unmodified = "graph unchanged" if step.stats else "nothing to do"
    what = "modified" if step.modified else "ok" if step.effect == "check" else unmodified
    yield f"  {name}: {what}"
    for stat, number in step.stats.items():
        yield f"    {stat.replace('_', ' ')}: {number}"
    for fate in Fate:
        count, size = step.tally(fate)
        if count:
            yield f"    {count} weights {fate.value}, {_human_bytes(size)}"
            if fate is not Fate.TREATED:
                yield from _reasons(f for f in step.findings if f.fate is fate and not f.op)
    yield from _coverage([finding for finding in step.findings if finding.op])
    for finding in step.findings:
        if verbose or finding.fate is None:
            yield f"    {finding.level}: {finding}"


def _coverage(findings: Sequence[Finding]) -> Iterator[str]:
    """How many nodes of each operator were rewritten, and why the others were not."""
    for op in dict.fromkeys(finding.op for finding in findings):
        mine = [finding for finding in findings if finding.op == op]
        done = sum(finding.fate is Fate.TREATED for finding in mine)
        yield f"    {done} of {len(mine)} {op} rewritten"
        reasons = Counter((f.code, f.message) for f in mine if f.fate is not Fate.TREATED)
        for (code, message), count in reasons.most_common():
            yield f"      {code} {message}: {count}"


def _reasons(findings: Iterable[Finding]) -> Iterator[str]:
    """One line for each reason, the most frequent first."""
    grouped: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        grouped.setdefault((finding.code, finding.message), []).append(finding)
    for (code, message), group in sorted(grouped.items(), key=lambda item: -len(item[1])):
        size = _human_bytes(sum(finding.nbytes for finding in group))
        if len(group) == 1:
            yield f"      {group[0]}: {size}"
        else:
            yield f"      {code} {message}: {len(group)} weights, {size}"


def inspection_as_dict(found: Inspection) -> dict[str, Any]:
    """What `inspect` found as plain data, for JSON."""
    return dataclasses.asdict(found)


def inspection_as_text(found: Inspection) -> str:
    """What `inspect` found as tables."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    lines = [
        f"IR {found.ir_version}, opsets: {opsets}",
        f"made by: {found.producer or 'unknown'}",
        *(["pipeline: " + found.pipeline] if found.pipeline else []),
        "",
        *_table(
            ["file", "bytes"], [[Path(p).name, f"{size:,}"] for p, size in found.files.items()]
        ),
        "",
        *_table(
            ["", "name", "type", "shape"],
            [
                [kind, value.name, value.type, value.shape]
                for kind, values in (("input", found.inputs), ("output", found.outputs))
                for value in values
            ],
        ),
        "",
        *_table(
            ["weights", "in", "stored", "count", "bytes"],
            [
                [group.dtype, group.place, group.stored, str(group.count), f"{group.nbytes:,}"]
                for group in found.weights
            ],
        ),
        "",
        *_table(
            ["weights read by", "type", "count", "bytes"],
            [
                [group.readers, group.dtype, str(group.count), f"{group.nbytes:,}"]
                for group in found.readers
            ],
        ),
        "",
        *_table(["operator", "count"], [[op, str(count)] for op, count in found.ops.items()]),
    ]
    return "\n".join(map(printable, lines))


def layout_as_dict(found: ModelLayout) -> dict[str, Any]:
    """The maps of the data files as plain data, for JSON."""
    totals = ("alignment", "misaligned", "owned", "padding", "orphaned", "saved")
    return {
        "model": str(found.path),
        "inline": {"count": found.inline, "bytes": found.inline_bytes},
        "remarks": found.remarks,
        "files": [
            {
                "path": str(file.path),
                "size": file.size,
                **{name: getattr(file, name) for name in totals},
                "ranges": [vars(part) for part in file.ranges],
                "empty": file.empty,
            }
            for file in found.files
        ],
    }


def layout_as_text(found: ModelLayout) -> str:
    """The maps of the data files; of what is usual only the first rows."""
    lines = [f"remark: {remark}" for remark in found.remarks]
    lines.append(f"inline: {found.inline:,} weights, {found.inline_bytes:,} bytes")
    for file in found.files:
        name = os.path.relpath(file.path, found.path.parent)
        lines += [
            "",
            f"{name}: {file.size:,} bytes, ranges: {len(file.weights):,}, alignment:"
            f" {file.alignment}, misaligned: {file.misaligned:,}",
            f"bytes owned: {file.owned:,}, padding: {file.padding:,}, orphaned:"
            f" {file.orphaned:,}, saved by sharing: {file.saved:,}",
            *([f"without elements: {_few(file.empty)}"] if file.empty else []),
            *_table(["start", "stop", "bytes", "kind", "owners"], list(_rows(file))),
        ]
    return "\n".join(map(printable, lines))


def _rows(file: FileLayout) -> Iterator[list[str]]:
    def row(start: int, stop: int, *words: str) -> list[str]:
        return [f"{start:,}", f"{stop:,}", f"{stop - start:,}", *words]

    def is_usual(part: Range) -> bool:
        return part.kind in ("owned", "padding")

    left = _USUAL_ROWS
    for usual, group in itertools.groupby(file.ranges, is_usual):
        run = list(group)
        shown = run[:left] if usual and len(run) > left + 1 else run
        left -= min(left, len(shown)) if usual else 0
        for part in shown:
            yield row(part.start, part.stop, part.kind, _few(part.owners))
        if more := run[len(shown) :]:
            what = f"{len(more):,} more, --format json shows all"
            yield row(more[0].start, max(part.stop for part in more), "...", what)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need, numbers to the right."""
    if not rows:
        return [f"{header[0] or header[1]}: none"]
    numeric = [
        all(row[i].replace(",", "").isdigit() for row in rows) for i in range(len(header))
    ]
    return aligned([header, *rows], numeric)
