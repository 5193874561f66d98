"""Decoders against plain recomputation, and what is planted is found where it was planted."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from onnxforge.errors import OnnxforgeError, RuntimeFailed
from onnxforge.numerics.decode import (
    Decoder,
    Loop,
    Prompt,
    compare_decoders,
    find_loop,
    generate,
)
from onnxforge.runtime.decoder import decode
from support import fixtures, oracle

WORDS = 16
TABLE = np.random.default_rng(3).standard_normal((WORDS, WORDS)).astype(np.float32)
PLACES = np.random.default_rng(4).standard_normal((64, WORDS)).astype(np.float32)
HEARD = np.random.default_rng(5).standard_normal((1, 3, WORDS)).astype(np.float32)

IDS, SUM = "int64[1,steps] input_ids", f"float[1,1,{WORDS}] logits"
PAST, PRESENT = (f"float[batch,{name},{WORDS}]" for name in ("past", "total"))
LOOKED_UP = "h = Gather(table, input_ids)"
ADDED = "all = Concat <axis=1> (past_h, h)  present_h = Identity(all)"
SUMMED = "logits = ReduceSum(all, axis)"


def written(folder: Path, name: str, text: str, table: np.ndarray = TABLE) -> Path:
    """A graph whose next logits are a sum over the rows of a table, for all tokens so far."""
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> g {text}')
    weights = {"table": table, "places": PLACES, "axis": np.array([1])}
    weights |= {"last": np.array([-1]), "none": HEARD[:, :0]}
    read = {name for node in model.graph.node for name in node.input}
    for key in sorted(read & set(weights)):
        model.graph.initializer.append(numpy_helper.from_array(weights[key], key))
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def plain(folder: Path, table: np.ndarray = TABLE, name: str = "plain") -> Path:
    text = f"({IDS}) => (float[1,steps,{WORDS}] logits) {{ {LOOKED_UP} logits = Identity(h) }}"
    return written(folder, name, text, table)


def cached(folder: Path, table: np.ndarray = TABLE) -> Path:
    text = f"({IDS}, {PAST} past_h) => ({SUM}, {PRESENT} present_h)"
    return written(folder, "cached", f"{text} {{ {LOOKED_UP} {ADDED} {SUMMED} }}", table)


def whole(folder: Path) -> Decoder:
    """One input has a default."""
    text = f"({IDS}, int64[1] axis) => ({SUM}) {{ {LOOKED_UP} logits = ReduceSum(h, axis) }}"
    return Decoder(written(folder, "step", text))


def merged(folder: Path) -> Decoder:
    return Decoder(cached(folder))


def split(folder: Path) -> Decoder:
    text = f"({IDS}) => ({SUM}, {PRESENT} present_h)"
    body = f"{LOOKED_UP} present_h = Identity(h) logits = ReduceSum(h, axis)"
    return Decoder(cached(folder), prompt=written(folder, "prompt", f"{text} {{ {body} }}"))


def embedding(folder: Path) -> Decoder:
    entry = f"float[1,steps,{WORDS}] h"
    text = f"({entry}, {PAST} past_h) => ({SUM}, {PRESENT} present_h)"
    embed = f"(int32[1,steps] ids) => (float[1,steps,{WORDS}] e) {{ e = Gather(table, ids) }}"
    return Decoder(
        written(folder, "step", f"{text} {{ {ADDED} {SUMMED} }}"),
        embed=written(folder, "embed", embed),
        embeddings="h",
    )


def halved(folder: Path) -> Decoder:
    """A cache of another type, under other names."""
    types = (each.replace("float", "float16") for each in (PAST, PRESENT))
    past, present = (f"{each} {n}_0_k" for each, n in zip(types, "cn", strict=True))
    body = f"""new = Gather(table, input_ids) n_0_k = Concat <axis=1> (c_0_k, new)
        all = Cast <to=1> (n_0_k) {SUMMED}"""
    text = f"({IDS}, {past}) => ({SUM}, {present}) {{ {body} }}"
    step = written(folder, "step", text, TABLE.astype(np.float16))
    return Decoder(step, cache={"c_{i}_{kind}": "n_{i}_{kind}"})


def chooser(folder: Path) -> Decoder:
    """It gives the tokens so far and its choice."""
    body = f"""{LOOKED_UP} s = ReduceSum <keepdims=0> (h, axis)
        next = ArgMax <axis=1> (s) symbols = Concat <axis=1> (input_ids, next)"""
    text = f"({IDS}) => (int64[1,longer] symbols) {{ {body} }}"
    return Decoder(written(folder, "chooser", text), logits="symbols")


PROMPTS: dict[str, Prompt] = {
    "one": {"input_ids": np.array([[3]])},
    "many": {"input_ids": np.array([[1, 2, 5, 3]])},
}


def summed(tokens: list[int], count: int, table: np.ndarray = TABLE) -> list[int]:
    """Choose after the tokens, as the models of this module do."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(table[tokens].sum(0).argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("build", [whole, merged, split, embedding, halved, chooser])
def test_all_ways_to_feed_choose_what_a_plain_sum_chooses(build: Any, tmp_path: Path) -> None:
    decoder = dataclasses.replace(build(tmp_path), max_tokens=10)
    found = generate(decoder, PROMPTS)
    for name, prompt in PROMPTS.items():
        table = TABLE.astype(np.float16).astype(np.float32) if build is halved else TABLE
        assert found[name] == tuple(summed(prompt["input_ids"][0].tolist(), 10, table))


def test_masks_positions_and_a_branch_grow_with_the_sequence(tmp_path: Path) -> None:
    more = (
        "int64[1,total] attention_mask, int32[1,steps] position_ids, bool[1] use_cache_branch"
    )
    text = f"""({IDS}, {PAST} past_h, int64[steps] cache_position, {more})
        => ({SUM}, {PRESENT} present_h) {{ {LOOKED_UP}
        p = Gather(places, position_ids) q = Gather(places, cache_position)
        hp = Add(h, p) hq = Add(hp, q)
        all = Concat <axis=1> (past_h, hq)  present_h = Identity(all)
        length = ReduceSum(attention_mask, axis) place = Gather(places, length)
        cached = Cast <to=1> (use_cache_branch) s = ReduceSum(all, axis)
        sum = Add(s, place) logits = Sub(sum, cached) }}"""
    decoder = Decoder(written(tmp_path, "step", text), max_tokens=6)
    tokens = [1, 2, 5, 3]
    for row in decode(decoder, [PROMPTS["many"]], tmp_path / "out")[0].logits():
        length = len(tokens)
        added = 2 * PLACES[:length].sum(0) + PLACES[length] - (length > 4)
        expected = TABLE[tokens].sum(0) + added
        np.testing.assert_allclose(row, expected, atol=1e-5)
        tokens.append(int(expected.argmax()))
    assert len(tokens) == 10


@pytest.mark.parametrize("empty", [False, True])
def test_what_cross_attention_needs_is_kept_and_the_rest_is_not(
    tmp_path: Path, *, empty: bool
) -> None:
    heard = f"float[1,frames,{WORDS}]"
    both = f"{SUM}, {PRESENT} present_h, {heard} present_cross"
    first = f"""({IDS}, {heard} encoder_hidden_states) => ({both}) {{ {LOOKED_UP}
        present_h = Identity(h) present_cross = Identity(encoder_hidden_states)
        s = ReduceSum(h, axis) c = ReduceSum(encoder_hidden_states, axis)
        logits = Add(s, c) }}"""
    given = both if empty else f"{SUM}, {PRESENT} present_h"
    step = f"""({IDS}, {PAST} past_h, {heard} past_cross) => ({given}) {{ {LOOKED_UP} {ADDED}
        s = ReduceSum(all, axis) c = ReduceSum(past_cross, axis) logits = Add(s, c)
        {"present_cross = Identity(none)" if empty else ""} }}"""
    decoder = Decoder(
        written(tmp_path, "step", step),
        prompt=written(tmp_path, "prompt", first),
        max_tokens=12,
    )
    prompts = [{**prompt, "encoder_hidden_states": HEARD} for prompt in PROMPTS.values()]
    for one, prompt in zip(decode(decoder, prompts, tmp_path / "out"), prompts, strict=True):
        tokens = prompt["input_ids"][0].tolist()
        for row in one.logits():
            expected = TABLE[tokens].sum(0) + HEARD[0].sum(0)
            np.testing.assert_allclose(row, expected, atol=1e-5)
            tokens.append(int(expected.argmax()))
    # What is left: inputs of the last run, and the cache of each prompt.
    assert len([*(tmp_path / "out" / "step").glob("*.npy")]) <= 3 + 2


def test_embeddings_can_be_what_decoding_starts_from(tmp_path: Path) -> None:
    decoder = dataclasses.replace(embedding(tmp_path), max_tokens=5)
    found = generate(decoder, {"heard": {"h": HEARD}})["heard"]
    tokens = [int(HEARD[0].sum(0).argmax())]
    for _ in range(4):
        tokens.append(int((HEARD[0].sum(0) + TABLE[tokens].sum(0)).argmax()))
    assert found == tuple(tokens)


def test_a_cached_decoder_is_what_it_is_without_its_cache(tmp_path: Path) -> None:
    model = onnx.load(fixtures.built("merged_decoder"))
    for node in (n for n in model.graph.node if n.op_type == "If"):
        cached_branch, fresh = (attribute.g for attribute in node.attribute)
        # The fixture's branches have weights of their own; here they shall do the same.
        cached_branch.initializer[0].raw_data = fresh.initializer[0].raw_data
    path = tmp_path / "decoder.onnx"
    onnx.save(model, path)
    decoder = Decoder(path, max_tokens=8)
    one = decode(decoder, [{"input_ids": np.array([[9, 4, 60]])}], tmp_path / "out")[0]
    tokens = [9, 4, 60]
    feeds = {
        k: v[:1, :, :0] for k, v in fixtures.samples("merged_decoder")[0].items() if "." in k
    }
    for row in one.logits():
        feeds |= {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "use_cache_branch": np.array([False]),
        }
        expected = oracle.run(path, feeds)["logits"][0, -1]
        np.testing.assert_allclose(row, expected, atol=1e-4)
        tokens.append(int(expected.argmax()))
    assert one.free == tokens[3:]


def following(*pairs: tuple[int, int]) -> np.ndarray:
    """A table after which each token is followed by the next one, but for these."""
    table = np.full((WORDS, WORDS), -1, np.float32)
    successors = {token: (token + 1) % WORDS for token in range(WORDS)} | dict(pairs)
    table[[*successors], [*successors.values()]] = 2
    return table


def test_a_planted_divergence_is_found_where_it_was_planted(tmp_path: Path) -> None:
    loud = following((4, 9), (9, 9))
    loud[4, 5] = 1.5
    reference = Decoder(plain(tmp_path, following()), eos=(7,), max_tokens=20)
    candidate = dataclasses.replace(reference, step=plain(tmp_path, loud, "candidate"))
    prompts = {
        "bad": {"input_ids": np.array([[1]])},
        "good": {"input_ids": np.array([[0, 5]])},
    }
    found = compare_decoders(reference, candidate, prompts)
    bad, good = found.clips["bad"], found.clips["good"]

    assert (bad.reference, bad.candidate) == ((2, 3, 4, 5, 6, 7), (2, 3, 4, *[9] * 17))
    assert (bad.divergence, bad.reference_ended, bad.candidate_ended) == (3, True, False)
    assert (bad.reference_loop, bad.candidate_loop) == (None, Loop(3, 1, 17))
    wrong = bad.steps[3]
    p, q = (np.exp(table[4].astype(float)) for table in (following(), loud))
    p, q = p / p.sum(), q / q.sum()
    assert (wrong.token, wrong.reference, wrong.candidate) == (5, 5, 9)
    assert (wrong.max_abs, wrong.margin) == (3, 3)
    assert wrong.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)
    others = [step for step in bad.steps if step is not wrong]
    assert {(step.max_abs, step.margin, step.kl) for step in others} == {(0, 0, 0)}

    assert (good.reference, good.candidate, good.divergence) == ((6, 7), (6, 7), None)
    assert (found.steps, found.mismatches, found.diverged) == (8, 1, 1)
    assert found.logits is not None
    assert found.ranking is not None
    assert (found.logits.max_abs, found.logits.count) == (3, 8 * WORDS)
    assert (found.ranking.rows, found.ranking.mismatches) == (8, 1)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["clips"]["bad"]["divergence"] == 3


def test_free_running_does_not_depend_on_what_is_fed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    decoder = dataclasses.replace(merged(tmp_path), eos=(11,), max_tokens=6)
    prompt = PROMPTS["many"]
    free = summed([1, 2, 5, 3], 6)
    free = free[: free.index(11) + 1] if 11 in free else free
    fed = {str(n): [*free[:n], *rng.integers(0, WORDS, n % 3)] for n in range(len(free) + 1)}
    fed |= {"random": rng.integers(0, WORDS, 9).tolist(), "longer": [*free, 11, 2]}
    found = compare_decoders(decoder, decoder, dict.fromkeys(fed, prompt), tokens=fed)
    for name, clip in found.clips.items():
        assert clip.reference == clip.candidate == tuple(free)
        assert [step.token for step in clip.steps] == fed[name]
        for number, step in enumerate(clip.steps):
            after = summed([1, 2, 5, 3, *fed[name][:number]], 1)[0]
            assert step.reference == step.candidate == after
    assert found.mismatches == found.diverged == 0


def test_graphs_that_choose_by_themselves_are_compared_by_their_choices(
    tmp_path: Path,
) -> None:
    decoder = dataclasses.replace(chooser(tmp_path), max_tokens=4)
    found = compare_decoders(decoder, decoder, PROMPTS, scratch=tmp_path)
    assert (found.steps, found.mismatches, found.logits, found.ranking) == (8, 0, None, None)
    assert {step.max_abs for step in found.clips["one"].steps} == {None}
    mixed = compare_decoders(
        dataclasses.replace(whole(tmp_path), max_tokens=4), decoder, PROMPTS
    )
    assert (mixed.mismatches, mixed.logits) == (0, None)
    assert not [*tmp_path.glob("onnxforge-*")]


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(2, 4))
def test_a_loop_is_the_first_block_that_stands_often_enough(
    tokens: list[int], repeats: int
) -> None:
    wanted = None
    for start in range(len(tokens)):
        for period in range(1, len(tokens)):
            block = tokens[start : start + period]
            many = 1
            while tokens[start + many * period :][:period] == block:
                many += 1
            if many >= repeats and wanted is None:
                wanted = Loop(start, period, many)
    assert find_loop(tokens, repeats) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache": {"past_key_values.{i}.key": "present.{i}.key"}},
            "nothing feeds past_h; the patterns past_key_values.{i}.key -> present.{i}.key "
            "match the inputs none and the outputs none; the graph has inputs input_ids, "
            "past_h and outputs logits, present_h",
        ),
        (
            {"cache": {"past_{i}": "presents_{i}"}},
            "nothing feeds past_h; the patterns past_{i} -> presents_{i} match "
            "the inputs past_h and the outputs none; the graph has",
        ),
        (
            {"tokens": "ids"},
            "wanted 'ids' or 'inputs_embeds' -> 'logits'; the graph has inputs input_ids, "
            "past_h and outputs logits, present_h",
        ),
        ({"logits": "scores"}, "wanted 'input_ids' or 'inputs_embeds' -> 'scores'; the graph"),
    ],
)
def test_a_wrong_name_tells_what_matched_and_what_there_is(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    decoder = dataclasses.replace(merged(tmp_path), **options)
    with pytest.raises(OnnxforgeError, match=re.escape(f"cached.onnx: {message}")) as caught:
        generate(decoder, PROMPTS)
    assert "\n" not in str(caught.value)


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    decoder = Decoder(fixtures.built("merged_decoder"), cache={})
    with pytest.raises(OnnxforgeError, match=r"past_key_values\.1\.value; .* and 3 more"):
        generate(decoder, PROMPTS)


@pytest.mark.parametrize("past", ["past_{i}", "past_{i}_{i}", "past"])
def test_braces_must_be_the_same_on_both_sides(past: str) -> None:
    present = "present_{i}" if past != "past_{i}" else "present_{j}"
    with pytest.raises(OnnxforgeError, match="the braces of"):
        Decoder(Path("model.onnx"), cache={past: present})


def test_a_prompt_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    batch = {"a": {"input_ids": np.array([[1], [2]])}}
    with pytest.raises(
        OnnxforgeError, match=r"wants one sequence, \[1, length\], not \[2, 1\]"
    ):
        generate(merged(tmp_path), batch)
    embeds = embedding(tmp_path)
    with pytest.raises(OnnxforgeError, match="nothing feeds 'h': no tokens or embeddings"):
        generate(embeds, {"a": {}})
    with pytest.raises(OnnxforgeError, match="nothing feeds 'h': no embed graph"):
        generate(dataclasses.replace(embeds, embed=None), PROMPTS)
    with pytest.raises(OnnxforgeError, match=r"cached\.onnx: wanted one input and one output"):
        generate(dataclasses.replace(embeds, embed=cached(tmp_path)), PROMPTS)


def test_sides_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    large = Decoder(plain(tmp_path), max_tokens=1)
    small = dataclasses.replace(large, step=plain(tmp_path, TABLE[:, :9], "small"))
    with pytest.raises(OnnxforgeError, match="the reference has 16 logits, the candidate 9"):
        compare_decoders(large, small, PROMPTS)
    with pytest.raises(OnnxforgeError, match="no tokens for the prompt 'many'"):
        compare_decoders(small, small, PROMPTS, tokens={"one": [1]})


def test_what_the_runtime_says_comes_with_the_graph(tmp_path: Path) -> None:
    decoder = merged(tmp_path)
    with pytest.raises(
        RuntimeFailed, match=r"cached\.onnx: .*indices element out of data bounds"
    ):
        generate(decoder, {"a": {"input_ids": np.array([[WORDS]])}})
