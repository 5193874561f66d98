"""Weights in data files and in the model: there, whole, and where a runtime looks for them."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnxforge.lint.finding import Problem, Rule
from onnxforge.lint.held import Held, by_file, holes, is_padding
from onnxforge.lint.values import fault
from onnxforge.lint.view import BITS
from onnxforge.needs import needs_constant

if TYPE_CHECKING:
    from onnxforge.lint.bundle import Bundle
    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Tensor

__all__ = ["RULES"]

_KEYS = {"location", "offset", "length", "checksum"}
# Operators whose output shape depends on the value: runtimes infer it before they read files.
_SHAPES = frozenset(
    {
        "CenterCropPad", "ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Reshape",
        "Resize", "Slice", "Split", "SplitToSequence", "Squeeze", "Tile", "TopK", "Unsqueeze",
    }
)  # fmt: skip


def unreadable(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """The file is no ONNX model, or it is damaged.

    What it does:
        Reads the file without its weights. A pointer of Git LFS is recognised.

    Why it is bad:
        Nothing loads it. A download that broke off looks like this, and so does a checkout
        without Git LFS.

    Example:
        `is a pointer of Git LFS, not the model: run git lfs pull`

    How to mend:
        Fetch the file again.

    Fix:
        None.
    """
    for model in bundle.models:
        if model.broken is not None:
            yield Problem(model.broken, file=model.name)


def data_missing(model: Model, options: Options) -> Iterator[Problem]:
    """A data file that weights lie in is not there.

    What it does:
        Looks for every data file that the model names. Files are not opened.

    Why it is bad:
        The model does not load: its weights are gone.

    Example:
        `encoder.onnx` was copied or renamed without `encoder.onnx_data`.

    How to mend:
        Put the file beside the model, under the name that the model says.

    Fix:
        None.
    """
    for name, group in by_file([model]).items():
        if model.files.size(name) is None:
            more = f" and {len(group) - 1} more tensors" if len(group) > 1 else ""
            text = f"its bytes{more} lie in {group[0].location!r}, which is not there"
            yield Problem(text, group[0].tensor.where)


def location_leaves(model: Model, options: Options) -> Iterator[Problem]:
    """A location names no file in the folder of the model.

    What it does:
        Refuses locations that are empty, absolute, lead upwards, hold a NUL, or name an
        address in memory.

    Why it is bad:
        onnxruntime 1.24 and newer refuse it; older ones read whatever file is there, which
        makes a model from elsewhere a way to read the files of a machine. The bundle cannot
        be moved.

    Example:
        `location '../weights/encoder.bin'`

    How to mend:
        Write the model again with its data beside it: `onnxforge run --passes shard`.

    Fix:
        None.
    """
    found: dict[str, list[Held]] = defaultdict(list)
    for each in model.held:
        if each.file is None:
            found[each.location].append(each)
    for location, group in found.items():
        more = f", nor do {len(group) - 1} more tensors" if len(group) > 1 else ""
        text = f"location {location!r} does not name a file in the folder of the model{more}"
        yield Problem(text, group[0].tensor.where)


def bad_range(model: Model, options: Options) -> Iterator[Problem]:
    """A tensor reaches behind the end of its data file, or its place is no number.

    What it does:
        Adds offset and size of every tensor and compares with the size of the file.

    Why it is bad:
        No runtime loads the model; some crash. A data file that was cut looks like this, and
        so does one that belongs to another version of the model.

    Example:
        `bytes 4096 to 8192 are not in 'encoder.onnx_data', which has 6000`

    How to mend:
        Fetch or write the data file again.

    Fix:
        None.
    """
    for each in model.held:
        size = None if each.file is None else model.files.size(each.file)
        for text in each.faults:
            yield Problem(text, each.tensor.where)
        if size is not None and each.offset is not None and each.stop > size:
            text = f"bytes {each.offset} to {each.stop} are not in {each.location!r}"
            yield Problem(f"{text}, which has {size}", each.tensor.where)


def wrong_length(model: Model, options: Options) -> Iterator[Problem]:
    """A tensor has more or fewer bytes than its type and shape need.

    What it does:
        Compares the length that is written, or that of the values in the model, with what the
        shape needs. A length of 0 in a data file means all there is. Values that stand in the
        field of another type, or in the model and in a data file, count as wrong as well.

    Why it is bad:
        Runtimes refuse the tensor; tools that believe the length copy half of it.

    Example:
        A tool narrows a weight to float16 and forgets the length.

    How to mend:
        Export again; nobody but the exporter knows which of the two is true.

    Fix:
        None.
    """
    for tensor in model.tensors:
        if (reason := fault(tensor)) is not None:
            yield Problem(reason, tensor.where)
    for each in model.held:
        if each.length not in (None, 0, each.tensor.nbytes):
            text = f"length {each.length}, but its shape needs {each.tensor.nbytes} bytes"
            yield Problem(text, each.tensor.where)


def unknown_data_key(model: Model, options: Options) -> Iterator[Problem]:
    """External data entries have a key that runtimes do not know, or one key twice.

    What it does:
        Knows location, offset, length and checksum.

    Why it is bad:
        onnxruntime refuses the whole model for an unknown key. Of a location that stands twice
        some readers take the first, some the last.

    Example:
        A tool notes `sha256` for each tensor beside its offset.

    How to mend:
        Put it into the metadata of the tensor or of the model.

    Fix:
        None.
    """
    found: dict[str, list[Held]] = defaultdict(list)
    for each in model.held:
        keys = [entry.key for entry in each.tensor.proto.external_data]
        for key in dict.fromkeys(keys):
            if key not in _KEYS:
                found[f"unknown key {key!r}"].append(each)
            elif keys.count(key) > 1:
                found[f"the key {key!r} stands {keys.count(key)} times"].append(each)
    yield from _grouped(found)


def location_form(model: Model, options: Options) -> Iterator[Problem]:
    """A location is not written in its plainest form.

    What it does:
        Finds `./x`, `a//b`, `a/../b` and backslashes.

    Why it is bad:
        onnxruntime-node looks for the very text among the files that it is handed, and other
        systems read a backslash as part of a name.

    Example:
        `location './encoder.onnx_data'`

    How to mend:
        Write the model again: `onnxforge run --passes shard`.

    Fix:
        None.
    """
    found: dict[str, list[Held]] = defaultdict(list)
    for each in model.held:
        plain = posixpath.normpath(each.location)
        if each.file is not None and (each.location != plain or "\\" in each.location):
            found[f"location {each.location!r} is not in its plainest form"].append(each)
    yield from _grouped(found)


def must_be_inline(model: Model, options: Options) -> Iterator[Problem]:
    """A tensor lies in a data file that runtimes need before they open data files.

    What it does:
        Finds shapes, axes and the like (inputs of Reshape, Slice, reductions and others) and
        tensors without elements in data files; with `browser` also tensors of bodies.

    Why it is bad:
        onnxruntime infers shapes while it reads the model and refuses it. A tensor without
        elements at the end of a data file ends the process in 1.23 to 1.30. onnxruntime-web
        finds no data of If, Loop and Scan bodies.

    Example:
        onnx's `save_model(size_threshold=0)` moves every tensor out.

    How to mend:
        Write the model again, which keeps such tensors inside.

    Fix:
        Safe: the model is written again, not a byte of a weight changes.
    """
    for each in model.held:
        tensor = each.tensor
        if not tensor.nbytes and tensor.dtype in BITS:
            yield Problem("has no elements but a data file", tensor.where, passes=_anew(each))
        elif reader := _shape_reader(tensor):
            text = f"{reader} needs its value before data files are read"
            yield Problem(text, tensor.where, passes=_anew(each))
        elif options.browser and tensor.graph.parent is not None:
            text = "is in a body, and browsers find no data files for those"
            yield Problem(text, tensor.where)


def _shape_reader(tensor: Tensor) -> str | None:
    for node, index in tensor.graph.readers.get(tensor.name, ()) if tensor.name else ():
        shapes = node.op in _SHAPES or node.op.startswith("Reduce")
        is_value = node.op == "Pad" and index == 2
        if shapes and not is_value and index in needs_constant("", node.op):
            return node.where
    return None


def _anew(each: Held) -> str | None:
    """The pipeline that writes a model again under the same names, if that is possible."""
    return "" if each.file == f"{each.model.name}_data" else None


def orphaned_bytes(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A data file holds bytes that belong to no weight.

    What it does:
        Maps what all models of the bundle own of each data file. Short runs of zeros that
        align what follows are nobody's and in order.

    Why it is bad:
        Everybody downloads them. onnx before 1.19 appended to a data file that was there
        already, which doubled it with each run of an exporter.

    Example:
        `525,336,576 of 1,050,673,152 bytes belong to no weight`

    How to mend:
        Write the model again: `onnxforge run --passes 'shard{single=true}' in.onnx out.onnx`;
        `onnxforge inspect --layout in.onnx` shows what is where.

    Fix:
        Safe if one model owns the file and it is named after it: the model is written again.
    """
    own = by_file(bundle.models)
    models = [*bundle.models, *bundle.others] if own else []  # others are read if need be
    if not bundle.files.complete or any(model.broken is not None for model in models):
        return  # what other models own nobody knows
    everybody = by_file(models)
    for name, mine in own.items():
        size, owners = bundle.files.size(name), everybody[name]
        if size is None:
            continue
        gaps = [
            (start, stop)
            for start, stop in holes(owners, size)
            if not is_padding(start, stop, size, bundle.files, name)
        ]
        if orphaned := sum(stop - start for start, stop in gaps):
            alone = len({each.model.name for each in owners}) == 1
            text = f"{orphaned:,} of {size:,} bytes of {name.rpartition('/')[2]!r}"
            yield Problem(
                f"{text} belong to no weight, from byte {gaps[0][0]:,} on",
                file=mine[0].model.name,
                passes=_anew(mine[0]) if alone else None,
            )


def overlapping_data(model: Model, options: Options) -> Iterator[Problem]:
    """Two tensors share some bytes of a data file, but not all.

    What it does:
        Sorts the ranges of each data file. The very same range is one tensor with two names.

    Why it is bad:
        It is hardly ever meant. A tool that changes one of them changes the other.

    Example:
        Offsets were computed for float32, and a tensor is float64.

    How to mend:
        Export again.

    Fix:
        None.
    """
    for owners in by_file([model]).values():
        placed = [each for each in owners if each.offset is not None and each.tensor.nbytes]
        last: Held | None = None
        for each in sorted(placed, key=lambda each: each.range):
            if last and each.range != last.range and each.range[0] < last.stop:
                yield Problem(f"shares bytes with {last.tensor.where}", each.tensor.where)
            last = each if last is None or each.stop > last.stop else last


def _grouped(found: dict[str, list[Held]]) -> Iterator[Problem]:
    for text, group in found.items():
        more = f", and so for {len(group) - 1} more tensors" if len(group) > 1 else ""
        yield Problem(text + more, group[0].tensor.where)


RULES = (
    Rule("OF410", "unreadable", "error", unreadable, of="bundle"),
    Rule("OF411", "data-missing", "error", data_missing),
    Rule("OF412", "location-leaves", "error", location_leaves),
    Rule("OF413", "bad-range", "error", bad_range),
    Rule("OF414", "wrong-length", "error", wrong_length),
    Rule("OF415", "unknown-data-key", "error", unknown_data_key),
    Rule("OF416", "location-form", "warning", location_form),
    Rule("OF417", "must-be-inline", "error", must_be_inline),
    Rule("OF418", "orphaned-bytes", "warning", orphaned_bytes, of="bundle"),
    Rule("OF419", "overlapping-data", "warning", overlapping_data),
)
