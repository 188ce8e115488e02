"""Reading .npz files from untrusted sources: nothing in them is executed, and sizes are checked first."""

import math
import struct
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

_MAX_BYTES = 1 << 30  # of all arrays in a file, uncompressed; statistics of three detectors take 6% of it
_MAX_VERIFIED_BYTES, _CHUNK_BYTES = 4 << 30, 1 << 22
# what numpy and zipfile raise for damaged and hostile files
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, TokenError, OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError),
    *(AttributeError, IndexError, OverflowError, MemoryError, struct.error),
    RuntimeError,  # an encrypted member, an unknown compression, or nesting without end
)


def read_npz(path: str | Path, skip: Collection[str] = (), max_bytes: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of the .npz file at `path`, by name, without those in `skip`, which may be of any size.

    Raises ValueError if the file is damaged, contains objects, or claims more than `max_bytes`, counting at least 8 for
    each number; the message is one line with the reason, to which the caller adds the name of the file. Raises OSError
    if it cannot be opened.
    """
    max_bytes = max_bytes or _MAX_BYTES
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                read = [info for info in archive.infolist() if info.filename.removesuffix(".npy") not in skip]
                claimed = sum(info.file_size for info in read)
                if claimed > max_bytes:
                    raise ValueError(f"its arrays have {claimed} bytes; the limit is {max_bytes}")
                for info in read:
                    with archive.open(info) as member:
                        is_array = member.read(6) == np.lib.format.MAGIC_PREFIX
                        member.seek(0)
                        max_bytes -= _check_header(member, info.filename, max_bytes) if is_array else 0
            file.seek(0)
            found = {}
            with np.load(file, allow_pickle=False) as arrays:
                for name in arrays.files:
                    if name in skip:
                        continue
                    found[name] = arrays[name]
                    if not isinstance(found[name], np.ndarray):  # numpy returns other members as bytes
                        raise ValueError(f"its entry {name!r:.60} is not an array")
            return found
        except BROKEN as error:
            raise ValueError(_reason(error)) from error


def read_npz_array(path: str | Path, name: str) -> np.ndarray:
    """One array of an .npz file; other arrays may be of any size. Raises as `read_npz`."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            _check_header(member, name, _MAX_BYTES)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except BROKEN as error:
        raise ValueError(_reason(error)) from error


def _check_header(member: IO[bytes], name: str, max_bytes: int) -> int:
    """The bytes that an array takes as float64, from its header; raises ValueError if they are above the limit."""
    version = np.lib.format.read_magic(member)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{name!r:.60} has an unknown version of the .npy format")
    shape, _, dtype = read_header[version](member)
    num_bytes = math.prod(shape) * max(dtype.itemsize, 8)
    if num_bytes > max_bytes:
        raise ValueError(f"its array {name!r:.60} is {dtype} {list(shape)}, too large: the limit is {max_bytes} bytes")
    return max(num_bytes, 0)


def map_npz_array(path: str | Path, name: str) -> np.ndarray:
    """The array `name` of an uncompressed .npz file, memory-mapped: its values are read when they are used.

    The checksum of an array up to 4 GiB is verified first, at about a gigabyte per second. Raises ValueError, in one
    line without the name of the file, if the array is missing, compressed, in column order or of objects, or if the
    file is damaged.
    """
    member_name = f"{name}.npy"
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member_name) as member:
            info = archive.getinfo(member_name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member_name} is compressed; write it with np.savez")
            shape, fortran_order, dtype = read_header[np.lib.format.read_magic(member)](member)
            header_bytes = member.tell()
            while info.file_size <= _MAX_VERIFIED_BYTES and member.read(_CHUNK_BYTES):
                pass  # zipfile raises BadZipFile at the end if the checksum is wrong
        if fortran_order or dtype.hasobject:
            raise ValueError(f"{member_name} is in column order or contains objects; expected numbers in row order")
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<2H", file.read(4))
        offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
    except BROKEN as error:
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}".strip()
    return (text.splitlines() or ["it is damaged"])[0][:300]
