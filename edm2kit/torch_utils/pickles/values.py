"""What a pickle is read from, and the inert values that represent its names, objects, tensors and arrays."""

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

_MAX_DEPTH = 200  # an nn.Module inside another takes three levels
_MAX_VALUES = 4_000_000


class UnsafePickleError(ValueError):
    """A pickle that is damaged, or that asks for something that snapshots and statistics never need."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a global, such as `collections.OrderedDict`; nothing is imported."""

    name: str


class ByteRange:
    """The bytes [start, end) of a file, read from front to back; raises UnsafePickleError beyond the end."""

    def __init__(self, file: BinaryIO, start: int, end: int):
        self.file, self.position, self.end = file, start, end

    def take(self, count: int) -> bytes:
        self.require(count)
        self.file.seek(self.position)
        self.position += count
        data = self.file.read(count)
        if len(data) != count:
            raise UnsafePickleError("the file was truncated while it was being read")
        return data

    def skip(self, count: int) -> int:
        """Skip `count` bytes; returns the position of the first."""
        self.require(count)
        self.position += count
        return self.position - count

    def require(self, count: int) -> None:
        left = self.end - self.position
        if count > left:
            raise UnsafePickleError(f"it is truncated: it needs {count} more bytes, but only {left} are left")


@dataclass(frozen=True, slots=True)
class BytesInFile:
    """A byte string of the pickle that is still in the file."""

    file: BinaryIO
    offset: int
    length: int

    def source(self) -> ByteRange:
        return ByteRange(self.file, self.offset, self.offset + self.length)

    def read(self) -> bytes:
        return self.source().take(self.length)


class Budget:
    """Limits on reading one file: opcodes, nested pickles included, and bytes copied into arrays."""

    def __init__(self, opcodes: int, array_bytes: int):
        self.opcodes, self.array_bytes = opcodes, array_bytes

    def spend_opcode(self) -> None:
        self.opcodes -= 1
        if self.opcodes < 0:
            raise UnsafePickleError("it has far more parts than any snapshot")

    def spend_bytes(self, count: int) -> None:
        self.array_bytes -= count
        if self.array_bytes < 0:
            raise UnsafePickleError("its arrays claim more bytes than the file has")


def require(condition: bool, reason: str) -> None:
    """Raise UnsafePickleError with the reason unless the condition holds."""
    if not condition:
        raise UnsafePickleError(reason)


@dataclass(slots=True, eq=False)
class Record:
    """An object of a pickle: the name of its class according to the file, and its attributes."""

    class_name: str
    state: dict[str, Any] | None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Numbers of one dtype, contiguous in the file at `span`."""

    dtype: torch.dtype
    span: BytesInFile

    @property
    def count(self) -> int:
        return self.span.length // self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor that is still in the file; `read()` reads it. Offset and stride count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def position(self) -> int | None:
        """Position of its first value in the file if its values are contiguous; None if strides scatter them."""
        dense = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        if any(size != 1 and have != want for size, have, want in zip(self.shape, self.stride, dense, strict=True)):
            return None
        return self.storage.span.offset + self.offset * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """A new contiguous tensor on the CPU. Not thread-safe: all tensors of a file share its position.

        Raises UnsafePickleError if the file has been truncated since.
        """
        if self.position is None:
            flat = self._read_flat(self.storage.span.offset, self.storage.count)
            return flat.as_strided(self.shape, self.stride, self.offset).contiguous()
        return self._read_flat(self.position, math.prod(self.shape)).reshape(self.shape)

    def _read_flat(self, position: int, count: int) -> torch.Tensor:
        # directly into the tensor's memory: a bytes object in between would double the peak
        result = torch.empty(count, dtype=self.dtype)
        memory = result.view(torch.uint8).numpy().data
        file = self.storage.span.file
        file.seek(position)
        if file.readinto(memory) != len(memory):  # type: ignore[attr-defined]  # every buffered file has it
            raise UnsafePickleError("the file was truncated after it was opened")
        return result


@dataclass(slots=True, eq=False)
class DtypeBox:
    """A numpy dtype; its byte order arrives after its creation."""

    code: str
    order: str = "<"


@dataclass(slots=True, eq=False)
class ArrayBox:
    """A numpy array; its contents arrive after its creation."""

    array: np.ndarray | None = None


def settle(root: Any, size_bytes: int) -> Any:
    """`root` with arrays instead of their boxes; checks that it is safe to walk through.

    Raises UnsafePickleError for values that contain themselves, for great depth, for shared parts whose repetitions
    would be endless, and for tensors that are larger in total than the file of `size_bytes`.
    """
    holder = [root]
    extents: dict[int, tuple[int, int]] = {}  # of finished nodes: levels and values, including those below
    entered: set[int] = set()
    path: list[Any] = [holder]
    tensor_bytes = 0
    while path:
        node = path[-1]
        if id(node) in extents:
            # a part that is shared ten thousand times is walked once
            path.pop()
            continue
        nested = [child for child in _children(node) if type(child) in _NODES]
        if id(node) in entered:
            extents[id(node)] = _extent([extents[id(child)] for child in nested], len(_children(node)))
            if type(node) is StoredTensor:
                tensor_bytes += node.num_bytes
            _unbox(node)
        else:
            entered.add(id(node))
            require(all(id(child) in extents or id(child) not in entered for child in nested), "it contains itself")
            path.extend(child for child in nested if id(child) not in extents)
    require(tensor_bytes <= size_bytes, f"its tensors claim {tensor_bytes} bytes, more than the file has")
    return holder[0]


_NODES = (dict, list, tuple, set, Record, StoredTensor)


def _children(node: Any) -> list[Any]:
    if type(node) is dict:
        return list(node.values())
    if type(node) is Record:
        return [node.state]
    return [] if type(node) is StoredTensor else list(node)


def _extent(nested: list[tuple[int, int]], children: int) -> tuple[int, int]:
    levels = 1 + max((below for below, _ in nested), default=0)
    values = 1 + children + sum(count for _, count in nested)
    require(levels <= _MAX_DEPTH, f"it is nested more than {_MAX_DEPTH} levels deep")
    require(values <= _MAX_VALUES, "it repeats its parts endlessly")
    return levels, values


def _unbox(node: Any) -> None:
    """Replace the array boxes directly inside `node` by their arrays."""
    for key, value in _items(node):
        if type(value) is not ArrayBox:
            continue
        require(value.array is not None, "it has an array without contents")
        require(type(node) in (dict, list), "it has an array in an unexpected place")
        node[key] = value.array


def _items(node: Any) -> list[tuple[Any, Any]]:
    if type(node) is dict:
        return list(node.items())
    return list(enumerate(_children(node)))
