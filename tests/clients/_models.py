"""The models that clients are tried on: the ways to publish each of some fixtures."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from _products import Product
from onnx import GraphProto, numpy_helper

from support import fixtures

MODEL = "model.onnx"
SHARDS, ALIGNMENT = 3, 64
# From 1.25 on onnxruntime multiplies by an int8 weight in int8, but not in wasm: 5e-3 apart.
INEXACT = {"y_dequantize"}

Samples = list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what to feed it, and the model that says what must come out.

    Attributes:
        name: What the model was made from.
        kind: How it is published; SHARDED or key of TIERS.
        folder: Holds the model, its data files, the inputs and `job.json`.
        reference: The same values in fp32 and in one file.
        inputs: One archive for each run.
        outputs: Names of the outputs in the order of the graph.
        products: Products of integers, whose sides are among the outputs.
    """

    name: str
    kind: str
    folder: Path
    reference: Path
    inputs: tuple[Path, ...]
    outputs: tuple[str, ...]
    products: tuple[Product, ...] = ()

    @property
    def model(self) -> Path:
        """The model to load."""
        return self.folder / MODEL


def sharded(source: Path, target: Path) -> None:
    """Store the large weights in data files, as browsers load them; three if possible."""
    tensors = onnx.load(source).graph.initializer
    sizes = [numpy_helper.to_array(tensor).nbytes + ALIGNMENT for tensor in tensors]
    # In order of size the first files are filled best, so that three are enough.
    bound = max([*sizes, sum(sizes) // SHARDS + ALIGNMENT])
    passes = f"shard{{max_bytes={bound} order=size target=browser}}"
    _onnxforge("--passes", passes, source, target)


def _onnxforge(*arguments: str | Path) -> None:
    program = Path(sys.executable).with_name("onnxforge")
    subprocess.run([program, "run", *arguments], check=True, stdout=subprocess.DEVNULL)


SHARDED = "fp32 in shards"
TIERS = {
    "fp16w": ("fp16w", "keep"),
    "fp16w sidecar": ("fp16w", "sidecar"),
    "int8w": ("int8w", "keep"),
    "int8w sidecar": ("int8w", "sidecar"),
    "dynamic-int8": ("dynamic-int8", "keep"),
    "gather-int8 and dynamic-int8": ("gather-int8{min_rows=2},dynamic-int8", "keep"),
}


def from_fixture(name: str, folder: Path) -> tuple[Path, Samples]:
    """Write a fixture without the outputs that no two releases give alike."""
    model = onnx.load(fixtures.built(name))
    kept = [output for output in model.graph.output if output.name not in INEXACT]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path, fixtures.samples(name)


def make(source: Path, samples: Samples, folder: Path, runtimes: ModuleType) -> Iterator[Case]:
    """Publish a model in every way, each in a folder of its own."""
    name, base = source.stem, folder / source.stem
    base.mkdir()
    graph = onnx.load(source, load_external_data=False).graph
    inputs = []
    for number, sample in enumerate(samples):
        inputs.append(base / f"{number}.npz")
        required: dict[str, Any] = _required(graph, sample)
        np.savez(inputs[-1], **required)
    outputs = tuple(output.name for output in graph.output)
    for kind in (SHARDED, *TIERS):
        own = folder / f"{name}-{kind.replace(' ', '-')}"
        own.mkdir()
        case = Case(name, kind, own, source, tuple(inputs), outputs)
        if kind == SHARDED:
            sharded(source, own / MODEL)
        else:
            tier = runtimes.make_case(name, source, inputs, TIERS[kind][0], base / kind)
            case = _published(case, tier)
        _write_job(case)
        yield case


def _published(case: Case, tier: Any) -> Case:
    """Publish a tier; one that multiplies integers shows what goes into its products."""
    if tier.probe is not None:
        shutil.copy(tier.probe.model, case.model)
        products, outputs = tuple(tier.probe.products), tuple(tier.probe.outputs)
        return dataclasses.replace(
            case, reference=case.model, outputs=outputs, products=products
        )
    passes, layout = TIERS[case.kind]
    _onnxforge("--passes", passes, "--layout", layout, case.reference, case.model)
    return dataclasses.replace(case, reference=tier.parent)


def _required(graph: GraphProto, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out what replaces an initializer: in JavaScript it is refused or ignored."""
    own = {tensor.name for tensor in graph.initializer}
    return {name: value for name, value in sample.items() if name not in own}


def _write_job(case: Case) -> None:
    """Write inputs and job.json, from which clients in other languages read."""
    samples: list[list[dict[str, Any]]] = []
    for number, archive in enumerate(case.inputs):
        with np.load(archive) as sample:
            entries = [
                {
                    "name": name,
                    "type": value.dtype.name,
                    "dims": value.shape,
                    "file": f"{number}-{index}.bin",
                }
                for index, (name, value) in enumerate(sample.items())
            ]
            for entry in entries:
                (case.folder / entry["file"]).write_bytes(sample[entry["name"]].tobytes())
        samples.append(entries)
    data = sorted(path.name for path in case.folder.glob(f"{MODEL}[._]*"))
    job = {"model": MODEL, "data": data, "samples": samples}
    (case.folder / "job.json").write_text(json.dumps(job, indent=1))
