"""Published pickles are read without running any of them, and everything else is refused."""

import collections
import io
import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from edm2kit.torch_utils.pickles import machine as pickle_machine
from edm2kit.torch_utils.pickles import reader as unpickle
from edm2kit.torch_utils.pickles import values as pickle_values
from edm2kit.torch_utils.pickles.reader import Record, StoredTensor, UnsafePickleError, load_pickle
from tests.support import hostile_misuses, hostile_pickles
from tests.support.golden import DATA


def through_pickle(value: object, protocol: int = 4) -> object:
    return load_pickle(io.BytesIO(pickle.dumps(value, protocol)))


def refused(tmp_path: Path, data: bytes) -> str:
    """The one line with which `data` is refused."""
    (tmp_path / "hostile.pkl").write_bytes(data)
    with pytest.raises(UnsafePickleError) as error:
        load_pickle(tmp_path / "hostile.pkl")
    line = str(error.value)
    assert "\n" not in line
    assert "hostile.pkl" in line
    assert len(line) < 600
    return line


# what is read


@pytest.mark.parametrize("kind", ["rgb", "vae"])
def test_published_layout_becomes_records(kind):
    before = set(sys.modules)
    snapshot = load_pickle(DATA / f"published_layout_{kind}.pkl")
    assert set(sys.modules) == before  # nothing was imported, and the trap in the source text did not spring
    assert set(snapshot) == {"ema", "encoder", "dataset_kwargs", "loss_fn"}
    assert snapshot["loss_fn"].state["P_mean"] == -0.4
    assert snapshot["encoder"].class_name == {"rgb": "StandardRGBEncoder", "vae": "StabilityVAEEncoder"}[kind]
    ema = snapshot["ema"]
    assert (ema.class_name, ema.state["_init_kwargs"]["img_resolution"]) == ("Precond", 16)
    blocks = ema.state["_modules"]["unet"].state["_modules"]["enc"]
    assert blocks.class_name == "torch.nn.modules.container.ModuleDict"
    weight = blocks.state["_modules"]["16x16_conv"].state["_parameters"]["weight"]
    assert weight.dtype == torch.float16
    assert weight.read().shape == weight.shape
    assert weight.num_bytes == 2 * weight.read().numel()


def test_both_packages_named_in_the_files_are_absent():
    code = (
        "import sys; from edm2kit.torch_utils.pickles.reader import load_pickle; load_pickle(sys.argv[1]);"
        "assert 'dnnlib' not in sys.modules and 'torch_utils.persistence' not in sys.modules"
    )
    root = Path(unpickle.__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, DATA / "published_layout_vae.pkl"], cwd=root, check=True)


def test_module_src_is_not_kept(tmp_path):
    (tmp_path / "a.pkl").write_bytes(hostile_pickles.whole(hostile_pickles.persistent(b"}", "raise SystemExit")))
    record = load_pickle(tmp_path / "a.pkl")
    assert (record.class_name, record.state) == ("Precond", {})
    assert isinstance(record, Record)


@pytest.mark.parametrize("dtype", list(unpickle._STORAGES.values()), ids=str)
def test_tensors_come_back_in_every_dtype(dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    assert torch.equal(through_pickle([tensor])[0].read(), tensor)


def test_tensors_come_back_in_every_layout():
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    views = [base, base.t(), base[1:3], base[:, 2], base[2:2], base[1, 1], base.unsqueeze(1)[::2], torch.zeros(0)]
    stored = through_pickle(views)
    assert all(torch.equal(one.read(), view) for one, view in zip(stored, views, strict=True))
    assert all(one.read().is_contiguous() for one in stored)
    parameter = through_pickle(collections.OrderedDict(weight=torch.nn.Parameter(base)))["weight"]
    assert torch.equal(parameter.read(), base)


def test_stored_tensors_read_afresh_each_time(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": torch.zeros(100_000)}, 4))
    stored = load_pickle(tmp_path / "a.pkl")["a"]
    stored.read().fill_(7)
    assert stored.read().sum() == 0
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(UnsafePickleError, match="the file was truncated"):
        stored.read()


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("spelling", ["numpy.core", "numpy._core"])
def test_statistics_come_back_as_arrays(protocol, spelling):
    sigma = np.random.default_rng(0).standard_normal((5, 5))
    arrays = {
        "mu": sigma[0],
        "sigma": np.asfortranarray(sigma),
        "big": sigma.astype(">f4"),
        "count": np.int64(3) + sigma[:0],
    }
    data = pickle.dumps({"num_images": 7, "fid": arrays}, protocol)
    # the length of a protocol 4 name is a byte of its own, so the spelling must be changed with it
    here = b"numpy._core.multiarray" if b"numpy._core.multiarray" in data else b"numpy.core.multiarray"
    there = f"{spelling}.multiarray".encode()
    data = data.replace(bytes([len(here)]) + here, bytes([len(there)]) + there).replace(b"c" + here, b"c" + there)
    if protocol == 4:
        data = data[:2] + data[11:]  # without the frame, whose length has changed
    assert there in data
    read = load_pickle(io.BytesIO(data))
    assert read["num_images"] == 7
    for key, array in arrays.items():
        np.testing.assert_array_equal(read["fid"][key], array)
        assert read["fid"][key].dtype.isnative
        assert read["fid"][key].flags.writeable
        assert read["fid"][key].flags.c_contiguous


def test_plain_values_come_back():
    shared = [1, 2]
    value = {"a": [None, True, 3, -70000, 1 << 70, 0.5, "é"], "b": (shared, shared, ()), "c": {"x", "y"}, "d": {}}
    assert through_pickle(value) == value


def test_a_pickle_in_the_middle_of_a_file_is_read_where_it_lies():
    file = io.BytesIO(b"front" + pickle.dumps([torch.ones(3)], 4))
    file.seek(5)
    assert load_pickle(file)[0].read().sum() == 3


def test_payloads_are_read_only_when_asked_for(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([torch.zeros(4_000_000) for _ in range(5)], 4))
    tracemalloc.start()
    stored = load_pickle(tmp_path / "a.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # of 80 MB
    assert isinstance(stored[0], StoredTensor)


# what is refused


@pytest.mark.parametrize("case", hostile_pickles.EXECUTES)
def test_payloads_are_real(tmp_path, case):
    """Python's own unpickler runs them, so the next test tests something."""
    data = hostile_pickles.EXECUTES[case](str(tmp_path / "flag"))
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", code], input=data, check=False, stderr=subprocess.DEVNULL)
    assert (tmp_path / "flag").exists()


HOSTILE = {case: ("", make) for case, make in hostile_pickles.EXECUTES.items()} | hostile_misuses.MISUSES


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_in_one_line_without_effect(tmp_path, case):
    reason, make = HOSTILE[case]
    data = make(str(tmp_path / "flag"))
    modules = set(sys.modules)
    tracemalloc.start()
    assert reason in refused(tmp_path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not (tmp_path / "flag").exists()
    assert set(sys.modules) == modules
    assert peak < 64 << 20


@pytest.mark.parametrize("kind", ["rgb", "vae"])
def test_truncated_anywhere_is_refused(tmp_path, kind):
    data = (DATA / f"published_layout_{kind}.pkl").read_bytes()
    for end in [0, 1, 2, 3, 11, *range(100, len(data), 6007), len(data) - 1]:
        refused(tmp_path, data[:end])


def test_damaged_anywhere_is_refused_or_read_but_nothing_else():
    data = (DATA / "published_layout_rgb.pkl").read_bytes()
    rng, refusals = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            load_pickle(io.BytesIO(damaged))
        except UnsafePickleError:
            refusals += 1
    assert refusals > 50


def test_refusals_say_what_was_found(tmp_path):
    flag = str(tmp_path / "flag")
    said = {
        case: refused(tmp_path, HOSTILE[case][1](flag))
        for case in (
            "os.system by GLOBAL",
            "INST behind a protocol",
            "nested old torch.save that executes",
            "a web page",
        )
    }
    assert "it names 'os.system', which is not on the list" in said["os.system by GLOBAL"]
    assert "no snapshot uses the opcode INST" in said["INST behind a protocol"]
    assert "it names 'posix.system'" in said["nested old torch.save that executes"]
    assert "does not start like a pickle" in said["a web page"]


def test_endless_pickles_end(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "_MAX_OPCODES", 1000)
    data = hostile_pickles.whole(b"]" + b"Na" * 600)
    assert "far more parts than any snapshot" in refused(tmp_path, data)


def test_what_is_shared_is_walked_once(monkeypatch):
    """Else a file of 300 kB, one long list named as often as it is long, would take hours."""
    seen, children = [], pickle_values._children
    monkeypatch.setattr(pickle_values, "_children", lambda node: seen.append(node) or children(node))
    inner = [None] * 50
    assert through_pickle([[inner] * 50, [inner] * 50]) == [[inner] * 50, [inner] * 50]
    assert len(seen) < 50


def test_long_texts_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_machine, "_MAX_TEXT_BYTES", 100)
    assert "it holds a text of 101 bytes" in refused(tmp_path, hostile_pickles.whole(hostile_pickles.text("x" * 101)))


def test_a_folder_and_a_missing_file_are_plain_errors(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pkl"):
        with pytest.raises(OSError):
            load_pickle(path)
