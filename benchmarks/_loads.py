"""Loading and running many models on one release, whatever becomes of the process."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().with_name("_load_child.py")

Order = tuple[Path, Sequence[Path]]
"""A model, and archives of inputs for it, one for each run."""

Failure = tuple[str, str]
"""``load``, ``run`` or ``crash``, and what was said."""


def kernels(python: Path) -> dict[str, Any]:
    """Kernels and operators of a release, as its own registries tell them."""
    command = [str(python), "-I", str(CHILD), "--kernels"]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def failures(python: Path, orders: Sequence[Order]) -> list[Failure | None]:
    """What fails of each order, None where nothing does; a crash is an answer too."""
    found: list[Failure | None] = []
    while len(found) < len(orders):
        child = subprocess.Popen(
            [str(python), "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        lines = (
            json.dumps([str(model), list(map(str, inputs))]) + "\n"
            for model, inputs in orders[len(found) :]
        )
        answers = child.communicate("".join(lines))[0].splitlines()
        found += [None if text == "null" else tuple(json.loads(text)) for text in answers]
        if len(found) < len(orders):
            code = child.returncode
            found.append(("crash", signal.Signals(-code).name if code < 0 else str(code)))
    return found
