"""What can go wrong inside a command, arranged in its own process before it starts.

Moments are counted in events: calls by which a process opens, renames, removes or flushes something below the folder of
the trial. The number of an event says where a command is, however busy the machine.
"""

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import children_of

# what Python reports before it happens; each has the path first
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir", "os.scandir")
WRITING = ("os.rename", "os.mkdir", "os.truncate", "fsync")
_NEW_MOUNTS, _READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, in the process of `rank`.

    `kind` is a key of KINDS, `at` the number of an event; `number` is a signal, a limit in bytes, a time in
    microseconds, or bits for output streams.
    """

    kind: str
    at: int = 0
    number: int = 0
    rank: int = 0


class Events:
    """Counts the events of this process, and calls `happens(number, is_writing)` before each."""

    def __init__(self, folder: str, happens: Callable[[int, bool], None]):
        self.folder, self.happens = folder, happens
        self.count, self.process, self._busy = 0, os.getpid(), False

    def listen(self) -> None:
        """Start to count; there is no end."""
        flush = os.fsync

        def fsync(file: Any) -> None:
            self._meet(True)
            flush(file)

        os.fsync = fsync  # the one call that Python does not report
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self._busy or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or not self._is_below(os.fsdecode(path)):
            return
        writes = event in WRITING
        if event == "open":
            mode, flags = arguments[1], arguments[2] or 0
            writes = any(letter in (mode or "") for letter in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
        self._meet(writes)

    def _is_below(self, path: str) -> bool:
        return os.path.abspath(path).startswith(self.folder)

    def _meet(self, writes: bool) -> None:
        if os.getpid() != self.process:  # a reading process
            return
        self.count += 1
        self._busy = True
        try:
            self.happens(self.count, writes)
        finally:
            self._busy = False


def _once(act: Callable[[Fault, str], None]) -> Callable[[Fault, str], Callable[[int, bool], None]]:
    """`act` at one event."""

    def make(fault: Fault, folder: str) -> Callable[[int, bool], None]:
        def happens(number: int, writes: bool) -> None:
            if number == fault.at:
                act(fault, folder)

        return happens

    return make


def _kill(fault: Fault, folder: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signal(fault: Fault, folder: str) -> None:
    os.kill(os.getpid(), fault.number)


def _stop(fault: Fault, folder: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill_agent(fault: Fault, folder: str) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def _to_child(number: int) -> Callable[[Fault, str], None]:
    def act(fault: Fault, folder: str) -> None:
        children = children_of(os.getpid())
        if children:
            os.kill(children[fault.number % len(children)], number)

    return act


def _io_error(fault: Fault, folder: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _remove_all(fault: Fault, folder: str) -> None:
    """Someone clears away the results while they are written; the inputs stay."""
    for path in Path(folder).iterdir():
        if path.name.startswith("out"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _disk_full(fault: Fault, folder: str) -> Callable[[int, bool], None]:
    def happens(number: int, writes: bool) -> None:
        if writes and number >= fault.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return happens


def _nothing(fault: Fault, folder: str) -> Callable[[int, bool], None]:
    return lambda number, writes: None


# kind -> what happens at an event
KINDS: dict[str, Callable[[Fault, str], Callable[[int, bool], None]]] = {
    "none": _nothing,
    "kill": _once(_kill),
    "kill by processor time": _nothing,
    "kill inside a write": _nothing,
    "kill the agent": _once(_kill_agent),
    "kill a reader": _once(_to_child(signal.SIGKILL)),
    "stop": _once(_stop),
    "stop a reader": _once(_to_child(signal.SIGSTOP)),
    "signal": _once(_signal),
    "disk full": _disk_full,
    "file size limit": _nothing,
    "input/output error": _once(_io_error),
    "results removed": _once(_remove_all),
    "read-only": _nothing,
    "closed output": _nothing,
    "full output": _nothing,
    "clock": _nothing,
}


def install(fault: Fault, folder: str, count_in: str | None = None) -> None:
    """Arrange `fault` for this process, whose events in `folder` count from now on; `count_in` is a file for them."""
    match fault.kind:
        case "kill by processor time":
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process at once, like kill -9
            signal.setitimer(signal.ITIMER_PROF, max(fault.number, 1) / 1e6)
        case "kill inside a write":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends it after the bytes that still fit
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.number, fault.number))
        case "file size limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.number, resource.RLIM_INFINITY))
        case "closed output" | "full output":
            _lose_output(fault)
        case "clock":
            _confuse_clock(fault.number)
        case "read-only":
            _mount_read_only(folder)
    happens = KINDS[fault.kind](fault, folder)
    Events(folder, happens if count_in is None else _note(count_in)).listen()


def _note(path: str) -> Callable[[int, bool], None]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    # after each event, as a process may end without a farewell
    return lambda number, writes: os.pwrite(file, str(number).encode(), 0) and None


def _lose_output(fault: Fault) -> None:
    """Standard output (bit 1) and standard error (bit 2) go to a pipe that nobody reads, or to a full disk."""
    if fault.kind == "full output":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        read, target = os.pipe()
        os.close(read)
    for bit, stream in ((1, 1), (2, 2)):
        if fault.number & bit:
            os.dup2(target, stream)
    os.close(target)


def _mount_read_only(folder: str) -> None:
    """Make a folder read-only for this process alone; without the right to do so, its permissions have to do."""
    libc, path = ctypes.CDLL(None), folder.encode()
    if libc.unshare(_NEW_MOUNTS) == 0:
        libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None)
        libc.mount(path, path, None, _BIND, None)
        libc.mount(None, path, None, _REMOUNT | _BIND | _READ_ONLY, None)
        os.chdir(folder)  # the way there leads through the new mount


def _confuse_clock(seed: int) -> None:
    """The wall clock jumps by up to a year, back and forth, at every look; the monotonic clock does not."""
    rng, now, now_ns = random.Random(seed), time.time, time.time_ns

    def offset() -> float:
        return rng.choice((-1, 1)) * rng.choice((1, 3600, 86400, 3e7)) * rng.random()

    time.time = lambda: now() + offset()
    time.time_ns = lambda: now_ns() + round(offset() * 1e9)
