"""A web server for tests that gives ranges of files and counts what it sends."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Served:
    """What a server was asked.

    Attributes:
        url: Its address, with a slash at its end.
        sent: Bytes of files sent.
        requests: Method and path of each request.
        answers: What paths answer that are no files: status and content.
        ranges: Whether it gives ranges; else it sends files as a whole.
        headers: What all answers say beside, or instead of, what is so.
        pause: Seconds before each answer.
    """

    url: str = ""
    sent: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body of an answer are two packets
    served: Served
    folder: Path

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        time.sleep(self.served.pause)
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append((self.command, path))
        file = self.folder / path.lstrip("/")
        if path in self.served.answers:
            status, content = self.served.answers[path]
            self.start(status, len(content), {})
            with contextlib.suppress(OSError):
                self.wfile.write(content if body else b"")
        elif not file.is_file():
            self.start(404, 0, {})
        else:
            self.give(file, body=body)

    def give(self, file: Path, *, body: bool) -> None:
        size = file.stat().st_size
        start, stop, status, headers = 0, size, 200, {}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.served.ranges:
            headers["Accept-Ranges"] = "bytes"
            if match:
                start, stop, status = int(match[1]), min(int(match[2]) + 1, size), 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.start(status, stop - start, headers)
        if body:
            self.send(file, start, stop)

    def send(self, file: Path, start: int, stop: int) -> None:
        with file.open("rb") as content, contextlib.suppress(OSError):
            content.seek(start)
            while start < stop and (chunk := content.read(min(1 << 16, stop - start))):
                self.wfile.write(chunk)
                self.served.sent += len(chunk)
                start += len(chunk)

    def start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(length)} | headers | self.served.headers
        for key, text in headers.items():
            self.send_header(key, text)
        self.end_headers()

    def log_message(self, format: str, *words: Any) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serve a folder for a ``with`` block."""
    served = Served()
    handler = type("Handler", (_Handler,), {"served": served, "folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
