"""Models that belong together: the tiers of a bundle, and the graphs of each."""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxforge.errors import ModelError
from onnxforge.lint.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from onnxforge.lint.files import Files

__all__ = [
    "MANIFEST",
    "METADATA",
    "Bundle",
    "Claims",
    "is_reduced",
    "is_tier",
    "named_files",
    "named_statistics",
    "told_graphs",
]

MANIFEST, METADATA = "manifest.json", "metadata.json"

_WORD = r"(?:sq-?|smoothquant-?|dynamic-?|static-?)?(?:fp32|fp16w?|bf16w?|u?int[48]w?)"
_TIER = re.compile(rf"{_WORD}|q[48](?:f16)?|bnb4|quantized|browser", re.IGNORECASE)
_SUMS = re.compile(r".+\.sha256|sha256sums?(?:\.txt)?", re.IGNORECASE)
_FULL = ("", "fp32", "browser")


@dataclass(frozen=True)
class Claims:
    """What a bundle says that models are for.

    Attributes:
        onnxruntime: Releases.
        providers: Execution providers.
        browser: Whether browsers are to load them.
    """

    onnxruntime: Sequence[str]
    providers: Sequence[str]
    browser: bool


class Bundle:
    """Models in one place, and the files around them.

    Attributes:
        files: All files.
        models: The models that are looked at.
        whole: Whether everything that belongs to the bundle is in it; false for single files.
        in_folders: Whether tiers are folders, or told by metadata; else their names end the
            names of files.
    """

    def __init__(self, files: Files, names: Iterable[str], *, whole: bool) -> None:
        """Sort the models of some names into tiers."""
        self.files = files
        self.models = [Model(files, name) for name in names]
        self.whole = whole
        told = {str(g.get("model")): (tier, name) for tier, name, g in _told(self.said)}
        self.in_folders = _sort(self.models, told)

    @functools.cached_property
    def others(self) -> Sequence[Model]:
        """Models that stand beside single files, and may own parts of the same data files."""
        names = () if self.whole else self.files.names.keys() - {m.name for m in self.models}
        return [Model(self.files, name) for name in sorted(names) if name.endswith(".onnx")]

    @functools.cached_property
    def tiers(self) -> Mapping[str, Mapping[str, Model]]:
        """The graphs of each tier by stem; models outside of all tiers are left out."""
        found: dict[str, dict[str, Model]] = defaultdict(dict)
        for model in self.models:
            if model.tier or not self.in_folders:
                found[model.tier][model.stem] = model
        return found if len(found) > 1 else {}

    @property
    def is_bundle(self) -> bool:
        """Whether it is more than a model or two in a folder: it has tiers, or says so."""
        return self.whole and bool(
            self.tiers or {MANIFEST, METADATA} & self.files.names.keys()
        )

    @functools.cached_property
    def manifest(self) -> Any:
        """What the list of hashes says; None without one, text for what is wrong with it."""
        return self._json(MANIFEST)

    @functools.cached_property
    def metadata(self) -> Any:
        """What the bundle says of itself; None without it, text for what is wrong with it."""
        return self._json(METADATA)

    @functools.cached_property
    def sums(self) -> Mapping[str, Sequence[str]]:
        """The lines of each list of SHA-256 that sha256sum reads, by its name."""
        return {
            name: self.files.read(name).decode(errors="replace").splitlines()
            for name in (self.files.names if self.whole else ())
            if _SUMS.fullmatch(name.rpartition("/")[2])
        }

    @property
    def said(self) -> Mapping[str, Any]:
        """The same where it is in the form of onnxforge, else empty."""
        found = self.metadata
        if isinstance(found, dict) and found.get("schema") == 1 and "tiers" in found:
            return found
        return {}

    def claims(self, tier: str) -> Claims:
        """What the bundle says that the models of a tier are for."""
        general = _dict(self.said.get("targets"))
        own = _dict(_dict(_dict(self.said.get("tiers")).get(tier)).get("targets"))
        releases, providers = (
            _words((own if key in own else general).get(key))
            for key in ("onnxruntime", "providers")
        )
        return Claims(releases, providers, tier in _words(general.get("browser")))

    def _json(self, name: str) -> Any:
        if not self.whole or name not in self.files.names:
            return None
        try:
            return json.loads(self.files.read(name).decode())
        except ModelError as error:
            return str(error)
        except (ValueError, RecursionError) as error:
            return f"is no JSON: {error}"


def _dict(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


def _words(found: Any) -> Sequence[str]:
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def told_graphs(said: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The graphs that metadata in the form of onnxforge tell of, and where they do."""
    for tier, name, graph in _told(said):
        yield f"tiers.{tier}.graphs.{name}", graph


def named_files(said: Any) -> Iterator[str]:
    """Models, data and shared files that metadata in the form of onnxforge name."""
    for _, graph in told_graphs(said):
        yield from _words([graph.get("model")])
        yield from _words(graph.get("data"))
    yield from _words(_dict(said).get("files"))


def named_statistics(said: Any) -> Sequence[str]:
    """Files of statistics that metadata in the form of onnxforge name."""
    graphs = _dict(_dict(said).get("graphs")).values()
    return _words([_dict(_dict(graph).get("statistics")).get("file") for graph in graphs])


def _told(said: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for tier, content in _dict(_dict(said).get("tiers")).items():
        for name, graph in _dict(_dict(content).get("graphs")).items():
            if isinstance(graph, dict):
                yield tier, name, graph


def is_tier(folder: str) -> bool:
    """Whether the last part of a folder names a tier."""
    return _TIER.fullmatch(folder.rstrip("/").rpartition("/")[2]) is not None


def is_reduced(tier: str) -> bool:
    """Whether the name of a tier promises smaller weights."""
    return tier.lower() not in _FULL and _TIER.fullmatch(tier) is not None


def _sort(models: Sequence[Model], told: Mapping[str, tuple[str, str]]) -> bool:
    """Give each model its tier and its stem; whether tiers are folders, or told."""
    said = {tier for tier, _ in told.values()}
    others = [model for model in models if model.name not in told]
    folders = {_folder(model) for model in others}
    tiers = {folder for folder in folders if _TIER.fullmatch(folder) or folder in said}
    for model in others:
        folder = _folder(model)
        if folder in tiers:
            model.tier = folder
        elif not tiers:
            model.stem, model.tier = _split(model.stem, said)
    for model in models:
        model.tier, model.stem = told.get(model.name, (model.tier, model.stem))
    return bool(tiers or told)


def _folder(model: Model) -> str:
    """The name of the folder that a model is in."""
    root = model.files.local("")
    above = model.files.root if root is None else root.resolve().as_posix()
    return f"{above.rstrip('/')}/{model.folder}".rstrip("/").rpartition("/")[2]


def _split(stem: str, said: set[str]) -> tuple[str, str]:
    """A stem without its tier, and the tier: the longest ending that names one."""
    for sign in re.finditer(r"(?<=.)[-_.]", stem):
        word = stem[sign.end() :]
        if _TIER.fullmatch(word) or word in said:
            return stem[: sign.start()], word
    return stem, ""
