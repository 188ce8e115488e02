"""File locks: one process at a time trains in a folder or downloads a file."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from edm2kit.torch_utils import dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
LOCK_NAME = ".running"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of `folder` inside the block; the folder is created if needed.

    Raises ValueError at once if another process holds it, on this machine or on another one of the same file system.
    """

    def refuse(owner: str) -> None:
        raise ValueError(
            f"{folder} is being written by another run ({owner}); wait for it to finish, or choose another folder"
        )

    with file_lock(Path(folder) / LOCK_NAME, refuse):
        yield


@contextlib.contextmanager
def file_lock(path: Path, when_held: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path` inside the block; a process that dies releases it.

    If another process holds it, `when_held(owner)` is called, `owner` being text for a message: it raises, or returns
    to wait. If the file system has no locks, prints a warning and continues without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_locked(path, when_held) as file:
        with contextlib.suppress(OSError):  # a full disk: the lock works without the name of its owner
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows cannot remove an open file; an unlocked one does no harm
                path.unlink()


@contextlib.contextmanager
def _open_locked(path: Path, when_held: Callable[[str], None]) -> Iterator[IO[str]]:
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            _acquire(file, path, when_held)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield file
                return
            # the former owner removed the file after we opened it: a lock on it keeps nobody out, so open a new one


def _acquire(file: IO[str], path: Path, when_held: Callable[[str], None]) -> None:
    if not HAS_LOCKS:
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            when_held(file.read().strip() or "just started")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        dist.warn0(f"the file system of {path.parent} has no file locks: make sure that no other process writes there")
