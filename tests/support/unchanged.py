"""Models sent through a pass that changes nothing, and what became of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.backend.test
import onnx_ir as ir
from onnx import ModelProto
from onnx.backend.test.loader import load_model_tests

from onnxforge import PassManager
from onnxforge.core import Effect, Pass, Result
from onnxforge.errors import OnnxforgeError
from support import protos

EQUAL = "equal"


@dataclass(frozen=True)
class Unchanged(Pass):
    """Changes nothing and says that it did, so that the whole model is written anew."""

    name = "unchanged"
    effect = Effect.STORAGE

    def call(self, model: ir.Model) -> Result:
        return Result(model, modified=True)


_MANAGER = PassManager([Unchanged()], verify=False)  # the checker looks for other things


def backend_models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield all models that onnx tests its backends with, by name.

    Args:
        folder: Where those go that are not in the wheel but made by it.
    """
    wheel = Path(onnx.backend.test.__file__).parent
    for path in sorted(wheel.rglob("*.onnx")):
        yield path.relative_to(wheel).as_posix(), path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the numpy that computes what they should give
        cases = load_model_tests(kind="node")
    for case in cases:
        path = folder / f"{case.name}.onnx"
        path.write_bytes(case.model.SerializeToString())
        yield f"node/{case.name}", path


def from_file_to_file(source: Path, folder: Path) -> str:
    """Say what becomes of a model file: `EQUAL`, "refused: why" or "different: where"."""
    target = folder / "unchanged.onnx"
    try:
        layout = _MANAGER.run(source, target, force=True).layout
    except OnnxforgeError as error:
        return f"refused: {str(error).removeprefix(f'{source.absolute()}: ')}"
    before, has_data_files = protos.whole(source)
    if layout != ("sidecar" if has_data_files else "inline"):
        return f"different: the layout is {layout}"
    return _told(before, protos.whole(target)[0])


def from_proto_to_proto(model: ModelProto, folder: Path | None = None) -> str:
    """Say the same of a model in memory; ``folder`` is where its data files are."""
    try:
        again, _ = _MANAGER.apply(model, folder)
    except OnnxforgeError as error:
        return f"refused: {error}"
    return _told(model, again)


def _told(before: ModelProto, after: ModelProto) -> str:
    found = protos.unlike(before, after)
    return EQUAL if found is None else f"different: {found}"
