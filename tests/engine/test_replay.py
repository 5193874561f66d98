"""Whether a tier is what it says: replayed from its parent, and not fooled."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxforge import PassManager
from onnxforge.errors import OnnxforgeError, Refused, SpecError
from onnxforge.manager import PIPELINE_KEY
from onnxforge.replay import Verification, verify
from support import fixtures

PIPELINES = [
    "fp16w",
    "fp16w{min_bytes=0 share=false}",
    "shard{max_bytes=64KiB}",
    "fp16w{min_bytes=64},shard{single=true lift=true}",
    "set-ir{max=8}",
]


def made(source: Path, folder: Path, passes: str) -> Path:
    folder.mkdir(exist_ok=True)
    PassManager(passes).run(source, folder / source.name)
    return folder / source.name


@pytest.mark.parametrize("passes", PIPELINES)
@pytest.mark.parametrize("name", fixtures.names())
def test_what_was_derived_is_derived(tmp_path: Path, name: str, passes: str) -> None:
    parent = fixtures.built(name)
    try:
        child = made(parent, tmp_path / "out", passes)
    except Refused:
        pytest.skip("the pass declines the fixture")
    before = {path.name: path.read_bytes() for path in child.parent.iterdir()}
    found = verify(parent, child)
    assert found.differences == ()
    assert found.remarks == ()
    assert {path.name: path.read_bytes() for path in child.parent.iterdir()} == before


def test_a_tier_of_a_tier_is_replayed_from_either(tmp_path: Path) -> None:
    parent = fixtures.built("speech_encoder")
    middle = made(parent, tmp_path / "a", "fp16w{min_bytes=4KiB}")
    child = made(middle, tmp_path / "b", "fp16w{min_bytes=64}")
    assert verify(middle, child).pipeline.count("fp16w") == 1
    assert verify(parent, child).pipeline.count("fp16w") == 2
    assert verify(parent, child).derived
    assert verify(middle, child).derived
    assert not verify(parent, middle, "fp16w{min_bytes=64}").derived


def test_the_pipeline_is_told_before_it_runs(tmp_path: Path) -> None:
    parent = fixtures.built("speech_encoder")
    child = made(parent, tmp_path / "a", "fp16w")
    told: list[str] = []
    found = verify(parent, child, announce=told.append)
    assert told == [found.pipeline]
    assert found.pipeline.startswith("fp16w{")


def test_a_copy_is_derived_by_nothing(tmp_path: Path) -> None:
    parent = fixtures.built("external_two")
    copy = fixtures.copied("external_two", tmp_path)
    assert verify(parent, copy).pipeline == ""
    assert verify(parent, copy).derived


def edited(child: Path, change) -> None:
    model = onnx.load(child, load_external_data=False)
    change(model)
    child.write_bytes(model.SerializeToString())


def stamped(text: str):
    def change(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == PIPELINE_KEY:
                entry.value = text

    return change


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no-such-pass", "there is no pass"),
        ("fp16w{", "closed"),
        ("fp16w{cmd=__import__('os')}", "cmd"),
        ("../../evil", "there is no pass"),
        ("\x1b[31mfp16w", "there is no pass"),
        (",".join(["fp16w"] * 101), "101 passes are recorded, more than 100"),
        ("", "does not say how"),
    ],
)
def test_a_hostile_pipeline_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    parent = made(fixtures.built("speech_encoder"), tmp_path / "a", "fp16w{min_bytes=4KiB}")
    child = made(fixtures.built("speech_encoder"), tmp_path / "b", "fp16w")
    edited(child, stamped(text))
    with pytest.raises((SpecError, Refused), match=reason) as caught:
        verify(fixtures.built("speech_encoder") if text else parent, child)
    assert str(caught.value).startswith(f"{child}: ")


def test_only_built_in_passes_are_run_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxforge import registry

    parent = fixtures.built("speech_encoder")
    child = made(parent, tmp_path / "a", "fp16w")
    edited(child, stamped("third-party"))
    known = dict(registry.entries())
    fake = registry.Entry("third-party", "evil:Pass", point=object())  # type: ignore[arg-type]
    monkeypatch.setattr(registry, "entries", lambda: known | {"third-party": fake})
    with pytest.raises(SpecError, match="'third-party' is of None: give --passes"):
        verify(parent, child)


def test_a_child_that_says_nothing_needs_a_pipeline(tmp_path: Path) -> None:
    parent = fixtures.built("speech_encoder")
    child = made(parent, tmp_path / "a", "fp16w")
    edited(child, lambda model: model.ClearField("metadata_props"))
    assert not verify(parent, child).derived
    assert verify(parent, child, "fp16w").derived


# Edits.


def outcome(parent: Path, child: Path) -> Verification | None:
    try:
        return verify(parent, child)
    except OnnxforgeError:
        return None


@pytest.mark.parametrize("passes", ["fp16w", "fp16w,shard{max_bytes=16KiB align=256}"])
def test_every_flipped_bit_is_caught(tmp_path: Path, passes: str) -> None:
    parent = fixtures.built("speech_encoder")
    child = made(parent, tmp_path / "a", passes)
    whole = outcome(parent, child)
    assert whole is not None
    assert whole.derived
    rng = random.Random(0)
    files = sorted(child.parent.iterdir())
    total = sum(path.stat().st_size for path in files)
    for _ in range(60):
        at = rng.randrange(total)
        for path in files:
            if at < path.stat().st_size:
                break
            at -= path.stat().st_size
        content = bytearray(path.read_bytes())
        bit = 1 << rng.randrange(8)
        content[at] ^= bit
        path.write_bytes(content)
        found = outcome(parent, child)
        assert found is None or found != whole, (path.name, at, bit)
        content[at] ^= bit
        path.write_bytes(content)
    assert outcome(parent, child) == whole


def test_every_changed_field_is_caught(tmp_path: Path) -> None:
    parent = fixtures.built("hiding_places")
    child = made(parent, tmp_path / "a", "fp16w{min_bytes=64}")
    original = child.read_bytes()
    rng = random.Random(1)
    for _ in range(40):
        model = onnx.ModelProto.FromString(original)
        where = changed_somewhere(model, rng)
        child.write_bytes(model.SerializeToString())
        found = outcome(parent, child)
        assert found is None or not found.derived, where


def changed_somewhere(model: onnx.ModelProto, rng: random.Random) -> str:
    """Change one field of one message, any of them but the stamps."""
    places = []

    def visit(message, path: str) -> None:
        for field, value in message.ListFields():
            repeated = not hasattr(value, "DESCRIPTOR") and hasattr(value, "append")
            for i, item in enumerate(value if repeated else [value]):
                here = f"{path}.{field.name}[{i}]"
                if hasattr(item, "ListFields"):
                    visit(item, here)
                elif "metadata_props" not in here and field.name != "raw_data":
                    places.append((message, field, i if repeated else None, here))

    visit(model, "model")
    message, field, index, where = rng.choice(places)
    old = getattr(message, field.name)
    old = old if index is None else old[index]
    new = (
        old + 1
        if isinstance(old, int | float)
        else old + (b"x" if isinstance(old, bytes) else "x")
    )
    if index is None:
        setattr(message, field.name, new)
    else:
        getattr(message, field.name)[index] = new
    return where


def test_the_weight_and_the_byte_are_named(tmp_path: Path) -> None:
    parent = fixtures.built("speech_encoder")
    child = made(parent, tmp_path / "a", "fp16w")
    model = onnx.load(child)
    weight = next(
        t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16
    )
    values = numpy_helper.to_array(weight).copy()
    values.reshape(-1).view(np.uint16)[7] ^= 1
    weight.raw_data = values.tobytes()
    onnx.save(model, child)
    (difference,) = verify(parent, child).differences
    assert difference == f"{weight.name}: differs from byte 14 of {values.nbytes} on"


def test_weights_of_nodes_of_one_name_are_all_compared(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (int64[1] n) => (float[m] y) {
      a = ConstantOfShape<value = float[1] {1}>(n)
      b = ConstantOfShape<value = float[1] {2}>(n)
      y = Add(a, b) }"""
    (tmp_path / "a").mkdir()
    parent, child = tmp_path / "a" / "m.onnx", tmp_path / "m.onnx"
    model = onnx.parser.parse_model(text)
    for node in model.graph.node[:2]:
        node.name = "same"
    parent.write_bytes(model.SerializeToString())
    for place in (0, 1):
        changed = onnx.ModelProto.FromString(parent.read_bytes())
        tensor = changed.graph.node[place].attribute[0].t
        tensor.CopyFrom(numpy_helper.from_array(np.array([9], np.float32), tensor.name))
        child.write_bytes(changed.SerializeToString())
        assert not verify(parent, child).derived, place
