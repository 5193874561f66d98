"""Two models on the same samples: how far apart they are, and where that begins."""

from onnxforge.compare.engine import Options, compare
from onnxforge.compare.evidence import Evidence, evidence_as_dict
from onnxforge.compare.gates import Gate
from onnxforge.compare.samples import Data, Sample
from onnxforge.runtime.session import Setup

__all__ = [
    "Data",
    "Evidence",
    "Gate",
    "Options",
    "Sample",
    "Setup",
    "compare",
    "evidence_as_dict",
]
