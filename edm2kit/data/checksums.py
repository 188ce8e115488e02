"""Sizes and checksums of the files in a folder: dataset.json records them, as the index of a zip does."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.data.archive import FolderArchive, ZipArchive, check_name
from edm2kit.data.labels import LABELS_FILE, align_names, find_extra, read_labels_file
from edm2kit.torch_utils.dist import warn0
from edm2kit.torch_utils.files import atomic_write, short_json

KEY = "checksums"  # in dataset.json
Entry = Sequence[int]  # bytes and CRC-32
_MAX_BYTES, _MAX_CRC = 1 << 50, (1 << 32) - 1


def entry_of(data: bytes) -> Entry:
    """What is recorded of a file with this content."""
    return [len(data), zlib.crc32(data)]


def recorded_checksums(archive: FolderArchive, content: Mapping[str, Any]) -> dict[str, Entry]:
    """Size and CRC-32 of the files in `content`, the archive's dataset.json; {} if it does not record them.

    The record is "checksums": {"00000/img00000000.npy": [bytes, CRC-32], ...}. Raises ValueError if it is damaged.
    """
    found = content.get(KEY)
    if found is None:
        return {}
    place = find_extra(archive, LABELS_FILE)
    folder = "" if place is None else place[0]
    where = f"{archive.path}/{folder}{LABELS_FILE}"
    if not isinstance(found, dict):
        raise ValueError(f'{where}: "{KEY}" is a {type(found).__name__}; expected {{name: [bytes, CRC-32], ...}}')
    for name, entry in found.items():
        if not _is_entry(entry):
            raise ValueError(f"{where}: {name:.200} has the checksum {short_json(entry, 60)}; expected [bytes, CRC-32]")
    for name in found.keys() - set(archive.names):
        check_name(name, where)
    return align_names(found, archive.names, folder, where)


def _is_entry(entry: object) -> bool:
    if type(entry) is not list or len(entry) != 2 or not type(entry[0]) is type(entry[1]) is int:
        return False
    return 0 <= entry[0] <= _MAX_BYTES and 0 <= entry[1] <= _MAX_CRC


def verify_arrays(archive: FolderArchive | ZipArchive, needed: bool) -> None:
    """Compare a folder of .npy files with their recorded checksums, if it has any, at their first use.

    Files in a zip have checksums anyway. So have PNG files, which you may edit: do not call this for them. Raises
    ValueError if dataset.json is damaged, or only warns if it is not `needed` for other things.
    """
    if isinstance(archive, ZipArchive):
        return
    try:
        archive.expect(recorded_checksums(archive, read_labels_file(archive) or {}))
    except ValueError as error:
        if needed:
            raise
        warn0(f"{error}; the arrays are read without comparing checksums")


class Journal:
    """Sizes and checksums of the files written so far, in the file `path`: a line of JSON for each.

    A process that is killed leaves it for the next one. `entries` are those that are complete; None if there was no
    journal. Call `start` before `add`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] | None = None
        if path.exists():
            self.entries = dict(filter(None, map(_parsed, path.read_bytes().splitlines())))

    def start(self, entries: Mapping[str, Entry]) -> None:
        """Write the journal again with these `entries`."""
        self.entries = dict(entries)
        with atomic_write(self.path, "w") as file:
            file.writelines(map(_line, self.entries.items()))
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)

    def add(self, name: str, data: bytes) -> None:
        """Record a file that has been written."""
        assert self.entries is not None
        self.entries[name] = entry_of(data)
        self._file.write(_line((name, self.entries[name])))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(item: tuple[str, Entry]) -> str:
    return json.dumps([item[0], *item[1]]) + "\n"


def _parsed(line: bytes) -> tuple[str, Entry] | None:
    """The name and entry in a line of a journal; None if it is cut or damaged, so that the file is written again."""
    try:
        name, *entry = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return (name, entry) if isinstance(name, str) and _is_entry(entry) else None
