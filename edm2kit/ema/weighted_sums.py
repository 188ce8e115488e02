"""Weighted sums of stored weights, many at once, in one pass over their files.

Sums are float32: rounding of the coefficients and of the sum is about 6e-8 of the largest coefficient, thousands of
times smaller than the rounding of inputs in half precision.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from edm2kit.snapshots.file_format import STORED_DTYPES, network_on_meta, stored_dtype
from edm2kit.snapshots.loading import WeightReader, Weights, one_thread_each

_SCRATCH_BYTES = 1 << 24  # per scratch, so that memory does not grow with the network
_INPUTS_AT_ONCE = 48  # so that it does not grow with the number of inputs either
_BLOCK = 4096  # values of all inputs that are converted, then multiplied while they are in the cache
_PADDING = 16  # rows a power of two apart would compete for the same cache lines


@dataclass(frozen=True)
class NetworkTensor:
    """A tensor of a network; parameters are averaged, buffers are not."""

    shape: torch.Size
    averaged: bool


def network_tensors(weights: Weights) -> dict[str, NetworkTensor]:
    """The tensors of a snapshot's network by name, in the order of its state dict.

    Raises ValueError if the header does not list the buffers and its network is unknown.
    """
    header = weights.header
    if header.buffers is not None:
        return {name: NetworkTensor(t.shape, name not in header.buffers) for name, t in weights.tensors.items()}
    net = network_on_meta(header, weights.name)
    learned = dict(net.named_parameters())
    return {name: NetworkTensor(t.shape, name in learned) for name, t in net.state_dict().items()}


@dataclass(frozen=True)
class _Stretch:
    """Values start..stop-1 of a flattened tensor, to be stored as `dtype`."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype

    @property
    def length(self) -> int:
        return self.stop - self.start


def weighted_sums(
    inputs: Sequence[Weights], coefficients: np.ndarray, dtype: str = "float32"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Sums over `inputs` with each row of `coefficients` [outputs, inputs], part of a tensor at a time.

    Yields (name, values [outputs, n]): the next n values of the tensor, in the dtype in which a snapshot of `dtype`
    stores them. Tensors come in the order of the network's state dict. Buffers are copied; they must be equal in all
    inputs. Inputs with coefficient 0 everywhere are not read. The yielded values are overwritten by later ones.

    Parts are summed in parallel, one per thread that torch had; torch itself is limited to one thread meanwhile.
    Raises ValueError, naming the input, if a file is truncated, weights are not finite, or buffers differ.
    """
    used = [int(i) for i in np.flatnonzero(coefficients.any(axis=0))]
    matrix = torch.from_numpy(coefficients[:, used]).float()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(WeightReader(inputs[i])) for i in used]
        threads = stack.enter_context(one_thread_each())
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        tensors = network_tensors(inputs[used[0]])
        arrays = [name for name, tensor in tensors.items() if tensor.averaged and tensor.shape]  # not scalar gains
        itemsize = _common(reader.dtype(name) for reader in readers for name in arrays).itemsize
        length = _stretch_length(len(matrix), itemsize)
        # reused, because fresh memory pages for every stretch take a fifth of the time
        scratch = [_Scratch(len(matrix), len(readers), length, itemsize) for _ in range(threads + 1)]
        under_way: deque[tuple[str, Future[torch.Tensor]]] = deque()
        for index, stretch in enumerate(_stretches(tensors, length, dtype)):
            work = _sum if tensors[stretch.name].averaged else _copy
            under_way.append((stretch.name, pool.submit(work, readers, stretch, matrix, scratch[index % len(scratch)])))
            if len(under_way) > threads:
                name, values = under_way.popleft()
                yield name, values.result()
        for name, values in under_way:
            yield name, values.result()


class _Scratch:
    """Memory in which one stretch is read, summed and rounded."""

    def __init__(self, num_outputs: int, num_inputs: int, length: int, itemsize: int):
        at_once, block = min(num_inputs, _INPUTS_AT_ONCE), min(_BLOCK, length)
        self.stored = torch.empty(at_once * max(length * itemsize, 4), dtype=torch.uint8)
        self.rows = torch.empty(at_once, block)
        self.sums = torch.empty(num_outputs, length + _PADDING)
        self.rounded = torch.empty(num_outputs, length, dtype=torch.float16)

    def read(self, readers: Sequence[WeightReader], stretch: _Stretch) -> torch.Tensor:
        """The stretch of every input [readers, n] as stored; mixed dtypes are converted to one that holds all."""
        dtypes = {reader.dtype(stretch.name) for reader in readers}
        dtype = _common(dtypes)
        size = stretch.length * dtype.itemsize
        stored = self.stored[: len(readers) * size]
        raw, found = memoryview(stored.numpy()), stored.view(dtype).view(len(readers), -1)  # type: ignore[arg-type]
        for row, reader in enumerate(readers):
            if len(dtypes) == 1 and reader.in_file(stretch.name):
                reader.read_bytes(stretch.name, stretch.start, raw[row * size : (row + 1) * size])
            else:
                found[row] = reader.read(stretch.name, stretch.start, stretch.stop)
        return found


def _stretch_length(num_outputs: int, itemsize: int) -> int:
    """The number of values per stretch, so that a scratch has _SCRATCH_BYTES; `itemsize` bytes per stored value."""
    fitting = _SCRATCH_BYTES // (6 * num_outputs + itemsize * _INPUTS_AT_ONCE)
    return max(fitting // _BLOCK * _BLOCK, min(fitting, _BLOCK), 1)


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds values of all."""
    return functools.reduce(torch.promote_types, set(dtypes))


def _stretches(tensors: Mapping[str, NetworkTensor], length: int, dtype: str) -> Iterator[_Stretch]:
    for name, tensor in tensors.items():
        _, stored = STORED_DTYPES[stored_dtype(name, tensor.shape, dtype)]
        size = tensor.shape.numel()
        for start in range(0, size, length):
            yield _Stretch(name, start, min(start + length, size), stored)


def _sum(readers: Sequence[WeightReader], stretch: _Stretch, matrix: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    sums = scratch.sums[:, : stretch.length]
    for first in range(0, len(readers), _INPUTS_AT_ONCE):
        group = slice(first, first + _INPUTS_AT_ONCE)
        blocks = scratch.read(readers[group], stretch).split(_BLOCK, dim=1)
        for block, target in zip(blocks, sums.split(_BLOCK, dim=1), strict=True):
            rows = scratch.rows[: len(block), : block.shape[1]].copy_(block)
            torch.addmm(target, matrix[:, group], rows, beta=min(first, 1), out=target)
    # an input that is not finite makes every output non-finite, even with coefficient 0
    if not torch.stack(torch.aminmax(sums[0])).isfinite().all():
        where = (stretch.name, stretch.start, stretch.stop)
        for reader in readers:
            if not reader.read(*where).isfinite().all():
                raise ValueError(f"{reader.weights.name}: {stretch.name} is not finite; leave this snapshot out")
    if stretch.dtype == sums.dtype:
        return sums
    return scratch.rounded.view(stretch.dtype)[:, : stretch.length].copy_(sums)


def _copy(readers: Sequence[WeightReader], stretch: _Stretch, matrix: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    where = (stretch.name, stretch.start, stretch.stop)
    values = readers[0].read(*where).float()
    for reader in readers[1:]:
        if not torch.equal(reader.read(*where).float(), values):
            names = f"{reader.weights.name} and {readers[0].weights.name}"
            raise ValueError(f"{names} differ in the buffer {stretch.name}; they are not of the same run")
    return values.to(stretch.dtype).expand(len(matrix), -1)
