"""How far recognised texts are from the ones they should be: words, characters, bytes."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from onnxforge.errors import OnnxforgeError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

__all__ = [
    "ClipText",
    "TextErrors",
    "TextEvidence",
    "compare_texts",
    "normalized",
    "read_texts",
]

_IDS: Final = ("id", "clip")
_SHOWN: Final = 5


@dataclass(frozen=True)
class TextErrors:
    """Errors of a text, or of many together.

    Errors are the fewest insertions, deletions and substitutions that turn the reference into
    the hypothesis (Levenshtein, Binary codes capable of correcting deletions, insertions, and
    reversals, 1966). Their sum is unique; which of several shortest ways is taken, and with
    that the three parts, is rapidfuzz's choice, as it is jiwer's.

    Attributes:
        words: Words of the reference: what stands between white space.
        substitutions: Words of the reference that became another one.
        deletions: Words of the reference that are missing.
        insertions: Words that the reference has not.
        characters: Code points of the reference, white space among them.
        distance: Levenshtein distance in code points.
        wer: Word error rate ``(substitutions + deletions + insertions) / words``, as NIST's
            sclite counts it; it can exceed 1. 0 where neither side has a word, None where only
            the hypothesis has: the rate is not defined.
        cer: Character error rate ``distance / characters``, with the same rules; the one that
            counts for languages without spaces, where a sentence is one word.
    """

    words: int
    substitutions: int
    deletions: int
    insertions: int
    characters: int
    distance: int
    wer: float | None = field(init=False)
    cer: float | None = field(init=False)

    def __post_init__(self) -> None:
        wrong = self.substitutions + self.deletions + self.insertions
        object.__setattr__(self, "wer", _rate(wrong, self.words))
        object.__setattr__(self, "cer", _rate(self.distance, self.characters))


@dataclass(frozen=True)
class ClipText:
    """The texts of one clip beside each other.

    Attributes:
        byte_exact: Whether the texts are the same, to the byte.
        strict: Errors of the texts as they are.
        normalized: Errors of the texts without case and punctuation, see ``normalized``.
    """

    byte_exact: bool
    strict: TextErrors
    normalized: TextErrors


@dataclass(frozen=True)
class TextEvidence:
    """All clips, and all of them as one text.

    Rates over all clips are the sum of errors over the sum of words, as corpora are scored,
    not a mean of rates. So what is recognised in a clip without speech counts as well.

    Attributes:
        clips: Each clip by its id, in the order of the reference.
        byte_exact: How many clips are the same, to the byte.
        strict: Errors of the texts as they are.
        normalized: Errors of the texts without case and punctuation.
    """

    clips: Mapping[str, ClipText]
    byte_exact: int
    strict: TextErrors
    normalized: TextErrors


_COUNTS: Final = [each.name for each in fields(TextErrors) if each.init]


def normalized(text: str) -> str:
    """Fold case and width, and take punctuation and superfluous white space out.

    Compatible characters become one (Unicode NFKC, Standard Annex 15), case is folded, then
    all of category P goes, so that ``it's`` becomes ``its``, and white space becomes one
    blank. Symbols such as ``$`` stay; digits are not spelled out.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(char for char in folded if unicodedata.category(char)[0] != "P")
    # What a punctuation mark kept apart may compose only now.
    return " ".join(unicodedata.normalize("NFKC", kept).split())


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read texts from JSON lines such as ``{"id": "clip-1", "text": "So it is."}``.

    The id is under ``id`` or ``clip``, a text or a number; other keys are of no interest.

    Returns:
        The text of each clip, in the order of the file.

    Raises:
        OnnxforgeError: The file cannot be read, a line is none of these, or ids are not
            unique.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise OnnxforgeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OnnxforgeError(f"{path}: not UTF-8 ({error.reason})") from None
    texts: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            _add(texts, line, f"{path}, line {number}")
    return texts


def compare_texts(reference: Mapping[str, str], hypothesis: Mapping[str, str]) -> TextEvidence:
    """Compare texts clip by clip, and all together.

    Args:
        reference: The right text of each clip.
        hypothesis: The text to judge of the same clips, in any order.

    Raises:
        OnnxforgeError: A clip is on one side only, or rapidfuzz is missing.
    """
    for here, there, side in (
        (reference, hypothesis, "hypothesis"),
        (hypothesis, reference, "reference"),
    ):
        if missing := [name for name in here if name not in there]:
            raise OnnxforgeError(f"the {side} lacks {_few(missing)}")
    clips = {}
    for name, text in reference.items():
        heard = hypothesis[name]
        clips[name] = ClipText(
            byte_exact=text == heard,
            strict=_errors(text, heard),
            normalized=_errors(normalized(text), normalized(heard)),
        )
    return TextEvidence(
        clips=clips,
        byte_exact=sum(clip.byte_exact for clip in clips.values()),
        strict=_together(clip.strict for clip in clips.values()),
        normalized=_together(clip.normalized for clip in clips.values()),
    )


def _add(texts: dict[str, str], line: str, where: str) -> None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise OnnxforgeError(f"{where}: not JSON ({error.msg})") from None
    found = entry if isinstance(entry, dict) else {}
    name = next((found[key] for key in _IDS if key in found), None)
    text = found.get("text")
    if not isinstance(name, str | int) or not isinstance(text, str):
        wanted = '{"id": ..., "text": "..."}'
        raise OnnxforgeError(f"{where}: wanted {wanted}, seen {line.strip()[:80]}")
    if str(name) in texts:
        raise OnnxforgeError(f"{where}: a second text of {str(name)!r}")
    texts[str(name)] = text


def _few(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _errors(reference: str, hypothesis: str) -> TextErrors:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise OnnxforgeError("rapidfuzz is missing: pip install 'onnxforge[asr]'") from None
    words = reference.split()
    tags = [edit.tag for edit in Levenshtein.editops(words, hypothesis.split())]
    return TextErrors(
        words=len(words),
        substitutions=tags.count("replace"),
        deletions=tags.count("delete"),
        insertions=tags.count("insert"),
        characters=len(reference),
        distance=Levenshtein.distance(reference, hypothesis),
    )


def _together(parts: Iterable[TextErrors]) -> TextErrors:
    every = list(parts)
    return TextErrors(**{name: sum(getattr(part, name) for part in every) for name in _COUNTS})


def _rate(errors: int, of: int) -> float | None:
    if of:
        return errors / of
    return None if errors else 0.0
