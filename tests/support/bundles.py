"""Small recipes, and building them where one can watch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from onnxforge.bundle.build import Outcome, build
from onnxforge.bundle.reading import read_recipe
from onnxforge.bundle.state import opened
from support import pairs

BARE = """\
name = "pair"
output = "out"
license = "Apache-2.0"
files = ["notes.txt"]

[graphs.one]
source = "source/one.onnx"

[graphs.two]
source = "source/two.onnx"

[tiers.fp32]

[tiers.fp16w]
pipeline = "fp16w"
"""
"""Nothing is run."""

JUDGED = (
    BARE.replace('one.onnx"\n', 'one.onnx"\nparity.data = "samples"\n')
    + "graphs.one.gates.min-sqnr = 40\n"
)
"""One graph of one tier is compared."""

FULL = JUDGED.replace('one.onnx"\n', 'one.onnx"\ngolden = 1\ncalibration.data = "samples"\n')
"""With golden values, and with samples for statistics."""


class Inline(Executor):
    """Runs each piece of work at once, in this thread, and remembers what it was.

    Attributes:
        ran: Names of the classes of what was run.
        left: How many pieces it runs before it breaks; None for all.
    """

    def __init__(self, left: int | None = None) -> None:
        self.ran: list[str] = []
        self.left = left

    def submit(self, task: Callable[..., Any], /, *words: Any, **named: Any) -> Future[Any]:
        if self.left == 0:
            raise Broken
        self.left = None if self.left is None else self.left - 1
        self.ran.append(type(task).__name__)
        future: Future[Any] = Future()
        try:
            future.set_result(task(*words, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class Broken(BaseException):
    """Stands for the end of the process."""


def laid_out(folder: Path, recipe: str = BARE) -> Path:
    """Put two models, samples and a recipe into a folder; gives the path of the recipe."""
    for name in ("source", "samples"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pairs.saved(folder / "source/one.onnx", pairs.model())
    pairs.saved(folder / "source/two.onnx", pairs.model("logits = Neg(made)"))
    for i in range(2):
        x = pairs.sample() + np.float32(i)
        np.savez(folder / f"samples/{i}.npz", x=x)
    (folder / "notes.txt").write_text("notes\n")
    return written(folder, recipe)


def written(folder: Path, recipe: str) -> Path:
    """Write a recipe; gives its path."""
    path = folder / "onnxforge.toml"
    path.write_text(recipe)
    return path


def made(recipe: Path, executor: Executor | None = None, **options: Any) -> Outcome:
    """Build a bundle."""
    found = read_recipe(recipe)
    with opened(found.work) as state:
        return build(found, state, executor or Inline(), **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones as well, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def hashes(files: Mapping[str, bytes], algorithm: str = "sha256") -> dict[str, str]:
    """The hash of each file."""
    return {name: hashlib.new(algorithm, data).hexdigest() for name, data in files.items()}


def document(folder: Path, name: str) -> Any:
    """What a bundle says in a JSON file."""
    return json.loads((folder / "out" / name).read_text(encoding="utf-8"))


def _schema(name: str) -> Any:
    file = resources.files("onnxforge.bundle") / f"{name}.schema.json"
    return json.loads(file.read_text(encoding="utf-8"))


def check_documents(folder: Path) -> None:
    """Hold what a bundle says of itself to its schemas and to what is there."""
    for name in ("metadata", "manifest"):
        form = _schema(name)
        jsonschema.Draft202012Validator.check_schema(form)
        jsonschema.Draft202012Validator(form).validate(document(folder, f"{name}.json"))
    there = contents(folder / "out")
    del there["manifest.json"]
    files = document(folder, "manifest.json")["files"]
    assert {k: v["sha256"] for k, v in files.items()} == hashes(there)
    assert {k: v["bytes"] for k, v in files.items()} == {k: len(v) for k, v in there.items()}
    tiers = document(folder, "metadata.json")["tiers"].values()
    named = {graph["model"] for tier in tiers for graph in tier["graphs"].values()}
    assert named == {name for name in there if name.endswith(".onnx")}
