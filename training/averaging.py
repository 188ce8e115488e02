"""Weighted sums of stored weights, many at once, in one pass over their files.

Sums run in float32: rounding of a coefficient and of the sum comes to about 6e-8 of the largest coefficient,
thousands of times below what inputs stored in half precision bring along.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from training.snapshot import build_network
from training.weights import WeightReader, Weights

_SCRATCH_BYTES = 1 << 24  # for the values of a tensor that are summed at once: memory knows no size of network
_INPUTS_AT_ONCE = 16  # no number of inputs, and no number of outputs
_MAX_THREADS = 4


@dataclass(frozen=True)
class _Stretch:
    """Values start..stop-1 of a flattened tensor; buffers are not averaged."""

    name: str
    start: int
    stop: int
    averaged: bool


def weighted_sums(inputs: Sequence[Weights], coefficients: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """Sums over `inputs` with each row of `coefficients` [outputs, inputs], a stretch of a tensor at a time.

    Yields (name, values float32 [outputs, n]): the tensor's next n values, front to back, tensors in the order of the
    network's state dict. Buffers, which all inputs must share, come unchanged. Inputs without weight are not read.
    The next ones overwrite them. While this runs, torch computes on one thread, and as many stretches as it had
    threads are under way at once. Raises ValueError, naming the input, for a file that ends early, weights that are
    not finite, other buffers.
    """
    used = np.flatnonzero(coefficients.any(axis=0))
    matrix = torch.from_numpy(coefficients[:, used]).float()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(WeightReader(inputs[i])) for i in used]
        threads = min(stack.enter_context(_one_thread_each()), _MAX_THREADS)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        # used again and again: fresh pages for every stretch cost a fifth of the time
        scratch = [_Scratch(len(matrix), len(readers)) for _ in range(threads + 1)]
        under_way: deque[tuple[str, Future[torch.Tensor]]] = deque()
        for index, stretch in enumerate(_stretches(inputs[used[0]], _stretch_length(len(matrix)))):
            work = _sum if stretch.averaged else _same
            under_way.append((stretch.name, pool.submit(work, readers, stretch, matrix, scratch[index % len(scratch)])))
            if len(under_way) > threads:
                name, values = under_way.popleft()
                yield name, values.result()
        for name, values in under_way:
            yield name, values.result()


class _Scratch:
    """Where one stretch is summed."""

    def __init__(self, num_outputs: int, num_inputs: int):
        length = _stretch_length(num_outputs)
        self._sums = torch.empty(num_outputs * length)
        self._rows = torch.empty(min(num_inputs, _INPUTS_AT_ONCE) * length)

    def sums(self, num_outputs: int, length: int) -> torch.Tensor:
        return self._sums[: num_outputs * length].view(num_outputs, length)

    def rows(self, num_inputs: int, length: int) -> torch.Tensor:
        return self._rows[: num_inputs * length].view(num_inputs, length)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[int]:
    # stretches in parallel beat parallel loops within each: a loop of 0.1 ms ends when the last core has joined it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _stretch_length(num_outputs: int) -> int:
    """Values that fit, with those of all outputs, into one scratch: a power of two, the more the faster."""
    fitting = _SCRATCH_BYTES // (4 * (num_outputs + _INPUTS_AT_ONCE))
    return 1 << max(fitting.bit_length() - 1, 0)


def _stretches(weights: Weights, length: int) -> Iterator[_Stretch]:
    net = build_network(weights.header, weights.name)
    averaged = {name for name, _ in net.named_parameters()}
    for name, tensor in net.state_dict().items():
        for start in range(0, tensor.numel(), length):
            yield _Stretch(name, start, min(start + length, tensor.numel()), name in averaged)


def _sum(readers: Sequence[WeightReader], stretch: _Stretch, matrix: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    where, length = (stretch.name, stretch.start, stretch.stop), stretch.stop - stretch.start
    sums = scratch.sums(len(matrix), length).zero_()
    for first in range(0, len(readers), _INPUTS_AT_ONCE):
        group = readers[first : first + _INPUTS_AT_ONCE]
        rows = scratch.rows(len(group), length)
        for row, reader in zip(rows, group, strict=True):
            row.copy_(reader.read(*where))
        sums.addmm_(matrix[:, first : first + len(group)], rows)
    # whatever its coefficient, 0 included, an input that is not finite leaves no output finite
    if not torch.stack(torch.aminmax(sums[0])).isfinite().all():
        for reader in readers:
            if not reader.read(*where).isfinite().all():
                raise ValueError(f"{reader.weights.name}: {stretch.name} is not finite; leave this snapshot out")
    return sums


def _same(readers: Sequence[WeightReader], stretch: _Stretch, matrix: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    where = (stretch.name, stretch.start, stretch.stop)
    values = readers[0].read(*where).float()
    for reader in readers[1:]:
        if not torch.equal(reader.read(*where).float(), values):
            names = f"{reader.weights.name} and {readers[0].weights.name}"
            raise ValueError(f"{names} differ in the buffer {stretch.name}: they are not of one run")
    return values.expand(len(matrix), -1)
