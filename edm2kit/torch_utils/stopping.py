"""Asking a long job to stop in good order: SIGTERM, Ctrl-C, or a time limit."""

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from types import FrameType

_UNITS_SEC = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration_sec(text: str) -> float:
    """Seconds of 90s, 45m, 11.5h or 2d; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)([smhd])\s*", text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a time limit; write for example 90s, 45m, 11.5h or 2d")
    return float(match[1]) * _UNITS_SEC[match[2]]


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt inside the block, so that temporary files are removed on the way out."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class StopRequest:
    """Callable that turns true once this process got SIGTERM or a first Ctrl-C, or `max_sec` have passed.

    Used as a context manager, which restores the former handlers. A second Ctrl-C interrupts at once.
    """

    def __init__(self, max_sec: float | None = None):
        self._deadline = None if max_sec is None else time.monotonic() + max_sec
        self._asked = False

    def __call__(self) -> bool:
        return self._asked or (self._deadline is not None and time.monotonic() > self._deadline)

    def __enter__(self) -> "StopRequest":
        self._former = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
