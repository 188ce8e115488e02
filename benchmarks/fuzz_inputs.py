"""Damaged inputs for a parser, and what the parser does with one: it reads it, or refuses it in one line."""

import copy
import io
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edm2kit.torch_utils.dist import printable

REFUSALS = (ValueError, OSError, click.UsageError)
# what a value in JSON or YAML may be changed to
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e300, float("nan"), float("inf"), "", "x", "auto",
    "\x1b[31m", "\ud800", "../x", "0", [], [[]], [1], [1, "x"], [None], {}, {"kind": "rgb"}, {"": 0},
)  # fmt: skip
ODD_BYTES = b"\0\1\t\n \"',-./0:9=[\\]e{}\x7f\x80\xc0\xfe\xff"
_LONG = 1 << 17  # bytes at most: nesting without end, numbers of thousands of digits


@dataclass(frozen=True)
class Change:
    """One change of an input: which one (`kind`), where (`place`, taken modulo the size), and to what (`value`)."""

    kind: int
    place: int
    value: int


def mutate(seed: bytes, changes: Sequence[Change]) -> bytes:
    """`seed` with bytes replaced, flipped, inserted, removed, repeated, moved, or cut off."""
    data = bytearray(seed)
    for change in changes:
        place = change.place % (len(data) + 1)
        size = 1 + change.value % 16
        odd = ODD_BYTES[change.value % len(ODD_BYTES)]
        match change.kind % 12:
            case 0 | 6 if place < len(data):
                data[place] ^= 1 << change.value % 8
            case 1 | 7 if place < len(data):
                data[place] = odd
            case 2:
                data[place:place] = bytes([odd]) * size
            case 3 | 8:
                del data[place : place + size]
            case 4 | 9:
                data[place:place] = data[place : place + size]
            case 5 if change.value % 4 == 0:
                del data[place:]
            case 10:  # a part of the input in another place
                start = change.value % (len(data) + 1)
                data[place:place] = data[start : start + 4 * size]
            case 11 if change.value % 16 == 0:
                data[place:place] = bytes([data[place - 1] if data else odd]) * (_LONG >> change.value // 16 % 17)
    return bytes(data)


def mutate_values(seed: Any, changes: Sequence[Change]) -> Any:
    """`seed`, as JSON holds it, with values replaced by odd ones, removed, or put elsewhere."""
    root = {"": json.loads(json.dumps(seed))}
    for change in changes:
        places = list(_places(root))
        parent, key = places[change.place % len(places)]
        if change.kind % 4 == 0 and isinstance(parent, dict) and key:
            del parent[key]
        elif change.kind % 4 == 1:
            other, name = places[change.value % len(places)]
            parent[key] = json.loads(json.dumps(other[name]))
        else:
            parent[key] = copy.deepcopy(ODD_VALUES[change.value % len(ODD_VALUES)])
    return root[""]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside nested lists and mappings."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from _places(node[key])


@dataclass(frozen=True)
class Parser:
    """A parser, and how inputs for it are made.

    `seeds(folder)` gives valid inputs: bytes, or values that JSON can hold. `parse(data, folder)` reads one; a parser
    of values gets their JSON text.
    """

    seeds: Callable[[Path], list[Any]]
    parse: Callable[[bytes, Path], object]

    def input_of(self, seed: Any, changes: Sequence[Change]) -> bytes:
        """An input: the seed with these changes."""
        if isinstance(seed, bytes):
            return mutate(seed, changes)
        return text_of(mutate_values(seed, changes))


def outcome(parser: Parser, data: bytes, folder: Path) -> str:
    """What a parser does with an input: "read" or "refused".

    Raises whatever else the parser raises, and AssertionError for a refusal of several lines. (A long line is cut when
    it is printed, by `edm2kit.torch_utils.dist.one_line`.)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.parse(data, folder)
    except REFUSALS as error:
        message = printable(error.format_message() if isinstance(error, click.UsageError) else str(error))
        assert message, "a refusal without a reason"
        assert "\n" not in message.strip(), f"a refusal in several lines: {message!r:.200}"
        return "refused"
    return "read"


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """A `parse` that writes the input to a file of this name."""

    def parse(data: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return parse


def text_of(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def values_and_text(*values: Any) -> Callable[[Path], list[Any]]:
    """Seeds of JSON: `values`, in which values change, and their text, in which bytes change."""
    return lambda folder: [*values, *map(text_of, values)]


def zip_of(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()
