"""What a bundle says of itself: metadata.json, manifest.json and PARITY.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from onnxforge.bundle.owned import folder_of, places_of
from onnxforge.bundle.recipe import MANIFEST, METADATA, PARITY
from onnxforge.bundle.tasks import hashed
from onnxforge.bundle.units import units
from onnxforge.compare.document import Foreign
from onnxforge.compare.render import table_as_markdown
from onnxforge.compare.tables import Table
from onnxforge.storage.whole import digest, write_text

if TYPE_CHECKING:
    from onnxforge.bundle.plan import Plan
    from onnxforge.bundle.recipe import Graph, Tier

__all__ = ["SCHEMA", "as_json", "manifest", "metadata", "parity", "write_documents"]

SCHEMA = 1
"""Version of both JSON forms; it rises when something goes away or changes its meaning."""

_COPIED = (
    "pipeline", "ir_version", "opsets", "domains", "functions", "inputs", "outputs", "coverage"
)  # fmt: skip
_ERRORS = "max", "mean", "p99", "relative", "sqnr_db", "cosine"
_HEADER = (
    "tier", "MB", "share", "output", "max", "mean", "p99", "relative", "SQNR dB", "cosine",
    "argmax mismatches", "finite",
)  # fmt: skip

_Records = dict[str, dict[str, dict[str, Any]]]


def write_documents(plan: Plan) -> Iterator[str]:
    """Write what the bundle says of itself, as far as it is not there yet.

    Args:
        plan: The recipe, and what is in its place.

    Yields:
        The name of each file that was written.

    Raises:
        OnnxforgeError: One cannot be written.
    """
    folder = plan.recipe.output
    folder.mkdir(parents=True, exist_ok=True)
    told = metadata(plan)
    texts = {METADATA: as_json(told), PARITY: parity(told)}
    for name, text in texts.items():
        if _write(plan, name, text):
            yield name
    if _write(plan, MANIFEST, as_json(manifest(plan))):
        yield MANIFEST


def _write(plan: Plan, name: str, text: str) -> bool:
    path = plan.recipe.output / name
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True


def as_json(content: Any) -> str:
    """Plain data as the bundle has it."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _published(plan: Plan) -> Iterator[tuple[Tier, dict[str, Any]]]:
    """What is in its place, perhaps as an earlier recipe wanted it."""
    published = plan.state.published
    now = [str(unit) for unit in units(plan.recipe)]
    for unit in (*now, *sorted(published.keys() - now)):
        tier = plan.recipe.tiers.get(unit.partition("/")[0])
        if tier and unit in published:
            yield tier, published[unit]


def metadata(plan: Plan) -> dict[str, Any]:
    """What is in the bundle, as ``metadata.schema.json`` describes it."""
    recipe = plan.recipe
    tiers: _Records = {}
    versions: dict[str, set[str]] = {}
    for tier, record in _published(plan):
        empty = {"targets": asdict(tier.targets), "graphs": {}}
        graphs = tiers.setdefault(tier.name, empty)["graphs"]
        entries, folder = record["graphs"], folder_of(record)
        graphs |= {n: _graph(folder, entries[n]) for n in recipe.graphs if n in entries}
        for tool, version in record["key"]["toolchain"].items():
            versions.setdefault(tool, set()).add(str(version))
    measured = (g["parity"] for tier in tiers.values() for g in tier["graphs"].values())
    for runtime in {each["onnxruntime"] for each in measured if each}:
        versions.setdefault("onnxruntime", set()).add(str(runtime))
    versions = versions or {"onnxforge": {plan.tools["onnxforge"]}}
    golden = [place for each in plan.state.golden.values() for place in each["places"]]
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "license": recipe.license,
        "targets": {**asdict(recipe.targets), "browser": list(recipe.browser)},
        "toolchain": {tool: ", ".join(sorted(versions[tool])) for tool in sorted(versions)},
        "graphs": {n: _source(plan, n) for n in recipe.graphs if n in plan.state.sources},
        "tiers": tiers,
        "files": sorted([*plan.state.extras, *golden]),
    }


def _source(plan: Plan, name: str) -> dict[str, Any]:
    source = plan.state.sources[name]
    return {
        "sha256": source["digest"],
        "bytes": source["bytes"],
        "statistics": _statistics(plan, plan.recipe.graphs[name]),
    }


def _statistics(plan: Plan, graph: Graph) -> dict[str, Any] | None:
    if (known := plan.used_statistics(graph)) is None:
        return None
    file = str(plan.recipe.statistics_of(graph)) if plan.recipe.statistics else None
    return {"sha256": known["sha256"], "samples": known["samples"], "file": file}


def _graph(folder: PurePosixPath, entry: Mapping[str, Any]) -> dict[str, Any]:
    names = [entry["model"], *entry["data"]]
    judged = entry.get("judged", {"parity": None, "gates": []})
    return {
        "model": str(folder / entry["model"]),
        "data": [str(folder / name) for name in entry["data"]],
        "bytes": sum(entry["files"][name]["bytes"] for name in names),
        **{key: entry[key] for key in _COPIED},
        "parity": judged["parity"],
        "gates": judged["gates"],
    }


def manifest(plan: Plan) -> dict[str, Any]:
    """Size and hashes of all files but the manifest, as ``manifest.schema.json`` says."""
    recipe, state = plan.recipe, plan.state
    files: dict[str, Any] = {}
    for record in state.published.values():
        files |= places_of(record)
    for each in state.golden.values():
        files |= each["places"]
    files |= state.extras
    for name in (METADATA, PARITY):
        files[name] = hashed(recipe.output / name)
    if recipe.md5:
        _know_md5(plan, files)
        files = {
            name: {**file, "md5": state.md5[file["sha256"]]} for name, file in files.items()
        }
    return {"schema": SCHEMA, "files": dict(sorted(files.items()))}


def _know_md5(plan: Plan, files: Mapping[str, Any]) -> None:
    """Take the MD5 of files of which it is not known from before."""
    known = plan.state.md5
    new = {file["sha256"]: name for name, file in files.items() if file["sha256"] not in known}
    with ThreadPoolExecutor() as pool:
        paths = [plan.recipe.output / name for name in new.values()]
        known.update(zip(new, pool.map(partial(digest, algorithm="md5"), paths), strict=True))
    for sha in known.keys() - {file["sha256"] for file in files.values()}:
        del known[sha]
    plan.state.save()


def parity(told: Mapping[str, Any]) -> str:
    """How far each tier is from the sources, as Markdown.

    Args:
        told: What `metadata` gives.
    """
    lines = [f"# {told['name']}: parity", "", "## Error to the source"]
    for name, source in told["graphs"].items():
        rows = {tier: each["graphs"][name] for tier, each in told["tiers"].items()
                if name in each["graphs"]}  # fmt: skip
        shared = [tier for tier in rows if _shares(told["tiers"][tier]["graphs"].values())]
        note = _note(rows, shared)
        table = Table(name, _HEADER, list(_rows(rows, source["bytes"])), note)
        lines += ["", *table_as_markdown(table)] if table.rows else []
    gates = [
        (
            tier,
            name,
            Foreign(gate["gate"]),
            Foreign(gate["output"]),
            _shown(gate["value"], "cosine" in gate["gate"]),
        )
        for tier, each in told["tiers"].items()
        for name, graph in each["graphs"].items()
        for gate in graph["gates"]
    ]
    if gates:
        header = "tier", "graph", "gate", "output", "value"
        lines += ["", "## Gates", ""]
        lines += ["A tier that does not keep to its gates is not published.", ""]
        lines += table_as_markdown(Table("What was measured", header, gates))
    return "\n".join(lines) + "\n"


def _rows(tiers: Mapping[str, Any], size: int) -> Iterator[tuple[str, ...]]:
    for tier, graph in tiers.items():
        head = tier, f"{graph['bytes'] / 1e6:.1f}", f"{100 * graph['bytes'] / size:.1f} %"
        found = graph["parity"]
        if found is None:
            what = "not compared" if graph["pipeline"] else "a copy"
            yield *head, what, *("-" for _ in _HEADER[4:])
            continue
        differ = [each for each in found["outputs"] if each["max"] or not each["finite"]]
        yield from ((*head, *_measured(output)) for output in differ)
        if equal := len(found["outputs"]) - len(differ):
            what = f"{equal} other{'s' * (equal != 1)}" if differ else "all"
            yield *head, what, *("0" for _ in _ERRORS[:4]), "inf", "1", "-", "yes"


def _measured(output: Mapping[str, Any]) -> tuple[str, ...]:
    argmax = output["argmax"]
    return (
        Foreign(output["name"]),
        *(_shown(output[error], error == "cosine") for error in _ERRORS),
        f"{argmax['mismatches']}/{argmax['rows']}" if argmax else "-",
        "yes" if output["finite"] else "no",
    )


def _shares(graphs: Iterable[Mapping[str, Any]]) -> bool:
    data = [name for graph in graphs for name in graph["data"]]
    return len(set(data)) < len(data)


def _note(tiers: Mapping[str, Any], shared: Sequence[str]) -> str:
    """What the numbers are of; tiers that were compared in the same way share a line."""
    ways: dict[str, list[str]] = {}
    for tier, graph in tiers.items():
        if found := graph["parity"]:
            threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
            way = f"onnxruntime {found['onnxruntime']}, {', '.join(found['providers'])}"
            emulated = found.get("emulated")  # which what was judged before does not say
            how = f", emulated: float32 rounded as {emulated}" if emulated else ""
            way = f"{found['samples']} samples, {way}, {threads}{how}"
            ways.setdefault(way, []).append(tier)
    said = [f"{', '.join(names)}: {way}." for way, names in ways.items()]
    said = ["SQNR and cosine are of the worst sample.", *said] if said else []
    both = f"{', '.join(shared)}: data that other graphs read as well are counted."
    return " ".join([*said, both] if shared else said)


def _shown(value: float | str | None, is_cosine: bool = False) -> str:
    """A number, that of a cosine with its many nines."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.9g}" if is_cosine else f"{value:.3g}"
