"""Reading .npz files from untrusted sources: nothing in them is executed, and sizes are checked first."""

import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError

import numpy as np

_MAX_BYTES = 1 << 30  # of all arrays in a file, uncompressed; statistics of three detectors take 6% of it
# what numpy and zipfile raise for damaged and hostile files
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, TokenError, OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError),
    *(AttributeError, IndexError, NotImplementedError, OverflowError, RecursionError, MemoryError, struct.error),
)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of the .npz file at `path`, by name.

    Raises ValueError if the file is damaged, contains objects, or claims more than 1 GiB; the message is one line
    with the reason, to which the caller adds the name of the file. Raises OSError if it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                claimed = sum(info.file_size for info in archive.infolist())
            if claimed > _MAX_BYTES:
                raise ValueError(f"its arrays have {claimed} bytes; the limit is {_MAX_BYTES}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: _array(name, arrays[name]) for name in arrays.files}
        except BROKEN as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}".strip()
            raise ValueError((reason.splitlines() or ["it is damaged"])[0]) from error


def _array(name: str, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray):  # numpy returns other members as bytes
        raise ValueError(f"its entry {name!r:.60} is not an array")
    return value
