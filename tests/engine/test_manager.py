"""Passes run in order on any kind of model, are verified and observed, and leave a stamp."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import parser
from onnx_ir.passes import common

from onnxforge import model_io
from onnxforge.core import Effect, Fate, Finding, Pass, Result
from onnxforge.errors import BrokenPass, CheckFailed, ModelError, Refused, SpecError
from onnxforge.manager import PassManager
from onnxforge.passes.assert_pure import AssertPureAiOnnx
from onnxforge.passes.fp16w import WeightsFp16CastPass
from onnxforge.replay import verify
from support import fixtures, oracle, payload

Edit = Callable[[ir.Model], Any]
PIPELINE, VERSION = "onnxforge.pipeline", "onnxforge.version"
FULL = "fp16w{min_bytes=1KiB include=() exclude=() on_overflow=keep share=true}"


def fake(edit: Edit, effect: Effect = Effect.APPROX, name: str = "fake") -> Pass:
    """A pass that does this and says that it modified the model, unless told otherwise."""

    class Fake(Pass):
        def call(self, model: ir.Model) -> Any:
            result = edit(model)
            return result if result is not None else Result(model, modified=True)

    Fake.name, Fake.effect = name, effect
    return Fake()


def stamps(proto: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def proto_of(name: str) -> onnx.ModelProto:
    return onnx.load(fixtures.built(name), load_external_data=False)


def expected(name: str, treated: list[str]) -> oracle.Arrays:
    """What the parent gives when these weights are rounded, by the tests' own arithmetic."""
    parent = onnx.load(fixtures.built(name))
    return oracle.run(oracle.round_weights_fp16(parent, treated), fixtures.samples(name)[0])


def treated(report: Any) -> list[str]:
    return [f.where for p in report.passes for f in p.findings if f.fate is Fate.TREATED]


# Kinds of models.


def test_a_proto_comes_back_as_a_new_proto_and_is_not_changed() -> None:
    proto = proto_of("nameless")
    before = proto.SerializeToString()
    result, report = PassManager("fp16w").apply(proto)
    assert type(result) is onnx.ModelProto
    assert result is not proto
    assert proto.SerializeToString() == before
    assert treated(report) == ["up_w", "down_w"]
    seen = oracle.run(result, fixtures.samples("nameless")[0])
    oracle.assert_bit_equal(seen, expected("nameless", ["up_w", "down_w"]))


@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_no_proto_is_changed_by_a_pass_and_its_result_runs(name: str) -> None:
    proto = proto_of(name)
    before = proto.SerializeToString(deterministic=True)
    result, _ = PassManager("fp16w{min_bytes=0}").apply(proto, fixtures.built(name).parent)
    assert proto.SerializeToString(deterministic=True) == before
    assert [v.name for v in result.graph.output] == [v.name for v in proto.graph.output]


def test_an_onnx_ir_model_is_changed_in_place() -> None:
    model = ir.load(fixtures.built("nameless"))
    result, report = PassManager("fp16w").apply(model)
    assert result is model
    assert model.graph.initializers["up_w"].dtype == ir.DataType.FLOAT16
    assert treated(report) == ["up_w", "down_w"]
    seen = oracle.run(ir.to_proto(model), fixtures.samples("nameless")[0])
    oracle.assert_bit_equal(seen, expected("nameless", ["up_w", "down_w"]))


def test_a_graphsurgeon_graph_comes_back_as_a_new_graph_and_is_not_changed() -> None:
    graph = gs.import_onnx(onnx.load(fixtures.built("nameless")))
    before = gs.export_onnx(graph).SerializeToString(deterministic=True)
    result, report = PassManager("fp16w").apply(graph)
    assert isinstance(result, gs.Graph)
    assert result is not graph
    assert gs.export_onnx(graph).SerializeToString(deterministic=True) == before
    assert treated(report) == ["up_w", "down_w"]
    seen = oracle.run(gs.export_onnx(result), fixtures.samples("nameless")[0])
    oracle.assert_bit_equal(seen, expected("nameless", ["up_w", "down_w"]))


def test_external_data_of_a_graphsurgeon_graph_is_found_in_base_dir() -> None:
    folder = fixtures.built("external_two").parent
    graph = gs.import_onnx(proto_of("external_two"))
    result, report = PassManager("fp16w").apply(graph, folder)
    proto = gs.export_onnx(result)
    assert [t.name for t in narrow_ones(proto)] == treated(report)
    onnx.load_external_data_for_model(proto, str(folder))
    seen = oracle.run(proto, fixtures.samples("external_two")[0])
    oracle.assert_bit_equal(seen, expected("external_two", treated(report)))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_comes_back_as_a_model_and_nothing_is_written(
    kind: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = fixtures.copied("nameless", tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    model, report = PassManager("fp16w").apply(kind(path))
    assert isinstance(model, ir.Model)
    assert treated(report) == ["up_w", "down_w"]
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("model", [None, b"", 1, {"graph": 1}, onnx.GraphProto()])
def test_anything_else_is_a_type_error(model: object) -> None:
    with pytest.raises(TypeError, match=f"cannot run passes on {type(model).__name__}"):
        PassManager("fp16w").apply(model)


@pytest.mark.parametrize("base_dir", [str, Path])
def test_external_data_of_a_proto_is_found_in_base_dir(
    base_dir: Callable[[Path], Any],
) -> None:
    folder = fixtures.built("external_two").parent
    result, report = PassManager("fp16w").apply(proto_of("external_two"), base_dir(folder))
    names = treated(report)
    assert names == ["up_w", "down_w", "tied_w"]
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in narrow_ones(result))
    onnx.load_external_data_for_model(result, str(folder))
    seen = oracle.run(result, fixtures.samples("external_two")[0])
    oracle.assert_bit_equal(seen, expected("external_two", names))


def narrow_ones(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]


def test_external_data_that_no_pass_touches_stays_outside() -> None:
    proto, folder = proto_of("external_two"), fixtures.built("external_two").parent
    result, _ = PassManager("fp16w{include=up_w}").apply(proto, folder)
    kept = [t for t in proto.graph.initializer if t.name != "up_w"]
    assert [t for t in result.graph.initializer if t.name != "up_w"] == kept
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in kept)


def test_external_data_needs_a_base_dir() -> None:
    with pytest.raises(ModelError, match="give base_dir"):
        PassManager("fp16w").apply(proto_of("external_two"))


def test_a_pass_applies_itself() -> None:
    step = WeightsFp16CastPass(exclude=("up_w",))
    alone, report = step.apply(proto_of("nameless"))
    managed, _ = PassManager([step]).apply(proto_of("nameless"))
    assert alone == managed
    assert treated(report) == ["down_w"]


def test_a_pass_applies_itself_with_a_base_dir() -> None:
    folder = fixtures.built("external_one").parent
    _, report = WeightsFp16CastPass().apply(proto_of("external_one"), folder)
    assert treated(report) == ["up_w", "down_w", "tied_w"]


# Files.


def test_a_file_is_read_and_a_file_is_written(tmp_path: Path) -> None:
    source, target = fixtures.built("external_two"), tmp_path / "out.onnx"
    report = PassManager("fp16w").run(source, target)
    seen = oracle.run(target, fixtures.samples("external_two")[0])
    oracle.assert_bit_equal(seen, expected("external_two", treated(report)))
    data = target.with_name("out.onnx_data")
    assert report.written == {str(p): p.stat().st_size for p in (target, data)}
    read = [p for p in source.parent.iterdir() if p.suffix in (".onnx", ".bin")]
    assert report.source == {str(p): p.stat().st_size for p in read}
    assert report.layout == "sidecar"
    assert report.modified


def test_passes_given_as_text_and_as_objects_write_the_same_bytes(tmp_path: Path) -> None:
    source = fixtures.built("speech_encoder")
    PassManager("fp16w{min_bytes=64KiB share=false}").run(source, tmp_path / "a.onnx")
    step = WeightsFp16CastPass(min_bytes=65536, share=False)  # type: ignore[arg-type]
    PassManager([step]).run(source, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = fixtures.copied("nameless", tmp_path)
    before = source.read_bytes()
    report = PassManager("fp16w").run(source, None)
    assert report.modified
    assert treated(report) == ["up_w", "down_w"]
    assert (report.written, report.layout) == ({}, None)
    assert [p.name for p in tmp_path.iterdir()] == ["nameless.onnx"]
    assert source.read_bytes() == before


def test_an_output_that_exists_is_refused_before_a_pass_runs(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"precious")
    ran: list[ir.Model] = []
    manager = PassManager([fake(ran.append)])
    with pytest.raises(ModelError, match=r"out\.onnx: exists"):
        manager.run(fixtures.built("nameless"), target)
    assert ran == []
    assert target.read_bytes() == b"precious"
    manager.run(fixtures.built("nameless"), target, force=True)
    assert onnx.load(target).graph.name == "nameless"


def test_the_input_may_be_the_output(tmp_path: Path) -> None:
    path = fixtures.copied("external_one", tmp_path)
    report = PassManager("fp16w").run(path, path, force=True)
    seen = oracle.run(path, fixtures.samples("external_one")[0])
    oracle.assert_bit_equal(seen, expected("external_one", treated(report)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "external_one.onnx",
        "external_one.onnx_data",
    ]


# Failures.


def raises(model: ir.Model) -> None:
    raise ZeroDivisionError("oh")


def refuses(model: ir.Model) -> None:
    raise Refused("/a/MatMul: not this one")


def says_no(model: ir.Model) -> None:
    finding = Finding("OF101", "/a/MatMul", "is foreign", level="error")
    raise CheckFailed("1 offence", [finding])


def lies(model: ir.Model) -> Result:
    model.doc_string = "changed"
    return Result(model, modified=False)


def renames_an_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "other"


def retypes_an_input(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.DOUBLE)


def reshapes_an_input(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([1, 16])


def drops_an_output(model: ir.Model) -> None:
    del model.graph.outputs[0]


def renames_an_input_quietly(model: ir.Model) -> Result:
    model.graph.inputs[0].name = "other"
    return Result(model, modified=False)


def repeats_a_name(model: ir.Model) -> None:
    model.graph[0].outputs[0].name = model.graph[1].outputs[0].name


def takes_the_name_of_a_weight(model: ir.Model) -> None:
    model.graph[0].outputs[0].name = "down_b"


def turns_nodes_around(model: ir.Model) -> None:
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)


def mixes_types(model: ir.Model) -> None:
    weight = model.graph.initializers["up_w"]
    weight.const_value = ir.tensor(np.zeros((16, 32), np.float16), name="up_w")
    weight.type = ir.TensorType(ir.DataType.FLOAT16)


def invents_an_operator(model: ir.Model) -> None:
    model.graph[0].op_type = "MatMull"


def reads_what_nobody_makes(model: ir.Model) -> None:
    model.graph[1].replace_input_with(0, ir.Value(name="nowhere"))


def gives_back_another_kind_of_result(model: ir.Model) -> ir.passes.PassResult:
    return ir.passes.PassResult(model, modified=False)


FAILURES = [
    (raises, ZeroDivisionError, "oh"),
    (refuses, Refused, "/a/MatMul: not this one"),
    (says_no, CheckFailed, "1 offence\n  OF101 /a/MatMul: is foreign"),
]
BREACHES = [
    (renames_an_output, "fake changed the inputs or outputs"),
    (retypes_an_input, "fake changed the inputs or outputs"),
    (reshapes_an_input, "fake changed the inputs or outputs"),
    (drops_an_output, "fake changed the inputs or outputs"),
    (renames_an_input_quietly, "fake changed the inputs or outputs"),
    (repeats_a_name, "fake made an invalid model: value 'b' is made twice"),
    (takes_the_name_of_a_weight, "fake made an invalid model: value 'down_b' is made twice"),
    (turns_nodes_around, "fake made an invalid model: .*sorted"),
    (mixes_types, "fake made an invalid model: .*MatMul"),
    (invents_an_operator, "fake made an invalid model: .*MatMull"),
    (reads_what_nobody_makes, "fake made an invalid model: .*nowhere"),
    (gives_back_another_kind_of_result, "fake did not give back a Result"),
]


@pytest.mark.parametrize(("edit", "message"), BREACHES)
def test_a_breach_is_the_bug_of_the_pass(edit: Edit, message: str) -> None:
    with pytest.raises(BrokenPass, match=message) as caught:
        PassManager([fake(edit)]).apply(fixtures.built("nameless"))
    assert "\n" not in str(caught.value)


def test_a_wrong_flag_is_found_when_laws_are_checked() -> None:
    with pytest.raises(BrokenPass, match="fake says modified=False, which is not so"):
        PassManager([fake(lies)], check_laws=True).apply(fixtures.built("nameless"))
    PassManager([fake(lies)]).apply(fixtures.built("nameless"))


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [*FAILURES, *((edit, BrokenPass, message) for edit, message in BREACHES)],
)
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_written_when_a_pass_fails(
    edit: Edit, error: type[Exception], message: str, force: bool, tmp_path: Path
) -> None:
    source = fixtures.copied("nameless", tmp_path)
    if force:
        (tmp_path / "out.onnx").write_bytes(b"old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    manager = PassManager([WeightsFp16CastPass(include=("down_w",)), fake(edit)])
    with pytest.raises(error, match=message):
        manager.run(source, tmp_path / "out.onnx", force=force)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("edit", "error", "message"), FAILURES)
def test_a_proto_is_as_before_when_a_pass_fails(
    edit: Edit, error: type[Exception], message: str
) -> None:
    proto = proto_of("nameless")
    before = proto.SerializeToString()
    with pytest.raises(error, match=message):
        PassManager([WeightsFp16CastPass(), fake(edit)]).apply(proto)
    assert proto.SerializeToString() == before


def test_verification_can_be_left_out() -> None:
    result, _ = PassManager([fake(mixes_types)], verify=False).apply(proto_of("nameless"))
    assert [t.name for t in narrow_ones(result)] == ["up_w"]


def test_laws_hold_for_the_given_inputs(tmp_path: Path) -> None:
    source, sample = fixtures.built("merged_decoder"), fixtures.samples("merged_decoder")[1]
    report = PassManager("fp16w", check_laws=True, inputs=sample).run(source, None)
    assert report.modified


# Input that is not clean.


def test_an_input_that_the_checker_does_not_accept_is_reported_and_works(
    tmp_path: Path,
) -> None:
    target = tmp_path / "out.onnx"
    report = PassManager("fp16w").run(fixtures.built("unsorted"), target)
    (finding,) = report.findings
    assert (finding.code, finding.level) == ("OF901", "warning")
    assert "sorted" in finding.message
    assert "\n" not in finding.message
    assert treated(report) == ["up_w", "down_w"]
    seen = oracle.run(target, fixtures.samples("unsorted")[0])
    oracle.assert_bit_equal(seen, expected("unsorted", ["up_w", "down_w"]))


@pytest.mark.parametrize("name", fixtures.names(clean=True))
def test_a_clean_input_is_not_reported(name: str) -> None:
    _, report = PassManager([fake(lambda model: Result(model, False))]).apply(
        fixtures.built(name)
    )
    assert report.findings == []


def test_the_interface_of_an_unclean_input_is_held_as_well() -> None:
    with pytest.raises(BrokenPass, match="changed the inputs or outputs"):
        PassManager([fake(renames_an_output)]).apply(fixtures.built("unsorted"))


# Stamps.


def test_a_changed_model_says_how_it_was_made() -> None:
    result, _ = PassManager("fp16w").apply(proto_of("nameless"))
    version = importlib.metadata.version("onnxforge")
    assert stamps(result) == {PIPELINE: FULL, VERSION: version}


def test_a_stamp_repeats_the_pipeline() -> None:
    text = 'fp16w{min_bytes=1KB exclude="a b",up_b on_overflow=error share=false}'
    proto = proto_of("nameless")
    proto.graph.node[0].name = "a b"
    result, _ = PassManager(text).apply(proto)
    replayed, _ = PassManager(stamps(result)[PIPELINE]).apply(proto)
    assert replayed == result
    options = 'min_bytes=1KB include=() exclude="a b",up_b on_overflow=error share=false'
    assert stamps(result)[PIPELINE] == f"fp16w{{{options}}}"


def test_only_passes_that_changed_the_model_are_in_the_stamp() -> None:
    result, report = PassManager("fp16w,assert-pure,fp16w{min_bytes=0}").apply(
        proto_of("nameless")
    )
    assert [step.modified for step in report.passes] == [True, False, True]
    assert stamps(result)[PIPELINE] == f"{FULL},{FULL.replace('1KiB', '0B')}"


def test_a_second_run_appends_to_the_stamp() -> None:
    first, _ = PassManager("fp16w{include=up_w}").apply(proto_of("nameless"))
    second, _ = PassManager("fp16w{include=down_w}").apply(first)
    texts = [FULL.replace("include=()", f"include={name}") for name in ("up_w", "down_w")]
    assert stamps(second)[PIPELINE] == ",".join(texts)
    assert [entry.key for entry in second.metadata_props] == [PIPELINE, VERSION]


@pytest.mark.parametrize("pipeline", ["assert-pure", "fp16w{min_bytes=1GB}"])
def test_a_model_that_nothing_changed_is_not_stamped(pipeline: str) -> None:
    proto = proto_of("nameless")
    result, report = PassManager(pipeline).apply(proto)
    assert not report.modified
    assert stamps(result) == {}
    assert payload.graph_text(result) == payload.graph_text(proto)
    assert [tensor.raw_data for tensor in result.graph.initializer] == [
        tensor.raw_data for tensor in proto.graph.initializer
    ]


def test_a_second_run_of_the_same_pass_changes_nothing_and_does_not_stamp() -> None:
    first, _ = PassManager("fp16w").apply(proto_of("hiding_places"))
    second, report = PassManager("fp16w").apply(first)
    assert not report.modified
    assert second == first


def test_metadata_of_the_exporter_stays() -> None:
    proto = proto_of("nameless")
    proto.metadata_props.add(key="author", value="someone")
    result, _ = PassManager("fp16w").apply(proto)
    assert stamps(result) | {"author": "someone"} == stamps(result)
    assert len(result.metadata_props) == 3


def test_the_same_run_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom onnxforge import PassManager\n"
        "PassManager('fp16w,assert-pure').run(sys.argv[1], sys.argv[2])"
    )
    contents = set()
    for seed in ("0", "1"):
        target = tmp_path / seed / "out.onnx"
        target.parent.mkdir()
        subprocess.run(
            [sys.executable, "-c", code, str(fixtures.built("external_two")), str(target)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        contents.add(tuple(p.read_bytes() for p in sorted(target.parent.iterdir())))
    assert len(contents) == 1


# Observers and reports.


class Log:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, object]] = []

    def before(self, step: Pass, model: ir.Model) -> None:
        self.entries.append(("before", step.name, model))

    def after(self, step: Pass, result: Result) -> None:
        self.entries.append(("after", step.name, result.modified))

    def failed(self, step: Pass, error: Exception) -> None:
        self.entries.append(("failed", step.name, error))


def test_observers_are_told_in_order() -> None:
    model, first, second = model_io.load(fixtures.built("nameless")), Log(), Log()
    PassManager("fp16w,assert-pure", observers=[first, second]).apply(model)
    assert first.entries == [
        ("before", "fp16w", model),
        ("after", "fp16w", True),
        ("before", "assert-pure", model),
        ("after", "assert-pure", False),
    ]
    assert second.entries == first.entries


@pytest.mark.parametrize("edit", [raises, refuses, says_no, mixes_types])
def test_observers_are_told_of_a_failure_and_of_nothing_after_it(edit: Edit) -> None:
    log = Log()
    steps = [fake(edit), AssertPureAiOnnx()]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        PassManager(steps, observers=[log]).apply(fixtures.built("nameless"))
    assert [entry[:2] for entry in log.entries] == [("before", "fake"), ("failed", "fake")]
    assert log.entries[1][2] is caught.value


def test_a_report_says_what_each_pass_did() -> None:
    _, report = PassManager("fp16w,assert-pure").apply(proto_of("hiding_places"))
    narrowing, check = report.passes
    assert (narrowing.text, narrowing.effect, narrowing.modified) == (FULL, "storage", True)
    assert (check.effect, check.modified) == ("check", False)
    assert check.text.startswith("assert-pure{")
    counts = [narrowing.tally(fate)[0] for fate in Fate]
    assert sum(counts) == len(narrowing.findings) == 37
    sizes = {finding.where: finding.nbytes for finding in narrowing.findings}
    assert sum(narrowing.tally(fate)[1] for fate in Fate) == sum(sizes.values())
    assert report.modified


def test_the_stats_of_a_pass_are_in_the_report() -> None:
    counted = fake(lambda model: Result(model, False, stats={"nodes_seen": 5}))
    _, report = PassManager([counted]).apply(fixtures.built("nameless"))
    assert report.passes[0].stats == {"nodes_seen": 5}


def test_the_text_of_a_manager_is_its_pipeline() -> None:
    text = "fp16w{min_bytes=64KiB},assert-pure"
    assert str(PassManager(text)) == text
    assert PassManager(text).passes == PassManager(str(PassManager(text))).passes


def test_a_wrong_pipeline_is_an_error_at_once() -> None:
    with pytest.raises(SpecError, match="did you mean 'fp16w'"):
        PassManager("fp16ww")


# Passes that run again.


class Step(Pass):
    """Appends its letter where the doc string ends as it wants, once; asks to run again."""

    effect = Effect.APPROX

    def call(self, model: ir.Model) -> Result:
        before = model.doc_string or ""
        wanted = before.endswith(self.wants) and self.letter not in before[-1:]
        if wanted:
            model.doc_string = before + self.letter
        again = self.asks and not wanted
        finding = Finding("OF999", "model", f"{self.letter} saw {before}")
        return Result(model, wanted, findings=(finding,), again=again)


def step(letter: str, wants: str = "", *, asks: bool = False) -> Pass:
    """A pass that appends its letter behind what it wants, if it has not done so last."""

    class Kind(Step):
        pass

    Kind.name, Kind.letter, Kind.wants, Kind.asks = f"step-{letter}", letter, wants, asks
    return Kind()


def ran(*steps: Pass) -> tuple[list[str], str, list[bool]]:
    """The passes in the order of the report, what they wrote, and who changed the model."""
    log = Log()
    result, report = PassManager(steps, observers=[log]).apply(proto_of("nameless"))
    order = [entry.text.removeprefix("step-")[0] for entry in report.passes]
    told = [name.removeprefix("step-") for event, name, _ in log.entries if event == "after"]
    assert told == order
    begun = [name.removeprefix("step-") for event, name, _ in log.entries if event == "before"]
    assert begun == order
    modified = [entry.modified for entry in report.passes]
    made = [letter for letter, changed in zip(order, modified, strict=True) if changed]
    text = stamps(result).get(PIPELINE, "")
    assert text.replace("step-", "").replace("{}", "") == ",".join(made)
    return order, result.doc_string, modified


def test_a_pass_that_asks_runs_again_after_a_later_pass_changed_the_model() -> None:
    order, text, modified = ran(step("a", "b", asks=True), step("b"), step("c"))
    assert order == ["a", "b", "a", "c"]
    assert text == "bac"
    assert modified == [False, True, True, True]


def test_a_pass_that_does_not_ask_runs_once() -> None:
    assert ran(step("a", "b"), step("b")) == (["a", "b"], "b", [False, True])


def test_a_pass_does_not_run_again_after_one_that_changed_nothing() -> None:
    steps = step("a", "c", asks=True), step("b", "never"), step("c"), step("d")
    assert ran(*steps)[:2] == (["a", "b", "c", "a", "d"], "cad")
    assert ran(*steps[:2]) == (["a", "b"], "", [False, False])


def test_a_pass_does_not_run_again_after_an_earlier_one_or_itself() -> None:
    assert ran(step("b"), step("a", "never", asks=True))[0] == ["b", "a"]
    changes = fake(lambda model: Result(model, True, again=True), name="once")
    _, report = PassManager([changes]).apply(proto_of("nameless"))
    assert [entry.text for entry in report.passes] == ["once"]


def test_a_pass_that_still_asks_runs_after_each_change_that_follows() -> None:
    steps = step("a", "c", asks=True), step("b"), step("c"), step("d")
    assert ran(*steps)[:2] == (["a", "b", "a", "c", "a", "d"], "bcad")


def test_several_that_ask_run_again_in_order() -> None:
    steps = step("a", "c", asks=True), step("b", "a", asks=True), step("c")
    assert ran(*steps)[:2] == (["a", "b", "c", "a", "b"], "cab")


def test_two_equal_passes_that_ask_run_again_once() -> None:
    one = step("a", "b", asks=True)
    twin = type(one)()
    assert one == twin
    assert one is not twin
    assert ran(one, twin, step("b"))[:2] == (["a", "a", "b", "a"], "ba")


def test_a_pass_that_runs_again_is_held_to_its_promises() -> None:
    def breaks(model: ir.Model) -> Result | None:
        if not model.doc_string:
            return Result(model, False, again=True)
        return renames_an_output(model)

    with pytest.raises(BrokenPass, match="changed the inputs or outputs"):
        PassManager([fake(breaks), step("b")]).apply(fixtures.built("nameless"))


TIED = """<ir_version: 9, opset_import: ["" : 18]>
g (int64[N] i, float[N,16] x) => (float[N,64] y)
  <float[64,16] w = {%s}, float[16,16] v = {%s}> {
  e = Gather(w, i)  s = Add(e, x)  m = MatMul(s, v)  t = Transpose(w)  y = MatMul(m, t)
}"""


def tied() -> onnx.ModelProto:
    """A table that is also the weight of a product, and a weight of its own."""
    rng = np.random.default_rng(8)
    texts = [",".join(map(repr, rng.standard_normal(n).tolist())) for n in (1024, 256)]
    return parser.parse_model(TIED % tuple(texts))


def test_a_pass_that_runs_again_is_in_the_stamp_and_its_replay_is_equal(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(tied(), source)
    report = PassManager("dynamic-int8,gather-int8,assert-pure").run(source, target)
    names = [entry.text.partition("{")[0] for entry in report.passes]
    assert names == ["dynamic-int8", "gather-int8", "dynamic-int8", "assert-pure"]
    assert [entry.modified for entry in report.passes] == [True, True, True, False]
    pipeline = stamps(onnx.load(target))[PIPELINE]
    assert pipeline == ",".join(entry.text for entry in report.passes[:3])
    assert verify(source, target).derived
    replayed, _ = PassManager(pipeline).apply(tied())
    assert stamps(replayed)[PIPELINE] == pipeline
    assert replayed.graph == onnx.load(target).graph
    other = tmp_path / "other.onnx"
    PassManager("gather-int8,dynamic-int8").run(source, other)
    assert onnx.load(other).graph == onnx.load(target).graph
    assert verify(source, other).derived


# Inside onnx_ir.


def with_identities() -> onnx.ModelProto:
    """A weight behind an Identity, and a node that nothing reads."""
    values = ", ".join(repr(float(v)) for v in np.linspace(-1, 1, 512))
    return parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 18]>
g (float[N,16] x) => (float[N,32] y) <float[16,32] w = {{{values}}}> {{
  a = Identity(x)  b = Identity(w)  y = MatMul(a, b)  unused = Neg(x)
}}""")


def test_every_pass_is_an_onnx_ir_pass() -> None:
    for step in PassManager("fp16w,assert-pure").passes:
        assert isinstance(step, ir.passes.PassBase)
        assert step.in_place
        assert step.changes_input == (step.effect is not Effect.CHECK)


@pytest.mark.parametrize("first", [True, False])
def test_a_pass_runs_in_the_pass_manager_of_onnx_ir(first: bool) -> None:
    proto = with_identities()
    model = ir.from_proto(proto)
    steps: list[ir.passes.PassBase] = [
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ]
    steps.insert(0 if first else 2, WeightsFp16CastPass())
    result = ir.passes.PassManager(steps)(model)
    assert result.modified
    assert result.model is model
    operators = [node.op_type for node in model.graph]
    assert operators == ["Cast", "MatMul"]
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    inputs = {"x": np.linspace(-2, 2, 32, dtype=np.float32).reshape(2, 16)}
    seen = oracle.run(ir.to_proto(model), inputs)
    oracle.assert_bit_equal(seen, oracle.run(oracle.round_weights_fp16(proto, ["w"]), inputs))


def test_a_sequence_of_onnx_ir_stops_when_nothing_changes() -> None:
    model = ir.from_proto(with_identities())
    steps = ir.passes.PassManager([WeightsFp16CastPass(), AssertPureAiOnnx()], steps=5)
    assert steps(model).modified
    assert not steps(model).modified


def test_a_check_that_fails_inside_onnx_ir_keeps_its_findings() -> None:
    model = ir.load(fixtures.built("impure_function"))
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(AssertPureAiOnnx())(model)
    cause = caught.value.__cause__
    assert isinstance(cause, CheckFailed)
    assert [finding.code for finding in cause.findings][:1] == ["OF101"]


def test_a_functional_copy_of_a_pass_leaves_the_model_alone() -> None:
    model = ir.from_proto(with_identities())
    result = ir.passes.functionalize(WeightsFp16CastPass())(model)
    assert result.modified
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    assert result.model.graph.initializers["w"].dtype == ir.DataType.FLOAT16


def test_a_pass_is_frozen_and_equal_to_one_with_the_same_options() -> None:
    assert WeightsFp16CastPass() == WeightsFp16CastPass()
    assert WeightsFp16CastPass() != WeightsFp16CastPass(share=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        WeightsFp16CastPass().share = False  # type: ignore[misc]


@pytest.mark.parametrize("name", ["hiding_places", "merged_decoder"])
def test_a_graphsurgeon_graph_with_bodies_is_taken(name: str) -> None:
    graph = gs.import_onnx(onnx.load(fixtures.built(name)))
    oracle.run(gs.export_onnx(graph), fixtures.samples(name)[0])
    PassManager("fp16w").apply(graph)
