"""The pages that are made from docstrings are as they would be made now."""

from __future__ import annotations

import importlib.util
import re
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

from onnxforge.lint.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"


@cache
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date() -> None:
    assert generate().stale(DOCS) == []


def test_a_page_that_is_not_is_seen_and_mended(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    docs = tmp_path / "docs"
    (docs / "rules/OF499.md").write_text("of a rule that is gone")
    (docs / "rules/OF404.md").unlink()
    with (docs / "passes/tidy.md").open("a") as page:
        page.write("more")
    names = ["passes/tidy.md", "rules/OF404.md", "rules/OF499.md"]
    assert generate().stale(docs) == names
    generate().write(docs)
    assert generate().stale(docs) == []


def test_links_lead_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_rules_that_the_guide_names_are_there() -> None:
    guide = (DOCS / "ci.md").read_text(encoding="utf-8")
    table = guide.partition("```toml")[2].partition("```")[0]
    words = re.findall(r'"?([a-z][a-z0-9]+-[a-z0-9-]+)"?', table)
    known = {rule.name for rule in RULES} | {"min-ort", "per-path"}
    assert {"interface-type", "float32-left"} <= set(words) <= known
