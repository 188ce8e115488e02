"""Weighted sums of stored weights, many at once, in one pass over their files.

Sums run in float32: rounding of a coefficient and of the sum comes to about 6e-8 of the largest coefficient,
thousands of times below what inputs stored in half precision bring along.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edm2kit.snapshots.file_format import DTYPES, network_on_meta, stored_dtype
from edm2kit.snapshots.weights import WeightReader, Weights

_SCRATCH_BYTES = 1 << 24  # for the values of a tensor that are summed at once: memory knows no size of network
_INPUTS_AT_ONCE = 48  # no number of inputs, and no number of outputs
_BLOCK = 4096  # values of all inputs that are widened, then multiplied while they lie in the cache
_PADDING = 16  # rows a power of two apart would compete for the same lines of the cache
_MAX_THREADS = 4


@dataclass(frozen=True)
class _Stretch:
    """Values start..stop-1 of a flattened tensor, to be made `dtype`; buffers are not averaged."""

    name: str
    start: int
    stop: int
    averaged: bool
    dtype: torch.dtype

    @property
    def length(self) -> int:
        return self.stop - self.start


def weighted_sums(
    inputs: Sequence[Weights], coefficients: np.ndarray, dtype: str = "float32"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Sums over `inputs` with each row of `coefficients` [outputs, inputs], a stretch of a tensor at a time.

    Yields (name, values [outputs, n]): the tensor's next n values, front to back, tensors in the order of the
    network's state dict, in the dtype that a snapshot of `dtype` stores them in. Buffers, which all inputs must
    share, come unchanged. Inputs without weight are not read. The next values overwrite them. While this runs, torch
    computes on one thread, and as many stretches as it had threads are under way at once. Raises ValueError, naming
    the input, for a file that ends early, weights that are not finite, other buffers.
    """
    used = np.flatnonzero(coefficients.any(axis=0))
    matrix = torch.from_numpy(coefficients[:, used]).float()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(WeightReader(inputs[i])) for i in used]
        threads = min(stack.enter_context(_one_thread_each()), _MAX_THREADS)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        net = network_on_meta(inputs[used[0]].header, inputs[used[0]].name)
        arrays = [name for name, weight in net.named_parameters() if weight.ndim]  # and not the scalar gains
        itemsize = _common(reader.dtype(name) for reader in readers for name in arrays).itemsize
        length = _stretch_length(len(matrix), itemsize)
        # used again and again: fresh pages for every stretch cost a fifth of the time
        scratch = [_Scratch(len(matrix), len(readers), length, itemsize) for _ in range(threads + 1)]
        under_way: deque[tuple[str, Future[torch.Tensor]]] = deque()
        for index, stretch in enumerate(_stretches(net, length, dtype)):
            work = _sum if stretch.averaged else _same
            under_way.append((stretch.name, pool.submit(work, readers, stretch, matrix, scratch[index % len(scratch)])))
            if len(under_way) > threads:
                name, values = under_way.popleft()
                yield name, values.result()
        for name, values in under_way:
            yield name, values.result()


class _Scratch:
    """Where one stretch is read, summed and rounded."""

    def __init__(self, num_outputs: int, num_inputs: int, length: int, itemsize: int):
        at_once, block = min(num_inputs, _INPUTS_AT_ONCE), min(_BLOCK, length)
        self.stored = torch.empty(at_once * max(length * itemsize, 4), dtype=torch.uint8)
        self.rows = torch.empty(at_once, block)
        self.sums = torch.empty(num_outputs, length + _PADDING)
        self.rounded = torch.empty(num_outputs, length, dtype=torch.float16)

    def read(self, readers: Sequence[WeightReader], stretch: _Stretch) -> torch.Tensor:
        """The stretch of every reader's input [readers, n], as stored; of several dtypes, in one that holds all."""
        dtypes = {reader.dtype(stretch.name) for reader in readers}
        dtype = _common(dtypes)
        size = stretch.length * dtype.itemsize
        stored = self.stored[: len(readers) * size]
        straight, found = memoryview(stored.numpy()), stored.view(dtype).view(len(readers), -1)
        for row, reader in enumerate(readers):
            if len(dtypes) == 1 and reader.in_file(stretch.name):
                reader.read_bytes(stretch.name, stretch.start, straight[row * size : (row + 1) * size])
            else:
                found[row] = reader.read(stretch.name, stretch.start, stretch.stop)
        return found


@contextlib.contextmanager
def _one_thread_each() -> Iterator[int]:
    # stretches in parallel beat parallel loops within each: a loop of 0.1 ms ends when the last core has joined it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _stretch_length(num_outputs: int, itemsize: int) -> int:
    """Values that fit, stored in `itemsize` bytes and with those of all outputs, into one scratch."""
    fitting = _SCRATCH_BYTES // (6 * num_outputs + itemsize * _INPUTS_AT_ONCE)
    return max(fitting // _BLOCK * _BLOCK, min(fitting, _BLOCK), 1)


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one that holds values of all."""
    return functools.reduce(torch.promote_types, set(dtypes))


def _stretches(net: nn.Module, length: int, dtype: str) -> Iterator[_Stretch]:
    averaged = dict(net.named_parameters())
    for name, tensor in net.state_dict().items():
        _, stored = DTYPES[stored_dtype(name, tensor.shape, dtype)]
        for start in range(0, tensor.numel(), length):
            yield _Stretch(name, start, min(start + length, tensor.numel()), name in averaged, stored)


def _sum(readers: Sequence[WeightReader], stretch: _Stretch, matrix: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    sums = scratch.sums[:, : stretch.length]
    for first in range(0, len(readers), _INPUTS_AT_ONCE):
        group = slice(first, first + _INPUTS_AT_ONCE)
        blocks = scratch.read(readers[group], stretch).split(_BLOCK, dim=1)
        for block, target in zip(blocks, sums.split(_BLOCK, dim=1), strict=True):
            rows = scratch.rows[: len(block), : block.shape[1]].copy_(block)
            torch.addmm(target, matrix[:, group], rows, beta=min(first, 1), out=target)
    # whatever its coefficient, 0 included, an input that is not finite leaves no output finite
    if not torch.stack(torch.aminmax(sums[0])).isfinite().all():
        where = (stretch.name, stretch.start, stretch.stop)
        for reader in readers:
            if not reader.read(*where).isfinite().all():
                raise ValueError(f"{reader.weights.name}: {stretch.name} is not finite; leave this snapshot out")
    return sums if stretch.dtype == sums.dtype else scratch.rounded.view(stretch.dtype)[:, : stretch.length].copy_(sums)


def _same(readers: Sequence[WeightReader], stretch: _Stretch, matrix: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    where = (stretch.name, stretch.start, stretch.stop)
    values = readers[0].read(*where).float()
    for reader in readers[1:]:
        if not torch.equal(reader.read(*where).float(), values):
            names = f"{reader.weights.name} and {readers[0].weights.name}"
            raise ValueError(f"{names} differ in the buffer {stretch.name}: they are not of one run")
    return values.to(stretch.dtype).expand(len(matrix), -1)
