"""Store tables of embeddings as int8, a scale for each row, and widen gathered rows only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxforge import dequantized
from onnxforge.core import Effect, Finding, Pass, Result
from onnxforge.numerics.channels import Channels
from onnxforge.numerics.int8 import ScaleRule, rounding
from onnxforge.options import ByteSize
from onnxforge.selection import CODES, Selection, skipped, too_old, treated
from onnxforge.surgery import Surgery
from onnxforge.weights import Weight, Weights, for_each

__all__ = ["PerRowGatherInt8Pass"]


@dataclass(frozen=True)
class PerRowGatherInt8Pass(Pass):
    """Store tables read by Gather as int8 with one scale for each row.

    The scale of a row is its largest magnitude / 127; a row of zeros stays zero. A Gather on
    axis 0 takes rows of int8 and their scales, and only those are multiplied, so that neither
    load nor memory sees the table as float32. Another reader of such a table, as a tied
    output layer, gets integer times scale of the same stored bytes; with dynamic-int8, in
    any order, it multiplies them as integers.

    Attributes:
        min_rows: Leave tables of fewer rows alone.
        min_bytes: Leave smaller tables alone.
        include: Globs on names of tables and of nodes that read them; only those are treated.
        exclude: The same, of what to leave alone.
        scale: ``absmax`` maps the largest magnitude of a row to 127; ``mse`` clips where that
            makes the squared error of the row least.

    Example:
        onnxforge run --passes 'gather-int8,dynamic-int8' in.onnx out.onnx
    """

    name: ClassVar[str] = "gather-int8"
    effect: ClassVar[Effect] = Effect.STORAGE
    codes: ClassVar[Mapping[str, str]] = {
        **CODES,
        "OF223": "The weight holds NaN or infinity, which int8 has no place for.",
        "OF225": "No Gather on axis 0 reads the weight, so it is no table of rows.",
        "OF226": "The table has fewer rows than `min_rows`.",
        "OF227": "How far the stored values are from the table.",
    }

    min_rows: int = 64
    min_bytes: ByteSize = ByteSize(1024)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scale: ScaleRule = "absmax"

    def call(self, model: ir.Model) -> Result:
        """Store every table as int8."""
        weights = Weights(model)
        selection = Selection(
            frozenset({ir.DataType.FLOAT}), self.min_bytes, self.include, self.exclude
        )
        chosen, findings = selection.split(weights)
        surgery = Surgery(weights)
        decoded: dict[str, ir.TensorProtocol] = {}
        for weight, storage in zip(chosen, for_each(self._storage, chosen), strict=True):
            if isinstance(storage, Finding):
                findings.append(storage)
                continue
            findings.append(treated(weight, "stored as int8"))
            lost = rounding(weight.tensor, storage.grid)
            findings.append(Finding("OF227", weight.where, f"error of the table: {lost}"))
            decoded[weight.where] = dequantized.store(weight, storage, surgery)
        surgery.settle()
        return Result(model, bool(decoded), {}, tuple(findings), decoded)

    def _storage(self, weight: Weight) -> dequantized.Storage | Finding:
        if (obstacle := too_old(weight, 7, "Mul")) is not None:
            return obstacle
        shape = tuple(weight.tensor.shape.numpy())
        channels = Channels(shape, tuple(range(1, len(shape))))
        is_table = any(dequantized.is_of_rows(use) for use in weight.uses)
        if not is_table or not channels.is_worthwhile:
            return skipped(weight, "OF225", "no Gather takes rows of it")
        if shape[0] < self.min_rows:
            return skipped(weight, "OF226", f"has fewer rows than {self.min_rows}")
        return dequantized.plan(weight, channels, self.scale, input_scales=False) or skipped(
            weight, "OF223", "holds NaN or infinity"
        )
