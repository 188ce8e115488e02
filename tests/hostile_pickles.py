"""Pickles that nobody should load, made by hand; `{flag}` in their payload is the file they would create."""

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
    steps = b"".join(b"](h%ch%ceq%c0" % (k, k, k + 1) for k in range(levels))
    return b"]q\x000" + steps + b"h%c" % levels


def doubled_tuples(levels: int) -> bytes:
    """The same of tuples, whose hash follows every way."""
    return b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(levels))


# Each does something a snapshot has no use for; the payload, where there is one, would create the flag.
MISUSES: dict[str, Callable[[str], bytes]] = {
    "subprocess by NEWOBJ": lambda f: whole(
        name("subprocess", "Popen") + tup(MARK + text("touch") + text(f) + b"l") + b"\x81"
    ),
    "NEWOBJ_EX": lambda f: whole(name("subprocess", "Popen") + tup(MARK + text("touch") + text(f) + b"l") + b"}\x92"),
    "nested zip that executes": lambda f: whole(nested(saved(f))),
    "nested old torch.save that executes": lambda f: whole(nested(saved(f, _use_new_zipfile_serialization=False))),
    "nested tar that executes": lambda f: whole(nested(old_tar(f))),
    "nested plain pickle": lambda f: whole(nested(whole(call(name("os", "system"), touch(f))))),
    "nested zip bomb": lambda f: whole(nested(zip_bomb())),
    "nested text": lambda f: whole(call(name("torch.storage", "_load_from_bytes"), text("no bytes"))),
    "nested nothing": lambda f: whole(nested(b"")),
    "module_src of another layout": lambda f: whole(persistent(b"}", f"open({f!r}, 'w')", kind="module")),
    "a layout of the future": lambda f: whole(persistent(b"}", f"open({f!r}, 'w')", version=7)),
    "torch.load": lambda f: whole(call(name("torch", "load"), text(f))),
    "numpy scalar": lambda f: whole(call(name("numpy.core.multiarray", "scalar"), dtype("f8"), blob(bytes(8)))),
    "ndarray called": lambda f: whole(call(name("numpy", "ndarray"), tup(long_number(1 << 40)))),
    "EasyDict with arguments": lambda f: whole(call(name("dnnlib.util", "EasyDict"), b"]")),
    "dotted name of an allowed one": lambda f: whole(stack_name("torch", "storage._load_from_bytes")),
    "attribute of an allowed name": lambda f: whole(stack_name("collections", "OrderedDict.fromkeys")),
    "a text called": lambda f: whole(call(text("os.system"), touch(f))),
    "a record called": lambda f: whole(call(persistent(b"}"), touch(f))),
    "arguments that are a list": lambda f: whole(name("collections", "OrderedDict") + b"]R"),
    "a global named by a number": lambda f: whole(number(1) + number(2) + b"\x93"),
    "an endless name": lambda f: PROTO + b"c" + b"a" * 5000,
    "BUILD of a dict": lambda f: whole(b"}" + b"}" + MARK + text("__class__") + text("x") + b"u" + BUILD),
    "BUILD of a global": lambda f: whole(name("collections", "OrderedDict") + b"}" + BUILD),
    "BUILD of a record again": lambda f: whole(persistent(b"}") + b"}" + MARK + text("__setstate__") + b"Nu" + BUILD),
    "BUILD with a tuple": lambda f: whole(
        name("torch.nn.modules.container", "ModuleDict") + b")\x81" + b"N}\x86" + BUILD
    ),
    "persistent id": lambda f: whole(text("x") + b"Q"),
    "persistent id by name": lambda f: PROTO + b"Px\n.",
    "extension 1": lambda f: whole(b"\x82\x01"),
    "extension 2": lambda f: whole(b"\x83\x01\x00"),
    "extension 4": lambda f: whole(b"\x84\x01\x00\x00\x00"),
    "bytearray": lambda f: whole(b"\x96" + struct.pack("<Q", 1 << 40)),
    "buffer from outside": lambda f: whole(b"\x97"),
    "text of 4 GB": lambda f: PROTO + b"X\xff\xff\xff\xff",
    "bytes of an exabyte": lambda f: PROTO + b"\x8e" + struct.pack("<Q", 1 << 60),
    "frame of an exabyte": lambda f: PROTO + b"\x95" + struct.pack("<Q", 1 << 60),
    "number of 2 GB": lambda f: PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1),
    "tensor of a terabyte by stride 0": lambda f: whole(tensor(number(0), tup(long_number(1 << 40)), tup(number(0)))),
    "tensor beyond its storage": lambda f: whole(tensor(number(1), tup(number(4)), tup(number(1)))),
    "tensor before its storage": lambda f: whole(tensor(number(-1), tup(number(4)), tup(number(1)))),
    "tensor with negative sizes": lambda f: whole(tensor(number(0), tup(number(-4), number(-1)), tup(b"K\x01K\x01"))),
    "tensor of another rank than its strides": lambda f: whole(tensor(number(0), tup(number(2)), tup())),
    "tensor on a text": lambda f: whole(tensor(number(0), tup(number(2)), tup(number(1)), text("storage"))),
    "storage of a terabyte": lambda f: whole(nested(storage_bytes(4, 1 << 40))),
    "storage of too little": lambda f: whole(nested(storage_bytes(4, 3))),
    "two storages": lambda f: whole(nested(storage_bytes() + storage_bytes())),
    "parameter of a dict": lambda f: whole(call(name("torch._utils", "_rebuild_parameter"), b"}", b"\x88", b"}")),
    "parameter with hooks": lambda f: whole(
        call(
            name("torch._utils", "_rebuild_parameter"),
            tensor(number(0), tup(number(4)), tup(number(1))),
            b"\x88",
            b"}" + text("hook") + name("collections", "OrderedDict") + b"s",
        )
    ),
    "many tensors on one storage": lambda f: whole(
        nested(storage_bytes(1000)) + b"q\x000",
        MARK,
        *[tensor(number(0), tup(number(1000)), tup(number(1)), b"h\x00") for _ in range(50)],
        b"t",
    ),
    "array of objects": lambda f: whole(
        array(tup(number(1)), dtype("O8"), MARK + call(name("os", "system"), touch(f)) + b"l")
    ),
    "array of objects in bytes": lambda f: whole(array(tup(number(1)), dtype("O8"), blob(bytes(8)))),
    "array with fields": lambda f: whole(
        dtype("V8", tup(number(3), text("|"), b"N", tup(text("a")), b"}", number(8), number(1), number(16)))
    ),
    "array of a terabyte": lambda f: whole(array(tup(long_number(1 << 40)), dtype("f8"), blob(bytes(8)))),
    "array of negative size": lambda f: whole(array(tup(number(-1), number(-1)), dtype("f8"), blob(bytes(8)))),
    "array of a subclass": lambda f: whole(
        call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("collections", "OrderedDict"),
            tup(number(0)),
            blob(b"b"),
        )
    ),
    "array without contents": lambda f: whole(
        b"]"
        + call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), tup(number(0)), blob(b"b"))
        + b"a"
    ),
    "many arrays of the same bytes": lambda f: whole(
        blob(bytes(8000)) + b"q\x000", MARK, *[array(tup(number(1000)), dtype("f8"), b"h\x00") for _ in range(50)], b"t"
    ),
    "memo never stored": lambda f: whole(b"h\x07"),
    "memo of nothing": lambda f: PROTO + b"\x94.",
    "taking from an empty stack": lambda f: PROTO + b"R.",
    "taking across a mark": lambda f: PROTO + b"N(\x85.",
    "a mark too few": lambda f: PROTO + b"Nt.",
    "values left behind": lambda f: PROTO + b"NN.",
    "list that contains itself": lambda f: whole(b"]q\x00h\x00a"),
    "record that contains itself": lambda f: whole(b"}q\x00" + text("me") + persistent(b"h\x00") + b"s"),
    "a billion laughs": lambda f: whole(doubled_lists(60)),
    "deep lists": lambda f: whole(b"]" * 20_000 + b"a" * 19_999),
    "deep tuples": lambda f: whole(b")" + b"\x85" * 20_000),
    "deep tuples as a key": lambda f: whole(b"}", doubled_tuples(60), b"Ns"),
    "deep tuples in a set": lambda f: whole(b"\x8f(", doubled_tuples(60), b"\x90"),
    "keys that are numbers": lambda f: whole(b"}(K\x01Nu"),
    "a key without a value": lambda f: whole(b"}(", text("key"), b"u"),
    "text that is not UTF-8": lambda f: PROTO + b"\x8c\x01\xff.",
    "protocol of the future": lambda f: b"\x80\x09N.",
    "empty": lambda f: b"",
    "a text file": lambda f: b"import os\nos.system('touch x')\n",
    "a web page": lambda f: b"<!DOCTYPE html><html></html>",
    "a zip archive": lambda f: zip_bomb(),
    "a torch checkpoint": saved,
    "zeros": lambda f: bytes(1000),
}
