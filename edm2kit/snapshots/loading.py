"""Opening a snapshot of any format, by path or URL: as a network, or as weights that are read on demand."""

import contextlib
import errno
import functools
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from threading import Lock

import torch

from edm2kit.models.encoders import Encoder, make_encoder
from edm2kit.models.preconditioning import Preconditioner
from edm2kit.snapshots.file_format import (
    Header,
    check_weights,
    damaged_weights,
    network_on_meta,
    read_header,
    tensor_layout,
)
from edm2kit.snapshots.published import read_published
from edm2kit.torch_utils.cache import fetch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_MANY_FILES = 10240
_MAX_THREADS = 4  # that read weights side by side
_PACKAGED = Path(__file__).parents[1] / "networks"  # networks that come with the package, such as cifar10-main
SUFFIXES = (".safetensors", ".pkl")


@dataclass(frozen=True)
class Snapshot:
    """A network ready to evaluate, its encoder, and its header."""

    net: Preconditioner
    encoder: Encoder
    header: Header

    def __repr__(self) -> str:
        net = repr(self.net).partition("\n")[0]
        return f"Snapshot of {net}\n  {self.encoder!r}\n  {self.header!r}"


@dataclass(frozen=True)
class TensorInFile:
    """A tensor in a file: its values are contiguous from byte `offset` on, with the checksum `crc32` if it is known."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    crc32: int | None = None


@dataclass(frozen=True)
class Weights:
    """A snapshot whose tensors are in the file `path`, or in memory; `name` is for messages and records."""

    name: str
    header: Header
    tensors: Mapping[str, TensorInFile | torch.Tensor]
    path: Path | None = None

    def checksum(self) -> str | None:
        """A hash of the checksums of all tensors, without reading them; None if the file has none."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, TensorInFile) or tensor.crc32 is None:
                return None
            digest.update(f"{name} {tensor.crc32}\n".encode())
        return digest.hexdigest()


def load_snapshot(
    path_or_url: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Snapshot:
    """Load a network for evaluation: in eval mode, without gradients, float32 weights, `dtype` inside the network.

    Accepts snapshots of this project and NVIDIA's published pickles (read without executing them), as paths or URLs;
    the networks of the package by name ("cifar10-main", "cifar10-guide"); and a run folder, whose newest snapshot with
    the longest EMA is loaded. Raises ValueError with the reason if the file is missing, damaged, or does not fit its
    own header.

    Example: `net = load_snapshot("network-snapshot-0134217-0.100.safetensors", "cuda", torch.float16).net`.
    """
    return load_weights(open_weights(path_or_url), device, dtype)


def load_weights(weights: Weights, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Snapshot:
    """The same for weights that are open already, or in memory, such as a rebuilt EMA. Raises as `load_snapshot`."""
    source = weights.path or weights.name
    net = network_on_meta(weights.header, source)
    check_weights(source, net, weights.tensors)
    net.load_state_dict(_float32_tensors(weights, torch.device(device)), assign=True)
    net.compute_dtype = dtype
    net.label_names = weights.header.label_names
    return Snapshot(net.eval().requires_grad_(False), make_encoder(weights.header.encoder), weights.header)


def _float32_tensors(weights: Weights, device: torch.device) -> dict[str, torch.Tensor]:
    """All tensors by name; on a CPU, threads read, check and convert them side by side."""
    names = list(weights.tensors)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(WeightReader(weights))

        def read(some: list[str]) -> dict[str, torch.Tensor]:
            found = {}
            for name in some:
                shape = weights.tensors[name].shape
                found[name] = reader.read(name, 0, shape.numel()).reshape(shape).to(device, torch.float32)
            return found

        threads = stack.enter_context(one_thread_each()) if device.type == "cpu" else 1
        if threads == 1:
            return read(names)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        state = {}
        for part in pool.map(read, [names[k::threads] for k in range(threads)]):
            state.update(part)
        return state


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Limit torch to one thread per operation inside the block; yields the number of threads to run side by side.

    Waking all cores takes longer than a parallel loop of 0.1 ms.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, _MAX_THREADS)
    finally:
        torch.set_num_threads(threads)


def local_file(path_or_url: str | Path) -> Path:
    """The file at a path, in the package by its name, or behind a URL, which is downloaded if needed.

    A run folder stands for its newest snapshot. Raises ValueError if there is none, or if it is another file of a run,
    with the one to give instead.
    """
    path = Path(path_or_url)
    in_package = _PACKAGED / f"{path_or_url}.safetensors"
    if not path.exists() and path.name == str(path_or_url) and in_package.exists():
        return in_package
    if not path.exists():
        return fetch(path_or_url)
    if path.is_dir():
        from edm2kit.snapshots.run_folder import newest_snapshot  # a run that is named by its file does without

        return newest_snapshot(path)
    if path.suffix not in SUFFIXES:
        from edm2kit.snapshots.run_folder import refuse_other_files

        refuse_other_files(path)
    return path


def is_published_pickle(path: str | Path) -> bool:
    """Whether the file is a pickle (as published by NVIDIA) and not a snapshot of this project."""
    with open(path, "rb") as file:
        start = file.read(9)
    # the first byte is not enough: safetensors starts with a length, which may end in 0x80, but then has a brace
    # (unless the file is truncated there)
    return start[:1] == b"\x80" and start[8:] not in (b"{", b"")


def open_weights(path_or_url: str | Path) -> Weights:
    """The header and the tensors of a snapshot, without reading weights.

    Accepts the same files as `load_snapshot`. Raises ValueError if the file is missing or damaged.
    """
    path = local_file(path_or_url)
    if path.is_file() and is_published_pickle(path):
        header, stored = read_published(path)
        tensors: dict[str, TensorInFile | torch.Tensor] = {}
        for name, tensor in stored.items():
            if tensor.position is None:  # strides scatter its values over the file
                tensors[name] = tensor.read()
            else:
                tensors[name] = TensorInFile(tensor.position, tensor.dtype, torch.Size(tensor.shape))
        return Weights(path.name, header, tensors, path)
    header = read_header(path)  # also refuses files that are too short or too long
    return Weights(path.name, header, {name: TensorInFile(*where) for name, where in tensor_layout(path).items()}, path)


def open_sources(sources: Sequence[str | Path], prefix: str = "", stds: Iterable[float] | None = None) -> list[Weights]:
    """The training snapshots in folders, and at single paths and URLs, sorted by training time and EMA length.

    `prefix` selects file names that start with it; `stds` selects EMA lengths, None for all. Rebuilt EMAs in a folder
    are left out. Raises ValueError for a file that is not a snapshot, and if nothing is found.
    """
    where = ", ".join(map(str, sources))
    found: list[Weights] = []
    for source in sources:
        if "://" not in str(source) and Path(source).is_dir():
            found += _training_snapshots(Path(source), prefix)
        else:
            weights = open_weights(source)
            if weights.name.startswith(prefix):
                found.append(weights)
    if not found:
        condition = f" with names that start with {prefix!r}" if prefix else ""
        if len(sources) == 1 and not prefix and Path(sources[0]).is_dir():
            from edm2kit.snapshots.run_folder import nothing_in  # for this message alone

            where += f": {nothing_in(Path(sources[0]))}"
        raise ValueError(f"found no training snapshots{condition} in {where}")
    if stds is not None:
        found = _with_stds(found, set(stds), where)
    return sorted(found, key=lambda weights: (weights.header.nimg, weights.header.ema_std or 0))


def _training_snapshots(folder: Path, prefix: str) -> list[Weights]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        if not path.name.startswith(prefix):
            continue
        weights = open_weights(path)
        if weights.header.recipe is None:
            found.append(weights)
    return found


def _with_stds(found: list[Weights], stds: set[float], where: str) -> list[Weights]:
    by_std: dict[float | None, list[Weights]] = {}
    for weights in found:
        by_std.setdefault(weights.header.ema_std, []).append(weights)
    missing = stds - by_std.keys()
    if missing:
        lengths = ", ".join(str(std) for std in sorted(std for std in by_std if std is not None))
        raise ValueError(f"no snapshot in {where} has the EMA length {min(missing)}; available: {lengths}")
    return [weights for weights in found if weights.header.ema_std in stds]


def _open_one_of_many(path: str | Path) -> FileIO:
    """Open a file; if this process has too many open, raise its limit as far as the system allows.

    Raises ValueError that says what to set if that is not enough.
    """
    try:
        return FileIO(path)
    except OSError as error:
        if error.errno != errno.EMFILE or resource is None:
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            # macOS says that there is no limit, but allows only so many
            wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else hard
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
            if soft < wanted:
                return FileIO(path)
        raise ValueError(
            f"{path}: this process may open {soft} files, which is not enough for all snapshots at once; raise "
            "that limit (ulimit -n 4096), or rebuild from fewer snapshots"
        ) from error


class WeightReader:
    """Reads parts of the tensors of one `Weights`. A context manager; threads may share it.

    A tensor is compared with its checksum when the last of its parts has been read, in any order.
    """

    def __init__(self, weights: Weights):
        self.weights = weights
        self._begun: dict[str, _Begun] = {}
        # not memory-mapped: the mapped pages of hundreds of files would count as this process's memory
        self._lock = Lock()  # for the parts, and for seek and read on systems without preadv (Windows)
        self._file = None if weights.path is None else _open_one_of_many(weights.path)

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
        """Values start..stop-1 of the flattened tensor, as stored; raises ValueError if the file is damaged."""
        tensor = self.weights.tensors[name]
        if isinstance(tensor, torch.Tensor):
            return tensor.detach().reshape(-1)[start:stop]
        values = torch.empty(stop - start, dtype=tensor.dtype)
        self.read_bytes(name, start, values.view(torch.uint8).numpy().data)
        return values

    def read_bytes(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the flattened tensor from value `start` on; raises as `read`."""
        tensor = self.weights.tensors[name]
        assert isinstance(tensor, TensorInFile)
        first = start * tensor.dtype.itemsize
        offset, complete = tensor.offset + first, out
        assert self._file is not None
        while out:
            if hasattr(os, "preadv"):
                count = os.preadv(self._file.fileno(), [out], offset)
            else:
                with self._lock:
                    self._file.seek(offset)
                    count = self._file.readinto(out) or 0
            if not count:
                raise ValueError(f"{self.weights.path} was truncated while it was being read; copy or write it again")
            out, offset = out[count:], offset + count
        if tensor.crc32 is not None:
            self._compare(name, first, complete)

    def _compare(self, name: str, first: int, data: memoryview) -> None:
        """Raise ValueError if `data`, from byte `first` on, completes a tensor that does not match its checksum."""
        tensor, found = self.weights.tensors[name], zlib.crc32(data)
        assert isinstance(tensor, TensorInFile)
        size = tensor.shape.numel() * tensor.dtype.itemsize
        if len(data) < size:
            with self._lock:
                begun = self._begun.setdefault(name, _Begun())
                begun.add(first, len(data), found)
            if begun.num_bytes < size:
                return
            found = begun.crc32
        if found != tensor.crc32:
            raise damaged_weights(self.weights.path, name)


@dataclass
class _Begun:
    """The checksum `crc32` of the first `num_bytes` of a tensor, and parts that wait for those before them."""

    num_bytes: int = 0
    crc32: int = 0
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, first: int, num_bytes: int, crc32: int) -> None:
        """Add a part that begins at byte `first`."""
        self.waiting[first] = num_bytes, crc32
        while self.num_bytes in self.waiting:
            length, crc32 = self.waiting.pop(self.num_bytes)
            self.crc32 = _times(self.crc32, _shift(length)) ^ crc32
            self.num_bytes += length


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32, with the coefficient of x^0 in the highest bit."""
    product = 0
    while a:
        if a & 1 << 31:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


@functools.cache
def _shift(num_bytes: int) -> int:
    """x^(8 num_bytes), by which a CRC-32 is multiplied as so many bytes follow."""
    power, square = 1 << 31, 1 << 23
    while num_bytes:
        if num_bytes & 1:
            power = _times(power, square)
        square = _times(square, square)
        num_bytes >>= 1
    return power
