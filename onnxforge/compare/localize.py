"""Finding out where in a model error enters.

Both models are run in pieces of some tens of nodes, in which every value is an output. A piece
of the candidate is run twice: on what the candidate made of the sample so far, which shows
the error that has piled up, and with every value taken from the reference, which shows what
the nodes between two values add by themselves. A value that is an output cannot be fused
away, so fusions across it do not happen here; what they change is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxforge.compare.evidence import LayerEvidence, Localization
from onnxforge.compare.outputs import distance, is_real
from onnxforge.compare.pieces import Pieces
from onnxforge.errors import RuntimeFailed
from onnxforge.runtime.session import ArrayFile, Session, Setup
from onnxforge.walk import label

__all__ = ["Half", "localize"]

_FIRST = 32  # values in the first piece
_GROWTH = 4
_BUDGET = 128 << 20  # bytes that the values in a piece should take
_Files = Mapping[str, ArrayFile]


@dataclass(frozen=True)
class Half:
    """One of the two models.

    Attributes:
        model: The model.
        feeds: The sample, as this model takes it.
        setup: How it is run.
    """

    model: ir.Model
    feeds: _Files
    setup: Setup


def localize(
    reference: Half,
    candidate: Half,
    sample: str,
    folder: Path,
    progress: Callable[[int], None],
) -> Localization:
    """Compare the values inside two models and rank them by the error that enters there.

    Values correspond if they have the same name, or come from nodes of the same name and
    operator. Those in bodies of If, Loop and Scan and those that depend on no input are left
    out. What is no tensor of real numbers is passed over.

    Args:
        reference: The right model.
        candidate: The model to judge.
        sample: Name of the sample.
        folder: An empty folder for pieces and values; it never holds all of them.
        progress: Told how many values were compared so far.
    """
    sides = _Side(reference, folder / "reference"), _Side(candidate, folder / "candidate")
    pairs = _pairs(sides[0].pieces, sides[1].pieces)
    twins = set(pairs.values())
    work = _Walk(*sides, pairs)
    layers = []
    for layer in work.layers():
        layers.append(layer)
        progress(len(layers))
    found = [layer for layer in layers if not (layer.entered.equal and layer.reached.equal)]
    return Localization(
        sample=sample,
        walked=len(layers),
        layers=tuple(sorted(found, key=lambda layer: (layer.entered.sqnr_db, layer.index))),
        only_reference=tuple(n for n in sides[0].pieces.made if n not in pairs),
        only_candidate=tuple(n for n in sides[1].pieces.made if n not in twins),
        bodies=tuple(sides[0].pieces.bodies),
        failures=tuple(work.failures),
    )


def _pairs(reference: Pieces, candidate: Pieces) -> dict[str, str]:
    """Values of the candidate by the values of the reference that they correspond to."""
    pairs = {name: name for name in reference.made if name in candidate.made}
    left, right = _places(reference, pairs), _places(candidate, pairs)
    pairs |= {name: right[place] for place, name in left.items() if place in right}
    return {name: pairs[name] for name in reference.made if name in pairs}


def _places(pieces: Pieces, known: Mapping[str, str]) -> dict[tuple[str, str, int], str]:
    """Values without a partner, by the node that makes them, where it has a name."""
    return {
        (node.name, node.op_type, list(node.output).index(name)): name
        for name, (_, node) in pieces.made.items()
        if name not in known and node.name
    }


class _Side:
    """One model, and its values so far."""

    def __init__(self, half: Half, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._setup = half.setup
        self._runs = 0
        self.pieces = Pieces(half.model)
        self.values: dict[str, ArrayFile] = dict(half.feeds)

    def run(self, wanted: Mapping[str, str], values: _Files) -> dict[str, ArrayFile]:
        """Make some values from others; see `Pieces.piece`."""
        types = {name: file.dtype for name, file in values.items()}
        proto, inputs = self.pieces.piece(wanted, types)
        self._runs += 1
        folder = self._folder / str(self._runs)
        folder.mkdir()
        path = folder / "piece.onnx"
        path.write_bytes(proto.SerializeToString())
        with Session(path, folder, self._setup, data=self.pieces.folder) as session:
            return session.run({name: values[name] for name in inputs})

    def as_mine(self, name: str, file: ArrayFile) -> ArrayFile:
        """A value of the other model in the type that it has in this one."""
        dtype = self.values[name].dtype
        if file.dtype == dtype:
            return file
        path = file.path.with_name(f"cast-{file.path.name}")
        return ArrayFile.write(path, file.open().astype(dtype.numpy()))

    def forget(self, kept: set[str]) -> None:
        """Delete the values that are not among those kept."""
        for name in [n for n in self.values if n not in kept]:
            file = self.values.pop(name)
            if file.path.is_relative_to(self._folder):
                file.path.unlink()


class _Walk:
    """Goes through both models, piece by piece.

    Attributes:
        failures: What could not be compared.
    """

    def __init__(self, reference: _Side, candidate: _Side, pairs: Mapping[str, str]) -> None:
        self._reference = reference
        self._candidate = candidate
        self._pairs = pairs
        self._feeds = dict(candidate.values)
        self.failures: list[str] = []

    def layers(self) -> Iterator[LayerEvidence]:
        """Every pair of values, in order of the reference."""
        ahead, size = list(self._pairs), _FIRST
        while ahead:
            group, ahead = ahead[:size], ahead[size:]
            try:
                made = self._make(group)
                yield from self._compare(made)
            except RuntimeFailed as error:
                made = []
                self.failures.append(f"{group[0]} to {group[-1]}: {error}")
            used = sum(self._reference.values[name].path.stat().st_size for name in made)
            fitting = len(made) * _BUDGET // max(1, used) if made else size
            size = max(1, min(fitting, size * _GROWTH))
            self._forget(ahead)

    def _make(self, group: list[str]) -> list[str]:
        """Run both models on; gives the values that are there in both, as real numbers."""
        twins = [self._pairs[name] for name in group]
        left = self._reference.run({n: n for n in group}, self._reference.values)
        right = self._candidate.run({n: n for n in twins}, self._candidate.values)
        made = [
            n for n in group if is_real(left.get(n)) and is_real(right.get(self._pairs[n]))
        ]
        self._reference.values |= {n: left[n] for n in made}
        self._candidate.values |= {self._pairs[n]: right[self._pairs[n]] for n in made}
        return made

    def _compare(self, made: list[str]) -> Iterator[LayerEvidence]:
        entered = self._entered(made)
        for name in made:
            expected = self._reference.values[name]
            found = self._candidate.values[self._pairs[name]], entered[self._pairs[name]]
            shapes = [file.open().shape for file in (expected, *found)]
            if len(set(shapes)) > 1:
                self.failures.append(f"{name}: has the shapes {shapes[0]} and {shapes[1]}")
                continue
            reached, added = (distance(expected, file).result() for file in found)
            found[1].path.unlink()
            index, node = self._reference.pieces.made[name]
            where = label(node, index)
            yield LayerEvidence(name, where, node.op_type, index, added, reached)

    def _entered(self, made: list[str]) -> dict[str, ArrayFile]:
        """What the candidate makes of the reference's values."""
        mine = self._candidate
        twins = {
            self._pairs[n]: f for n, f in self._reference.values.items() if n in self._pairs
        }
        names = {self._pairs[name]: f"{self._pairs[name]}//entered" for name in made}
        needed = mine.pieces.needs(names, {**self._feeds, **twins})
        given = {
            n: mine.as_mine(n, twins[n]) if n in twins else self._feeds[n] for n in needed
        }
        outputs = mine.run(names, given)
        for name in needed & twins.keys():
            if given[name] is not twins[name]:
                given[name].path.unlink()
        return {name: outputs[output] for name, output in names.items()}

    def _forget(self, ahead: list[str]) -> None:
        """Delete the values that nothing ahead is made of."""
        left, right = self._reference, self._candidate
        kept = left.pieces.needs(ahead, left.values)
        twins = right.pieces.needs([self._pairs[n] for n in ahead], right.values)
        kept |= {name for name, twin in self._pairs.items() if twin in twins}
        left.forget(kept)
        right.forget(twins | {self._pairs[name] for name in kept if name in self._pairs})
