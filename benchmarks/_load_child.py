"""Load and run models in any onnxruntime: orders on stdin, an answer to each on stdout.

With ``--kernels`` it tells instead which kernels and which operators the runtime has.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state


def main() -> None:
    """Answer on what stdout was: libraries may print there."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if "--kernels" in sys.argv:
        answers.write(json.dumps({"kernels": _kernels(), "operators": _operators()}))
        answers.flush()
        return
    for line in sys.stdin:
        answers.write(json.dumps(_failure(*json.loads(line))) + "\n")
        answers.flush()


def _failure(model: str, inputs: list[str]) -> tuple[str, str] | None:
    """What failed, ``load`` or ``run``, and the runtime's words; None where nothing did."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    step = "load"
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        step = "run"
        for path in inputs:
            with numpy.load(path) as archive:
                session.run(None, dict(archive))
    except Exception as error:  # the bindings raise many classes, none of them ours
        return step, " ".join(str(error).split()) or type(error).__name__
    return None


def _kernels() -> list[Any]:
    return [
        (kernel.domain, kernel.op_name, *kernel.version_range, dict(kernel.type_constraints))
        for kernel in state.get_all_opkernel_def()
    ]


def _operators() -> list[Any]:
    def ports(formal: Any) -> list[tuple[str, str, str]]:
        return [(port.name, port.typeStr, port.option.name) for port in formal]

    return [
        (
            schema.domain,
            schema.name,
            schema.since_version,
            ports(schema.inputs),
            ports(schema.outputs),
            list(schema.attributes),
        )
        for schema in state.get_all_operator_schema()
        if not schema.deprecated
    ]


if __name__ == "__main__":
    main()
