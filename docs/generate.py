"""Write the pages about passes and rules from their docstrings; `make docs`."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from onnxforge.lint.rules import FAMILIES, RULES
from onnxforge.options import defaults
from onnxforge.registry import entries, pass_class

HERE = Path(__file__).parent
NOTE = "<!-- Made by `make docs` from the docstring; do not edit. -->"
SECTION = re.compile(r"^(Attributes|Example|Examples):\n", re.MULTILINE)


def pages() -> dict[str, str]:
    """All pages by their path below docs/."""
    passes = [name for name, entry in entries().items() if entry.point is None]
    found = {f"passes/{name}.md": of_pass(name) for name in passes}
    found |= {f"rules/{rule.code}.md": of_rule(rule) for rule in RULES}
    found["passes/README.md"] = index_of_passes(passes)
    found["rules/README.md"] = index_of_rules()
    return found


def page(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in (NOTE, *parts) if part) + "\n"


def of_rule(rule: object) -> str:
    found = next(one for one in RULES if one is rule)
    parts = [f"# {found.code} {found.name}", f"Level: {found.level}.", found.summary]
    for heading, body in found.sections.items():
        parts += [f"## {heading}", body]
    return page(*parts)


def of_pass(name: str) -> str:
    cls = pass_class(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    first, *rest = SECTION.split(text)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    parts = [
        f"# {name}",
        f"Class `{cls.__module__}.{cls.__name__}`, effect {cls.effect.value}.",
    ]
    parts.append(first)
    if "Attributes" in sections:
        parts += ["## Options", "\n".join(options(sections["Attributes"], defaults(cls)))]
    if "Example" in sections:
        example = textwrap.dedent(sections["Example"]).strip("\n")
        parts += ["## Example", f"```\n{example}\n```"]
    if cls.codes:
        lines = [f"* `{code}`: {meaning}" for code, meaning in sorted(cls.codes.items())]
        parts += ["## Findings", "\n".join(lines)]
    return page(*parts)


def options(body: str, given: Mapping[str, str | None]) -> Iterator[str]:
    """The options of a pass as a list, with what they are where they are not given."""
    for part in re.split(r"^(?=\w+:)", textwrap.dedent(body), flags=re.MULTILINE):
        if part.strip():
            name, _, meaning = part.partition(":")
            text = given[name]
            default = "has to be given" if text is None else f"default `{text}`"
            yield f"* `{name}` ({default}): {' '.join(meaning.split())}"


def index_of_passes(names: list[str]) -> str:
    rows = ["| pass | effect | what it does |", "|---|---|---|"]
    for name in names:
        cls = pass_class(name)
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        rows.append(f"| [{name}]({name}.md) | {cls.effect.value} | {summary} |")
    return page("# Passes", "\n".join(rows))


def index_of_rules() -> str:
    parts = ["# Rules of `onnxforge lint`"]
    for name, module in FAMILIES.items():
        rows = ["| rule | name | level | what it says |", "|---|---|---|---|"]
        rows += [
            f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.level} | {rule.summary} |"
            for rule in module.RULES
        ]
        parts += [f"## {name.capitalize()}", (module.__doc__ or "").strip(), "\n".join(rows)]
    return page(*parts)


def stale(folder: Path) -> list[str]:
    """Pages that are not as the docstrings say, or that belong to nothing."""
    wanted = pages()
    there = {
        path.relative_to(folder).as_posix()
        for below in ("passes", "rules")
        for path in (folder / below).glob("*.md")
    }
    return sorted(
        name
        for name in wanted.keys() | there
        if name not in there or (folder / name).read_text(encoding="utf-8") != wanted.get(name)
    )


def write(folder: Path) -> None:
    """Write all pages, and remove those that belong to nothing."""
    wanted = pages()
    for name in stale(folder):
        if name in wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (folder / name).unlink()


if __name__ == "__main__":
    write(HERE)
    sys.stdout.write(f"{len(pages())} pages\n")
