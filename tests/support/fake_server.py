"""A real HTTP server on 127.0.0.1 that misbehaves on request."""

import contextlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer(ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `script[path]` lists what goes wrong at the first, second, ... request.

    Misdeeds: an int answers with that status; "truncate" and "stall" send half of what was asked for and then hang
    up or fall silent; "drip" and "drip-header" send a byte now and then; "to:URL" redirects; "ignore-range",
    "wrong-range", "html" and "no-length" are what they say. Beyond its script the server behaves. `seen` records
    (path, Range header) of each request; an empty `etag` is not sent.
    """

    daemon_threads = True
    # the backlog of many clients that arrive at once
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes], script: dict[str, list[str | int]] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.script = files, script or {}
        self.seen: list[tuple[str, str | None]] = []
        self.etag = '"1"'
        self.lock, self.closing = threading.Lock(), threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def next_misdeed(self, path: str, wanted: str | None) -> str | int | None:
        with self.lock:
            self.seen.append((path, wanted))
            steps = self.script.get(path, [])
            return steps.pop(0) if steps else None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        misdeed = self.server.next_misdeed(self.path, wanted)
        body = self.server.files.get(self.path)
        if body is None or isinstance(misdeed, int):
            return self.send_error(misdeed if isinstance(misdeed, int) else 404)
        if misdeed == "drip-header":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            return self._drip(itertools.repeat(b"x"))
        if isinstance(misdeed, str) and misdeed.startswith("to:"):
            return self._head(302, [("Location", misdeed[3:]), ("Content-Length", "0")])
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if misdeed == "ignore-range" or self.headers.get("If-Range") != self.server.etag:
            start = 0
        if start and start >= len(body):
            return self._head(416, [("Content-Range", f"bytes */{len(body)}"), ("Content-Length", "0")])
        shown = start + 1 if misdeed == "wrong-range" else start
        headers = [("Content-Type", "text/html" if misdeed == "html" else "application/octet-stream")]
        if self.server.etag:
            headers.append(("ETag", self.server.etag))
        if misdeed != "no-length":
            headers.append(("Content-Length", str(len(body) - start)))
        if start:
            headers.append(("Content-Range", f"bytes {shown}-{len(body) - 1}/{len(body)}"))
        self._head(206 if start else 200, headers)
        if misdeed == "drip":
            return self._drip(bytes([byte]) for byte in body[start:])
        half = misdeed in ("truncate", "stall")
        self.wfile.write(body[start : start + (len(body) - start) // 2] if half else body[start:])
        if misdeed == "stall":
            self.wfile.flush()
            self.server.closing.wait(30)
        return None

    def _drip(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            self.wfile.write(part)
            self.wfile.flush()
            if self.server.closing.wait(0.01):
                return

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@contextlib.contextmanager
def serve(files: dict[str, bytes], script: dict[str, list[str | int]] | None = None) -> Iterator[FakeServer]:
    """A running FakeServer."""
    server = FakeServer(files, script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
