"""Evidence of every kind, with names that are as foreign as they can be."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from onnxforge.compare.document import Document
from onnxforge.compare.evidence import (
    Evidence,
    GateResult,
    LayerEvidence,
    Localization,
    OutputEvidence,
    SampleEvidence,
    Side,
    Worst,
)
from onnxforge.inspection import Inspection, Port, ReaderGroup, WeightGroup
from onnxforge.numerics.decode import ClipDecode, DecodeEvidence, Loop, Step
from onnxforge.numerics.metrics import Comparison, compare
from onnxforge.numerics.ranking import rank
from onnxforge.numerics.text import ClipText, TextErrors, TextEvidence


def document(name: str = "logits", path: str = "fp16w/model.onnx") -> Document:
    """Return evidence in which every text that can be foreign is ``name``."""
    return Document(
        comparison=_evidence(name, path),
        models=(_inspection(name, "fp32/model.onnx"), _inspection(name, path)),
        text=_text(name),
        decode=_decode(name),
    )


def comparison(error: float = 0.01) -> Comparison:
    """Return what is found where one of six values is off."""
    reference = np.arange(6, dtype=np.float32).reshape(2, 3)
    return compare(reference, reference + np.float32(error) * np.eye(2, 3))


def output(name: str, *errors: float) -> OutputEvidence:
    """Return an output with a sample for each error."""
    samples = [
        SampleEvidence(f"{name} {i}", (2, 3), comparison(e)) for i, e in enumerate(errors)
    ]
    scores = np.eye(3)
    return OutputEvidence(
        name=name,
        types=("FLOAT", "FLOAT16"),
        overall=comparison(max(errors)),
        ranking=rank(scores, scores[[0, 2, 1]]),
        worst=Worst(name, (0, 1), 1.0, 1.01),
        samples=(*samples, SampleEvidence(name, (2, 3), None, None, name)),
    )


def _evidence(name: str, path: str) -> Evidence:
    layer = LayerEvidence(name, name, name, 7, comparison(1e-4), comparison())
    exact = LayerEvidence("b", "b", "Add", 8, comparison(0), comparison())
    cpu = ("CPUExecutionProvider",)
    first = Side("fp32/model.onnx", "1.31.1", cpu, 1, "all", 0.5, (0.1, 0.3), 90_000_000)
    second = Side(path, None, (), 0, "none", None, (), None, (name,), name)
    return Evidence(
        reference=first,
        candidate=second,
        samples=(name,),
        outputs=(output(name, 0.01, 0.02), output("broken", math.nan), output("same", 0)),
        only_reference=(name,),
        only_candidate=(name, name),
        not_compared=(name,),
        gates=(
            GateResult("--min-sqnr 60", name, False, -math.inf, name, name),
            GateResult("--max-abs 1", "same", True, 0.0, name),
            GateResult("--max-abs 1", "gone", False, None),
        ),
        localization=Localization(
            name, 9, (layer, exact), (name,), (name,), (name,), (name, name)
        ),
        notes=(name,),
    )


def _inspection(name: str, path: str) -> Inspection:
    port = Port(name, "Tensor(FLOAT)", "[2,3]")
    groups = [
        WeightGroup(dtype, "initializer, main graph", "inline", 2, size)
        for dtype, size in (("float", 4000), (path[:7], 2000), ("int64", 16), ("bool", 1))
    ]
    readers = [
        ReaderGroup(name, "float", 1, 3000),
        ReaderGroup(name, path[:7], 1, 1000),
        ReaderGroup("Add", "int64", 2, 16),
    ]
    ops = {name: 3, f"{name} {path}": 1, "Add": 2}
    files = {Path(path): 6100, Path(name.replace("\0", "")): 9}
    return Inspection(
        10, {"ai.onnx": 20}, name, name, files, [port], [port], groups, readers, ops
    )


def _text(name: str) -> TextEvidence:
    strict, loose = TextErrors(8, 1, 0, 1, 40, 5), TextErrors(8, 0, 0, 0, 38, 0)
    silence = TextErrors(0, 0, 0, 2, 0, 9)
    clips = {
        name: ClipText(False, strict, loose),
        "silence": ClipText(False, silence, silence),
    }
    return TextEvidence(clips, 0, strict, loose)


def _decode(name: str) -> DecodeEvidence:
    steps = Step(3, 3, 3, 0.1, 0.0, 0.0), Step(4, 4, 5, 0.2, 0.05, 1e-3), Step(1, 1, 1)
    clip = ClipDecode(steps, (3, 4, 1), (3, 5, 5), 1, True, False, None, Loop(1, 1, 2))
    same = ClipDecode((), (1,), (1,), None, True, True, None, None)
    scores = np.eye(3)
    ranking = rank(scores, scores[[0, 2, 1]])
    return DecodeEvidence({name: clip, "b": same}, 3, 1, 1, comparison(), ranking)
