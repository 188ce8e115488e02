"""Small safetensors files: the same bytes each time, readable by the library; a flipped bit is noticed."""

import pytest
import torch
from safetensors import safe_open

from edm2kit.torch_utils.safetensors_files import damaged_part, safetensors_bytes

TENSORS = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(7, dtype=torch.int16), "empty": torch.zeros(0, 2)}
NOTES = {"one": "1", "two": "zwei", "three": "\u4e09", "four": "4"}


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_the_same_bytes_each_time_and_what_was_written_comes_back(tmp_path):
    (data,) = {safetensors_bytes(TENSORS, NOTES) for _ in range(20)}
    (tmp_path / "a").write_bytes(data)
    tensors, metadata = read(tmp_path / "a")
    assert metadata.items() >= NOTES.items()
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in tensors.items())
    assert damaged_part(tensors, metadata) is None
    assert damaged_part(tensors, NOTES) is None  # as other programs write it


@pytest.mark.parametrize("byte", [1, 20])
def test_a_flipped_bit_is_noticed(tmp_path, byte):
    data = bytearray(safetensors_bytes(TENSORS, NOTES))
    data[-byte] ^= 64
    (tmp_path / "a").write_bytes(data)
    assert damaged_part(*read(tmp_path / "a")) == "weights"
