"""Models that must be refused in one line, and odd ones that must work."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from support.forked import Done

Build = Callable[[Path], Path]
"""Makes a model in an empty folder, whose parent is empty too, and returns its path."""

SIDE = 16
BYTES = SIDE * SIDE * 4  # what the weight of most models needs
CONTENT = (np.arange(4 * SIDE * SIDE) / 1024).astype("<f4").tobytes()
PLACES = ("initializer", "Constant", "body", "body Constant", "function Constant")
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


@dataclass(frozen=True)
class Refused:
    """A model that must be refused.

    Attributes:
        build: Makes it.
        reason: What the line must match after the name of the file.
        unprivileged: Whether root would be allowed what this is about.
    """

    build: Build
    reason: str
    unprivileged: bool = False


@dataclass(frozen=True)
class Works:
    """An odd model that must work.

    Attributes:
        build: Makes it.
        megabytes: How much memory it may take.
        halves: Whether large weights become float16.
        says: What the command line must say of it.
    """

    build: Build
    megabytes: int = 200
    halves: bool = True
    says: str = ""


# What models are made of.


def info(name: str, kind: int = TensorProto.FLOAT, shape: tuple[int, ...] = (SIDE, SIDE)):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, weights=(), functions=(), inputs=("x",), outputs=("y",)) -> ModelProto:
    ports = [info(name) for name in inputs] + [info("flag", TensorProto.BOOL, ())]
    graph = helper.make_graph(nodes, "g", ports, [info(n) for n in outputs], list(weights))
    return helper.make_model(
        graph, functions=list(functions), opset_imports=OPSETS, ir_version=9
    )


def chosen(name: str, then: list[NodeProto], weights=(), output: str = "y") -> NodeProto:
    """An If whose one branch runs ``then``, which makes ``t``."""
    other = [helper.make_node("Identity", ["x"], ["e"], "other")]
    return helper.make_node(
        "If",
        ["flag"],
        [output],
        name,
        then_branch=helper.make_graph(then, "then", [], [info("t")], list(weights)),
        else_branch=helper.make_graph(other, "else", [], [info("e")]),
    )


def placed(weight: TensorProto, place: str = "initializer") -> ModelProto:
    """A model that adds the weight ``w``, which lies in a place."""

    def add(output: str) -> NodeProto:
        return helper.make_node("Add", ["x", "w"], [output], "add")

    if place == "initializer":
        return model([add("y")], [weight])
    if place == "body":
        return model([chosen("if", [add("t")], [weight])])
    weight.ClearField("name")  # as exporters write it
    constant = helper.make_node("Constant", [], ["w"], "c", value=weight)
    if place == "Constant":
        return model([constant, add("y")])
    if place == "body Constant":
        return model([chosen("if", [constant, add("t")])])
    function = helper.make_function("local", "f", ["x"], ["y"], [constant, add("y")], OPSETS)
    return model([helper.make_node("f", ["x"], ["y"], "call", domain="local")], [], [function])


def name_in(place: str) -> str:
    """How the weight is called there."""
    return "c.value" if "Constant" in place else "w"


def outside(*entries: tuple[str, str], dims=(SIDE, SIDE), data_type=1) -> TensorProto:
    weight = TensorProto(name="w", data_type=data_type, dims=dims, data_location=1)
    for key, value in entries:
        weight.external_data.add(key=key, value=value)
    return weight


def written(folder: Path, content: ModelProto | bytes, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def whole(make: Callable[..., ModelProto | bytes], *arguments, **options) -> Build:
    """What is made, as a file."""
    return lambda folder: written(folder, make(*arguments, **options))


def with_data(
    weight: TensorProto, place: str = "initializer", prepare: Callable[[Path], object] = str
) -> Build:
    """A model with data beside it, ``prepare``d further."""

    def build(folder: Path) -> Path:
        for inner in (folder / "sub", folder.parent / "outside"):
            inner.mkdir()
        for path in (
            *(folder / "data.bin", folder / "sub" / "data.bin"),
            *(folder.parent / "secret.bin", folder.parent / "outside" / "secret.bin"),
        ):
            path.write_bytes(CONTENT)
        prepare(folder)
        return written(folder, placed(weight, place))

    return build


def located(location: str, prepare: Callable[[Path], object] = str) -> Build:
    return with_data(outside(("location", location)), prepare=prepare)


def linked(**links: str) -> Callable[[Path], object]:
    """Symbolic links in the folder of a model."""

    def prepare(folder: Path) -> None:
        for name, target in links.items():
            (folder / name).symlink_to(target)

    return prepare


# What must be refused: external data.

LOCATIONS = {
    "leaves the folder": [
        *("..", "../secret.bin", "./../secret.bin", "sub/../../secret.bin"),
        *("absent/../../secret.bin", "../../../../../../etc/passwd"),
    ],
    "is absolute": ["/etc/passwd", "/", "//data.bin", "\\data.bin"],
    "is not a regular file": [".", "sub", "sub/", "sub/.."],
    "is not a file name": [
        *("", "\0", "data.bin\0", "data.bin\0/../../secret.bin"),
        *("*/_ORT_MEM_ADDR_/*", "*/anything"),
    ],
    "No such file": [
        *("absent.bin", "absent/data.bin", "C:\\secret.bin", "new\nline"),
        *("file:///etc/passwd", "https://example.com/data.bin"),
    ],
    "Not a directory": ["data.bin/more"],
    "File name too long": ["x" * 300],
}


def _hard(folder: Path) -> None:
    (folder / "hard").hardlink_to(folder.parent / "secret.bin")


def _hard_behind_link(folder: Path) -> None:
    _hard(folder)
    (folder / "link").symlink_to("hard")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


LINKS = {
    "symlink": ("link", linked(link="../secret.bin"), "leads out"),
    "symlinked folder": ("link/secret.bin", linked(link="../outside"), "leads out"),
    "symlinked folder and back": ("link/../secret.bin", linked(link="../outside"), "leads"),
    "chain": ("a", linked(a="b", b="c", c="../secret.bin"), "leads out"),
    "loop": ("a", linked(a="a"), "loop|Too many levels"),
    "loop of two": ("a", linked(a="b", b="a"), "loop|Too many levels"),
    "symlink to nothing": ("a", linked(a="absent"), "No such file"),
    "symlink to a folder": ("a", linked(a="sub"), "is not a regular file"),
    "symlink to a device": ("a", linked(a="/dev/zero"), "leads out"),
    "symlink to memory": ("a", linked(a="/proc/self/mem"), "leads out|No such file"),
    "hard link": ("hard", _hard, "has another name outside"),
    "hard link behind a symlink": ("link", _hard_behind_link, "has another name outside"),
    "pipe": ("pipe", _pipe, "is not a regular file"),
}
NUMBERS = {
    "is not a byte count": [
        *("", "-1", "-0", "+1", str(-(2**63)), "1.0", "1e3", "0x10", "ten", "nan"),
        *(" 12", "12 ", "1\n", "1_000", "1,000", str(2**64), str(10**30), "9" * 5000),
        *("\N{ARABIC-INDIC DIGIT THREE}", "\N{SUPERSCRIPT TWO}"),
    ],
    "(not in 'data.bin'|shape needs)": [str(2**63), "9" * 19, "4097"],
}
TWICE = {
    "location": [("location", "data.bin"), ("location", "data.bin")],
    "second location": [("location", "data.bin"), ("location", "../secret.bin")],
    "offset": [("location", "data.bin"), ("offset", "0"), ("offset", "4")],
    "length": [("location", "data.bin"), ("length", "1024"), ("length", "1024")],
}
# The shapes need 2 ** 66, 0 (by wrapping), 2 ** 65, 2 ** 42 and 2 ** 32 bytes.
HUGE = [(2**32, 2**32), (2**62, 2, 2), (2**63 - 1,), (2**40,), (2**30,)]
NEGATIVE = [(-256,), (-16, -16), (256, -1), (-(2**63),)]


def _truncated(size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / "data.bin", size)


def _removed(folder: Path) -> None:
    (folder / "data.bin").unlink()


def external_rows() -> Iterator[tuple[str, Refused]]:
    for reason, locations in LOCATIONS.items():
        for location in locations:
            expected = f"tensor 'w': data location .*{reason}"
            yield f"location {location[:40]!a}", Refused(located(location), expected)
    for name, (location, prepare, reason) in LINKS.items():
        expected = f"tensor 'w': data location '{location}'.*({reason})"
        yield name, Refused(located(location, prepare), expected)
    for reason, texts in NUMBERS.items():
        for key, text in itertools.product(("offset", "length"), texts):
            weight = outside(("location", "data.bin"), (key, text))
            yield f"{key} {text[:40]!a}", Refused(with_data(weight), f"tensor 'w': .*{reason}")
    for length in (1, BYTES - 1, BYTES + 1, len(CONTENT)):
        weight = outside(("location", "data.bin"), ("length", str(length)))
        reason = f"tensor 'w': {length} bytes in 'data.bin', but its shape needs {BYTES}"
        yield f"length {length}", Refused(with_data(weight), reason)
    for name, entries in TWICE.items():
        weight = outside(*entries)
        yield f"{name} twice", Refused(with_data(weight), "tensor 'w': .* key stands twice")
    for key in ("Location", "basepath", "offset ", ""):
        weight = outside(("location", "data.bin"), (key, "0"))
        reason = f"tensor 'w': unknown external data key '{key}'"
        yield f"key {key!r}", Refused(with_data(weight), reason)
    yield "no key", Refused(with_data(outside()), "tensor 'w': .*is not a file name")


def size_rows() -> Iterator[tuple[str, Refused]]:
    for dims in HUGE:
        weight = outside(("location", "data.bin"), dims=dims)
        yield f"dims {dims} outside", Refused(with_data(weight), "'w': .*not in 'data.bin'")
    for dims in NEGATIVE:
        weight = outside(("location", "data.bin"), dims=dims)
        yield f"dims {dims} outside", Refused(with_data(weight), "'w': has a negative dim")
    for kind in (0, 8, 99, -1):
        weight = outside(("location", "data.bin"), data_type=kind)
        reason = "tensor 'w': (unknown data type|STRING has no size)"
        yield f"data type {kind} outside", Refused(with_data(weight), reason)


def placed_rows() -> Iterator[tuple[str, Refused]]:
    """What may be wrong in every place where a weight can be."""
    for place in PLACES:
        what = f"tensor '{name_in(place)}': "
        for name, location, reason in (
            ("traversal", "../secret.bin", "leaves the folder"),
            ("memory address", "*/_ORT_MEM_ADDR_/*", "is not a file name"),
        ):
            weight = outside(("location", location), ("offset", "4096"))
            yield f"{name}, {place}", Refused(with_data(weight, place), f"{what}.*{reason}")
        weight = outside(("location", "data.bin"))
        for name, prepare, reason in (
            ("missing", _removed, "No such file"),
            ("truncated", _truncated(BYTES - 1), "not in 'data.bin', which has 1023"),
            ("empty", _truncated(0), "not in 'data.bin', which has 0"),
        ):
            build = with_data(weight, place, prepare)
            yield f"{name} data, {place}", Refused(build, f"{what}.*{reason}")
        for size in (4, BYTES - 4, BYTES + 4):
            weight = TensorProto(
                name="w", data_type=1, dims=[SIDE, SIDE], raw_data=bytes(size)
            )
            reason = f"{what}holds {size} bytes, but its shape needs {BYTES}"
            yield f"{size} raw bytes, {place}", Refused(whole(placed, weight, place), reason)


# What must be refused: values in the model itself.


def inline_rows() -> Iterator[tuple[str, Refused]]:
    def row(reason: str, dims=(SIDE, SIDE), kind=1, **fields) -> Refused:
        weight = TensorProto(name="w", data_type=kind, dims=dims, **fields)
        return Refused(whole(placed, weight), f"tensor 'w': .*{reason}")

    many = SIDE * SIDE
    yield "no values", row("holds 0 values")
    yield "few floats", row("holds 3 values", float_data=[1.0] * 3)
    yield "fewer floats", row("holds 255 values", float_data=[1.0] * (many - 1))
    yield "many floats", row("holds 1028 bytes", float_data=[1.0] * (many + 1))
    yield "few integers", row("holds 3 values", kind=7, int64_data=[1] * 3)
    yield "floats as integers", row("of another type", int32_data=[1] * many)
    yield "integers as floats", row("of another type", kind=6, float_data=[1.0] * many)
    yield "doubles as floats", row("of another type", kind=11, float_data=[1.0] * many)
    yield "few integers as floats", row("of another type", (2,), 6, float_data=[1.0] * 2)
    yield "raw text", row("has no size", kind=8, raw_data=bytes(BYTES))
    yield "short raw text", row("of another type", kind=8, raw_data=bytes(4))
    yield "raw and floats", row("of another type", raw_data=bytes(4), float_data=[1.0] * many)
    for kind in (0, 99, -1):
        yield f"data type {kind}", row("unknown data type", kind=kind, raw_data=bytes(BYTES))
    for dims in HUGE:
        yield f"dims {dims}", row("shape needs", dims, raw_data=bytes(BYTES))
    for dims in NEGATIVE:
        yield f"dims {dims}", row("negative dimension", dims, raw_data=bytes(BYTES))
    for size in (4, BYTES):
        weight = outside(("location", "data.bin"))
        weight.raw_data = bytes(size)
        reason = "tensor 'w': has values in the model and in a data file"
        yield f"{size} raw bytes and outside", Refused(with_data(weight), reason)


# What must be refused: no model at all.


def sound() -> ModelProto:
    weight = TensorProto(name="w", data_type=1, dims=[SIDE, SIDE], raw_data=CONTENT[:BYTES])
    return placed(weight)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.onnx", sound().SerializeToString())
    return file.getvalue()


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def block(field: int, content: bytes) -> bytes:
    return varint(field * 8 + 2) + varint(len(content)) + content


def in_graph(content: bytes) -> bytes:
    """A model of these encoded fields of its graph."""
    return b"\x08\x09" + block(7, content)


def nested_graphs(levels: int, padding: int = 2000) -> bytes:
    graph = block(2, b"innermost") + block(10, b"x" * padding)
    for level in range(levels):
        body = block(5, block(6, graph) + b"\xa0\x01\x05")
        graph = block(1, block(2, b"v%d" % level) + body)
    return in_graph(graph)


def nested_types(levels: int) -> bytes:
    kind = block(1, b"\x08\x01")
    for _ in range(levels):
        kind = block(4, block(1, kind))
    return in_graph(block(11, block(1, b"x") + block(2, kind)))


def nested_groups(levels: int) -> bytes:
    return in_graph(b"\xa3\x06" * levels + b"\xa4\x06" * levels)


CONTENTS: dict[str, Callable[[], bytes]] = {
    "empty file": bytes,
    "zeros": lambda: bytes(4096),
    "random bytes": lambda: np.random.default_rng(1).bytes(5000),
    "text": lambda: b"A model, it says here.\n" * 100,
    "page": lambda: b"<!DOCTYPE html><html><body>Not Found</body></html>\n",
    "json": lambda: b'{"model": {"graph": []}}\n',
    "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "safetensors": lambda: (
        (66).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}}'.ljust(66) + bytes(64)
    ),
    "zip": zipped,
    "gzip": lambda: gzip.compress(sound().SerializeToString(), mtime=0),
    "no graph": lambda: b"\x08\x09",
    "half a model": lambda: sound().SerializeToString()[:700],
    "all but a byte": lambda: sound().SerializeToString()[:-1],
    "a length beyond the end": lambda: in_graph(
        block(5, varint(74) + varint(2**40) + bytes(2000))
    ),
    "a name that is no text": lambda: in_graph(block(1, block(3, b"\xff") + block(4, b"Neg"))),
    "a maker that is no text": lambda: sound().SerializeToString() + block(2, b"\xff"),
    "nested graphs": lambda: nested_graphs(10_000),
    "nested graphs, small ones": lambda: nested_graphs(40, padding=1),
    "nested types": lambda: nested_types(10_000),
    "nested groups": lambda: nested_groups(10_000),
    "groups that never end": lambda: in_graph(b"\xa3\x06" * 10_000),
}


def _linked_model(target: str) -> Build:
    def build(folder: Path) -> Path:
        path = folder / "model.onnx"
        path.symlink_to(target)
        return path

    return build


def _folder(folder: Path) -> Path:
    (folder / "model.onnx").mkdir()
    return folder / "model.onnx"


def _model_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.onnx")
    return folder / "model.onnx"


def _without_permission(name: str) -> Build:
    def build(folder: Path) -> Path:
        path = located("sub/data.bin")(folder)
        (folder / name).chmod(0)
        return path

    return build


def file_rows() -> Iterator[tuple[str, Refused]]:
    for name, make in CONTENTS.items():
        yield name, Refused(whole(make), "not an ONNX model|is no text")
    yield "folder", Refused(_folder, "is not a regular file")
    yield "model pipe", Refused(_model_pipe, "is not a regular file")
    for target, reason in (
        *(("/dev/zero", "not a regular file"), ("/dev/null", "not a regular file")),
        *((".", "not a regular file"), ("absent", "No such file"), ("model.onnx", "Too many")),
    ):
        yield f"model symlink to {target}", Refused(_linked_model(target), reason)
    yield "no file", Refused(lambda folder: folder / "model.onnx", "No such file")
    for name, reason in (
        *(("model.onnx", "Permission denied"), (".", "Permission denied")),
        ("sub/data.bin", "tensor 'w': .*Permission denied"),
        ("sub", "tensor 'w': .*Permission denied"),
    ):
        build = _without_permission(name)
        yield f"no permission on {name}", Refused(build, reason, unprivileged=True)


# What must be refused: what never ends.


def chain(length: int, *, closed: bool = False) -> ModelProto:
    """Many nodes, each of which reads the one before; closed, the first reads the last."""
    names = ["y" if closed else "x", *(f"v{i}" for i in range(1, length)), "y"]
    nodes = [
        helper.make_node("Neg", [names[i]], [names[i + 1]], f"n{i}") for i in range(length)
    ]
    return model(nodes)


def cycle_rows() -> Iterator[tuple[str, Refused]]:
    def node(name: str, inputs: str, output: str, **more) -> NodeProto:
        return helper.make_node(name, inputs.split(), [output], f"n_{output}", **more)

    def function(name: str, *nodes: NodeProto):
        inputs = ["x", "flag"]
        return helper.make_function("local", name, inputs, ["y"], nodes, OPSETS)

    def row(found: ModelProto, reason: str) -> Refused:
        return Refused(whole(lambda: found), reason)

    def call(name: str, source: str = "x", target: str = "y") -> NodeProto:
        return node(name, f"{source} flag", target, domain="local")

    both = [node("Add", "x b", "a"), node("Neg", "a", "b"), node("Neg", "b", "y")]
    yield "cycle of two", row(model(both), "node 'n_[ab]': needs its own result")
    one = [node("Add", "x y", "y")]
    yield "cycle of one", row(model(one), "node 'n_y': needs its own result")
    nameless = helper.make_node("Add", ["x", "y"], ["y"])
    yield "nameless cycle", row(model([nameless]), "node 'Add#0': needs its own result")
    own = [chosen("if", [node("Neg", "y", "t")])]
    yield "cycle through a body", row(model(own), "node '(if|.*n_t)': needs its own result")
    deep = [chosen("if", [chosen("inner", [node("Neg", "b", "t")], output="t")], output="a")]
    deep += [node("Neg", "a", "b"), node("Neg", "b", "y")]
    yield "cycle through two bodies", row(model(deep), "node '.*': needs its own result")
    inside = [chosen("if", [node("Neg", "b", "t"), node("Neg", "t", "b")])]
    yield "cycle in a body", row(model(inside), "node 'if/then_branch/n_[bt]': needs")
    loop = function("f", node("Add", "x b", "y"), node("Neg", "y", "b"))
    yield (
        "cycle in a function",
        row(model([call("f")], [], [loop]), "'local::f/n_[by]': needs"),
    )
    yield "ring", Refused(whole(chain, 10_000, closed=True), r"node 'n\d+': needs its own")
    f, g = function("f", call("f")), function("g", call("f"))
    yield "recursion", row(model([call("f")], [], [f]), "function 'local::f': calls itself")
    f = function("f", call("g"))
    yield (
        "mutual recursion",
        row(model([call("f")], [], [f, g]), "'local::[fg]': calls itself"),
    )
    f = function("f", chosen("if", [call("f", "x", "t")]))
    yield "recursion in a body", row(model([call("f")], [], [f]), "function 'local::f': calls")
    levels = [function("f0", node("Neg", "x", "y"))]
    for i in range(60):
        twice = call(f"f{i}", "x", "a"), call(f"f{i}", "a", "y")
        levels.append(function(f"f{i + 1}", *twice))
    yield (
        "doubling",
        row(model([call("f60")], [], levels), r"function 'local::f\d+': comes to"),
    )


_GROUPS = (external_rows, size_rows, placed_rows, inline_rows, file_rows, cycle_rows)
REFUSED: dict[str, Refused] = {name: row for rows in _GROUPS for name, row in rows()}


# What must work.


def _download_cache(folder: Path) -> Path:
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc" / "onnx"
    for made in (blobs, snapshot):
        made.mkdir(parents=True)
    (blobs / "11").write_bytes(CONTENT)
    weight = outside(("location", "model.onnx_data"), ("length", str(BYTES)))
    written(blobs, placed(weight), "22")
    (snapshot / "model.onnx").symlink_to("../../../blobs/22")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/11")
    return snapshot / "model.onnx"


def summed(folder: Path, ranges: list[tuple[str, int]], rows: int = SIDE) -> Path:
    """A model that adds a weight of some rows for each location and offset."""
    nodes, weights = [], []
    for i, (location, offset) in enumerate(ranges):
        before, after = (f"v{i}" if i else "x"), (f"v{i + 1}" if i + 1 < len(ranges) else "y")
        nodes.append(helper.make_node("Add", [before, f"w{i}"], [after], f"n{i}"))
        length = str(BYTES // SIDE * rows)
        entries = ("location", location), ("offset", str(offset)), ("length", length)
        weights.append(outside(*entries, dims=(rows, SIDE)))
        weights[-1].name = f"w{i}"
    return written(folder, model(nodes, weights))


def _summed(*ranges: tuple[str, int]) -> Build:
    def build(folder: Path) -> Path:
        for location in {location for location, _ in ranges}:
            (folder / location).parent.mkdir(exist_ok=True)
            (folder / location).write_bytes(CONTENT * 4)
        return summed(folder, list(ranges))

    return build


def _many_tensors(folder: Path) -> Path:
    names = [f"part{i:03}.bin" for i in range(500)]
    for name in names:
        (folder / name).write_bytes(CONTENT)
    return summed(folder, [(name, 64 * i) for name in names for i in range(40)], rows=1)


def _unicode(folder: Path) -> Path:
    (folder / "données 重み 100%.bin").write_bytes(CONTENT)
    weight = outside(("location", "données 重み 100%.bin"), ("length", str(BYTES)))
    weight.name = "вес 🏋"
    node = helper.make_node("Add", ["x", weight.name], ["y"], "узел\n二")
    return written(folder, model([node], [weight]), "größe 模型 50%.onnx")


def _unsorted(folder: Path) -> Path:
    found = chain(200)
    found.graph.node.reverse()
    return written(folder, found)


def _two_names(folder: Path) -> Path:
    path = with_data(outside(("location", "sub/data.bin"), ("length", str(BYTES))))(folder)
    (folder / "again.bin").hardlink_to(folder / "sub" / "data.bin")
    return path


WORKS = {
    "download cache": Works(_download_cache),
    "overlapping tensors": Works(
        _summed(("a.bin", 0), ("a.bin", 512), ("a.bin", 0)), halves=False, says="OF904 a.bin"
    ),
    "20,000 tensors in 500 files": Works(_many_tensors, megabytes=500),
    "100,000 nodes": Works(whole(chain, 100_000), megabytes=1000),
    "unicode names": Works(_unicode),
    "unaligned offsets": Works(_summed(("a.bin", 13), ("a.bin", 4097), ("b c%20.bin", 1))),
    "unsorted nodes": Works(_unsorted),
    "two names in the folder": Works(_two_names),
    "nested as deep as protobuf reads": Works(whole(nested_graphs, 30)),
}


@contextlib.contextmanager
def built(build: Build) -> Iterator[tuple[Path, Path]]:
    """A folder that everybody may use, with a model in its folder ``in``, and the model."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name).resolve()
        folder.chmod(0o777)
        (folder / "in").mkdir()
        yield folder, build(folder / "in")


def objection(done: Done, path: Path, reason: str) -> str | None:
    """Why this is no refusal as it should be, or None."""
    line, *rest = done.err.splitlines() or [""]
    start = f"onnxforge: {path}: "
    if done.code != 2:
        return f"ended with {done.code}"
    if done.out or rest:
        return "says more than a line"
    if not line.startswith(start) or not re.search(reason, line[len(start) :]):
        return "says something else"
    return "takes too much memory" if done.memory >= 200e6 else None
