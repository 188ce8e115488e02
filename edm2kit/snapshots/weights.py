"""Weights that stay in their file until a part of them is asked for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock

import torch

from edm2kit.snapshots.file_format import Header


@dataclass(frozen=True)
class TensorInFile:
    """A tensor in a file: its values are contiguous from byte `offset` on."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Weights:
    """A snapshot whose tensors are in the file `path`, or in memory; `name` is for messages and records."""

    name: str
    header: Header
    tensors: Mapping[str, TensorInFile | torch.Tensor]
    path: Path | None = None


class WeightReader:
    """Reads parts of the tensors of one `Weights`. A context manager; threads may share it."""

    def __init__(self, weights: Weights):
        self.weights = weights
        # not memory-mapped: the mapped pages of hundreds of files would count as this process's memory
        self._lock = Lock()  # for seek and read on systems without preadv (Windows)
        self._file = None if weights.path is None else FileIO(weights.path)

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the tensor is stored in."""
        return self.weights.tensors[name].dtype

    def in_file(self, name: str) -> bool:
        """Whether the tensor is in the file (True) or in memory."""
        return isinstance(self.weights.tensors[name], TensorInFile)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Values start..stop-1 of the flattened tensor, as stored; raises ValueError if the file ends before."""
        tensor = self.weights.tensors[name]
        if isinstance(tensor, torch.Tensor):
            return tensor.detach().reshape(-1)[start:stop]
        values = torch.empty(stop - start, dtype=tensor.dtype)
        self.read_bytes(name, start, memoryview(values.view(torch.uint8).numpy()))
        return values

    def read_bytes(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the flattened tensor from value `start` on; raises as `read`."""
        tensor = self.weights.tensors[name]
        assert isinstance(tensor, TensorInFile)
        offset = tensor.offset + start * tensor.dtype.itemsize
        while out:
            count = self._read_some(out, offset)
            if not count:
                raise ValueError(f"{self.weights.path} was truncated while it was being read; copy or write it again")
            out, offset = out[count:], offset + count

    def _read_some(self, out: memoryview, offset: int) -> int:
        assert self._file is not None
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(out) or 0
