"""Writing numpy arrays as a pickle that every version of numpy reads, without pickling any object.

`pickle` would name functions by the modules of the installed numpy, which older ones do not have. Here the file is put
together from the few instructions that it needs, so that it depends on the arrays alone, to the last byte.
"""

import struct
from collections.abc import Mapping
from typing import IO

import numpy as np

Value = int | np.ndarray | Mapping[str, "Value"]

_PROTOCOL = b"\x80\x03"
_STOP = b"."


def dump_arrays(content: Mapping[str, Value], file: IO[bytes]) -> None:
    """Write a pickle (protocol 3) of a dictionary of ints, arrays and dictionaries of them.

    Arrays are written as little-endian float64. Raises TypeError for anything else.

    Example: `dump_arrays({"num_images": 9, "fid": {"mu": mean, "sigma": covariance}}, file)`.
    """
    file.write(_PROTOCOL)
    _write(content, file)
    file.write(_STOP)


def _write(value: Value, file: IO[bytes]) -> None:
    if isinstance(value, Mapping):
        file.write(b"}")  # EMPTY_DICT
        for key, item in value.items():
            file.write(_text(key))
            _write(item, file)
            file.write(b"s")  # SETITEM
    elif isinstance(value, np.ndarray):
        file.write(_array(value))
    elif isinstance(value, int) and not isinstance(value, bool):
        file.write(_number(value))
    else:
        raise TypeError(f"a {type(value).__name__} cannot be written; expected ints, arrays and dictionaries of them")


def _array(array: np.ndarray) -> bytes:
    """What numpy's own pickles say of an array: an empty one is made, and then given shape, type and bytes."""
    data = np.ascontiguousarray(array, dtype="<f8")
    empty = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + _number(0) + b"\x85" + _bytes(b"b")
    dtype = b"cnumpy\ndtype\n" + _text("f8") + b"\x89\x88\x87R"  # dtype("f8", False, True)
    dtype += b"(" + _number(3) + _text("<") + b"NNN" + _number(-1) + _number(-1) + _number(0) + b"tb"
    shape = b"(" + b"".join(_number(size) for size in array.shape) + b"t"
    state = b"(" + _number(1) + shape + dtype + b"\x89" + _bytes(data.tobytes()) + b"t"
    return empty + b"\x87R" + state + b"b"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _bytes(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data  # LONG1
