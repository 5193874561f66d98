"""Reports of lint as text, JSON, Markdown, annotations of GitHub and JUnit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from onnxforge.lint.sarif import as_sarif
from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxforge.lint.finding import Finding, Report

__all__ = ["FORMATS"]

_ALIKE = 10  # findings of one rule in one file that text shows
_ROWS = 100  # findings that Markdown shows


def _text(report: Report) -> str:
    lines: list[str] = []
    for path, findings in _by_path(report).items():
        lines += [path, *_file_lines(findings), ""]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"mended: {path} by {passes}" for path, passes in report.fixed.items()]
    return "\n".join(map(printable, [*lines, _summary(report)]))


def _by_path(report: Report) -> Mapping[str, Sequence[Finding]]:
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        found[finding.path].append(finding)
    return found


def _file_lines(findings: Sequence[Finding]) -> Iterator[str]:
    for _, alike in itertools.groupby(findings, lambda finding: finding.code):
        group = list(alike)
        shown = group if len(group) <= _ALIKE + 1 else group[:_ALIKE]
        for finding in shown:
            where = f" {finding.where}:" if finding.where else ""
            yield f"  {finding.level} {finding.code} {finding.rule}:{where} {finding.message}"
        if more := len(group) - len(shown):
            name = f"{group[0].code} {group[0].rule}"
            yield f"  ... {name}: {more:,} more, --format json has all"


def _summary(report: Report) -> str:
    looked = f"{len(report.models)} model{'s' * (len(report.models) != 1)}"
    known = f", {report.known} known from the baseline" if report.known else ""
    if not report.findings:
        return f"clean: {looked}{known}"
    counts = ", ".join(
        f"{count} {level}{'s' * (count != 1 and level != 'info')}"
        for level, count in report.counts.items()
        if count
    )
    mendable = sum(finding.passes is not None for finding in report.findings)
    mend = f"; --fix mends {mendable}" if mendable else ""
    return f"{counts} in {looked}{known}{mend}"


def _json(report: Report) -> str:
    found: dict[str, Any] = {
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "counts": report.counts,
        "models": report.models,
        "notes": report.notes,
        "known": report.known,
        "fixed": report.fixed,
    }
    return json.dumps(found, indent=2)


def _sarif(report: Report) -> str:
    return json.dumps(as_sarif(report), indent=2)


def _github(report: Report) -> str:
    """Workflow commands that GitHub shows beside a change."""
    words = {"error": "error", "warning": "warning", "info": "notice"}
    lines = []
    for finding in report.findings:
        place = f"file={_property(finding.path)},title={finding.code} {finding.rule}"
        text = f"{finding.where}: {finding.message}" if finding.where else finding.message
        lines.append(f"::{words[finding.level]} {place}::{_data(text)}")
    return "\n".join([*lines, _summary(report)])


def _data(text: str) -> str:
    return printable(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _junit(report: Report) -> str:
    """A test for each rule that finds something in a model, and one for each clean model."""
    found = _by_path(report)
    suites = ElementTree.Element("testsuites", name="onnxforge lint")
    for path in dict.fromkeys([*report.models, *found]):
        findings = found.get(path, [])
        grave = [finding for finding in findings if finding.level != "info"]
        suite = ElementTree.SubElement(suites, "testsuite", name=printable(path))
        names = list(dict.fromkeys(finding.rule for finding in grave)) or ["clean"]
        for name in names:
            case = ElementTree.SubElement(
                suite, "testcase", classname=printable(path), name=name
            )
            mine = [finding for finding in grave if finding.rule == name]
            if mine:
                failure = ElementTree.SubElement(case, "failure", message=_alike(mine))
                failure.set("type", mine[0].code)
                failure.text = "\n".join(printable(str(finding)) for finding in mine)
        suite.set("tests", str(len(names)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, "unicode", xml_declaration=True)


def _alike(findings: Sequence[Finding]) -> str:
    more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
    return printable(findings[0].message) + more


def _markdown(report: Report) -> str:
    """What stands under a pull request."""
    title = "passed" if report.clean else "failed"
    lines = [f"### onnxforge lint: {title}", "", _summary(report), ""]
    if report.findings:
        lines += ["| file | rule | where | what |", "|---|---|---|---|"]
        for finding in report.findings[:_ROWS]:
            marks = {"error": "**error**", "warning": "warning", "info": "info"}
            rule = f"{marks[finding.level]} {finding.code} {finding.rule}"
            where = _code(finding.where) if finding.where else ""
            row = (_code(finding.path), rule, where, _cell(finding.message))
            lines.append(f"| {' | '.join(row)} |")
        if (more := len(report.findings) - _ROWS) > 0:
            lines += ["", f"{more} more are not shown."]
        rules = Counter((finding.code, finding.rule) for finding in report.findings)
        lines += ["", "`onnxforge explain CODE` tells what a rule means: "]
        lines[-1] += ", ".join(f"{code} ({count})" for (code, _), count in rules.items())
    lines += [f"* {_cell(note)}" for note in report.notes]
    return "\n".join(lines).rstrip()


def _cell(text: str) -> str:
    text = printable(text).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "\\`").replace("*", "\\*")


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


FORMATS: Mapping[str, Callable[[Report], str]] = {
    "text": _text,
    "json": _json,
    "sarif": _sarif,
    "github": _github,
    "junit": _junit,
    "markdown": _markdown,
}
"""What makes text of a report, by the name of the format."""
