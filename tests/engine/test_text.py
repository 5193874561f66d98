"""Word and character errors against a plain Levenshtein, counted by hand and by jiwer."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxforge.errors import OnnxforgeError
from onnxforge.numerics.text import (
    TextErrors,
    compare_texts,
    normalized,
    read_texts,
)

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHORT = st.text("ab ", max_size=12)
PAIRS = st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.tuples(SHORT, SHORT))


def distance(left: Sequence[object], right: Sequence[object]) -> int:
    row = [*range(len(right) + 1)]
    for i, a in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def wrong(errors: TextErrors) -> int:
    return errors.substitutions + errors.deletions + errors.insertions


def one(reference: str, hypothesis: str) -> TextErrors:
    return compare_texts({"a": reference}, {"a": hypothesis}).strict


def test_errors_counted_by_hand() -> None:
    found = compare_texts({"a": "So it is, Ann."}, {"a": "so it was Ann"})
    clip = found.clips["a"]
    assert not clip.byte_exact
    # So -> so, is, -> was, Ann. -> Ann; the comma and the dot are characters as well.
    assert clip.strict == found.strict == TextErrors(4, 3, 0, 0, 14, 5)
    assert (clip.strict.wer, clip.strict.cer) == (3 / 4, 5 / 14)
    assert clip.normalized == TextErrors(4, 1, 0, 0, 12, 2)
    assert one("one two three", "one three") == TextErrors(3, 0, 1, 0, 13, 4)
    assert one("one three", "one two three") == TextErrors(2, 0, 0, 1, 9, 4)


def test_what_has_no_spaces_is_one_word_and_counts_by_characters() -> None:
    found = one("砸自己的脚", "自己的脚步")
    assert found == TextErrors(1, 1, 0, 0, 5, 2)
    assert (found.wer, found.cer) == (1, 2 / 5)


def test_rates_of_all_are_sums_over_sums() -> None:
    reference = {"long": "a b c d e f g h", "short": "a"}
    found = compare_texts(reference, {"short": "b", "long": "a b c d e f g h"})
    assert found.strict.wer == 1 / 9
    assert found.byte_exact == 1
    assert [*found.clips] == ["long", "short"]


def test_a_reference_without_words_has_no_rate_but_its_errors_count() -> None:
    silent = one("", "um er")
    assert (silent.wer, silent.cer, silent.insertions, silent.distance) == (None, None, 2, 5)
    assert (one("", "").wer, one(" ", "").wer, one("a", "").wer) == (0, 0, 1)
    both = compare_texts({"a": "", "b": "x y"}, {"a": "um", "b": "x y"})
    assert both.strict.wer == 1 / 2
    assert compare_texts({}, {}).strict.wer == 0


@given(PAIRS)
def test_counts_are_those_of_a_plain_levenshtein(pairs: dict[str, tuple[str, str]]) -> None:
    reference = {name: pair[0] for name, pair in pairs.items()}
    hypothesis = {name: pair[1] for name, pair in reversed(pairs.items())}
    found = compare_texts(reference, hypothesis)
    for name, (ref, hyp) in pairs.items():
        strict = found.clips[name].strict
        assert wrong(strict) == distance(ref.split(), hyp.split())
        assert strict.distance == distance(ref, hyp)
        assert strict.words - strict.deletions + strict.insertions == len(hyp.split())
        assert found.clips[name].byte_exact == (ref.encode() == hyp.encode())
    assert wrong(found.strict) == sum(wrong(clip.strict) for clip in found.clips.values())
    assert found.strict.words == sum(len(ref.split()) for ref in reference.values())


@given(st.lists(st.tuples(st.text("ab ").filter(str.strip), SHORT), min_size=1))
def test_jiwer_finds_the_same(pairs: list[tuple[str, str]]) -> None:
    reference, hypothesis = ({str(i): p[k] for i, p in enumerate(pairs)} for k in (0, 1))
    found = compare_texts(reference, hypothesis).strict
    theirs = jiwer.process_words([*reference.values()], [*hypothesis.values()])
    assert found.wer == theirs.wer
    ours = found.substitutions, found.deletions, found.insertions
    assert ours == (theirs.substitutions, theirs.deletions, theirs.insertions)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  So it\tis,\nANN!  ", "so it is ann"),
        ("Straße ﬁne \uff21\uff11", "strasse fine a1"),
        ("他说\uff1a“是。”", "他说是"),
        ("it's 5 $ \u2013 or £3", "its 5 $ or £3"),
        ("e\u2019\N{COMBINING ACUTE ACCENT}", "é"),
        ("⑴…", "1"),
    ],
)
def test_normalized_has_neither_case_nor_punctuation(text: str, wanted: str) -> None:
    assert normalized(text) == wanted


@given(ANY)
def test_normalized_twice_is_normalized_once(text: str) -> None:
    assert normalized(normalized(text)) == normalized(text)
    found = compare_texts({"a": text}, {"a": normalized(text)})
    assert found.normalized.distance == 0


def test_evidence_is_plain_data() -> None:
    told = json.dumps(dataclasses.asdict(compare_texts({"a": "b"}, {"a": "c"})))
    assert json.loads(told)["clips"]["a"]["strict"]["wer"] == 1


def lines(folder: Path, *texts: str) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_texts_are_read_as_they_are(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        '\N{ZERO WIDTH NO-BREAK SPACE}{"id": "b", "text": " So\\n", "seconds": 3}',
        "",
        '{"text": "脚\N{LINE SEPARATOR}", "clip": 7}',
    )
    assert read_texts(path) == {"b": " So\n", "7": "脚\N{LINE SEPARATOR}"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "text"}', "line 2: not JSON"),
        ("[]", "line 2: wanted"),
        ('{"text": "b"}', "line 2: wanted"),
        ('{"id": "b", "text": null}', "line 2: wanted"),
        ('{"clip": "a", "text": "b"}', "line 2: a second text of 'a'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = lines(tmp_path, '{"id": "a", "text": "b"}', line)
    with pytest.raises(OnnxforgeError, match=message) as caught:
        read_texts(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    with pytest.raises(OnnxforgeError, match=r"texts\.jsonl: No such file"):
        read_texts(path)
    path.write_bytes(b'{"id": "a", "text": "\xff"}')
    with pytest.raises(OnnxforgeError, match="not UTF-8"):
        read_texts(path)


def test_clips_of_one_side_only_are_named() -> None:
    many = {str(number): "" for number in range(7)}
    with pytest.raises(
        OnnxforgeError, match="the hypothesis lacks '1', '2', '3', '4', '5' and"
    ):
        compare_texts(many, {"0": ""})
    with pytest.raises(OnnxforgeError, match="the reference lacks '0', '1'"):
        compare_texts({}, many)


def test_without_rapidfuzz_the_command_to_install_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(OnnxforgeError, match=r"pip install 'onnxforge\[asr\]'"):
        one("a", "b")
