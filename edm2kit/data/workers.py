"""Process many files in several worker processes, with the results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from edm2kit.torch_utils import dist

LOOK_SEC = 60.0  # without a result before the worker processes are named
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
    end the processes. Raises whatever `work` raises, and ValueError if a worker dies, or if nothing is done for as long
    as `dist.timeout_sec` allows.
    """
    if workers <= 1:
        return ((item, work(item)) for item in items)
    workers = min(workers, max(2, -(-len(items) // _CHUNK)))  # more would have nothing to do
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(work,))
    chunks = (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
    # submitted here, not in the generator: processes should fork before a progress bar starts its thread
    pending = deque(pool.submit(_run_chunk, chunk) for chunk in islice(chunks, 3 * workers))
    own = [child for child in multiprocessing.active_children() if child not in others]
    return _collect(pool, own, pending, chunks)


def _collect(
    pool: ProcessPoolExecutor,
    processes: list[multiprocessing.process.BaseProcess],
    pending: deque[Future],
    chunks: Iterator[Sequence[int]],
) -> Generator[tuple[int, Any], None, None]:
    try:
        while pending:
            results = _result_of(pending.popleft(), processes)
            pending.extend(pool.submit(_run_chunk, chunk) for chunk in islice(chunks, 1))
            yield from results
    except BrokenProcessPool as error:
        raise ValueError("a worker process died (out of memory?); run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result_of(job: Future, processes: list[multiprocessing.process.BaseProcess]) -> list[tuple[int, Any]]:
    """The result of a job; ValueError, after a warning every minute, if `processes` do nothing for too long."""
    limit_sec, waited_sec = dist.timeout_sec(), 0.0
    look_sec = min(LOOK_SEC, limit_sec)
    while not wait([job], timeout=look_sec).done:
        waited_sec += look_sec
        pids = ", ".join(str(process.pid) for process in processes)
        text = (
            f"the worker processes ({pids}) have finished nothing for {waited_sec:.0f} s: one may be stopped, or a "
            "disk does not answer"
        )
        if waited_sec >= limit_sec:
            for process in processes:
                process.kill()  # one that is stopped would keep this process from ending
            raise ValueError(f"{text}. Run the same command to resume; --timeout sets the time to wait")
        dist.warn0(f"{text} (gives up after {limit_sec:.0f} s; see --timeout)")
    return job.result()


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
