"""A rank of the soak: `edm2kit-train`, which also records how much memory its allocators have in use.

The memory that a process holds can grow while nothing leaks: freed memory is kept, and new blocks are placed on pages
that were not touched before. If what is in use grows as well, something is never freed.
"""

import ctypes
import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path

LOOKS = 20  # per record, of which the least counts: in the middle of a step, its activations are in use as well


class _Mallinfo2(ctypes.Structure):
    """Of malloc.h (glibc 2.33 or newer). `hblkhd` bytes are in use in mapped blocks, `uordblks` in all others."""

    _fields_ = [(f"other{k}", ctypes.c_size_t) for k in range(4)]
    _fields_ += [("hblkhd", ctypes.c_size_t), ("usmblks", ctypes.c_size_t), ("fsmblks", ctypes.c_size_t)]
    _fields_ += [("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def in_use() -> tuple[int, int] | None:
    """Bytes in use by malloc, and the number of small blocks in use by Python; None without glibc 2.33."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd, sys.getallocatedblocks()


def in_use_path(folder: Path, rank: int) -> Path:
    """The file in which a rank records what it has in use, a JSON object per line."""
    return folder / f"in-use-{rank}.jsonl"


def record(path: Path, every_sec: float) -> None:
    """Write the least of `LOOKS` looks at the allocators every `every_sec`, for ever."""
    with open(path, "w", encoding="utf-8") as file:
        while in_use() is not None:
            looks = []
            for _ in range(LOOKS):
                time.sleep(every_sec / LOOKS)
                looks.append(in_use() or (0, 0))
            malloc_bytes, python_blocks = (min(values) for values in zip(*looks, strict=True))
            line = {"malloc_mb": malloc_bytes / 1e6, "python_blocks": python_blocks}
            file.write(json.dumps({"monotonic_sec": time.monotonic(), **line}) + "\n")
            file.flush()  # the process ends without closing its files


def main() -> None:
    """Record, then train; arguments: folder of the records, seconds between two of them, those of edm2kit-train."""
    folder, every_sec = Path(sys.argv[1]), float(sys.argv[2])
    del sys.argv[1:3]
    path = in_use_path(folder, int(os.environ["RANK"]))
    threading.Thread(target=record, args=(path, every_sec), name="in use", daemon=True).start()
    runpy.run_module("edm2kit.cli.train", run_name="__main__", alter_sys=True)
