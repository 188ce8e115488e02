"""Stopping a long command cleanly: SIGTERM, Ctrl-C or a time limit."""

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from types import FrameType

_UNIT_SEC = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration_sec(text: str) -> float:
    """Seconds in a duration such as 90s, 45m, 11.5h or 2d. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)([smhd])\s*", text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a time limit; write for example 90s, 45m, 11.5h or 2d")
    return float(match[1]) * _UNIT_SEC[match[2]]


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block, as Ctrl-C does, so that temporary files are removed.

    Only the first signal interrupts; later SIGTERMs are ignored until the block has ended. Up to Python 3.12 an
    exception inside `Thread.join` marks a running thread as finished: the process would exit while the thread writes.
    """
    former = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if Ctrl-C is ignored, as under nohup
        former[signal.SIGINT] = signal.default_int_handler

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if signal.SIGINT in former:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt

    try:
        for handled in former:
            signal.signal(handled, interrupt)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class StopRequest:
    """A callable that returns True after SIGTERM, after a first Ctrl-C, or once `max_sec` seconds have passed.

    Use it as a context manager, which restores the former signal handlers. A second Ctrl-C interrupts at once.
    """

    def __init__(self, max_sec: float | None = None) -> None:
        self._deadline_sec = None if max_sec is None else time.monotonic() + max_sec
        self._asked = False

    def __call__(self) -> bool:
        if self._asked:
            return True
        return self._deadline_sec is not None and time.monotonic() > self._deadline_sec

    def __enter__(self) -> "StopRequest":
        self._former = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
