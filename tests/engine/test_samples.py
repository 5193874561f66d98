"""Inputs made from what a model says of them."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxforge import model_io
from onnxforge.errors import Refused
from onnxforge.numerics.samples import random_inputs
from support import fixtures


def tensor(name: str, dtype: ir.DataType, *dims: int | str | None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def one(value: ir.Value, seed: int = 0) -> np.ndarray:
    (drawn,) = random_inputs([value], seed=seed).values()
    return drawn


@pytest.mark.parametrize("name", fixtures.names())
def test_every_input_gets_a_value_of_its_type_and_shape(name: str) -> None:
    inputs = model_io.load(fixtures.built(name)).graph.inputs
    drawn = random_inputs(inputs, size=5)
    assert list(drawn) == [value.name for value in inputs]
    for value in inputs:
        assert value.dtype is not None
        assert value.shape is not None
        dims = tuple(dim if isinstance(dim, int) else 5 for dim in value.shape)
        seen = drawn[value.name or ""]
        assert (seen.dtype, seen.shape) == (value.dtype.numpy(), dims)


def test_equal_seeds_give_equal_values_and_others_do_not() -> None:
    value = tensor("x", ir.DataType.FLOAT, 64)
    assert one(value).tobytes() == one(value).tobytes()
    assert one(value).tobytes() == one(value, seed=0).tobytes()
    assert one(value).tobytes() != one(value, seed=1).tobytes()


def test_two_inputs_get_different_values() -> None:
    drawn = random_inputs([tensor(name, ir.DataType.FLOAT, 64) for name in "ab"])
    assert drawn["a"].tobytes() != drawn["b"].tobytes()


@pytest.mark.parametrize(
    "dtype",
    [
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
    ],
)
def test_floats_are_normal(dtype: ir.DataType) -> None:
    drawn = one(tensor("x", dtype, 4096))
    assert drawn.dtype == dtype.numpy()
    values = drawn.astype(np.float64)
    assert abs(values.mean()) < 0.1
    assert abs(values.std() - 1) < 0.1


@pytest.mark.parametrize(
    "dtype",
    [
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT64,
        ir.DataType.INT4,
    ],
)
def test_integers_and_booleans_are_zero_or_one(dtype: ir.DataType) -> None:
    drawn = one(tensor("x", dtype, 256))
    assert drawn.dtype == dtype.numpy()
    assert set(drawn.astype(int).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("dims", "shape"),
    [((), ()), ((2, 3), (2, 3)), (("batch", 3), (8, 3)), ((None, "t"), (8, 8)), ((0,), (0,))],
)
def test_open_axes_get_the_size(dims: tuple[int | str | None, ...], shape: object) -> None:
    assert one(tensor("x", ir.DataType.FLOAT, *dims)).shape == shape


def test_an_input_without_a_shape_is_a_scalar() -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    assert one(value).shape == ()


@pytest.mark.parametrize(
    "kind",
    [
        ir.TensorType(ir.DataType.STRING),
        ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)),
        None,
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(kind: ir.TypeProtocol | None) -> None:
    with pytest.raises(Refused, match="'words'"):
        one(ir.Value(name="words", type=kind))
