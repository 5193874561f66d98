"""Pipeline text to data and back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxforge.errors import SpecError
from onnxforge.spec import OptionSpec, PassSpec, Pipeline, Word, parse

PIECES = [
    "{",
    "}",
    "=",
    ",",
    ";",
    '"',
    "\\",
    " ",
    "\n",
    "a",
    "b-c",
    "none",
    "()",
    "1.5GB",
    "é",
]

words = st.builds(Word, st.text(max_size=8), st.booleans())
options = st.builds(OptionSpec, words, st.lists(words, max_size=3).map(tuple))
passes = st.builds(
    PassSpec,
    words,
    st.lists(options, max_size=3, unique_by=lambda o: o.key.text.replace("-", "_")).map(tuple),
)
pipelines = st.builds(Pipeline, st.lists(passes, min_size=1, max_size=3).map(tuple))


def caret(text: str) -> tuple[str, str]:
    """The message for a bad text, and the characters it points at."""
    with pytest.raises(SpecError) as caught:
        parse(text)
    error = caught.value
    assert error.text == text
    assert 0 <= error.start <= error.end <= len(text)
    return str(error.args[0]), text[error.start : error.end]


def test_a_pipeline_is_passes_with_options() -> None:
    assert parse("fp16w{min_bytes=64KiB share skip=a,b}, assert-pure") == Pipeline(
        (
            PassSpec(
                Word("fp16w"),
                (
                    OptionSpec(Word("min_bytes"), (Word("64KiB"),)),
                    OptionSpec(Word("share")),
                    OptionSpec(Word("skip"), (Word("a"), Word("b"))),
                ),
            ),
            PassSpec(Word("assert-pure")),
        )
    )


def test_every_word_knows_where_it_stands() -> None:
    text = ' shard{ max_bytes = "1 GB" }'
    shard = parse(text).passes[0]
    option = shard.options[0]
    found = [shard.name, option.key, *option.values]
    assert [text[word.start : word.end] for word in found] == ["shard", "max_bytes", '"1 GB"']


def test_positions_take_no_part_in_equality() -> None:
    assert parse("  a{ b = c , d }") == parse("a{b=c,d}")
    assert hash(parse("  a")) == hash(parse("a"))


def test_a_quoted_word_differs_from_a_bare_one() -> None:
    assert parse('a{b="none"}') != parse("a{b=none}")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a{}", "a"),
        ("a , b", "a,b"),
        ("a{b =c,  d\n e}", "a{b=c,d e}"),
        ('a{b="c d",""}', 'a{b="c d",""}'),
        (r'a{b="say \"hi\" \\o"}', r'a{b="say \"hi\" \\o"}'),
        ('a{b="/enc/ffn{0},x=1;"}', 'a{b="/enc/ffn{0},x=1;"}'),
        (r"a{b=C:\models\x.json}", r"a{b=C:\models\x.json}"),
    ],
)
def test_a_pipeline_prints_back(text: str, printed: str) -> None:
    assert str(parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "message", "span"),
    [
        ("", "the pipeline is empty", ""),
        ("  ", "the pipeline is empty", ""),
        ("a,", "wanted the name of a pass, not the end", ""),
        (",a", "wanted the name of a pass, not ','", ","),
        ("a,,b", "wanted the name of a pass, not ','", ","),
        ("a b", "wanted ',' between passes, not 'b'", "b"),
        ("a{}b", "wanted ',' between passes, not 'b'", "b"),
        ("a}", "wanted ',' between passes, not '}'", "}"),
        ("a{b", "this brace is never closed", "{"),
        ("a{}{}", "'a' already has its options", "{"),
        ("a{b,c}", "options are separated by blanks", ","),
        ("a{b=1,c=2}", "options are separated by blanks", "="),
        ("a{b=}", "wanted a value for 'b', not '}'", "}"),
        ("a{b=1,}", "wanted a value for 'b', not '}'", "}"),
        ("a{=1}", "wanted an option, not '='", "="),
        ("a{b=1 b=2}", "option 'b' is given twice", "b"),
        ("a{b-c=1 b_c=2}", "option 'b_c' is given twice", "b_c"),
        ('a{b="c}', "this quote is never closed", '"'),
        (r'a{b="c\"}', "this quote is never closed", '"'),
        (r'a{b="c\d"}', r"write \\ for a backslash", r"\d"),
        ('a{b"c"}', "two words need a blank", '"c"'),
        ("a;b", "';' must be quoted", ";"),
    ],
)
def test_an_error_points_at_the_place(text: str, message: str, span: str) -> None:
    found, under_caret = caret(text)
    assert message in found
    assert under_caret == span


def test_an_error_shows_text_and_caret() -> None:
    with pytest.raises(SpecError) as caught:
        parse("fp16w shard")
    assert str(caught.value).splitlines()[1:] == ["  fp16w shard", "        ^^^^^"]


def test_no_pipeline_is_empty() -> None:
    with pytest.raises(SpecError, match="empty"):
        Pipeline(())


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
@example('"\\')
def test_any_text_is_a_pipeline_or_a_spec_error(text: str) -> None:
    try:
        pipeline = parse(text)
    except SpecError:
        caret(text)
    else:
        assert parse(str(pipeline)) == pipeline


@given(pipelines)
def test_the_printed_pipeline_parses_to_the_same(pipeline: Pipeline) -> None:
    assert parse(str(pipeline)) == pipeline
