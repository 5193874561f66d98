"""Time lint and inspect on a bundle of 10 GB, here and over http: seconds, memory, bytes.

The bundle is made for it: three tiers of a decoder, an encoder and a table, with a list of
hashes. Data files are holes but for the head of each weight, so that they take no disk and
weights still differ. Every command is a child process; the server runs in this one and counts
what it sends.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support.ranges import serving

KINDS = {"fp32": TensorProto.FLOAT, "fp16w": TensorProto.FLOAT16, "int8": TensorProto.INT8}
BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.INT8: 1}
BLOCK = 1 << 20


@dataclasses.dataclass
class Writer:
    """A model whose weights go to a data file, or stay inside of it."""

    path: Path
    kind: int
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    tensors: list[onnx.TensorProto] = dataclasses.field(default_factory=list)
    size: int = 0
    count: int = 0

    def weight(self, *shape: int) -> str:
        """A weight as float32, however it is stored."""
        name = f"weight.{self.count}"
        self.count += 1
        tensor = TensorProto(name=name, data_type=self.kind, dims=shape)
        length = int(np.prod(shape)) * BYTES[self.kind]
        places = {"location": f"{self.path.name}_data", "offset": self.size, "length": length}
        tensor.data_location = TensorProto.EXTERNAL
        for key, number in places.items():
            tensor.external_data.add(key=key, value=str(number))
        self.size += length + -length % 64
        self.tensors.append(tensor)
        if self.kind == TensorProto.FLOAT:
            return name
        return self.node("Cast", name, to=TensorProto.FLOAT)

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        output = f"value.{len(self.nodes)}"
        name = f"/{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def close(self, output: str, width: int, *, ids: bool = False) -> None:
        """Write the model and its data."""
        self.nodes.append(helper.make_node("Identity", [output], ["y"], name="/y"))
        kind = TensorProto.INT64 if ids else TensorProto.FLOAT
        shape = ["batch", "time"] if ids else ["batch", "time", width]
        x = helper.make_tensor_value_info("x", kind, shape)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "time", width])
        graph = helper.make_graph(self.nodes, "graph", [x], [y], self.tensors)
        opset = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=9)
        self.path.write_bytes(model.SerializeToString())
        with Path(f"{self.path}_data").open("wb") as data:
            data.truncate(self.size)
            for i, tensor in enumerate(self.tensors):
                data.seek(int(tensor.external_data[1].value))
                data.write(f"{self.path} {i}".encode())


def decoder(path: Path, kind: int, blocks: int, width: int) -> None:
    writer = Writer(path, kind)
    hidden = "x"
    for _ in range(blocks):
        scale, bias = writer.weight(width), writer.weight(width)
        normal = writer.node("LayerNormalization", hidden, scale, bias)
        query, key, values = (
            writer.node("MatMul", normal, writer.weight(width, width)) for _ in range(3)
        )
        turned = writer.node("Transpose", key, perm=[0, 2, 1])
        weighed = writer.node("Softmax", writer.node("MatMul", query, turned))
        mixed = writer.node("MatMul", weighed, values)
        out = writer.node("MatMul", mixed, writer.weight(width, width))
        hidden = writer.node("Add", hidden, out)
        wide = writer.node(
            "Relu", writer.node("MatMul", hidden, writer.weight(width, 4 * width))
        )
        narrow = writer.node("MatMul", wide, writer.weight(4 * width, width))
        hidden = writer.node("Add", hidden, narrow)
    writer.close(hidden, width)


def table(path: Path, kind: int, rows: int, width: int) -> None:
    """Rows are widened after they are taken."""
    writer = Writer(path, kind)
    name = writer.weight(rows, width)
    if kind == TensorProto.FLOAT:
        taken = writer.node("Gather", name, "x")
    else:
        writer.nodes.clear()
        taken = writer.node("Gather", writer.tensors[0].name, "x")
        taken = writer.node("Cast", taken, to=TensorProto.FLOAT)
    writer.close(taken, width, ids=True)


def make(root: Path, blocks: int) -> None:
    width = 2048
    for tier, kind in KINDS.items():
        folder = root / tier
        folder.mkdir(parents=True)
        decoder(folder / "decoder.onnx", kind, blocks, width)
        decoder(folder / "encoder.onnx", kind, blocks // 3, width)
        table(folder / "embed_tokens.onnx", kind, 100_000, width)
    (root / "LICENSE").write_text("Apache-2.0\n")
    files = {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    (root / "manifest.json").write_text(json.dumps({"schema": 1, "files": files}, indent=1))


def inline(path: Path, count: int) -> None:
    """A model whose weights, holes as well, stand in it."""
    side = 4 << 20
    head, tail = b"", b""
    tensors = []
    for i in range(count):
        tensor = TensorProto(name=f"w{i}", data_type=1, dims=[side // 4]).SerializeToString()
        tensors.append(tensor + b"\x4a" + varint(side))
    nodes = [helper.make_node("Sum", [f"w{i}" for i in range(count)], ["y"])]
    y = helper.make_tensor_value_info("y", 1, [side // 4])
    graph = helper.make_graph(nodes, "graph", [], [y]).SerializeToString()
    sizes = [len(tensor) + side for tensor in tensors]
    total = len(graph) + sum(1 + len(varint(size)) + size for size in sizes)
    model = helper.make_model(
        helper.make_graph([], "", [], []), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 9
    model.ClearField("graph")
    head, tail = model.SerializeToString() + b"\x3a" + varint(total) + graph, b""
    with path.open("wb") as file:
        file.write(head)
        for tensor, size in zip(tensors, sizes, strict=True):
            file.write(b"\x2a" + varint(size) + tensor)
            file.seek(side - 8, os.SEEK_CUR)
            file.write(os.urandom(8))
        file.write(tail)


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def timed(*words: str) -> tuple[float, float, int]:
    """Seconds, peak MB and exit code of a command."""
    start = time.perf_counter()
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    child.returncode = code
    if code:
        print(said[-2000:])
    return seconds, used.ru_maxrss / 1024, code


def rows(root: Path, model: Path, runs: int) -> Iterator[tuple[str, str, str, str]]:
    tool = str(Path(sys.executable).parent / "onnxforge")
    with serving(root.parent) as served:
        far = f"{served.url}{root.name}/"
        commands = {
            "lint, headers": ("lint", str(root), "--no-hash", "--min-ort", "1.17"),
            "lint, with hashes": ("lint", str(root), "--min-ort", "1.17"),
            "lint over http": ("lint", far, "--min-ort", "1.17"),
            "lint one inline model": ("lint", str(model), "--no-hash"),
            "lint it over http": ("lint", f"{served.url}{model.name}"),
            "inspect over http": ("inspect", f"{far}fp32/decoder.onnx"),
        }
        for name, words in commands.items():
            before, asked = served.sent, len(served.requests)
            found = [timed(tool, *words) for _ in range(runs)]
            best = min(found)
            sent, requests = (
                (served.sent - before) // runs,
                (len(served.requests) - asked) // runs,
            )
            http = (f"{sent:,}", str(requests)) if "http" in name else ("", "")
            yield name, f"{best[0]:.2f}", f"{best[1]:.0f}", " | ".join(http)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--blocks", type=int, default=20, help="20 make 10 GB")
    options.add_argument("--runs", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="lint-") as folder:
        root, model = Path(folder) / "bundle", Path(folder) / "inline.onnx"
        make(root, given.blocks)
        inline(model, 400)
        total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        count = sum(1 for _ in root.rglob("*.onnx"))
        print(
            f"{count} models, {total / 1e9:.1f} GB; inline {model.stat().st_size / 1e9:.1f} GB"
        )
        print("\n| command | s | peak MB | bytes sent | requests |\n|---|---:|---:|---:|---:|")
        for row in rows(root, model, given.runs):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
