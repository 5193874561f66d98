"""What static.py does in processes of their own: the tools beside ours, and onnxruntime.

_static_child.py ORDER.json, one of
{"job": "ort", "source", "target", "samples", "calibrate_method", "keep_products", "options"}
{"job": "onc", "source", "target", "samples", "keep_products", "options"}
{"job": "executed", "models"}    prints how many products are really multiplied as integers

Needs numpy, onnx and onnxruntime, and for onc the environment that static.py makes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

# What a runtime makes of products that it multiplies as integers.
EXECUTED = "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul"
EXECUTED += "QGemm", "ConvInteger", "QLinearConv"
FLOAT = "MatMul", "FusedMatMul", "Gemm", "FusedGemm"
Feeds = dict[str, np.ndarray]


class Reader:
    """Samples as both tools want them; after the end it begins again.

    The search for a strength reads samples once for each candidate and never goes back.
    """

    def __init__(self, samples: Sequence[Feeds]) -> None:
        self._samples = samples
        self._left = iter(samples)

    def get_next(self) -> Feeds | None:
        """The next sample, None at the end."""
        found = next(self._left, None)
        if found is None:
            self.rewind()
        return found

    def rewind(self) -> None:
        """Begin again."""
        self._left = iter(self._samples)

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self._samples)


def read(paths: Sequence[str | Path], equal: str = "") -> Reader:
    """Read samples, and make them equally long if wanted: by zeros or by themselves."""
    samples = []
    for path in paths:
        with np.load(path) as archive:
            samples.append(dict(archive))
    if not equal:
        return Reader(samples)
    for name in samples[0]:
        longest = np.max([sample[name].shape for sample in samples], axis=0)
        for sample in samples:
            missing = longest - sample[name].shape
            mode: Any = "wrap" if equal == "wrap" else "constant"
            sample[name] = np.pad(sample[name], [(0, int(n)) for n in missing], mode)
    return Reader(samples)


def activations_only(model: onnx.ModelProto) -> list[str]:
    """Names of the products of two activations."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and constants.isdisjoint(node.input)
    ]


def quantize_static(order: dict[str, Any]) -> None:
    """Run onnxruntime's own tool."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = order["source"]
    if order["prepared"]:
        prepared = str(Path("prepared.onnx").absolute())
        quant_pre_process(source, prepared, skip_symbolic_shape=order["prepared"] == "plain")
        source = prepared
    quantize(
        source,
        order["target"],
        read(order["samples"], order["equal"]),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[order["method"]],
        **exclusions(source, order),
    )
    refuse_unchanged(order["target"])


def exclusions(source: str, order: dict[str, Any]) -> dict[str, Any]:
    """Options that leave products of two activations, and what products give, alone."""
    options = dict(order["options"])
    if not order["excluded"]:
        return {"extra_options": options}
    options["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
    left = activations_only(onnx.load(source, load_external_data=False))
    return {"extra_options": options, "nodes_to_exclude": left}


def smooth(order: dict[str, Any]) -> None:
    """Run onnx-neural-compressor."""
    from onnx_neural_compressor.quantization import QuantFormat, QuantType, config
    from onnx_neural_compressor.quantization.quantize import quantize

    # The tool does this itself; excluded nodes have to be named as they are afterwards.
    prepared = str(Path("prepared.onnx").absolute())
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = prepared
    ort.InferenceSession(order["source"], options, providers=["CPUExecutionProvider"])
    named(prepared)
    types = ["MatMul", "Gemm"]
    settings = {"SmoothQuant": True, "SmoothQuantOpTypes": types, **order["options"]}
    # Their own configuration reads these from another place than the tool does.
    smoothing = {
        "alpha": settings["SmoothQuantAlpha"],
        "folding": settings["SmoothQuantFolding"],
        "op_types": types,
    }
    excluded = exclusions(prepared, {**order, "options": settings})
    quantize(
        prepared,
        order["target"],
        config.SmoothQuantConfig(
            calibration_data_reader=read(order["samples"], order["equal"]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=types,
            per_channel=True,
            calibration_sampling_size=len(order["samples"]),
            execution_provider="CPUExecutionProvider",
            **smoothing,
            **excluded,
        ),
        optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    )
    refuse_unchanged(order["target"])


def named(path: str) -> None:
    """Name all nodes: the tool knows them by their names, and fails where two have none."""
    model = onnx.load(path)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{number}"
    onnx.save(model, path)


def refuse_unchanged(target: str) -> None:
    """Fail where a tool wrote a model without integers, which none of them says."""
    types = {tensor.data_type for tensor in onnx.load(target).graph.initializer}
    if not types & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}:
        raise SystemExit("the tool left the model as it was")


def executed(models: Sequence[str]) -> list[dict[str, int]]:
    """The products in models as the runtime optimizes them, by operator."""
    found = []
    for number, model in enumerate(models):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(f"{number}.onnx").absolute())
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(
            options.optimized_model_filepath, load_external_data=False
        ).graph.node
        kinds = collections.Counter(node.op_type for node in nodes)
        found.append({kind: kinds[kind] for kind in (*EXECUTED, *FLOAT) if kinds[kind]})
    return found


def main() -> None:
    """Do what is ordered, in a folder of its own: tools leave files behind."""
    order = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if order["job"] == "executed":
            print(json.dumps(executed(order["models"])))
        else:
            {"ort": quantize_static, "onc": smooth}[order["job"]](order)


if __name__ == "__main__":
    main()
