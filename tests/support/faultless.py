"""A small bundle of three graphs in three tiers without a fault, and how to plant one."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxforge import PassManager

TIERS = {"fp32": "", "fp16w": "fp16w", "int8": "gather-int8,int8w"}
GRAPHS = ("encoder", "editor", "embed_tokens")
SIDE = 512  # a float32 weight of SIDE x SIDE is 1 MiB


def value(name: str, shape: Sequence[object], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray] | None = None,
    **more: Any,
) -> onnx.ModelProto:
    held = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, held, **more)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9, producer_name="tests")


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def encoder() -> onnx.ModelProto:
    yes = helper.make_graph(
        [helper.make_node("Mul", ["h", "gain"], ["louder"], name="louder")],
        "yes",
        [],
        [value("louder", ["batch", SIDE])],
        [numpy_helper.from_array(random(3, SIDE), "gain")],
    )
    no = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["same"], name="same")],
        "no",
        [],
        [value("same", ["batch", SIDE])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"], name="MatMul"),
        helper.make_node("Add", ["xw", "b"], ["h"], name="Add"),
        helper.make_node("If", ["loud"], ["y"], name="If", then_branch=yes, else_branch=no),
    ]
    weights = {"w": random(1, SIDE, SIDE), "b": random(2, SIDE)}
    inputs = [value("x", ["batch", SIDE]), value("loud", [], TensorProto.BOOL)]
    return model(nodes, inputs, [value("y", ["batch", SIDE])], weights)


def editor() -> onnx.ModelProto:
    shape = numpy_helper.from_array(np.array([-1, SIDE]))
    nodes = [
        helper.make_node("Constant", [], ["shape"], name="shape", value=shape),
        helper.make_node("Reshape", ["h", "shape"], ["rows"], name="Reshape"),
        helper.make_node("MatMul", ["rows", "up"], ["wide"], name="MatMul_up"),
        helper.make_node("Relu", ["wide"], ["act"], name="Relu"),
        helper.make_node("MatMul", ["act", "down"], ["y"], name="MatMul_down"),
    ]
    weights = {"up": random(4, SIDE, SIDE), "down": random(5, SIDE, SIDE)}
    inputs = [value("h", ["batch", "time", SIDE])]
    return model(nodes, inputs, [value("y", ["rows", SIDE])], weights)


def embed_tokens() -> onnx.ModelProto:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], name="Gather")]
    weights = {"table": random(6, 600, SIDE)}
    ids = value("ids", ["batch", "time"], TensorProto.INT64)
    return model(nodes, [ids], [value("y", ["batch", "time", SIDE])], weights)


@cache
def _made() -> Path:
    root = Path(tempfile.mkdtemp(prefix="bundle-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    sources = {"encoder": encoder(), "editor": editor(), "embed_tokens": embed_tokens()}
    for tier, passes in TIERS.items():
        (root / tier).mkdir()
        for name, proto in sources.items():
            given = root / "given.onnx"
            given.write_bytes(proto.SerializeToString())
            target = root / tier / f"{name}.onnx"
            PassManager(passes or ()).run(given, target, layout="sidecar")
            given.unlink()
    (root / "LICENSE").write_text("Apache-2.0\n")
    (root / "tokenizer.json").write_text("{}\n")
    return root


def clean(root: Path) -> Path:
    """Copy the bundle into a folder, with lists that are true."""
    shutil.copytree(_made(), root, dirs_exist_ok=True)
    relist(root)
    return root


def relist(root: Path, *, hashed: bool = True) -> None:
    """Write metadata.json and manifest.json as the files are."""
    (root / "metadata.json").write_text(json.dumps(metadata(root), indent=1))
    relist_manifest(root, hashed=hashed)


def relist_manifest(root: Path, *, hashed: bool = True) -> None:
    """Write manifest.json as the files are; hashes of nothing where they are not read."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    said = {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes() if hashed else b"").hexdigest(),
        }
        for path in files
        if not path.name.startswith(".")
    }
    (root / "manifest.json").write_text(json.dumps({"schema": 1, "files": said}, indent=1))


def metadata(root: Path) -> dict[str, Any]:
    tiers: dict[str, Any] = {}
    for tier in TIERS:
        paths = sorted((root / tier).glob("*.onnx"))
        graphs = {path.stem: _graph(root, path, TIERS[tier]) for path in paths}
        if graphs:
            tiers[tier] = {"graphs": graphs}
    return {
        "schema": 1,
        "name": "tests",
        "license": "Apache-2.0",
        "targets": {"onnxruntime": ["1.17", "1.20"], "providers": [], "browser": []},
        "toolchain": {"onnxforge": "0"},
        "graphs": {},
        "tiers": tiers,
        "files": ["tokenizer.json"],
    }


def _graph(root: Path, path: Path, pipeline: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": path.relative_to(root).as_posix(),
        "data": [],
        "pipeline": pipeline,
        "ir_version": 9,
        "opsets": {"ai.onnx": 20},
        "domains": ["ai.onnx"],
        "functions": 0,
        "inputs": [],
        "outputs": [],
        "gates": [{"gate": "--min-sqnr 20", "output": "y", "passed": True, "value": 40.0}],
    }
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception:  # what is no model says nothing
        return found
    bodies = [a.g for node in proto.graph.node for a in node.attribute if a.HasField("g")]
    words = {
        entry.value
        for graph in (proto.graph, *bodies)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    inside = [w for w in words if not w.startswith(("/", ".."))]
    data = sorted((path.parent / w).relative_to(root).as_posix() for w in inside)
    nodes = list(_nodes(proto.graph))
    found |= {
        "data": data,
        "ir_version": proto.ir_version,
        "opsets": {e.domain or "ai.onnx": e.version for e in proto.opset_import},
        "domains": sorted({node.domain or "ai.onnx" for node in nodes}),
        "inputs": [_port(v) for v in proto.graph.input],
        "outputs": [_port(v) for v in proto.graph.output],
    }
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _port(port: onnx.ValueInfoProto) -> dict[str, Any]:
    dims = port.type.tensor_type.shape.dim
    kind = TensorProto.DataType.Name(port.type.tensor_type.elem_type).lower()
    shape = [d.dim_value or d.dim_param or None for d in dims]
    return {"name": port.name, "type": kind, "shape": shape}


@contextlib.contextmanager
def edit(path: Path) -> Iterator[onnx.ModelProto]:
    """Change a model file; its data stays where it is."""
    proto = onnx.load(path, load_external_data=False)
    yield proto
    path.write_bytes(proto.SerializeToString())


@contextlib.contextmanager
def edit_json(path: Path) -> Iterator[Any]:
    found = json.loads(path.read_text())
    yield found
    path.write_text(json.dumps(found))
