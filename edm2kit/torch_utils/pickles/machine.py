"""A pickle interpreter that imports nothing, calls nothing and believes no length.

Python's own Unpickler builds whatever a file asks for and leaves it to `find_class` to say no; its memo also keeps
every payload alive until the end. Snapshots need some forty opcodes, so here they are, each with its checks. Names
stay names (Symbol), byte strings stay where they are in the file (Span), and what a name may do is for `Rules`.
"""

import pickletools
import struct
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from edm2kit.torch_utils.pickles.source import Budget, Source, Span, Symbol, UnsafePickleError

_MAX_TEXT_BYTES = 16 << 20
_MAX_NAME_BYTES = 200


class Rules(Protocol):
    """What the names in a pickle may do; each method raises UnsafePickleError to refuse."""

    def find(self, name: str) -> Symbol: ...

    def call(self, symbol: Symbol, args: tuple) -> Any: ...

    def new(self, symbol: Symbol, args: tuple) -> Any: ...

    def build(self, target: Any, state: Any) -> None: ...

    def persistent(self, key: Any) -> Any: ...


class Machine:
    """Runs one pickle of `source`; values are None, bool, int, float, str, list, tuple, dict, set, Symbol, Span
    and what `rules` makes. Dictionaries are keyed by strings and sets hold strings, so that no hash is theirs."""

    def __init__(self, source: Source, rules: Rules, budget: Budget):
        self.source, self.rules, self.budget = source, rules, budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the pickle that begins here; the source is left behind its last byte."""
        if self.source.take(1) != b"\x80":
            raise UnsafePickleError("it does not begin like a pickle (protocol 2 or later)")
        self._protocol()
        while (code := self.source.take(1)) != b".":
            self.budget.spend_opcode()
            if code not in _ACTIONS:
                known = pickletools.code2op.get(code.decode("latin-1"))
                raise UnsafePickleError(f"no snapshot uses the opcode {known.name if known else code.hex()}")
            action, argument = _ACTIONS[code]
            action(self) if argument is _NOTHING else action(self, argument)
        value = self._pop()
        if self.stack or self.marks:
            raise UnsafePickleError("it leaves values behind")
        return value

    def _protocol(self) -> None:
        version = self.source.take(1)[0]
        if not 2 <= version <= 5:
            raise UnsafePickleError(f"it claims pickle protocol {version}; 2 to 5 are known")

    # the stack

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UnsafePickleError("it takes a value where there is none")
        return self.stack.pop()

    def _mark(self) -> None:
        self.marks.append(len(self.stack))

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise UnsafePickleError("it ends a list that never began")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _top(self, kind: type) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or type(self.stack[-1]) is not kind:
            raise UnsafePickleError(f"it fills something that is not a {kind.__name__}")
        return self.stack[-1]

    # plain values

    def _empty(self, kind: type) -> None:
        self._push(kind())

    def _number(self, layout: str) -> None:
        self._push(struct.unpack(layout, self.source.take(struct.calcsize(layout)))[0])

    def _length(self, width: int) -> int:
        return int.from_bytes(self.source.take(width), "little")

    def _long(self) -> None:
        self._push(int.from_bytes(self.source.take(self._length(1)), "little", signed=True))

    def _text(self, width: int) -> None:
        length = self._length(width)
        self.source.require(length)
        if length > _MAX_TEXT_BYTES:
            raise UnsafePickleError(f"it holds a text of {length} bytes")
        try:
            self._push(self.source.take(length).decode("utf-8"))
        except UnicodeDecodeError:
            raise UnsafePickleError("it holds a text that is not UTF-8") from None

    def _bytes(self, width: int) -> None:
        length = self._length(width)
        self._push(Span(self.source.file, self.source.skip(length), length))

    def _frame(self) -> None:
        self.source.require(self._length(8))

    # containers

    def _tuple(self, count: int) -> None:
        self._push(tuple([self._pop() for _ in range(count)][::-1]))

    def _tuple_since_mark(self) -> None:
        self._push(tuple(self._since_mark()))

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _append_all(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._fill([key, value])

    def _set_items(self) -> None:
        self._fill(self._since_mark())

    def _fill(self, pairs: list[Any]) -> None:
        target = self._top(dict)
        if len(pairs) % 2 or any(type(key) is not str for key in pairs[::2]):
            raise UnsafePickleError("it has a dictionary key that is not a text")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _add_items(self) -> None:
        values = self._since_mark()
        if any(type(value) is not str for value in values):
            raise UnsafePickleError("it has a set of something else than texts")
        self._top(set).update(values)

    # the memo

    def _put(self, width: int) -> None:
        self._remember(self._length(width))

    def _remember(self, key: int) -> None:
        value = self._pop()
        self.memo[key] = value
        self._push(value)

    def _memoize(self) -> None:
        self._remember(len(self.memo))

    def _get(self, width: int) -> None:
        key = self._length(width)
        if key not in self.memo:
            raise UnsafePickleError(f"it recalls memo entry {key}, which was never stored")
        self._push(self.memo[key])

    # names

    def _global(self) -> None:
        self._find(self._line(), self._line())

    def _line(self) -> str:
        letters = bytearray()
        while (letter := self.source.take(1)) != b"\n":
            letters += letter
            if len(letters) > _MAX_NAME_BYTES:
                raise UnsafePickleError("it holds an endless name")
        return letters.decode("latin-1")

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise UnsafePickleError("it has a global whose name is not a text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        # dots in `name` would be attributes of attributes: `a` + `b.c` must not pass for `a.b` + `c`
        if "." in name:
            _refuse_name(f"{module}:{name}")
        self._push(self.rules.find(f"{module}.{name}"))

    def _reduce(self) -> None:
        self._apply(self.rules.call)

    def _new_object(self) -> None:
        self._apply(self.rules.new)

    def _apply(self, what: Callable[[Symbol, tuple], Any]) -> None:
        args, symbol = self._pop(), self._pop()
        if type(symbol) is not Symbol or type(args) is not tuple:
            raise UnsafePickleError("it calls something that is not the name of a constructor")
        self._push(what(symbol, args))

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        self.rules.build(target, state)
        self._push(target)

    def _persistent(self) -> None:
        self._push(self.rules.persistent(self._pop()))


def _refuse_name(name: str) -> NoReturn:
    raise UnsafePickleError(f"it names {name[:_MAX_NAME_BYTES]!r}, which is not on the list of harmless names")


class NoNames:
    """Rules that refuse everything; the base of rules that allow something."""

    def find(self, name: str) -> Symbol:
        _refuse_name(name)

    def call(self, symbol: Symbol, args: tuple) -> Any:
        raise UnsafePickleError(f"it calls {symbol.name}, which is not to be called")

    def new(self, symbol: Symbol, args: tuple) -> Any:
        raise UnsafePickleError(f"it creates a {symbol.name}, which is not to be created so")

    def build(self, target: Any, state: Any) -> None:
        raise UnsafePickleError(f"it sets the state of a {type(target).__name__}")

    def persistent(self, key: Any) -> Any:
        raise UnsafePickleError("it refers to objects outside of the file")


_NOTHING = object()
_ACTIONS: dict[bytes, tuple[Callable[..., None], Any]] = {
    b"\x80": (Machine._protocol, _NOTHING),
    b"\x95": (Machine._frame, _NOTHING),
    b"N": (Machine._push, None),
    b"\x88": (Machine._push, True),
    b"\x89": (Machine._push, False),
    b"K": (Machine._number, "<B"),
    b"M": (Machine._number, "<H"),
    b"J": (Machine._number, "<i"),
    b"G": (Machine._number, ">d"),
    b"\x8a": (Machine._long, _NOTHING),
    b"\x8c": (Machine._text, 1),
    b"X": (Machine._text, 4),
    b"C": (Machine._bytes, 1),
    b"B": (Machine._bytes, 4),
    b"\x8e": (Machine._bytes, 8),
    b")": (Machine._empty, tuple),
    b"]": (Machine._empty, list),
    b"}": (Machine._empty, dict),
    b"\x8f": (Machine._empty, set),
    b"(": (Machine._mark, _NOTHING),
    b"t": (Machine._tuple_since_mark, _NOTHING),
    b"\x85": (Machine._tuple, 1),
    b"\x86": (Machine._tuple, 2),
    b"\x87": (Machine._tuple, 3),
    b"a": (Machine._append, _NOTHING),
    b"e": (Machine._append_all, _NOTHING),
    b"s": (Machine._set_item, _NOTHING),
    b"u": (Machine._set_items, _NOTHING),
    b"\x90": (Machine._add_items, _NOTHING),
    b"q": (Machine._put, 1),
    b"r": (Machine._put, 4),
    b"\x94": (Machine._memoize, _NOTHING),
    b"h": (Machine._get, 1),
    b"j": (Machine._get, 4),
    b"c": (Machine._global, _NOTHING),
    b"\x93": (Machine._stack_global, _NOTHING),
    b"R": (Machine._reduce, _NOTHING),
    b"\x81": (Machine._new_object, _NOTHING),
    b"b": (Machine._build, _NOTHING),
    b"Q": (Machine._persistent, _NOTHING),
}
