"""Weights that stay in their file until a stretch of them is asked for."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock

import torch

from edm2kit.snapshots.file_format import DTYPES, Header, is_published_pickle, read_header
from edm2kit.torch_utils.files import fetch

_SUFFIXES = (".safetensors", ".pkl")


@dataclass(frozen=True)
class Span:
    """A tensor in a file: its values lie one after another from byte `offset` on."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Weights:
    """A snapshot whose tensors are spans of the file `path`, or in memory; `name` is for messages and records."""

    name: str
    header: Header
    tensors: Mapping[str, Span | torch.Tensor]
    path: Path | None = None


def open_weights(path_or_url: str | Path) -> Weights:
    """What `path_or_url` holds, without reading a weight. Raises ValueError where it is not a whole snapshot."""
    path = fetch(path_or_url)
    if path.is_file() and is_published_pickle(path):
        from edm2kit.snapshots.published import open_published

        return open_published(path)
    header = read_header(path)  # refuses a file that is shorter or longer than it should be
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    dtypes = dict(DTYPES.values())
    tensors = {}
    for name in entries.keys() - {"__metadata__"}:
        offset, dtype = 8 + length + entries[name]["data_offsets"][0], dtypes.get(entries[name]["dtype"])
        if dtype is None:
            raise ValueError(f"{path}: {name} is stored as {entries[name]['dtype']}; expected {', '.join(dtypes)}")
        tensors[name] = Span(offset, dtype, torch.Size(entries[name]["shape"]))
    return Weights(path.name, header, tensors, path)


def open_sources(sources: Sequence[str | Path], prefix: str = "", stds: Iterable[float] | None = None) -> list[Weights]:
    """The training snapshots in folders, or at paths and URLs one by one, sorted by time and EMA length.

    `prefix` of their file names; `stds` keeps these EMA lengths only, None all. Reconstructions that lie in a folder
    as well are left out. Raises ValueError for a file that is not a snapshot, and where nothing is found.
    """
    where = ", ".join(map(str, sources))
    found = [weights for source in sources for weights in _opened(source, prefix)]
    if not found:
        raise ValueError(
            f"no training snapshot in {where}" + (f" has a name that starts with {prefix!r}" * bool(prefix))
        )
    if stds is not None:
        stds, there = set(stds), {weights.header.ema_std for weights in found}
        if missing := stds - there:
            lengths = ", ".join(str(std) for std in sorted(std for std in there if std is not None))
            raise ValueError(f"no snapshot in {where} has the EMA length {min(missing)}; there are: {lengths}")
        found = [weights for weights in found if weights.header.ema_std in stds]
    return sorted(found, key=lambda weights: (weights.header.nimg, weights.header.ema_std or 0))


def _opened(source: str | Path, prefix: str) -> list[Weights]:
    if "://" in str(source) or not Path(source).is_dir():
        weights = open_weights(source)
        return [weights] if weights.name.startswith(prefix) else []
    files = (path for path in Path(source).iterdir() if path.suffix in _SUFFIXES and path.is_file())
    found = [open_weights(path) for path in sorted(files) if path.name.startswith(prefix)]
    return [weights for weights in found if weights.header.recipe is None]


class WeightReader:
    """Reads stretches of the tensors of one Weights; a context manager; threads may share it."""

    def __init__(self, weights: Weights):
        self.weights = weights
        # read, not mapped: mapped pages of hundreds of files would count as this process's memory
        self._lock = Lock()  # around seek and read, where the system has no preadv (Windows)
        self._file = None if weights.path is None else FileIO(weights.path)

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def dtype(self, name: str) -> torch.dtype:
        """What the tensor is stored in."""
        return self.weights.tensors[name].dtype

    def in_file(self, name: str) -> bool:
        """Whether the tensor's bytes are in the file, and not in memory."""
        return isinstance(self.weights.tensors[name], Span)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Values start..stop-1 of the flattened tensor, as stored, [stop - start]; ValueError where the file ends."""
        tensor = self.weights.tensors[name]
        if isinstance(tensor, torch.Tensor):
            return tensor.detach().reshape(-1)[start:stop]
        values = torch.empty(stop - start, dtype=tensor.dtype)
        self.read_bytes(name, start, memoryview(values.view(torch.uint8).numpy()))
        return values

    def read_bytes(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the flattened tensor from value `start` on; ValueError where the file ends."""
        tensor = self.weights.tensors[name]
        assert isinstance(tensor, Span)
        offset = tensor.offset + start * tensor.dtype.itemsize
        while out:
            count = self._read_some(out, offset)
            if not count:
                raise ValueError(f"{self.weights.path} was cut short while it was read; copy or write it again")
            out, offset = out[count:], offset + count

    def _read_some(self, out: memoryview, offset: int) -> int:
        assert self._file is not None
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(out) or 0
