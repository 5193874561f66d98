"""Arithmetic on tensors: comparing, quantizing, calibrating."""
