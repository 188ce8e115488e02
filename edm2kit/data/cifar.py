"""CIFAR-10 and CIFAR-100 as their authors publish them: pickles of Python 2 in a tar archive, read without running any.

https://www.cs.toronto.edu/~kriz/cifar.html describes the layout: `data` holds a row of 3072 bytes per image, red, green
and blue planes of 32x32 pixels.
"""

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import re
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from edm2kit.data.image_files import encode_png
from edm2kit.data.labels import Labels, labels_of_array
from edm2kit.torch_utils.pickles.reader import load_arrays

_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_SPLITS = {"train": r"data_batch_\d+|train", "test": r"test_batch|test"}
_META = "batches.meta|meta"
_MAX_BYTES = 1 << 28  # of an archive, unpacked: both have 186 MB
_CHUNK_BYTES = 1 << 20
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_SIDE = 32
_BROKEN_TAR = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError)
_MAX_CLASS = 1 << 20


def is_cifar_archive(path: str | Path) -> bool:
    """Whether `path` is a tar archive by its name, with or without a split such as ?split=test behind it."""
    return str(path).partition("?")[0].lower().endswith(_SUFFIXES)


class CifarArchive:
    """The images of `cifar-10-python.tar.gz` or `cifar-100-python.tar.gz`, with the methods of FolderArchive.

    `path` is FILE, or FILE?split=test for the test images instead of the training images. Images are in the order of
    the archive, and labels are its classes (the fine ones of CIFAR-100) with their names. Raises ValueError if the file
    is damaged, holds something else, or has no such split.
    """

    ignored: tuple[str, ...] = ()
    labels_are = "beside its pixels"

    def __init__(self, path: str | Path):
        file, _, query = str(path).partition("?")
        split = query.removeprefix("split=") if query else "train"
        if query and (not query.startswith("split=") or split not in _SPLITS):
            raise ValueError(f"{path}: unknown option {query!r}; available: {', '.join(f'split={s}' for s in _SPLITS)}")
        self.path = Path(file)
        members = _read_members(self.path, f"{_SPLITS[split]}|{_META}")
        batches = [name for name in sorted(members) if re.fullmatch(_SPLITS[split], name)]
        if not batches:
            raise ValueError(
                f"{self.path}: contains no CIFAR pickles for split={split}; use the archive cifar-10-python.tar.gz or "
                "cifar-100-python.tar.gz as it was downloaded, or unpack other archives first"
            )
        parts = [_read_batch(members[name], f"{self.path}/{name}") for name in batches]
        self._pixels = np.concatenate([pixels for pixels, _ in parts])
        self._classes = np.concatenate([classes for _, classes in parts])
        meta = [_class_names(members[name], f"{self.path}/{name}") for name in sorted(members) if name not in batches]
        self._class_names = meta[0] if meta else None
        largest = int(self._classes.max())
        if self._class_names is not None and largest >= len(self._class_names):
            raise ValueError(f"{self.path}: has an image of class {largest}, but {len(self._class_names)} class names")
        self.names = [
            f"{name}/{k:05d}.png" for name, (pixels, _) in zip(batches, parts, strict=True) for k in range(len(pixels))
        ]

    def where(self, index: int) -> str:
        """The name of image `index` for messages."""
        return f"{self.path}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """Image `index` as a PNG file."""
        return encode_png(Image.fromarray(self._pixels[index].transpose(1, 2, 0)))

    def checksum(self, index: int) -> tuple[int, int]:
        """Size and checksum of the pixels of image `index`."""
        return self._pixels[index].nbytes, zlib.crc32(self._pixels[index].tobytes())

    def read_extra(self, name: str) -> bytes | None:
        """None: there are no other files."""
        return None

    def read_labels(self) -> Labels:
        """The class of every image."""
        return labels_of_array(self._classes, str(self.path), self._class_names)


class _Limited(io.RawIOBase):
    """Reads a file up to a limit: a few kilobytes may unpack to terabytes. Raises ValueError beyond it."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path, self.left = file, path, _MAX_BYTES

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(
                f"{self.path}: unpacks to more than {_MAX_BYTES} bytes, so that it is not a CIFAR archive; unpack "
                "other archives first"
            )
        return data


def _read_members(path: Path, pattern: str) -> dict[str, bytes]:
    """The regular files of the archive whose last name matches, by that name."""
    found: dict[str, bytes] = {}
    total = 0
    try:
        with open(path, "rb") as start:
            open_packed = _PACKED.get(start.read(2), functools.partial(open, mode="rb"))
        with contextlib.ExitStack() as opened:
            unpacked = _Limited(opened.enter_context(open_packed(path)), path)
            # as a stream, in pieces: tarfile would skip files, and read names, of any size
            archive = opened.enter_context(tarfile.open(fileobj=unpacked, mode="r|"))
            for member in archive:
                name = member.name.rpartition("/")[2]
                if not member.isfile() or not re.fullmatch(pattern, name):
                    continue
                total += member.size  # a sparse file has fewer bytes in the archive
                if total > _MAX_BYTES or name in found:
                    raise ValueError(f"{path}: {name} appears twice or claims {member.size} bytes; download it again")
                file = archive.extractfile(member)
                assert file is not None  # for a regular file
                found[name] = file.read()
            while unpacked.read(_CHUNK_BYTES):
                pass  # the checksum is at the end, which tarfile does not reach
    except _BROKEN_TAR as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read as a tar archive: {reason}; download it again") from error
    return found


def _read_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 [n, 3, 32, 32], and classes, int64 [n], of one pickle."""
    content = load_arrays(data, where)
    pixels = _entry(content, "data", where)
    labels = content.get("labels", content.get("fine_labels"))
    fits = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2
    if not fits or pixels.shape[1] != 3 * _SIDE**2 or not len(pixels):
        raise ValueError(f"{where}: its data are not rows of {3 * _SIDE**2} bytes")
    are_classes = isinstance(labels, list) and all(type(label) is int and abs(label) < _MAX_CLASS for label in labels)
    if not are_classes or len(labels) != len(pixels):
        raise ValueError(f"{where}: does not have a class for each of its {len(pixels)} images")
    return pixels.reshape(-1, 3, _SIDE, _SIDE), np.array(labels, np.int64)


def _class_names(data: bytes, where: str) -> tuple[str, ...]:
    content = load_arrays(data, where)
    names = _entry(content, "fine_label_names" if "fine_label_names" in content else "label_names", where)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: its class names are not texts")
    return tuple(names)


def _entry(content: Any, name: str, where: str) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f"{where}: has no entry {name!r}; this is not a CIFAR archive")
    return content[name]
