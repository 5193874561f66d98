"""The newest IR version and ai.onnx operator set that each onnxruntime loads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnxforge.errors import SpecError
from onnxforge.runtime.kernels import limit, number, releases

__all__ = ["OLDEST", "Ceiling", "ceiling"]

OLDEST = releases()[0]
"""The oldest release that is in the tables."""

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(?:\d+|x|\*))?", re.ASCII)


@dataclass(frozen=True)
class Ceiling:
    """What an onnxruntime release loads at most.

    Attributes:
        release: The release the numbers are of, such as ``1.17``; they hold for all its
            patch releases.
        max_ir: Newest IR version.
        max_opset: Newest ai.onnx operator set.
        is_known: False if a release newer than the tables was asked for; the numbers are then
            those of the newest release in them, and the true ones are no lower.
    """

    release: str
    max_ir: int
    max_opset: int
    is_known: bool = True


def ceiling(version: str) -> Ceiling:
    """What the onnxruntime of a version loads at most.

    Args:
        version: ``1.17``, ``1.17.x`` or ``1.17.3``; patch releases do not differ.

    Raises:
        SpecError: The text is no version, or the version is older than the tables.
    """
    newest = releases()[-1]
    match = _VERSION.fullmatch(version)
    if match is None:
        raise SpecError(f"{version!r} is no onnxruntime version such as {OLDEST}")
    asked = int(match[1]), int(match[2])
    if asked < number(OLDEST):
        raise SpecError(f"onnxruntime {version} is not known; the oldest known is {OLDEST}")
    is_known = asked <= number(newest)
    release = f"{asked[0]}.{asked[1]}" if is_known else newest
    return Ceiling(release, limit(release) or 0, limit(release, "") or 0, is_known)
