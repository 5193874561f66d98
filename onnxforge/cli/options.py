"""What the commands have in common."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxforge.errors import OnnxforgeError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxforge.compare.samples import Cache

__all__ = ["FORMAT", "PATH", "pair", "run_options", "sample_options", "writable"]

PATH = click.Path(path_type=Path, readable=False)  # we say ourselves what is wrong with it
FORMAT = click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What to print on stdout.",
)


_SAMPLES = (
    click.option(
        "--data", multiple=True, type=PATH, help="Samples: .npz, .npy, sound, folders."
    ),
    click.option("--preprocessor", type=PATH, help="Model that makes the inputs from sound."),
    click.option(
        "--seconds", type=float, help="Length of the windows that sound is cut into."
    ),
    click.option(
        "--rate", type=int, default=16000, show_default=True, help="Of sound, in Hz."
    ),
    click.option("--random", "count", type=int, default=0, help="Draw so many samples."),
    click.option("--seed", type=int, default=0, help="Of the samples drawn."),
    click.option("--size", multiple=True, metavar="AXIS=N", help="Length of an open axis."),
    click.option("--cache", type=click.Choice(["empty", "filled"]), help="KV inputs drawn."),
)
_RUN = (
    click.option("--provider", multiple=True, help="Execution provider, preferred first."),
    click.option(
        "--threads", type=int, default=1, show_default=True, help="0: all there are."
    ),
    click.option("--timeout", type=float, metavar="SECONDS", help="For loading and each run."),
)


def sample_options(command: Any) -> Any:
    """Options that say where samples come from.

    Args:
        command: The command, which gets ``samples``, a `Data`, in their place.
    """

    @functools.wraps(command)
    def _gathered(
        *,
        data: tuple[Path, ...],
        preprocessor: Path | None,
        seconds: float | None,
        rate: int,
        count: int,
        seed: int,
        size: tuple[str, ...],
        cache: Cache | None,
        **rest: Any,
    ) -> Any:
        from onnxforge.compare.samples import Data

        sizes = dict(pair("--size", text) for text in size)
        samples = Data(data, preprocessor, seconds, rate, count, seed, sizes, cache)
        return command(samples=samples, **rest)

    return _with(_SAMPLES, _gathered)


def run_options(command: Any) -> Any:
    """Options that say how a model is run.

    Args:
        command: The command, which gets ``setup``, a `Setup`, in their place.
    """

    @functools.wraps(command)
    def _gathered(
        *, provider: tuple[str, ...], threads: int, timeout: float | None, **rest: Any
    ) -> Any:
        from onnxforge.runtime.session import Setup

        setup = Setup(provider or Setup.providers, threads, timeout=timeout)
        return command(setup=setup, **rest)

    return _with(_RUN, _gathered)


def _with(options: Iterable[Any], command: Any) -> Any:
    for option in reversed([*options]):
        command = option(command)
    return command


def pair(option: str, text: str, default: int | None = None) -> tuple[str, int]:
    """A name and a number.

    Raises:
        SpecError: The text is none.
    """
    name, found, number = text.rpartition("=")
    if not found and default is not None:
        return text, default
    try:
        return name, int(number)
    except ValueError:
        raise SpecError(f"{option} {text}: wanted NAME=NUMBER") from None


def writable(
    context: click.Context, option: click.Parameter, path: Path | None
) -> Path | None:
    """Refuse a file that cannot be written before the work is done, not after."""
    if path is not None and path.is_dir():
        raise OnnxforgeError(f"{path}: is a folder")
    if path is not None and not path.parent.is_dir():
        raise OnnxforgeError(f"{path.parent}: no such folder")
    return path
