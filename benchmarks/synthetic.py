"""Write large synthetic models block by block, in a memory that does not grow with them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

OPSET = 17
IR_VERSION = 8
BLOCK_ELEMENTS = 4 << 20
SCALE = np.float32(0.02)
MANTISSA = 0x003F_FFFF
KNUTH = 2654435761

GRAPH_FIELD = 7
INITIALIZER_FIELD = 5
RAW_DATA_FIELD = 9
LENGTH_DELIMITED = 2


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions of a model: an embedding and a stack of six-matrix blocks.

    Attributes:
        blocks: How many blocks, each of 12 * dim * dim weights.
        vocab: Rows of the embedding table.
        dim: Width of every block.
    """

    blocks: int
    vocab: int = 50000
    dim: int = 2048

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Name and shape of every weight, in the order they are stored."""
        wide = 4 * self.dim
        square = dict.fromkeys(("q", "k", "v", "o"), (self.dim, self.dim))
        shapes = square | {"up": (self.dim, wide), "down": (wide, self.dim)}
        found = {"embedding": (self.vocab, self.dim)}
        for block in range(self.blocks):
            found |= {f"block{block}.{name}": shape for name, shape in shapes.items()}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in float32."""
        return 4 * sum(rows * columns for rows, columns in self.weights.values())


def write_sidecar(path: Path, size: Size) -> None:
    """Write ``path`` and one data file ``<path>_data`` beside it."""
    graph = _graph(size)
    offset = 0
    for name, shape in size.weights.items():
        tensor = graph.initializer.add(data_type=TensorProto.FLOAT, name=name, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = 4 * shape[0] * shape[1]
        where = {"location": f"{path.name}_data", "offset": offset, "length": length}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        offset += length
    with Path(f"{path}_data").open("wb") as file:
        for index, shape in enumerate(size.weights.values()):
            file.writelines(_values(index, shape[0] * shape[1]))
    # The model goes last, so that a model that is there has complete data.
    path.write_bytes(_model(graph).SerializeToString())


def write_inline(path: Path, size: Size) -> None:
    """Write one file that holds all its weights, without ever holding them in memory."""
    full = _graph(size)
    front = onnx.GraphProto(node=full.node, name=full.name).SerializeToString()
    back = onnx.GraphProto(input=full.input, output=full.output).SerializeToString()
    envelopes = [_envelope(name, shape) for name, shape in size.weights.items()]
    length = len(front) + sum(map(len, envelopes)) + size.nbytes + len(back)
    model = _model(onnx.GraphProto())
    ahead = onnx.ModelProto(ir_version=IR_VERSION, producer_name=model.producer_name)
    behind = onnx.ModelProto(opset_import=model.opset_import)
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(ahead.SerializeToString() + _key(GRAPH_FIELD) + _varint(length) + front)
        for index, (envelope, shape) in enumerate(
            zip(envelopes, size.weights.values(), strict=True)
        ):
            file.write(envelope)
            file.writelines(_values(index, shape[0] * shape[1]))
        file.write(back + behind.SerializeToString())
    unfinished.replace(path)


def ensure(path: Path, size: Size, *, inline: bool) -> None:
    """Write the model unless it is already there in full."""
    data = path if inline else Path(f"{path}_data")
    if path.exists() and data.exists() and data.stat().st_size >= size.nbytes:
        return
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_inline if inline else write_sidecar)(path, size)


def _graph(size: Size) -> onnx.GraphProto:
    """The graph without its weights."""
    nodes = [helper.make_node("Gather", ["embedding", "ids"], ["x0"])]
    for block in range(size.blocks):
        nodes += _block(block)
    return helper.make_graph(
        nodes,
        "synthetic",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [
            helper.make_tensor_value_info(
                f"x{size.blocks}", TensorProto.FLOAT, ["batch", "length", size.dim]
            )
        ],
    )


def _block(block: int) -> list[onnx.NodeProto]:
    """Four square products, a wide pair with Relu, and two residual sums."""
    here = f"block{block}"
    value = f"x{block}"
    nodes = []
    for name in ("q", "k", "v", "o"):
        nodes.append(_node("MatMul", [value, f"{here}.{name}"], f"{here}/{name}"))
        value = f"{here}/{name}"
    return [
        *nodes,
        _node("Add", [f"x{block}", value], f"{here}/attended"),
        _node("MatMul", [f"{here}/attended", f"{here}.up"], f"{here}/up"),
        _node("Relu", [f"{here}/up"], f"{here}/relu"),
        _node("MatMul", [f"{here}/relu", f"{here}.down"], f"{here}/down"),
        _node("Add", [f"{here}/attended", f"{here}/down"], f"x{block + 1}"),
    ]


def _node(op_type: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [output], name=f"{output}:{op_type}")


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(
        graph,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="onnxforge-synthetic",
    )


def _envelope(name: str, shape: tuple[int, int]) -> bytes:
    """Everything of one initializer field that comes before its raw bytes."""
    fields = TensorProto(dims=shape, data_type=TensorProto.FLOAT, name=name)
    nbytes = 4 * shape[0] * shape[1]
    head = fields.SerializeToString() + _key(RAW_DATA_FIELD) + _varint(nbytes)
    return _key(INITIALIZER_FIELD) + _varint(len(head) + nbytes) + head


def _key(field: int) -> bytes:
    return _varint(field << 3 | LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    """Base-128 number of the protobuf wire format."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(groups + bytes([value]))


@functools.cache
def _noise() -> npt.NDArray[np.uint32]:
    values = np.random.default_rng(20).standard_normal(BLOCK_ELEMENTS, np.float32) * SCALE
    return values.view(np.uint32)


def _values(index: int, count: int) -> Iterator[memoryview]:
    """Weights of tensor ``index``: the noise block with other mantissas for each block."""
    buffer = np.empty(BLOCK_ELEMENTS, np.uint32)
    for number, start in enumerate(range(0, count, BLOCK_ELEMENTS)):
        stop = min(BLOCK_ELEMENTS, count - start)
        mask = np.uint32((index * 64 + number + 1) * KNUTH & MANTISSA)
        np.bitwise_xor(_noise()[:stop], mask, out=buffer[:stop])
        yield memoryview(buffer[:stop]).cast("B")


def main() -> None:
    """Write one model as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=50000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--inline", action="store_true")
    options = parser.parse_args()
    size = Size(options.blocks, options.vocab, options.dim)
    ensure(options.path, size, inline=options.inline)
    os.sync()


if __name__ == "__main__":
    main()
