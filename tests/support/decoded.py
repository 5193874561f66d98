"""The fp32 parent that a tier of int8 weights has to equal; nothing here uses onnxforge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from support import integers, oracle, places


def parent(
    model: ModelProto,
    axes: Mapping[str, Iterable[int]],
    rules: integers.Rules = integers.DEFAULT,
) -> ModelProto:
    """A copy whose weights hold what their integers stand for.

    Args:
        model: The model, its weights inside.
        axes: For each weight, by the name of its value in any graph or function, the axes
            along which its elements share a scale.
        rules: How they are quantized.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    left = set(axes)
    for name, tensor in places.tensors(copy):
        if name in axes:
            assert tensor.data_type == TensorProto.FLOAT
            values = integers.decoded(numpy_helper.to_array(tensor), axes[name], rules)
            kept = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values, kept))
            left.discard(name)
    assert not left, f"no weight is called {left}"
    return copy


def assert_equal(
    tier: ModelProto, wanted: ModelProto, samples: Iterable[Mapping[str, np.ndarray]]
) -> None:
    """Fail unless a tier gives what its parent gives, bit for bit, and less is stored."""
    for sample in samples:
        oracle.assert_bit_equal(oracle.run(tier, sample), oracle.run(wanted, sample))
