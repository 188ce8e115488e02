"""A pickle interpreter that imports nothing, calls nothing, and trusts no length in the file.

Python's own Unpickler builds whatever a file asks for unless `find_class` refuses, and its memo keeps every payload in
memory until the end. Snapshots need about forty opcodes; this module implements those, each with its checks. Names
stay names (Symbol), byte strings stay in the file (BytesInFile), and `Rules` decide what a name may do.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from edm2kit.torch_utils.pickles.values import Budget, ByteRange, BytesInFile, Symbol, UnsafePickleError

_MAX_TEXT_BYTES = 16 << 20
_MAX_NAME_BYTES = 200
_OPCODES = {opcode.code: opcode.name for opcode in pickletools.opcodes}


class Rules(Protocol):
    """What the names in a pickle may do; each method raises UnsafePickleError to refuse."""

    def find(self, name: str) -> Symbol: ...

    def call(self, symbol: Symbol, args: tuple) -> Any: ...

    def new(self, symbol: Symbol, args: tuple) -> Any: ...

    def build(self, target: Any, state: Any) -> None: ...

    def persistent(self, key: Any) -> Any: ...


class Machine:
    """Runs one pickle of `source`.

    Values are None, bool, int, float, str, list, tuple, dict, set, Symbol, BytesInFile, and what `rules` makes. Keys of
    dictionaries and members of sets are strings, so a file cannot choose the hash function.
    """

    actions: Mapping[bytes, tuple[Callable[..., None], Any]]  # by opcode, with an argument or _NOTHING; set below

    def __init__(self, source: ByteRange, rules: Rules, budget: Budget):
        self.source, self.rules, self.budget = source, rules, budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the pickle that begins here; the source then stands after its last byte."""
        if self.source.take(1) != b"\x80":
            raise UnsafePickleError("it does not start like a pickle (protocol 2 or later)")
        self.protocol()
        while (code := self.source.take(1)) != b".":
            self.budget.spend_opcode()
            if code not in self.actions:
                known = _OPCODES.get(code.decode("latin-1"))
                raise UnsafePickleError(f"no snapshot uses the opcode {known or code.hex()}")
            action, argument = self.actions[code]
            action(self) if argument is _NOTHING else action(self, argument)
        value = self.pop()
        if self.stack or self.marks:
            raise UnsafePickleError("it leaves values behind")
        return value

    def protocol(self) -> None:
        version = self.source.take(1)[0]
        if not 2 <= version <= 5:
            raise UnsafePickleError(f"it claims pickle protocol {version}; 2 to 5 are known")

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UnsafePickleError("it pops a value from an empty stack")
        return self.stack.pop()

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise UnsafePickleError("it ends a list that never started")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or type(self.stack[-1]) is not kind:
            raise UnsafePickleError(f"it fills something that is not a {kind.__name__}")
        return self.stack[-1]

    # plain values

    def empty(self, kind: type) -> None:
        self.push(kind())

    def number(self, layout: str) -> None:
        self.push(struct.unpack(layout, self.source.take(struct.calcsize(layout)))[0])

    def _length(self, width: int) -> int:
        return int.from_bytes(self.source.take(width), "little")

    def long(self) -> None:
        self.push(int.from_bytes(self.source.take(self._length(1)), "little", signed=True))

    def text(self, width: int) -> None:
        length = self._length(width)
        self.source.require(length)
        if length > _MAX_TEXT_BYTES:
            raise UnsafePickleError(f"it holds a text of {length} bytes")
        try:
            self.push(self.source.take(length).decode("utf-8"))
        except UnicodeDecodeError:
            raise UnsafePickleError("it holds a text that is not UTF-8") from None

    def byte_string(self, width: int) -> None:
        length = self._length(width)
        self.push(BytesInFile(self.source.file, self.source.skip(length), length))

    def frame(self) -> None:
        self.source.require(self._length(8))

    # containers

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def tuple_since_mark(self) -> None:
        self.push(tuple(self.since_mark()))

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def append_all(self) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self._fill([key, value])

    def set_items(self) -> None:
        self._fill(self.since_mark())

    def _fill(self, pairs: list[Any]) -> None:
        target = self.top(dict)
        if len(pairs) % 2 or any(type(key) is not str for key in pairs[::2]):
            raise UnsafePickleError("it has a dictionary key that is not a text")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def add_items(self) -> None:
        values = self.since_mark()
        if any(type(value) is not str for value in values):
            raise UnsafePickleError("it has a set that holds something other than texts")
        self.top(set).update(values)

    # the memo

    def put(self, width: int) -> None:
        self._remember(self._length(width))

    def _remember(self, key: int) -> None:
        value = self.pop()
        self.memo[key] = value
        self.push(value)

    def memoize(self) -> None:
        self._remember(len(self.memo))

    def get(self, width: int) -> None:
        key = self._length(width)
        if key not in self.memo:
            raise UnsafePickleError(f"it recalls memo entry {key}, which was never stored")
        self.push(self.memo[key])

    # names

    def global_name(self) -> None:
        self._find(self._line(), self._line())

    def _line(self) -> str:
        letters = bytearray()
        while (letter := self.source.take(1)) != b"\n":
            letters += letter
            if len(letters) > _MAX_NAME_BYTES:
                raise UnsafePickleError("it holds a name without an end")
        return letters.decode("latin-1")

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise UnsafePickleError("it has a global whose name is not a text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        # a dot in `name` means an attribute of an attribute: `a` + `b.c` must not be mistaken for `a.b` + `c`
        if "." in name:
            _refuse_name(f"{module}:{name}")
        self.push(self.rules.find(f"{module}.{name}"))

    def reduce(self) -> None:
        self._apply(self.rules.call)

    def new_object(self) -> None:
        self._apply(self.rules.new)

    def _apply(self, what: Callable[[Symbol, tuple], Any]) -> None:
        args, symbol = self.pop(), self.pop()
        if type(symbol) is not Symbol or type(args) is not tuple:
            raise UnsafePickleError("it calls something that is not the name of a constructor")
        self.push(what(symbol, args))

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        self.rules.build(target, state)
        self.push(target)

    def persistent(self) -> None:
        self.push(self.rules.persistent(self.pop()))


def _refuse_name(name: str) -> NoReturn:
    raise UnsafePickleError(f"it names {name[:_MAX_NAME_BYTES]!r}, which is not on the list of harmless names")


class NoNames:
    """Rules that refuse everything; the base class of rules that allow something."""

    def find(self, name: str) -> Symbol:
        _refuse_name(name)

    def call(self, symbol: Symbol, args: tuple) -> Any:
        raise UnsafePickleError(f"it calls {symbol.name}, which must not be called")

    def new(self, symbol: Symbol, args: tuple) -> Any:
        raise UnsafePickleError(f"it creates a {symbol.name}, which must not be created that way")

    def build(self, target: Any, state: Any) -> None:
        raise UnsafePickleError(f"it sets the state of a {type(target).__name__}")

    def persistent(self, key: Any) -> Any:
        raise UnsafePickleError("it refers to objects outside the file")


_NOTHING = object()
_ACTIONS: dict[bytes, tuple[Callable[..., None], Any]] = {
    b"\x80": (Machine.protocol, _NOTHING),
    b"\x95": (Machine.frame, _NOTHING),
    b"N": (Machine.push, None),
    b"\x88": (Machine.push, True),
    b"\x89": (Machine.push, False),
    b"K": (Machine.number, "<B"),
    b"M": (Machine.number, "<H"),
    b"J": (Machine.number, "<i"),
    b"G": (Machine.number, ">d"),
    b"\x8a": (Machine.long, _NOTHING),
    b"\x8c": (Machine.text, 1),
    b"X": (Machine.text, 4),
    b"C": (Machine.byte_string, 1),
    b"B": (Machine.byte_string, 4),
    b"\x8e": (Machine.byte_string, 8),
    b")": (Machine.empty, tuple),
    b"]": (Machine.empty, list),
    b"}": (Machine.empty, dict),
    b"\x8f": (Machine.empty, set),
    b"(": (Machine.mark, _NOTHING),
    b"t": (Machine.tuple_since_mark, _NOTHING),
    b"\x85": (Machine.tuple_of, 1),
    b"\x86": (Machine.tuple_of, 2),
    b"\x87": (Machine.tuple_of, 3),
    b"a": (Machine.append, _NOTHING),
    b"e": (Machine.append_all, _NOTHING),
    b"s": (Machine.set_item, _NOTHING),
    b"u": (Machine.set_items, _NOTHING),
    b"\x90": (Machine.add_items, _NOTHING),
    b"q": (Machine.put, 1),
    b"r": (Machine.put, 4),
    b"\x94": (Machine.memoize, _NOTHING),
    b"h": (Machine.get, 1),
    b"j": (Machine.get, 4),
    b"c": (Machine.global_name, _NOTHING),
    b"\x93": (Machine.stack_global, _NOTHING),
    b"R": (Machine.reduce, _NOTHING),
    b"\x81": (Machine.new_object, _NOTHING),
    b"b": (Machine.build, _NOTHING),
    b"Q": (Machine.persistent, _NOTHING),
}
Machine.actions = _ACTIONS


class Python2Machine(Machine):
    """A Machine for pickles of Python 2, whose texts were bytes: short ones become str, long ones BytesInFile."""

    def short_string(self) -> None:
        self.push(self.source.take(self._length(1)).decode("latin-1"))

    def long_string(self) -> None:
        length = int.from_bytes(self.source.take(4), "little", signed=True)
        if length < 0:
            raise UnsafePickleError(f"it holds a string of {length} bytes")
        self.push(BytesInFile(self.source.file, self.source.skip(length), length))


Python2Machine.actions = {
    **_ACTIONS,
    b"U": (Python2Machine.short_string, _NOTHING),
    b"T": (Python2Machine.long_string, _NOTHING),
}
