"""The inert values that stand for objects, tensors and arrays of a pickle."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edm2kit.torch_utils.pickles.source import Span, UnsafePickleError

_MAX_DEPTH = 200  # an nn.Module inside another takes three levels
_MAX_VALUES = 4_000_000


@dataclass(slots=True, eq=False)
class Record:
    """An object of a pickle: its class as the file calls it, and its attributes."""

    class_name: str
    state: dict[str, Any] | None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Numbers of one dtype, one after another, at `span` of the file."""

    dtype: torch.dtype
    span: Span

    @property
    def count(self) -> int:
        return self.span.length // self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor that is still in the file; `read()` brings it. Offset and stride count elements."""

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
        """Where in the file its values begin, one after another in order; None where strides scatter them."""
        dense = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        if any(size != 1 and have != want for size, have, want in zip(self.shape, self.stride, dense, strict=True)):
            return None
        return self.storage.span.offset + self.offset * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """A fresh contiguous tensor on the CPU; not for several threads of one file at a time.

        Raises UnsafePickleError where the file has been cut short since.
        """
        if self.position is None:
            flat = self._read_flat(self.storage.span.offset, self.storage.count)
            return flat.as_strided(self.shape, self.stride, self.offset).contiguous()
        return self._read_flat(self.position, math.prod(self.shape)).reshape(self.shape)

    def _read_flat(self, position: int, count: int) -> torch.Tensor:
        # straight into the tensor's own memory: a bytes object in between would double the peak
        result = torch.empty(count, dtype=self.dtype)
        memory = memoryview(result.view(torch.uint8).numpy())
        self.storage.span.file.seek(position)
        if self.storage.span.file.readinto(memory) != len(memory):
            raise UnsafePickleError("the file was cut short after it was opened")
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
    """`root` with arrays in place of their boxes, once it is known to be safe to walk.

    Refused are values that contain themselves, great depth, sharing that would grow beyond all bounds when every
    branch is followed, and tensors that are together larger than the file of `size_bytes`.
    """
    holder = [root]
    extents: dict[int, tuple[int, int]] = {}  # of finished nodes: levels and values at and below
    entered: set[int] = set()
    path: list[Any] = [holder]
    tensor_bytes = 0
    while path:
        node = path[-1]
        if id(node) in extents:
            # before its children are looked at: what is shared ten thousand times is walked once
            path.pop()
            continue
        nested = [child for child in _children(node) if type(child) in _NODES]
        if id(node) in entered:
            extents[id(node)] = _extent([extents[id(child)] for child in nested], len(_children(node)))
            tensor_bytes += node.num_bytes if type(node) is StoredTensor else 0
            _unbox(node)
        else:
            entered.add(id(node))
            _require(all(id(child) in extents or id(child) not in entered for child in nested), "it contains itself")
            path.extend(child for child in nested if id(child) not in extents)
    _require(tensor_bytes <= size_bytes, f"its tensors claim {tensor_bytes} bytes, more than the file has")
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
    _require(levels <= _MAX_DEPTH, f"it is nested more than {_MAX_DEPTH} levels deep")
    _require(values <= _MAX_VALUES, "it repeats its parts without bounds")
    return levels, values


def _unbox(node: Any) -> None:
    boxed = [child for child in _children(node) if type(child) is ArrayBox]
    _require(all(box.array is not None for box in boxed), "it has an array without contents")
    if type(node) in (dict, list):
        for key, value in list(node.items() if type(node) is dict else enumerate(node)):
            if type(value) is ArrayBox:
                node[key] = value.array
    else:
        _require(not boxed, "it has an array where none belongs")


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsafePickleError(reason)
