"""Pickles that ask for what no snapshot needs: nested payloads, claims beyond the file, shapes that never end."""

import struct
from collections.abc import Callable

from tests.support.hostile_pickles import (
    BUILD,
    MARK,
    PROTO,
    array,
    blob,
    call,
    doubled_lists,
    doubled_tuples,
    dtype,
    long_number,
    name,
    nested,
    number,
    old_tar,
    persistent,
    saved,
    stack_name,
    storage_bytes,
    tensor,
    text,
    touch,
    tup,
    whole,
    zip_bomb,
)

# Each does something a snapshot has no use for: what the refusal says, and the bytes. Payloads would create the flag.
MISUSES: dict[str, tuple[str, Callable[[str], bytes]]] = {
    "subprocess by NEWOBJ": (
        "it names 'subprocess.Popen'",
        lambda f: whole(name("subprocess", "Popen") + tup(MARK + text("touch") + text(f) + b"l") + b"\x81"),
    ),
    "NEWOBJ_EX": (
        "it names 'subprocess.Popen'",
        lambda f: whole(name("subprocess", "Popen") + tup(MARK + text("touch") + text(f) + b"l") + b"}\x92"),
    ),
    "nested zip that executes": (
        "it does not start like a pickle (protocol 2 or later)",
        lambda f: whole(nested(saved(f))),
    ),
    "nested old torch.save that executes": (
        "it names 'posix.system'",
        lambda f: whole(nested(saved(f, _use_new_zipfile_serialization=False))),
    ),
    "nested tar that executes": (
        "it does not start like a pickle (protocol 2 or later)",
        lambda f: whole(nested(old_tar(f))),
    ),
    "nested plain pickle": (
        "it names 'os.system'",
        lambda f: whole(nested(whole(call(name("os", "system"), touch(f))))),
    ),
    "nested zip bomb": ("it does not start like a pickle (protocol 2 or later)", lambda f: whole(nested(zip_bomb()))),
    "nested text": (
        "it loads a tensor from something that is not bytes",
        lambda f: whole(call(name("torch.storage", "_load_from_bytes"), text("no bytes"))),
    ),
    "nested nothing": ("it is truncated", lambda f: whole(nested(b""))),
    "module_src of another layout": (
        "it holds an object whose layout is not that of published snapshots",
        lambda f: whole(persistent(b"}", f"open({f!r}, 'w')", kind="module")),
    ),
    "a layout of the future": (
        "it holds an object whose layout is not that of published snapshots",
        lambda f: whole(persistent(b"}", f"open({f!r}, 'w')", version=7)),
    ),
    "torch.load": ("it names 'torch.load'", lambda f: whole(call(name("torch", "load"), text(f)))),
    "numpy scalar": (
        "it names 'numpy.core.multiarray.scalar'",
        lambda f: whole(call(name("numpy.core.multiarray", "scalar"), dtype("f8"), blob(bytes(8)))),
    ),
    "ndarray called": (
        "it calls numpy.ndarray, which must not be called",
        lambda f: whole(call(name("numpy", "ndarray"), tup(long_number(1 << 40)))),
    ),
    "EasyDict with arguments": (
        "it calls dnnlib.util.EasyDict, which must not be called",
        lambda f: whole(call(name("dnnlib.util", "EasyDict"), b"]")),
    ),
    "dotted name of an allowed one": (
        "it names 'torch:storage._load_from_bytes'",
        lambda f: whole(stack_name("torch", "storage._load_from_bytes")),
    ),
    "attribute of an allowed name": (
        "it names 'collections:OrderedDict.fromkeys'",
        lambda f: whole(stack_name("collections", "OrderedDict.fromkeys")),
    ),
    "a text called": (
        "it calls something that is not the name of a constructor",
        lambda f: whole(call(text("os.system"), touch(f))),
    ),
    "a record called": (
        "it calls something that is not the name of a constructor",
        lambda f: whole(call(persistent(b"}"), touch(f))),
    ),
    "arguments that are a list": (
        "it calls something that is not the name of a constructor",
        lambda f: whole(name("collections", "OrderedDict") + b"]R"),
    ),
    "a global named by a number": (
        "it has a global whose name is not a text",
        lambda f: whole(number(1) + number(2) + b"\x93"),
    ),
    "an endless name": ("it holds a name without an end", lambda f: PROTO + b"c" + b"a" * 5000),
    "BUILD of a dict": (
        "it sets the state of a dict",
        lambda f: whole(b"}" + b"}" + MARK + text("__class__") + text("x") + b"u" + BUILD),
    ),
    "BUILD of a global": (
        "it sets the state of a Symbol",
        lambda f: whole(name("collections", "OrderedDict") + b"}" + BUILD),
    ),
    "BUILD of a record again": (
        "it sets the state of a Record",
        lambda f: whole(persistent(b"}") + b"}" + MARK + text("__setstate__") + b"Nu" + BUILD),
    ),
    "BUILD with a tuple": (
        "it sets the state of a Record",
        lambda f: whole(name("torch.nn.modules.container", "ModuleDict") + b")\x81" + b"N}\x86" + BUILD),
    ),
    "persistent id": ("it refers to objects outside the file", lambda f: whole(text("x") + b"Q")),
    "persistent id by name": ("no snapshot uses the opcode PERSID", lambda f: PROTO + b"Px\n."),
    "extension 1": ("no snapshot uses the opcode EXT1", lambda f: whole(b"\x82\x01")),
    "extension 2": ("no snapshot uses the opcode EXT2", lambda f: whole(b"\x83\x01\x00")),
    "extension 4": ("no snapshot uses the opcode EXT4", lambda f: whole(b"\x84\x01\x00\x00\x00")),
    "bytearray": ("no snapshot uses the opcode BYTEARRAY8", lambda f: whole(b"\x96" + struct.pack("<Q", 1 << 40))),
    "buffer from outside": ("no snapshot uses the opcode NEXT_BUFFER", lambda f: whole(b"\x97")),
    "text of 4 GB": ("4294967295", lambda f: PROTO + b"X\xff\xff\xff\xff"),
    "bytes of an exabyte": ("1152921504606846976", lambda f: PROTO + b"\x8e" + struct.pack("<Q", 1 << 60)),
    "frame of an exabyte": ("1152921504606846976", lambda f: PROTO + b"\x95" + struct.pack("<Q", 1 << 60)),
    "number of 2 GB": ("no snapshot uses the opcode LONG4", lambda f: PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "tensor of a terabyte by stride 0": (
        "a tensor of shape [1099511627776] reaches beyond its 4 numbers",
        lambda f: whole(tensor(number(0), tup(long_number(1 << 40)), tup(number(0)))),
    ),
    "tensor beyond its storage": (
        "a tensor of shape [4] reaches beyond its 4 numbers",
        lambda f: whole(tensor(number(1), tup(number(4)), tup(number(1)))),
    ),
    "tensor of nothing far beyond its storage": (
        "a tensor of shape [0] reaches beyond its 4 numbers",
        lambda f: whole(tensor(long_number(1 << 61), tup(number(0)), tup(number(1)))),
    ),
    "tensor of nothing, endlessly often": (
        "a tensor has an impossible shape",
        lambda f: whole(tensor(number(0), tup(long_number(1 << 61), number(0)), tup(number(1), number(1)))),
    ),
    "tensor before its storage": (
        "a tensor has an impossible shape",
        lambda f: whole(tensor(number(-1), tup(number(4)), tup(number(1)))),
    ),
    "tensor with negative sizes": (
        "a tensor has an impossible shape",
        lambda f: whole(tensor(number(0), tup(number(-4), number(-1)), tup(b"K\x01K\x01"))),
    ),
    "tensor of another rank than its strides": (
        "a tensor has different numbers of sizes and strides",
        lambda f: whole(tensor(number(0), tup(number(2)), tup())),
    ),
    "tensor on a text": (
        "it rebuilds a tensor in an unknown way",
        lambda f: whole(tensor(number(0), tup(number(2)), tup(number(1)), text("storage"))),
    ),
    "storage of a terabyte": (
        "a tensor claims 4398046511104 bytes but has 16",
        lambda f: whole(nested(storage_bytes(4, 1 << 40))),
    ),
    "storage of too little": ("a tensor claims 12 bytes but has 16", lambda f: whole(nested(storage_bytes(4, 3)))),
    "two storages": (
        "a tensor claims 16 bytes but has 207",
        lambda f: whole(nested(storage_bytes() + storage_bytes())),
    ),
    "parameter of a dict": (
        "it rebuilds a parameter in an unknown way",
        lambda f: whole(call(name("torch._utils", "_rebuild_parameter"), b"}", b"\x88", b"}")),
    ),
    "parameter with hooks": (
        "it rebuilds a parameter in an unknown way",
        lambda f: whole(
            call(
                name("torch._utils", "_rebuild_parameter"),
                tensor(number(0), tup(number(4)), tup(number(1))),
                b"\x88",
                b"}" + text("hook") + name("collections", "OrderedDict") + b"s",
            )
        ),
    ),
    "many tensors on one storage": (
        "its tensors claim 204000 bytes, more than the file has",
        lambda f: whole(
            MARK,
            tensor(number(0), tup(number(1000)), tup(number(1)), nested(storage_bytes(1000)) + b"q\x00"),
            *[tensor(number(0), tup(number(1000)), tup(number(1)), b"h\x00") for _ in range(50)],
            b"t",
        ),
    ),
    "array of objects": (
        "it holds an array of 'O8'; only plain numbers are read",
        lambda f: whole(array(tup(number(1)), dtype("O8"), MARK + call(name("os", "system"), touch(f)) + b"l")),
    ),
    "array of objects in bytes": (
        "it holds an array of 'O8'; only plain numbers are read",
        lambda f: whole(array(tup(number(1)), dtype("O8"), blob(bytes(8)))),
    ),
    "array with fields": (
        "it holds an array of 'V8'; only plain numbers are read",
        lambda f: whole(
            dtype("V8", tup(number(3), text("|"), b"N", tup(text("a")), b"}", number(8), number(1), number(16)))
        ),
    ),
    "array of a terabyte": (
        "an array claims 8796093022208 bytes but has 8",
        lambda f: whole(array(tup(long_number(1 << 40)), dtype("f8"), blob(bytes(8)))),
    ),
    "array of nothing, endlessly often": (
        "it holds an array in an unknown layout",
        lambda f: whole(array(tup(long_number(1 << 61), number(0)), dtype("f8"), blob(b""))),
    ),
    "array of negative size": (
        "it holds an array in an unknown layout",
        lambda f: whole(array(tup(number(-1), number(-1)), dtype("f8"), blob(bytes(8)))),
    ),
    "array of a subclass": (
        "it creates an array in an unknown way",
        lambda f: whole(
            call(
                name("numpy.core.multiarray", "_reconstruct"),
                name("collections", "OrderedDict"),
                tup(number(0)),
                blob(b"b"),
            )
        ),
    ),
    "array without contents": (
        "it has an array without contents",
        lambda f: whole(
            b"]"
            + call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), tup(number(0)), blob(b"b"))
            + b"a"
        ),
    ),
    "many arrays of the same bytes": (
        "its arrays claim more bytes than the file has",
        lambda f: whole(
            MARK,
            array(tup(number(1000)), dtype("f8"), blob(bytes(8000)) + b"q\x00"),
            *[array(tup(number(1000)), dtype("f8"), b"h\x00") for _ in range(50)],
            b"t",
        ),
    ),
    "array filled twice": (
        "it fills an array twice",
        lambda f: whole(
            array(tup(number(1)), dtype("f8"), blob(bytes(8))),
            tup(number(1), tup(number(1)), dtype("f8"), b"\x89", blob(bytes(8))) + BUILD,
        ),
    ),
    "array in a tuple": (
        "it has an array in an unexpected place",
        lambda f: whole(array(tup(number(1)), dtype("f8"), blob(bytes(8))) + b"\x85"),
    ),
    "array with a shape of booleans": (
        "it holds an array in an unknown layout",
        lambda f: whole(array(tup(b"\x88"), dtype("f8"), blob(bytes(8)))),
    ),
    "array in dtype of a text": (
        "it holds an array in an unknown layout",
        lambda f: whole(array(tup(number(1)), text("O"), blob(bytes(8)))),
    ),
    "storage that is a view": (
        "its nested tensor data refer to something that is not numbers",
        lambda f: whole(nested(storage_bytes().replace(b"NtQ", b")tQ"))),
    ),
    "nested objects by persistent id": (
        "its nested tensor data refer to something that is not numbers",
        lambda f: whole(nested(storage_bytes().replace(b"storage", b"module_"))),
    ),
    "memo never stored": ("it recalls memo entry 7, which was never stored", lambda f: whole(b"h\x07")),
    "memo of nothing": ("it pops a value from an empty stack", lambda f: PROTO + b"\x94."),
    "taking from an empty stack": ("it pops a value from an empty stack", lambda f: PROTO + b"R."),
    "taking across a mark": ("it pops a value from an empty stack", lambda f: PROTO + b"N(\x85."),
    "a mark too few": ("it ends a list that never started", lambda f: PROTO + b"Nt."),
    "values left behind": ("it leaves values behind", lambda f: PROTO + b"NN."),
    "list that contains itself": ("it contains itself", lambda f: whole(b"]q\x00h\x00a")),
    "record that contains itself": (
        "it contains itself",
        lambda f: whole(b"}q\x00" + text("me") + persistent(b"h\x00") + b"s"),
    ),
    "a billion laughs": ("it repeats its parts endlessly", lambda f: whole(doubled_lists(60))),
    "one long list, as often as it is long": (
        "it repeats its parts endlessly",
        lambda f: whole(MARK, b"]q\x00(" + b"N" * 3000 + b"e", b"](" + b"h\x00" * 3000 + b"e", b"t"),
    ),
    "deep lists": ("it is nested more than 200 levels deep", lambda f: whole(b"]" * 20_000 + b"a" * 19_999)),
    "deep tuples": ("it is nested more than 200 levels deep", lambda f: whole(b")" + b"\x85" * 20_000)),
    "deep tuples as a key": (
        "it has a dictionary key that is not a text",
        lambda f: whole(b"}", doubled_tuples(60), b"Ns"),
    ),
    "deep tuples in a set": (
        "it has a set that holds something other than texts",
        lambda f: whole(b"\x8f(", doubled_tuples(60), b"\x90"),
    ),
    "keys that are numbers": ("it has a dictionary key that is not a text", lambda f: whole(b"}(K\x01Nu")),
    "a key without a value": ("it has a dictionary key that is not a text", lambda f: whole(b"}(", text("key"), b"u")),
    "text that is not UTF-8": ("it holds a text that is not UTF-8", lambda f: PROTO + b"\x8c\x01\xff."),
    "protocol of the future": ("it claims pickle protocol 9; 2 to 5 are known", lambda f: b"\x80\x09N."),
    "empty": ("it is truncated", lambda f: b""),
    "a text file": (
        "it does not start like a pickle (protocol 2 or later)",
        lambda f: b"import os\nos.system('touch x')\n",
    ),
    "a web page": ("it does not start like a pickle (protocol 2 or later)", lambda f: b"<!DOCTYPE html><html></html>"),
    "a zip archive": ("it does not start like a pickle (protocol 2 or later)", lambda f: zip_bomb()),
    "a torch checkpoint": ("it does not start like a pickle (protocol 2 or later)", saved),
    "zeros": ("it does not start like a pickle (protocol 2 or later)", lambda f: bytes(1000)),
}
