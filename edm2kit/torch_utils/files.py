"""Files that are either complete or absent: atomic writing, hashes, locks, and JSON records of what made a result."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import time
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from edm2kit.torch_utils import dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
LOCK_NAME = ".running"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # for names of files that are not UTF-8
_LOOK_AGAIN_SEC = 0.1  # for a lock that another process holds
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_held: set[IO[Any]] = set()  # files whose locks this process holds
_PIECES, _PIECE_BYTES = 64, 4096  # that sampled_sha256 reads
_ROOT = Path(__file__).parents[2]
_GIT_SEC = 60.0


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Write `path` completely or not at all: opens a temporary file beside it and renames that at the end.

    An exception or a full disk leaves the old file as it was and removes the temporary one. A crash leaves both; the
    next process that writes to the folder removes the temporary one. `mode` is "wb" or "w" (UTF-8). Creates the parent
    folder if needed. Raises OSError as `open` does, naming `path`.

    Example: `with atomic_write("runs/a.json", "w") as file: json.dump(record, file)`
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_once(path.parent.absolute())
    # random, as another thread or another machine on the same file system may write the same path
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")  # names have at most 255 bytes
    try:
        with _open_marked(partial, mode) as file, _kept_from_children(file):
            yield file
            file.flush()
            os.fsync(file.fileno())
            if HAS_LOCKS:  # while the mark is held: remove_partial_files of another writer must not take the file
                os.replace(partial, path)
        if not HAS_LOCKS:  # Windows, which renames only closed files
            os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # the system does not say which file did not fit
        raise
    finally:
        partial.unlink(missing_ok=True)


def _open_marked(path: Path, mode: str) -> IO[Any]:
    """Create `path` with a lock on it, which tells `remove_partial_files` that its writer lives."""
    while True:
        file = open(path, mode, **({} if "b" in mode else _TEXT))  # noqa: SIM115 the caller closes it
        if not HAS_LOCKS:
            return file
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another writer took it for a leftover between the two calls


@contextlib.contextmanager
def _kept_from_children(file: IO[Any]) -> Iterator[None]:
    """Inside the block, forked processes close their copy of `file`, which would hold its lock after we die."""
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)


def _close_held_files() -> None:
    for file in _held:
        # the raw file: closing `file` would write what the parent has not flushed yet
        with contextlib.suppress(OSError, ValueError):
            os.dup2(_nowhere(), file.fileno(), inheritable=False)
    _held.clear()


@functools.cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDWR)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held_files)


def remove_partial_files(folder: Path) -> None:
    """Delete what `atomic_write` left in `folder` when its process was killed; files in use stay.

    Without file locks, all stay.
    """
    if not HAS_LOCKS:
        return
    for path in folder.glob(".*.tmp"):
        if not _PARTIAL.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


_clean_once = functools.cache(remove_partial_files)  # looking at a million images before each one would take hours


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, if the system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """A hash of the size of a file and of 64 pieces of it: shows that a large file has other content, in milliseconds.

    Not for files that someone may have altered on purpose.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        for k in range(_PIECES + 1):
            file.seek(max(size - _PIECE_BYTES, 0) * k // _PIECES)
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def crc32_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The CRC-32 of the bytes of each tensor (on the CPU), by name, as 8 hexadecimal digits."""
    found = {}
    for name, tensor in tensors.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        found[name] = f"{zlib.crc32(content):08x}"  # type: ignore[arg-type]
    return found


def free_bytes(folder: Path) -> int:
    """Free bytes on the file system of `folder`, which may not exist yet."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def exclusive(folder: str | Path, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of `folder` inside the block; the folder is created if needed.

    With `shared`, others may come in that ask for it, too: they must agree on what they write. Removes partial files of
    killed processes. Raises ValueError at once if another process holds the folder, on this machine or on another one
    of the same file system.
    """

    def refuse(owner: str) -> None:
        raise ValueError(
            f"{folder} is being written by another run ({owner}); wait for it to finish, or choose another folder"
        )

    with file_lock(Path(folder) / LOCK_NAME, refuse, shared):
        remove_partial_files(Path(folder))
        yield


@contextlib.contextmanager
def file_lock(path: Path, when_held: Callable[[str], None], shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path` inside the block, alone or with others that want it `shared`.

    A process that dies releases it. Raises ValueError if it is a link: the file behind it would be emptied.
    As long as another process holds it, `when_held(owner)` is called ten times a second, `owner` being text for a
    message: it raises, or returns to wait on. If the file system has no locks, prints a warning and continues without
    one.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which leads out of its folder; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_locked(path, when_held, shared) as file, _kept_from_children(file):
        with contextlib.suppress(OSError):  # a full disk: the lock works without the name of its owner
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows cannot remove an open file; an unlocked one does no harm
                if not shared or _is_last(file):
                    path.unlink()


def patience(what: str) -> Callable[[str], None]:
    """For `file_lock`: wait as long as `dist.timeout_sec` allows, then raise ValueError naming `what` and its owner."""
    started = time.monotonic()

    def wait(owner: str) -> None:
        if time.monotonic() - started > dist.timeout_sec():
            raise ValueError(f"{what} has been in use for {dist.timeout_sec():.0f} s by {owner}; it may be stopped")

    return wait


def _is_last(file: IO[str]) -> bool:
    """Whether no other process holds the shared lock that this one holds."""
    return HAS_LOCKS and _try_lock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def _open_locked(path: Path, when_held: Callable[[str], None], shared: bool) -> Iterator[IO[str]]:
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            _acquire(file, path, when_held, shared)
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                is_current = False
            if is_current:
                yield file
                return
            # the former owner removed the file after we opened it: a lock on it keeps nobody out, so open a new one


def _acquire(file: IO[str], path: Path, when_held: Callable[[str], None], shared: bool) -> None:
    if not HAS_LOCKS:
        return
    try:
        while not _try_lock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            file.seek(0)
            when_held(file.read().strip() or "just started")
            time.sleep(_LOOK_AGAIN_SEC)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        dist.warn0(f"the file system of {path.parent} has no file locks: make sure that no other process writes there")


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` to `path` as JSON, atomically. Raises OSError if it cannot be written."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)


def plain_json(value: Any) -> Any:
    """`value` as JSON can hold it: tuples become lists, keys strings, infinities and other objects their text."""
    match value:
        case Mapping():
            return {str(key): plain_json(item) for key, item in value.items()}
        case list() | tuple() | range():
            return [plain_json(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)


def short_json(value: Any, max_chars: int = 24) -> str:
    """`value` as JSON for a message, cut to at most `max_chars` characters."""
    text = json.dumps(value)
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def differences(recorded: Any, current: Any, name: str = "") -> list[str]:
    """Each setting in which two JSON values differ, such as "solver.num_steps 32, now 16"; [] if equal.

    Mappings are compared key by key at any depth. `name` is the name of the value itself.
    """
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        found = []
        for key in dict.fromkeys([*recorded, *current]):
            label = json.dumps(key, ensure_ascii=False).strip('"')  # in one line
            found += differences(recorded.get(key), current.get(key), f"{name}.{label}".lstrip("."))
        return found
    if recorded == current:
        return []
    return [f"{name} {short_json(recorded)}, now {short_json(current)}"]


@functools.cache
def code_commit() -> str:
    """The git commit of the checkout, followed by "+changes" if Python files differ; "unknown" outside a checkout."""
    try:
        top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
        # a copy of these files inside another repository does not have its commit
        if top.returncode or head.returncode or Path(top.stdout.strip()).resolve() != _ROOT.resolve():
            return "unknown"
        changed = _git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head.stdout.strip()}{'+changes' if changed else ''}"


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    """A git command on the checkout; raises SubprocessError if its file system does not answer."""
    return subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, timeout=_GIT_SEC)


def hardware(device: torch.device | str = "cpu") -> str:
    """The name of the device, such as "NVIDIA H100 80GB" or "x86_64 CPU, 2 threads"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.device(device).type.upper()}, {torch.get_num_threads()} threads"


def provenance(device: torch.device | str = "cpu") -> dict[str, str]:
    """Commit, versions and hardware as strings, for a JSON record; on a CUDA device also CUDA, cuDNN and the driver."""
    gpu = {}
    if torch.device(device).type == "cuda":
        module = Path("/proc/driver/nvidia/version")
        gpu = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        gpu["driver"] = driver_version(module.read_text() if module.exists() else "")
    return {
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hardware": hardware(device),
        **gpu,
    }


def driver_version(text: str) -> str:
    """The version in what NVIDIA's kernel module says of itself; "unknown" if it has none."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else "unknown"


_MAX_INT = 1 << 62


def check_type(value: Any, hint: Any, name: str) -> None:
    """Raise ValueError, starting with `name`, unless `value` is of the type `hint`.

    A hint is int, float, bool, str, None, Any, a mapping, a tuple or sequence of these, or a union. A float may be
    written as an integer; numbers must be finite.

    Example: `check_type(values["nimg"], int, "nimg")`
    """
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_text(hint)}; got {short(value)}")


def check_fields(values: Mapping[str, Any], kind: type) -> None:
    """Raise ValueError, naming the field, unless `values` fit the type hints of the dataclass `kind`.

    A field that is missing is left to the dataclass.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown field {name!r:.60}; known: {', '.join(hints)}")
        check_type(value, hints[name], name)


def short(value: Any) -> str:
    """A value for a message, in at most 60 characters."""
    if isinstance(value, int) and abs(value) >= _MAX_INT:
        return f"a number of {value.bit_length()} bits"  # its digits may take minutes
    text = repr(value) if isinstance(value, str | int | float | None) else f"{type(value).__name__} {_start(value)}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _start(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(short(item) for item in value[:3]) + (", ...]" if len(value) > 3 else "]")
    return "" if isinstance(value, Mapping) else str(type(value))


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if hint in (None, types.NoneType):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_INT
    if origin is tuple and Ellipsis not in parts:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return isinstance(value, hint)


def _is_finite(value: float) -> bool:
    return abs(value) < _MAX_INT if isinstance(value, int) else math.isfinite(value)


def _text(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_text(part) for part in parts)
    if hint is types.NoneType:
        return "null"
    if origin in (tuple, list, Sequence):
        count = "" if Ellipsis in parts or origin is not tuple else f"{len(parts)} "
        return f"a list of {count}{_text(parts[0])}"
    if origin is not None:
        return "a mapping"
    return getattr(hint, "__name__", str(hint))
