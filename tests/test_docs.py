"""The pages say what is so: made from docstrings as they are, with commands that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import click
import pytest

from onnxforge import cli, registry
from onnxforge.errors import SpecError
from onnxforge.lint.rules import RULES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of ours that a page shows, on a line of its own or in one."""
    prose, *rest = text.split("```")
    lines = [line for block in rest[::2] for line in block.splitlines()]
    for part in (prose, *rest[1::2]):
        lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", part)]
    for line in lines:
        if found := re.fullmatch(r"(?:\$ )?(?:\w+ \w+ && )?onnxforge ([a-z].*)", line):
            yield shlex.split(found[1].partition(" | ")[0], comments=True)


def refused(words: list[str]) -> str:
    """What is wrong with the options or the pipeline of a command that a page shows."""
    group = cli._cli
    command = group.commands.get(words[0])
    if command is None:
        return f"no command {words[0]}"
    above = click.Context(group, **group.context_settings)
    try:
        parser = command.make_parser(click.Context(command, above))
        options, _, _ = parser.parse_args(words[1:])
        passes = options.get("passes")
        if passes is not None and "round-bits" not in passes:  # a pass of others
            registry.parse(re.sub(r"stats=[^ }]+", "stats=x", passes))
    except click.BadOptionUsage:  # a page that speaks of an option, without a value
        return ""
    except (click.ClickException, SpecError) as error:
        return f"{shlex.join(words)}: {error}"
    return ""


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *DOCS.rglob("*.md")], ids=lambda path: path.name
)
def test_commands_that_pages_show_are_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [said for words in commands(text) if (said := refused(words))] == []


def test_a_command_that_is_not_understood_is_seen() -> None:
    text = (DOCS / "rules/OF424.md").read_text(encoding="utf-8")
    assert any("shard{single=true}" in words for words in commands(text))
    for right, wrong in (("'shard{single=true}'", "''"), ("--passes", "--pases")):
        shown = text.replace(right, wrong)
        assert shown != text
        assert any(refused(words) for words in commands(shown))
    assert sum(1 for _ in commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 20
