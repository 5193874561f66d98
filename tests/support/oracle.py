"""Running a model, and an independent account of what storing in float16 must give.

Nothing here uses onnxforge. As a script it runs one model: `run_isolated` starts it so.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

Array = np.ndarray
Arrays = dict[str, Array]
Model = ModelProto | str | Path
Tensors = Callable[[Array], Array]


class Crashed(Exception):
    """The runtime killed its process."""


def run(
    model: Model,
    inputs: Mapping[str, Array],
    config: Mapping[str, str] = {},
    *,
    optimized: bool = True,
    keep: Path | None = None,
) -> Arrays:
    """Run a model on onnxruntime's CPU provider, one thread, default optimisations.

    Args:
        model: The model or its path.
        inputs: Arrays by input name.
        config: Entries of the session's configuration.
        optimized: Whether it may fuse nodes; if not, they run as they stand.
        keep: Where the model that really runs is to be written.
    """
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if keep is not None:
        options.optimized_model_filepath = str(keep)
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    source = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def run_isolated(model: Model, inputs: Mapping[str, Array], timeout: float = 120) -> Arrays:
    """Do what `run` does in a process of its own.

    Args:
        model: The model or its path.
        inputs: Arrays by input name.
        timeout: Seconds that the process may take.

    Returns:
        The outputs by name.

    Raises:
        Crashed: The process died of a signal, which the message names.
        RuntimeError: The runtime refused the model or failed; its last line.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = Path(model) if not isinstance(model, ModelProto) else folder / "model.onnx"
        if isinstance(model, ModelProto):
            path.write_bytes(model.SerializeToString())
        _pack(folder / "inputs.npz", inputs)
        command = [sys.executable, __file__, str(path.resolve()), name]
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
        _raise_failure(done)
        return _unpack(folder / "outputs.npz")


def _raise_failure(done: subprocess.CompletedProcess[bytes]) -> None:
    if done.returncode < 0:
        raise Crashed(f"the runtime died of {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RuntimeError(lines[-1])


def _pack(path: Path, arrays: Mapping[str, Array]) -> None:
    names = np.array(json.dumps(list(arrays)))
    np.savez(path, names=names, **{f"array{i}": v for i, v in enumerate(arrays.values())})


def _unpack(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as content:
        names = json.loads(str(content["names"]))
        return {name: content[f"array{i}"] for i, name in enumerate(names)}


def half_bits(values: Array) -> Array:
    """Return the float16 bit patterns nearest to float32 values, ties to even.

    Integer arithmetic on the bit patterns only; a NaN becomes quiet and keeps the upper
    ten bits of its payload.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.int64)
    sign, exponent, fraction = bits >> 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    significand = fraction | (1 << 23)
    # Below 2^-14 each step of the exponent costs one bit more of the significand.
    shift = np.where(exponent < 113, np.minimum(126 - exponent, 63), 13)
    kept = significand >> shift
    rest = significand - (kept << shift)
    half = np.int64(1) << (shift - 1)
    rounded = kept + ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    # Rounding up may carry into the exponent field, where it belongs.
    normal = rounded + ((exponent - 113) << 10)
    magnitude = np.where(exponent < 113, rounded, np.minimum(normal, 0x7C00))
    magnitude = np.where(exponent == 255, _special(fraction), magnitude)
    return (magnitude | (sign << 15)).astype(np.uint16)


def _special(fraction: Array) -> Array:
    return np.where(fraction == 0, 0x7C00, 0x7E00 | (fraction >> 13))


def float_bits(halves: Array) -> Array:
    """Return the float32 bit patterns of float16 bit patterns, by integer arithmetic."""
    bits = halves.astype(np.int64)
    sign, exponent, fraction = bits >> 15, (bits >> 10) & 0x1F, bits & 0x3FF
    normal = ((exponent + 112) << 23) | (fraction << 13)
    special = (0xFF << 23) | (fraction << 13)
    magnitude = np.where(exponent == 31, special, normal)
    magnitude = np.where(exponent == 0, _small(fraction), magnitude)
    return (magnitude | (sign << 31)).astype(np.uint32)


def _small(fraction: Array) -> Array:
    """Return float32 patterns of fraction * 2^-24, exponent and all."""
    top = np.zeros_like(fraction)
    for bit in range(1, 10):
        top = np.where(fraction >> bit > 0, bit, top)
    mantissa = (fraction << (23 - top)) & 0x7FFFFF
    return np.where(fraction == 0, 0, ((top + 103) << 23) | mantissa)


def rounded_fp16(values: Array) -> Array:
    """Return float32 values that went through float16."""
    return float_bits(half_bits(values)).view(np.float32).reshape(values.shape)


def round_weights_fp16(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy in which the named float32 weights hold float16 values as float32.

    Args:
        model: A model with its weights inside.
        names: Initializers of any graph, or first outputs of Constant nodes, also in
            functions. A name in several scopes means all of them.

    Returns:
        The copy; the model is left alone.

    Raises:
        KeyError: A name is no float32 weight of the model.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    missing = set(names)
    wanted = frozenset(missing)
    for name, change in _weights(copy):
        if name in wanted:
            change(rounded_fp16)
            missing.discard(name)
    if missing:
        raise KeyError(f"no float32 weight is named {', '.join(sorted(missing))}")
    return copy


def float_weights(model: ModelProto) -> list[str]:
    """Return the names that `round_weights_fp16` knows, each once, in order."""
    return list(dict.fromkeys(name for name, _ in _weights(model)))


def _weights(model: ModelProto) -> Iterator[tuple[str, Callable[[Tensors], None]]]:
    """Yield each float32 weight's name and a function that changes its values."""
    for scope in _scopes(model):
        if isinstance(scope, GraphProto):
            for tensor in scope.initializer:
                if tensor.data_type == TensorProto.FLOAT:
                    yield tensor.name, _changer(tensor)
        for node in scope.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                for attribute in node.attribute:
                    change = _constant_changer(attribute)
                    if change:
                        yield node.output[0], change


def _scopes(model: ModelProto) -> Iterator[GraphProto | onnx.FunctionProto]:
    for root in (model.graph, *model.functions):
        yield root
        yield from _inner(root.node)


def _inner(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            graphs = [*attribute.graphs]
            if attribute.type == AttributeProto.GRAPH:
                graphs.append(attribute.g)
            for graph in graphs:
                yield graph
                yield from _inner(graph.node)


def _changer(tensor: TensorProto) -> Callable[[Tensors], None]:
    def change(compute: Tensors) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError(f"{tensor.name}: load the model with its external data")
        values = compute(numpy_helper.to_array(tensor))
        tensor.ClearField("float_data")
        tensor.raw_data = values.astype("<f4").tobytes()

    return change


def _constant_changer(attribute: AttributeProto) -> Callable[[Tensors], None] | None:
    """Return what changes a Constant's attribute, None where it holds no float32."""

    def change_one(compute: Tensors) -> None:
        attribute.f = float(compute(np.array([attribute.f], np.float32))[0])

    def change_list(compute: Tensors) -> None:
        attribute.floats[:] = compute(np.array(attribute.floats, np.float32)).tolist()

    if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
        return _changer(attribute.t)
    if attribute.ref_attr_name:
        return None
    return {"value_float": change_one, "value_floats": change_list}.get(attribute.name)


def assert_bit_equal(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Fail unless names, types, shapes and bytes are the same, NaN patterns included."""
    if list(actual) != list(expected):
        raise AssertionError(f"outputs are {list(actual)}, wanted {list(expected)}")
    for name, wanted in expected.items():
        seen = actual[name]
        if (seen.dtype, seen.shape) != (wanted.dtype, wanted.shape):
            raise AssertionError(
                f"{name}: {seen.dtype}{seen.shape}, wanted {wanted.dtype}{wanted.shape}"
            )
        if seen.tobytes() != wanted.tobytes():
            raise AssertionError(f"{name}: {_difference(seen, wanted)}")


def _difference(seen: Array, wanted: Array) -> str:
    pairs = zip(seen.ravel(), wanted.ravel(), strict=True)
    unequal = [(i, a, b) for i, (a, b) in enumerate(pairs) if a.tobytes() != b.tobytes()]
    index, first, second = unequal[0]
    return f"{len(unequal)} of {seen.size} differ, [{index}] is {first}, wanted {second}"


def _main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    _pack(folder / "outputs.npz", run(model, _unpack(folder / "inputs.npz")))


if __name__ == "__main__":
    _main()
