"""Options of a pass: words to fields and back."""

import copy
import math
import pickle
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxforge.errors import BrokenPass, SpecError
from onnxforge.options import ByteSize, from_spec, to_spec
from onnxforge.spec import parse


@dataclass(frozen=True)
class Sample:
    name: ClassVar[str] = "sample"

    count: int = 3
    ratio: float = 0.5
    share: bool = False
    label: str = "none"
    mode: Literal["fast", "none", 8, True] = "fast"
    min_bytes: ByteSize = ByteSize(1024)
    skip: tuple[str, ...] = ("a",)
    sizes: tuple[ByteSize, ...] = ()
    flags: tuple[bool, ...] = ()
    bits: int | None = None
    stats: str | None = None
    only: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Shard:
    name: ClassVar[str] = "shard"

    max_bytes: ByteSize
    names: tuple[str, ...] = field(default_factory=lambda: ("x",))
    files: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.max_bytes:
            raise ValueError("no shard can hold 0 bytes")


def read(text: str, cls: Any = Sample) -> Any:
    return from_spec(cls, parse(text).passes[0], text)


texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["none", "true", "()", "", "a,b", "a b", '"', "\\", "{=}", "-1", "inf"]),
)
byte_sizes = st.integers(0, 1 << 64).map(ByteSize)
samples = st.builds(
    Sample,
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    share=st.booleans(),
    label=texts,
    mode=st.sampled_from(["fast", "none", 8, True]),
    min_bytes=byte_sizes,
    skip=st.lists(texts, max_size=3).map(tuple),
    sizes=st.lists(byte_sizes, max_size=2).map(tuple),
    flags=st.lists(st.booleans(), max_size=2).map(tuple),
    bits=st.none() | st.integers(),
    stats=st.none() | texts,
    only=st.none() | st.lists(texts, max_size=2).map(tuple),
)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("sample{count=-7}", "count", -7),
        ("sample{ratio=1e-3}", "ratio", 1e-3),
        ("sample{ratio=2}", "ratio", 2.0),
        ("sample{ratio=-inf}", "ratio", -math.inf),
        ("sample{share}", "share", True),
        ("sample{share=false}", "share", False),
        ('sample{label="a b"}', "label", "a b"),
        ("sample{mode=8}", "mode", 8),
        ("sample{mode=true}", "mode", True),
        ("sample{min-bytes=64KiB}", "min_bytes", 65536),
        ("sample{skip=b}", "skip", ("b",)),
        ("sample{skip=()}", "skip", ()),
        ('sample{skip="()"}', "skip", ("()",)),
        ("sample{sizes=1KB,1}", "sizes", (1000, 1)),
        ("sample{bits=none}", "bits", None),
        ("sample{stats=none}", "stats", None),
        ('sample{stats="none"}', "stats", "none"),
        ("sample{only=none}", "only", None),
        ("sample{only=()}", "only", ()),
    ],
)
def test_the_annotation_says_what_a_word_means(text: str, name: str, value: object) -> None:
    found = getattr(read(text), name)
    assert found == value
    assert isinstance(found, (type(value), ByteSize))


@pytest.mark.parametrize(
    ("text", "message", "span"),
    [
        (
            "shard{max_byte=1}",
            "has no option 'max_byte'; did you mean 'max_bytes'?",
            "max_byte",
        ),
        ("sample{xyzzy}", "'sample' has no option 'xyzzy'", "xyzzy"),
        ("sample{name=x}", "'sample' has no option 'name'", "name"),
        ("sample{count=x}", "wants a whole number, not 'x'", "x"),
        ("sample{count=1.0}", "wants a whole number, not '1.0'", "1.0"),
        ("sample{count=" + "9" * 5000 + "}", "wants a whole number", "9" * 5000),
        ("sample{count=none}", "wants a whole number, not 'none'", "none"),
        ("sample{count}", "wants a whole number, not a bare flag", "count"),
        ("sample{count=1,2,3}", "takes one value, not 3", "1,2,3"),
        ("sample{ratio=nan}", "wants a number, not 'nan'", "nan"),
        ("sample{ratio=1e999}", "wants a number, not '1e999'", "1e999"),
        ("sample{share=yes}", "wants true or false, not 'yes'", "yes"),
        ("sample{mode=slow}", "wants fast or none or 8 or true, not 'slow'", "slow"),
        ("sample{min_bytes=64K}", "wants whole bytes, such as 64KiB", "64K"),
        ("sample{min_bytes=0.3B}", "not '0.3B'", "0.3B"),
        ("sample{min_bytes=-1}", "not '-1'", "-1"),
        ("sample{sizes=1KB,x}", "not 'x'", "x"),
        ("sample{skip}", "separated by commas", "skip"),
        ("sample{flags}", "separated by commas", "flags"),
        ('sample{bits="none"}', "wants a whole number", '"none"'),
    ],
)
def test_a_bad_option_is_pointed_at(text: str, message: str, span: str) -> None:
    cls = Shard if text.startswith("shard") else Sample
    with pytest.raises(SpecError) as caught:
        read(text, cls)
    error = caught.value
    assert message in error.args[0]
    assert text[error.start : error.end] == span


def test_a_missing_option_is_named() -> None:
    with pytest.raises(SpecError, match="'shard' needs the option 'max_bytes'") as caught:
        read("shard", Shard)
    assert (caught.value.start, caught.value.end) == (0, 5)


def test_what_a_pass_refuses_itself_gets_a_caret_too() -> None:
    with pytest.raises(SpecError, match="no shard can hold 0 bytes") as caught:
        read("shard{max_bytes=0}", Shard)
    assert caught.value.text == "shard{max_bytes=0}"


def test_options_at_their_default_are_left_out() -> None:
    assert str(to_spec(Sample())) == "sample"
    assert str(to_spec(Sample(share=True, skip=()))) == "sample{share=true skip=()}"


def test_all_options_can_be_written_out() -> None:
    assert str(to_spec(Sample(), full=True)) == (
        "sample{count=3 ratio=0.5 share=false label=none mode=fast min_bytes=1KiB skip=a"
        " sizes=() flags=() bits=none stats=none only=none}"
    )


def test_a_required_option_is_always_written() -> None:
    assert str(to_spec(Shard(ByteSize("1.5GB")))) == "shard{max_bytes=1500MB}"


def test_a_plain_int_prints_as_the_annotation_says() -> None:
    assert str(to_spec(Sample(min_bytes=4096))) == "sample{min_bytes=4KiB}"


@pytest.mark.parametrize("annotation", [list[int], int | str, tuple[int, str], dict, complex])
def test_an_annotation_that_no_word_can_express_is_the_authors_bug(annotation: Any) -> None:
    @dataclass(frozen=True)
    class Odd:
        name: ClassVar[str] = "odd"
        value: annotation = ()

    with pytest.raises(BrokenPass, match="no word of a pipeline can express"):
        read("odd{value=1}", Odd)
    with pytest.raises(BrokenPass, match="no word of a pipeline can express"):
        to_spec(Odd((1,)))


@given(samples, st.booleans())
def test_a_pass_equals_the_pass_its_text_stands_for(sample: Sample, full: bool) -> None:
    spec = to_spec(sample, full=full)
    assert from_spec(Sample, spec) == sample
    assert read(str(spec)) == sample


@given(st.text())
def test_any_word_is_a_value_or_a_spec_error(text: str) -> None:
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    for name in ("count", "ratio", "share", "mode", "min_bytes", "sizes", "bits"):
        try:
            sample = read(f'sample{{{name}="{quoted}"}}')
        except SpecError:
            continue
        assert read(str(to_spec(sample))) == sample


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("64kib", 65536),
        ("1.5GB", 1_500_000_000),
        ("0.5MiB", 524_288),
        ("2MB", 2_000_000),
        ("1GiB", 1 << 30),
    ],
)
def test_a_size_has_a_unit(text: str, count: int) -> None:
    assert ByteSize(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "1K",
        "1 KB",
        "-1",
        "+1",
        "1e3",
        "1.",
        ".5KB",
        "0.5",
        "1.0001KB",
        "٣",
        "9" * 5000,
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        ByteSize(text)


def test_a_size_is_never_negative() -> None:
    with pytest.raises(ValueError, match="negative"):
        ByteSize(-1)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (1000, "1KB"),
        (1024, "1KiB"),
        (1_024_000, "1000KiB"),
        (1_500_000_000, "1500MB"),
        (3 << 30, "3GiB"),
    ],
)
def test_a_size_prints_in_the_largest_exact_unit(count: int, text: str) -> None:
    assert str(ByteSize(count)) == f"{ByteSize(count)}" == text


@given(byte_sizes)
def test_a_size_survives_printing_copying_and_pickling(size: ByteSize) -> None:
    assert ByteSize(str(size)) == size
    for twin in (copy.deepcopy(size), pickle.loads(pickle.dumps(size))):
        assert twin == size
        assert type(twin) is ByteSize
