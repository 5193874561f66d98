"""Bundles behind an http address."""

from __future__ import annotations

import contextlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from onnxforge.errors import OnnxforgeError
from onnxforge.lint.bundle import MANIFEST, METADATA, named_files
from onnxforge.lint.files import Files, is_path
from onnxforge.storage.remote import Ranges, Server, split_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["HttpFiles", "at_address"]

_HUB = "https://huggingface.co"
_PAGE = 1000  # files that the hub lists at once
_ASKED = 16  # sizes that are asked for at once


class HttpFiles(Files):
    """Files below an address.

    Attributes:
        root: The address of the folder.
        complete: Whether the list of the files is that of a server, or of a manifest.
    """

    def __init__(
        self, server: Server, sizes: Mapping[str, int], *, complete: bool = False
    ) -> None:
        """Take what is known to be there."""
        self.root = server.root
        self.complete = complete
        self._server = server
        self._sizes: dict[str, int | None] = dict(sizes)
        self._listed = dict(sizes)

    @property
    def names(self) -> Mapping[str, int]:
        """What is known to be there."""
        return self._listed

    def size(self, name: str) -> int | None:
        """Size of a file, asked once."""
        if name not in self._sizes:
            self._sizes[name] = self._server.size(name)
        return self._sizes[name]

    @contextlib.contextmanager
    def slices(self, name: str) -> Iterator[Ranges]:
        """Ranges of a file."""
        with self._server.slices(name, self.size(name) or 0) as content:
            yield content

    def shown(self, name: str) -> str:
        """The address."""
        return self._server.address(name)


def at_address(url: str) -> tuple[HttpFiles, list[str], bool]:
    """What an address means: a model, or a bundle that can be listed.

    Returns:
        The files, names of the models among them, and whether they are a whole bundle.

    Raises:
        OnnxforgeError: There is nothing, or it cannot be listed.
    """
    folder, name = split_address(url)
    if name.endswith(".onnx"):
        return HttpFiles(Server(folder), {}), [name], False
    if name in (MANIFEST, METADATA):
        url = folder
    files = _hub(url) or _listed(Server(url.rstrip("/") + "/"))
    models = [name for name in files.names if name.endswith(".onnx")]
    if not models:
        raise OnnxforgeError(f"{url}: no model (*.onnx) in it")
    return files, models, True


def _hub(url: str) -> HttpFiles | None:
    """A repository of the Hugging Face hub; its tree is listed."""
    hub = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    match = re.fullmatch(
        rf"{re.escape(hub)}/([\w.-]+/[\w.-]+)(?:/(?:tree|resolve)/([^/]+)(/.*)?)?/?", url
    )
    if match is None:
        return None
    repository, revision, below = match[1], match[2] or "main", (match[3] or "").strip("/")
    server = Server(f"{hub}/{repository}/resolve/{revision}/" + (below and f"{below}/"))
    tree = f"{hub}/api/models/{repository}/tree/{revision}" + (below and f"/{quote(below)}")
    content = server.get(f"{tree}?recursive=true")
    if content is None:
        raise OnnxforgeError(f"{url}: no such repository")
    found = _json(content, tree)
    try:
        paths = {str(e["path"]): int(e["size"]) for e in found if e["type"] == "file"}
    except (TypeError, KeyError, ValueError, OverflowError):
        raise OnnxforgeError(f"{tree}: is no list of files") from None
    start = len(below) + 1 if below else 0
    names = {path[start:]: size for path, size in paths.items()}
    seen = {name: size for name, size in names.items() if "/." not in f"/{name}"}
    return HttpFiles(server, seen, complete=len(found) < _PAGE)


def _listed(server: Server) -> HttpFiles:
    """A folder that has a list of hashes, or metadata that name its files."""
    manifest = server.get(server.address(MANIFEST))
    if manifest is not None:
        found = _json(manifest, server.address(MANIFEST))
        files = found.get("files") if isinstance(found, dict) else None
        names = [MANIFEST, *(files if isinstance(files, dict) else ())]
        return HttpFiles(server, _sizes(server, names), complete=True)
    metadata = server.get(server.address(METADATA))
    if metadata is None:
        raise OnnxforgeError(
            f"{server.root}: neither {MANIFEST} nor {METADATA} is there: give the addresses of"
            " models"
        )
    said = _json(metadata, server.address(METADATA))
    return HttpFiles(server, _sizes(server, [METADATA, *named_files(said)]))


def _sizes(server: Server, names: Iterable[str]) -> dict[str, int]:
    """What of some files is there, with the sizes that the server tells."""
    asked = list(dict.fromkeys(filter(is_path, names)))
    with ThreadPoolExecutor(_ASKED) as pool:
        sizes = zip(asked, pool.map(server.size, asked), strict=True)
        return {name: size for name, size in sizes if size is not None}


def _json(content: bytes, url: str) -> Any:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise OnnxforgeError(f"{url}: is no JSON: {error}") from None
