"""A planted bad layer is found, however deep, in whatever form the weights are stored."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxforge import PassManager
from onnxforge.compare import Data, Options, Sample, Setup, compare
from onnxforge.compare import localize as module
from onnxforge.compare.evidence import Localization
from onnxforge.compare.pieces import Pieces
from onnxforge.model_io import load
from support import fixtures, pairs

ONE = [Sample("one", {"x": pairs.sample()})]


def localized(reference: Path, candidate: Path, data: Data | list[Sample]) -> Localization:
    found = compare(reference, candidate, data, Options(localize=True))
    assert found.localization is not None, found
    return found.localization


def scaled(path: Path, weight: str, target: Path, factor: float = 1.01) -> Path:
    """A copy of an inline model in which one weight is off."""
    proto = onnx.load(path)
    (tensor,) = (t for t in proto.graph.initializer if t.name == weight)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), weight))
    return pairs.saved(target, proto)


def test_the_error_enters_where_it_was_planted(tmp_path: Path) -> None:
    reference = pairs.saved(tmp_path / "a.onnx", pairs.model())
    candidate = scaled(reference, "w1", tmp_path / "b.onnx")
    found = localized(reference, candidate, ONE)
    assert found.sample == "one"
    assert found.walked == 6
    assert [layer.value for layer in found.layers] == ["b", "c", "made", "logits"]
    first, *rest = found.layers
    assert (first.op_type, first.node, first.index) == ("MatMul", "MatMul#2", 2)
    assert first.entered.sqnr_db == pytest.approx(40, abs=0.1)
    assert first.reached == first.entered
    assert all(layer.entered.equal and not layer.reached.equal for layer in rest)
    assert (found.only_reference, found.only_candidate, found.failures) == ((), (), ())


def test_a_bad_layer_stands_out_of_a_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUDGET", 1 << 15)  # several pieces: values cross them
    reference = fixtures.built("speech_encoder")
    proto = onnx.load(reference)
    weights = {tensor.name for tensor in proto.graph.initializer}
    matmuls = [node for node in proto.graph.node if node.op_type == "MatMul"]
    planted = [node for node in matmuls if node.input[1] in weights][-1]
    bad = scaled(reference, planted.input[1], tmp_path / "bad.onnx")
    tier = tmp_path / "tier.onnx"
    PassManager("fp16w").run(bad, tier)
    samples = [Sample("s", feeds) for feeds in fixtures.samples("speech_encoder")[:1]]
    found = localized(reference, tier, samples)
    assert found.failures == ()
    assert found.layers[0].value == planted.output[0]
    assert found.layers[0].entered.sqnr_db < 41
    assert found.layers[0].reached.sqnr_db < 41
    assert found.layers[1].entered.sqnr_db > 60
    assert all(name.endswith("_fp16w") for name in found.only_candidate)


def test_the_worst_sample_is_taken(tmp_path: Path) -> None:
    reference = pairs.saved(tmp_path / "a.onnx", pairs.model())
    ending = "t = Tanh(made) q = Mul(t, s) logits = Add(made, q)"
    candidate = pairs.saved(tmp_path / "b.onnx", pairs.model(ending, s=np.float32(0.1)))
    faint = Sample("faint", {"x": pairs.sample() * 1e-3})
    loud = Sample("loud", {"x": pairs.sample() * 1e3})
    found = localized(reference, candidate, [loud, faint])
    assert found.sample == "faint"
    assert found.only_candidate == ("t", "q")
    assert [layer.value for layer in found.layers] == ["logits"]


def test_values_with_other_names_are_matched_by_their_nodes(tmp_path: Path) -> None:
    proto = pairs.model()
    for i, node in enumerate(proto.graph.node):
        node.name = f"node {i}"
    reference = pairs.saved(tmp_path / "a.onnx", proto)
    for node in proto.graph.node:
        node.input[:] = [{"a": "renamed"}.get(name, name) for name in node.input]
        node.output[:] = [{"a": "renamed"}.get(name, name) for name in node.output]
    other = pairs.saved(tmp_path / "b.onnx", proto)
    found = localized(reference, scaled(other, "w0", tmp_path / "c.onnx"), ONE)
    assert found.layers[0].value == "a"
    assert (found.walked, found.only_reference, found.only_candidate) == (6, (), ())


@pytest.mark.parametrize("name", ["hiding_places", "unsorted"])
def test_weights_are_found_in_all_places(name: str) -> None:
    path = fixtures.built(name)
    samples = [Sample("s", feeds) for feeds in fixtures.samples(name)[:1]]
    found = localized(path, path, samples)
    assert found.layers == ()
    assert found.failures == ()
    assert found.walked > 0


def test_bodies_are_listed_and_their_outputs_compared() -> None:
    path = fixtures.built("merged_decoder")
    found = localized(path, path, Data(count=1))
    assert len(found.bodies) == 2
    assert found.walked == len(Pieces(load(path)).made)


def test_types_that_differ_are_cast_on_the_way(tmp_path: Path) -> None:
    text = """(float[n] x) => (float[n] y)
      {{ h = Cast<to={0}>(x) i = Identity(h) w = Cast<to=1>(i) y = Neg(w) }}"""
    reference = pairs.saved(tmp_path / "a.onnx", text.format(1))
    candidate = pairs.saved(tmp_path / "b.onnx", text.format(16))
    found = localized(reference, candidate, Data(count=1))
    assert [layer.value for layer in found.layers] == ["h", "i", "w", "y"]
    # What the reference holds at h cannot be put into the candidate without rounding it.
    assert [layer.entered.equal for layer in found.layers] == [False, False, False, True]


def test_what_is_no_number_is_passed_over(tmp_path: Path) -> None:
    text = """(float[n] x) => (float[n] y) {
      s = SequenceConstruct(x, x) t = Cast<to=8>(x) z = ConcatFromSequence<axis=0>(s)
      u = Cast<to=1>(t) y = Neg(u) }"""
    path = pairs.saved(tmp_path / "model.onnx", text)
    found = localized(path, path, Data(count=1))
    assert (found.walked, found.failures) == (3, ())


def test_a_piece_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST", 2)
    monkeypatch.setattr(module, "_GROWTH", 1)
    reference = pairs.saved(tmp_path / "a.onnx", pairs.model())
    piece = Pieces.piece

    def broken(self: Pieces, wanted: Any, given: Any) -> Any:
        proto, inputs = piece(self, wanted, given)
        if "b" in wanted:
            proto.graph.node[-1].op_type = "Odd"
        return proto, inputs

    monkeypatch.setattr(Pieces, "piece", broken)
    found = localized(reference, reference, ONE)
    assert len(found.failures) == 1
    assert found.failures[0].startswith("b to c: ")
    assert "Odd" in found.failures[0]
    assert found.walked == 4


def test_shapes_that_differ_are_told(tmp_path: Path) -> None:
    text = "(float[n] x) => (float[m] y) {{ h = Concat<axis=0>({0}) y = Reshape(h, s) }}"
    models = []
    for name, parts in (("a", "x, x"), ("b", "x, x, x")):
        proto = onnx.parser.parse_model(pairs.HEAD + text.format(parts))
        shape = numpy_helper.from_array(np.array([-1]), "s")
        proto.graph.initializer.append(shape)
        models.append(pairs.saved(tmp_path / f"{name}.onnx", proto))
    found = localized(*models, Data(count=1))
    assert found.failures[0] == "h: has the shapes (32,) and (48,)"


@pytest.mark.parametrize("layout", ["inline", "sidecar"])
def test_pieces_read_large_weights_where_they_lie(tmp_path: Path, layout: str) -> None:
    wide = np.random.default_rng(0).standard_normal((64, 640)).astype(np.float32)
    text = "(float[n,64] x) => (float[n,640] y) { h = Tanh(x) y = MatMul(h, w) }"
    proto = onnx.parser.parse_model(pairs.HEAD + text)
    proto.graph.initializer.append(numpy_helper.from_array(wide, "w"))
    path = pairs.saved(tmp_path / "inline.onnx", proto)
    if layout == "sidecar":
        target = tmp_path / "sidecar.onnx"
        PassManager([]).run(path, target, layout="sidecar")
        path = target
    model = load(path, editable=False)
    pieces = Pieces(model)
    piece, inputs = pieces.piece({"y": "y"}, {"h": ir.DataType.FLOAT})
    assert inputs == {"h"}
    assert [node.op_type for node in piece.graph.node] == ["MatMul"]
    assert piece.ByteSize() < 1000
    assert pieces.folder == path.parent
    files = {file.name for file in tmp_path.iterdir()}
    assert localized(path, path, ONE).layers == ()
    assert {file.name for file in tmp_path.iterdir()} == files


def test_another_runtime_walks_too(tmp_path: Path) -> None:
    reference = pairs.saved(tmp_path / "a.onnx", pairs.model())
    options = Options(candidate=Setup(threads=2, optimization="none"), localize=True)
    found = compare(reference, reference, ONE, options).localization
    assert found is not None
    assert found.walked == 6
    assert all(layer.entered.sqnr_db > 100 for layer in found.layers)
