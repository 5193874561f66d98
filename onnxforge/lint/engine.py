"""Lint: rules, applied to models and to bundles."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from onnxforge.errors import OnnxforgeError
from onnxforge.lint.bundle import MANIFEST, METADATA, Bundle, Claims, is_tier
from onnxforge.lint.config import Options
from onnxforge.lint.files import LocalFiles
from onnxforge.lint.finding import Finding, Level, Problem, Report, Rule
from onnxforge.lint.rules import RULES
from onnxforge.runtime.ceilings import OLDEST
from onnxforge.runtime.kernels import number
from onnxforge.storage.remote import is_address

if TYPE_CHECKING:
    from onnxforge.lint.model import Model

__all__ = ["lint"]

_MODEL = ".onnx"
_LEVELS: tuple[Level, ...] = get_args(Level)
_RELEASE = re.compile(r"\d{1,4}\.\d{1,4}", re.ASCII)


def lint(paths: Sequence[str | os.PathLike[str]], options: Options | None = None) -> Report:
    """Look for what is wrong with models and bundles; writes nothing.

    Args:
        paths: Model files, folders, and http addresses of either. The models of a folder are
            a bundle.
        options: What to look for.

    Raises:
        OnnxforgeError: A path is not there, or an option means nothing.
    """
    options = options or Options()
    options.refuse_unknown()
    active = [(rule, level) for rule in RULES if (level := options.level(rule))]
    findings: list[Finding] = []
    notes: dict[str, None] = {}
    models: list[str] = []
    for found in _bundles(paths, options):
        models += [found.files.shown(model.name) for model in found.models]
        run = _Run(found, options)
        findings += run.findings(active)
        notes |= dict.fromkeys(run.notes)
    findings.sort(key=lambda finding: (finding.path, finding.code))
    return Report(findings, list(notes), models)


def _claimed(options: Options, claims: Claims) -> Options:
    """The options, with what a bundle says a model is for where they say nothing."""
    oldest = options.min_ort
    if oldest is None and (known := [r for r in claims.onnxruntime if _RELEASE.fullmatch(r)]):
        # of older ones than those in the tables nothing is known
        oldest = max(min(known, key=number), OLDEST, key=number)
    return replace(
        options,
        min_ort=oldest,
        providers=options.providers or tuple(claims.providers),
        browser=options.browser or claims.browser,
    )


class _Run:
    """The rules on one bundle."""

    def __init__(self, found: Bundle, options: Options) -> None:
        self._bundle = found
        self._options = options
        self.notes: list[str] = []

    def findings(self, active: Iterable[tuple[Rule, Level]]) -> Iterator[Finding]:
        """What rules find in the models, one after the other, and in the bundle as a whole."""
        rules = [(rule, level) for rule, level in active if self._may(rule)]
        for model in (each for each in self._bundle.models if each.broken is None):
            options = _claimed(self._options, self._bundle.claims(model.tier))
            for rule, level in rules:
                if rule.of == "model":
                    yield from self._told(rule, level, model, rule.check(model, options))
        for rule, level in rules:
            if rule.of == "bundle":
                problems = rule.check(self._bundle, self._options)
                yield from self._told(rule, level, None, problems)

    def _may(self, rule: Rule) -> bool:
        """Whether a rule may read what it needs."""
        if not rule.reads:
            return True
        reason = "not with --no-hash" if not self._options.hash else None
        if reason is None and self._bundle.files.local("") is None:
            reason = "not over http"
        if reason is not None:
            text = f"{rule.code} {rule.name} reads whole files, {reason}"
            self.notes.append(f"{self._bundle.files.root}: {text}")
        return reason is None

    def _told(
        self, rule: Rule, level: Level, model: Model | None, problems: Iterable[Problem]
    ) -> Iterator[Finding]:
        for problem in problems:
            name = problem.file if problem.file is not None else model.name if model else ""
            path = self._bundle.files.shown(name)
            if not self._options.ignores(rule, path):
                own = min(level, problem.level, key=_LEVELS.index) if problem.level else level
                text = (problem.where, problem.message, problem.passes)
                yield Finding(rule.code, rule.name, own, path, *text)


def _bundles(paths: Iterable[str | os.PathLike[str]], options: Options) -> Iterator[Bundle]:
    """What paths mean: each folder a bundle, files of one folder together."""
    alone: dict[Path, list[str]] = defaultdict(list)
    for given in paths:
        path = Path(given)
        if is_address(given):
            from onnxforge.lint.remote import at_address

            files, names, whole = at_address(str(given))
            yield Bundle(files, names, whole=whole)
        elif path.is_dir():
            yield from _folder(path, options)
        elif path.exists():
            alone[path.parent].append(path.name)
        else:
            raise OnnxforgeError(f"{path}: no such file or folder")
    for folder, names in alone.items():
        yield Bundle(LocalFiles(folder, deep=False), dict.fromkeys(names), whole=False)


def _folder(path: Path, options: Options) -> Iterator[Bundle]:
    """The bundles below a folder."""
    files = LocalFiles(path)
    found: dict[str, list[str]] = defaultdict(list)
    roots = _roots([name for name in files.names if name.endswith(_MODEL)], files.names)
    for name, root in roots.items():
        shown = files.shown(name)
        if not options.excludes(shown):
            found[root].append(name[len(root) :])
    if not roots:
        raise OnnxforgeError(f"{path}: no model (*{_MODEL}) in it")
    for root, names in found.items():
        below = LocalFiles(path / root) if root else files
        yield Bundle(below, names, whole=True)


def _roots(models: Iterable[str], names: Container[str]) -> dict[str, str]:
    """The folder of the bundle that each model belongs to, with a slash at its end.

    That is the next folder above that says what a bundle is and lists it, whatever its layout;
    else the one that holds folders of tiers, or a list of hashes; else that of the model.
    """
    folders = {name: name[: name.rfind("/") + 1] for name in models}
    parents = {_parent(folder) for folder in folders.values() if is_tier(folder)}
    found = {}
    for name, folder in folders.items():
        above = list(_above(folder))
        listed = [each for each in above if f"{each}{MANIFEST}" in names]
        told = [each for each in listed if f"{each}{METADATA}" in names]
        marked = [each for each in above if each in parents or each in listed]
        found[name] = [*told, *marked, folder][0]
    return found


def _above(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = _parent(folder)
    yield ""


def _parent(folder: str) -> str:
    return folder[: folder.rstrip("/").rfind("/") + 1]
