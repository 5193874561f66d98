"""How far two sets of graphs of a language model part when they decode.

A language model is gated without its application: the reference decodes, the candidate is fed
the same tokens, so that logits can be compared step by step, and then decodes by itself.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import OnnxforgeError
from onnxforge.numerics.metrics import Accumulator, Comparison
from onnxforge.numerics.ranking import Ranker, Ranking
from onnxforge.runtime.decoder import Decoded, Decoder, Prompt, decode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ClipDecode",
    "DecodeEvidence",
    "Decoder",
    "Loop",
    "Prompt",
    "Step",
    "compare_decoders",
    "find_loop",
    "generate",
]


@dataclass(frozen=True)
class Step:
    """One step at which both sides have seen the same tokens.

    Attributes:
        token: What both are fed next.
        reference: The reference's choice.
        candidate: The candidate's choice.
        max_abs: Largest difference of logits; None, as what follows, where a graph chooses by
            itself and gives none.
        margin: How far the candidate's choice lies, in the reference's logits, below the
            reference's own.
        kl: Kullback-Leibler divergence of their softmaxes, see ``Ranking``.
    """

    token: int
    reference: int
    candidate: int
    max_abs: float | None = None
    margin: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Loop:
    """Tokens that a sequence repeats.

    Attributes:
        start: Where the first of them stands.
        period: How many are repeated.
        repeats: How often they stand there in full.
    """

    start: int
    period: int
    repeats: int


@dataclass(frozen=True)
class ClipDecode:
    """Two decoders on one prompt.

    Attributes:
        steps: Teacher-forced: what happened at each step.
        reference: Free-running: what the reference chose, an end token included.
        candidate: What the candidate chose.
        divergence: The first place where these differ, None where they do not.
        reference_ended: Whether an end token was reached, not ``max_tokens``.
        candidate_ended: The same of the candidate.
        reference_loop: Where it repeats itself, see ``find_loop``.
        candidate_loop: The same of the candidate.
    """

    steps: tuple[Step, ...]
    reference: tuple[int, ...]
    candidate: tuple[int, ...]
    divergence: int | None
    reference_ended: bool
    candidate_ended: bool
    reference_loop: Loop | None
    candidate_loop: Loop | None


@dataclass(frozen=True)
class DecodeEvidence:
    """Two decoders on all prompts.

    Attributes:
        clips: Each prompt by its id.
        steps: Teacher-forced steps.
        mismatches: Steps at which the sides chose differently.
        diverged: Prompts on which free running differs.
        logits: All logits of these steps; None, as ``ranking``, where a graph gives none.
        ranking: The choices that they make.
    """

    clips: Mapping[str, ClipDecode]
    steps: int
    mismatches: int
    diverged: int
    logits: Comparison | None
    ranking: Ranking | None


def generate(decoder: Decoder, prompts: Mapping[str, Prompt]) -> dict[str, tuple[int, ...]]:
    """Decode, and return the tokens chosen after each prompt, an end token included.

    Raises:
        OnnxforgeError: An input is fed by nothing, or a name is wrong.
        RuntimeFailed: onnxruntime is missing, raised, or crashed.
    """
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
        decoded = decode(decoder, prompts.values(), Path(folder, "decoded"))
        return {name: tuple(one.free) for name, one in zip(prompts, decoded, strict=True)}


def compare_decoders(
    reference: Decoder,
    candidate: Decoder,
    prompts: Mapping[str, Prompt],
    *,
    tokens: Mapping[str, Sequence[int]] | None = None,
    scratch: Path | None = None,
) -> DecodeEvidence:
    """Decode with both sides, one after the other, fed the same tokens and freely.

    Args:
        reference: The right graphs.
        candidate: The graphs to judge.
        prompts: What to start from, by id.
        tokens: What to feed after each prompt; None for what the reference chooses.
        scratch: Folder for caches and for the logits of both sides meanwhile, four bytes for
            each word of the vocabulary at each step; None for the system's temporary folder.

    Raises:
        OnnxforgeError: An input is fed by nothing, a name is wrong, or the vocabularies of
            the sides differ in size.
        RuntimeFailed: onnxruntime is missing, raised, or crashed.
    """
    forced = None
    if tokens is not None:
        if missing := [name for name in prompts if name not in tokens]:
            raise OnnxforgeError(f"no tokens for the prompt {missing[0]!r}")
        forced = [tokens[name] for name in prompts]
    logits, ranker = Accumulator(), Ranker()
    clips = {}
    with tempfile.TemporaryDirectory(prefix="onnxforge-", dir=scratch) as folder:
        left = decode(reference, prompts.values(), Path(folder, "reference"), forced=forced)
        forced = [one.fed for one in left]
        right = decode(candidate, prompts.values(), Path(folder, "candidate"), forced=forced)
        for name, first, second in zip(prompts, left, right, strict=True):
            clips[name] = ClipDecode(
                steps=tuple(_steps(first, second, logits, ranker)),
                reference=tuple(first.free),
                candidate=tuple(second.free),
                divergence=_divergence(first.free, second.free),
                reference_ended=first.free[-1] in reference.eos,
                candidate_ended=second.free[-1] in candidate.eos,
                reference_loop=find_loop(first.free),
                candidate_loop=find_loop(second.free),
            )
    steps = [step for clip in clips.values() for step in clip.steps]
    ranking = ranker.result()
    return DecodeEvidence(
        clips=clips,
        steps=len(steps),
        mismatches=sum(step.reference != step.candidate for step in steps),
        diverged=sum(clip.divergence is not None for clip in clips.values()),
        logits=logits.result() if ranking.rows else None,
        ranking=ranking if ranking.rows else None,
    )


def find_loop(tokens: Sequence[int], repeats: int = 4) -> Loop | None:
    """Find where a sequence begins to repeat itself.

    Args:
        tokens: The sequence.
        repeats: How often the same tokens must follow each other to be a loop.

    Returns:
        The loop that begins first, of several the one with the shortest period.
    """
    loops = []
    for period in range(1, len(tokens) // repeats + 1):
        same = [a == b for a, b in zip(tokens, tokens[period:], strict=False)]
        for alike, run in itertools.groupby(enumerate(same), lambda pair: pair[1]):
            places = [place for place, _ in run]
            if alike and len(places) >= period * (repeats - 1):
                loops.append(Loop(places[0], period, len(places) // period + 1))
    return min(loops, key=lambda loop: (loop.start, loop.period), default=None)


def _steps(
    first: Decoded, second: Decoded, logits: Accumulator, ranker: Ranker
) -> Iterator[Step]:
    choices = zip(first.fed, first.chosen, second.chosen, strict=True)
    rows = zip(first.logits(), second.logits(), strict=True)
    for (token, ref, cand), (left, right) in zip(choices, rows, strict=True):
        if left is None or right is None:
            yield Step(token, ref, cand)
            continue
        if left.size != right.size:
            sizes = f"the reference has {left.size} logits, the candidate {right.size}"
            raise OnnxforgeError(f"{sizes}: not the same vocabulary")
        here, places = Accumulator(), Ranker()
        here.update(left, right)
        places.update(left, right)
        logits.merge(here)
        ranker.merge(places)
        found = places.result()
        yield Step(token, ref, cand, here.result().max_abs, found.margin, found.kl_max)


def _divergence(reference: Sequence[int], candidate: Sequence[int]) -> int | None:
    pairs = itertools.zip_longest(reference, candidate)
    return next((place for place, (ref, cand) in enumerate(pairs) if ref != cand), None)
