"""Process many files in several worker processes, with the results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

_CHUNK = 16
_work: Callable[[int], Any]  # what a worker process computes; set once when it starts


def num_cpus() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_in_order(
    work: Callable[[int], Any], items: Sequence[int], workers: int
) -> Generator[tuple[int, Any], None, None]:
    """Yield (item, work(item)) for each item, in order, computed by `workers` processes (1: by this process).

    `work` is sent to each process once, and only a few results per worker are held in memory. Close the generator to
    end the processes. Raises whatever `work` raises, and ValueError if a worker dies.
    """
    if workers <= 1:
        return ((item, work(item)) for item in items)
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(work,))
    chunks = (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
    # submitted here, not in the generator: processes should fork before a progress bar starts its thread
    pending = deque(pool.submit(_run_chunk, chunk) for chunk in islice(chunks, 3 * workers))
    return _collect(pool, pending, chunks)


def _collect(
    pool: ProcessPoolExecutor, pending: deque[Future], chunks: Iterator[Sequence[int]]
) -> Generator[tuple[int, Any], None, None]:
    try:
        while pending:
            results = pending.popleft().result()
            pending.extend(pool.submit(_run_chunk, chunk) for chunk in islice(chunks, 1))
            yield from results
    except BrokenProcessPool as error:
        raise ValueError("a worker process died (out of memory?); run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_chunk(items: Sequence[int]) -> list[tuple[int, Any]]:
    return [(item, _work(item)) for item in items]


def _start_worker(work: Callable[[int], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C

    def end_with_parent() -> None:
        # without this, workers outlive a main process that is killed
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
