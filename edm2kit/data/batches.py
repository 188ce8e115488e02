"""The order of training images, the same for any number of ranks, and the batches that each rank reads."""

import atexit
import ctypes
import functools
import math
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data

from edm2kit.data.dataset import Source
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.rng import derive_seed

# what asks a training run to save and stop; some systems lack some of them. Grid Engine announces the end of a job by
# SIGUSR2; SIGXCPU says that a soft limit of processor time has passed
_STOP_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _STOP_NAMES if hasattr(signal, name))


_WATCH_SEC = 5.0  # between two looks at a wait
LOOK_SEC = 60.0  # without a batch before the reading processes are named
_READ_TOGETHER = 8  # batches at most, by a thread that takes less than _FAST_SEC for each
_FAST_SEC = 0.002
_SHARED_MEMORY = "/dev/shm"
_MAX_TMPDIR_BYTES = 75  # a socket's path has at most 107, and its name in the folder takes 32


class GlobalOrder:
    """The endless sequence of training images: each epoch is an independent random permutation.

    Position p of the sequence is image p % num_images of permutation p // num_images. A permutation depends only on
    (seed, epoch), so a resumed run sees the same sequence, on any number of ranks. At most two permutations are kept in
    memory. Raises ValueError for fewer than one image.
    """

    def __init__(self, num_images: int, seed: int):
        if num_images < 1:
            raise ValueError(f"cannot order {num_images} images; expected at least 1")
        self.num_images = num_images
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def indices(self, start_nimg: int, count: int) -> np.ndarray:
        """The images at positions start_nimg ... start_nimg + count - 1, int64 [count].

        Raises ValueError for negative arguments.
        """
        if start_nimg < 0 or count < 0:
            raise ValueError(f"start_nimg is {start_nimg} and count {count}; expected numbers from 0 up")
        parts = [np.empty(0, np.int64)]
        position, end = start_nimg, start_nimg + count
        while position < end:
            epoch, offset = divmod(position, self.num_images)
            if epoch not in self._permutations:
                if len(self._permutations) == 2:
                    del self._permutations[min(self._permutations)]
                # sorting a bit stream that numpy promises never to change; its shuffles may change between versions
                keys = np.random.PCG64(derive_seed(self.seed, "epoch", epoch)).random_raw(self.num_images)
                self._permutations[epoch] = np.argsort(keys, kind="stable")
            part = self._permutations[epoch][offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)


class MicroBatch(NamedTuple):
    """The input of one forward and backward pass.

    `raw` [n, C, H, W] as stored, `labels` float32 [n, label_dim], and `positions` in the global order, int64 [n], from
    which the random numbers of each image derive.
    """

    raw: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with `raw` and `labels` on `device`; the host does not wait for the copy to a GPU."""
        return MicroBatch(_copied(self.raw, device), _copied(self.labels, device), self.positions)


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only copies from pinned memory run beside the host
    return tensor.to(device, non_blocking=True)


def micro_batch_sizes(batch_size: int, world_size: int, batch_gpu: int | None = None) -> list[int]:
    """The micro-batches of each rank for one global batch: at most `batch_gpu` images each (None: one micro-batch).

    Raises ValueError if the batch cannot be divided equally among the ranks.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"a batch of {batch_size} images cannot be divided among {world_size} processes; "
            f"use a multiple of {world_size}"
        )
    share = batch_size // world_size
    part = share if batch_gpu is None else min(batch_gpu, share)
    if part < 1:
        raise ValueError(f"batch_gpu is {batch_gpu}; expected at least 1 image per process")
    return [min(part, share - done) for done in range(0, share, part)]


def training_batches(
    source: Source,
    order: GlobalOrder,
    start_nimg: int,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    batch_gpu: int | None = None,
    workers: int = 0,
) -> Generator[MicroBatch, None, None]:
    """This rank's endless stream of micro-batches, starting with the step at position `start_nimg`.

    Each step yields len(micro_batch_sizes(batch_size, world_size, batch_gpu)) micro-batches. The global batch [nimg,
    nimg + batch_size) is divided into one contiguous share per rank, and a share into contiguous micro-batches.
    `workers` processes read ahead (0: a thread of this process reads); close the generator to end them. The global
    random state is not used. Raises ValueError, naming the file, if an image cannot be read, and if nothing is read for
    as long as `dist.timeout_sec` allows.
    """
    if order.num_images != len(source):
        raise ValueError(f"the order is for {order.num_images} images, but the data set has {len(source)}")
    sizes = micro_batch_sizes(batch_size, world_size, batch_gpu)
    plan = _Plan(order, start_nimg, batch_size, rank, sizes)
    closing = multiprocessing.RawValue(ctypes.c_bool, False)
    share_memory = workers == 0 or _can_share_memory(source, max(sizes), workers)
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        _Reader(source, share_memory),
        sampler=plan,
        batch_size=None,
        collate_fn=_identity,
        num_workers=workers,
        timeout=min(LOOK_SEC, dist.timeout_sec()) if workers else 0,
        worker_init_fn=functools.partial(_ignore_signals, closing),
        generator=torch.Generator(),  # otherwise the loader takes a seed from the global generator
    )
    return _stream(loader, closing, str(source.path))


def _stream(
    loader: torch.utils.data.DataLoader, closing: ctypes.c_bool, where: str
) -> Generator[MicroBatch, None, None]:
    # a generator of its own: training_batches checks its arguments when it is called
    def close() -> None:
        closing.value = True

    # a worker must not see these signals before _ignore_signals has run
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    on_death = signal.getsignal(signal.SIGCHLD)
    others = multiprocessing.active_children()
    try:
        batches: Iterator[Any] = iter(loader)
        if signal.getsignal(signal.SIGCHLD) is not on_death:
            # the loader's handler raises in the middle of a step if a worker dies; next() below notices it as well
            signal.signal(signal.SIGCHLD, on_death)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    readers = [child for child in multiprocessing.active_children() if child not in others]
    look_sec = min(LOOK_SEC, dist.timeout_sec())
    if not loader.num_workers:
        batches = _ReadingThread(batches, look_sec)
    # registered after the loader's own exit handlers, so it runs before them
    atexit.register(close)
    watch = _Watch(readers, look_sec, where)
    try:
        while True:
            batch = _next_watched(batches, watch)
            if isinstance(batch, Exception):
                raise batch
            yield MicroBatch(*(torch.as_tensor(part) for part in batch))
    finally:
        watch.ended.set()
        if isinstance(batches, _ReadingThread):
            batches.close()
        del batches  # ends the workers, even if a traceback keeps this frame alive
        for reader in readers:
            if reader.is_alive():
                reader.kill()  # one that is stopped would keep this process from ending
        close()
        atexit.unregister(close)


class _ReadingThread:
    """Reads the batches of a loader without processes when they are asked for, so that a dead disk can be given up.

    Nothing can end a thread that reads from a disk that does not answer, but it does not keep the process from ending.
    After `look_sec` it raises queue.Empty, and can be asked again, as a loader with processes can.

    Waking a thread takes as long as reading 20 small images. If batches are read fast, it therefore reads some more.
    """

    def __init__(self, batches: Iterator[Any], look_sec: float):
        self._batches, self._look_sec = batches, look_sec
        self._is_asked, self._count = False, 1
        self._ready: deque[tuple[Any, BaseException | None]] = deque()
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._each_sec: queue.SimpleQueue[float] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def _run(self) -> None:
        while count := self._asked.get():
            started = time.monotonic()
            try:
                for _ in range(count):
                    self._ready.append((next(self._batches), None))
            except BaseException as error:
                self._ready.append((None, error))
            self._each_sec.put((time.monotonic() - started) / count)

    def __iter__(self) -> "_ReadingThread":
        return self

    def __next__(self) -> Any:
        while not self._ready:
            if not self._is_asked:
                self._asked.put(self._count)
            self._is_asked = True
            try:
                each_sec = self._each_sec.get(timeout=self._look_sec)
            except queue.Empty:
                if not self._ready:  # those before the one that takes so long are not held back
                    raise
            else:
                self._is_asked = False
                self._count = min(2 * self._count, _READ_TOGETHER) if each_sec < _FAST_SEC else 1
        batch, error = self._ready.popleft()
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """End the thread, unless it is stuck."""
        self._asked.put(0)


class _Watch:
    """Kills reading processes after the longest wait for them, so that what waits for them raises an error.

    The limit of the loader does not hold while it takes a batch from a process that is stopped at that moment. Without
    `readers`, a thread reads, for which its own limit holds. `since` is when the wait began, None if there is none;
    `where` is the path of the data.
    """

    def __init__(self, readers: list[multiprocessing.process.BaseProcess], look_sec: float, where: str):
        self.readers, self.look_sec, self.where = readers, look_sec, where
        self.since: float | None = None
        self.has_killed = False
        self.ended = threading.Event()
        if readers:
            threading.Thread(target=self._run, name="readers", daemon=True).start()

    def _run(self) -> None:
        limit_sec, warned = dist.timeout_sec() + self.look_sec, False
        while not self.ended.wait(min(self.look_sec, _WATCH_SEC)):
            since = self.since
            waited_sec = 0.0 if since is None else time.monotonic() - since
            if waited_sec > limit_sec:
                self.has_killed = True
                self.kill()
                return
            if waited_sec > 1.5 * self.look_sec and not warned:
                warned = True
                dist.warn0(self.silence(waited_sec))

    def kill(self) -> None:
        """Kill the reading processes: one that is stopped would keep this process from ending."""
        for reader in self.readers:
            reader.kill()

    def silence(self, waited_sec: float) -> str:
        """What has not happened for so long, for a message."""
        if not self.readers:
            return f"{self.where}: no images have been read for {waited_sec:.0f} s; its disk may not answer"
        pids = ", ".join(str(reader.pid) for reader in self.readers)
        return (
            f"the reading processes ({pids}) have read nothing for {waited_sec:.0f} s: one may be stopped, or the disk "
            "of --data does not answer"
        )


def _next_watched(batches: Iterator[Any], watch: _Watch) -> Any:
    """The next batch of a loader, which gives up after `watch.look_sec` but can be asked again.

    Raises ValueError if one of its processes has died, or if they, or the thread that reads, are silent for too long.
    """
    limit_sec, waited_sec = dist.timeout_sec(), 0.0
    while True:
        watch.since = time.monotonic()
        try:
            return next(batches)
        except (queue.Empty, RuntimeError, OSError, EOFError) as error:  # the last two are of a reader's socket
            first_line = (str(error).splitlines() or [type(error).__name__])[0].strip()
            if watch.has_killed:
                text = watch.silence(time.monotonic() - watch.since)
                raise ValueError(f"{text}. Run the same command to resume; --timeout sets the time to wait") from error
            if not watch.readers and not isinstance(error, queue.Empty):
                raise
            if watch.readers and "timed out" not in first_line:
                raise ValueError(
                    f"a reading process died ({first_line}). The system may have killed it for lack of memory: use "
                    "fewer --workers"
                ) from error
            waited_sec += watch.look_sec
            text = watch.silence(waited_sec)
            if waited_sec >= limit_sec:
                watch.kill()
                raise ValueError(f"{text}. Run the same command to resume; --timeout sets the time to wait") from error
            dist.warn0(f"{text} (gives up after {limit_sec:.0f} s; see --timeout)")
        finally:
            watch.since = None


def next_step(
    micro_batches: Iterator[MicroBatch], rounds: int, wanted: bool
) -> tuple[list[MicroBatch], Exception | None]:
    """The micro-batches of the next step, or the error in reading them."""
    try:
        return ([next(micro_batches) for _ in range(rounds)] if wanted else []), None
    except (ValueError, OSError) as error:
        return [], error


class _Plan(torch.utils.data.Sampler):
    """(positions, indices) of each micro-batch of one rank."""

    def __init__(self, order: GlobalOrder, start_nimg: int, batch_size: int, rank: int, sizes: list[int]):
        self.order, self.start_nimg, self.batch_size, self.rank, self.sizes = order, start_nimg, batch_size, rank, sizes

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        position = self.start_nimg + self.rank * sum(self.sizes)
        while True:
            first = position
            for size in self.sizes:
                yield np.arange(first, first + size), self.order.indices(first, size)
                first += size
            position += self.batch_size


class _Reader(torch.utils.data.Dataset):
    """Reads micro-batches. Returns errors instead of raising them: the loader would wrap them in its own traceback."""

    def __init__(self, source: Source, share_memory: bool):
        self.source, self.share_memory = source, share_memory

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray]) -> Any:
        positions, indices = key
        try:
            raw, labels = self.source.read(indices), self.source.read_labels(indices)
        except (ValueError, OSError) as error:
            return error
        if not self.share_memory:
            return raw, labels, positions  # the loader sends arrays through a pipe, but tensors through shared memory
        return MicroBatch(torch.from_numpy(raw), torch.from_numpy(labels), torch.from_numpy(positions))


def _can_share_memory(source: Source, batch_size: int, workers: int) -> bool:
    """Whether reading processes can pass batches in shared memory, which is faster than through pipes.

    Without enough of it (a container's default is 64 MB), or without sockets to pass it on, the loader would wait
    forever for a batch that its worker failed to send.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _MAX_TMPDIR_BYTES:
        dist.warn0(
            f"the folder of temporary files, {folder}, has too long a name for sockets, so that images are read more "
            f"slowly; set TMPDIR to one of at most {_MAX_TMPDIR_BYTES} characters"
        )
        return False
    if not os.path.isdir(_SHARED_MEMORY):
        return True
    # each worker prepares two batches; the one in use and the one that waits come on top
    batches = (2 * workers + 2) * dist.env_int("LOCAL_WORLD_SIZE", 1)
    needed = batches * batch_size * math.prod(source.item_shape) * source.item_dtype.itemsize
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        dist.warn0(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, but --workers {workers} needs {needed / 1e6:.0f} MB, so "
            "that images are read more slowly. Enlarge it (docker run --shm-size 8g), or use fewer --workers"
        )
    return needed <= free


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(closing: ctypes.c_bool, worker: int) -> None:
    # Ctrl-C, a closed terminal, or a scheduler ending the job, also reaches the workers, while the training process
    # still needs them to finish its step and save; they end when it closes them, or with it
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
