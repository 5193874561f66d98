"""Looking for what is wrong with models and bundles, without loading a weight."""

from __future__ import annotations

from onnxforge.lint.config import Options
from onnxforge.lint.engine import lint
from onnxforge.lint.finding import Finding, Report

__all__ = ["Finding", "Options", "Report", "lint"]
