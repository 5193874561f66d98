"""Plots of what a comparison found, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from onnxforge.compare.evidence import Localization, OutputEvidence
from onnxforge.errors import OnnxforgeError
from onnxforge.inspection import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["byte_plot", "layer_plot", "output_plot", "range_plot", "sample_plot"]

_WIDTH = 4.0  # inches: a little more than a phone has
_ROWS = 30
_LABEL = 22
_HALF_MAX = 65504.0
_LEAST, _MOST = 1e-99, 1e99  # float32 ends long before; matplotlib overflows near float64
_COLOURS = {
    "#000001": "currentColor",
    "#000002": "var(--line)",
    "#000003": "var(--first)",
    "#000004": "var(--second)",
    "#000005": "var(--third)",
}
"""Colours that are drawn with, and what they become: the page knows light from dark."""
_INK, _LINE, *_SERIES = _COLOURS
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxforge",
    "font.size": 9,
    "legend.fontsize": 9,
    "xtick.minor.size": 0,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "legend.frameon": False,
}


def output_plot(outputs: Sequence[OutputEvidence]) -> str:
    """Mean, 99th percentile and maximum of the error of each output."""
    wrong = [output for output in outputs if _LEAST < output.overall.max_abs < _MOST]
    shown = sorted(wrong, key=lambda output: -output.overall.max_abs)[:_ROWS]

    def draw(axes: Axes) -> None:
        for field, marker, colour in zip(("mean", "p99", "max"), "osD", _SERIES, strict=True):
            values = [getattr(output.overall, f"{field}_abs") for output in shown]
            places = [place for place, value in enumerate(values) if value > _LEAST]
            kept = [values[place] for place in places]
            axes.plot(kept, places, marker, color=colour, markersize=4, label=field)
        _rows(axes, [output.name for output in shown])
        low, high = (math.log10(value) for value in axes.dataLim.intervalx)
        axes.set_xscale("log")
        axes.set_xlim(10.0 ** math.floor(low), 10.0 ** (math.floor(high) + 1))
        axes.xaxis.set_minor_formatter(lambda value, place: "")
        axes.set_xlabel("absolute error")

    return _svg(draw, len(shown), "Mean, 99th percentile and maximum error of each output")


def sample_plot(outputs: Sequence[OutputEvidence]) -> str:
    """SQNR of each sample in its worst output."""
    lowest: dict[str, float] = {}
    for found in (found for output in outputs for found in output.samples):
        if found.comparison and math.isfinite(value := found.comparison.sqnr_db):
            lowest[found.sample] = min(value, lowest.get(found.sample, math.inf))
    shown = dict(sorted(lowest.items(), key=lambda item: item[1])[:_ROWS])

    def draw(axes: Axes) -> None:
        axes.barh(range(len(shown)), list(shown.values()), height=0.6, color=_SERIES[0])
        _rows(axes, list(shown))
        axes.set_xlabel("SQNR of the worst output, dB")

    return _svg(draw, len(shown) if len(lowest) > 1 else 0, "SQNR of each sample, worst first")


def layer_plot(found: Localization) -> str:
    """SQNR along the reference: what enters at each node and what has piled up."""
    both = {
        "reached": ("o", [(layer.index, layer.reached.sqnr_db) for layer in found.layers]),
        "entered": ("D", [(layer.index, layer.entered.sqnr_db) for layer in found.layers]),
    }
    points = {
        name: (marker, [point for point in series if math.isfinite(point[1])])
        for name, (marker, series) in both.items()
    }

    def draw(axes: Axes) -> None:
        for (name, (marker, series)), colour in zip(points.items(), _SERIES, strict=False):
            _points(axes, series, marker, colour, name)
        axes.set_xlabel("node of the reference")
        axes.set_ylabel("SQNR, dB")

    some = any(series for _, series in points.values())
    return _svg(
        draw, 12 if some else 0, "Error that enters at each node, and that has piled up"
    )


def range_plot(found: Localization) -> str:
    """Least and largest value of the reference at each node, against what float16 holds."""
    ranges = [(layer.index, layer.reached.range_reference) for layer in found.layers]
    some = [(i, ends) for i, ends in ranges if ends and max(map(abs, ends)) < _MOST]

    def draw(axes: Axes) -> None:
        for end, name, marker in ((1, "largest", "o"), (0, "least", "D")):
            _points(axes, [(i, ends[end]) for i, ends in some], marker, _SERIES[end], name)
        axes.axhline(_HALF_MAX, color=_SERIES[2], linestyle="--", label="float16 ends")
        axes.axhline(-_HALF_MAX, color=_SERIES[2], linestyle="--")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xlabel("node of the reference")
        axes.set_ylabel("value")

    return _svg(draw, 14 if some else 0, "Least and largest value at each node")


def byte_plot(models: tuple[Inspection, Inspection]) -> str:
    """Bytes of the weights of both models by type; the rarest types are taken together."""
    sizes: dict[str, list[int]] = {}
    for side, model in enumerate(models):
        for group in model.weights:
            sizes.setdefault(group.dtype, [0, 0])[side] += group.nbytes
    order = sorted(sizes, key=lambda name: -max(sizes[name]))
    shown = {name: sizes[name] for name in order[:2]}
    if rest := [sizes[name] for name in order[2:]]:
        shown["other types"] = [sum(side) for side in zip(*rest, strict=True)]

    def draw(axes: Axes) -> None:
        start = [0.0, 0.0]
        for (name, size), colour in zip(shown.items(), _SERIES, strict=False):
            width = [count / 1e6 for count in size]
            axes.barh([0, 1], width, left=start, height=0.6, color=colour, label=name)
            start = [left + more for left, more in zip(start, width, strict=True)]
        _rows(axes, ["reference", "candidate"])
        axes.set_xlabel("MB")

    return _svg(draw, 2 if shown else 0, "Bytes of weights by type")


def _points(
    axes: Axes, points: Iterable[tuple[int, float]], marker: str, colour: str, label: str
) -> None:
    places, values = zip(*points, strict=True) if (points := list(points)) else ((), ())
    axes.plot(places, values, marker, color=colour, markersize=2.5, label=label)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name rows, the first at the top."""
    # Only ASCII, so that no font lacks a character; the table beside it has the names in full.
    labels = [name.encode("ascii", "backslashreplace").decode() for name in names]
    short = [
        text if len(text) <= _LABEL else f"{text[:7]}...{text[10 - _LABEL :]}"
        for text in labels
    ]
    axes.set_yticks(range(len(short)), short, parse_math=False)
    axes.set_ylim(len(short) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _svg(draw: Callable[[Axes], None], rows: int, title: str) -> str:
    """A drawing as an element of a page; nothing if it has no rows."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        message = "matplotlib is missing: pip install 'onnxforge[html]'"
        raise OnnxforgeError(message) from None
    if not rows:
        return ""
    file = io.StringIO()
    nothing: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 0.8 + 0.22 * rows), layout="constrained")
        axes = figure.add_subplot()
        axes.grid()
        draw(axes)
        if axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside upper right", ncols=3)
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inlined(file.getvalue(), title)


def _inlined(text: str, title: str) -> str:
    """An SVG file as an element of a page, where other drawings have the same ids."""
    own = re.sub(r"\W+", "-", title).lower() + "-"
    text = text[text.index("<svg ") :]
    for start in (' id="', "url(#", 'href="#'):
        text = text.replace(start, start + own)
    for drawn, shown in _COLOURS.items():
        text = text.replace(drawn, shown)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
