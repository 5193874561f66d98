"""What tiers.py does in processes of their own: onnxruntime's tool, and the clock.

_tier_child.py peer SOURCE TARGET WEIGHT_TYPE OP_TYPE ...
_tier_child.py prepared-peer ...    after quant_pre_process, which some models need
_tier_child.py clock ORDER.json     prints seconds as JSON
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

AS_IT_IS, PREPARED = "as it is", "after quant_pre_process"
LOADS = 3


def quantize(way: str, source: str, target: str, weight_type: str, *op_types: str) -> None:
    """Run onnxruntime's own tool."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Where shapes cannot be inferred a file is left in the current folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if way != AS_IT_IS:
            prepared = str(Path(folder, "prepared.onnx"))
            symbolic = way == PREPARED
            quant_pre_process(source, prepared, skip_symbolic_shape=not symbolic)
            source = prepared
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=list(op_types),
            per_channel=True,
            weight_type=QuantType[weight_type],
        )
    # It says nothing when it finds no weight, as where all are in Constant nodes.
    types = {tensor.data_type for tensor in onnx.load(target).graph.initializer}
    if not types & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}:
        raise SystemExit("quantize_dynamic left the model as it was")


def clock(order: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Load models in turn, and then run them in turn."""
    models = order["models"]
    feeds = [{k: np.load(path) for k, path in paths.items()} for paths in order["feeds"]]
    loads: list[list[float]] = [[] for _ in models]
    runs: list[list[float]] = [[] for _ in models]
    sessions: list[Any] = [None] * len(models)
    for _ in range(LOADS):
        for place, model in enumerate(models):
            sessions[place] = None
            start = time.perf_counter()
            sessions[place] = _session(model, order["threads"])
            loads[place].append(time.perf_counter() - start)
    for number in range(order["runs"] + 1):
        for place, session in enumerate(sessions):
            start = time.perf_counter()
            for feed in feeds:
                session.run(None, feed)
            if number:  # the first round warms up
                runs[place].append((time.perf_counter() - start) / len(feeds))
    return {"loads": loads, "runs": runs}


def _session(model: str, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Idle threads of one session would take the processor from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    job, *words = sys.argv[1:]
    if job == "clock":
        print(json.dumps(clock(json.loads(Path(words[0]).read_text()))))
    else:
        quantize(job, *words)
