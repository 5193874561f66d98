"""What a command under trouble works on, and what it may leave behind."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

COMMAND = [sys.executable, "-c", "from onnxforge.cli import main; main()"]
_WIDTH = 512


def write_model(path: Path, seed: int, weights: int) -> None:
    """Write a chain of products with random weights of 1 MB each inside."""
    rng = np.random.default_rng(seed)
    held = [rng.standard_normal((_WIDTH, _WIDTH), dtype=np.float32) for _ in range(weights)]
    tensors = [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(held)]
    nodes = [
        helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(weights)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", _WIDTH])
        for name in ("x0", f"x{weights}")
    ]
    graph = helper.make_graph(nodes, f"seed{seed}", ends[:1], ends[1:], tensors)
    opset = helper.make_opsetid("", 17)
    path.write_bytes(
        helper.make_model(graph, ir_version=8, opset_imports=[opset]).SerializeToString()
    )


def whole(path: Path) -> bytes:
    """All of a model, as onnx loads it; its manifest, if there is one, has to agree."""
    manifest = path.with_name(f"{path.name}.sha256")
    if manifest.exists():
        for line in manifest.read_text(encoding="utf-8").splitlines():
            sha, name = line.split("  ")
            content = path.with_name(name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == sha, f"{manifest} is wrong on {name}"
    return onnx.load(path).SerializeToString(deterministic=True)


def data_files(path: Path) -> set[str]:
    """The names of the data files that a model reads."""
    graph = onnx.load(path, load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    return {entry.value for entry in entries if entry.key == "location"}
