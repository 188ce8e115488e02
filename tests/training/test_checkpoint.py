"""Checkpoints: no damage is trained on, the last good one stays, a full disk is one line."""

import errno
import math
import os
import random
import re

import pytest
import torch
from torch import nn

from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.torch_utils.files import atomic_write
from edm2kit.training.checkpoint import (
    checkpoint_path,
    checkpoint_state,
    damage,
    list_checkpoints,
    load_checkpoint,
    named_tensors,
    prune_checkpoints,
    save_checkpoint,
    usable_checkpoint,
)

CPU = torch.device("cpu")


def trained(nimg: int) -> dict:
    torch.manual_seed(nimg)
    net = nn.Linear(40, 10)
    optimizer, ema = torch.optim.Adam(net.parameters()), PowerFunctionEMA(net)
    net(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    return checkpoint_state(net, optimizer, ema, {"nimg": nimg, "elapsed_sec": 1.0, "run_id": "a"})


@pytest.fixture
def run_dir(tmp_path):
    for nimg in (8, 16, 24):
        save_checkpoint(tmp_path, trained(nimg))
    return tmp_path


def flip_bit(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def same_bits(path, state: dict) -> bool:
    found, wanted = (dict(named_tensors(s)) for s in (torch.load(path, weights_only=True), state))
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_no_flipped_bit_changes_what_is_loaded(run_dir):
    path, state = list_checkpoints(run_dir)[-1], trained(24)
    whole, noticed = path.read_bytes(), 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 150):
        flip_bit(path, bit)
        if damage(path):
            noticed += 1
        else:
            assert same_bits(path, state), bit  # in padding between records
        path.write_bytes(whole)
    assert noticed > 50
    assert damage(path) is None


def test_a_record_marked_as_a_folder_is_damage(run_dir):
    # torch.load skips the contents of such a record and returns whatever was in memory
    path, entry, attributes = list_checkpoints(run_dir)[-1], b"PK\x01\x02", 38
    whole = path.read_bytes()
    starts = [match.start() for match in re.finditer(entry, whole)]
    assert len(starts) > 5
    for start in starts:
        flip_bit(path, 8 * (start + attributes) + 4)
        assert "is marked as a folder" in damage(path)
        path.write_bytes(whole)


def test_no_flipped_bit_of_a_zip_entry_changes_what_is_loaded(run_dir):
    path, state = list_checkpoints(run_dir)[-1], trained(24)
    whole = path.read_bytes()
    last, end = whole.rindex(b"PK\x01\x02"), len(whole)
    for bit in range(8 * last, 8 * end):
        flip_bit(path, bit)
        assert damage(path) or same_bits(path, state), bit
        path.write_bytes(whole)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_damaged(run_dir, share):
    path = list_checkpoints(run_dir)[-1]
    os.truncate(path, int(path.stat().st_size * share))
    assert damage(path)


def test_damaged_newest_ones_are_set_aside_and_the_one_before_is_used(run_dir, capsys):
    first, second, third = list_checkpoints(run_dir)
    flip_bit(second, 8 * second.stat().st_size // 2)
    third.write_bytes(b"")
    assert usable_checkpoint(run_dir) == first
    assert list_checkpoints(run_dir) == [first]
    assert sorted(path.name for path in run_dir.glob("*.damaged")) == [f"{p.name}.damaged" for p in (second, third)]
    assert f"checkpoint {third} is damaged" in capsys.readouterr().err


def test_if_all_are_damaged_none_is_touched(run_dir):
    for path in list_checkpoints(run_dir):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"training-state-0000000024\.pt cannot be read .* no earlier one"):
        usable_checkpoint(run_dir)
    assert len(list_checkpoints(run_dir)) == 3


@pytest.mark.parametrize("part", ["net", "optimizer", "ema"])
def test_a_checkpoint_that_is_not_finite_is_not_used(run_dir, part):
    state = trained(32)
    tensors = [t for name, t in named_tensors(state) if name.startswith(part) and t.is_floating_point()]
    tensors[-1].view(-1)[0] = math.inf
    save_checkpoint(run_dir, state)
    assert "not finite" in damage(list_checkpoints(run_dir)[-1])
    assert usable_checkpoint(run_dir).name == "training-state-0000000024.pt"


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert usable_checkpoint(tmp_path) is None


def test_pruning_keeps_the_newest(run_dir):
    prune_checkpoints(run_dir, 2)
    assert [int(path.stem[-10:]) for path in list_checkpoints(run_dir)] == [16, 24]


def test_nothing_is_pruned_while_the_newest_is_damaged(run_dir, capsys):
    list_checkpoints(run_dir)[-1].write_bytes(b"x")
    prune_checkpoints(run_dir, 1)
    assert len(list_checkpoints(run_dir)) == 3
    assert "keeping all earlier ones" in capsys.readouterr().err


def test_a_checkpoint_is_restored_bit_by_bit(run_dir):
    net = nn.Linear(40, 10)
    optimizer, ema = torch.optim.Adam(net.parameters()), PowerFunctionEMA(net)
    progress = load_checkpoint(checkpoint_path(run_dir, 16), net, optimizer, ema, CPU)
    assert progress == {"nimg": 16, "elapsed_sec": 1.0, "run_id": "a"}
    restored = dict(named_tensors(checkpoint_state(net, optimizer, ema, progress)))
    for name, tensor in named_tensors(trained(16)):
        assert torch.equal(tensor, restored[name]), name


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
@pytest.mark.parametrize("after_bytes", [0, 3000])
def test_a_full_disk_is_one_line_with_file_and_space(run_dir, monkeypatch, number, after_bytes):
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}

    class Full:
        """A file on a disk with room for `after_bytes`."""

        def __init__(self, file):
            self.file, self.written = file, 0

        def write(self, data):
            self.written += len(data)
            if self.written > after_bytes:
                raise OSError(number, os.strerror(number))
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    class Disk:
        def __init__(self, path):
            self.writing = atomic_write(path)

        def __enter__(self):
            return Full(self.writing.__enter__())

        def __exit__(self, *error):
            return self.writing.__exit__(*error)

    monkeypatch.setattr("edm2kit.training.checkpoint.atomic_write", Disk)
    message = r"needs 0\.00\d GB, \d+\.\d+ GB were free: '.*training-state-0000000032.pt'"
    with pytest.raises(OSError, match=message) as caught:
        save_checkpoint(run_dir, trained(32))
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
