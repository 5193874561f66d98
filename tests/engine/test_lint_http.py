"""lint and inspect over http: what they find, and how little they fetch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from onnxforge.errors import OnnxforgeError
from onnxforge.inspection import inspect
from onnxforge.lint import Options, lint
from onnxforge.storage.remote import Ranges
from support import faultless
from support.ranges import Served, serving


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return faultless.clean(tmp_path / "bundle")


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serving(root) as found:
        yield found


def found(url: str, **more: object) -> list[tuple[str, str]]:
    report = lint([url], Options(min_ort="1.17", **more))  # type: ignore[arg-type]
    return [(f.rule, f.path.rpartition("/")[2]) for f in report.findings]


def test_a_clean_bundle_is_clean_and_hardly_read(root: Path, served: Served) -> None:
    report = lint([served.url], Options(min_ort="1.17"))
    assert list(report.findings) == []
    assert len(report.models) == 9
    assert any(
        "OF484 hash-differs reads whole files, not over http" in n for n in report.notes
    )
    whole = sum(path.stat().st_size for path in root.rglob("*.onnx*"))
    assert served.sent < whole / 50
    assert not any(method == "GET" and "_data" in path for method, path in served.requests)


def test_faults_are_found_from_afar(root: Path, served: Served) -> None:
    with faultless.edit(root / "int8/editor.onnx") as proto:
        proto.ir_version = 10
    faultless.relist(root)
    (root / "fp32/encoder.onnx_data").unlink()
    (root / "LICENSE").write_text("shorter")
    assert found(served.url) == [
        ("size-differs", "LICENSE"),
        ("data-missing", "encoder.onnx"),
        ("ir-too-new", "editor.onnx"),
        ("listed-file-missing", "manifest.json"),
    ]


def test_without_a_manifest_metadata_tell_what_is_there(root: Path, served: Served) -> None:
    (root / "manifest.json").unlink()
    assert found(served.url) == []
    (root / "metadata.json").unlink()
    with pytest.raises(OnnxforgeError, match="give the addresses of models"):
        found(served.url)


def test_a_repository_of_the_hub_is_listed(
    root: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("manifest.json", "metadata.json"):
        (root / name).unlink()
    place = root / "org/name/resolve/main"
    place.mkdir(parents=True)
    for path in list(root.iterdir()):
        if path.name != "org":
            path.rename(place / path.name)
    tree = [
        {"type": "file", "path": p.relative_to(place).as_posix(), "size": p.stat().st_size}
        for p in place.rglob("*")
        if p.is_file()
    ]
    tree.append({"type": "directory", "path": "int8", "size": 0})
    tree.append({"type": "file", "path": "int8/.cache/x.onnx", "size": 0})
    listing = json.dumps(tree).encode()
    served.answers["/api/models/org/name/tree/main"] = 200, listing
    monkeypatch.setenv("HF_ENDPOINT", served.url.rstrip("/"))
    assert found(f"{served.url}org/name") == []
    model = place / "int8/encoder.onnx"
    model.write_bytes(b"\xff" * model.stat().st_size)
    assert found(f"{served.url}org/name/tree/main") == [("unreadable", "encoder.onnx")]


def test_a_list_of_hashes_is_fetched_once(root: Path, served: Served) -> None:
    sha = hashlib.sha256((root / "LICENSE").read_bytes()).hexdigest()
    (root / "SHA256SUMS").write_text(f"{sha}  LICENSE\n")
    faultless.relist(root)
    assert found(served.url) == []
    assert served.requests.count(("GET", "/SHA256SUMS")) == 1


def large(path: Path) -> int:
    """Write a model with 16 MB of weights inside; gives its size."""
    weights = {f"w{i}": np.zeros((1024, 1024), np.float32) for i in range(4)}
    nodes = [helper.make_node("Sum", list(weights), ["y"])]
    proto = faultless.model(nodes, [], [faultless.value("y", [1024, 1024])], weights)
    path.write_bytes(proto.SerializeToString())
    return path.stat().st_size


def test_weights_inside_of_a_model_are_jumped_over(root: Path, served: Served) -> None:
    size = large(root / "large.onnx")
    assert found(f"{served.url}large.onnx") == []
    assert size > 16 << 20
    assert served.sent < 100_000


def test_inspect_tells_the_same_from_afar(root: Path, served: Served) -> None:
    large(root / "large.onnx")
    for name in ("int8/encoder.onnx", "large.onnx"):
        near, far = inspect(root / name), inspect(served.url + name)
        assert {Path(p).name: s for p, s in far.files.items()} == {
            Path(p).name: s for p, s in near.files.items()
        }
        assert (far.weights, far.readers, far.ops) == (near.weights, near.readers, near.ops)
        assert (far.inputs, far.outputs, far.opsets) == (
            near.inputs,
            near.outputs,
            near.opsets,
        )
    assert served.sent < 200_000


def test_what_a_server_does_wrong_is_told_in_one_line(root: Path, served: Served) -> None:
    url = f"{served.url}fp32/encoder.onnx"
    assert found(f"{served.url}fp32/none.onnx") == [("unreadable", "none.onnx")]
    served.answers["/fp32/encoder.onnx"] = 500, b""
    with pytest.raises(OnnxforgeError, match="500"):
        found(url)
    served.answers.clear()
    served.ranges = False
    size = large(root / "fp32/large.onnx")
    with pytest.raises(OnnxforgeError):
        found(f"{served.url}fp32/large.onnx")
    assert served.sent < size
    with pytest.raises(OnnxforgeError, match="Cannot connect"):
        found("http://127.0.0.1:1/model.onnx")


def test_a_list_sends_nobody_elsewhere(root: Path, served: Served) -> None:
    wrong = ["//127.0.0.1:1/x.onnx", "../x.onnx", "/x.onnx", "http://127.0.0.1:1/x.onnx"]
    odd = ["\ud800.onnx", "a?b#c%.onnx", "a\nb.onnx"]
    listed = json.loads((root / "manifest.json").read_text())
    files = listed["files"]
    files |= {name: {"bytes": 3, "sha256": "0" * 64} for name in [*wrong, *odd]}
    served.answers["/manifest.json"] = 200, json.dumps(listed).encode()
    faults = ["manifest-malformed"] * len(wrong) + ["listed-file-missing"] * len(odd)
    assert [rule for rule, _ in found(served.url)] == faults
    asked = {path for _, path in served.requests}
    assert asked.isdisjoint({"/x.onnx", "//127.0.0.1:1/x.onnx"})


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": %s}' % (b"9" * 5000), b"\xff", b" " * (65 << 20)]
)
def test_a_list_that_is_none_is_told_in_one_line(
    root: Path, served: Served, content: bytes
) -> None:
    served.answers["/manifest.json"] = 200, content
    with pytest.raises(OnnxforgeError, match=r"manifest\.json: (is no JSON|more than)"):
        found(served.url)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Location": "/fp32/encoder.onnx"}, "leads back to itself"),
        ({"Location": "file:///etc/passwd"}, "no address of http"),
        ({"Location": "http://["}, "no address of http"),
        ({"Content-Length": "-5"}, "400"),
    ],
)
def test_a_server_that_lies_is_told_of(
    root: Path, served: Served, headers: dict[str, str], said: str
) -> None:
    served.answers["/fp32/encoder.onnx"] = 302, b""
    served.headers = headers
    with pytest.raises(OnnxforgeError, match=said) as caught:
        found(f"{served.url}fp32/encoder.onnx")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_silent_is_told_of(
    root: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxforge.storage.remote._SILENCE", 0.2)
    served.pause = 2.0
    with pytest.raises(OnnxforgeError, match=r"encoder\.onnx: .*Timeout"):
        found(f"{served.url}fp32/encoder.onnx")


def test_a_damaged_model_from_afar(root: Path, served: Served) -> None:
    (root / "cut.onnx").write_bytes(
        onnx.load(root / "fp32/encoder.onnx").SerializeToString()[:-9]
    )
    assert found(f"{served.url}cut.onnx") == [("unreadable", "cut.onnx")]
    with pytest.raises(OnnxforgeError, match="not an ONNX model"):
        inspect(f"{served.url}cut.onnx")


@given(
    st.binary(max_size=200_000),
    st.lists(st.tuples(st.integers(0, 210_000), st.integers(0, 40_000))),
)
def test_ranges_are_slices(content: bytes, cuts: list[tuple[int, int]]) -> None:
    fetched: set[int] = set()

    def fetch(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(content)
        new = set(range(start, stop))
        assert not new & fetched, "no byte is fetched twice"
        fetched.update(new)
        return content[start:stop]

    ranges = Ranges(fetch, len(content))
    for start, length in cuts:
        assert ranges[start : start + length] == content[start : start + length]
