"""Greedy decoding with the graphs of a language model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from onnxforge import model_io
from onnxforge.errors import OnnxforgeError, about
from onnxforge.runtime.session import ArrayFile, Session, Setup

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx_ir as ir

__all__ = ["Decoded", "Decoder", "Prompt", "decode"]

_Array = npt.NDArray[Any]
_Value = _Array | ArrayFile

Prompt = Mapping[str, _Array]
"""What to start from, by input: tokens or embeddings of one sequence, and all that stays the
same at every step, such as ``encoder_hidden_states``."""

_HOLE: Final = re.compile(r"\{(\w+)\}")
_SHOWN: Final = 4


@dataclass(frozen=True)
class Decoder:
    """The graphs of a language model, and what their inputs and outputs are called.

    The defaults are the names that optimum and transformers.js use. One graph is enough for a
    merged decoder, whose first run is fed an empty cache, and for one without a cache, which
    is fed the whole sequence at every step. What these fields do not name is in the prompt.

    Attributes:
        step: The graph that is run for each token.
        prompt: The graph that reads the prompt, where that is another one.
        embed: The graph that makes embeddings of tokens, for graphs that take embeddings.
        tokens: Input that takes tokens.
        embeddings: Input that takes embeddings.
        logits: Output with logits, the next token's last. From a graph that chooses by itself,
            an output of integers, its choice last.
        cache: Inputs that take what an output of the run before gave, as patterns in which
            braces stand for any text, the same on both sides. The first pattern that leads to
            an output counts. An output that a later run lacks or leaves empty, as for cross
            attention, keeps its value.
        mask: Input that takes a one for each position so far.
        positions: Inputs that take the numbers of the new positions.
        branch: Input that says whether there is a cache yet.
        eos: Tokens that end a sequence.
        max_tokens: The most tokens to choose.
        setup: How the graphs are run.
    """

    step: Path
    prompt: Path | None = None
    embed: Path | None = None
    tokens: str = "input_ids"
    embeddings: str = "inputs_embeds"
    logits: str = "logits"
    cache: Mapping[str, str] = field(
        default_factory=lambda: {
            "past_key_values.{kv}": "present.{kv}",
            "past_{kv}": "present_{kv}",
        }
    )
    mask: str = "attention_mask"
    positions: tuple[str, ...] = ("position_ids", "cache_position")
    branch: str = "use_cache_branch"
    eos: tuple[int, ...] = ()
    max_tokens: int = 256
    setup: Setup = field(default_factory=Setup)

    def __post_init__(self) -> None:
        for past, present in self.cache.items():
            if sorted(_HOLE.findall(past)) != sorted(set(_HOLE.findall(present))):
                raise OnnxforgeError(f"the braces of {past!r} and {present!r} differ")

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether nothing is chosen after these tokens."""
        return tokens[-1] in self.eos or len(tokens) >= self.max_tokens


@dataclass(frozen=True)
class Decoded:
    """What came of one prompt.

    Attributes:
        fed: The tokens that were fed.
        chosen: The choice instead of each of them.
        free: What is chosen where every choice is fed; an end token is part of it.
        file: File with the logits behind each of ``chosen``.
        dtype: Their type.
        vocabulary: How many there are to a choice; 0 where the graph chooses by itself.
    """

    fed: list[int]
    chosen: list[int]
    free: list[int]
    file: Path
    dtype: np.dtype[Any]
    vocabulary: int

    def logits(self) -> Iterator[_Array | None]:
        """Read the logits of one choice after the other; None where the graph chooses."""
        with self.file.open("rb") as file:
            for _ in self.chosen:
                row = np.fromfile(file, self.dtype, self.vocabulary)
                yield row if self.vocabulary else None


def decode(
    decoder: Decoder,
    prompts: Iterable[Prompt],
    folder: Path,
    *,
    forced: Sequence[Sequence[int]] | None = None,
) -> list[Decoded]:
    """Decode; nothing but the largest logit chooses: no beams, no penalties.

    Args:
        decoder: The graphs; the one for prompts is closed when the one for steps is opened.
        prompts: What to start from.
        folder: Folder for logits and caches; it is made.
        forced: The tokens to feed after each prompt, None for those chosen.

    Raises:
        OnnxforgeError: An input is fed by nothing, or a name is wrong.
        ModelError: A graph cannot be read.
        RuntimeFailed: onnxruntime is missing, raised, or crashed.
    """
    prompts = list(prompts)
    starts = []
    if decoder.prompt is not None:
        with contextlib.ExitStack() as stack:
            graph = _Graph(decoder, decoder.prompt, folder / "prompt", stack)
            starts = [graph.start(prompt) for prompt in prompts]
    with contextlib.ExitStack() as stack:
        graph = _Graph(decoder, decoder.step, folder / "step", stack)
        return [
            _decoded(
                graph,
                starts[index] if starts else graph.start(prompt),
                None if forced is None else list(forced[index]),
                folder / f"{index}.logits",
            )
            for index, prompt in enumerate(prompts)
        ]


def _decoded(graph: _Graph, state: _State, fed: list[int] | None, file: Path) -> Decoded:
    with file.open("wb") as rows:
        if fed is None:
            fed = chosen = free = _roam(graph, state, [], rows)
        else:
            chosen, free = _follow(graph, state, fed, rows)
    vocabulary = 0 if _is_choice(state.scores) else state.scores.size
    return Decoded(fed, chosen, free, file, state.scores.dtype, vocabulary)


def _follow(
    graph: _Graph, state: _State, fed: list[int], rows: BinaryIO
) -> tuple[list[int], list[int]]:
    """Feed given tokens; return the choices instead of them, and those of free running."""
    chosen: list[int] = []
    fork: _State | None = None
    agreed = max(0, len(fed) - 1)
    for index, token in enumerate(fed):
        if index:
            state = graph.step(state, fed[index - 1], keep=state is fork)
        rows.write(state.scores.tobytes())
        chosen.append(state.choice)
        if fork is None and (state.choice != token or graph.decoder.ends(chosen)):
            # Up to here free running goes the same way.
            fork, agreed = state, index
    return chosen, _roam(graph, fork or state, fed[:agreed])


def _roam(
    graph: _Graph, state: _State, tokens: list[int], rows: BinaryIO | None = None
) -> list[int]:
    """Choose after the tokens, of which the state is, and feed the choice, until the end."""
    while True:
        if rows is not None:
            rows.write(state.scores.tobytes())
        tokens.append(state.choice)
        if graph.decoder.ends(tokens):
            return tokens
        state = graph.step(state, tokens[-1])


@dataclass(frozen=True)
class _State:
    """What a run leaves to the next.

    Attributes:
        prompt: What decoding started from.
        cache: Outputs that become inputs.
        fed: What the last run was fed.
        length: Positions so far.
        scores: The logits of the next token, or the token alone.
    """

    prompt: Prompt
    cache: Mapping[str, _Value]
    fed: _Array
    length: int
    scores: _Array

    @property
    def choice(self) -> int:
        return int(self.scores[0] if _is_choice(self.scores) else self.scores.argmax())


class _Model:
    """A model in a process of its own, and the files that go there and back."""

    def __init__(self, path: Path, folder: Path, setup: Setup) -> None:
        graph = model_io.load(path, editable=False).graph
        values = [v for v in graph.inputs if v.name not in graph.initializers]
        self.inputs = {value.name or "": value for value in values}
        self.outputs = [value.name or "" for value in graph.outputs]
        self._path, self._folder = path, folder
        self._session = Session(path, folder, setup)

    def open(self, stack: contextlib.ExitStack) -> None:
        self._folder.mkdir(parents=True)
        with about(self._path):
            stack.enter_context(self._session)

    def run(self, feeds: Mapping[str, _Value]) -> dict[str, ArrayFile]:
        files = {
            name: value
            if isinstance(value, ArrayFile)
            else ArrayFile.write(self._folder / f"in{index}.npy", value)
            for index, (name, value) in enumerate(feeds.items())
        }
        with about(self._path):
            return self._session.run(files)


class _Graph:
    """A graph of the decoder that is open, and how it is fed."""

    def __init__(
        self, decoder: Decoder, path: Path, folder: Path, stack: contextlib.ExitStack
    ) -> None:
        self.decoder = decoder
        self._path = path
        self._model = _Model(path, folder, decoder.setup)
        self._inputs, self._outputs = self._model.inputs, self._model.outputs
        entries = [n for n in (decoder.tokens, decoder.embeddings) if n in self._inputs]
        if not entries or decoder.logits not in self._outputs:
            wanted = f"{decoder.tokens!r} or {decoder.embeddings!r} -> {decoder.logits!r}"
            raise OnnxforgeError(f"{path}: wanted {wanted}; the graph has {self._ports()}")
        self._entry = entries[0]
        self._embed = None
        if self._entry != decoder.tokens and decoder.embed is not None:
            self._embed = _Model(decoder.embed, folder / "embed", decoder.setup)
            if not len(self._embed.inputs) == len(self._embed.outputs) == 1:
                raise OnnxforgeError(f"{decoder.embed}: wanted one input and one output")
        self._past = {n: found for n in self._inputs if (found := _sources(n, decoder.cache))}
        presents = [_regex(present) for present in decoder.cache.values()]
        self._kept = {n for n in self._outputs if any(p.fullmatch(n) for p in presents)}
        for model in (self._model, self._embed):
            if model is not None:
                model.open(stack)

    def start(self, prompt: Prompt) -> _State:
        """Read a prompt."""
        fresh = prompt.get(self._entry)
        if fresh is None:
            fresh = self._embedded(prompt.get(self.decoder.tokens))
        if fresh.ndim < 2 or len(fresh) != 1:
            seen = list(fresh.shape)
            raise OnnxforgeError(
                f"{self._entry!r} wants one sequence, [1, length], not {seen}"
            )
        empty = {
            # Of what a graph leaves open, the batch comes first, then the length.
            output: np.zeros(_sizes(self._inputs[name], 1, 0), _dtype(self._inputs[name]))
            for name, sources in self._past.items()
            for output in sources
            if output in self._outputs
        }
        return self._run(prompt, empty, fresh, 0)

    def step(self, state: _State, token: int, *, keep: bool = False) -> _State:
        """Read one more token; a state that is not kept serves once."""
        fresh: _Array = np.array([[token]])
        if self._entry != self.decoder.tokens:
            fresh = self._embedded(fresh)
        if self._past:
            following = self._run(state.prompt, state.cache, fresh, state.length)
        else:
            everything = np.concatenate([state.fed, fresh], axis=1)
            following = self._run(state.prompt, {}, everything, 0)
        for name, value in state.cache.items():
            gone = following.cache.get(name) is not value and not keep
            if gone and isinstance(value, ArrayFile):
                value.path.unlink()
        return following

    def _embedded(self, tokens: _Array | None) -> _Array:
        if tokens is None or self._embed is None:
            lacking = "tokens or embeddings in the prompt" if tokens is None else "embed graph"
            raise OnnxforgeError(f"{self._path}: nothing feeds {self._entry!r}: no {lacking}")
        ((name, port),) = self._embed.inputs.items()
        (embeddings,) = self._embed.run({name: tokens.astype(_dtype(port))}).values()
        return np.array(embeddings.open())

    def _run(
        self, prompt: Prompt, cache: Mapping[str, _Value], fresh: _Array, past: int
    ) -> _State:
        length = past + fresh.shape[1]
        made = {
            self.decoder.mask: np.ones(length),
            self.decoder.branch: np.array([past > 0]),
            **dict.fromkeys(self.decoder.positions, np.arange(past, length)),
        }
        feeds = {
            name: prompt[name] if name in prompt else self._value(name, cache, made)
            for name in self._inputs
        }
        feeds[self._entry] = fresh.astype(_dtype(self._inputs[self._entry]))
        fed = {name: value for name, value in feeds.items() if value is not None}
        if unfed := [name for name in feeds if name not in fed]:
            raise OnnxforgeError(self._complaint(unfed, cache))
        outputs = self._model.run(fed)
        scores = outputs[self.decoder.logits].open()
        scores = scores.reshape(-1, 1 if _is_choice(scores) else scores.shape[-1])[-1].copy()
        cache = dict(cache)
        for name, file in outputs.items():
            if name in self._kept and file.open().size:
                cache[name] = file
            else:
                file.path.unlink()
        return _State(prompt, cache, fresh, length, scores)

    def _value(
        self, name: str, cache: Mapping[str, _Value], made: Mapping[str, _Array]
    ) -> _Value | None:
        if name in self._past:
            return next((cache[n] for n in self._past[name] if n in cache), None)
        if name not in made:
            return None
        port = self._inputs[name]
        shape = (*_sizes(port, 1, 1)[:-1], made[name].size)
        return np.broadcast_to(made[name], shape).astype(_dtype(port))

    def _complaint(self, unfed: list[str], cache: Mapping[str, object]) -> str:
        patterns = (f"{past} -> {present}" for past, present in self.decoder.cache.items())
        return (
            f"{self._path}: nothing feeds {_few(unfed)}; the patterns {', '.join(patterns)} "
            f"match the inputs {_few([*self._past])} and the outputs {_few([*cache])}; "
            f"the graph has {self._ports()}"
        )

    def _ports(self) -> str:
        return f"inputs {_few([*self._inputs])} and outputs {_few(self._outputs)}"


def _dtype(port: ir.Value) -> np.dtype[Any]:
    assert port.dtype is not None  # or the runtime had not loaded it
    return port.dtype.numpy()


def _sizes(port: ir.Value, first: int, others: int) -> list[int]:
    """The shape of an input, its open axes filled in."""
    dims = enumerate(port.shape or ())
    return [n if isinstance(n, int) else others if axis else first for axis, n in dims]


def _is_choice(scores: _Array) -> bool:
    return scores.dtype.kind in "iu"


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(pattern)))


def _sources(name: str, cache: Mapping[str, str]) -> list[str]:
    """The outputs that may become an input, in the order of the patterns."""
    found = [(_regex(past).fullmatch(name), present) for past, present in cache.items()]
    return [present.format(**match.groupdict()) for match, present in found if match]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
