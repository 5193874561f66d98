"""Load models, one a line on stdin, and answer each with its error: in any onnxruntime.

With ``--kernels`` it tells instead which kernels and which operators the runtime has.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

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
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for line in sys.stdin:
        answers.write(json.dumps(_error(line.rstrip("\n"), options)) + "\n")
        answers.flush()


def _error(path: str, options: Any) -> str | None:
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the bindings raise many classes, none of them ours
        return " ".join(str(error).split()) or type(error).__name__
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
        (schema.domain, schema.name, schema.since_version, ports(schema.inputs),
         ports(schema.outputs), list(schema.attributes))
        for schema in state.get_all_operator_schema()
        if not schema.deprecated
    ]  # fmt: skip


if __name__ == "__main__":
    main()
