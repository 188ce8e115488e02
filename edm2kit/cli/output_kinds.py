"""What an output may replace: a file of its own kind, recognised by what it holds."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from PIL import PngImagePlugin

_START_BYTES = 1024
_MAX_CARD_BYTES = 1 << 26
_SHEET_NOTE = ("Software", "edm2kit sheet")  # in the PNG of every contact sheet
# the page of `edm2kit.experiments.pages` has no picture for the tab, which it says in a line of its own
_PAGE_LINE = b'<link rel="icon" href="data:,">'


def sheet_notes() -> PngImagePlugin.PngInfo:
    """The notes by which a contact sheet is recognised: `pnginfo` for PIL's save."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text(*_SHEET_NOTE)
    return notes


def _is_card(path: Path) -> bool:
    """A record that `--record` of calculate_metrics.py wrote; not any other JSON, which may be labels or settings."""
    if path.stat().st_size > _MAX_CARD_BYTES:
        return False
    try:
        record = json.loads(path.read_bytes())
    except RecursionError:
        return False
    return isinstance(record, dict) and isinstance(record.get("results"), dict)


def _is_npz_of(*members: str, without: str = "") -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
        return bool(names.intersection(members)) and without not in names

    return check


def _starts_with(*magic: bytes, at: int = 0, note: bytes = b"") -> Callable[[Path], bool]:
    """One of `magic` at the byte `at`, and `note` somewhere in the first kilobyte."""

    def check(path: Path) -> bool:
        with open(path, "rb") as file:
            start = file.read(_START_BYTES)
        return start[at:].startswith(magic) and note in start

    return check


def _is_reference(path: Path) -> bool:
    """An .npz, or a .pkl as this program writes it; not any other pickle, which could be a network."""
    written_here = _starts_with(b"\x80\x03}X\n\0\0\0num_images")
    return written_here(path) or _is_npz_of("header.npy", "mu.npy", without="arr_0.npy")(path)


OUTPUT_KINDS: dict[str, Callable[[Path], bool]] = {
    "contact sheet": _starts_with(b"\x89PNG", note="\0".join(_SHEET_NOTE).encode()),
    "record of scores": _is_card,
    "score card": _starts_with(b"# Score card"),
    "set of reference statistics": _is_reference,
    "reference batch for ADM": _is_npz_of("mu_s.npy"),
    "set of generated images": _is_npz_of("images.npy"),
    "page of this program": _starts_with(b"<!doctype html", note=_PAGE_LINE),
    "safetensors file": _starts_with(b"{", at=8),
}
