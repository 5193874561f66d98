"""Statistics on disk: equal ones are equal bytes, damaged ones are refused in one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxforge.errors import DataError, OnnxforgeError
from onnxforge.numerics.calibration import ActivationStats, Statistics
from onnxforge.stats_file import read_statistics, write_statistics


def statistics(*keys: int) -> Statistics:
    activations = {
        "b": ActivationStats.empty(-1, 3, 4),
        "a\n": ActivationStats.empty(1, 2, 4),
        "none": ActivationStats.empty(-2, 5, 4),
    }
    for key in keys:
        rng = np.random.default_rng(key)
        for name, shape in (("b", (2, 3)), ("a\n", (1, 2, 3))):
            values = rng.standard_normal(shape).astype(np.float32)
            activations[name].add(values, key)
    return Statistics("digest", activations, set(keys))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_statistics(statistics(1, 2**64 - 1), tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_what_is_read_is_what_was_written(path: Path) -> None:
    found, expected = read_statistics(path), statistics(1, 2**64 - 1)
    assert (found.digest, found.samples) == (expected.digest, expected.samples)
    assert found.activations.keys() == expected.activations.keys()
    for name, stats in found.activations.items():
        for word in ("channel_axis", "count", "limit"):
            assert getattr(stats, word) == getattr(expected.activations[name], word)
        for method in ("minmax", "percentile", "mse", "entropy"):
            assert stats.range(method) == expected.activations[name].range(method)  # type: ignore[arg-type]
    more = statistics(5)
    found.merge(more)
    expected.merge(more)
    write_statistics(found, path)
    content = path.read_bytes()
    write_statistics(expected, path)
    assert path.read_bytes() == content


def test_equal_statistics_are_equal_bytes(path: Path) -> None:
    content = path.read_bytes()
    other = statistics(2**64 - 1, 1)
    other.activations = dict(reversed(other.activations.items()))
    write_statistics(other, path)
    assert path.read_bytes() == content
    write_statistics(read_statistics(path), path)
    assert path.read_bytes() == content


def test_any_tool_that_knows_safetensors_reads_them(path: Path) -> None:
    arrays = safetensors.numpy.load_file(path)
    assert (
        arrays["00001.lows"].tolist()
        == statistics(1, 2**64 - 1).activations["b"].lows.tolist()
    )


@pytest.mark.parametrize("act", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_an_interruption_leaves_the_old_file(
    act: Any, step: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = path.read_bytes()

    def fail(self: Path, argument: object) -> None:
        if step == "write_bytes":
            with self.open("wb") as file:
                file.write(b"half")
        raise act

    monkeypatch.setattr(Path, step, fail)
    if act is KeyboardInterrupt:
        raised = pytest.raises(KeyboardInterrupt)
    else:
        raised = pytest.raises(OnnxforgeError, match=f"^{path}: No space left on device$")
    with raised:
        write_statistics(statistics(3), path)
    monkeypatch.undo()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=f"^{path}: ") as caught:
            read_statistics(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match=r"empty: damaged statistics"):
        read_statistics(tmp_path / "empty")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_in_one_line(path: Path, data: Any) -> None:
    write_statistics(statistics(1, 2), path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        end = data.draw(st.sampled_from([12, header, len(content)]))
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
    path.write_bytes(content)
    held(path)


def held(path: Path) -> None:
    """Statistics are refused in one line, or can be used."""
    try:
        found = read_statistics(path)
    except DataError as error:
        message = str(error)
    else:
        used(found, path)
        message = f"{path}: "
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def used(found: Statistics, path: Path) -> None:
    for stats in found.activations.values():
        assert stats.range("minmax")[0] <= 0
        stats.range("percentile")
    with contextlib.suppress(DataError):
        found.merge(statistics(8))
    write_statistics(found, path)


JSON = [None, True, -1, 2**70, 1e999, float("nan"), "x", [], [[]], {}, {"name": "b"}]


@pytest.mark.parametrize("value", JSON, ids=repr)
def test_what_the_header_tells_is_checked(path: Path, value: Any) -> None:
    with safetensors.safe_open(path, "np") as file:
        about = json.loads(file.metadata()["onnxforge"])
    arrays = safetensors.numpy.load_file(path)

    def told(changed: Any) -> None:
        safetensors.numpy.save_file(arrays, path, {"onnxforge": json.dumps(changed)})
        held(path)

    told(value)
    for word in about:
        told(about | {word: value})
        told({key: about[key] for key in about if key != word})
    first, *rest = about["activations"]
    for word in first:
        told(about | {"activations": [first | {word: value}, *rest]})
        told(about | {"activations": [{k: first[k] for k in first if k != word}, *rest]})
        if word in ("count", "exponent", "limit"):
            told(about | {"activations": [first | {word: value}, *rest]})
            with pytest.raises(DataError, match="damaged statistics"):
                read_statistics(path)


def test_a_header_may_be_no_json_or_too_deep(path: Path) -> None:
    for text in ("{", "[" * 100_000, "null"):
        safetensors.numpy.save_file({}, path, {"onnxforge": text})
        with pytest.raises(DataError, match=r"damaged|holds no statistics"):
            read_statistics(path)


@pytest.mark.parametrize("word", ["lows", "highs", "counts", "keys", "rows"])
def test_arrays_are_checked(path: Path, word: str) -> None:
    with safetensors.safe_open(path, "np") as file:
        about = file.metadata()
    arrays = safetensors.numpy.load_file(path)
    array = arrays[f"00001.{word}"]
    wrong = [array[:-1], array[None], array.astype(np.float64)]
    if word in ("counts", "keys"):
        wrong.append(array[::-1] + array.dtype.type(1))
    else:
        wrong.append(np.full_like(array, np.nan))
    if word in ("low", "high"):
        wrong += [array * 1000, -array * 1000]
    for other in wrong:
        changed = {**arrays, f"00001.{word}": np.ascontiguousarray(other)}
        safetensors.numpy.save_file(changed, path, about)
        with pytest.raises(DataError, match="damaged statistics"):
            read_statistics(path)
