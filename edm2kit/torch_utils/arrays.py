"""Reading .npz files from untrusted sources: nothing in them is executed, and sizes are checked first."""

import math
import os
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
_MAX_END_BYTES = (1 << 16) + 22 + 20  # of a zip: its end with a comment, and what says where the record of zip64 is
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
                check_index(archive)
                read = [info for info in archive.infolist() if info.filename.removesuffix(".npy") not in skip]
                claimed = sum(info.file_size for info in read)
                if claimed > max_bytes:
                    raise ValueError(f"its arrays have {claimed} bytes; the limit is {max_bytes}")
                found = {}
                for info in read:
                    name = info.filename.removesuffix(".npy")
                    with archive.open(info) as member:
                        if member.read(6) != np.lib.format.MAGIC_PREFIX:
                            raise ValueError(f"its entry {name!r:.60} is not an array")
                        member.seek(0)
                        max_bytes -= _check_header(member, info.filename, max_bytes)
                    found[name] = _read_array(archive, info.filename)
            return found
        except BROKEN as error:
            raise ValueError(_reason(error)) from error


def read_npz_array(path: str | Path, name: str) -> np.ndarray:
    """One array of an .npz file; other arrays may be of any size. Raises as `read_npz`."""
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(f"{name}.npy") as member:
                _check_header(member, name, _MAX_BYTES)
            return _read_array(archive, f"{name}.npy")
    except BROKEN as error:
        raise ValueError(_reason(error)) from error


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The array in a member of a zip, which is read to its end, where zipfile compares the checksum.

    numpy reads as much as the header claims: if a flipped bit makes that less, it does not get there. Nor does zipfile
    compare after a seek (Python 3.13), so that the member is opened for this alone.
    """
    with archive.open(name) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        while member.read(_CHUNK_BYTES):
            pass
    return array


def check_index(archive: zipfile.ZipFile) -> None:
    """Raise BadZipFile unless the index has as many entries as it says, each under the name before its content.

    zipfile reads the index to its end, whatever the number: a flipped bit in a length hides the entries that follow.
    """
    file = archive.fp
    assert file is not None
    start = max(file.seek(0, os.SEEK_END) - _MAX_END_BYTES, 0)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    (count,) = struct.unpack_from("<H", tail, end + 10)
    if count == 0xFFFF:  # in the record of zip64, whose place is 12 bytes in front of the end
        file.seek(struct.unpack_from("<Q", tail, end - 12)[0] + 32)
        (count,) = struct.unpack("<Q", file.read(8))
    if count != len(archive.infolist()):
        raise zipfile.BadZipFile(f"its index has {len(archive.infolist())} of {count} entries")
    for info in archive.infolist():
        archive.open(info).close()


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


def verify_npz(path: str | Path) -> None:
    """Compare everything in an .npz file with its checksums, at about a gigabyte per second.

    Raises ValueError, in one line without the name of the file, if something differs or the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_index(archive)
            if (name := archive.testzip()) is not None:
                raise ValueError(f"its entry {name!r:.60} does not match its checksum")
    except BROKEN as error:
        raise ValueError(_reason(error)) from error


def map_npy(path: str | Path) -> np.ndarray:
    """The array in a .npy file, memory-mapped.

    Raises ValueError, in one line without the name of the file, if it is damaged, has more bytes than its header says,
    or holds objects, and OSError if it cannot be opened.
    """
    with open(path, "rb"):
        pass
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        check_npy_size(os.path.getsize(path), array.offset + array.nbytes)
        return array
    except BROKEN as error:
        raise ValueError(_reason(error)) from error


def check_npy_size(size: int, expected: int) -> None:
    """Raise ValueError if a .npy file has more bytes than its header says: a flipped bit in a shape leaves some."""
    if size != expected:
        raise ValueError(f"it has {size} bytes, but its header says {expected}")


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
