"""What a bundle says of itself: metadata.json, manifest.json and PARITY.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from onnxforge.bundle.recipe import MANIFEST, METADATA, PARITY
from onnxforge.bundle.tasks import hashed
from onnxforge.bundle.units import units
from onnxforge.compare.document import Foreign
from onnxforge.compare.render import table_as_markdown
from onnxforge.compare.tables import Table
from onnxforge.storage.whole import write_text

if TYPE_CHECKING:
    from onnxforge.bundle.plan import Plan
    from onnxforge.bundle.recipe import Graph, Targets
    from onnxforge.bundle.units import Unit

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


def _published(plan: Plan) -> Iterator[tuple[Unit, dict[str, Any]]]:
    for unit in units(plan.recipe):
        if record := plan.state.published.get(str(unit)):
            yield unit, record


def metadata(plan: Plan) -> dict[str, Any]:
    """What is in the bundle, as ``metadata.schema.json`` describes it."""
    recipe = plan.recipe
    tiers: _Records = {}
    versions: dict[str, set[str]] = {}
    for unit, record in _published(plan):
        empty = {"targets": _targets(unit.tier.targets), "graphs": {}}
        graphs = tiers.setdefault(unit.tier.name, empty)["graphs"]
        graphs |= {name: _graph(unit, entry) for name, entry in record["graphs"].items()}
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
        "targets": {**_targets(recipe.targets), "browser": list(recipe.browser)},
        "toolchain": {tool: ", ".join(sorted(versions[tool])) for tool in sorted(versions)},
        "graphs": {n: _source(plan, n) for n in recipe.graphs if n in plan.state.sources},
        "tiers": tiers,
        "files": sorted([*plan.state.extras, *golden]),
    }


def _targets(targets: Targets) -> dict[str, list[str]]:
    return {
        "onnxruntime": list(targets.onnxruntime),
        "providers": list(targets.providers),
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


def _graph(unit: Unit, entry: Mapping[str, Any]) -> dict[str, Any]:
    folder: PurePosixPath = unit.folder
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
    for unit, record in _published(plan):
        for entry in record["graphs"].values():
            files |= {str(unit.folder / name): file for name, file in entry["files"].items()}
    for each in state.golden.values():
        files |= each["places"]
    files |= state.extras
    for name in (METADATA, PARITY):
        files[name] = hashed(recipe.output / name, md5=recipe.md5)
    return {"schema": SCHEMA, "files": dict(sorted(files.items()))}


def parity(told: Mapping[str, Any]) -> str:
    """How far each tier is from the sources, as Markdown.

    Args:
        told: What `metadata` gives.
    """
    lines = [f"# {told['name']}: parity", "", "## Error to the source"]
    for name, source in told["graphs"].items():
        rows = {tier: each["graphs"][name] for tier, each in told["tiers"].items()
                if name in each["graphs"]}  # fmt: skip
        table = Table(name, _HEADER, list(_rows(rows, source["bytes"])), _note(rows))
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


def _note(tiers: Mapping[str, Any]) -> str:
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
    return " ".join(["SQNR and cosine are of the worst sample.", *said]) if said else ""


def _shown(value: float | str | None, is_cosine: bool = False) -> str:
    """A number, that of a cosine with its many nines."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.9g}" if is_cosine else f"{value:.3g}"
