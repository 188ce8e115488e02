"""Reading the pickles of published snapshots and reference statistics without executing any of them.

The layout is that of snapshots made with NVIDIA's persistence mechanism: objects that carry their own source code, and
tensors whose bytes are a nested torch.save. Here an object becomes a Record, its source code is dropped unread, and a
tensor stays in the file as a StoredTensor until it is needed. A file may only mention the names listed below; each is
handled by a function of this module, and nothing is imported or called because a file asks for it.

(The nested bytes do not go to torch.load: even with weights_only it allocates as much memory as they claim, and the
oldest torch versions that this project supports have known vulnerabilities there.)
"""

import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from edm2kit.torch_utils.pickles.machine import Machine, NoNames, Python2Machine
from edm2kit.torch_utils.pickles.values import (
    ArrayBox,
    Budget,
    ByteRange,
    BytesInFile,
    DtypeBox,
    Record,
    Storage,
    StoredTensor,
    Symbol,
    UnsafePickleError,
    require,
    settle,
)

__all__ = ["Record", "StoredTensor", "UnsafePickleError", "load_arrays", "load_pickle"]

_MAX_OPCODES = 1_000_000  # an XXL snapshot takes about a twentieth of this
_MAX_ELEMENTS = 1 << 40  # of one tensor or array; with more, numpy and torch overflow even if one of the sizes is 0

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
    """A file that closes itself, without Python's warning, when its last StoredTensor is deleted."""

    def __del__(self) -> None:
        self.close()


def load_pickle(path_or_file: str | Path | BinaryIO) -> Any:
    """The inert contents of a snapshot or statistics pickle.

    Objects become Record, tensors StoredTensor (they read from the file, which stays open as long as they exist),
    dictionaries of any kind dict, and numeric numpy arrays writable arrays in native byte order. Raises
    UnsafePickleError, a ValueError of one line, for a file that is damaged or holds anything else, and OSError as
    `open` does.
    """
    name = "pickle"
    file: BinaryIO
    if isinstance(path_or_file, (str, Path)):
        name = str(path_or_file)
        file = _KeptFile(io.FileIO(path_or_file))
    else:
        file = path_or_file
    start, end = file.tell(), file.seek(0, 2)
    budget = Budget(_MAX_OPCODES, end - start)
    return _run(Machine(ByteRange(file, start, end), _SnapshotRules(budget), budget), name)


def load_arrays(data: bytes, name: str) -> Any:
    """The contents of a pickle of plain values and numeric numpy arrays, written by any Python from 2 on.

    Values are None, bool, int, float, str, list, tuple, dict, set, and arrays in native byte order; a long string of
    Python 2 stays BytesInFile. `name` is that of the file, for messages. Raises UnsafePickleError, a ValueError of one
    line, for a file that is damaged or holds anything else.
    """
    budget = Budget(_MAX_OPCODES, len(data))
    source = ByteRange(io.BytesIO(data), 0, len(data))
    return _run(Python2Machine(source, _ArrayRules(budget), budget), name)


def _run(machine: Machine, name: str) -> Any:
    source = machine.source
    size_bytes = source.end - source.position
    try:
        return settle(machine.load(), size_bytes)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{name}: refused near byte {source.position}: {error}") from None


def _are_counts(value: Any) -> bool:
    # type() and not isinstance: a bool is an int as well
    return type(value) is tuple and len(value) <= 32 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _is_shape(value: Any) -> bool:
    return _are_counts(value) and math.prod(max(n, 1) for n in value) <= _MAX_ELEMENTS


def _are_of_types(values: tuple, *types: type) -> bool:
    """Whether there are as many values as types, each of exactly its type."""
    return tuple(type(value) for value in values) == types


class _ArrayRules(NoNames):
    """The meaning of numpy's names in a pickle of arrays; no other names are allowed."""

    names = frozenset((*_RECONSTRUCT, *_NUMPY))

    def __init__(self, budget: Budget):
        self.budget = budget

    def find(self, name: str) -> Symbol:
        return Symbol(name) if name in self.names else super().find(name)

    def call(self, symbol: Symbol, args: tuple) -> Any:
        if symbol.name in _RECONSTRUCT:
            return _new_array(args)
        if symbol.name == "numpy.dtype":
            return _new_dtype(args)
        return super().call(symbol, args)

    def build(self, target: Any, state: Any) -> None:
        if type(target) is DtypeBox:
            _fill_dtype(target, state)
        elif type(target) is ArrayBox:
            _fill_array(target, state, self.budget)
        else:
            super().build(target, state)


class _SnapshotRules(_ArrayRules):
    """The meaning of the names in a snapshot or statistics pickle."""

    names = _NAMES

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
        if symbol.name == "torch._utils._rebuild_tensor_v2":
            return _tensor(args)
        if symbol.name == "torch._utils._rebuild_parameter":
            return _parameter(args)
        if symbol.name == "torch.storage._load_from_bytes":
            require(_are_of_types(args, BytesInFile), "it loads a tensor from something that is not bytes")
            return _nested_storage(args[0], self.budget)
        return super().call(symbol, args)

    def build(self, target: Any, state: Any) -> None:
        empty_record = type(target) is Record and target.state is None
        if empty_record and type(state) is dict:
            target.state = state
        else:
            super().build(target, state)


def _persistent_object(args: tuple) -> Record:
    unknown = "it holds an object whose layout is not that of published snapshots"
    require(_are_of_types(args, dict), unknown)
    meta = args[0]
    require(meta.get("type") == "class", unknown)
    require(meta.get("version") == 6, unknown)
    require(type(meta.get("class_name")) is str, unknown)
    require(type(meta.get("state")) is dict, unknown)
    # meta["module_src"], the source code of the object, is dropped here
    return Record(meta["class_name"], meta["state"])


# numpy


def _new_array(args: tuple) -> ArrayBox:
    unknown = "it creates an array in an unknown way"
    # the last argument is b"b", a str in Python 2
    require(_are_of_types(args, Symbol, tuple, BytesInFile) or _are_of_types(args, Symbol, tuple, str), unknown)
    require(args[:2] == (Symbol("numpy.ndarray"), (0,)), unknown)
    return ArrayBox()


def _new_dtype(args: tuple) -> DtypeBox:
    require(len(args) == 3 and type(args[0]) is str, "it creates a numpy dtype in an unknown way")
    require(args[0] in _NUMPY_CODES, f"it holds an array of {args[0][:40]!r}; only plain numbers are read")
    return DtypeBox(args[0])


def _fill_dtype(box: DtypeBox, state: Any) -> None:
    structured = "it holds a structured numpy dtype"
    require(type(state) is tuple and len(state) == 8, structured)
    version, order, *fields = state
    require(version == 3 and fields == [None, None, None, -1, -1, 0], structured)
    require(type(order) is str and order in ("<", ">", "=", "|"), structured)
    box.order = order


def _fill_array(box: ArrayBox, state: Any, budget: Budget) -> None:
    unknown = "it holds an array in an unknown layout"
    require(box.array is None, "it fills an array twice")
    require(type(state) is tuple and len(state) == 5, unknown)
    version, shape, element, fortran_order, data = state
    require(version == 1 and _is_shape(shape), unknown)
    require(type(element) is DtypeBox and type(fortran_order) is bool, unknown)
    require(type(data) is BytesInFile, "it holds an array of something that is not bytes")
    dtype = np.dtype(element.order + element.code)
    expected = math.prod(shape) * dtype.itemsize
    require(data.length == expected, f"an array claims {expected} bytes but has {data.length}")
    budget.spend_bytes(data.length)
    flat = np.frombuffer(data.read(), dtype)
    array = flat.reshape(shape, order="F" if fortran_order else "C")
    box.array = array.astype(dtype.newbyteorder("="), order="C")


# torch


def _tensor(args: tuple) -> StoredTensor:
    require(len(args) in (6, 7) and type(args[0]) is Storage, "it rebuilds a tensor in an unknown way")
    storage, offset, shape, stride = args[:4]
    require(_are_counts((offset,)) and _is_shape(shape) and _are_counts(stride), "a tensor has an impossible shape")
    require(len(shape) == len(stride), "a tensor has different numbers of sizes and strides")
    beyond = f"a tensor of shape {list(shape)} reaches beyond its {storage.count} numbers"
    count = math.prod(shape)
    require(count <= storage.count, beyond)  # with strides of zero, a byte could become a terabyte
    if count == 0:
        require(offset <= storage.count, beyond)
    else:
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        require(last < storage.count, beyond)
    return StoredTensor(storage, offset, shape, stride)


def _parameter(args: tuple) -> StoredTensor:
    known = _are_of_types(args, StoredTensor, bool, dict) and not args[2]
    require(known, "it rebuilds a parameter in an unknown way")
    return args[0]


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The announcement in a torch.save of a storage: `count` numbers of one dtype follow."""

    dtype: torch.dtype
    count: int


class _StorageRules(NoNames):
    """The rules for a torch.save of one storage: it may only refer to numbers that follow."""

    def find(self, name: str) -> Symbol:
        return Symbol(name) if name in _STORAGES else super().find(name)

    def persistent(self, key: Any) -> _Numbers:
        unknown = "its nested tensor data refer to something that is not numbers"
        require(type(key) is tuple and len(key) == 6, unknown)
        kind, storage, _, _, count, view = key
        require(kind == "storage" and type(storage) is Symbol, unknown)
        require(_are_counts((count,)) and view is None, unknown)
        return _Numbers(_STORAGES[storage.name], count)


def _nested_storage(span: BytesInFile, budget: Budget) -> Storage:
    """The storage in a nested torch.save, in the format from before torch 1.6 that storages still use."""
    source, rules = span.source(), _StorageRules()
    magic, version, system, numbers, keys = (Machine(source, rules, budget).load() for _ in range(5))
    require(magic == 0x1950A86A20F9469CFC6C and version == 1001, "its nested tensor data are not a torch.save")
    little = type(system) is dict and system.get("little_endian") is True
    require(little and sys.byteorder == "little", "its nested tensor data have the wrong byte order for this machine")
    one_tensor = type(numbers) is _Numbers and type(keys) is list and len(keys) == 1
    require(one_tensor, "it nests something other than a tensor")
    count = int.from_bytes(source.take(8), "little")
    left = source.end - source.position
    expected = numbers.count * numbers.dtype.itemsize
    require(count == numbers.count and expected == left, f"a tensor claims {expected} bytes but has {left}")
    return Storage(numbers.dtype, BytesInFile(span.file, source.position, left))
