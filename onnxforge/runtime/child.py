"""The process that onnxruntime runs in: takes orders on stdin, answers on stdout, as JSON.

It is started by its path, on any interpreter that has onnxruntime and numpy, so it takes
nothing of onnxforge but one file by its path.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Types that numpy lacks, and the size of their elements.
_FOREIGN = {"bfloat16": 2, "float8e4m3fn": 1, "float8e4m3fnuz": 1, "float8e5m2": 1}
_FOREIGN["float8e5m2fnuz"] = 1
_MEMORY = Path(__file__).resolve().parents[1] / "memory.py"


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    peak_memory = runpy.run_path(str(_MEMORY))["peak_memory"]

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps({**content, "peak": peak_memory()}) + "\n")
        answers.flush()

    def fail(kind: type[BaseException], error: BaseException, trace: object) -> None:
        answer({"error": " ".join(str(error).split()) or kind.__name__})

    sys.excepthook = fail
    orders: Iterator[dict[str, Any]] = map(json.loads, sys.stdin)
    import numpy
    import onnxruntime

    start = time.perf_counter()
    session = _opened(onnxruntime, next(orders))
    seconds = time.perf_counter() - start
    providers = session.get_providers()
    answer({"version": onnxruntime.__version__, "providers": providers, "seconds": seconds})
    for order in orders:
        answer(_run(numpy, onnxruntime, session, order))


def _run(numpy: Any, onnxruntime: Any, session: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Run once; a function, so that nothing of a run is in memory during the next."""
    names = [output.name for output in session.get_outputs()]
    feeds = {
        name: _value(onnxruntime, numpy.load(path), element_type)
        for name, (path, element_type) in order["feeds"].items()
    }
    start = time.perf_counter()
    values = session.run_with_ort_values(names, feeds)
    seconds = time.perf_counter() - start
    outputs = {}
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        if value.is_tensor() and (array := _array(numpy, value)).dtype != object:
            outputs[name] = f"{order['prefix']}{i}.npy", value.data_type()[7:-1]
            numpy.save(outputs[name][0], array)
    return {"seconds": seconds, "outputs": outputs}


def _opened(onnxruntime: Any, order: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = order["threads"]
    level = getattr(onnxruntime.GraphOptimizationLevel, order["level"])
    options.graph_optimization_level = level
    model = order["model"]
    if order["from_memory"]:  # then its data files are found from the working folder
        model = Path(model).read_bytes()
    return onnxruntime.InferenceSession(model, options, providers=order["providers"])


def _value(onnxruntime: Any, array: Any, element_type: int) -> Any:
    if element_type:
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        return make(array, element_type)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(numpy: Any, value: Any) -> Any:
    """The elements of a tensor; those of types that numpy lacks as unsigned integers."""
    size = _FOREIGN.get(value.data_type()[7:-1])
    if size is None:
        return value.numpy()
    shape = value.shape()
    content = ctypes.string_at(value.data_ptr(), size * math.prod(shape))
    return numpy.frombuffer(content, f"u{size}").reshape(shape)


if __name__ == "__main__":
    _serve()
