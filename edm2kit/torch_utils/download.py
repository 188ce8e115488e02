"""An HTTP download that survives stalls, slow servers, broken connections and restarts."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from edm2kit.torch_utils.dist import progress_bar, warn0

if TYPE_CHECKING:
    import requests  # functions import it themselves: commands that download nothing start a tenth of a second earlier

_CHUNK_BYTES = 1 << 16  # at most this much is lost when a connection breaks
_PROGRESS_BYTES = 16 << 20  # an attempt that gets this far does not count as failed
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_REDIRECTS = 10
_MAX_UNKNOWN_BYTES = 64 << 30  # of a file whose size is not pinned; the largest published network has 6 GB
_ALLOW_HTTP, _MAX_SIZE = "EDM2_ALLOW_HTTP", "EDM2_MAX_DOWNLOAD_GB"


@dataclass(frozen=True)
class Patience:
    """How long to keep trying: `attempts` in a row without progress, waiting 1, 2, 4, ... times `first_wait_sec`.

    A connection on which nothing arrives for `stall_sec`, or less than `min_bytes_per_sec` on average over such a time,
    counts as broken. `sleep` takes seconds and `clock` gives them; tests replace both.
    """

    attempts: int = 6
    first_wait_sec: float = 1.0
    longest_wait_sec: float = 60.0
    connect_sec: float = 20.0
    stall_sec: float = 60.0
    min_bytes_per_sec: float = 1024
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


PATIENT = Patience()


class _Passing(Exception):
    """A failure that may not happen again at the next attempt."""

    def __init__(self, reason: str, wait_sec: float = 0.0):
        super().__init__(reason)
        self.wait_sec = wait_sec


def download(url: str, partial: Path, size_bytes: int | None = None, patience: Patience = PATIENT) -> bool:
    """Download `url` to the file `partial`, resuming an earlier call.

    If this fails, `partial` and a note beside it (the server's ETag or date) stay, so that a later call can resume. If
    the server ignores ranges or its file has changed, the download starts over. `size_bytes` is the size the file must
    have, if known; without it, at most 64 GiB are read, or $EDM2_MAX_DOWNLOAD_GB. Returns whether some of the bytes
    came from an earlier attempt. Raises ValueError, in one line, if the server refuses or `patience` runs out, and for
    an http:// address of another machine, whose answer anyone on the way may change, unless EDM2_ALLOW_HTTP=1 is set.
    """
    import requests

    failures = 0
    while True:
        before = _size(partial)
        try:
            return _attempt(url, partial, size_bytes, patience)
        except (
            _Passing,
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.BaseHTTPError,  # type: ignore[attr-defined]  # urllib3's, without depending on it
        ) as error:
            failures = 0 if _size(partial) - before >= _PROGRESS_BYTES else failures + 1
            if failures >= patience.attempts:
                raise ValueError(
                    f"cannot download {url}: {_reason(error)} (after {failures} attempts; the next call resumes "
                    f"after the {_size(partial)} bytes that arrived)"
                ) from error
            if failures == 1:
                warn0(f"cannot download {url} yet: {_reason(error)}; trying again up to {patience.attempts - 1} times")
            wait_sec = patience.first_wait_sec * 2 ** max(failures - 1, 0)
            asked_sec = error.wait_sec if isinstance(error, _Passing) else 0.0
            patience.sleep(min(max(wait_sec, asked_sec), patience.longest_wait_sec))
        except requests.RequestException as error:
            raise ValueError(f"cannot download {url}: {_reason(error)}") from error


def forget(partial: Path) -> None:
    """Remove a partial download and its note."""
    partial.unlink(missing_ok=True)
    _note(partial).unlink(missing_ok=True)


def _attempt(url: str, partial: Path, size_bytes: int | None, patience: Patience) -> bool:
    """Make one request and read it to the end; returns whether it resumed an earlier one."""
    import requests

    start, version = resume_point(url, partial)
    # identity: sizes and ranges count the file's own bytes, not a compressed form of them
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    with requests.Session() as session, _opened(session, url, headers, patience) as response:
        if response.status_code == 416 and _header(response, "Content-Range") == f"bytes */{start}":
            return True  # an earlier call was stopped after the last byte and before the rename
        continues = _header(response, "Content-Range").startswith(f"bytes {start}-")
        if response.status_code == 416 or (response.status_code == 206 and not continues):
            forget(partial)
            raise _Passing("the server sent another range than requested")
        _check_status(url, response)
        start = start if response.status_code == 206 else 0
        total = _total_bytes(response, start)
        _check_size(url, partial, start, total, size_bytes)
        try:
            _write_note(url, partial, response)
            _read_body(response, partial, start, total, size_bytes, patience)
        except OSError as error:
            if isinstance(error, requests.RequestException):  # these are OSErrors, too
                raise
            raise ValueError(
                f"cannot download {url}: {error.strerror or error}, writing {partial}; the next call resumes after the "
                f"{_size(partial)} bytes that arrived"
            ) from error
    return start > 0


@contextlib.contextmanager
def _opened(
    session: requests.Session, url: str, headers: dict[str, str], patience: Patience
) -> Iterator[requests.Response]:
    """The answer to a GET request after redirects, with its body still to be read."""
    timeout = (patience.connect_sec, patience.stall_sec)
    for _ in range(_MAX_REDIRECTS + 1):
        check_encrypted(url)

        def ask(url: str = url) -> requests.Response:
            return session.get(url, headers=headers, stream=True, timeout=timeout, allow_redirects=False)

        with _within(patience.connect_sec + 2 * patience.stall_sec, ask) as response:
            if not response.is_redirect:
                yield response
                return
            url = urljoin(url, response.headers["location"])
    raise ValueError(f"cannot download {url}: the server redirects more than {_MAX_REDIRECTS} times")


def check_encrypted(url: str) -> None:
    """Raise ValueError for an http:// address of another machine, unless EDM2_ALLOW_HTTP=1 is set."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"cannot download {url}: the server redirects to an address that is not http(s)")
    if parts.scheme == "https" or os.environ.get(_ALLOW_HTTP) == "1" or _is_this_machine(parts.hostname or ""):
        return
    raise ValueError(
        f"cannot download {url}: http:// is not encrypted, so that anyone on the way can replace the file. Use "
        f"https://, or set {_ALLOW_HTTP}=1 if you trust the network"
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _within(limit_sec: float, ask: Callable[[], requests.Response]) -> requests.Response:
    """`ask()`, for at most `limit_sec` seconds: each byte of a header starts the timeout of requests again."""
    answers: queue.SimpleQueue[requests.Response | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(ask())
        except Exception as error:
            answers.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        answer = answers.get(timeout=limit_sec)
    except queue.Empty as error:
        raise _Passing(f"the server did not answer within {limit_sec:g} s") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _read_body(
    response: requests.Response,
    partial: Path,
    start: int,
    total: int | None,
    size_bytes: int | None,
    patience: Patience,
) -> None:
    limit = max_bytes() if size_bytes is None else size_bytes
    # a plain read returns only once all bytes have arrived, and each of them starts the timeout again
    raw: Any = response.raw
    read_some = getattr(raw, "read1", None) or raw._fp.read1  # urllib3 from 2.0 on, and before
    with (
        open(partial, "r+b" if start else "wb") as file,
        progress_bar(
            total, "B", start, what=partial.name.removeprefix(".").removesuffix(".partial"), scaled=True
        ) as bar,
    ):
        file.truncate(start)
        file.seek(start)
        since, arrived = patience.clock(), 0
        while chunk := read_some(_CHUNK_BYTES):
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > limit:  # the server gave no length
                what = f"{limit} bytes expected" if size_bytes is not None else _limit_text(limit)
                raise ValueError(f"cannot download {response.url}: the server sends more than the {what}")
            arrived += len(chunk)
            passed_sec = patience.clock() - since
            if passed_sec >= patience.stall_sec:
                if arrived < patience.min_bytes_per_sec * passed_sec:
                    raise _Passing(f"only {arrived} bytes arrived in {passed_sec:.0f} s")
                since, arrived = patience.clock(), 0
        file.flush()
        os.fsync(file.fileno())
    if total is not None and _size(partial) != total:
        raise _Passing("the connection ended early")


def max_bytes() -> int:
    """The most bytes to read if the size is not pinned."""
    text = os.environ.get(_MAX_SIZE, "")
    if not text:
        return _MAX_UNKNOWN_BYTES
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{_MAX_SIZE} is {text!r:.60}; expected a number of gigabytes, such as 100") from error


def _limit_text(limit: int) -> str:
    return f"{limit / 1e9:.3g} GB allowed for a file of unknown size; if it is right, set {_MAX_SIZE} to more"


def _check_status(url: str, response: requests.Response) -> None:
    code = response.status_code
    if code in _PASSING_STATUS:
        wait_sec = _header(response, "Retry-After")
        raise _Passing(f"the server answered {code} {response.reason}", float(wait_sec) if wait_sec.isdigit() else 0.0)
    if code not in (200, 206):
        raise ValueError(f"cannot download {url}: the server answered {code} {response.reason}; check the address")
    if _header(response, "Content-Type").startswith("text/html") and not url.endswith((".html", ".htm")):
        raise ValueError(
            f"cannot download {url}: the server sent a web page instead of the file; open the URL in a browser"
        )


def _total_bytes(response: requests.Response, start: int) -> int | None:
    """The size of the complete file according to the server; None if it does not say."""
    if start:
        length = _header(response, "Content-Range").rpartition("/")[2]
    elif _header(response, "Content-Encoding") not in ("", "identity"):
        return None
    else:
        length = _header(response, "Content-Length")
    return int(length) if length.isdigit() else None


def _check_size(url: str, partial: Path, start: int, total: int | None, size_bytes: int | None) -> None:
    if total is None:
        return
    if size_bytes is not None and total != size_bytes:
        raise ValueError(f"cannot download {url}: the server's file has {total} bytes, expected {size_bytes}")
    if size_bytes is None and total > (limit := max_bytes()):
        raise ValueError(f"cannot download {url}: the server's file has {total} bytes, more than {_limit_text(limit)}")
    free = shutil.disk_usage(partial.parent).free
    # if the server starts over, the bytes that are there get overwritten
    if total - _size(partial) > free:
        raise ValueError(
            f"cannot download {url}: it needs {total - start} bytes in {partial.parent}, but only {free} are free"
        )


def resume_point(url: str, partial: Path) -> tuple[int, str]:
    """(bytes to keep, the version they belong to); (0, "") if nothing can be resumed safely."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        note = json.loads(_note(partial).read_text())
        if note["url"] == url and note["version"] and isinstance(note["version"], str):
            return _size(partial), note["version"]
    return 0, ""


def _write_note(url: str, partial: Path, response: requests.Response) -> None:
    etag = _header(response, "ETag")
    # RFC 9110 13.1.5: If-Range takes a strong ETag or a date, never a weak ETag
    version = etag if etag.startswith('"') else _header(response, "Last-Modified")
    _note(partial).write_text(json.dumps({"url": url, "version": version}))


def _header(response: requests.Response, name: str) -> str:
    return response.headers.get(name, "").strip()


def _note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    """The cause in one line; the messages of requests quote nested exceptions."""
    import requests

    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        return "nothing arrived for too long"
    if isinstance(error, requests.exceptions.ChunkedEncodingError) or "IncompleteRead" in str(error):
        return "the connection ended early"
    return (str(error).splitlines() or [type(error).__name__])[0]
