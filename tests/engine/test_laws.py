"""The laws hold honest passes and bite the others."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from onnxforge import model_io
from onnxforge.core import Effect, Pass, Result
from onnxforge.errors import BrokenPass, Refused
from onnxforge.laws import Witness, digest, payloads
from onnxforge.lazy import DerivedTensor
from onnxforge.passes.fp16w import WeightsFp16CastPass
from onnxforge.weights import Weight, Weights
from support import fixtures, payload

Edit = Callable[[ir.Model], Result]
EFFECTS = [Effect.CHECK, Effect.LAYOUT, Effect.STORAGE, Effect.APPROX]
SOUND = [name for name in fixtures.names(clean=True) if name != "opset_21_int4"]


@dataclasses.dataclass(frozen=True)
class Negate:
    """A kernel."""

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        np.negative(block, out=out)


def fake(effect: Effect, edit: Edit) -> Pass:
    """A pass of this effect that does this."""

    class Fake(Pass):
        name = "fake"

        def call(self, model: ir.Model) -> Result:
            return edit(model)

    Fake.effect = effect
    return Fake()


def hold(
    effect: Effect,
    edit: Edit,
    fixture: str = "nameless",
    inputs: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Run a fake pass on a fixture and hold it to its laws."""
    model, step = model_io.load(fixtures.built(fixture)), fake(effect, edit)
    witness = Witness(step, model, inputs)
    witness.hold(step(model))


def weight(model: ir.Model, name: str = "up_w") -> Weight:
    return next(w for w in Weights(model) if w.where == name)


# What a pass may do to a model, once: the second time there is nothing left to do.
def rename_node(model: ir.Model) -> bool:
    old, model.graph[0].name = model.graph[0].name, "renamed"
    return old != "renamed"


def rename_value(model: ir.Model) -> bool:
    value = model.graph[0].outputs[0]
    old, value.name = value.name, "renamed"
    return old != "renamed"


def add_attribute(model: ir.Model) -> bool:
    node = next(node for node in model.graph if node.op_type == "MatMul")
    new = "odd" not in node.attributes
    node.attributes.add(ir.AttrInt64("odd", 1))
    return new


def describe(model: ir.Model) -> bool:
    old, model.doc_string = model.doc_string, "described"
    return old != "described"


def note(model: ir.Model) -> bool:
    new = "note" not in model.metadata_props
    model.metadata_props["note"] = "noted"
    return new


def replace_weight(model: ir.Model) -> bool:
    """One byte of a large weight differs."""
    found = weight(model)
    values = found.tensor.numpy().copy()
    new = values.flat[100] != 1
    values.flat[100] = 1
    if new:
        found.store(ir.tensor(values))
    return bool(new)


def replace_small_weight(model: ir.Model) -> bool:
    found = weight(model, "up_b")
    new = bool(found.tensor.numpy().any())
    found.store(ir.tensor(np.zeros(found.tensor.shape.numpy(), np.float32)))
    return new


def swap_weights(model: ir.Model) -> bool:
    """Two weights of one size change places; a byte count would not see it."""
    found = weight(model, "down_w"), weight(model, "tied_w")
    first, second = (w.tensor for w in found)
    found[0].store(second)
    found[1].store(first)
    return True


EDITS = [
    rename_node,
    rename_value,
    add_attribute,
    describe,
    note,
    replace_weight,
    replace_small_weight,
]


@pytest.mark.parametrize("edit", EDITS)
def test_the_digest_differs_after_every_edit(edit: Callable[[ir.Model], bool]) -> None:
    model = model_io.load(fixtures.built("nameless"))
    before = digest(model)
    assert edit(model)
    assert digest(model) != before


@pytest.mark.parametrize("name", fixtures.names())
def test_the_digest_is_the_same_each_time(name: str) -> None:
    model = model_io.load(fixtures.built(name))
    assert digest(model) == digest(model) == digest(model_io.load(fixtures.built(name)))


@pytest.mark.parametrize("name", fixtures.names(clean=True))
def test_a_clone_has_the_same_digest(name: str) -> None:
    model = model_io.load(fixtures.built(name))
    assert digest(model.clone()) == digest(model)


def test_models_have_different_digests() -> None:
    names = fixtures.names()
    assert len({digest(model_io.load(fixtures.built(n))) for n in names}) == len(names)


def test_a_digest_tells_where_a_weight_lies_but_does_not_read_it(tmp_path: Path) -> None:
    first = fixtures.copied("external_one", tmp_path / "first")
    second = fixtures.copied("external_one", tmp_path / "second")
    model = model_io.load(first)
    before = digest(model)
    assert digest(model_io.load(second)) != before
    first.with_name("external_one.onnx_data").unlink()
    assert digest(model) == before


def test_a_digest_does_not_compute_a_derived_weight() -> None:
    def never(block: np.ndarray, out: np.ndarray, start: int) -> None:
        raise AssertionError("nobody asked for the values")

    model = model_io.load(fixtures.built("nameless"))
    before = digest(model)
    found = weight(model)
    found.store(DerivedTensor(found.tensor, ir.DataType.FLOAT, never))
    assert digest(model) == digest(model) != before


def test_derived_weights_with_equal_kernels_have_equal_digests() -> None:
    digests = []
    for dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.FLOAT16):
        model = model_io.load(fixtures.built("nameless"))
        found = weight(model)
        found.store(DerivedTensor(found.tensor, dtype, Negate()))
        digests.append(digest(model))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", fixtures.names())
def test_payloads_are_the_bytes_of_every_weight(name: str) -> None:
    model = model_io.load(fixtures.built(name))
    found = payloads(model)
    assert [path for path, _ in found] == sorted(weight.where for weight in Weights(model))
    expected = payload.tensor_digests(fixtures.built(name))
    assert sorted(sha for _, sha in found) == sorted(expected.values())


def test_payloads_of_derived_weights_are_computed() -> None:
    model = model_io.load(fixtures.built("nameless"))
    found = weight(model)
    values = found.tensor.numpy()
    found.store(DerivedTensor(found.tensor, ir.DataType.FLOAT, Negate()))
    assert dict(payloads(model))["up_w"] == hashlib.sha256((-values).tobytes()).hexdigest()


@pytest.mark.parametrize("effect", EFFECTS)
def test_a_pass_that_does_nothing_and_says_so_is_honest(effect: Effect) -> None:
    hold(effect, lambda model: Result(model, modified=False))


@pytest.mark.parametrize("effect", EFFECTS)
def test_a_pass_that_does_nothing_must_not_say_modified(effect: Effect) -> None:
    with pytest.raises(BrokenPass, match="says modified=True"):
        hold(effect, lambda model: Result(model, modified=True))


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_pass_that_changes_anything_must_say_modified(
    effect: Effect, edit: Callable[[ir.Model], bool]
) -> None:
    def lie(model: ir.Model) -> Result:
        edit(model)
        return Result(model, modified=False)

    with pytest.raises(BrokenPass, match="says modified=False"):
        hold(effect, lie)


@pytest.mark.parametrize("edit", EDITS)
def test_an_approximate_pass_may_change_anything_once(
    edit: Callable[[ir.Model], bool],
) -> None:
    hold(Effect.APPROX, lambda model: Result(model, modified=edit(model)))


@pytest.mark.parametrize("edit", [replace_weight, replace_small_weight])
def test_a_layout_pass_must_not_change_a_byte_of_a_weight(
    edit: Callable[[ir.Model], bool],
) -> None:
    with pytest.raises(BrokenPass, match="changed the bytes of a weight"):
        hold(Effect.LAYOUT, lambda model: Result(model, modified=edit(model)))


def test_a_layout_pass_must_not_swap_weights() -> None:
    with pytest.raises(BrokenPass, match="changed the bytes of a weight"):
        hold(Effect.LAYOUT, lambda m: Result(m, swap_weights(m)), "external_two")


def test_a_layout_pass_must_not_lose_a_weight() -> None:
    def lose(model: ir.Model) -> Result:
        return Result(model, model.graph.initializers.pop("w_no_consumer", None) is not None)

    with pytest.raises(BrokenPass, match="changed the bytes of a weight"):
        hold(Effect.LAYOUT, lose, "hiding_places")


def test_a_layout_pass_may_move_bytes() -> None:
    def into_memory(model: ir.Model) -> Result:
        found = weight(model)
        if isinstance(found.tensor, ir.Tensor):
            return Result(model, modified=False)
        found.store(ir.tensor(found.tensor.numpy()))
        return Result(model, modified=True)

    hold(Effect.LAYOUT, into_memory)


@pytest.mark.parametrize("effect", [Effect.LAYOUT, Effect.APPROX])
def test_a_pass_must_not_change_its_own_result(effect: Effect) -> None:
    def grow(model: ir.Model) -> Result:
        model.doc_string = (model.doc_string or "") + "."
        return Result(model, modified=True)

    with pytest.raises(BrokenPass, match="changes its own result when it runs again"):
        hold(effect, grow)


# STORAGE: weights of the fixture external_two stored as float16; tied_w is given two users.
DOWN = ("down_w", "tied_w")


def narrow(
    model: ir.Model,
    *,
    through: ir.DataType = ir.DataType.FLOAT16,
    decode: Callable[[np.ndarray], np.ndarray] = lambda v: v.astype(np.float16),
) -> Result:
    """Store both weights in another type, and say what they decode to."""
    decoded: dict[str, ir.TensorProtocol] = {}
    for name in DOWN:
        found = weight(model, name)
        if found.dtype != ir.DataType.FLOAT:
            continue
        values = found.tensor.numpy()
        decoded[name] = ir.tensor(decode(values).astype(np.float32), name=name)
        found.store(ir.tensor(values.astype(through.numpy())))
        widen(model, found)
    return Result(model, bool(decoded), decoded=decoded)


def widen(model: ir.Model, found: Weight) -> None:
    """Cast a weight back to float32 for all its users."""
    cast = ir.node("Cast", [found.value], {"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{found.where}_wide"
    model.graph.insert_before(found.uses[0].node, cast)
    for use in found.uses:
        use.node.replace_input_with(use.index, cast.outputs[0])


def test_a_storage_pass_equals_its_parent_with_the_decoded_weights() -> None:
    hold(Effect.STORAGE, narrow, "external_two")


@pytest.mark.parametrize("name", SOUND)
def test_fp16w_keeps_its_law_on_every_fixture(name: str) -> None:
    model = model_io.load(fixtures.built(name))
    step = WeightsFp16CastPass()
    witness = Witness(step, model, fixtures.samples(name)[0])
    result = step(model)
    assert result.modified
    witness.hold(result)


def test_wrong_values_relative_to_the_decoded_ones_are_seen() -> None:
    def truncated(values: np.ndarray) -> np.ndarray:
        return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    with pytest.raises(BrokenPass, match="not bit-equal to its parent: output 'y'"):
        hold(Effect.STORAGE, lambda model: narrow(model, decode=truncated), "external_two")


def test_one_wrong_value_is_seen() -> None:
    def almost(values: np.ndarray) -> np.ndarray:
        half = values.astype(np.float16)
        half.flat[7] = np.nextafter(half.flat[7], np.float16(9))
        return half

    with pytest.raises(BrokenPass, match="not bit-equal"):
        hold(Effect.STORAGE, lambda model: narrow(model, decode=almost), "external_two")


def test_a_weight_that_is_not_declared_is_seen() -> None:
    def silent(model: ir.Model) -> Result:
        return dataclasses.replace(narrow(model), decoded={})

    with pytest.raises(BrokenPass, match="not bit-equal"):
        hold(Effect.STORAGE, silent, "external_two")


def test_a_detour_through_another_type_is_seen() -> None:
    def detour(model: ir.Model) -> Result:
        return narrow(model, through=ir.DataType.BFLOAT16)

    with pytest.raises(BrokenPass, match="not bit-equal"):
        hold(Effect.STORAGE, detour, "external_two")


def test_a_forgotten_user_is_seen() -> None:
    def forget(model: ir.Model) -> Result:
        """One of two users still reads the float32 values, under another name."""
        old = weight(model, "tied_w").tensor
        result = narrow(model)
        if result.modified:
            value = ir.Value(name="forgotten", const_value=old)
            value.type, value.shape = ir.TensorType(old.dtype), old.shape
            model.graph.register_initializer(value)
            user = next(n for n in model.graph if n.outputs[0].name == "e")
            user.replace_input_with(1, value)
        return result

    with pytest.raises(BrokenPass, match="not bit-equal"):
        hold(Effect.STORAGE, forget, "external_two")


def test_changed_arithmetic_is_seen() -> None:
    def scale(model: ir.Model) -> Result:
        result = narrow(model)
        node = next(node for node in model.graph if node.op_type == "Sub")
        node.replace_input_with(1, node.inputs[0])
        return result

    with pytest.raises(BrokenPass, match="not bit-equal"):
        hold(Effect.STORAGE, scale, "external_two")


def test_a_storage_pass_must_not_change_its_own_result() -> None:
    def again(model: ir.Model) -> Result:
        result = narrow(model)
        model.doc_string = (model.doc_string or "") + "."
        return dataclasses.replace(result, modified=True)

    with pytest.raises(BrokenPass, match="changes its own result"):
        hold(Effect.STORAGE, again, "external_two")


def model_of_width(width: str, rows: int, kind: str = "float") -> ir.Model:
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
g ({kind}[{width}] s, float[{width}] x) => (float[4] y) {{ y = MatMul(x, w) }}"""
    proto = parser.parse_model(text)
    values = np.linspace(0, 1, rows * 4, dtype=np.float32).reshape(rows, 4)
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    return model_io.from_proto(proto)


def store_half(model: ir.Model) -> Result:
    found = weight(model, "w")
    if found.dtype == ir.DataType.FLOAT16:
        return Result(model, modified=False)
    values = found.tensor.numpy()
    decoded = {"w": ir.tensor(values.astype(np.float16).astype(np.float32), name="w")}
    found.store(ir.tensor(values.astype(np.float16)))
    widen(model, found)
    return Result(model, modified=True, decoded=decoded)


def hold_storage(model: ir.Model, inputs: Mapping[str, np.ndarray] | None = None) -> None:
    step = fake(Effect.STORAGE, store_half)
    witness = Witness(step, model, inputs)
    witness.hold(step(model))


def test_a_size_that_the_model_takes_is_found() -> None:
    hold_storage(model_of_width("N", 3))


def test_the_law_is_refused_where_the_model_runs_on_no_size() -> None:
    with pytest.raises(Refused, match="needs inputs that the model runs on"):
        hold_storage(model_of_width("N", 5))


def test_the_law_runs_on_the_inputs_it_is_given() -> None:
    vector = np.ones(5, np.float32)
    hold_storage(model_of_width("N", 5), {"s": vector, "x": vector})


def test_the_law_is_refused_where_no_inputs_can_be_drawn() -> None:
    with pytest.raises(Refused, match="'s'"):
        hold_storage(model_of_width("N", 3, kind="string"))


def test_a_check_must_not_change_the_model() -> None:
    with pytest.raises(BrokenPass):
        hold(Effect.CHECK, lambda m: Result(m, modified=describe(m)))


@pytest.mark.parametrize("edit", [rename_node, rename_value, add_attribute])
def test_a_layout_pass_must_not_change_the_graph(edit) -> None:
    with pytest.raises(BrokenPass):
        hold(Effect.LAYOUT, lambda m: Result(m, modified=edit(m)))


def test_a_tier_that_does_not_run_is_a_broken_pass() -> None:
    def forget(m: ir.Model) -> Result:
        result = narrow(m)
        if result.modified:
            user = next(n for n in m.graph if n.outputs[0].name == "e")
            user.replace_input_with(1, weight(m, "tied_w").value)
        return result

    with pytest.raises(BrokenPass):
        hold(Effect.STORAGE, forget, "external_two")


def held(text: str) -> None:
    """Hold fp16w to its law on a model that is given as text."""
    model = model_io.from_proto(parser.parse_model(HEADER + text))
    step = WeightsFp16CastPass(min_bytes=0)
    witness = Witness(step, model)
    witness.hold(step(model))


HEADER = '<ir_version: 8, opset_import: ["" : 17]> '
WEIGHT = "<float[2] w = {0.1, 0.2}>"


def test_random_outputs_are_no_proof_of_a_broken_pass() -> None:
    with pytest.raises(Refused, match="'y' is random"):
        held(
            f"""g (float[2] x) => (float[2] y) {WEIGHT}
            {{ r = RandomNormalLike(x) a = Add(r, w) y = Add(a, x) }}"""
        )


def test_a_law_that_compares_nothing_does_not_pass() -> None:
    with pytest.raises(Refused, match="no output is a tensor of numbers"):
        held(f"g (float[2] x) => (string[2] y) {WEIGHT} {{ a = Add(x, w) y = Cast<to=8>(a) }}")
