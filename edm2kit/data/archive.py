"""Folders and zip files of images, read by number.

The index of a zip file is parsed into a few arrays here: Python's zipfile takes 12 seconds and 1.4 GB to open 1.28
million images, in every process.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import stat
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from edm2kit.data.file_kinds import START_BYTES, kind_of_file, single_image

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s4x2H4x3L3H8xL")
_LOCAL_BYTES = 30
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has none, and no pipes in folders
_STORED, _DEFLATED = 0, 8
_IN_EXTRA = 0xFFFFFFFF
_MAX_FILE_BYTES = 1 << 30  # of one file, uncompressed
_SUSPICIOUS_BYTES, _MAX_RATIO = 1 << 24, 200  # images and labels of this size never compress so well
_SMALL_BYTES = 1 << 16
# folders that systems and network disks keep beside the files of their users, some of them unreadable
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_UNICODE_PATH = 0x7075
_MAX_STAMPED = 1 << 17  # a network disk takes seconds for as many
_SAMPLE_BYTES = 4096  # that `checksum` reads at the start, in the middle and at the end of a file


def open_archive(
    path: str | Path, extensions: tuple[str, ...], or_else: tuple[str, ...] = ()
) -> "FolderArchive | ZipArchive":
    """The files at `path`, a folder or zip file, whose names end in one of `extensions` (lower case).

    If there are none, those that end in one of `or_else`. Hidden files and __MACOSX are ignored. Raises ValueError if
    `path` is neither a folder nor a complete zip file, or contains no such file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; expected a folder or a .zip of images")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path}: is a device or pipe; expected a folder or a .zip of images")
    archive = FolderArchive(path, extensions) if path.is_dir() else ZipArchive(path, extensions)
    if not archive.names and any(name.lower().endswith(or_else) for name in archive.ignored):
        return open_archive(path, or_else)
    if not archive.names:
        found = ""
        if archive.ignored:
            found = f"; it contains {other_files(len(archive.ignored))}, such as {archive.ignored[0]}"
        raise ValueError(f"{path}: contains no images ({', '.join(extensions)}){found}")
    return archive


def other_files(count: int) -> str:
    """How many files were ignored, in words."""
    return "1 other file" if count == 1 else f"{count:,} other files"


def check_name(name: str, where: object) -> None:
    """Raise ValueError unless `name`, which comes from the file `where`, stays below the folder it is appended to.

    Absolute names, drives, "..", and characters that no file name needs are refused; parts are separated by "/".
    """
    parts = name.split("/")
    inside = all(part not in ("", ".", "..") for part in parts) and ":" not in parts[0][1:2]
    if not inside or "\0" in name or (os.name == "nt" and re.search(r'[\\:*?"<>|]', name)):
        raise ValueError(
            f"{where}: contains the name {name!r:.200}, which is not a path below a folder; nothing is written. Make "
            "the archive again with relative names"
        )


def _open_regular(path: str | Path) -> IO[bytes]:
    """Open a file for reading; raises OSError for a pipe, which would wait for a writer, and for a device without end.

    A folder from elsewhere may hold them, or links to them.
    """
    # nonblocking: to open a pipe would wait, too
    file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | _NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is a device or pipe, not a file", str(path))


def read_regular(path: str | Path) -> bytes:
    """The bytes of a file; raises OSError if it cannot be read, has more than 1 GiB, or is a device or pipe."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than one image or label file can have", str(path))
        return file.read()


def stamp(paths: Sequence[str], times: bool = True) -> str:
    """A hash of the sizes of files and, unless `times` is False, of when they last changed; of 131,072 at most."""
    found = [os.stat(path) for path in paths[:: -(-len(paths) // _MAX_STAMPED)]]
    content = [(one.st_size, one.st_mtime_ns if times else None) for one in found]
    return hashlib.sha256(repr(content).encode()).hexdigest()


class FolderArchive:
    """The images in a folder and its subfolders.

    `names` are sorted paths relative to the folder, with forward slashes; `ignored` are those of other files.
    """

    def __init__(self, path: Path, extensions: tuple[str, ...]):
        self.path = path
        all_names = _file_names(path)
        picked, ignored = _split_names(all_names, extensions)
        self.names, self.ignored = [all_names[k] for k in picked], [all_names[k] for k in ignored]
        self._verified = np.zeros(len(self.names), bool)

    def where(self, index: int) -> str:
        """The name of file `index` for messages."""
        return f"{self.path}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """The bytes of file `index`; raises ValueError, naming the file, if it cannot be read."""
        try:
            return read_regular(self.where(index))  # a Path would intern each name, whose table grows
        except OSError as error:
            raise ValueError(f"{self.where(index)}: cannot be read: {error.strerror}") from error

    def checksum(self, index: int) -> tuple[int, int]:
        """Size and checksum of file `index`, to notice other content; (-1, 0) if it cannot be read.

        The checksum of a file above 64 KiB covers its start, middle and end.
        """
        checksum = 0
        try:
            with _open_regular(self.where(index)) as file:
                size = os.fstat(file.fileno()).st_size
                if size <= _SMALL_BYTES:
                    return size, zlib.crc32(file.read())
                for start in (0, size // 2, size - _SAMPLE_BYTES):
                    file.seek(start)
                    checksum = zlib.crc32(file.read(_SAMPLE_BYTES), checksum)
        except OSError:
            return -1, 0
        return size, checksum

    def read_extra(self, name: str) -> bytes | None:
        """The bytes of another file, such as dataset.json, or None if there is none."""
        path = self.path / name
        return read_regular(path) if path.is_file() else None

    def read_stored(self, indices: np.ndarray, num_bytes: int, split: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read files `indices` [n] of `num_bytes` bytes, each divided into two parts after `split` bytes.

        Returns uint8 [n, split], uint8 [n, num_bytes - split], and bool [n], which is false for files of another size:
        their rows are undefined. The checksum of a PNG is verified at its first use; if it is wrong, this gives false.
        """
        files = np.empty([len(indices), num_bytes], np.uint8)
        whole = np.zeros(len(indices), bool)
        for k, index in enumerate(indices.tolist()):
            data = self.read(index)
            whole[k] = len(data) == num_bytes
            if whole[k] and not self._verified[index]:
                whole[k] = self._verified[index] = png_is_intact(data)
            if whole[k]:
                files[k] = np.frombuffer(data, np.uint8)
        return files[:, :split], files[:, split:], whole


class ZipArchive:
    """The images in a zip file, stored or deflated, with the attributes and methods of FolderArchive.

    Safe to use after a fork and in threads (positioned reads share no file offset), and to pickle (the copy opens the
    file again). Raises ValueError if the file is not a zip archive or is incomplete.
    """

    def __init__(self, path: Path, extensions: tuple[str, ...]):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as the archive lives)
        all_names, entries = _read_index(self._file.fileno(), path)
        picked, ignored = _split_names(all_names, extensions)
        self.names, self.ignored = [all_names[k] for k in picked], [all_names[k] for k in ignored]
        self._entries = entries[picked]  # int64 [n, 6]: offset, bytes in the zip, bytes, checksum, method, name's bytes
        self._extra = dict(zip(self.ignored, entries[ignored], strict=True))
        self._local_extra = _local_extra(self._file.fileno(), self._entries)
        self._verified = np.zeros(len(self.names), bool)
        for name, following in itertools.pairwise(self.names):
            if name == following:
                raise ValueError(f"{path}: contains {name} twice; write the archive again")

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (open as long as the archive lives)

    def where(self, index: int) -> str:
        """The name of file `index` for messages."""
        return f"{self.path}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """The bytes of file `index`; raises ValueError, naming the file, if it cannot be read or is damaged."""
        return self._read(self._entries[index], self.where(index))

    def checksum(self, index: int) -> tuple[int, int]:
        """Size and checksum of file `index`, as the zip records them."""
        return int(self._entries[index, 2]), int(self._entries[index, 3])

    def digest(self, indices: np.ndarray) -> str:
        """A hash of sizes and checksums of the files `indices`, as the zip records them."""
        return hashlib.sha256(self._entries[indices, 2:4].astype("<i8").tobytes()).hexdigest()

    def read_extra(self, name: str) -> bytes | None:
        """The bytes of another file, such as dataset.json, or None if there is none."""
        if name not in self._extra:
            return None
        return self._read(self._extra[name], f"{self.path}/{name}")

    def read_stored(self, indices: np.ndarray, num_bytes: int, split: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Like FolderArchive.read_stored; compressed files give false.

        Verifies the checksum of a file at its first use in this process: always doing it would double the time.
        """
        entries = self._entries[indices]
        before = _LOCAL_BYTES + entries[:, 5] + self._local_extra  # bytes between `offset` and the file itself
        heads = np.zeros([len(indices), _LOCAL_BYTES + int(before.max(initial=0)) + split], np.uint8)
        rests = np.empty([len(indices), num_bytes - split], np.uint8)
        stored = (entries[:, 4] == _STORED) & (entries[:, 1] == num_bytes)
        whole = np.zeros(len(indices), bool)
        offsets, head_bytes, descriptor = entries[:, 0].tolist(), (before + split).tolist(), self._file.fileno()
        if not hasattr(os, "preadv"):  # Windows
            stored[:] = False
        for k in np.flatnonzero(stored).tolist():
            try:
                count = os.preadv(descriptor, [heads[k, : head_bytes[k]].data, rests[k].data], offsets[k])
            except OSError:
                continue  # the caller reads this file by itself and gets the reason
            whole[k] = count == head_bytes[k] + num_bytes - split
        whole &= heads[:, :4].copy().view("S4")[:, 0] == b"PK\x03\x04"
        lengths = heads[:, 26:30].copy().view("<u2")
        whole &= (lengths[:, 0] == entries[:, 5]) & (lengths[:, 1] == self._local_extra)
        starts = np.take_along_axis(heads, before[:, None] + np.arange(split), axis=1)
        for k in np.flatnonzero(whole & ~self._verified[indices]).tolist():
            checksum = zlib.crc32(rests[k], zlib.crc32(starts[k]))
            whole[k] = self._verified[indices[k]] = checksum == entries[k, 3]
        return starts, rests, whole

    def _read(self, entry: np.ndarray, where: str) -> bytes:
        offset, packed, size, checksum, method, _ = entry.tolist()
        if size > _MAX_FILE_BYTES or (size > _SUSPICIOUS_BYTES and size > _MAX_RATIO * packed):
            raise ValueError(f"{where}: claims {size} bytes, made from {packed}; this is not an image or a label file")
        if method not in (_STORED, _DEFLATED):
            raise ValueError(f"{where}: uses zip compression method {method}; write the zip stored or deflated")
        header = self._pread(_LOCAL_BYTES, offset, where)
        if len(header) < _LOCAL_BYTES or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{where}: is not where the zip's index says; the archive is damaged, write it again")
        name_bytes, extra_bytes = struct.unpack_from("<2H", header, 26)
        data = self._pread(packed, offset + _LOCAL_BYTES + name_bytes + extra_bytes, where)
        if method == _DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise ValueError(f"{where}: is damaged in the zip: {error}") from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ValueError(f"{where}: is damaged in the zip: its checksum is wrong; write the archive again")
        return data

    def _pread(self, num_bytes: int, offset: int, where: str) -> bytes:
        try:
            return os.pread(self._file.fileno(), num_bytes, offset)
        except OSError as error:
            raise ValueError(f"{where}: cannot be read: {error.strerror}") from error


def png_is_intact(data: bytes) -> bool:
    """Whether the pixels of a PNG match their checksums, and none is missing; True for files that are not PNG."""
    position = 8
    while data.startswith(b"\x89PNG") and position + 8 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, position)
        end = position + 8 + length
        content = memoryview(data)[position + 4 : end]
        if kind == b"IDAT" and zlib.crc32(content) != int.from_bytes(data[end : end + 4], "big"):
            return False
        position = end + 4
    return True


def _local_extra(descriptor: int, entries: np.ndarray) -> int:
    """The number of extra bytes in front of the first file: not in the index, and usually the same for all files."""
    header = b""
    with contextlib.suppress(OSError, IndexError):  # a damaged index; reading a file reports it
        header = os.pread(descriptor, _LOCAL_BYTES, int(entries[0, 0]))
    return struct.unpack_from("<H", header, 28)[0] if len(header) == _LOCAL_BYTES else 0


def _file_names(root: Path) -> list[str]:
    names: list[str] = []
    seen: set[str] = set()
    # class folders are often links to elsewhere; `seen` stops a link to a parent folder from looping forever
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        seen.add(os.path.realpath(folder))
        shown = [name for name in folders if name not in _SYSTEM_FOLDERS and not name.startswith(".")]
        folders[:] = [name for name in shown if os.path.realpath(os.path.join(folder, name)) not in seen]
        prefix = Path(folder).relative_to(root).as_posix()
        if prefix == ".":
            names.extend(files)
        else:
            names.extend(f"{prefix}/{file}" for file in files)
    return names


def _refuse_folder(error: OSError) -> None:
    # leaving its files out would change the numbers of the classes
    raise ValueError(f"{error.filename}: the folder cannot be read: {error.strerror}; fix its permissions") from error


def _decode_name(name: bytes, flags: int, extra: bytes) -> str:
    """A name in a zip. Most tools write UTF-8, but only some set the flag; tools on Windows may separate by "\\".

    Some write their system's code page, or escapes, and UTF-8 in an extra field (APPNOTE 4.6.9).
    """
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = name.decode("utf-8", "surrogateescape") if flags & 0x800 else name.decode("cp437")
    for kind, field in _extra_fields(extra) if extra else ():
        if kind == _UNICODE_PATH and field[:5] == b"\1" + zlib.crc32(name).to_bytes(4, "little"):
            with contextlib.suppress(UnicodeDecodeError):
                text = field[5:].decode()
    return text.removeprefix("./").replace("\\", "/")


def _is_hidden(name: str) -> bool:
    """Whether a file is hidden or in a hidden folder; ../x.png is not, and must not be left out silently."""
    if not name.startswith(".") and "/." not in name and not any(folder in name for folder in _SYSTEM_FOLDERS):
        return False
    *folders, _ = parts = name.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return hidden or not set(folders).isdisjoint(_SYSTEM_FOLDERS)


def _split_names(all_names: list[str], extensions: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The positions of the images in `all_names`, sorted by name, and of the other files."""
    picked: list[int] = []
    ignored: list[int] = []
    for position, name in enumerate(all_names):
        if _is_hidden(name) or name.endswith("/"):
            continue
        if name.lower().endswith(extensions):
            picked.append(position)
        else:
            ignored.append(position)
    return sorted(picked, key=all_names.__getitem__), sorted(ignored, key=all_names.__getitem__)


def _read_index(descriptor: int, path: Path) -> tuple[list[str], np.ndarray]:
    """Parse a zip's central directory (PKWARE APPNOTE 4.3.12 to 4.3.16) into names and entries, int64 [n, 6]."""
    start, num_bytes, count, shift = _find_index(descriptor, path)
    directory = os.pread(descriptor, num_bytes, start)
    names: list[str] = []
    numbers = array("q")
    position = 0
    is_encrypted = False
    try:
        for _ in range(count):
            signature, flags, method, crc, packed, size, name_bytes, extra_bytes, comment_bytes, offset = (
                _CENTRAL.unpack_from(directory, position)
            )
            name_start = position + _CENTRAL.size
            name_end = name_start + name_bytes
            extra = directory[name_end : name_end + extra_bytes] if extra_bytes else b""
            if signature != b"PK\x01\x02":
                raise ValueError
            names.append(_decode_name(directory[name_start:name_end], flags, extra))
            is_encrypted = is_encrypted or bool(flags & 1)
            if _IN_EXTRA in (packed, size, offset):
                size, packed, offset = _zip64_fields(extra, size, packed, offset)
            numbers.extend((offset + shift, packed, size, crc, method, name_bytes))
            position = name_end + extra_bytes + comment_bytes
        if position != num_bytes:
            raise ValueError
    except (struct.error, ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: the zip's index is damaged at entry {len(names)}; copy or write the archive again"
        ) from error
    if is_encrypted:
        raise ValueError(f"{path}: the zip is encrypted; unpack it with its password, and use the folder")
    return names, np.frombuffer(numbers, np.int64).reshape(-1, 6)


def _find_index(descriptor: int, path: Path) -> tuple[int, int, int, int]:
    """Start, size and number of entries of the central directory, and the value to add to the offsets in it."""
    file_bytes = os.fstat(descriptor).st_size
    tail_start = max(0, file_bytes - (1 << 16) - _END.size - _END64_LOCATOR.size)
    tail = os.pread(descriptor, file_bytes - tail_start, tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        start = os.pread(descriptor, START_BYTES, 0)
        kind = single_image(start) or kind_of_file(start)
        if kind is not None:
            raise ValueError(f"{path}: is {kind}")
        raise ValueError(f"{path}: not a zip archive, or cut short: no index at its end; copy or write it again")
    _, _, _, _, count, num_bytes, offset, comment_bytes = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = tail[at - _END64_LOCATOR.size : at] if at >= _END64_LOCATOR.size else b""
    if locator[:4] == b"PK\x06\x07":
        end = _END64_LOCATOR.unpack(locator)[2]
        record = os.pread(descriptor, _END64.size, end)
        if record[:4] != b"PK\x06\x06" or len(record) < _END64.size:
            raise ValueError(f"{path}: the zip's index is damaged; copy or write the archive again")
        count, num_bytes, offset = _END64.unpack(record)[7:]
    # bytes in front of the archive (a self-extractor) move every offset
    shift = end - num_bytes - offset
    if shift < 0:
        raise ValueError(f"{path}: the zip is cut short: {-shift} bytes are missing; copy or write it again")
    if shift > 0 and at + _END.size + comment_bytes != len(tail):  # the index of a zip within the zip
        raise ValueError(f"{path}: the zip is cut short: its own index is missing; copy or write it again")
    return end - num_bytes, num_bytes, count, shift


def _zip64_fields(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Size, packed size and offset of an entry beyond 4 GiB (zip64 extended information)."""
    for kind, field in _extra_fields(extra):
        if kind == 1:
            wide = list(struct.unpack_from(f"<{len(field) // 8}Q", field))
            size, packed, offset = (wide.pop(0) if value == _IN_EXTRA else value for value in (size, packed, offset))
            break
    return size, packed, offset


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """The kind and the content of each extra field of an entry; a cut one ends them."""
    position = 0
    while position + 4 <= len(extra):
        kind, num_bytes = struct.unpack_from("<2H", extra, position)
        yield kind, extra[position + 4 : position + 4 + num_bytes]
        position += 4 + num_bytes
