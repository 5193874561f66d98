"""Running a model on onnxruntime, in a process of its own: it crashes on some models."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxforge.errors import RuntimeFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["run"]

_CHILD = """
import sys
import numpy
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(
    sys.argv[1], options, providers=["CPUExecutionProvider"]
)
with numpy.load(sys.argv[2]) as feeds:
    names = feeds["names"].tolist()
    values = {name: feeds[f"value{i}"] for i, name in enumerate(names)}
outputs = zip(session.get_outputs(), session.run(None, values))
kept = [
    (output.name, value)
    for output, value in outputs
    if isinstance(value, numpy.ndarray) and value.dtype != object
]
numpy.savez(
    sys.argv[3],
    names=numpy.array([name for name, _ in kept], str),
    **{f"value{i}": value for i, (_, value) in enumerate(kept)},
)
"""


def run(model: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a model on the installed onnxruntime, processor only, on one thread.

    Args:
        model: The model file.
        inputs: Value of each input.

    Returns:
        Value of each output that is a tensor.

    Raises:
        RuntimeFailed: onnxruntime is missing, raised, or crashed; the message says which.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise RuntimeFailed("onnxruntime is missing: pip install onnxruntime")
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
        feeds, results = Path(folder) / "in.npz", Path(folder) / "out.npz"
        arrays: dict[str, Any] = {f"value{i}": v for i, v in enumerate(inputs.values())}
        np.savez(feeds, names=np.array(list(inputs), str), **arrays)
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, str(model), str(feeds), str(results)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            raise RuntimeFailed(f"onnxruntime died with {name}")
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeFailed(lines[-1] if lines else "onnxruntime failed")
        with np.load(results) as outputs:
            names = outputs["names"].tolist()
            return {name: outputs[f"value{i}"] for i, name in enumerate(names)}
