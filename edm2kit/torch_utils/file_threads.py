"""Threads that read and write files side by side, for which nobody waits for ever."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from edm2kit.torch_utils import dist

T = TypeVar("T")
LOOK_SEC = 60.0  # without a result before the file is named


class Job(Generic[T]):
    """Work on the file `name` in a thread; `given_up` is set if its result has not come in time."""

    def __init__(self, name: str, future: "Future[T]", given_up: threading.Event):
        self.name, self.future, self.given_up = name, future, given_up

    def result(self) -> T:
        """What the work returns or raises, as soon as it does.

        Names the file after a minute; raises ValueError after as long as `dist.timeout_sec` allows.
        """
        limit_sec, waited_sec = dist.timeout_sec(), 0.0
        look_sec = min(LOOK_SEC, limit_sec)
        while not wait([self.future], timeout=look_sec).done:
            waited_sec += look_sec
            text = f"{self.name}: not done after {waited_sec:.0f} s; its disk may not answer"
            if waited_sec >= limit_sec:
                self.given_up.set()
                raise ValueError(f"{text}. Run the same command again; --timeout sets the time to wait")
            dist.warn0(f"{text} (gives up after {limit_sec:.0f} s; see --timeout)", everywhere=True)
        return self.future.result()


class FileThreads:
    """`count` threads that take up work in the order in which it comes. A context manager.

    Nothing can end a thread that waits for a disk that does not answer. Therefore, these do not keep the process from
    ending. The end of the block drops work that has not begun, unless it is to be `complete`, and waits for the rest,
    but a minute at most.

    Example:

        with FileThreads(4) as threads:
            jobs = [threads.submit(str(path), path.read_bytes) for path in paths]
            contents = [job.result() for job in jobs]
    """

    def __init__(self, count: int, complete: bool = False):
        self._complete = complete
        self._todo: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._todo, self._given_up = queue.SimpleQueue(), threading.Event()
        self._threads = [threading.Thread(target=self._run, name="files", daemon=True) for _ in range(count)]

    def __enter__(self) -> "FileThreads":
        for thread in self._threads:
            thread.start()
        return self

    def submit(self, name: str, work: Callable[..., T], *arguments: Any) -> Job[T]:
        """Call `work(*arguments)` in a thread; `name` is that of the file, for messages."""
        future: Future[T] = Future()
        self._todo.put((future, work, arguments))
        return Job(name, future, self._given_up)

    def _run(self) -> None:
        while item := self._todo.get():
            future, work, arguments = item
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del item, future, work, arguments  # while there is nothing to do, they would be kept in memory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while not (self._complete and not self._given_up.is_set()) and not self._todo.empty():
            try:
                self._todo.get_nowait()
            except queue.Empty:  # a thread was faster
                break
        for _ in self._threads:
            self._todo.put(None)
        end = time.monotonic() + (0.0 if self._given_up.is_set() else min(LOOK_SEC, dist.timeout_sec()))
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
