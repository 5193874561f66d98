"""What a build removes from a bundle, what it never touches, and what stays meanwhile."""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxforge.bundle.plan import Plan
from onnxforge.bundle.reading import read_recipe
from onnxforge.bundle.state import State, opened
from onnxforge.errors import OnnxforgeError, SpecError
from onnxforge.errors import said as told
from support import bundles, pairs
from support.bundles import (
    BARE,
    FULL,
    JUDGED,
    Inline,
    check_documents,
    contents,
    laid_out,
    made,
    written,
)

IN_PLACE = """\
name = "pair"
output = "."

[graphs.one]
source = "fp32/one.onnx"

[graphs.two]
source = "fp32/two.onnx"

[tiers.fp32]

[tiers.fp16w]
pipeline = "fp16w"
"""
CALIBRATED = """
[tiers.sq]
pipeline = "smoothquant{stats=@calibration min_bytes=0}"
graphs.two.pipeline = "int8w"
"""
FLAT = 'layout = "{graph}_{tier}.onnx"\n'


posix = pytest.mark.skipif(os.name == "nt", reason="links of POSIX")


def models(folder: Path) -> list[str]:
    return [name for name in contents(folder / "out") if name.endswith((".onnx", "_data"))]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    recipe = laid_out(tmp_path)
    made(recipe)
    return recipe


def refused(text: str) -> str:
    """A recipe whose reduced tier does not pass a check."""
    assert '"fp16w"' in text
    return text.replace('"fp16w"', '"fp16w,assert-pure{max_opset=16}"')


@pytest.fixture
def in_place(tmp_path: Path) -> Path:
    recipe = laid_out(tmp_path, IN_PLACE)
    (tmp_path / "source").rename(tmp_path / "fp32")
    assert not made(recipe).errors
    return recipe


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[tiers.fp32]\n", '[tiers.fp32]\nlayout = "{graph}_full.onnx"\n'),
        ("[tiers.fp32]\n", ""),
        ('[graphs.two]\nsource = "fp32/two.onnx"\n', ""),
        ('output = "."', 'output = "elsewhere"'),
    ],
)
def test_a_source_in_its_place_is_never_removed(
    in_place: Path, tmp_path: Path, before: str, after: str
) -> None:
    sources = contents(tmp_path / "fp32")
    assert before in IN_PLACE
    outcome = made(written(tmp_path, IN_PLACE.replace(before, after)))
    assert not outcome.errors
    assert contents(tmp_path / "fp32") == sources


def test_what_a_recipe_reads_is_never_removed(recipe: Path, tmp_path: Path) -> None:
    """A tier becomes the source of the next recipe, which does not make it."""
    text = BARE.replace("source/", "out/fp32/").replace("[tiers.fp32]\n", "")
    assert not made(written(tmp_path, text)).errors
    assert {"fp32/one.onnx", "fp32/two.onnx"} <= set(models(tmp_path))


def test_a_source_in_its_place_is_looked_at(in_place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = pairs.saved(tmp_path / "fp32/one.onnx", pairs.model("logits = Neg(made)"))
    made(in_place, only=["fp32"], announce=said.append)
    assert said[0] == "fp32/one: source changed"
    assert f"fp32/one: looked at, {path.stat().st_size:,} bytes" in said
    shutil.rmtree(tmp_path / ".onnxforge")
    made(in_place, only=["fp32"], announce=said.append)
    assert "fp32/one: is in its place" in said


@posix
def test_a_source_in_its_place_may_be_a_link(in_place: Path, tmp_path: Path) -> None:
    source = tmp_path / "fp32/one.onnx"
    source.rename(tmp_path / "fp32/latest.onnx")
    source.symlink_to("latest.onnx")
    pairs.saved(tmp_path / "fp32/latest.onnx", pairs.model("logits = Neg(made)"))
    assert not made(in_place).errors
    assert made(in_place, Inline(left=0)).made == []
    told = json.loads((tmp_path / "metadata.json").read_text())
    graph = told["tiers"]["fp32"]["graphs"]["one"]
    assert (graph["model"], graph["data"]) == ("fp32/one.onnx", [])


@pytest.mark.parametrize("weights", ["shared", "inline", "sidecar"])
def test_a_source_in_its_place_is_not_laid_out_anew(tmp_path: Path, weights: str) -> None:
    text = IN_PLACE.replace("[tiers.fp32]\n", f'[tiers.fp32]\nweights = "{weights}"\n')
    with pytest.raises(SpecError, match=r"fp32/one\.onnx would replace the source of 'one'"):
        made(laid_out(tmp_path, text))


def test_a_tier_has_not_its_place_where_another_graph_comes_from(tmp_path: Path) -> None:
    text = IN_PLACE.replace("fp32/two.onnx", "fp32/one.onnx", 1)
    text = text.replace('[graphs.one]\nsource = "fp32/one', '[graphs.one]\nsource = "fp32/two')
    with pytest.raises(SpecError, match=r"fp32/one\.onnx would replace the source of 'two'"):
        made(laid_out(tmp_path, text))


@pytest.mark.parametrize("head", ["", FLAT])
@pytest.mark.parametrize("weights", ["keep", "shared"])
def test_a_tier_stays_until_another_takes_its_place(
    recipe: Path, tmp_path: Path, head: str, weights: str
) -> None:
    before = models(tmp_path)
    text = head + BARE.replace('"fp16w"\n', f'"fp16w"\nweights = "{weights}"\n')
    assert made(written(tmp_path, refused(text))).failed
    assert [n for n in models(tmp_path) if "fp16w" in n] == [n for n in before if "fp16w" in n]
    check_documents(tmp_path)
    assert not made(written(tmp_path, text)).failed
    assert ("fp16w/one.onnx" in models(tmp_path)) == (not head)
    check_documents(tmp_path)


def test_only_removes_nothing_that_is_not_replaced(recipe: Path, tmp_path: Path) -> None:
    before = models(tmp_path)
    text = BARE.replace('"fp16w"\n', '"fp16w"\nweights = "shared"\n')
    made(written(tmp_path, text), only=["fp32"])
    assert models(tmp_path) == before
    check_documents(tmp_path)
    made(recipe)
    made(written(tmp_path, BARE), only=["fp16w/one"])  # shared, and one of them alone again
    assert [n for n in models(tmp_path) if "fp16w" in n] == [
        "fp16w/one.onnx",
        "fp16w/shared.onnx_data",
        "fp16w/two.onnx",
    ]
    check_documents(tmp_path)


def test_a_renamed_tier_stays_until_all_is_in_its_place(recipe: Path, tmp_path: Path) -> None:
    text = BARE.replace("[tiers.fp16w]", "[tiers.half]")
    assert made(written(tmp_path, refused(text))).failed
    assert "fp16w/one.onnx" in models(tmp_path)
    outcome = made(written(tmp_path, text))
    assert outcome.removed == ["fp16w/one.onnx", "fp16w/two.onnx"]
    assert not (tmp_path / "out/fp16w").exists(), "nor an empty folder"
    check_documents(tmp_path)


def test_what_a_recipe_names_no_more_goes(tmp_path: Path) -> None:
    made(laid_out(tmp_path, FULL))
    (tmp_path / "out/mine.txt").write_text("mine")
    text = FULL.replace('files = ["notes.txt"]\n', "").replace("golden = 1\n", "")
    made(
        written(
            tmp_path, text.replace(text[text.index("[graphs.two]") :].split("\n\n")[0], "")
        )
    )
    there = contents(tmp_path / "out")
    assert [n for n in there if "two" in n or "golden" in n or "notes" in n] == []
    assert there.pop("mine.txt") == b"mine", "what no build made stays"
    (tmp_path / "out/mine.txt").unlink()
    check_documents(tmp_path)


def test_the_folder_of_work_keeps_what_is_needed(tmp_path: Path) -> None:
    text = FULL[: FULL.index("[tiers.fp16w]")] + CALIBRATED
    work = tmp_path / ".onnxforge/pair"
    for rows in ("", "calibration.rows = 64\n"):  # other statistics
        given = text.replace("calibration.data", f"{rows}calibration.data")
        assert not made(laid_out(tmp_path, given)).errors
        names = sorted(path.suffix or path.name for path in work.iterdir())
        assert names == [".safetensors", "lock", "state"]


def test_statistics_that_were_left_damaged_are_taken_afresh(tmp_path: Path) -> None:
    found = read_recipe(laid_out(tmp_path, FULL + CALIBRATED))
    with opened(found.work) as state:
        plan, graph = Plan(found, state), found.graphs["one"]
        path = plan.statistics_path(graph, plan.statistics_key(graph))
    path.with_name(f"{path.name}.part").write_bytes(b"half")
    assert not made(found.path, only=["sq/one"]).errors


def test_another_output_is_a_bundle_of_its_own(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "new/fp32").mkdir(parents=True)
    (tmp_path / "new/fp32/one.onnx").write_text("mine")
    moved = written(tmp_path, BARE.replace('"out"', '"new"'))
    assert "is not of this recipe" in made(moved).errors["fp32"]
    assert (tmp_path / "new/fp32/one.onnx").read_text() == "mine"
    assert "fp32/one.onnx" in models(tmp_path), "the old one stays as it was"


def test_a_project_that_moves_is_built_already(recipe: Path, tmp_path: Path) -> None:
    new = tmp_path / "elsewhere"
    new.mkdir()
    for path in [path for path in tmp_path.iterdir() if path != new]:
        path.rename(new / path.name)
    assert made(new / recipe.name, Inline(left=0)).made == []


def test_the_bundle_of_another_recipe_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    before = contents(tmp_path / "out")
    other = written(tmp_path, BARE.replace('"pair"', '"other"'))
    with pytest.raises(
        OnnxforgeError, match=r"metadata\.json: is not of this recipe; --force"
    ):
        made(other)
    assert contents(tmp_path / "out") == before
    assert not made(other, force=True).errors


def test_a_state_that_is_lost_harms_nothing(recipe: Path, tmp_path: Path) -> None:
    before = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / ".onnxforge")
    assert not made(recipe).errors
    assert contents(tmp_path / "out") == before
    assert State(tmp_path / ".onnxforge/pair").claims


def test_what_cannot_be_put_stops_nothing_else(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path)
    (tmp_path / "notes.txt").unlink()
    said = f"{tmp_path / 'notes.txt'}: No such file or directory"
    assert made(recipe).errors == {"shared file notes.txt": said}
    check_documents(tmp_path)


class Refusing(Inline):
    """The system refuses a piece of work."""

    def submit(self, task: Any, /, *words: Any, **named: Any) -> Future[Any]:
        if type(task).__name__ != "Make" or "two" not in str(task.folder):
            return super().submit(task, *words, **named)
        future: Future[Any] = Future()
        future.set_exception(OSError(28, "No space left on device", str(task.folder)))
        return future


def test_a_full_disk_stops_nothing_else(tmp_path: Path) -> None:
    outcome = made(laid_out(tmp_path), Refusing())
    assert outcome.errors.keys() == {"fp32/two", "fp16w/two"}
    assert "two: No space left on device" in outcome.errors["fp32/two"]
    (tmp_path / "out").joinpath("manifest.json").read_text()
    assert told(OSError("odd")) == "odd"
    assert not made(tmp_path / "onnxforge.toml").errors
    check_documents(tmp_path)


class Changing(Inline):
    """Somebody exports a model again, while a build is at work."""

    def submit(self, task: Any, /, *words: Any, **named: Any) -> Future[Any]:
        done = super().submit(task, *words, **named)
        if type(task).__name__ == "Make" and "fp16w/one" in task.folder.as_posix():
            pairs.saved(task.sources[0], pairs.model("logits = Neg(made)"))
        return done


def test_a_source_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path)
    outcome = made(recipe, Changing())
    assert "one.onnx: changed during the build; build again" in outcome.errors["fp16w"]
    assert models(tmp_path) == []
    assert not made(recipe).errors
    there = tmp_path / "out/fp32/one.onnx"
    assert there.read_bytes() == (tmp_path / "source/one.onnx").read_bytes()
    check_documents(tmp_path)


def test_the_folder_of_work_may_be_on_another_disk(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path / "out")
    replace, work = Path.replace, tmp_path / ".onnxforge"

    def within(self: Path, target: Path) -> Path:
        if (work in self.parents) != (work in Path(target).parents):
            raise OSError(
                errno.EXDEV, "Invalid cross-device link", str(self), None, str(target)
            )
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", within)
    shutil.rmtree(tmp_path / "out")
    assert not made(recipe).errors
    assert contents(tmp_path / "out") == before
    assert sorted(p.name for p in work.rglob("*") if p.is_file()) == ["lock", "state"]
    text = BARE.replace('"fp16w"\n', '"fp16w"\nweights = "sidecar"\n')
    assert not made(written(tmp_path, text)).errors
    assert not made(written(tmp_path, text.replace('"fp16w"', '"int8w{min_bytes=0}"'))).errors
    check_documents(tmp_path)


def test_what_cannot_be_removed_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(laid_out(tmp_path))
    recipe = written(tmp_path, BARE.replace('files = ["notes.txt"]\n', ""))
    unlink, place = Path.unlink, tmp_path / "out/notes.txt"

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self == place:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        outcome = made(recipe)
    assert outcome.errors == {"what is not in the recipe": f"{place}: Permission denied"}
    assert outcome.made == ["metadata.json", "manifest.json"]
    assert made(recipe).removed == ["notes.txt"]
    check_documents(tmp_path)


def test_md5_makes_no_model_again(recipe: Path, tmp_path: Path) -> None:
    outcome = made(written(tmp_path, f"md5 = true\n{BARE}"), Inline(left=0))
    assert outcome.made == ["manifest.json"]
    there = contents(tmp_path / "out")
    listed = json.loads(there.pop("manifest.json"))["files"]
    assert {n: f["md5"] for n, f in listed.items()} == bundles.hashes(there, "md5")
    assert made(recipe, Inline(left=0)).made == []
    assert made(written(tmp_path, BARE), Inline(left=0)).made == ["manifest.json"]


def test_a_link_that_is_to_be_none_becomes_a_file(tmp_path: Path) -> None:
    text = BARE.replace('"notes.txt"', '{source = "notes.txt", link = true}')
    made(laid_out(tmp_path, text))
    there = tmp_path / "out/notes.txt"
    assert there.samefile(tmp_path / "notes.txt")
    assert made(written(tmp_path, text.replace("true", "false"))).made == ["notes.txt"]
    assert not there.samefile(tmp_path / "notes.txt")


def test_shared_data_have_their_place(tmp_path: Path) -> None:
    text = BARE.replace('"fp16w"\n', '"fp16w"\nweights = "shared"\n')
    place = '{source = "notes.txt", path = "fp16w/shared.onnx_data"}'
    with pytest.raises(SpecError, match="is the place of the shared data of fp16w"):
        made(laid_out(tmp_path, text.replace('"notes.txt"', place)))


def test_shared_data_are_missed_once(tmp_path: Path) -> None:
    said: list[str] = []
    text = BARE.replace('"fp16w"\n', '"fp16w"\nweights = "shared"\n')
    recipe = laid_out(tmp_path, text)
    made(recipe)
    (tmp_path / "out/fp16w/shared.onnx_data").unlink()
    made(recipe, announce=said.append)
    assert "fp16w/*: shared.onnx_data is missing or changed" in said


def test_shared_data_are_counted_once(tmp_path: Path) -> None:
    said: list[str] = []
    text = BARE.replace('"fp16w"\n', '"fp16w"\nweights = "shared"\n')
    made(laid_out(tmp_path, text), announce=said.append)
    size = sum(path.stat().st_size for path in (tmp_path / "out/fp16w").iterdir())
    assert f"fp16w/*: made, {size:,} bytes" in said
    note = "fp16w: data that other graphs read as well are counted."
    assert (tmp_path / "out/PARITY.md").read_text().count(note) == 2


def test_what_did_not_run_is_tried_again(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path, JUDGED + "[run]\ntimeout = 1e-9\n")
    assert "one.onnx: did not run to the end" in made(recipe).errors["fp16w/one"]
    assert not made(written(tmp_path, JUDGED)).errors
    check_documents(tmp_path)


def test_a_source_that_does_not_run_is_told(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path, JUDGED)
    model = pairs.model()
    model.graph.node[0].domain = "my.ops"
    model.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
    pairs.saved(tmp_path / "source/one.onnx", model)
    outcome = made(recipe)
    assert not outcome.failed, "the tier is not to blame"
    assert "source/one.onnx: did not run to the end" in outcome.errors["fp16w/one"]
