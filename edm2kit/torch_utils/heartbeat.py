"""Which process the others wait for: each rank reports that it is alive, and a missing one is named in a minute."""

import contextlib
import hashlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed

BEAT_SEC = 5.0
LATE_SEC = 60.0
_STORE_WAIT_SEC = 20
_ANSWER_SEC = 10.0  # for one question to the store, such as the last before a process gives up
_LISTEN_SEC = 0.1  # between two looks for the next report
_DONE, _FAILED = "done", "failed"  # instead of the number of a beat


class Store(Protocol):
    """What a heartbeat needs of the stores of torch.distributed: texts by name, shared by all ranks."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


@dataclass
class _Seen:
    """What a rank last reported, and when that changed by the clock of this process."""

    beat: str
    steps: int
    who: str
    changed: float


class Heartbeat:
    """Reports where this rank is, looks where the others are, and names those that are late.

    A rank is late if nothing new has come from it for `late_sec` (its process is stopped, or its machine is down), or
    if this rank has waited for it as long (it is alive, but busy with something else, such as a disk that does not
    answer). The lowest rank that is not late itself names the others by `say(text)`: once, and again when they are
    back. `steps()` is the number of times that this rank has come to a point where all ranks meet. `clock` gives
    seconds, `pause(seconds)` lets them pass.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        steps: Callable[[], int],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        late_sec: float = LATE_SEC,
        pause: Callable[[float], object] = time.sleep,
    ):
        self.store, self.rank, self.world_size, self.steps, self.say = store, rank, world_size, steps, say
        self.clock, self.pause = clock, pause
        self.late_sec = self.busy_sec = late_sec
        # torchrun starts all ranks again under the same store
        self._prefix = f"edm2kit/heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._beats = 0
        self._own = (-1, clock())  # steps of this rank, and since when
        self._seen = {other: _Seen("", -1, "", clock()) for other in range(world_size) if other != rank}
        self._named: set[int] = set()
        self._gives_up = False

    def beat(self) -> None:
        """Report, look and speak; to be called every few seconds."""
        self._beats += 1
        self._report(str(self._beats))
        if self._gives_up:
            return  # `late` looks and speaks
        if self.steps() != self._own[0]:
            self._own = (self.steps(), self.clock())
        for lower in range(self.rank):
            self._look_at(lower)
            if self._reason(lower) is None:
                if lower in self._named:
                    self._tell(lower)
                return  # it tells of the others
        for other in self._seen:
            if other > self.rank:
                self._look_at(other)
            self._tell(other)

    def leave(self, failed: bool) -> None:
        """Report that this rank needs the others no more, or that it `failed`."""
        self._report(_FAILED if failed else _DONE)

    def late(self, waited_sec: float | None = None) -> list[str]:
        """Those ranks that are late, such as "rank 3 (process 7 on host) has not reported for 61 s".

        To be called once, by a rank that gives up: after less than `late_sec`, three missing reports are enough. If it
        has `waited_sec` for the others, too short a time even for these, it listens for two reports more. A rank that
        is silent meanwhile is late, and so is one that has not come as far as this one.
        """
        self._look_at_all()
        self.late_sec = self.busy_sec = min(self.late_sec, 3 * BEAT_SEC)
        found = [self._description(other) for other in self._seen if self._reason(other) is not None]
        if found or waited_sec is None:
            return found
        self._gives_up = True
        since, before = self.clock(), {other: seen.beat for other, seen in self._seen.items()}
        self._own = (self.steps(), since - waited_sec)
        unheard = {other for other, beat in before.items() if beat != _DONE}
        while unheard and self.clock() < since + 2 * BEAT_SEC:
            self.pause(_LISTEN_SEC)
            self._look_at_all()
            unheard = {other for other in unheard if self._seen[other].beat == before[other]}
        self.busy_sec = 0.0
        for other in self._seen:
            self.late_sec = 0.0 if other in unheard else math.inf
            if self._reason(other) is not None:
                found.append(self._description(other))
        return found

    def _look_at_all(self) -> None:
        for other in self._seen:
            with contextlib.suppress(RuntimeError):
                self._look_at(other)

    def _tell(self, other: int) -> None:
        is_late = self._reason(other) is not None
        if is_late and other not in self._named:
            self._named.add(other)
            self.say(f"{self._description(other)}; the other ranks wait for it")
        elif not is_late and other in self._named:
            self._named.remove(other)
            self.say(f"rank {other} ({self._seen[other].who}) is back")

    def _report(self, beat: str) -> None:
        self.store.set(f"{self._prefix}/{self.rank}", f"{beat} {self.steps()} {_this_process()}")

    def _look_at(self, other: int) -> None:
        key = f"{self._prefix}/{other}"
        if self.store.check([key]):
            beat, steps, who = self.store.get(key).decode().split(" ", 2)
            if beat != self._seen[other].beat:
                self._seen[other] = _Seen(beat, int(steps), who, self.clock())

    def _reason(self, other: int) -> str | None:
        """Why the others wait for a rank; None if they do not."""
        seen, now = self._seen[other], self.clock()
        if seen.beat == _DONE:
            return None
        if seen.beat == _FAILED:
            return "has ended with an error"
        silent_sec, waiting_sec = now - seen.changed, now - self._own[1]
        if silent_sec >= self.late_sec:
            return f"has not reported for {silent_sec:.0f} s" if seen.beat else f"has not started in {silent_sec:.0f} s"
        if seen.steps < self._own[0] and waiting_sec >= self.busy_sec:
            return f"is alive, but has been busy for {waiting_sec:.0f} s"
        return None

    def _description(self, other: int) -> str:
        who = self._seen[other].who
        return f"rank {other}{f' ({who})' if who else ''} {self._reason(other)}"


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def ask(question: Callable[[], Any], otherwise: Any, limit_sec: float = _ANSWER_SEC) -> Any:
    """What `question()` returns, or `otherwise` if it raises an error or takes too long.

    For a store of torch.distributed: its clients wait for a process that is stopped without limit, and for a network
    that is down as long as TCP does, many minutes.
    """
    answers: list[Any] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError, OSError, AttributeError, ValueError):  # the group may be gone
            answers.append(question())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_sec)
    return answers[0] if answers else otherwise


def is_first_to_report(text: str) -> bool:
    """Whether no other rank has met the same message; True if the other ranks can no longer be asked."""
    key = f"error/{hashlib.sha256(text.encode()).hexdigest()}"
    # fails if the node with the store has ended, or if this torch lacks the function
    return ask(lambda: torch.distributed.distributed_c10d._get_default_store().add(key, 1), 1) == 1


def once(what: str, work: Callable[[], None], limit_sec: float) -> None:
    """Call `work()` on the first rank that comes here with the same `what`; the others wait until it is done.

    For ranks that can no longer meet. If they can no longer be asked either, each of them does the work.
    """
    done = f"done/{what}"
    if not is_first_to_report(what):
        limit = timedelta(seconds=limit_sec)
        # the rank that works may end meanwhile, and the store with it
        ask(lambda: torch.distributed.distributed_c10d._get_default_store().wait([done], limit), None, limit_sec)
        return
    try:
        work()
    finally:
        ask(lambda: torch.distributed.distributed_c10d._get_default_store().set(done, ""), None)


def is_of_group(error: RuntimeError) -> bool:
    """Whether an error says that other ranks cannot be reached; gloo has no class of its own."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _first_line(reason: str) -> str:
    return reason.partition("\n")[0].partition(". This is typically")[0]


def has_timed_out(reason: str) -> bool:
    """Whether an error of the group says that others have not come in time."""
    return any(words in _first_line(reason).lower() for words in ("timed out", "timeout"))


def reason_of_loss(reason: str, late: list[str], limit_sec: float) -> str:
    """Why a process gives up after an error of its group, for a message; `late` are the ranks that it waited for."""
    first_line = _first_line(reason)
    if "EADDRINUSE" in reason:
        return f"port {os.environ.get('MASTER_PORT')} is in use on this machine; set MASTER_PORT to a free one"
    if has_timed_out(reason):
        who = "; ".join(late) or "all of them report that they are alive"
        return (
            f"waited {limit_sec:g} s for the other ranks and gave up: {who}. Run the same command to resume; "
            "--timeout sets the time to wait"
        )
    who = f": {'; '.join(late)}" if late else ""
    return f"another rank has ended{who}. Its own message says why, unless the system killed it ({first_line})"


@contextlib.contextmanager
def watching(
    rank: int, world_size: int, steps: Callable[[], int], say: Callable[[str], None]
) -> Iterator[Callable[[float | None], list[str]]]:
    """Run the heartbeat of this rank in a thread inside the block. Yields `Heartbeat.late`, to learn of the late ranks.

    Without a connection to the store of the process group at MASTER_ADDR, it says so and gives none.
    """
    beats: list[Heartbeat] = []
    ending = threading.Event()
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    silence = f"{host}, port {port}, where the ranks find each other, does not answer"

    def run() -> None:
        failures = 0
        while True:
            try:
                if not beats:
                    # a connection of its own: that of the process group is busy as long as the group waits
                    limit = timedelta(seconds=_STORE_WAIT_SEC)
                    store = torch.distributed.TCPStore(host, int(port), timeout=limit, wait_for_workers=False)
                    beats.append(Heartbeat(store, rank, world_size, steps, say, late_sec=LATE_SEC))
                beats[0].beat()
                failures = 0
            except (RuntimeError, OSError, ValueError):
                failures += 1
                if failures * _STORE_WAIT_SEC > LATE_SEC and not ending.is_set():
                    say(f"{silence}; late ranks go unnamed")
                    return
            if ending.wait(BEAT_SEC):
                return

    def late(waited_sec: float | None) -> list[str]:
        end = time.monotonic() + 2 * BEAT_SEC
        while waited_sec is not None and not beats and time.monotonic() < end:
            time.sleep(_LISTEN_SEC)  # the heartbeat has not begun yet
        if beats:
            return ask(lambda: beats[0].late(waited_sec), [silence], _ANSWER_SEC + 2 * BEAT_SEC)
        return [] if waited_sec is None else [silence]

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    failed = True
    try:
        yield late
        failed = False
    finally:
        ending.set()
        thread.join(timeout=_STORE_WAIT_SEC)
        if beats and not thread.is_alive():
            ask(lambda: beats[0].leave(failed), None)
