"""Arrays of .npz files from anywhere: nothing in them is executed, no size in them believed."""

import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError

import numpy as np

_MAX_BYTES = 1 << 30  # of all arrays of a file, uncompressed; statistics of three detectors take 0.06 of it
# what numpy and zipfile raise for damaged and for hostile files
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, TokenError, OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError),
    *(AttributeError, IndexError, NotImplementedError, OverflowError, RecursionError, MemoryError, struct.error),
)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of the .npz at `path` by name.

    Raises ValueError, whose one line gives the reason and leaves the naming of the file to the caller, where it is
    damaged, holds objects, or claims more than a GB. Raises OSError where it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                claimed = sum(info.file_size for info in archive.infolist())
            if claimed > _MAX_BYTES:
                raise ValueError(f"its arrays are {claimed} bytes, where {_MAX_BYTES} are the most")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: _array(name, arrays[name]) for name in arrays.files}
        except BROKEN as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}".strip()
            raise ValueError((reason.splitlines() or ["it is damaged"])[0]) from error


def _array(name: str, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray):  # numpy hands out the bytes of other members
        raise ValueError(f"its entry {name!r:.60} is no array")
    return value
