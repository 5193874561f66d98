"""The models of fixtures/, built once per process into a temporary folder."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_SOURCE = Path(__file__).parents[2] / "fixtures" / "build.py"


@cache
def source() -> ModuleType:
    """Return fixtures/build.py as a module."""
    # By path: a package on PyPI that is also called build may be installed.
    spec = importlib.util.spec_from_file_location("onnxforge_fixtures", _SOURCE)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {_SOURCE}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fixtures-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _made(name: str) -> Any:
    return source().FIXTURES[name]()


def names(*, runs: bool | None = None, clean: bool | None = None) -> list[str]:
    """Return fixture names, only those that run or pass the checker where asked."""
    return [
        name
        for name in source().FIXTURES
        if runs in (None, _made(name).runs) and clean in (None, _made(name).clean)
    ]


@cache
def built(name: str) -> Path:
    """Return the path of a fixture's model; do not write beside it."""
    return source().write(name, _folder())


def copied(name: str, folder: Path) -> Path:
    """Copy a fixture with its data files into a folder and return the model's path."""
    source = built(name)
    shutil.copytree(source.parent, folder, dirs_exist_ok=True)
    return folder / source.name


def samples(name: str) -> list[dict[str, np.ndarray]]:
    """Return complete sets of inputs, each by input name."""
    return [{k: v.copy() for k, v in sample.items()} for sample in _made(name).samples]
