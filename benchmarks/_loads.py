"""Loading many models on one release of onnxruntime, whatever becomes of the process."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().with_name("_load_child.py")


def kernels(python: Path) -> dict[str, Any]:
    """Kernels and operators of a release, as its own registries tell them."""
    command = [str(python), "-I", str(CHILD), "--kernels"]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def errors(python: Path, models: Iterable[Path]) -> list[str | None]:
    """What a release says to each model, None where it loads it; a crash is an answer too."""
    waiting = list(models)
    found: list[str | None] = []
    while len(found) < len(waiting):
        child = subprocess.Popen(
            [str(python), "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        orders = "".join(f"{path}\n" for path in waiting[len(found) :])
        answers = child.communicate(orders)[0].splitlines()
        found += map(json.loads, answers)
        if len(found) < len(waiting):
            code = child.returncode
            found.append(f"died with {signal.Signals(-code).name if code < 0 else code}")
    return found
