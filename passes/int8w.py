"""Store float32 weights as int8, multiplied with their scales before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxforge import dequantized
from onnxforge.core import Effect, Finding, Pass, Result
from onnxforge.numerics.int8 import ScaleRule
from onnxforge.operands import weight_channels
from onnxforge.options import ByteSize
from onnxforge.selection import CODES, Selection, skipped, too_old, treated
from onnxforge.surgery import Surgery
from onnxforge.weights import Weight, Weights, for_each

__all__ = ["WeightsInt8CastPass"]


@dataclass(frozen=True)
class WeightsInt8CastPass(Pass):
    """Store float32 weights as int8 with scales for its channels.

    Arithmetic, inputs and outputs stay float32: a weight is read through a Cast, a Mul with
    the scales of its output channels and one with those of its input channels. Of a table
    read by Gather only the gathered rows are, which have one scale each. Runtimes compute
    that when they load the model, so that the download is a quarter, while memory and speed
    stay those of float32. It is closer to float32 than dynamic int8.

    Treated are the matrices, kernels and tables of MatMul, Gemm, Conv, ConvTranspose, LSTM,
    GRU, RNN and Gather, also behind Transpose and Reshape. What other operators read stays
    float32: a bias, a norm or a mask has no channels that share a scale.

    Attributes:
        min_bytes: Leave smaller weights alone.
        include: Globs on names of weights and of nodes that read them; only those are treated.
        exclude: The same, of what to leave alone.
        scale: ``absmax`` maps the largest magnitude of a channel to 127; ``mse`` clips where
            that makes the squared error of the channel least.
        input_scales: Also a scale for each input channel, the root mean square of its weights:
            it keeps small the error of the small weights that loud inputs have.

    Example:
        onnxforge run --passes 'int8w{min_bytes=64KiB exclude=lm_head*}' in.onnx out.onnx
    """

    name: ClassVar[str] = "int8w"
    effect: ClassVar[Effect] = Effect.STORAGE
    codes: ClassVar[Mapping[str, str]] = {
        **CODES,
        "OF223": "The weight holds NaN or infinity, which int8 has no place for.",
        "OF224": "No operator reads the weight that sums over some of its axes, so there are"
        " no channels that could share a scale.",
        "OF228": "Runtimes make float32 of the weights when they load them, so that only the"
        " file is smaller.",
    }

    min_bytes: ByteSize = ByteSize(1024)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scale: ScaleRule = "absmax"
    input_scales: bool = True

    def call(self, model: ir.Model) -> Result:
        """Store every weight that has channels as int8."""
        weights = Weights(model)
        selection = Selection(
            frozenset({ir.DataType.FLOAT}), self.min_bytes, self.include, self.exclude
        )
        chosen, findings = selection.split(weights)
        found = for_each(lambda weight: self._storage(weight, weights), chosen)
        surgery = Surgery(weights)
        decoded: dict[str, ir.TensorProtocol] = {}
        for weight, storage in zip(chosen, found, strict=True):
            if isinstance(storage, Finding):
                findings.append(storage)
                continue
            findings.append(treated(weight, "stored as int8"))
            decoded[weight.where] = dequantized.store(weight, storage, surgery)
        surgery.settle()
        if decoded:
            message = "memory and speed of a runtime stay those of float32"
            findings.append(Finding("OF228", "model", message))
        return Result(model, bool(decoded), {}, tuple(findings), decoded)

    def _storage(self, weight: Weight, weights: Weights) -> dequantized.Storage | Finding:
        if (obstacle := too_old(weight, 7, "Mul")) is not None:
            return obstacle
        channels = weight_channels(weight, weights)
        if channels is None:
            return skipped(weight, "OF224", "has no channels that share a scale")
        return dequantized.plan(
            weight, channels, self.scale, input_scales=self.input_scales
        ) or skipped(weight, "OF223", "holds NaN or infinity")
