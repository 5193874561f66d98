"""The recipe of a bundle: what it is made from, what is made, and what that must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from onnxforge.known import named

if TYPE_CHECKING:
    from onnxforge.compare.gates import Gate
    from onnxforge.compare.samples import Data
    from onnxforge.core import Pass
    from onnxforge.runtime.session import Setup

__all__ = [
    "CALIBRATION",
    "DOCUMENTS",
    "MANIFEST",
    "METADATA",
    "PARITY",
    "Calibration",
    "Extra",
    "Graph",
    "Parity",
    "Recipe",
    "Targets",
    "Tier",
    "Variant",
    "Weights",
]

CALIBRATION = "@calibration"
"""What a pipeline names where it means the statistics of the graph at hand."""

METADATA, MANIFEST, PARITY = DOCUMENTS = "metadata.json", "manifest.json", "PARITY.md"

Weights = Literal["keep", "inline", "sidecar", "shared"]


@dataclass(frozen=True)
class Calibration:
    """How statistics of a graph are taken.

    Attributes:
        data: The samples.
        op_types: Products to watch.
        rows: Kept of each.
    """

    data: Data
    op_types: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Parity:
    """How a graph is compared with its source.

    Attributes:
        data: The samples.
        argmax: Axis along which choices are compared, by output.
        top: How many of the best choices are compared.
    """

    data: Data
    argmax: Mapping[str, int]
    top: int


@dataclass(frozen=True)
class Graph:
    """One of the graphs of the bundle.

    Attributes:
        name: Its name, which the names of files begin with.
        source: The model that all its tiers are made from.
        calibration: For pipelines that name `CALIBRATION`.
        parity: None where it is not compared.
        golden: How many of the samples to write with what the source makes of them.
    """

    name: str
    source: Path
    calibration: Calibration | None
    parity: Parity | None
    golden: int


@dataclass(frozen=True)
class Variant:
    """One graph in one tier.

    Attributes:
        path: Of the model file in the bundle.
        passes: What makes it from its source; none for a copy.
        gates: What it must keep.
    """

    path: PurePosixPath
    passes: tuple[Pass, ...]
    gates: tuple[Gate, ...]

    @property
    def is_calibrated(self) -> bool:
        """Whether its pipeline names the statistics of the graph at hand."""
        return any(CALIBRATION in names for p in self.passes for names in named(p).values())


@dataclass(frozen=True)
class Targets:
    """What models are meant for.

    Attributes:
        onnxruntime: Releases, the oldest first.
        providers: Execution providers, each of which is to load them.
    """

    onnxruntime: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tier:
    """One form of all graphs.

    Attributes:
        name: Its name.
        weights: Where they go; ``shared`` stores what graphs have in common once.
        targets: What it is meant for.
        graphs: By name.
    """

    name: str
    weights: Weights
    targets: Targets
    graphs: Mapping[str, Variant]


@dataclass(frozen=True)
class Extra:
    """A file that all tiers share.

    Attributes:
        source: Where it is.
        path: Where it goes in the bundle.
        link: Give it a second name, where the file system can, and do not copy it.
    """

    source: Path
    path: PurePosixPath
    link: bool


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        path: The file it was read from.
        name: Of the bundle.
        output: Folder of the bundle.
        work: Folder for what is not yet in its place.
        license: As it says.
        md5: Whether the manifest also holds MD5 hashes.
        golden: Folder in the bundle for golden values.
        statistics: The same for statistics, None where they stay with whoever builds.
        setup: How models are run.
        targets: What tiers are meant for that say nothing else.
        browser: Names of tiers that are meant for browsers.
        graphs: By name.
        tiers: By name.
        extras: Files that all tiers share.
    """

    path: Path
    name: str
    output: Path
    work: Path
    license: str | None
    md5: bool
    golden: PurePosixPath
    statistics: PurePosixPath | None
    setup: Setup
    targets: Targets
    browser: tuple[str, ...]
    graphs: Mapping[str, Graph]
    tiers: Mapping[str, Tier]
    extras: tuple[Extra, ...]

    def statistics_of(self, graph: Graph) -> PurePosixPath:
        """Where the statistics of a graph are published."""
        assert self.statistics is not None
        return self.statistics / f"{graph.name}.safetensors"

    def is_source(self, graph: Graph, variant: Variant) -> bool:
        """Whether a graph of a tier is the source itself, in its place already."""
        return (self.output / variant.path).resolve() == graph.source.resolve()
