"""A headless Chromium, and the server on loopback whose pages it shows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 5
RESULT = re.compile(r"/results/(?P<case>[\w-]+)/(?P<file>[\w-]+\.(?:bin|json))")


class Server(ThreadingHTTPServer):
    """Shows some folders and takes the files of results."""

    daemon_threads = True

    def __init__(self, folders: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = folders
        self.targets: dict[str, tuple[Path, threading.Event]] = {}

    def expect(self, case: str, target: Path) -> tuple[str, threading.Event]:
        """Return the address of the page for a case, and what happens when it is done."""
        finished = threading.Event()
        self.targets[case] = target, finished
        return f"http://127.0.0.1:{self.server_port}/page/page.html?job={case}", finished


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def translate_path(self, path: str) -> str:
        _, first, *rest = urlsplit(path).path.split("/")
        if first not in self.server.folders or ".." in rest:
            return os.devnull
        return str(self.server.folders[first].joinpath(*rest))

    def do_PUT(self) -> None:
        known = RESULT.fullmatch(self.path)
        if not known or known["case"] not in self.server.targets:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        target, finished = self.server.targets[known["case"]]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        (target / known["file"]).write_bytes(content)
        self.send_response(HTTPStatus.NO_CONTENT)
        self.end_headers()
        if known["file"] == "result.json":
            finished.set()

    def log_message(self, *_: object) -> None:
        """Say nothing: what matters ends up in the table."""


@contextlib.contextmanager
def serving(folders: Mapping[str, Path]) -> Iterator[Server]:
    """Serve folders, each below its name, as long as the context lasts."""
    with Server(folders) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


@dataclasses.dataclass(frozen=True)
class Browser:
    """A Chromium that is started anew for each page.

    Attributes:
        program: The executable.
    """

    program: Path

    def visit(self, url: str, finished: threading.Event, timeout: float) -> str:
        """Show a page until it is done; return why it never was, or nothing."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            log = Path(profile, "log.txt")
            own = f"--user-data-dir={profile}/profile"
            command = [str(self.program), *FLAGS, own, url]
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    command,
                    stdout=stream,
                    stderr=stream,
                    env=os.environ | {"TMPDIR": profile},
                    start_new_session=True,
                )
            try:
                return _wait(process, finished, timeout, log)
            finally:
                _end(process)


def _wait(
    process: subprocess.Popen[bytes], finished: threading.Event, timeout: float, log: Path
) -> str:
    end = time.monotonic() + timeout
    while not finished.wait(0.05):
        status = process.poll()
        if status is not None:
            said = log.read_text(errors="replace").strip().splitlines()
            return f"the browser ended with status {status}: {' '.join(said[-1:])}"
        if time.monotonic() > end:
            return f"not within {timeout:g} seconds"
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a browser and the helpers in the group that it leads."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
