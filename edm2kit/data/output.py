"""Write a data set: it stays in `<dest>.partial` until it is complete, so that a killed command can resume."""

import contextlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from edm2kit.data.archive import FolderArchive, ZipArchive, check_name, open_archive, spread_evenly
from edm2kit.data.checksums import KEY, Entry, Journal, entry_of, recorded_checksums
from edm2kit.data.dataset import FILE_EXTENSIONS
from edm2kit.data.labels import LABELS_CRC, LABELS_FILE, labels_are_as_written, labels_checksum, read_labels_file
from edm2kit.torch_utils.files import differences, file_lock, free_bytes, plain_json, write_json

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LIMIT_16, _LIMIT_32 = 0xFFFF, 0xFFFFFFFF
_ZIP_BYTES = 150  # that a file takes in a zip besides its content
_COMPARED_BYTES = 1 << 26  # of a data set that is complete, and kept
_DATE_1980 = 33  # the same bytes whenever it is written


def is_finished(dest: Path, settings: dict) -> bool:
    """Whether `dest` is a complete data set made with `settings`; False if there is nothing.

    Removes the folder of unfinished files if a killed process has left it beside the complete data set. Raises
    ValueError if `dest` is anything else, or if files have been deleted from it.
    """
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    content: dict = {}
    with contextlib.suppress(ValueError):
        archive = open_archive(dest, FILE_EXTENSIONS)
        content = read_labels_file(archive) or {}
    found = content.get("settings")
    if not isinstance(found, dict):
        raise ValueError(f"{dest} exists and was not made by this command; delete it or choose another --dest")
    changed = differences(found, _comparable(plain_json(settings), found))
    if changed:
        raise ValueError(f"{dest} is a data set with {'; '.join(changed[:3])}; delete it or choose another --dest")
    num_files = len(archive.names)
    wanted = content.get("files", num_files)  # older records do not say how many there were
    if num_files != wanted:
        raise ValueError(f"{dest} has {num_files} of its {wanted} files; delete it and run the command again")
    if not labels_are_as_written(content):
        raise ValueError(
            f"{dest}: its labels have changed since it was made. Delete it or choose another --dest; if you changed "
            f'them on purpose, remove "{LABELS_CRC}" from {LABELS_FILE}'
        )
    _compare_sample(archive, content)
    left = _unfinished(dest)
    if left.exists() and not (left / "data").exists():
        with contextlib.suppress(ValueError), file_lock(left / "lock", lambda owner: _in_use(left, owner)):
            shutil.rmtree(left)
    return True


def _compare_sample(archive: FolderArchive | ZipArchive, content: dict) -> None:
    """Compare 64 MiB of the files with their checksums, at least 256 and at most 4096 of them, evenly spread.

    Raises ValueError, naming a file that has changed.
    """
    if isinstance(archive, FolderArchive):
        archive.expect(recorded_checksums(archive, content))
    count = min(max(_COMPARED_BYTES // max(len(archive.read(0)), 1), 256), 4096)
    for index in spread_evenly(len(archive.names), count).tolist():
        archive.read(index)


def _unfinished(dest: Path) -> Path:
    return dest.with_name(f"{dest.name}.partial")


def _in_use(folder: Path, owner: str) -> None:
    raise ValueError(f"{folder}: another process is writing there ({owner})")


def _comparable(settings: dict, found: dict) -> dict:
    """`settings` without those contents of the source that the record `found`, perhaps an older one, does not have."""
    if "source_digest" in found and "source_content" in settings:
        settings = {**settings, "source_digest": found["source_digest"]}
        del settings["source_content"]
    # only zips have checksums for certain, and what is compared of folders is younger
    for key in ("source_files", "source_sizes", "source_sample"):
        if None in (settings.get(key), found.get(key)):
            settings = {**settings, key: found.get(key)}
    if "class_names" not in found:
        settings = {name: value for name, value in settings.items() if name != "class_names"}
    source = settings.get("source")
    if isinstance(source, dict) and isinstance(found.get("source"), dict) and "content" not in found["source"]:
        settings = {**settings, "source": {key: value for key, value in source.items() if key != "content"}}
    return settings


def announce_size(dest: Path, count: int, image_bytes: int, compressed: bool) -> str:
    """A sentence about the size of `count` images of `image_bytes` uncompressed, before they are written.

    Raises ValueError if the disk has not that much space.
    """
    each = image_bytes + _ZIP_BYTES
    total, free = each * count, free_bytes(dest.parent)
    if compressed:
        return f"{dest} will be smaller than {size_text(total)}, of compressed images"
    if total > free:
        raise ValueError(
            f"{dest} will be {size_text(total)}, but {size_text(free)} are free on its disk; compress the images "
            "(--store compact), choose a smaller --resolution, or another disk"
        )
    return f"{dest} will be {size_text(total)}: {count} images of {size_text(each)}"


def size_text(num_bytes: float) -> str:
    """A number of bytes in the unit that is short to read: "37.5 MB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1000:.1f} KB"


class PartialDataset:
    """The files of an unfinished data set; a context manager.

    `settings` (JSON values) identify the data set: files in `<dest>.partial` that were written with the same settings
    are kept. `names` are the files so far. Raises ValueError if the settings differ or another process is writing
    there, and OSError if writing fails; in both cases the files stay, for the next attempt. An empty folder is removed.
    """

    def __init__(self, dest: Path, settings: dict):
        self.dest, self.settings = dest, settings
        self.folder = _unfinished(dest)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is needed as a folder for unfinished files, but is a file; move it")
        with contextlib.ExitStack() as held:
            held.enter_context(file_lock(self.folder / "lock", lambda owner: _in_use(self.folder, owner)))
            self._writer = self._open_writer()
            self._lock = held.pop_all()  # held until __exit__
        self.names = self._writer.names

    def _open_writer(self) -> "_FolderWriter | _ZipWriter":
        settings_file = self.folder / "settings.json"
        if not settings_file.exists() and any(path.name not in ("lock", "data") for path in self.folder.glob("[!.]*")):
            raise ValueError(f"{self.folder} is needed for unfinished files, but holds others; move it")
        if settings_file.exists() and (self.folder / "data").exists():
            found = _read_settings(settings_file)
            changed = differences(found, _comparable(plain_json(self.settings), found))
            if changed:
                raise ValueError(
                    f"{self.folder} contains an unfinished data set with {'; '.join(changed[:3])}; run with its "
                    "settings to finish it, or delete it"
                )
        write_json(settings_file, self.settings)
        writer = _ZipWriter if self.dest.suffix.lower() == ".zip" else _FolderWriter
        return writer(self.folder / "data")

    def __enter__(self) -> "PartialDataset":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
        self._lock.close()
        if not self.names:
            shutil.rmtree(self.folder)

    @contextlib.contextmanager
    def _naming_the_place(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(self.folder)  # the system does not name the full disk
            raise

    def add(self, name: str, data: bytes) -> None:
        """Write one file; raises ValueError for a name that would leave the folder."""
        check_name(name, self.dest)
        with self._naming_the_place():
            self._writer.add(name, data)
        self.names.add(name)

    def finish(self, content: dict) -> None:
        """Write dataset.json, and move the data set to its place.

        It holds `content`, the settings, the number of files and, in a folder, their checksums.
        """
        count = sum(name.lower().endswith(FILE_EXTENSIONS) for name in self.names)
        content = content | {"files": count, "settings": self.settings}
        if content.get("labels") is not None:
            content[LABELS_CRC] = labels_checksum(content)
        entries = sorted(self._writer.recorded.items())
        if entries:
            content[KEY] = {name: entry for name, entry in entries if name.lower().endswith(FILE_EXTENSIONS)}
        self.add(LABELS_FILE, json.dumps(content).encode())
        with self._naming_the_place():
            self._writer.finish()
        if self.dest.is_dir():
            self.dest.rmdir()  # empty, or is_finished would have refused it
        os.replace(self.folder / "data", self.dest)
        shutil.rmtree(self.folder)


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} and run the command again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged; delete {path.parent} and run the command again")
    return settings


def _is_whole(path: Path) -> bool:
    """Whether a file can be kept: a power cut leaves empty ones behind, and a PNG has checksums."""
    if not path.stat().st_size:
        return False
    if path.suffix != ".png":
        return True
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


class _FolderWriter:
    """Writes files that are complete or absent, whenever the process is killed.

    Files are not flushed to disk one by one, which would take longer than producing them: after a power cut within
    seconds of the end, some may be empty (`dataset_tool.py check` finds them). A zip file is flushed. Beside the files,
    a journal has their checksums, which `recorded` are. On resuming, files that do not fit theirs are written again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._journal = Journal(path.with_name("checksums"))
        known = self._journal.entries
        kept: dict[str, Entry] = {}
        for file in (Path(folder, file) for folder, _, files in os.walk(path) for file in files):
            name, entry = file.relative_to(path).as_posix(), entry_of(file.read_bytes())
            # earlier versions kept no journal
            is_good = _is_whole(file) if known is None else known.get(name) == entry
            if is_good:
                kept[name] = entry
        self._journal.start(kept)
        self.names = set(kept)

    @property
    def recorded(self) -> dict[str, Entry]:
        """Size and checksum of each file."""
        return self._journal.entries or {}

    def add(self, name: str, data: bytes) -> None:
        path = self.path / name
        partial = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
        self._journal.add(name, data)

    def finish(self) -> None:
        for leftover in self.path.glob("**/*.tmp"):
            leftover.unlink()

    def close(self) -> None:
        self._journal.close()


class _ZipWriter:
    """Appends stored files to a zip file and, unlike zipfile, to one that was never finished.

    Layout: PKWARE APPNOTE 4.3.6 to 4.3.16, zip64 if needed. Beside an unfinished zip, a journal has the name that each
    content belongs to: in the zip itself, names have no checksum. Raises ValueError for a file of 4 GiB or more.
    """

    recorded: Mapping[str, Entry] = {}  # nothing beside the zip's own index

    def __init__(self, path: Path):
        self._entries: dict[str, tuple[int, int, int]] = {}  # name: offset, bytes, checksum
        self._journal = Journal(path.with_name("checksums"))
        known = self._journal.entries  # None of earlier versions
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by close)
        # keep the complete files at the start, and cut off the rest
        end = 0
        while (header := self._file.read(_LOCAL.size))[:4] == b"PK\x03\x04" and len(header) == _LOCAL.size:
            checksum, num_bytes, name_bytes = *_LOCAL.unpack(header)[6:8], _LOCAL.unpack(header)[9]
            name, data = self._file.read(name_bytes), self._file.read(num_bytes)
            whole = len(data) == num_bytes and zlib.crc32(data) == checksum
            listed = known is None or known.get(os.fsdecode(name)) == [num_bytes, checksum]
            if not (whole and listed) or name in (b"", LABELS_FILE.encode()):
                break
            self._entries[os.fsdecode(name)] = (end, num_bytes, checksum)
            end = self._file.tell()
        self._file.seek(end)
        self._file.truncate()
        self._journal.start({name: entry[1:] for name, entry in self._entries.items()})
        self.names = set(self._entries)

    def add(self, name: str, data: bytes) -> None:
        if len(data) >= _LIMIT_32:
            raise ValueError(f"{name}: has {len(data)} bytes, too many for one file in a zip; use a folder as --dest")
        checksum, path = zlib.crc32(data), os.fsencode(name)
        if self._entries.get(name, ())[1:] == (len(data), checksum):
            return  # from a process that was killed later than this
        self._entries[name] = (self._file.tell(), len(data), checksum)
        fields = (20, 0x800, 0, 0, _DATE_1980, checksum, len(data), len(data), len(path), 0)
        self._file.write(_LOCAL.pack(b"PK\x03\x04", *fields) + path + data)
        self._journal.add(name, data)

    def finish(self) -> None:
        start = self._file.tell()
        for name, (offset, num_bytes, checksum) in self._entries.items():
            path = os.fsencode(name)
            extra = struct.pack("<2HQ", 1, 8, offset) if offset >= _LIMIT_32 else b""
            fields = (45, 45, 0x800, 0, 0, _DATE_1980, checksum, num_bytes, num_bytes, len(path), len(extra), 0, 0, 0)
            attributes = 0o100644 << 16
            self._file.write(_CENTRAL.pack(b"PK\x01\x02", *fields, attributes, min(offset, _LIMIT_32)) + path + extra)
        end, count = self._file.tell(), len(self._entries)
        if count >= _LIMIT_16 or end >= _LIMIT_32:
            record = (44, 45, 45, 0, 0, count, count, end - start, start)
            self._file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", *record))
            self._file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        count = min(count, _LIMIT_16)
        last = (0, 0, count, count, min(end - start, _LIMIT_32), min(start, _LIMIT_32), 0)
        self._file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", *last))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        # whatever a full disk kept from being written is cut off on resuming
        with contextlib.suppress(OSError):
            self._file.close()
        self._journal.close()
