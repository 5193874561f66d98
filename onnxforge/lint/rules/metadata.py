"""What a bundle says of itself: metadata.json, its licence, its gates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onnxforge.errors import ModelError
from onnxforge.lint.bundle import METADATA, named_files, told_graphs
from onnxforge.lint.files import is_path
from onnxforge.lint.finding import Problem, Rule
from onnxforge.lint.held import by_file
from onnxforge.lint.view import type_name

if TYPE_CHECKING:
    import onnx

    from onnxforge.lint.bundle import Bundle
    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model

__all__ = ["RULES"]

_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "license": (str, type(None)),
    "targets": dict,
    "toolchain": dict,
    "graphs": dict,
    "tiers": dict,
    "files": list,
}
_GRAPH_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "model": str,
    "data": list,
    "pipeline": str,
    "ir_version": int,
    "opsets": dict,
    "domains": list,
    "inputs": list,
    "outputs": list,
    "gates": list,
}
_LICENCE = re.compile(r"(?:licen[cs]e|copying|notice)(?:[-._].*)?", re.IGNORECASE)
_FRONT = re.compile(r"^---\s*\n.*?^license(?:_name)?\s*:\s*\S", re.MULTILINE | re.DOTALL)
_NAMES_FILE = re.compile(r"[\w-][\w.-]*(?:/[\w.-]+)*\.(?:onnx|onnx_data|npy|npz)", re.ASCII)
_ANY = re.compile(r"(?:.*[-_.])?metadata\.json", re.IGNORECASE)


def metadata_malformed(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """metadata.json is no JSON, or not in the form that it says it has.

    What it does:
        Reads metadata.json. A file in a form of somebody else, without a number `schema`, is
        fine as long as it is JSON.

    Why it is bad:
        Programs that load the bundle by it fail.

    Example:
        `tiers.int8.graphs.encoder has no model`

    How to mend:
        Write it again: `onnxforge build`.

    Fix:
        None.
    """
    found = bundle.metadata
    if isinstance(found, str):
        yield Problem(found, file=METADATA)
    elif isinstance(found, dict) and "schema" in found and "tiers" in found:
        if found["schema"] != 1:
            yield Problem(f"schema is {found['schema']!r}, known is 1", file=METADATA)
            return
        for fault in _faults(found, _KEYS, ""):
            yield Problem(fault, file=METADATA)
        for path, graph in told_graphs(bundle.said):
            for fault in _faults(graph, _GRAPH_KEYS, path):
                yield Problem(fault, file=METADATA)


def metadata_untrue(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """metadata.json says of a graph what is not so.

    What it does:
        Compares IR version, operator sets, domains, inputs and outputs (names, types, shapes)
        and data files of every graph with what its model says.

    Why it is bad:
        Programs allocate and feed what metadata.json says, and people choose a runtime by it.

    Example:
        `ir_version is 9, the model says 10`

    How to mend:
        Write it again: `onnxforge build`.

    Fix:
        None.
    """
    models = {model.name: model for model in bundle.models}
    for path, graph in told_graphs(bundle.said):
        if list(_faults(graph, _GRAPH_KEYS, path)):
            continue
        model = models.get(graph["model"])
        if model is not None and model.broken is None:
            for text in _untrue(graph, model):
                yield Problem(f"{path}.{text}", file=METADATA)


def _untrue(graph: Mapping[str, Any], model: Model) -> Iterator[str]:
    proto = model.proto
    domains = {node.domain or "ai.onnx" for node in model.nodes}
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    is_so = {
        "ir_version": proto.ir_version,
        "opsets": opsets,
        "domains": sorted(domains),
        "data": sorted({each.file for each in model.held if each.file}),
    }
    for key, true in is_so.items():
        said = sorted(map(str, graph[key])) if isinstance(true, list) else graph[key]
        if said != true:
            yield f"{key} is {_short(said)}, the model says {_short(true)}"
    for key, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        ports = [_port(value) for value in values]
        names = [port.get("name") for port in graph[key] if isinstance(port, dict)]
        if names != [port["name"] for port in ports]:
            true_names = [port["name"] for port in ports]
            yield f"{key} are {_short(names)}, the model has {_short(true_names)}"
            continue
        for said, true in zip(graph[key], ports, strict=True):
            for word in [word for word in true if said.get(word) != true[word]]:
                text = f"{key}.{true['name']}.{word} is {_short(said.get(word))}"
                yield f"{text}, the model says {_short(true[word])}"


def _port(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """An input or output as metadata.json has it; sequences and maps by name only."""
    port: dict[str, Any] = {"name": value.name}
    kind = value.type.tensor_type
    if value.type.WhichOneof("value") == "tensor_type":
        port["type"] = type_name(kind.elem_type)
        port["shape"] = None
        if kind.HasField("shape"):
            port["shape"] = [
                d.dim_value if d.HasField("dim_value") else d.dim_param or None
                for d in kind.shape.dim
            ]
    return port


def gate_failed(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A graph does not hold a gate.

    What it does:
        Reads the gates of metadata.json.

    Why it is bad:
        The tier is further from its parent than its publisher allows.

    Example:
        `tiers.int8.graphs.encoder: --min-sqnr 40 of audio_embeds: 31.2`

    How to mend:
        Make a better tier, or change the gate in the recipe where all can see it.

    Fix:
        None.
    """
    for path, gate in _gates(bundle):
        if gate.get("passed") is not True:
            text = f"{path}: {gate.get('gate')} of {gate.get('output')}: {gate.get('value')}"
            yield Problem(f"{text}, does not hold", file=METADATA)


def gate_missing(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A graph that was made by passes has no gate.

    What it does:
        Looks in metadata.json for gates of each graph whose pipeline is not empty.

    Why it is bad:
        Nothing stops a tier that computes something else from being published.

    Example:
        `tiers.int8.graphs.editor has no gate`

    How to mend:
        Add one to the recipe, such as `min-sqnr = 30`.

    Fix:
        None.
    """
    for path, graph in told_graphs(bundle.said):
        if graph.get("pipeline") and graph.get("gates") == []:
            yield Problem(f"{path} has no gate", file=METADATA)


def named_file_missing(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A file that metadata names is not there.

    What it does:
        Looks for the models, data files and shared files that metadata.json names; and in
        other files called metadata for all texts that are names of models, data or arrays,
        in any folder of the bundle.

    Why it is bad:
        A program that loads the bundle by its metadata fails.

    Example:
        `fixtures/mel.npy is not there`

    How to mend:
        Add the file, or write the metadata again.

    Fix:
        None.
    """
    if not bundle.whole:
        return
    told = by_file(bundle.models)  # what models name themselves is told of those
    for name in dict.fromkeys(named_files(bundle.said)):
        if not is_path(name):
            yield Problem(f"{name!r} is no path in the folder", file=METADATA)
        elif bundle.files.size(name) is None and name not in told:
            yield Problem(f"{name} is not there", file=METADATA)
    yield from _named_elsewhere(bundle)


def _named_elsewhere(bundle: Bundle) -> Iterator[Problem]:
    """The same for metadata in a form of somebody else."""
    for file in bundle.files.names:
        ours = file == METADATA and bundle.said
        if ours or "/" in file or not _ANY.fullmatch(file):
            continue
        try:
            found = json.loads(bundle.files.read(file).decode())
        except (ModelError, ValueError, RecursionError):
            continue  # what is no JSON is told of metadata.json alone
        for text in dict.fromkeys(_texts(found)):
            if _NAMES_FILE.fullmatch(text) and not any(
                name == text or name.endswith(f"/{text}") for name in bundle.files.names
            ):
                yield Problem(f"{text} is not there", file=file, level="warning")


def _texts(found: object) -> Iterator[str]:
    """All texts of plain data."""
    waiting = [found]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def licence_missing(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A bundle has no licence.

    What it does:
        Looks for a file called LICENSE, LICENCE, COPYING or NOTICE, for `license:` at the
        head of README.md, and for the licence in metadata.json.

    Why it is bad:
        Nobody may use the models, and nobody can tell whether the publisher may publish them.

    Example:
        A folder with tiers, and nothing beside them.

    How to mend:
        Add the licence of the source model.

    Fix:
        None.
    """
    if not bundle.is_bundle or bundle.said.get("license"):
        return
    top = [name for name in bundle.files.names if "/" not in name]
    if any(_LICENCE.fullmatch(name) for name in top):
        return
    readme = next((name for name in top if name.lower() == "readme.md"), None)
    text = bundle.files.read(readme).decode(errors="replace") if readme else ""
    if not _FRONT.match(text):
        yield Problem("no licence: neither a file, nor in README.md or metadata.json", file="")


def _gates(bundle: Bundle) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path, graph in told_graphs(bundle.said):
        gates = graph.get("gates")
        for gate in gates if isinstance(gates, list) else ():
            if isinstance(gate, dict):
                yield path, gate


def _faults(
    found: Mapping[str, Any], keys: Mapping[str, type | tuple[type, ...]], path: str
) -> Iterator[str]:
    for key, kind in keys.items():
        if key not in found:
            yield f"{path or 'it'} has no {key}"
        elif not isinstance(found[key], kind):
            yield f"{path}{'.' if path else ''}{key} is not what it should be"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


RULES = (
    Rule("OF485", "metadata-malformed", "error", metadata_malformed, of="bundle"),
    Rule("OF486", "metadata-untrue", "error", metadata_untrue, of="bundle"),
    Rule("OF487", "gate-failed", "error", gate_failed, of="bundle"),
    Rule("OF488", "gate-missing", "warning", gate_missing, of="bundle"),
    Rule("OF489", "named-file-missing", "error", named_file_missing, of="bundle"),
    Rule("OF490", "licence-missing", "warning", licence_missing, of="bundle"),
)
