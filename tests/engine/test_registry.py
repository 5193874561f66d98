"""Names of passes, and the classes behind them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

from onnxforge import registry
from onnxforge.core import Effect, Pass, Result
from onnxforge.errors import BrokenPass, OnnxforgeError, SpecError

PASS = """
import dataclasses
from typing import ClassVar

from onnxforge.core import Effect, Pass, Result
from onnxforge.options import ByteSize


@dataclasses.dataclass(frozen=True)
class {cls}(Pass):
    name: ClassVar[str] = "{name}"
    effect: ClassVar[Effect] = Effect.CHECK

    min_bytes: ByteSize = ByteSize(1024)

    def call(self, model):
        return Result(model, modified=False)
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, as the site-packages of a third party's passes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def built_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that stands in for passes/, and the only place where passes come from."""
    folder = tmp_path / "builtins" / "forgery"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(registry, "_BUILT_IN", "forgery")
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "forgery"]:
        del sys.modules[name]


def install(folder: Path, package: str, points: dict[str, str], **modules: str) -> None:
    """Lay down what pip would: the modules and the dist-info with the entry points."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    info = folder / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[onnxforge.passes]", *lines, ""]))


def test_a_built_in_pass_is_called_as_its_module(built_ins: Path) -> None:
    (built_ins / "dynamic_int8.py").write_text(
        PASS.format(cls="Int8Pass", name="dynamic-int8")
    )
    (built_ins / "_shared.py").write_text("raise AssertionError('nobody asked for this')")
    assert [str(e) for e in registry.entries().values()] == ["forgery.dynamic_int8 (built in)"]
    assert registry.pass_class("dynamic-int8").__name__ == "Int8Pass"


def test_listing_names_imports_no_pass(built_ins: Path) -> None:
    (built_ins / "fp16w.py").write_text("raise AssertionError('imported')")
    assert list(registry.entries()) == ["fp16w"]
    with pytest.raises(AssertionError, match="imported"):
        registry.pass_class("fp16w")


def test_names_are_in_alphabetical_order() -> None:
    assert list(registry.entries()) == sorted(registry.entries())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "exactly one pass; it has none"),
        ("from onnxforge.core import Pass", "exactly one pass; it has none"),
        (
            PASS.format(cls="A", name="odd") + PASS.format(cls="B", name="odd"),
            "exactly one pass; it has A, B",
        ),
        (PASS.format(cls="A", name="even"), "must be named 'odd', not 'even'"),
    ],
)
def test_a_module_defines_one_pass_of_its_name(
    built_ins: Path, source: str, message: str
) -> None:
    (built_ins / "odd.py").write_text(source)
    with pytest.raises(BrokenPass, match=message):
        registry.pass_class("odd")


def test_a_third_partys_pass_is_found(plugins: Path) -> None:
    install(
        plugins,
        "acme",
        {"acme-check": "acme_a:AcmePass"},
        acme_a=PASS.format(cls="AcmePass", name="acme-check"),
    )
    assert str(registry.entries()["acme-check"]) == "acme_a:AcmePass (acme 1.2)"
    assert "acme_a" not in sys.modules
    (found,) = registry.parse("acme-check{min_bytes=1KB}")
    assert isinstance(found, registry.pass_class("acme-check"))
    assert str(found) == "acme-check{min_bytes=1KB}"


def test_two_third_parties_with_one_name_are_both_named(plugins: Path) -> None:
    install(plugins, "acme", {"twice": "acme_b:A"})
    install(plugins, "bcme", {"twice": "bcme_b:B"})
    with pytest.raises(SpecError, match="two passes are called 'twice'") as caught:
        registry.entries()
    assert "acme_b:A (acme 1.2)" in str(caught.value)
    assert "bcme_b:B (bcme 1.2)" in str(caught.value)


def test_a_third_party_cannot_take_the_name_of_a_built_in(
    built_ins: Path, plugins: Path
) -> None:
    (built_ins / "fp16w.py").write_text("")
    install(plugins, "acme", {"fp16w": "acme_c:A"})
    with pytest.raises(
        SpecError, match=r"forgery\.fp16w \(built in\) and acme_c:A \(acme 1\.2\)"
    ):
        registry.pass_class("fp16w")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("acme_missing:A", r"cannot import the pass 'bad' from .*\(acme 1\.2\): No module"),
        ("acme_d:Missing", r"cannot import the pass 'bad' from .*\(acme 1\.2\): .*Missing"),
        ("acme_e:A", r"cannot import the pass 'bad' from .*\(acme 1\.2\): division by zero"),
        ("acme_d:number", r"'bad' from .*\(acme 1\.2\) is not a subclass of onnxforge\.Pass"),
        ("acme_d:int", r"'bad' from .*\(acme 1\.2\) is not a subclass of onnxforge\.Pass"),
        ("acme_d:Good", r"Good from .*\(acme 1\.2\) must be named 'bad', not 'good'"),
    ],
)
def test_a_bad_plugin_is_blamed_on_its_package(
    plugins: Path, target: str, message: str
) -> None:
    good = PASS.format(cls="Good", name="good") + "\nnumber = 1\nint = int\n"
    install(plugins, "acme", {"bad": target}, acme_d=good, acme_e="1 / 0")
    with pytest.raises(OnnxforgeError, match=message):
        registry.pass_class("bad")


def test_an_unknown_pass_is_pointed_at(built_ins: Path) -> None:
    (built_ins / "gather_int8.py").write_text(PASS.format(cls="A", name="gather-int8"))
    with pytest.raises(SpecError) as caught:
        registry.parse("gather-int8, gather_int8")
    assert str(caught.value).splitlines() == [
        "there is no pass 'gather_int8'; did you mean 'gather-int8'?",
        "  gather-int8, gather_int8",
        "               ^^^^^^^^^^^",
    ]
    with pytest.raises(SpecError, match=r"^there is no pass 'xyzzy'$"):
        registry.pass_class("xyzzy")


def test_a_bad_option_is_pointed_at(built_ins: Path) -> None:
    (built_ins / "check.py").write_text(PASS.format(cls="A", name="check"))
    text = "check,check{min_bytes=x}"
    with pytest.raises(SpecError, match="whole bytes") as caught:
        registry.parse(text)
    assert text[caught.value.start : caught.value.end] == "x"


def test_parsed_passes_equal_passes_made_by_hand(built_ins: Path) -> None:
    (built_ins / "check.py").write_text(PASS.format(cls="A", name="check"))
    cls = registry.pass_class("check")
    assert registry.parse("check,check{min_bytes=1B}") == (cls(), cls(min_bytes=1))
    assert cls().effect is Effect.CHECK
    assert issubclass(cls, Pass)
    assert isinstance(cls().call(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)), Result)


def test_names_and_errors_come_without_the_heavy_packages() -> None:
    code = (
        "import sys; from onnxforge import registry, errors\n"
        "registry.entries()\n"
        "try: registry.parse('xyzzy')\n"
        "except errors.SpecError: pass\n"
        "print(*{'onnx', 'onnx_ir', 'numpy', 'onnxforge.core'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
