"""The command line; the only package that prints or exits."""

from __future__ import annotations

import gc
import logging
import sys
import traceback
from typing import TYPE_CHECKING

import click

from onnxforge.cli.build import build
from onnxforge.cli.calibrate import calibrate
from onnxforge.cli.emulate import emulate
from onnxforge.cli.lint import lint
from onnxforge.cli.look import explain, inspect_model, list_passes
from onnxforge.cli.proof import compare, verify
from onnxforge.cli.run import run
from onnxforge.cli.support import support
from onnxforge.errors import CheckFailed, OnnxforgeError, SpecError, said
from onnxforge.interrupts import Interrupted, interruptible
from onnxforge.postponed import postponed
from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_FAILED_CHECK, _FAILED_RUN, _INTERRUPTED = 1, 2, 130
# Sums of symbolic dimensions: a fifth of a second for what no command needs.
_ALGEBRA = "sympy", "onnx_ir._symbolic_shapes"
_LONGEST, _END = 2000, 500  # characters of a message, and of its end

_EXAMPLES = """\b
Examples:
  onnxforge run --passes 'fp16w,assert-pure' in.onnx out.onnx
  onnxforge compare in.onnx out.onnx --random 4
  onnxforge explain fp16w
  onnxforge build
  onnxforge lint .
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXAMPLES)
@click.version_option(package_name="onnxforge")
def _cli() -> None:
    """Turn an exported ONNX model into the tiers a publisher ships."""


for _command in (
    run,
    list_passes,
    explain,
    inspect_model,
    compare,
    verify,
    calibrate,
    build,
    lint,
    emulate,
    support,
):
    _cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check said no, 2 the run itself failed."""
    # Collecting while modules load, and again at exit, takes a third of a short run.
    gc.disable()
    try:
        with interruptible(), postponed(*_ALGEBRA):
            sys.exit(_exit_code(arguments))
    except Interrupted as end:  # before the command began, or when it had ended
        sys.exit(end.exit_code)
    finally:
        gc.freeze()
        gc.enable()


def _exit_code(arguments: Sequence[str] | None) -> int:
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # what matters, we say ourselves
    try:
        done = _cli.main(args=arguments, prog_name="onnxforge", standalone_mode=False)
    except click.exceptions.Abort as end:
        return getattr(end.__cause__, "exit_code", _INTERRUPTED)
    except click.ClickException as error:
        error.show()
        return _FAILED_RUN
    except SystemExit:  # click's answer to a closed pipe: the reader has seen enough
        return _FAILED_RUN
    except OnnxforgeError as error:
        text = f"onnxforge: {error}"
        lines = text.split("\n") if isinstance(error, CheckFailed | SpecError) else [text]
        click.echo("\n".join(_shortened(printable(line)) for line in lines), err=True)
        return _FAILED_CHECK if isinstance(error, CheckFailed) else _FAILED_RUN
    except OSError as error:  # a full disk, a folder that may not be written, ...
        click.echo(_shortened(printable(f"onnxforge: {said(error)}")), err=True)
        return _FAILED_RUN
    except Exception as bug:  # exit 1 would mean that a check said no
        traceback.print_exc()
        raise SystemExit(_FAILED_RUN) from bug
    return done if isinstance(done, int) else 0  # a command may have an answer of its own


def _shortened(line: str) -> str:
    """Names in models may have any number of characters; the reason stands at the end."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - _END]} ... {line[-_END:]}"
