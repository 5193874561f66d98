"""onnxforge: graph surgery on exported ONNX models, by passes that prove what they changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxforge.core import Effect, Fate, Finding, Pass, Result
    from onnxforge.manager import PassManager
    from onnxforge.model_io import load
    from onnxforge.registry import parse
    from onnxforge.saving import save

__all__ = [
    "Effect",
    "Fate",
    "Finding",
    "Pass",
    "PassManager",
    "Result",
    "load",
    "parse",
    "save",
]

# Resolved on first use: `onnxforge --help` has no need of onnx, numpy and onnx_ir.
_HOMES = {
    "Effect": "core",
    "Fate": "core",
    "Finding": "core",
    "Pass": "core",
    "PassManager": "manager",
    "Result": "core",
    "load": "model_io",
    "parse": "registry",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
