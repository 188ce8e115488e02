"""Folders and zip files of images, read by number."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from edm2kit.data.zip_index import read_index

_LOCAL_BYTES = 30
# characters, devices and endings that Windows does not allow in a name
_NOT_ON_WINDOWS = re.compile(r'[\\:*?"<>|]|(?:^|/)(?:con|prn|aux|nul|com\d|lpt\d)(?=[./]|$)|[. ](?=/|$)', re.IGNORECASE)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has none, and no pipes in folders
_STORED, _DEFLATED = 0, 8
_MAX_FILE_BYTES = 1 << 30  # of one file, uncompressed
_SUSPICIOUS_BYTES, _MAX_RATIO = 1 << 24, 200  # images and labels of this size never compress so well
_SMALL_BYTES = 1 << 16
# folders that systems and network disks keep beside the files of their users, some of them unreadable
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_MAX_STAMPED = 1 << 17  # a network disk takes seconds for as many
_MAX_OTHERS = 1 << 12  # files beside the images whose names are compared when a zip is opened
# A JPEG takes as long as its number of scans, up to 12; a video behind it may hold their bytes, once in 65536.
_SCAN, _MANY_PARTS, _BYTES_PER_SCAN = b"\xff\xda", 100, 4096
_BYTES_PER_CHUNK = 256  # of a PNG, at least; most have thousands
# PBM, PGM, PPM and PFM: width and height, then the largest value unless it is a bitmap, with comments in between
_NETPBM_TOKEN = rb"(?:\s|#[^\r\n]*[\r\n])+[^\s#]+"
_NETPBM_HEADER = re.compile(rb"P(?:[14](?:%s){2}|[^14](?:%s){3})\s" % (_NETPBM_TOKEN, _NETPBM_TOKEN))
_NETPBM_BYTES = 1 << 16  # that a header may have
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

    Absolute names, drives and ".." are refused, and on Windows what it does not allow; parts are separated by "/".
    """
    parts = name.split("/")
    inside = all(part not in ("", ".", "..") for part in parts) and ":" not in parts[0][1:2]
    if not inside or "\0" in name or (os.name == "nt" and _NOT_ON_WINDOWS.search(name)):
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


def spread_evenly(available: int, max_images: int | None) -> np.ndarray:
    """The positions of at most `max_images` of `available` items, evenly spread, int64."""
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}; expected at least 1")
    count = min(available, max_images or available)
    return np.arange(count) * available // count


class FolderArchive:
    """The images in a folder and its subfolders.

    `names` are sorted paths relative to the folder, with forward slashes; `ignored` are those of other files.
    A file is compared with what `expect` has been given for it when a process reads it for the first time.
    """

    def __init__(self, path: Path, extensions: tuple[str, ...]):
        self.path = path
        all_names = _file_names(path)
        picked, ignored = _split_names(all_names, extensions)
        self.names, self.ignored = [all_names[k] for k in picked], [all_names[k] for k in ignored]
        self._verified = np.zeros(len(self.names), bool)
        self._expected: np.ndarray | None = None

    def expect(self, recorded: Mapping[str, Sequence[int]]) -> None:
        """Compare the files in `recorded`, which gives their sizes and CRC-32, when they are read."""
        self._expected = None
        if recorded:
            # int64 [n, 2]; -1 for files that are not recorded
            self._expected = np.array([recorded.get(name, (-1, -1)) for name in self.names], np.int64)

    def where(self, index: int) -> str:
        """The name of file `index` for messages."""
        return f"{self.path}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """The bytes of file `index`.

        Raises ValueError, naming the file, if it cannot be read or is not what was expected.
        """
        try:
            data = read_regular(self.where(index))  # a Path would intern each name, whose table grows
        except OSError as error:
            raise ValueError(f"{self.where(index)}: cannot be read: {error.strerror}") from error
        if self._expected is not None and self._expected[index, 0] >= 0 and not self._verified[index]:
            if [len(data), zlib.crc32(data)] != self._expected[index].tolist():
                raise ValueError(
                    f"{self.where(index)}: has changed since it was written: its size or checksum is not the one in "
                    "dataset.json. Restore the file, or make the data set again; if you replaced it on purpose, remove "
                    '"checksums" from dataset.json'
                )
            self._verified[index] = True
        return data

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

    def digest(self, indices: np.ndarray) -> None:
        """Nothing: without reading the files, their checksums are not known for certain."""

    def stamp(self, indices: np.ndarray, times: bool = True) -> str:
        """What `stamp` gives of files `indices`."""
        return stamp([self.where(k) for k in indices.tolist()], times)

    def sample(self, indices: np.ndarray) -> str:
        """A hash of the sizes and checksums, as `checksum` gives them, of files `indices`; of 131,072 at most.

        Raises ValueError if one cannot be read.
        """
        found = []
        for index in indices[spread_evenly(len(indices), _MAX_STAMPED)].tolist():
            found.append(self.checksum(index))
            if found[-1][0] < 0:  # the hash would be another one as soon as the disk answers again
                raise ValueError(f"{self.where(index)}: cannot be read; run the same command again")
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def read_extra(self, name: str) -> bytes | None:
        """The bytes of another file, such as dataset.json, or None if there is none."""
        path = self.path / name
        return read_regular(path) if path.is_file() else None

    def read_stored(self, indices: np.ndarray, num_bytes: int, split: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read files `indices` [n] of `num_bytes` bytes, each divided into two parts after `split` bytes.

        Returns uint8 [n, split], uint8 [n, num_bytes - split], and bool [n], which is false for files of another size:
        their rows are undefined. The checksum of a PNG is verified at its first use; if it is wrong, this gives false.
        Raises ValueError as `read` does.
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
        all_names, entries = read_index(self._file.fileno(), path)
        picked, ignored = _split_names(all_names, extensions)
        self.names, self.ignored = [all_names[k] for k in picked], [all_names[k] for k in ignored]
        # int64 [n, 7]: offset, bytes in the zip, bytes, checksum, method, bytes and checksum of the name
        self._entries = entries[picked]
        self._extra = dict(zip(self.ignored, entries[ignored], strict=True))
        self._local_extra = _local_extra(self._file.fileno(), self._entries)
        self._verified = np.zeros(len(self.names), bool)
        for name, following in itertools.pairwise(self.names):
            if name == following:
                raise ValueError(f"{path}: contains {name} twice; write the archive again")
        for k in np.setdiff1d(np.arange(len(entries)), picked)[:_MAX_OTHERS].tolist():
            self._content_start(entries[k], f"{path}/{all_names[k]}")  # an image or dataset.json under a damaged name?

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

    def stamp(self, indices: np.ndarray, times: bool = True) -> None:
        """Nothing: `digest` says more."""

    def sample(self, indices: np.ndarray) -> None:
        """Nothing: `digest` says more."""

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
            name = heads[k, _LOCAL_BYTES : _LOCAL_BYTES + lengths[k, 0]].tobytes()
            checksums = zlib.crc32(rests[k], zlib.crc32(starts[k])), zlib.crc32(name)
            whole[k] = self._verified[indices[k]] = checksums == (entries[k, 3], entries[k, 6])
        return starts, rests, whole

    def _read(self, entry: np.ndarray, where: str) -> bytes:
        _, packed, size, checksum, method, _, _ = entry.tolist()
        if size > _MAX_FILE_BYTES or (size > _SUSPICIOUS_BYTES and size > _MAX_RATIO * packed):
            raise ValueError(f"{where}: claims {size} bytes, made from {packed}; this is not an image or a label file")
        if method not in (_STORED, _DEFLATED):
            raise ValueError(f"{where}: uses zip compression method {method}; write the zip stored or deflated")
        data = self._pread(packed, self._content_start(entry, where), where)
        if method == _DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise ValueError(f"{where}: is damaged in the zip: {error}") from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ValueError(f"{where}: is damaged in the zip: its checksum is wrong; write the archive again")
        return data

    def _content_start(self, entry: np.ndarray, where: str) -> int:
        """Where the content of a file begins; raises ValueError unless its name is in front of it, as in the index."""
        offset, _, _, _, _, name_bytes, checksum = entry.tolist()
        header = self._pread(_LOCAL_BYTES + name_bytes, offset, where)
        if len(header) < _LOCAL_BYTES or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{where}: is not where the zip's index says; the archive is damaged, write it again")
        found_bytes, extra_bytes = struct.unpack_from("<2H", header, 26)
        if found_bytes != name_bytes or zlib.crc32(header[_LOCAL_BYTES:]) != checksum:
            raise ValueError(f"{where}: has another name within the zip; the archive is damaged, write it again")
        return offset + _LOCAL_BYTES + name_bytes + extra_bytes

    def _pread(self, num_bytes: int, offset: int, where: str) -> bytes:
        try:
            return os.pread(self._file.fileno(), num_bytes, offset)
        except OSError as error:
            raise ValueError(f"{where}: cannot be read: {error.strerror}") from error


def slow_parts(data: bytes) -> str | None:
    """What makes it take seconds or minutes to open an image file of this size; None if nothing does."""
    if data.startswith(b"\xff\xd8"):
        scans = data.count(_SCAN)
        return f"{scans} scans" if scans > _MANY_PARTS + len(data) // _BYTES_PER_SCAN else None
    if data.startswith(b"\x89PNG"):
        position, left = 8, _MANY_PARTS + len(data) // _BYTES_PER_CHUNK
        while left and position + 4 <= len(data) and data[position + 4 : position + 8] != b"IEND":
            position += 12 + int.from_bytes(data[position : position + 4], "big")
            left -= 1
        return None if left else "very many chunks"
    if re.match(rb"P[1-6Ff]\s", data) and not _NETPBM_HEADER.match(data[:_NETPBM_BYTES]):
        return "a header without end"
    return None


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
