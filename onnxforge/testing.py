"""The laws that all passes are held to, for the tests of a pass in another package.

@pytest.mark.parametrize("model", testing.models())
def test_my_pass_conforms(model, tmp_path):
    testing.conform(MyPass(), model, tmp_path)
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx
import onnx_ir as ir

from onnxforge import laws
from onnxforge.core import Effect
from onnxforge.emulation import computes_in, emulate
from onnxforge.errors import BrokenPass, CheckFailed, Refused
from onnxforge.known import hand_over
from onnxforge.model_io import from_proto, load
from onnxforge.registry import parse
from onnxforge.runtime.session import run as run_in_child
from onnxforge.saving import save
from onnxforge.verify import interface, problem
from onnxforge.weights import Weights

if TYPE_CHECKING:
    from onnxforge.core import Pass, Result

__all__ = [
    "conform",
    "give",
    "hold_account",
    "hold_law",
    "hold_text",
    "hold_validity",
    "hold_written",
    "models",
    "outcome",
]

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Path, Arrays], Mapping[str, np.ndarray]]


def conform(step: Pass, model: Path, folder: Path, inputs: Iterable[Arrays] = ()) -> None:
    """Hold a pass to all laws on one model.

    Args:
        step: The pass.
        model: The model file.
        folder: An empty folder to write to.
        inputs: Values to run the model on; drawn at random if there are none.

    Raises:
        BrokenPass: It breaks a law, and which.
        Refused: A law needs the model to run, and it does not.
    """
    samples = [*inputs]
    hold_text(step)
    hold_validity(step, model)
    hold_account(step, model)
    hold_law(step, model, samples)
    hold_written(step, model, folder, samples)


def give(step: Pass, model: ir.Model) -> ir.Model:
    """Hand a model the files that a pass names, as PassManager does."""
    hand_over(step, model)
    return model


def outcome(step: Pass, path: Path) -> Result | None:
    """What a pass makes of a model; None where it says no, which must change nothing.

    Raises:
        BrokenPass: It says no and has changed the model.
    """
    model = give(step, load(path))
    before = laws.digest(model)
    try:
        return cast("Result", step(model))
    except (CheckFailed, Refused) as error:
        _claim(laws.digest(model) == before, f"{step.name} declines and changes: {error}")
        return None


def hold_law(step: Pass, path: Path, inputs: Iterable[Arrays] = ()) -> None:
    """Hold a pass to what it says of itself, to idempotence, and to the law of its effect.

    Raises:
        BrokenPass: It breaks one.
        Refused: The law needs the model to run, and it does not.
    """
    if outcome(step, path) is None:
        return
    samples: list[Arrays | None] = [*inputs]
    for sample in samples or [None]:
        model = give(step, load(path))
        witness, result = laws.Witness(step, model, sample), step(model)
        witness.hold(cast("Result", result))


def hold_validity(step: Pass, path: Path) -> None:
    """Hold a pass to leaving models valid, and inputs, outputs and imports as they are.

    What is no valid model may become one.

    Raises:
        BrokenPass: It does not.
    """
    model = load(path)
    before = problem(model), interface(model), dict(model.opset_imports)
    result = outcome(step, path)
    if result is not None:
        after = result.model
        contract = interface(after, dict.fromkeys(result.retyped, ir.DataType.FLOAT))
        found = problem(after), contract, dict(after.opset_imports)
        for what, old, new in zip(
            ("validity", "interface", "imports"), before, found, strict=True
        ):
            mended = what == "validity" and new is None
            _claim(mended or old == new, f"{step.name} changes the {what}: {old}, then {new}")


def hold_account(step: Pass, path: Path) -> None:
    """Hold a pass to saying of every weight what became of it, once.

    Raises:
        BrokenPass: It does not.
    """
    result = outcome(step, path)
    if result is None:
        return
    told = [(f.where, f.nbytes) for f in result.findings if f.fate is not None and not f.op]
    if not any(finding.fate for finding in result.findings):
        silent = step.effect in (Effect.CHECK, Effect.LAYOUT)
        _claim(silent, f"{step.name} says of no weight what became of it")
        return
    there = [(weight.where, weight.nbytes) for weight in Weights(load(path))]
    unlike = sorted({*told} ^ {*there}) or sorted(told)
    _claim(
        sorted(told) == sorted(there), f"{step.name} says nothing, or twice, of {unlike[:3]}"
    )


def hold_written(
    step: Pass,
    path: Path,
    folder: Path,
    inputs: Iterable[Arrays] = (),
    run: Run = run_in_child,
) -> None:
    """Hold what a pass made to being written, read again, and run to outputs of one kind.

    Args:
        step: The pass.
        path: The model.
        folder: Where to write.
        inputs: What to run it on.
        run: Runs a model.

    Raises:
        BrokenPass: It is not.
    """
    result = outcome(step, path)
    if result is None:
        return
    target = folder / "out.onnx"
    save(result.model, target)
    same = laws.payloads(load(target)) == laws.payloads(result.model)
    _claim(same, f"{step.name} makes weights that are others when they are read again")
    if result.retyped or computes_in(load(target)):  # half precision, as no processor computes
        model = load(target)
        emulate(model)
        target = folder / "emulated.onnx"
        save(model, target)
    for sample in inputs:
        kinds = [
            {name: (array.shape, array.dtype) for name, array in run(each, sample).items()}
            for each in (path, target)
        ]
        _claim(
            kinds[0] == kinds[1], f"{step.name} changes outputs: {kinds[0]}, then {kinds[1]}"
        )


def hold_text(step: Pass) -> None:
    """Hold a pass to being what its own text gives.

    Raises:
        BrokenPass: It is not.
    """
    for text in (str(step), str(step.spec(full=True))):
        _claim(parse(text) == (step,), f"{text} does not give the pass it is the text of")


def _claim(truth: bool, otherwise: str) -> None:
    if not truth:
        raise BrokenPass(otherwise)


_PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[n, 32] x, int64[m] ids) => (float[n, 32] y, float[m, 32] rows)
<float[32, 32] w, float[32] b, float[64, 32] table, float eps = {0.00001}> {
    h = MatMul(x, w)
    c = Add(h, b)
    s = Add(c, eps)
    t = Tanh(s)
    y = MatMul(t, w)
    rows = Gather(table, ids)
}
"""
_HIDDEN = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
hidden (float[n, 32] x, bool flag) => (float[n, 32] y) <float[32, 32] outer> {
    z = If (flag) <
        then_branch = then () => (float[n, 32] a) <float[32, 32] inner> {
            i = MatMul(x, inner)
            a = MatMul(i, outer)
        },
        else_branch = else () => (float[n, 32] b) {
            c = Constant <value = float[32] {WORDS}> ()
            b = Mul(x, c)
        }
    >
    y = local.twice (z)
}
<domain: "local", opset_import: ["" : 17]>
twice (v) => (w) {
    two = Constant <value = float[32] {WORDS}> ()
    w = Mul(v, two)
}
"""


def models() -> list[Path]:
    """A few small models with weights in the places where weights hide.

    In initializers, twice used; in a body of If, a Constant node and a function; in a data
    file. They are gone when the process ends; do not write beside them.
    """
    return [*_made()]


@cache
def _made() -> tuple[Path, ...]:
    folder = Path(tempfile.mkdtemp(prefix="onnxforge-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    plain, hidden, external = (
        folder / f"{name}.onnx" for name in ("plain", "hidden", "external")
    )
    words = ", ".join(f"{number / 7:.6f}" for number in range(1, 33))
    for path, text in ((plain, _PLAIN), (hidden, _HIDDEN.replace("WORDS", words))):
        save(from_proto(_filled(onnx.parser.parse_model(text))), path)
    save(load(plain), external, layout="sidecar")
    return plain, hidden, external


def _filled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make weights, with values that one can tell apart, of the names that have none."""
    for graph in (model.graph, *(a.g for node in model.graph.node for a in node.attribute)):
        for value in graph.value_info:
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            values = np.sin(np.arange(1, np.prod(dims, dtype=int) + 1)).reshape(dims) / 4
            array = values.astype(np.float32)
            graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        del graph.value_info[:]
    return model
