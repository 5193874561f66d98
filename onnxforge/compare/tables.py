"""What a comparison found, as tables of text for every kind of report."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxforge.compare.document import Document, Foreign, names
from onnxforge.compare.evidence import Evidence, Localization, OutputEvidence
from onnxforge.inspection import Inspection
from onnxforge.numerics.decode import ClipDecode, DecodeEvidence, Loop
from onnxforge.numerics.metrics import Comparison
from onnxforge.numerics.ranking import Ranking
from onnxforge.numerics.streaming import HISTOGRAM_ERROR
from onnxforge.numerics.text import ClipText, TextErrors, TextEvidence

__all__ = ["Table", "tables"]

_Models = tuple[Inspection, Inspection]
_Row = tuple[str, ...]
_DISTANCES = "max", "mean", "p99", "p99.9", "relative"
_COVERAGE = "count", "bytes", "share"
_READ = "bytes", "types"
_RANGE = "least", "largest"
_NUMBER = re.compile(r"-?[\d,./]+(e[-+]\d+)?( %)?|-|-?inf|nan|undefined")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it shows.
        header: Names of its columns.
        rows: Its cells; those that are not of our making are `Foreign`.
        note: What to know when reading it.
    """

    title: str
    header: _Row
    rows: Sequence[_Row]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds nothing but numbers."""
        return [all(map(_is_number, column)) for column in zip(*self.rows, strict=True)]


def tables(document: Document, limit: int, *, samples: bool = False) -> list[Table]:
    """All tables that have rows.

    Args:
        document: What to show.
        limit: Most rows of what may have thousands.
        samples: Also show every sample.
    """
    every = _tables(document, samples=samples)
    return [_cut(table, limit) for table in every if table.rows]


def _tables(document: Document, *, samples: bool) -> Iterator[Table]:
    found = document.comparison
    if found:
        yield _gates(found)
    yield _errors(document)
    yield _worst(document.outputs)
    yield _choices(document)
    if samples:
        yield _samples(document.outputs)
    if found and found.localization:
        yield _layers(found.localization)
    yield _ranges(document.outputs)
    if document.text:
        yield _clips(document.text)
    if document.decode:
        yield _decoding(document.decode)
    if document.models:
        yield _weights(document.models)
        yield _readers(document.models)
        yield _operators(document.models)
    if found:
        yield _sides(found, document.models)
    if document.models:
        yield _files(document.models)


def _cut(table: Table, limit: int) -> Table:
    if len(table.rows) <= limit:
        return table
    note = f"{limit} of {len(table.rows)} rows; JSON has all. {table.note}".rstrip()
    return Table(table.title, table.header, table.rows[:limit], note)


def _errors(document: Document) -> Table:
    rows = [
        (
            Foreign(output.name),
            *_distances(output.overall),
            *_likeness(output),
            *_argmax(output.overall, output.ranking),
        )
        for output in document.outputs
    ]
    measured = [output.overall for output in document.outputs]
    if document.decode and (logits := document.decode.logits):
        measured.append(logits)
        last = _number(logits.sqnr_db), f"{logits.cosine:.9g}"
        argmax = _argmax(logits, document.decode.ranking)
        rows.append(("decoding, all steps", *_distances(logits), *last, *argmax))
    note = "Relative is to the largest value; SQNR and cosine are of the worst sample."
    if not all(comparison.exact_percentiles for comparison in measured):
        note += f" Percentiles are within {HISTOGRAM_ERROR:.1%}."
    header = ("output", *_DISTANCES, "SQNR dB", "cosine", "argmax mismatches", "finite")
    return Table("Error per output", header, rows, note)


def _likeness(output: OutputEvidence) -> _Row:
    if not output.overall.count:
        return "-", "-"
    return _number(output.sqnr_min), f"{output.cosine_min:.9g}"


def _distances(found: Comparison) -> _Row:
    if not found.count:
        return ("-",) * len(_DISTANCES)
    numbers = found.max_abs, found.mean_abs, found.p99_abs, found.p999_abs, found.max_relative
    return tuple(map(_number, numbers))


def _argmax(found: Comparison, ranking: Ranking | None) -> _Row:
    mismatches = f"{ranking.mismatches}/{ranking.rows}" if ranking else "-"
    return mismatches, _yes(found.nan_candidate + found.inf_candidate == 0)


def _worst(outputs: Iterable[OutputEvidence]) -> Table:
    rows = [
        (
            Foreign(output.name),
            Foreign(worst.sample),
            str(list(worst.position)),
            _number(worst.reference, 6),
            _number(worst.candidate, 6),
        )
        for output in outputs
        if (worst := output.worst)
    ]
    header = "output", "sample", "position", "reference", "candidate"
    return Table("Largest error of each output", header, rows)


def _choices(document: Document) -> Table:
    ranked = [(Foreign(output.name), output.ranking) for output in document.outputs]
    if document.decode:
        ranked.append((Foreign("decoding, all steps"), document.decode.ranking))
    rows = [
        (
            name,
            *map(str, (ranking.rows, ranking.mismatches)),
            _number(ranking.margin),
            _number(ranking.overlap, 4),
            *map(_number, (ranking.overlap_min, ranking.kl_mean, ranking.kl_max)),
        )
        for name, ranking in ranked
        if ranking
    ]
    top = next((ranking.top for _, ranking in ranked if ranking), 0)
    header = "rows", "mismatches", "largest margin", f"top {top} kept", "in the worst row"
    note = "A margin is how far the wrong choice lies below the right one in the reference."
    title = "Choices (argmax)"
    return Table(title, ("output", *header, "KL mean", "KL max"), rows, note)


def _gates(found: Evidence) -> Table:
    rows = [
        (
            Foreign(gate.gate),
            Foreign(gate.output),
            "passed" if gate.passed else "failed",
            _number(gate.value, 6),
            Foreign(gate.sample),
            Foreign(gate.reason),
        )
        for gate in found.gates
    ]
    return Table("Gates", ("gate", "output", "result", "value", "sample", "reason"), rows)


def _samples(outputs: Iterable[OutputEvidence]) -> Table:
    every = [(sample, output.name) for output in outputs for sample in output.samples]
    lowest = [s.comparison.sqnr_db if s.comparison else float("-inf") for s, _ in every]
    rows: list[_Row] = []
    for _, (sample, name) in sorted(zip(lowest, every, strict=True), key=lambda each: each[0]):
        who = Foreign(sample.sample), Foreign(name), str(list(sample.shape))
        if (c := sample.comparison) is None:
            rows.append((*who, *["-"] * 7, Foreign(sample.problem)))
            continue
        last = _number(c.sqnr_db), f"{c.cosine:.9g}"
        rows.append((*who, *_distances(c), *last, ""))
    header = ("sample", "output", "shape", *_DISTANCES, "SQNR dB", "cosine", "problem")
    return Table("Error per sample", header, rows, "The lowest SQNR is first.")


def _layers(found: Localization) -> Table:
    rows = [
        (
            str(layer.index),
            Foreign(layer.op_type),
            Foreign(layer.value),
            _number(layer.entered.sqnr_db),
            _number(layer.reached.sqnr_db),
            _number(layer.entered.max_abs),
            _number(layer.reached.max_abs),
            *(_number(end, 4) for end in layer.reached.range_reference or (None, None)),
        )
        for layer in found.layers
    ]
    errors = "entered, dB", "reached, dB", "entered, max", "reached, max"
    note = (
        f"{found.walked} values compared, {len(found.only_reference)} are in the reference "
        f"alone, {len(found.only_candidate)} in the candidate alone. "
        "Entered is what the node adds; reached is what has piled up there. "
        "Least and largest are of the reference's values."
    )
    header = ("node", "operator", "value", *errors, *_RANGE)
    return Table("Error per layer", header, rows, note)


def _ranges(outputs: Iterable[OutputEvidence]) -> Table:
    header = "output", "types", *_RANGE, "NaN", "infinite", "disagreements"
    rows = [
        (
            Foreign(output.name),
            " -> ".join(dict.fromkeys(output.types)).lower(),
            *_range(c),
            f"{c.nan_reference} -> {c.nan_candidate}",
            f"{c.inf_reference} -> {c.inf_candidate}",
            str(c.nonfinite_mismatches),
        )
        for output in outputs
        for c in [output.overall]
    ]
    note = "From the reference to the candidate; least and largest of what is finite."
    return Table("Ranges", header, rows, note)


def _range(found: Comparison) -> _Row:
    """Least and largest value, each from the reference to the candidate."""
    sides = found.range_reference, found.range_candidate
    return tuple(
        " -> ".join("-" if side is None else _number(side[end], 4) for side in sides)
        for end in (0, 1)
    )


def _clips(found: TextEvidence) -> Table:
    def rates(errors: TextErrors) -> _Row:
        return _percent(errors.wer), _percent(errors.cer)

    rows: list[_Row] = [
        (Foreign(name), _yes(clip.byte_exact), *rates(clip.strict), *rates(clip.normalized))
        for name, clip in sorted(found.clips.items(), key=lambda item: _exactness(item[1]))
    ]
    exact = f"{found.byte_exact}/{len(rows)}"
    rows.insert(0, ("all", exact, *rates(found.strict), *rates(found.normalized)))
    header = "clip", "byte-exact", "WER", "CER", "WER normalized", "CER normalized"
    return Table("Transcripts", header, rows, "The most wrong is first.")


def _exactness(clip: ClipText) -> tuple[bool, float]:
    """Sorts clips, the most wrong first; what has no rate is very wrong."""
    rate = math.inf if clip.strict.cer is None else clip.strict.cer
    return clip.byte_exact, -rate


def _decoding(found: DecodeEvidence) -> Table:
    def row(name: str, clip: ClipDecode) -> _Row:
        wrong = sum(step.reference != step.candidate for step in clip.steps)
        where = "-" if clip.divergence is None else str(clip.divergence)
        lengths = str(len(clip.reference)), str(len(clip.candidate))
        loops = _loop(clip.reference_loop), _loop(clip.candidate_loop)
        return Foreign(name), str(len(clip.steps)), str(wrong), where, *lengths, *loops

    clips = sorted(found.clips.items(), key=lambda item: item[1].divergence is None)
    rows = [row(name, clip) for name, clip in clips]
    diverged = f"{found.diverged}/{len(rows)} prompts"
    rows.insert(0, ("all", str(found.steps), str(found.mismatches), diverged, *["-"] * 4))
    lengths = "tokens, reference", "tokens, candidate", "loop, reference", "loop, candidate"
    header = ("prompt", "steps", "other choices", "diverges at", *lengths)
    return Table("Decoding", header, rows)


def _loop(loop: Loop | None) -> str:
    return f"{loop.period} x {loop.repeats} at {loop.start}" if loop else "-"


def _weights(models: _Models) -> Table:
    types = dict.fromkeys(group.dtype for model in models for group in model.weights)
    totals = [sum(group.nbytes for group in model.weights) for model in models]
    rows = []
    for dtype in types:
        row = [dtype]
        for model, total in zip(models, totals, strict=True):
            mine = [group for group in model.weights if group.dtype == dtype]
            size = sum(group.nbytes for group in mine)
            share = f"{100 * size / total:.1f} %" if total else "-"
            row += [str(sum(group.count for group in mine)), f"{size:,}", share]
        rows.append(tuple(row))
    header = [f"{side}: {what}" for side in ("reference", "candidate") for what in _COVERAGE]
    return Table("Weights by type", ("type", *header), rows)


def _readers(models: _Models) -> Table:
    names = dict.fromkeys(group.readers for model in models for group in model.readers)
    rows = [
        (Foreign(name), *(cell for model in models for cell in _coverage(model, name)))
        for name in names
    ]
    header = [f"{side}: {what}" for side in ("reference", "candidate") for what in _READ]
    note = "Operators that compute with weights, behind Cast, Transpose and the like."
    return Table("Weights by operator", ("read by", *header), rows, note)


def _coverage(model: Inspection, readers: str) -> _Row:
    """Bytes of the weights that some operators read, and how they share them among types."""
    groups = [group for group in model.readers if group.readers == readers]
    total = sum(group.nbytes for group in groups)
    shares = (f"{g.dtype} {100 * g.nbytes / total:.1f} %" for g in groups if total)
    return f"{total:,}", ", ".join(shares) or "-"


def _operators(models: _Models) -> Table:
    left, right = (model.ops for model in models)
    names = list(dict.fromkeys([*left, *right]))
    rows: list[_Row] = [
        (Foreign(name), str(left.get(name, 0)), str(right.get(name, 0)))
        for name in names
        if left.get(name) != right.get(name)
    ]
    same = sum(count for name, count in left.items() if count == right.get(name))
    rows.append(("unchanged in number", str(same), str(same)))
    return Table("Operators", ("operator", "reference", "candidate"), rows)


def _sides(found: Evidence, models: _Models | None) -> Table:
    rows = []
    for place, side in enumerate((found.reference, found.candidate)):
        size = sum(models[place].files.values()) / 1e6 if models else None
        run = statistics.median(side.run_seconds) if side.run_seconds else None
        peak = None if side.peak_memory is None else f"{side.peak_memory / 1e6:.0f}"
        rows.append(
            (
                ("reference", "candidate")[place],
                Foreign(names(found)[place]),
                "-" if size is None else f"{size:.1f}",
                Foreign(side.runtime or "-"),
                Foreign(", ".join(side.providers) or "-"),
                f"{side.threads or 'default'}, {side.optimization}",
                _number(side.load_seconds),
                _number(run),
                peak or "-",
            )
        )
    setup = "onnxruntime", "provider", "threads, optimization"
    header = ("side", "model", "MB", *setup, "load s", "run s", "peak MB")
    count = len(found.samples)
    note = f"Samples: {count}; run s is their median. MB are of files, peak MB of memory."
    return Table("Models", header, rows, note)


def _files(models: _Models) -> Table:
    rows = [
        (side, Foreign(Path(path).name), f"{size:,}")
        for side, model in zip(("reference", "candidate"), models, strict=True)
        for path, size in model.files.items()
    ]
    return Table("Files", ("side", "file", "bytes"), rows)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(rate: float | None) -> str:
    return "undefined" if rate is None else f"{100 * rate:.2f} %"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _is_number(cell: str) -> bool:
    return not isinstance(cell, Foreign) and _NUMBER.fullmatch(cell) is not None
