"""The newest IR version and ai.onnx operator set that each onnxruntime loads."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from onnxforge.errors import SpecError

__all__ = ["NEWEST", "OLDEST", "Ceiling", "ceiling"]


@dataclass(frozen=True)
class Ceiling:
    """What an onnxruntime release loads at most.

    Attributes:
        release: The release the numbers are of, such as ``1.17``; they hold for all its
            patch releases.
        max_ir: Newest IR version.
        max_opset: Newest ai.onnx operator set.
        is_known: False if a release newer than the table was asked for; the numbers are then
            those of the newest release in it, and the true ones are no lower.
    """

    release: str
    max_ir: int
    max_opset: int
    is_known: bool = True


# From, IR, opset: found by loading models of every version on 1.17 to 1.31, on one patch
# release at least of each minor one. A release not listed equals the one before it.
_STEPS: tuple[tuple[tuple[int, int], int, int], ...] = (
    ((1, 17), 9, 20),
    ((1, 18), 10, 21),
    ((1, 21), 10, 22),
    ((1, 23), 11, 23),
    ((1, 24), 13, 25),
    ((1, 25), 13, 26),
)
_LAST = (1, 31)

OLDEST = "{}.{}".format(*_STEPS[0][0])
"""The oldest release that is in the table."""

NEWEST = "{}.{}".format(*_LAST)
"""The newest release that is in the table."""

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(?:\d+|x|\*))?", re.ASCII)


def ceiling(version: str) -> Ceiling:
    """What the onnxruntime of a version loads at most.

    Args:
        version: ``1.17``, ``1.17.x`` or ``1.17.3``; patch releases do not differ.

    Raises:
        SpecError: The text is no version, or the version is older than the table.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise SpecError(f"{version!r} is no onnxruntime version such as {OLDEST}")
    asked = int(match[1]), int(match[2])
    if asked < _STEPS[0][0]:
        raise SpecError(f"onnxruntime {version} is not known; the oldest known is {OLDEST}")
    _, max_ir, max_opset = max(step for step in _STEPS if step[0] <= asked)
    found = Ceiling(f"{asked[0]}.{asked[1]}", max_ir, max_opset)
    return found if asked <= _LAST else replace(found, release=NEWEST, is_known=False)
