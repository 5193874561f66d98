"""Half precision inside of a model, with as few casts as possible."""

from onnxforge.halving.engine import CODES, Policy, halve
from onnxforge.halving.formats import BFLOAT16, FLOAT16, Format
from onnxforge.halving.targets import Target

__all__ = ["BFLOAT16", "CODES", "FLOAT16", "Format", "Policy", "Target", "halve"]
