"""What a pass that changes nothing makes of models: `tests/sweeps/fidelity.py [MODEL...]`.

Sends every model that onnx tests its backends with, and those given, through such a pass, from
file to file and in memory, and counts those that are equal afterwards and those refused, by
reason. Exits with 1 if any is different.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.unchanged import EQUAL, backend_models, from_file_to_file, from_proto_to_proto


def models(given: list[str], folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield the kind, the name and the path of every model."""
    for name, path in backend_models(folder):
        yield "made by onnx" if name.startswith("node/") else "in the wheel", name, path
    for name in given:
        yield "given", name, Path(name)


def main(given: list[str]) -> int:
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    counts: Counter[tuple[str, str, str]] = Counter()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, path in models(given, Path(folder)):
            proto = onnx.load(path, load_external_data=False)
            found = {
                "file": from_file_to_file(path, Path(folder)),
                "proto": from_proto_to_proto(proto, path.parent),
            }
            for door, told in found.items():
                counts[kind, door, told.partition(":")[0]] += 1
                if told != EQUAL:
                    lines.append(f"{told} - {door} of {name}")
    lines = [*sorted(lines), *(f"{n:6} {', '.join(k)}" for k, n in sorted(counts.items()))]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(told == "different" for _, _, told in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
