"""Arrays in files of numpy that claim what is not there, or hold what nobody should run; and parts to make more."""

import numpy as np


def member(description: str, data: bytes = b"") -> bytes:
    """A .npy file of format 1 whose header is `description`."""
    text = description.encode() + b"\n"
    return np.lib.format.MAGIC_PREFIX + b"\x01\x00" + len(text).to_bytes(2, "little") + text + data


def described(descr: str, shape: str, data: bytes = b"") -> bytes:
    return member(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}", data)


PAYLOAD = b"cos\nsystem\n(S'touch flag'\ntR."
HOSTILE = {
    "objects": (described("'|O'", "(1,)", PAYLOAD), "Object arrays cannot be loaded"),
    "terabytes": (described("'<f8'", "(1099511627776,)"), "MemoryError|too large"),
    "more than there is": (described("'<f8'", "(100000000,)"), "EOF"),
    "sizes that overflow": (described("'<f8'", "(1099511627776, 1099511627776)"), "too large|cannot reshape|too big"),
    "negative sizes": (described("'<f8'", "(-4,)", bytes(32)), "negative"),
    "a kind that is none": (described("'x'", "(4,)", bytes(32)), "not a valid dtype"),
    "brackets without end": (member("(" * 3000), "TokenError"),
    "signs without end": (member("-" * 9000 + "1"), "Error"),
    "no array": (b"text", "'mu' is not an array"),
    "code for a header": (member("__import__('os').system('touch flag')"), "malformed node"),
}
