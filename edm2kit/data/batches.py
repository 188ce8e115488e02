"""Which image is trained on when: one global order, the same for any number of ranks."""

import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.utils.data

from edm2kit.data.dataset import ImageDataset
from edm2kit.torch_utils.rng import derive_seed


class GlobalOrder:
    """The endless sequence of training images: epoch after epoch, each in an independent random order.

    Position p of the sequence is image p % num_images of permutation p // num_images, and a permutation depends on
    (seed, epoch) alone: a resumed run, or one on another number of ranks, sees the same sequence. At most two
    permutations are held. Raises ValueError for fewer than one image or a negative position.
    """

    def __init__(self, num_images: int, seed: int):
        if num_images < 1:
            raise ValueError(f"an order of {num_images} images; expected at least 1")
        self.num_images = num_images
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def indices(self, start_nimg: int, count: int) -> np.ndarray:
        """The images at positions start_nimg ... start_nimg + count - 1, int64 [count]."""
        if start_nimg < 0 or count < 0:
            raise ValueError(f"positions {start_nimg} to {start_nimg + count}; expected numbers from 0 up")
        parts = [np.empty(0, np.int64)]
        position, end = start_nimg, start_nimg + count
        while position < end:
            epoch, offset = divmod(position, self.num_images)
            part = self._permutation(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:
                del self._permutations[min(self._permutations)]
            # sorting a bit stream that numpy promises never to change; its shuffles may change between versions
            keys = np.random.PCG64(derive_seed(self.seed, "epoch", epoch)).random_raw(self.num_images)
            self._permutations[epoch] = np.argsort(keys, kind="stable")
        return self._permutations[epoch]


class MicroBatch(NamedTuple):
    """What one forward and backward pass takes: raw [n, C, H, W], labels float32 [n, label_dim], and the images'
    positions in the global order, int64 [n] (the seed of each image's randomness)."""

    raw: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def micro_batch_sizes(batch_size: int, world_size: int, batch_gpu: int | None = None) -> list[int]:
    """How a rank splits its share of a global batch: parts of at most `batch_gpu` images (None: a single part).

    The same on every rank. Raises ValueError where the ranks' shares would differ.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"a batch of {batch_size} images does not divide over {world_size} processes; "
            f"use a multiple of {world_size}"
        )
    share = batch_size // world_size
    part = share if batch_gpu is None else min(batch_gpu, share)
    if part < 1:
        raise ValueError(f"{batch_gpu} images at a time on each process; expected at least 1")
    return [min(part, share - done) for done in range(0, share, part)]


def training_batches(
    dataset: ImageDataset,
    order: GlobalOrder,
    start_nimg: int,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    batch_gpu: int | None = None,
    workers: int = 0,
) -> Generator[MicroBatch, None, None]:
    """This rank's micro-batches, without end, from the step that starts at position `start_nimg`.

    A step is len(micro_batch_sizes(batch_size, world_size, batch_gpu)) micro-batches. Global batch [nimg, nimg +
    batch_size) is cut into one contiguous share per rank, in rank order, and a share into contiguous micro-batches.
    `workers` processes read ahead (0: none); close the iterator to end them. No global random number is drawn. Raises
    ValueError, naming the file, when one cannot be read.
    """
    if order.num_images != len(dataset):
        raise ValueError(f"the order is one of {order.num_images} images, the data set has {len(dataset)}")
    sizes = micro_batch_sizes(batch_size, world_size, batch_gpu)
    plan = _Plan(order, start_nimg, batch_size, rank, sizes)
    closing = multiprocessing.RawValue(ctypes.c_bool, False)
    loader = torch.utils.data.DataLoader(
        _Reader(dataset),
        sampler=plan,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=functools.partial(_outlive_signals, closing),
        generator=torch.Generator(),  # else the loader takes a seed from the global generator
    )
    return _stream(loader, closing)


def _stream(loader: torch.utils.data.DataLoader, closing: ctypes.c_bool) -> Generator[MicroBatch, None, None]:
    def close() -> None:
        closing.value = True

    batches = iter(loader)
    # registered after the loader's own exit handlers, so it runs before them
    atexit.register(close)
    try:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        del batches  # ends the workers, even where a traceback keeps this frame
        close()
        atexit.unregister(close)


class _Plan:
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


class _Reader:
    """Reads a micro-batch; what goes wrong is returned, since the loader would wrap it in its own traceback."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[np.ndarray, np.ndarray]) -> MicroBatch | Exception:
        positions, indices = key
        try:
            raw, labels = map(torch.from_numpy, self.dataset.read_batch(indices))
        except (ValueError, OSError) as error:
            return error
        return MicroBatch(raw, labels, torch.from_numpy(positions))


def _as_is(batch: MicroBatch | Exception) -> MicroBatch | Exception:
    return batch


def _outlive_signals(closing: ctypes.c_bool, worker: int) -> None:
    # Ctrl-C, or a scheduler ending the job, reaches the workers too, while the training process still needs them to
    # finish its step and save; they go when it closes them, or with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
