"""Reading the pickles of published snapshots and reference statistics without executing any of them.

The layout is that of snapshots made with NVIDIA's persistence mechanism: objects that carry their own source text,
and tensors whose bytes are a nested torch.save. Here an object becomes a Record, its source text is dropped unread,
and a tensor stays in the file as a StoredTensor until it is asked for. The names a file may mention are the closed
lists below; each is handled by a function written here, and nothing is imported or called on a file's behalf.
(The nested bytes don't go to torch.load either: even with weights_only it allocates whatever they claim, and the
oldest torch versions this project runs on have known holes in it.)
"""

import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from edm2kit.torch_utils.pickles.machine import Machine, NoNames
from edm2kit.torch_utils.pickles.source import Budget, Source, Span, Symbol, UnsafePickleError
from edm2kit.torch_utils.pickles.values import ArrayBox, DtypeBox, Record, Storage, StoredTensor, settle

__all__ = ["Record", "StoredTensor", "UnsafePickleError", "load_pickle"]

_MAX_OPCODES = 1_000_000  # an XXL snapshot takes about a twentieth of this
_MAX_ELEMENTS = 1 << 40  # of one tensor or array; numpy and torch overflow on more even where one of the sizes is 0

_EMPTY_DICTS = ("dnnlib.util.EasyDict", "collections.OrderedDict")
_MODULES = ("torch.nn.modules.container.ModuleDict",)
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NUMPY = ("numpy.ndarray", "numpy.dtype")
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.storage._load_from_bytes")
_NAMES = frozenset((*_EMPTY_DICTS, *_MODULES, _PERSISTENT, *_RECONSTRUCT, *_NUMPY, *_TENSORS))

_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_STORAGES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.BoolStorage": torch.bool,
}


class _KeptFile(io.BufferedReader):
    """A file that is closed, without Python's warning, when the last StoredTensor of it is gone."""

    def __del__(self) -> None:
        self.close()


def load_pickle(path_or_file: str | Path | BinaryIO) -> Any:
    """The inert contents of a snapshot or statistics pickle.

    Objects come as Record, tensors as StoredTensor (they read from the file, which stays open as long as they
    live), dict-likes as dict, numeric numpy arrays as arrays, native and writable. Raises UnsafePickleError, a
    ValueError of one line, for every file that is damaged or holds anything else; OSError as `open` does.
    """
    if isinstance(path_or_file, (str, Path)):
        name, file = str(path_or_file), _KeptFile(io.FileIO(path_or_file))
    else:
        name, file = "pickle", path_or_file
    start, end = file.tell(), file.seek(0, 2)
    source = Source(file, start, end)
    budget = Budget(_MAX_OPCODES, end - start)
    try:
        return settle(Machine(source, _SnapshotRules(budget), budget).load(), end - start)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{name}: refused near byte {source.position}: {error}") from None


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsafePickleError(reason)


def _are_counts(value: Any) -> bool:
    # type() and not isinstance: a bool is an int as well
    return type(value) is tuple and len(value) <= 32 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _is_shape(value: Any) -> bool:
    return _are_counts(value) and math.prod(max(n, 1) for n in value) <= _MAX_ELEMENTS


class _SnapshotRules(NoNames):
    """What the names of a snapshot or statistics pickle stand for."""

    def __init__(self, budget: Budget):
        self.budget = budget

    def find(self, name: str) -> Symbol:
        return Symbol(name) if name in _NAMES else super().find(name)

    def new(self, symbol: Symbol, args: tuple) -> Any:
        if symbol.name in _EMPTY_DICTS and not args:
            return {}
        if symbol.name in _MODULES and not args:
            return Record(symbol.name, None)
        return super().new(symbol, args)

    def call(self, symbol: Symbol, args: tuple) -> Any:
        if symbol.name in _EMPTY_DICTS and not args:
            return {}
        if symbol.name == _PERSISTENT:
            return _persistent_object(args)
        if symbol.name in _RECONSTRUCT:
            return _new_array(args)
        if symbol.name == "numpy.dtype":
            return _new_dtype(args)
        if symbol.name == "torch._utils._rebuild_tensor_v2":
            return _tensor(args)
        if symbol.name == "torch._utils._rebuild_parameter":
            return _parameter(args)
        if symbol.name == "torch.storage._load_from_bytes":
            return self._storage(args)
        return super().call(symbol, args)

    def build(self, target: Any, state: Any) -> None:
        if type(target) is Record and target.state is None and type(state) is dict:
            target.state = state
        elif type(target) is DtypeBox:
            _fill_dtype(target, state)
        elif type(target) is ArrayBox:
            _fill_array(target, state, self.budget)
        else:
            super().build(target, state)

    def _storage(self, args: tuple) -> Storage:
        _require(len(args) == 1 and type(args[0]) is Span, "it loads a tensor from something that is not bytes")
        return _nested_storage(args[0], self.budget)


def _persistent_object(args: tuple) -> Record:
    meta = args[0] if len(args) == 1 and type(args[0]) is dict else {}
    known = meta.get("type") == "class" and meta.get("version") == 6
    named = type(meta.get("class_name")) is str and type(meta.get("state")) is dict
    _require(known and named, "it holds an object in another layout than the published snapshots")
    # meta["module_src"], the object's program, ends here
    return Record(meta["class_name"], meta["state"])


# numpy


def _new_array(args: tuple) -> ArrayBox:
    known = len(args) == 3 and args[0] == Symbol("numpy.ndarray") and args[1] == (0,) and type(args[2]) is Span
    _require(known, "it creates an array in an unknown way")
    return ArrayBox()


def _new_dtype(args: tuple) -> DtypeBox:
    _require(len(args) == 3 and type(args[0]) is str, "it creates a numpy dtype in an unknown way")
    _require(args[0] in _NUMPY_CODES, f"it holds an array of {args[0][:40]!r}; only plain numbers are read")
    return DtypeBox(args[0])


def _fill_dtype(box: DtypeBox, state: Any) -> None:
    plain = type(state) is tuple and len(state) == 8 and state[0] == 3 and state[2:] == (None, None, None, -1, -1, 0)
    _require(plain and type(state[1]) is str and state[1] in ("<", ">", "=", "|"), "it holds a structured numpy dtype")
    box.order = state[1]


def _fill_array(box: ArrayBox, state: Any, budget: Budget) -> None:
    _require(box.array is None, "it fills an array twice")
    known = type(state) is tuple and len(state) == 5 and state[0] == 1 and _is_shape(state[1])
    _require(known and type(state[2]) is DtypeBox and type(state[3]) is bool, "it holds an array in an unknown layout")
    shape, dtype, data = state[1], np.dtype(state[2].order + state[2].code), state[4]
    _require(type(data) is Span, "it holds an array of something that is not bytes")
    expected = math.prod(shape) * dtype.itemsize
    _require(data.length == expected, f"an array claims {expected} bytes and has {data.length}")
    budget.spend_bytes(data.length)
    flat = np.frombuffer(data.read(), dtype)
    box.array = flat.reshape(shape, order="F" if state[3] else "C").astype(dtype.newbyteorder("="), order="C")


# torch


def _tensor(args: tuple) -> StoredTensor:
    _require(len(args) in (6, 7) and type(args[0]) is Storage, "it rebuilds a tensor in an unknown way")
    storage, offset, shape, stride = args[:4]
    _require(_are_counts((offset,)) and _is_shape(shape) and _are_counts(stride), "a tensor's shape is not one")
    _require(len(shape) == len(stride), "a tensor has not as many strides as sizes")
    count = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # count: strides of zero would let a byte become a terabyte
    inside = count <= storage.count and (offset <= storage.count if count == 0 else last < storage.count)
    _require(inside, f"a tensor of shape {list(shape)} reaches beyond its {storage.count} numbers")
    return StoredTensor(storage, offset, shape, stride)


def _parameter(args: tuple) -> StoredTensor:
    known = len(args) == 3 and type(args[0]) is StoredTensor and type(args[1]) is bool and args[2] == {}
    _require(known, "it rebuilds a parameter in an unknown way")
    return args[0]


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What torch.save of a storage announces: `count` numbers of one dtype follow."""

    dtype: torch.dtype
    count: int


class _StorageRules(NoNames):
    """What torch.save of one storage may contain: a reference to numbers that follow."""

    def find(self, name: str) -> Symbol:
        return Symbol(name) if name in _STORAGES else super().find(name)

    def persistent(self, key: Any) -> _Numbers:
        known = type(key) is tuple and len(key) == 6 and key[0] == "storage" and key[5] is None
        known = known and type(key[1]) is Symbol and _are_counts((key[4],))
        _require(known, "its nested tensor data refer to something that is not numbers")
        return _Numbers(_STORAGES[key[1].name], key[4])


def _nested_storage(span: Span, budget: Budget) -> Storage:
    """The storage in the bytes of a torch.save in the format from before torch 1.6, which storages still use."""
    source, rules = span.source(), _StorageRules()
    magic, version, system, numbers, keys = (Machine(source, rules, budget).load() for _ in range(5))
    _require(magic == 0x1950A86A20F9469CFC6C and version == 1001, "its nested tensor data are no torch.save")
    little = type(system) is dict and system.get("little_endian") is True and sys.byteorder == "little"
    _require(little, "its nested tensor data have the wrong byte order for this machine")
    _require(
        type(numbers) is _Numbers and type(keys) is list and len(keys) == 1, "it nests something else than a tensor"
    )
    count, left = int.from_bytes(source.take(8), "little"), source.end - source.position
    expected = numbers.count * numbers.dtype.itemsize
    _require(count == numbers.count and expected == left, f"a tensor claims {expected} bytes and has {left}")
    return Storage(numbers.dtype, Span(span.file, source.position, left))
