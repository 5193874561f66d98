"""The house rules: sizes, directions of imports, documentation of passes."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnxforge import registry
from support import fixtures

ROOT = Path(__file__).parents[1]
ENGINE = sorted((ROOT / "onnxforge").rglob("*.py"))
PASSES = sorted((ROOT / "passes").rglob("*.py"))
FOLDERS = ("onnxforge", "passes", "tests", "fixtures", "benchmarks", "docs", "examples")
SOURCES = [f"{folder}/**/*.{kind}" for folder in FOLDERS for kind in ("py", "md", "onnxtxt")]
CONFIGURATION = ["*.md", "*.toml", "*.yaml", "Makefile", ".ci/*"]
TEXTS = [path for glob in SOURCES + CONFIGURATION for path in sorted(ROOT.glob(glob))]
NAMES = [name for name, entry in registry.entries().items() if entry.point is None]

ENGINE_LINES, PASS_LINES, FUNCTION_LINES = 400, 350, 50
ARGUMENTS, NESTING, SUMMARY = 5, 3, 72
PASSES_MAY_IMPORT = {
    "core",
    "dequantized",
    "errors",
    "flow",
    "halving",
    "integer",
    "lazy",
    "numerics",
    "operands",
    "options",
    "placement",
    "products",
    "qdq",
    "runtime",
    "selection",
    "skeleton",
    "smoothing",
    "surgery",
    "walk",
    "weights",
    "widening",
}
CORE_MAY_IMPORT = {"errors", "options", "spec", "text"}
TERMINAL = {"click", "rich"}
HEAVY = {"numpy", "onnx", "onnx_ir", "onnxruntime"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|tmp|work|mnt)/|\b[A-Z]:\\+Users")
CODE = re.compile(r"\bOF\d{3}\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


in_every_module = pytest.mark.parametrize("path", [*ENGINE, *PASSES], ids=named)
in_every_engine_module = pytest.mark.parametrize("path", ENGINE, ids=named)
in_every_pass_module = pytest.mark.parametrize("path", PASSES, ids=named)
of_every_pass = pytest.mark.parametrize("name", NAMES)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines of a function, decorators and docstring left out."""
    first = function.body[0]
    docstring = ast.get_docstring(function, clean=False) is not None
    left_out = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - left_out


def positional(function: Function) -> list[str]:
    names = [arg.arg for arg in function.args.posonlyargs + function.args.args]
    return [name for name in names if name not in {"self", "cls"}]


def nesting(node: ast.AST) -> int:
    """How deep blocks stand in each other; ``elif`` is as deep as its ``if``."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If)
        is_block = isinstance(child, BLOCKS) and not (is_elif and node.orelse == [child])
        if not isinstance(child, SCOPES):
            deepest = max(deepest, nesting(child) + is_block)
    return deepest


def imports(node: ast.AST) -> Iterator[str]:
    """Absolute names of all that a module imports, at any place in it."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        if isinstance(child, ast.ImportFrom):
            assert not child.level, f"line {child.lineno}: write the import in full"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def ours(names: Iterator[str]) -> set[str]:
    """Second components of the names that begin with onnxforge."""
    return {name.split(".")[1] for name in names if name.startswith("onnxforge.")}


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches everything and lets nothing out."""
    broad = {"Exception", "BaseException"}
    types = ast.walk(handler.type) if handler.type else []
    caught = {node.id for node in types if isinstance(node, ast.Name)}
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    return (not handler.type or bool(caught & broad)) and not raises


def test_the_rulers_measure() -> None:
    source = '''
def f(self, a, /, b, *, c, **d):
    """Two
    lines."""
    for x in a:
        if x:
            pass
        elif b:
            while x:
                pass
    try:
        def g():
            with a: pass
    except (OSError, Exception):
        pass
    except Exception as e:
        raise OSError from e
    except:
        pass
'''
    function = ast.parse(source).body[0]
    assert isinstance(function, Function)
    assert length(function) == 16
    assert positional(function) == ["a", "b"]
    assert nesting(function) == 3
    handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
    assert [is_broad(handler) for handler in handlers] == [True, False, True]


@in_every_module
def test_modules_are_short(path: Path) -> None:
    limit = PASS_LINES if path in PASSES else ENGINE_LINES
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit


@in_every_module
def test_functions_are_short(path: Path) -> None:
    found = {function.name: length(function) for function in functions(path)}
    assert {name: lines for name, lines in found.items() if lines > FUNCTION_LINES} == {}


@in_every_module
def test_functions_take_few_arguments(path: Path) -> None:
    found = {function.name: positional(function) for function in functions(path)}
    assert {name: args for name, args in found.items() if len(args) > ARGUMENTS} == {}


@in_every_module
def test_functions_are_flat(path: Path) -> None:
    found = {function.name: nesting(function) for function in functions(path)}
    assert {name: depth for name, depth in found.items() if depth > NESTING} == {}


@in_every_module
def test_public_functions_name_their_arguments(path: Path) -> None:
    public = [function for function in functions(path) if not function.name.startswith("_")]
    assert [function.name for function in public if function.args.kwarg] == []


@in_every_module
def test_no_error_is_swallowed(path: Path) -> None:
    handlers = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if is_broad(handler)] == []


@in_every_module
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
    assert prints == [] or named(path).startswith("onnxforge/cli/")


@in_every_module
def test_modules_take_from_each_other_only_what_is_public(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "onnxforge."
        ):
            continue
        module = importlib.import_module(node.module or "")
        names = {alias.name for alias in node.names}
        assert {n for n in names if not inspect.ismodule(getattr(module, n, None))} <= set(
            getattr(module, "__all__", ())
        )


@in_every_engine_module
def test_the_engine_imports_no_pass(path: Path) -> None:
    assert "passes" not in ours(imports(tree(path)))


@in_every_engine_module
def test_only_the_command_line_knows_the_terminal(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(tree(path))}
    at_terminal = named(path).startswith(("onnxforge/cli/", "onnxforge/progress.py"))
    assert not found & TERMINAL or at_terminal


@in_every_pass_module
def test_passes_see_little_of_the_engine(path: Path) -> None:
    assert ours(imports(tree(path))) <= PASSES_MAY_IMPORT


def test_core_sees_little_of_the_engine() -> None:
    statements = tree(ROOT / "onnxforge/core.py").body
    at_module_level = [node for node in statements if not isinstance(node, ast.ClassDef)]
    assert ours(name for node in at_module_level for name in imports(node)) <= CORE_MAY_IMPORT


def texts(*names: str) -> str:
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)


def test_the_documents_name_all_passes_targets_and_fixtures() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \|", texts("README.md"), re.MULTILINE)
    assert dict(rows) == {name: registry.pass_class(name).effect.value for name in NAMES}
    targets = set(re.findall(r"^([a-z]+):.*## ", texts("Makefile"), re.MULTILINE))
    told = re.findall(r"^make ([a-z]+)", texts("CONTRIBUTING.md"), re.MULTILINE)
    assert set(told) == targets - {"help"}
    rows = re.findall(r"^\| `(\w+)` \|", texts("fixtures/README.md"), re.MULTILINE)
    assert rows == fixtures.names()


def test_every_pipeline_in_the_documents_can_be_read() -> None:
    own = {ROOT / "docs/writing-a-pass.md"}  # shows a pass that is not built in
    sources = [*(ROOT / "onnxforge/cli").glob("*.py"), *{*(ROOT / "docs").glob("*.md")} - own]
    shown = texts("README.md", "CONTRIBUTING.md", *map(named, sources))
    shown += "".join(registry.pass_class(name).__doc__ or "" for name in NAMES)
    quoted = re.findall(r"""(?:--passes '|PassManager\("|`')([^'"]+)['"]""", shown)
    assert len(quoted) > len(NAMES)
    for text in quoted:
        registry.parse(text)


@of_every_pass
def test_a_pass_has_tests_of_its_own(name: str) -> None:
    assert (ROOT / f"tests/passes/test_{name.replace('-', '_')}.py").exists()


def test_every_package_is_shipped() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent for path in ENGINE} | {ROOT / "onnxforge/passes"}
    expected = {named(folder).replace("/", ".") for folder in folders}
    assert set(config["tool"]["setuptools"]["packages"]) == expected


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_no_path_belongs_to_one_machine(path: Path) -> None:
    assert MACHINE_PATH.findall(path.read_text(encoding="utf-8")) == []


@of_every_pass
def test_a_pass_is_named_as_its_module(name: str) -> None:
    cls = registry.pass_class(name)
    assert cls.name == name
    assert cls.__module__ == f"onnxforge.passes.{name.replace('-', '_')}"


@of_every_pass
def test_a_pass_is_a_frozen_dataclass(name: str) -> None:
    cls = registry.pass_class(name)
    assert cls.__dataclass_params__.frozen
    assert set(cls.__annotations__) - {"name", "effect", "codes", "files"} == {
        field.name for field in dataclasses.fields(cls)
    }


@of_every_pass
def test_a_pass_is_documented(name: str) -> None:
    cls = registry.pass_class(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    summary, *rest = text.splitlines()
    assert not summary.startswith(f"{cls.__name__}("), "this is the text dataclass makes"
    assert summary.endswith(".")
    assert len(summary) <= SUMMARY
    assert not rest or not rest[0], "the summary is one line"
    options = {field.name for field in dataclasses.fields(cls)}
    documented = set(
        re.findall(r"^ {4}(\w+):", text.partition("Attributes:")[2], re.MULTILINE)
    )
    assert options - documented == set()
    assert name in text.partition("Example:")[2]


@of_every_pass
def test_every_code_is_explained(name: str) -> None:
    cls = registry.pass_class(name)
    mentioned = set(CODE.findall(inspect.getsource(inspect.getmodule(cls))))
    assert mentioned - set(cls.codes) == set()
    assert all(CODE.fullmatch(code) and meaning for code, meaning in cls.codes.items())


def test_a_code_has_one_meaning() -> None:
    meanings: dict[str, str] = {}
    for name in NAMES:
        for code, meaning in registry.pass_class(name).codes.items():
            assert meanings.setdefault(code, meaning) == meaning, f"{code} of {name}"


def test_help_comes_without_the_heavy_packages() -> None:
    code = (
        "import sys; sys.argv = ['onnxforge', '--help']\n"
        "from onnxforge.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print(*{HEAVY} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "Usage" in done.stdout
    assert done.stderr.split() == []
