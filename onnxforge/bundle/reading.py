"""Reading a recipe; what is wrong with it is told at file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from onnxforge.bundle.recipe import (
    CALIBRATION,
    MANIFEST,
    METADATA,
    PARITY,
    Calibration,
    Extra,
    Graph,
    Parity,
    Recipe,
    Targets,
    Tier,
    Variant,
    Weights,
)
from onnxforge.bundle.toml import Table, read
from onnxforge.compare.gates import Gate, Metric
from onnxforge.compare.samples import Cache, Data
from onnxforge.core import Pass
from onnxforge.options import did_you_mean
from onnxforge.registry import parse
from onnxforge.runtime.ceilings import ceiling
from onnxforge.runtime.session import Setup
from onnxforge.saving import SHARED

__all__ = ["read_recipe"]

_IN_PYPROJECT = ("tool", "onnxforge", "bundle")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BRACES = re.compile(r"\{(.*?)\}|[{}]")
_ROWS = 256
_ANYTHING = Targets()


def read_recipe(path: Path) -> Recipe:
    """Read ``onnxforge.toml``, or the table ``[tool.onnxforge.bundle]`` of a pyproject.toml.

    Args:
        path: The file.

    Raises:
        SpecError: Something in it is wrong; the message begins with file and line.
    """
    table = read(path, *(_IN_PYPROJECT if path.name == "pyproject.toml" else ()))
    name = _named(table, table.text("name"), "name")
    graphs = {key: _graph(key, each) for key, each in _named_in(table, "graphs", "source")}
    text = table.text("statistics", None)
    meant = table.table("targets")
    targets = _targets(meant)
    tiers = {
        key: _tier(key, each, table, graphs, targets)
        for key, each in _named_in(table, "tiers", "pipeline")
    }
    extras = [(each, _extras(each)) for each in table.tables("files", "source")]
    recipe = Recipe(
        path=path,
        name=name,
        output=table.file("output", "bundle"),
        work=table.file("work", ".onnxforge") / name,
        license=table.text("license", None),
        md5=table.flag("md5", False),
        golden=_place(table, "golden", table.text("golden", "golden")),
        statistics=None if text is None else _place(table, "statistics", text),
        setup=_setup(table.table("run")),
        targets=targets,
        browser=_browser(meant, tiers),
        graphs=graphs,
        tiers=tiers,
        extras=tuple(extra for _, some in extras for extra in some),
    )
    table.table("lint")  # what `onnxforge lint` reads from the same file
    table.close()
    _refuse_collisions(recipe, table, extras)
    return recipe


def _named_in(table: Table, kind: str, what: str) -> Iterator[tuple[str, Table]]:
    """Graphs or tiers, of which there is to be one at least."""
    inside = table.table(kind)
    if not inside.content:
        table.fail(f"lacks {kind}: [{kind}.NAME] with a {what} for each")
    for key, each in inside.entries():
        _named(each, key)
        yield key, each


def _named(table: Table, name: str, key: str | None = None) -> str:
    if not _NAME.fullmatch(name):
        table.fail(f"{name!r} is no name: letters, digits and ._- make one", key)
    return name


def _graph(name: str, table: Table) -> Graph:
    source = table.file("source")
    if source is None:
        table.fail("lacks the key 'source'")
    parity = _parity(table.table("parity")) if "parity" in table.content else None
    golden = table.whole("golden", 0)
    if golden and parity is None:
        table.fail("golden values are made of the samples of parity, which it lacks", "golden")
    calibration = None
    if "calibration" in table.content:
        calibration = _calibration(table.table("calibration"))
    table.close()
    return Graph(name, source, calibration, parity, golden)


def _parity(table: Table) -> Parity:
    axes = table.table("argmax")
    argmax = {}
    for output in axes.content:
        axis = axes.content[output]
        if not isinstance(axis, int) or isinstance(axis, bool):
            axes.fail(f"wanted an axis, such as -1, not {axis!r}", output)
        argmax[output] = axis
    top = table.whole("top", 5)
    if not 1 <= top <= 100:
        table.fail(f"wanted 1 to 100 choices, not {top}", "top")
    return Parity(_data(table), argmax, top)


def _calibration(table: Table) -> Calibration:
    op_types = table.texts("op-types", ("MatMul", "Gemm"))
    rows = table.whole("rows", _ROWS)
    return Calibration(_data(table), op_types, rows)


def _data(table: Table) -> Data:
    sizes = table.table("sizes")
    lengths = {name: sizes.whole(name) for name in sizes.content}
    cache = table.text("cache", None)
    if cache not in (None, *get_args(Cache)):
        table.fail(f"wanted {' or '.join(get_args(Cache))}, not {cache!r}", "cache")
    fields: dict[str, Any] = {
        "paths": table.files("data"),
        "preprocessor": table.file("preprocessor"),
        "seconds": table.real("seconds", None),
        "rate": table.whole("rate", 16000),
        "count": table.whole("random", 0),
        "seed": table.whole("seed", 0),
    }
    table.close()
    if not fields["paths"] and not fields["count"]:
        table.fail("has no samples: data names files, random draws some")
    with table.about():
        return Data(**fields, sizes=lengths, cache=cache)


def _tier(
    name: str, table: Table, root: Table, graphs: Mapping[str, Graph], general: Targets
) -> Tier:
    weights = table.text("weights", "keep")
    if weights not in get_args(Weights):
        table.fail(f"wanted one of {', '.join(get_args(Weights))}, not {weights!r}", "weights")
    layout = _layout(table if "layout" in table.content else root)
    passes, gates = _passes(table), _gates(table)
    meant = table.table("targets")
    targets = _targets(meant, general)
    meant.close()
    overrides = table.table("graphs")
    for key in overrides.content:
        if key not in graphs:
            overrides.fail(f"there is no such graph{did_you_mean(key, graphs)}", key)
    variants = {}
    for graph in graphs.values():
        place = PurePosixPath(layout.replace("{tier}", name).replace("{graph}", graph.name))
        own = overrides.table(graph.name)
        mine = own if "pipeline" in own.content else table
        variant = Variant(
            place,
            _passes(own) if mine is own else passes,
            _gates(own) if "gates" in own.content else gates,
        )
        own.close()
        _refuse_impossible(graph, variant, mine)
        variants[graph.name] = variant
    table.close()
    if weights == "shared" and len({variant.path.parent for variant in variants.values()}) > 1:
        table.fail("graphs that share data go into one folder", "weights")
    return Tier(name, weights, targets, variants)


def _passes(table: Table) -> tuple[Pass, ...]:
    text = table.text("pipeline", "")
    with table.about("pipeline"):
        return parse(text) if text.strip() else ()


def _refuse_impossible(graph: Graph, variant: Variant, table: Table) -> None:
    """Refuse a pipeline that wants statistics which the graph has not, gates likewise."""
    if variant.is_calibrated and graph.calibration is None:
        table.fail(f"{graph.name!r} has no calibration for {CALIBRATION}", "pipeline")
    if variant.gates and variant.passes and graph.parity is None:
        table.fail(f"{graph.name!r} has no parity, which gates need", "gates")


def _layout(table: Table) -> str:
    layout = str(table.text("layout", "{tier}/{graph}.onnx"))
    for match in _BRACES.finditer(layout):
        if match[0] not in ("{tier}", "{graph}"):
            table.fail(f"{match[0]!r} stands for nothing: {{tier}} and {{graph}} do", "layout")
    if "{graph}" not in layout or not layout.endswith(".onnx"):
        table.fail("wanted a path with {graph} in it that ends with .onnx", "layout")
    _place(table, "layout", layout)
    return layout


def _place(table: Table, key: str, text: str) -> PurePosixPath:
    """A path in the bundle."""
    path = PurePosixPath(text)
    leaves = not path.parts or path.is_absolute() or ".." in path.parts
    if leaves or "\\" in text or not text.isprintable():
        table.fail(f"{text!r} is no place in the bundle: wanted a path such as a/b", key)
    return path


def _gates(table: Table) -> tuple[Gate, ...]:
    inside = table.table("gates")
    gates = []
    metrics: tuple[Metric, ...] = get_args(Metric)
    for name in metrics:
        if isinstance(inside.content.get(name), dict):
            outputs = inside.table(name)
            gates += [Gate(name, outputs.real(key), key) for key in outputs.content]
        elif (limit := inside.real(name, None)) is not None:
            gates.append(Gate(name, limit))
    inside.close()
    return tuple(gates)


def _setup(table: Table) -> Setup:
    providers = table.texts("providers", Setup.providers)
    threads = table.whole("threads", 1)
    timeout = table.real("timeout", None)
    table.close()
    with table.about():
        return Setup(providers, threads, timeout=timeout)


def _targets(table: Table, general: Targets = _ANYTHING) -> Targets:
    """What a table says of targets; where it says nothing, what holds in general."""
    releases = {}
    for text in table.texts("onnxruntime", general.onnxruntime):
        with table.about("onnxruntime"):
            ceiling(text)
        major, minor = text.split(".")[:2]
        releases[int(major), int(minor)] = f"{major}.{minor}"
    providers = table.texts("providers", general.providers)
    return Targets(tuple(releases[key] for key in sorted(releases)), providers)


def _browser(table: Table, tiers: Mapping[str, Tier]) -> tuple[str, ...]:
    names = table.texts("browser")
    for name in names:
        if name not in tiers:
            table.fail(f"there is no tier {name!r}{did_you_mean(name, tiers)}", "browser")
    table.close()
    return names


def _extras(table: Table) -> list[Extra]:
    """A file, or all files of a folder but for hidden ones."""
    source = table.file("source")
    if source is None:
        table.fail("lacks the key 'source'")
    path = _place(table, "path", table.text("path", source.name))
    link = table.flag("link", False)
    table.close()
    if not source.is_dir():
        return [Extra(source, path, link)]
    below = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    names = [name for name in below if not any(part.startswith(".") for part in name.parts)]
    if not names:
        table.fail(f"{source} is a folder without files", "source")
    places = [_place(table, "source", (path / name).as_posix()) for name in names]
    return [Extra(source / n, place, link) for n, place in zip(names, places, strict=True)]


def _refuse_collisions(
    recipe: Recipe, table: Table, extras: Sequence[tuple[Table, Sequence[Extra]]]
) -> None:
    """Refuse two files in one place, on file systems without upper and lower case as well."""
    itself = "the bundle itself"
    taken = {PurePosixPath(text.lower()): itself for text in (METADATA, MANIFEST, PARITY)}
    for graph in recipe.graphs.values():
        if graph.golden:
            _take(table, "golden", taken, recipe.golden / graph.name, "golden values")
        if recipe.statistics is not None:
            _take(table, "statistics", taken, recipe.statistics_of(graph), "statistics")
    inside = table.table("tiers")
    for tier in recipe.tiers.values():
        _take_tier(inside, taken, recipe, tier)
    for each, some in extras:
        for extra in some:
            _take(each, None, taken, extra.path, extra.source.name)


def _take_tier(
    table: Table, taken: dict[PurePosixPath, str], recipe: Recipe, tier: Tier
) -> None:
    """Give the files of a tier their places, none of which is that of a source of another."""
    sources = {graph.source.resolve(): graph.name for graph in recipe.graphs.values()}
    for name, variant in tier.graphs.items():
        _take(table, tier.name, taken, variant.path, f"{tier.name}/{name}")
        is_kept = not variant.passes and tier.weights == "keep"
        if is_kept and recipe.is_source(recipe.graphs[name], variant):
            continue
        if owner := sources.get((recipe.output / variant.path).resolve()):
            table.fail(f"{variant.path} would replace the source of {owner!r}", tier.name)
    if tier.weights == "shared":
        (folder,) = {variant.path.parent for variant in tier.graphs.values()}
        _take(table, tier.name, taken, folder / SHARED, f"the shared data of {tier.name}")


def _take(
    table: Table,
    key: str | None,
    taken: dict[PurePosixPath, str],
    path: PurePosixPath,
    who: str,
) -> None:
    """Give a file its place, which is no folder of another, nor that of its data."""
    name = PurePosixPath(str(path).lower())
    for other, owner in taken.items():
        is_data = str(name).startswith((f"{other}_data", f"{other}.data"))
        if name == other or is_data:
            table.fail(f"{path} is the place of {owner}", key)
        if other in name.parents or name in other.parents:
            table.fail(f"{path} is both a file and a folder, of {owner}", key)
    taken[name] = who
