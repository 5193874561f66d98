"""Write onnxforge/runtime/kernels.json: what each release of onnxruntime can load.

Limits and element types are found by loading small models, processor kernels and operators
are asked of the releases themselves, each in an own environment. What other providers have
is read from the documents in a clone of onnxruntime, as they stood where a release branched
off; without a clone that part of the file stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import _loads
import onnx
import runtimes
from onnx import helper

TABLE = runtimes.ROOT / "onnxforge/runtime/kernels.json"
DOMAINS = {
    "": range(7, 40),
    "ai.onnx.ml": range(1, 12),
    "ai.onnx.training": range(1, 4),
    "ai.onnx.preview": range(1, 4),
    "ai.onnx.preview.training": range(1, 4),
    "com.microsoft": range(1, 4),
    "com.microsoft.nchwc": range(1, 4),
    "com.ms.internal.nhwc": range(1, 60),
}
OPEN = 2**31 - 1
LONG = 60  # characters of a set of types that is worth a name
DOCUMENT, WEBGPU = "docs/OperatorKernels.md", "js/web/docs/webgpu-operators.md"

Kernel = tuple[str, str, int, int, tuple[tuple[str, frozenset[str]], ...]]


def limits(release: str, python: Path, folder: Path) -> dict[str, Any]:
    """Newest IR version, newest version of each domain and element types, by trying them."""
    tried = {("ir", str(n)): _model(ir=n) for n in range(3, 24)}
    tried |= {
        (domain, str(n)): _model(imports={"": 13, domain: n})
        for domain, versions in DOMAINS.items()
        for n in versions
    }
    types = onnx.TensorProto.DataType.items()
    tried |= {("type", name.lower()): _model(extra=number) for name, number in types}
    paths = []
    for i, model in enumerate(tried.values()):
        paths.append(folder / f"{i}.onnx")
        paths[-1].write_bytes(model.SerializeToString())
    loaded: dict[str, list[str]] = defaultdict(list)
    for (kind, what), error in zip(
        tried, _loads.failures(python, [(path, ()) for path in paths]), strict=True
    ):
        if error is None:
            loaded[kind].append(what)
    found: dict[str, Any] = {kind: loaded[kind] for kind in ("type",)}
    found |= {k: max(map(int, v)) for k, v in loaded.items() if k != "type"}
    print(release, found, file=sys.stderr)
    return found


def _model(
    ir: int = 8, imports: Mapping[str, int] | None = None, extra: int = 1
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    more = helper.make_tensor_value_info("z", extra, [2])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [x, more], [y])
    opsets = [helper.make_opsetid(*item) for item in (imports or {"": 13}).items()]
    return helper.make_model(graph, ir_version=ir, opset_imports=opsets)


def processor(told: Mapping[str, Any]) -> set[Kernel]:
    """The kernels that a release says it has."""
    return {
        (domain, op, first, last, tuple((k, frozenset(_types(v))) for k, v in by.items()))
        for domain, op, first, last, by in told["kernels"]
    }


def _types(names: Iterable[str]) -> Iterator[str]:
    return (re.sub(r"tensor\((\w+)\)", r"\1", name).replace(",", ":") for name in names)


def documented(text: str, provider: str) -> set[Kernel]:
    """The kernels of a provider in a version of the document."""
    section = text.partition(f"Operators implemented by {provider}")[2].partition("\n## ")[0]
    kernels: set[Kernel] = set()
    domain = op = ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "Operator Domain" in line:
            domain = re.sub(r".*\*([\w.]+)\*.*", r"\1", line).replace("ai.onnx", "", 1)
            domain = f"ai.onnx{domain}" if domain.startswith(".") else domain
        elif len(cells) == 4 and re.fullmatch(r"\d+\+?|\[\d+, \d+\]", cells[2]):
            op = cells[0] or op
            numbers = [int(n) for n in re.findall(r"\d+", cells[2])]
            last = OPEN if cells[2].endswith("+") else numbers[-1]
            by = re.findall(r"\*\*(\w+)\*\* = ([^*]*?)(?:<br/>|$)", cells[3])
            types = tuple((k, frozenset(_types(re.split(r",\s*", v)))) for k, v in by)
            kernels.add((domain, op, numbers[0], last, types))
    return kernels


def webgpu(text: str) -> set[Kernel]:
    """Operators and versions in the document of WebGPU; it does not tell types."""
    found: set[Kernel] = set()
    for line in text.splitlines():
        op, _, domains = line.strip("| ").partition(" | ")
        for domain, versions in re.findall(r"([\w.]+)\(([\d,+-]+)\)", domains):
            for span in versions.split(","):
                first, _, last = span.rstrip("+").partition("-")
                end = OPEN if span.endswith("+") else int(last or first)
                name = "" if domain == "ai.onnx" else domain
                found.add((name, op, int(first), end, ()))
    return found


def documents(repository: Path, release: str, path: str) -> str | None:
    """A document as it stood when the next release was begun, None where it was not yet."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    major, minor = map(int, release.split("."))
    following = f"{major}.{minor + 1}.0"
    tips = git("for-each-ref", "--sort=-committerdate", "--format=%(objectname)").split()
    for commit in git("log", "--format=%H", tips[0], "--", "VERSION_NUMBER").split():
        if git("show", f"{commit}:VERSION_NUMBER").strip() == following:
            return git("show", f"{commit}^:{path}")
    return None


class Rows:
    """Kernels of one provider over all releases, as lines a person can read."""

    def __init__(self, releases: list[str], sets: dict[str, str]) -> None:
        self._releases = releases
        self._sets = sets

    def of(self, kernels: Mapping[str, set[Kernel]]) -> dict[str, dict[str, list[str]]]:
        held: dict[Kernel, set[str]] = defaultdict(set)
        for release, found in kernels.items():
            for kernel in found:
                held[kernel].add(release)
        known = [release for release in self._releases if release in kernels]
        merged: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        for kernel, releases in held.items():
            for span in _spans(known, releases):
                *head, types = kernel
                if len(types) == 1:
                    merged[(*head, types[0][0], span)] |= types[0][1]
                else:
                    merged[(*head, types, span)] |= set()
        rows = []
        for (domain, op, first, last, types, span), names in merged.items():
            by = ((types, frozenset(names)),) if isinstance(types, str) else types
            texts = sorted((name, ",".join(sorted(allowed))) for name, allowed in by)
            rows.append((domain, op, first, last, span, texts))
        table: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for domain, op, first, last, span, texts in sorted(rows):
            words = [f"{first}+" if last == OPEN else f"{first}-{last}", span]
            words += [f"{name}={self._named(text)}" for name, text in texts]
            table[domain][op].append(" ".join(filter(None, words)))
        return {domain: dict(ops) for domain, ops in table.items()}

    def _named(self, text: str) -> str:
        if len(text) <= LONG:
            return text
        return "@" + self._sets.setdefault(text, str(len(self._sets)))


def _spans(known: list[str], releases: set[str]) -> Iterator[str]:
    """``1.17..1.19``, ``1.21..`` or nothing for all that are known."""
    start: str | None = None
    for i, release in enumerate([*known, ""]):
        if release in releases and start is None:
            start = release
        elif release not in releases and start is not None:
            first = "" if start == known[0] else start
            last = "" if not release else known[i - 1]
            yield f"{first}..{last}" if first or last else ""
            start = None


def signatures(told: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """What goes into the operators that onnx does not know, and what comes out of them."""
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for release in told:
        for domain, op, _, inputs, outputs, _ in release["operators"]:
            if domain.startswith("com.ms.internal") or onnx.defs.has(op, domain):
                continue
            found[domain][op] = [_ports(inputs), _ports(outputs)]
    return {domain: dict(sorted(ops.items())) for domain, ops in sorted(found.items())}


def lacking(
    told: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, str]]:
    """Operators, and attributes of operators, that onnx tells of and a release lacks.

    Only of those whose version a release loads: the others need no word.
    """
    held: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for release, parts in told.items():
        own = {(d, op, since): set(names) for d, op, since, _, _, names in parts["operators"]}
        for schema in onnx.defs.get_all_schemas_with_history():
            key = schema.domain, schema.name, schema.since_version
            newest = found[release].get(schema.domain, 0)
            if schema.deprecated or schema.since_version > newest:
                continue
            operator = f"{schema.name} {schema.since_version}"
            if key not in own:
                held[schema.domain][operator].add(release)
            for name in sorted(set(schema.attributes) - own.get(key, set(schema.attributes))):
                held[schema.domain][f"{operator} {name}"].add(release)
    known = list(told)
    return {
        domain: {what: " ".join(_spans(known, on)) for what, on in sorted(parts.items())}
        for domain, parts in sorted(held.items())
    }


def _ports(formal: Iterable[tuple[str, str, str]]) -> str:
    mark = {"Variadic": "..."}
    return " ".join(
        f"{name}:{next(_types([kind]))}{mark.get(option, '')}" for name, kind, option in formal
    )


def steps(found: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, int]:
    """The releases in which a limit rose."""
    rising: dict[str, int] = {}
    for release, limit in found.items():
        if kind in limit and limit[kind] not in list(rising.values())[-1:]:
            rising[release] = limit[kind]
    return rising


def main(arguments: list[str] | None = None) -> None:
    """Ask everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, help="a clone of onnxruntime")
    parser.add_argument("--cache", type=Path, default=runtimes.ROOT / ".runtimes")
    options = parser.parse_args(arguments)
    told, limit = {}, {}
    for release in runtimes.RELEASES:
        python = runtimes.environment(release, options.cache).python
        told[release] = _loads.kernels(python)
        with tempfile.TemporaryDirectory() as folder:
            limit[release] = limits(release, python, Path(folder))
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    # Names that the documented part uses stay.
    sets = {} if options.repository else {t: n for n, t in old.get("sets", {}).items()}
    rows = Rows(list(runtimes.RELEASES), sets)
    table: dict[str, Any] = {
        "releases": list(runtimes.RELEASES),
        "ir": steps(limit, "ir"),
        "opsets": {domain: steps(limit, domain) for domain in DOMAINS},
        "types": {
            name: next(r for r in limit if name in limit[r]["type"])
            for name in limit[runtimes.RELEASES[-1]]["type"]
        },
        "signatures": signatures(told.values()),
        "lacking": lacking(told, limit),
        "cpu": rows.of({release: processor(found) for release, found in told.items()}),
    }
    if options.repository:
        table |= from_documents(options.repository, rows)
    else:
        for part in ("documented", "cuda", "webgpu"):
            table[part] = old.get(part, {})
    table["sets"] = {name: text for text, name in sets.items()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{TABLE}: {TABLE.stat().st_size} bytes")


def from_documents(repository: Path, rows: Rows) -> dict[str, Any]:
    """The parts of the table that no release of the Python package tells."""
    cuda, gpu = {}, {}
    for release in runtimes.RELEASES:
        text = documents(repository, release, DOCUMENT)
        if text is not None:
            cuda[release] = documented(text, "CUDAExecutionProvider")
            gpu[release] = webgpu(documents(repository, release, WEBGPU) or "")
    return {"documented": list(cuda), "cuda": rows.of(cuda), "webgpu": rows.of(gpu)}


if __name__ == "__main__":
    main()
