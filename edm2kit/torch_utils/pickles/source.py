"""What a pickle is read from, and the inert values that have no type of their own in Python."""

from dataclasses import dataclass
from typing import BinaryIO


class UnsafePickleError(ValueError):
    """A pickle that is damaged, or that asks for something snapshots and statistics have no use for."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a global, such as `collections.OrderedDict`; nothing has been imported."""

    name: str


class Source:
    """The bytes [start, end) of a file, read from front to back; reading beyond the end is refused."""

    def __init__(self, file: BinaryIO, start: int, end: int):
        self.file, self.position, self.end = file, start, end

    def take(self, count: int) -> bytes:
        self.require(count)
        self.file.seek(self.position)
        self.position += count
        data = self.file.read(count)
        if len(data) != count:
            raise UnsafePickleError("the file was cut short while it was read")
        return data

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; returns where they begin."""
        self.require(count)
        self.position += count
        return self.position - count

    def require(self, count: int) -> None:
        left = self.end - self.position
        if count > left:
            raise UnsafePickleError(f"it is cut short: {count} more bytes are announced, {left} are left")


@dataclass(frozen=True, slots=True)
class Span:
    """A byte string of the pickle, still in the file."""

    file: BinaryIO
    offset: int
    length: int

    def source(self) -> Source:
        return Source(self.file, self.offset, self.offset + self.length)

    def read(self) -> bytes:
        return self.source().take(self.length)


class Budget:
    """What reading one file may cost: opcodes, nested pickles included, and bytes copied into arrays."""

    def __init__(self, opcodes: int, array_bytes: int):
        self.opcodes, self.array_bytes = opcodes, array_bytes

    def spend_opcode(self) -> None:
        self.opcodes -= 1
        if self.opcodes < 0:
            raise UnsafePickleError("it has far more parts than any snapshot")

    def spend_bytes(self, count: int) -> None:
        self.array_bytes -= count
        if self.array_bytes < 0:
            raise UnsafePickleError("its arrays claim more bytes than the file has")
