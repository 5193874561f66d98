"""Arithmetic on tensors: comparing, quantizing, calibrating."""

from onnxforge.numerics.metrics import Accumulator, Comparison, compare

__all__ = ["Accumulator", "Comparison", "compare"]
