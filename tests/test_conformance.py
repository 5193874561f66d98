"""Every pass, on every fixture, by default and with other options, held to every law."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxforge import laws, testing
from onnxforge.core import Pass, Result
from onnxforge.placement import PLACEMENT
from onnxforge.registry import entries, parse
from support import fixtures, oracle, payload, statistics

# At its defaults, or with what it requires, and at least once with other options.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "assert-pure": ("assert-pure", "assert-pure{max_opset=18 imports=all functions=forbid}"),
    "bf16": (
        "bf16",
        "bf16{keep_io=none block_op_types=Softmax target=tensorrt}",
    ),
    "dynamic-int8": (
        "dynamic-int8",
        "dynamic-int8{min_bytes=0 float_front_end=false float_depthwise=false}",
        "dynamic-int8{min_bytes=0 weight_type=uint8 per_channel=false leftover=int8w}",
        "dynamic-int8{min_bytes=0 reduce_range=true scale=mse}",
    ),
    "fp16": (
        "fp16",
        "fp16{keep_io=none block_op_types=Softmax target=webgpu}",
    ),
    "fp16w": (
        "fp16w",
        "fp16w{min_bytes=0 share=false}",
        "fp16w{min_bytes=0 on_overflow=error}",
    ),
    "gather-int8": ("gather-int8", "gather-int8{min_rows=1 min_bytes=0 scale=mse}"),
    "int8w": ("int8w", "int8w{min_bytes=0 scale=mse}"),
    "shard": (
        "shard",
        "shard{max_bytes=8KiB inline_below=64 align=1 order=size manifest=true}",
        "shard{single=true lift=true}",
        "shard{max_bytes=64KiB target=browser lift=true digits=1}",
    ),
    "set-ir": ("set-ir{max=9}", "set-ir{max=8}"),
    "tidy": ("tidy", "tidy{sort=false}"),
    "smoothquant": (
        "smoothquant{stats=STATS}",
        "smoothquant{stats=STATS min_bytes=0 quantize=false}",
        "smoothquant{stats=STATS min_bytes=0 format=integer activations=int8 fold=false}",
        "smoothquant{stats=STATS min_bytes=0 alpha=auto scales=pow2 percentile=99.9}",
    ),
}
CASES = [
    pytest.param(text, name, id=f"{text}-{name}")
    for texts in VARIANTS.values()
    for text in texts
    for name in fixtures.names()
]


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own fixtures do not crash the runtime: spare a process for each run."""

    def run(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return oracle.run(path, inputs)

    monkeypatch.setattr(laws, "run", run)


def one(text: str, name: str = fixtures.names()[0]) -> Pass:
    """A pass for a fixture."""
    (step,) = parse(statistics.placed(text, name))
    return step


def outcome(step: Pass, name: str) -> Result | None:
    """What a pass makes of a fixture; None where it says no."""
    return testing.outcome(step, fixtures.built(name))


def test_every_pass_has_its_variants() -> None:
    built_in = {name for name, entry in entries().items() if entry.point is None}
    assert set(VARIANTS) == built_in
    assert all(len(set(texts)) > 1 for texts in VARIANTS.values())


@pytest.mark.parametrize("text", [text for texts in VARIANTS.values() for text in texts])
def test_no_law_holds_for_want_of_a_model_that_the_pass_changes_or_refuses(text: str) -> None:
    results = [outcome(one(text, name), name) for name in fixtures.names()]
    assert any(
        result is None or result.modified or PLACEMENT in result.model.meta
        for result in results
    )
    assert any(result is not None for result in results)


@pytest.mark.parametrize(("text", "name"), CASES)
def test_flag_idempotence_and_the_law_of_its_effect(text: str, name: str) -> None:
    # Only the law of storage needs a model that runs, and only where something was stored.
    samples = fixtures.samples(name) or [{}]
    testing.hold_law(one(text, name), fixtures.built(name), samples)


@pytest.mark.parametrize(("text", "name"), CASES)
def test_valid_in_valid_out_with_the_same_interface(text: str, name: str) -> None:
    testing.hold_validity(one(text, name), fixtures.built(name))


@pytest.mark.parametrize(("text", "name"), CASES)
def test_every_weight_is_treated_excluded_or_skipped(text: str, name: str) -> None:
    step = one(text, name)
    testing.hold_account(step, fixtures.built(name))
    result = outcome(step, name)
    if result is not None and any(finding.fate for finding in result.findings):
        told = [f for f in result.findings if f.fate is not None and not f.op]
        digests = payload.tensor_digests(fixtures.built(name))
        assert len(told) == len(digests), "an independent walk finds as many"


@pytest.mark.parametrize(("text", "name"), CASES)
def test_what_is_written_can_be_read_and_runs(text: str, name: str, tmp_path: Path) -> None:
    samples = fixtures.samples(name) if name in fixtures.names(runs=True) else []
    source = fixtures.built(name)
    testing.hold_written(one(text, name), source, tmp_path, samples, run=oracle.run)
    target = tmp_path / "out.onnx"
    if target.exists() and name in fixtures.names(clean=True):
        onnx.checker.check_model(str(target), full_check=True)


@pytest.mark.parametrize("text", [text for texts in VARIANTS.values() for text in texts])
def test_the_text_of_a_pass_gives_the_pass(text: str) -> None:
    testing.hold_text(one(text))


_WRITE_ALL = """
import sys
from pathlib import Path
from onnxforge import PassManager
from onnxforge.errors import OnnxforgeError
folder = Path(sys.argv[1])
for text, source in (line.split("|") for line in sys.argv[2:]):
    target = folder / f"{text.partition('{')[0]}_{Path(source).name}"
    try:
        PassManager(text).run(source, target, force=True, workers=int(sys.argv[1][-1]))
    except OnnxforgeError:
        pass
"""


def test_the_same_bytes_in_any_process_with_any_number_of_threads(tmp_path: Path) -> None:
    jobs = [
        f"{statistics.placed(texts[0], name)}|{fixtures.built(name)}"
        for texts in VARIANTS.values()
        for name in fixtures.names()
    ]
    files = []
    for seed in ("1", "4"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", _WRITE_ALL, str(folder), *jobs],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            check=True,
        )
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0]
    assert files[0] == files[1]
