"""Small safetensors files with checksums, written at once; snapshots have a writer of their own."""

import json
from collections.abc import Mapping

import torch
from safetensors.torch import save

from edm2kit.torch_utils.files import crc32_of

_CRC_KEY = "edm2_weights_crc32"


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of `tensors`, with a CRC-32 of each in its metadata; the same bytes each time.

    The library writes metadata in an order that changes from run to run.
    """
    checksums = json.dumps(crc32_of(tensors), sort_keys=True)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {**metadata, _CRC_KEY: checksums})
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def matches_checksums(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether tensors from a file are those that `safetensors_bytes` wrote; True if the file has no checksums."""
    return metadata.get(_CRC_KEY) in (None, json.dumps(crc32_of(tensors), sort_keys=True))
