"""Files of a bundle: links, sizes, names, and what nobody needs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.lint.finding import Problem, Rule
from onnxforge.lint.held import by_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxforge.lint.bundle import Bundle
    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model

__all__ = ["RULES"]

_PROTO = 2**31 - 1  # what protobuf holds in one message, and a browser in one buffer
_DATA = re.compile(r".+\.onnx(?:_data(?:_\d+)?|\.data(?:\.\d+)?)|.+\.data\.\d+")
_SIDECAR = re.compile(r"(?P<stem>.+?)(?:\.onnx)?(?:_data(?:_\d+)?|\.data(?:\.\d+)?)")
_LEFT = re.compile(
    r".+\.(?:tmp|temp|part|partial|crdownload|download|incomplete|bak|orig)|.+~"
)


def link(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A model or its data is a link that leads out of its folder.

    What it does:
        Follows symbolic links of models and data files, and looks for other names (hard links)
        of data files. A download cache, whose models and data are links into one folder, is in
        order.

    Why it is bad:
        onnxruntime 1.24 and newer refuse data outside of the folder of the model, onnx refuses
        links altogether, and an archive of the bundle holds a link to nowhere.

    Example:
        `int8/encoder.onnx_data -> ../../fp32/encoder.onnx_data`

    How to mend:
        Put a copy in its place.

    Fix:
        None.
    """
    for model in bundle.models:
        path = bundle.files.local(model.name)
        if path is None or model.broken is not None:
            continue
        roots = [path.parent.resolve(), path.resolve().parent]
        for name in by_file([model]):
            data = bundle.files.local(name)
            there = data is not None and bundle.files.size(name) is not None
            if data is not None and there and (reason := _astray(data, roots)):
                yield Problem(
                    f"data file {name.rpartition('/')[2]!r} {reason}", file=model.name
                )


def _astray(data: Path, roots: list[Path]) -> str | None:
    """Why a data file is not one of its folder alone, or None."""
    real = data.resolve()
    if not any(real.is_relative_to(root) for root in roots):
        return (
            f"is a link out of the folder, to {data.readlink() if data.is_symlink() else real}"
        )
    status = real.stat()
    names = 0
    for folder in {real.parent, *roots} if status.st_nlink > 1 else ():
        with os.scandir(folder) as entries:
            names += sum(entry.inode() == status.st_ino for entry in entries)
    if names < status.st_nlink and status.st_nlink > 1:
        return "has another name outside of the folder (hard link)"
    return None


def orphaned_file(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A data file belongs to no model.

    What it does:
        Looks for files that are named as data files are (`x.onnx_data`, `x.onnx.data`,
        `x.data.000`) and that no model of the bundle names.

    Why it is bad:
        It is downloaded for nothing. Often its model was renamed, or a number of shards
        became smaller and old ones stayed.

    Example:
        `encoder.onnx.data.003` of a model that has three shards now.

    How to mend:
        Remove it, or name it in the model.

    Fix:
        None.
    """
    if not bundle.whole or any(model.broken is not None for model in bundle.models):
        return
    owned = by_file(bundle.models).keys()
    for name, size in bundle.files.names.items():
        base = name.rpartition("/")[2]
        if _DATA.fullmatch(base) and name not in owned:
            yield Problem(f"{size:,} bytes that no model reads", file=name)


def too_large(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A model file is larger than protobuf can hold.

    What it does:
        Compares the size of each model file with 2^31 - 1 bytes. Data files may have any size.

    Why it is bad:
        No parser reads it, and with it no runtime.

    Example:
        An exporter that writes by itself puts 3 GB of weights into the model.

    How to mend:
        Store the weights in a data file: `onnxforge run --passes shard in.onnx out.onnx`.

    Fix:
        None.
    """
    for model in bundle.models:
        size = bundle.files.size(model.name) or 0
        if size > _PROTO:
            yield Problem(f"{size:,} bytes, more than one message can hold", file=model.name)


def too_large_for_browsers(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A file is larger than a browser loads.

    What it does:
        With `browser`, or in tiers that metadata.json names as targets of browsers, compares
        the size of each model and data file with 2^31 - 1 bytes.

    Why it is bad:
        A browser holds a file in one buffer, and those end there.

    Example:
        `encoder.onnx_data: 2,532,044,800 bytes`

    How to mend:
        Cut the data: `onnxforge run --passes 'shard{max_bytes=1.5GB target=browser}'`.

    Fix:
        None.
    """
    models = [
        model
        for model in bundle.models
        if options.browser or bundle.claims(model.tier).browser
    ]
    names = dict.fromkeys([*(model.name for model in models), *by_file(models)])
    for name in names:
        size = bundle.files.size(name) or 0
        if size > _PROTO:
            yield Problem(f"{size:,} bytes, a browser loads at most {_PROTO:,}", file=name)


def data_name(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A data file is named after another model than the one that reads it.

    What it does:
        Compares the name of each data file that looks like `stem.onnx_data` with the stems of
        the models that read it. Data that several models share may have any name.

    Why it is bad:
        Whoever fetches `encoder.onnx` fetches `encoder.onnx_data` with it, and renaming the
        model once more loses the data. A loader that guesses names finds another file.

    Example:
        `encoder_int8.onnx` reads `model.onnx_data`.

    How to mend:
        Write the model again: `onnxforge run --passes 'shard{single=true}' in.onnx out.onnx`
        names the data after it.

    Fix:
        None.
    """
    odd: dict[str, Model] = {}
    for name, owners in by_file(bundle.models).items():
        model = owners[0].model
        named = _SIDECAR.fullmatch(name.rpartition("/")[2])
        stem = model.name.rpartition("/")[2].removesuffix(".onnx")
        if named is not None and not named["stem"].startswith(stem):
            odd[name] = model
    everybody = by_file([*bundle.models, *bundle.others]) if odd else {}
    for name, model in odd.items():
        if all(each.model is model for each in everybody[name]):
            text = f"its data file is called {name.rpartition('/')[2]!r}"
            yield Problem(text, file=model.name)


def leftover(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A file is left over from a download or from a program that was stopped.

    What it does:
        Finds names that end as those of temporary files do: .tmp, .part, .bak, ~ and others.

    Why it is bad:
        It is published by accident, and may be as large as a model.

    Example:
        `encoder.onnx_data.part`

    How to mend:
        Remove it.

    Fix:
        None.
    """
    if bundle.whole:
        for name, size in bundle.files.names.items():
            if _LEFT.fullmatch(name.rpartition("/")[2]):
                yield Problem(f"{size:,} bytes of a temporary file", file=name)


RULES = (
    Rule("OF420", "link", "error", link, of="bundle"),
    Rule("OF421", "orphaned-file", "warning", orphaned_file, of="bundle"),
    Rule("OF422", "too-large", "error", too_large, of="bundle"),
    Rule("OF423", "too-large-for-browsers", "error", too_large_for_browsers, of="bundle"),
    Rule("OF424", "data-name", "warning", data_name, of="bundle"),
    Rule("OF425", "leftover", "warning", leftover, of="bundle"),
)
