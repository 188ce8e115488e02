"""One job at a time in a folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from edm2kit.torch_utils import dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".running"


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Keep `folder`, made where it is missing, for this process until the end, however it ends.

    Raises ValueError at once where another process has it, on this machine or on another of the same file system,
    saying which. Where the file system knows no locks, warns and goes on.
    """
    path = Path(folder) / LOCK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a system that removes no open file leaves it, unlocked
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            _take(file, path)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                yield file
                return
            # the one before us removed the file between our opening and our locking it: once more, with a new one


def _take(file: IO[str], path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"{path.parent} is being written by another job ({file.read().strip() or 'just started'}); wait for it, "
            "or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        dist.warn0(f"the file system of {path.parent} knows no locks: make sure that no other job writes there")
