"""A small model, faulty candidates for comparing with it, and samples that show the faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

ROWS, WIDTH = 4, 64
HEAD = '<ir_version: 8, opset_import: ["" : 17]> g '
_BODY = """(float[rows, 64] x) => (float[rows, 64] logits, float[rows, 64] hidden) {
  a = MatMul(x, w0)
  hidden = Tanh(a)
  b = MatMul(hidden, w1)
  c = Add(b, x)
  made = MatMul(c, w2)
  %s
}"""


def weights() -> dict[str, np.ndarray]:
    """Return the weights of the model."""
    rng = np.random.default_rng(7)
    drawn = {f"w{i}": rng.standard_normal((WIDTH, WIDTH)) / 8 for i in range(3)}
    return {name: weight.astype(np.float32) for name, weight in drawn.items()}


def sample() -> np.ndarray:
    """Return an input on which the best two logits of the last row are close."""
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


def logits() -> np.ndarray:
    """Return what the model makes of the sample, by numpy."""
    w, x = weights(), sample()
    return (np.tanh(x @ w["w0"]) @ w["w1"] + x) @ w["w2"]


def planted() -> dict[str, onnx.ModelProto]:
    """Return faulty models, each by its fault."""
    nan, wrong = np.zeros((2, ROWS, WIDTH), np.float32)
    nan[1, 5] = np.nan
    best = np.argsort(logits()[-1])
    wrong[-1, best[-2]] = 0.02  # the margin is 0.013
    scale, cut = np.float32(1.01), np.array([1, WIDTH - 1])
    return {
        "scaled": model("logits = Mul(made, s)", s=scale),
        "shifted": model("l, r = Split<axis=1>(made, s) logits = Concat<axis=1>(r, l)", s=cut),
        "flipped": model("logits = Neg(made)"),
        "nan": model("logits = Add(made, s)", s=nan),
        "argmax": model("logits = Add(made, s)", s=wrong),
    }


def model(ending: str = "logits = Identity(made)", **arrays: np.ndarray) -> onnx.ModelProto:
    """Return the model with another ending and other or more weights."""
    proto = parser.parse_model(HEAD + _BODY % ending)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name)
        for name, array in {**weights(), **arrays}.items()
    )
    return proto


def saved(path: Path, proto: onnx.ModelProto | str) -> Path:
    """Write a model, or the rest of one in onnx's text form."""
    if isinstance(proto, str):
        proto = parser.parse_model(HEAD + proto)
    path.write_bytes(proto.SerializeToString())
    return path
