"""Modules that no command needs are not run, and work where they are needed."""

import subprocess
import sys
from pathlib import Path

from support import fixtures

CODE = """
import sys
from onnxforge.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
assert "onnx_ir" in sys.modules
assert "sympy.core" not in sys.modules
assert not any("postponed" in type(finder).__module__ for finder in sys.meta_path)
import onnx_ir as ir
print(ir.SymbolicDim("length") + 1)
"""


def test_a_run_does_without_symbolic_algebra_and_leaves_it_usable(tmp_path: Path) -> None:
    passes = "gather-int8,dynamic-int8,assert-pure"
    model = fixtures.built("merged_decoder")
    words = ["run", "--passes", passes, str(model), str(tmp_path / "out.onnx")]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "length + 1"
