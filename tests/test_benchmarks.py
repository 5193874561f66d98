"""The oracles of `make runtimes`: what a product has to give, and the parent of a tier."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from support import oracle

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import _parents
import _products

RNG = np.random.default_rng(5)


def model(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def multiplied(weight: np.ndarray) -> ModelProto:
    """A quantized MatMul with a bias, and a Relu behind it."""
    node = helper.make_node
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
        node("MatMulInteger", ["q", "w", "q_zero", "w_zero"], ["sums"], name="product"),
        node("Cast", ["sums"], ["real"], to=TensorProto.FLOAT),
        node("Mul", ["q_scale", "w_scale"], ["scale"]),
        node("Mul", ["real", "scale"], ["scaled"]),
        node("Add", ["scaled", "bias"], ["sum"]),
        node("Relu", ["sum"], ["y"]),
    ]
    scale, bias = RNG.random((2, 3), np.float32)
    zero = np.zeros(3, np.int8)
    return model(nodes, w=weight, w_zero=zero, w_scale=scale, bias=bias)


def test_a_product_reaches_from_its_activation_to_its_bias() -> None:
    shown = multiplied(RNG.integers(-127, 128, (8, 3), np.int8))
    products = _products.products(shown)
    assert [(p.name, p.source, p.target) for p in products] == [("product", "x", "sum")]
    assert _products.show(shown, products) == ["y", "sum"]


def test_a_level_of_one_weight_is_found() -> None:
    weight = RNG.integers(-63, 63, (8, 3), np.int8)  # no sum saturates on any processor
    x = RNG.standard_normal((5, 8), np.float32)
    shown = multiplied(weight)
    products = _products.products(shown)
    names = _products.show(shown, products)
    values = {"x": x} | dict(zip(names, oracle.run(shown, {"x": x}).values(), strict=True))
    assert list(_products.wrong(products, values)) == []
    weight[3, 1] += 1
    shown.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    (reason,) = _products.wrong(_products.products(shown), values)
    assert reason.startswith("product is off by")


def test_the_scale_and_the_zero_point_are_those_of_the_specification() -> None:
    product = _products.products(multiplied(np.eye(3, dtype=np.int8)))[0]
    held = {t.name: numpy_helper.to_array(t) for t in product.model.graph.initializer}
    x = np.array([[-1.0, 0.25, 1.55]], np.float32)
    scale = np.float32(2.55) / np.float32(255)
    levels = np.clip(np.rint(x / scale) + 100, 0, 255)  # the zero point is 1 / 0.01
    wanted = (levels - 100).astype(np.float32) * (scale * held["w_scale"]) + held["bias"]
    np.testing.assert_array_equal(product.expected(x), wanted)


@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((2, 4, 11), (6, 4, 3), {"strides": [2], "pads": [1, 2]}),
        ((1, 4, 12), (6, 2, 3), {"group": 2, "dilations": [2]}),
        ((1, 3, 7, 9), (4, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 0, 1]}),
        ((1, 4, 6, 5), (4, 1, 2, 2), {"group": 4, "dilations": [1, 2]}),
    ],
    ids=["1-D", "groups", "2-D", "depthwise"],
)
def test_integer_windows_equal_those_of_onnx(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, object]
) -> None:
    node = helper.make_node("ConvInteger", ["q", "w", "zq", "zw"], ["y"], **attributes)
    inputs = {
        "q": RNG.integers(0, 256, shape, np.uint8),
        "w": RNG.integers(0, 256, kernel, np.uint8),
        "zq": np.array(131, np.uint8),
        "zw": np.array(128, np.uint8),
    }
    values = [helper.make_tensor_value_info(n, TensorProto.UINT8, None) for n in inputs]
    out = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    graph = helper.make_graph([node], "conv", values, [out])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (wanted,) = ReferenceEvaluator(whole).run(None, inputs)
    (found,) = ReferenceEvaluator(whole, new_ops=[_products.ConvInteger]).run(None, inputs)
    np.testing.assert_array_equal(found, wanted, strict=True)


def test_the_parent_holds_what_the_integers_stand_for(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = np.array([[1.0, -0.5], [0.3, 0.26]], np.float32)
    scale = np.array([[0.25, 0.1]], np.float32)
    onnx.save(model([node], w=weight), tmp_path / "source.onnx")
    stored = model([node], w=np.zeros((2, 2), np.int8), w_scale=scale)
    onnx.save(stored, tmp_path / "tier.onnx")
    paths = (tmp_path / f"{name}.onnx" for name in ("source", "tier", "parent"))
    assert _parents.write(*paths) == 1
    (held,) = onnx.load(tmp_path / "parent.onnx").graph.initializer
    levels = np.array([[4, -5], [1, 3]], np.float32)
    np.testing.assert_array_equal(numpy_helper.to_array(held), levels * scale, strict=True)
