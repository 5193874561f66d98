"""Files behind an http address, of which only the ranges are fetched that are asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote

from onnxforge.errors import OnnxforgeError

__all__ = ["Ranges", "Server", "is_address", "split_address"]

_BLOCK = 1 << 14
_SMALL = 64 << 20  # bytes of a file that is fetched as a whole
_SILENCE = 60  # seconds without a byte
_AHEAD = 64  # blocks that are fetched at once at most where a file is read in a row


def is_address(path: object) -> bool:
    """Whether a path is an address of http."""
    return str(path).startswith(("http://", "https://"))


def split_address(url: str) -> tuple[str, str]:
    """The folder of a file, with a slash at its end, and the name of the file."""
    whole = url.partition("?")[0].partition("#")[0]
    return whole[: whole.rfind("/") + 1], unquote(whole.rpartition("/")[2])


class Ranges:
    """Slices of a file that are fetched block by block and kept.

    What is read in a row is fetched in growing pieces, so that a header takes few requests;
    after a jump, one block is.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        """Take what fetches the bytes between two offsets, and the size of the file."""
        self._fetch = fetch
        self._size = size
        self._blocks: dict[int, bytes] = {}
        self._next = 0
        self._ahead = 1

    def __getitem__(self, index: slice) -> bytes:
        """The bytes from ``index.start`` to ``index.stop``, fewer at the end."""
        start, stop = index.start, min(index.stop, self._size)
        if start >= stop:
            return b""
        first, last = start // _BLOCK, (stop - 1) // _BLOCK
        for block in range(first, last + 1):
            if block not in self._blocks:
                self._load(block, last)
        whole = b"".join(self._blocks[block] for block in range(first, last + 1))
        return whole[start - first * _BLOCK : stop - first * _BLOCK]

    def _load(self, first: int, last: int) -> None:
        self._ahead = min(2 * self._ahead, _AHEAD) if first == self._next else 1
        stop = first + 1
        most = min(max(last + 1, first + self._ahead), -(-self._size // _BLOCK))
        while stop < most and stop not in self._blocks:
            stop += 1
        content = self._fetch(first * _BLOCK, min(stop * _BLOCK, self._size))
        for i in range(first, stop):
            at = (i - first) * _BLOCK
            self._blocks[i] = content[at : at + _BLOCK]
        self._next = stop


class Server:
    """Files below an address, by names with slashes.

    Attributes:
        root: The address of the folder, with a slash at its end.
    """

    def __init__(self, root: str) -> None:
        """Name the folder."""
        self.root = root

    def address(self, name: str) -> str:
        """Where a file is."""
        return self.root + quote(name, errors="replace")  # a name leads to no other host

    @functools.cached_property
    def _system(self) -> Any:
        try:
            import aiohttp
            import fsspec
        except ImportError:
            raise OnnxforgeError("http needs fsspec: pip install 'onnxforge[http]'") from None
        patience = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        return fsspec.filesystem(
            "http",
            skip_instance_cache=True,
            use_listings_cache=False,
            client_kwargs={"timeout": patience},
        )

    @contextlib.contextmanager
    def _told(self, url: str) -> Iterator[None]:
        """Errors of the network as errors of ours; that there is no file is none."""
        import aiohttp

        try:
            yield
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # fsspec takes any trouble for a missing file; the cause says what it was.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
            if cause is None or getattr(cause, "status", None) == 404:
                raise FileNotFoundError(url) from None
            reason = str(cause)
            if isinstance(cause, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
                reason = f"is, or leads to, no address of http: {reason}"
            elif isinstance(cause, aiohttp.TooManyRedirects):
                reason = "leads back to itself"
            elif isinstance(cause, aiohttp.ClientResponseError):
                reason = f"the server answers {cause.status} {cause.message}".rstrip()
            reason = reason.partition("\n")[0] or type(cause).__name__
            raise OnnxforgeError(f"{url}: {reason}") from None

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, None if it is not there.

        Raises:
            OnnxforgeError: The server does not answer, or not how large the file is.
        """
        url, system = self.address(name), self._system
        try:
            with self._told(url):
                size = system.info(url).get("size")
        except FileNotFoundError:
            return None
        if size is None:
            raise OnnxforgeError(f"{url}: the server does not say how large it is")
        return int(size)

    @contextlib.contextmanager
    def slices(self, name: str, size: int) -> Iterator[Ranges]:
        """A file to be read in parts.

        Raises:
            OnnxforgeError: The server does not answer, or gives no parts.
        """
        url, system = self.address(name), self._system

        def fetch(start: int, stop: int) -> bytes:
            with self._told(url):
                file.seek(start)
                content = bytes(file.read(stop - start))
            if len(content) < stop - start:
                raise OnnxforgeError(f"{url}: ends before byte {stop}")
            return content

        try:
            with self._told(url):
                file = system.open(url, "rb", size=size, cache_type="none")
        except FileNotFoundError:
            raise OnnxforgeError(f"{url}: no such file") from None
        with file:
            yield Ranges(fetch, size)

    def get(self, url: str) -> bytes | None:
        """A small file as a whole, by its address; None if it is not there.

        Raises:
            OnnxforgeError: The server does not answer, or the file is not small.
        """
        system, content = self._system, bytearray()
        try:
            with self._told(url), system.open(url, "rb", block_size=0, size=1) as file:
                while (block := file.read(_BLOCK)) and len(content) <= _SMALL:
                    content += block
        except FileNotFoundError:
            return None
        if len(content) > _SMALL:
            raise OnnxforgeError(f"{url}: more than {_SMALL:,} bytes, too much for what it is")
        return bytes(content)
