"""Checks of what comes from files and of what may become one: types of values, names, and kinds of outputs."""

import math
import os
import re
import types
import typing
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_INT = 1 << 62
_MAX_NODES = 10_000


def check_type(value: Any, hint: Any, name: str) -> None:
    """Raise ValueError, starting with `name`, unless `value` is of the type `hint`.

    A hint is int, float, bool, str, None, Any, a mapping, a tuple or sequence of these, or a union. A float may be
    written as an integer; numbers must be finite.

    Example: `check_type(values["nimg"], int, "nimg")`
    """
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_text(hint)}; got {short(value)}")


def check_fields(values: Mapping[str, Any], kind: type) -> None:
    """Raise ValueError, naming the field, unless `values` fit the type hints of the dataclass `kind`.

    A field that is missing is left to the dataclass.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown field {name!r:.60}; known: {', '.join(hints)}")
        check_type(value, hints[name], name)


def short(value: Any) -> str:
    """A value for a message, in at most 60 characters."""
    if isinstance(value, int) and abs(value) >= _MAX_INT:
        return f"a number of {value.bit_length()} bits"  # its digits may take minutes
    text = repr(value) if isinstance(value, str | int | float | None) else f"{type(value).__name__} {_start(value)}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def count_nodes(value: Any) -> int:
    """The number of values in nested lists and mappings, counting shared ones each time, up to 10,000."""
    count, waiting = 0, [value]
    while waiting and count < _MAX_NODES:
        node = waiting.pop()
        count += 1
        if isinstance(node, Mapping):
            waiting.extend(node.values())
        elif isinstance(node, list | tuple):
            waiting.extend(node[:_MAX_NODES])
    return count


def _start(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(short(item) for item in value[:3]) + (", ...]" if len(value) > 3 else "]")
    return "" if isinstance(value, Mapping) else str(type(value))


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if hint in (None, types.NoneType):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_INT
    if origin is tuple and Ellipsis not in parts:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return isinstance(value, hint)


def _is_finite(value: float) -> bool:
    return abs(value) < _MAX_INT if isinstance(value, int) else math.isfinite(value)


def _text(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_text(part) for part in parts)
    if hint is types.NoneType:
        return "null"
    if origin in (tuple, list, Sequence):
        count = "" if Ellipsis in parts or origin is not tuple else f"{len(parts)} "
        return f"a list of {count}{_text(parts[0])}"
    if origin is not None:
        return "a mapping"
    return getattr(hint, "__name__", str(hint))


def _is_json(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1) in (b"{", b"[")


def _is_npz_of(*members: str) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        with zipfile.ZipFile(path) as archive:
            return bool(set(members) & set(archive.namelist()))

    return check


def _starts_with(magic: bytes) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic

    return check


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


# what an output may replace: a file of its own kind
OUTPUT_KINDS: dict[str, Callable[[Path], bool]] = {
    "PNG image": _starts_with(b"\x89PNG"),
    "JSON record": _is_json,
    "set of reference statistics": _is_npz_of("header.npy", "mu.npy"),
    "set of generated images": _is_npz_of("images.npy"),
    "safetensors file": _is_safetensors,
}


def check_output(path: Path, kind: str) -> None:
    """Raise ValueError if `path` cannot be written, or holds anything but a file of `kind`, a key of OUTPUT_KINDS.

    Call it before the work: a mistake in a name should neither cost a file nor hours.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if path.exists() and os.path.getsize(path):
        try:
            fits = OUTPUT_KINDS[kind](path)
        except (OSError, ValueError, zipfile.BadZipFile):
            fits = False
        if not fits:
            raise ValueError(f"{path} exists and is not a {kind}; delete it, or choose another name")
    check_writable(path.absolute().parent)


def check_writable(folder: Path) -> None:
    """Raise ValueError if files cannot be written to `folder`, or it cannot be created."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be created: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} is not writable; choose another folder, or change its permissions")


def check_name(name: str, where: object) -> None:
    """Raise ValueError unless `name`, which comes from the file `where`, stays below the folder it is appended to.

    Absolute names, drives, "..", and characters that no file name needs are refused; parts are separated by "/".
    """
    parts = name.split("/")
    inside = all(part not in ("", ".", "..") for part in parts) and ":" not in parts[0][1:2]
    if not inside or "\0" in name or (os.name == "nt" and re.search(r'[\\:*?"<>|]', name)):
        raise ValueError(
            f"{where}: contains the name {name!r:.200}, which is not a path below a folder; nothing is written. Make "
            "the archive again with relative names"
        )
