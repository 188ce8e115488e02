"""Small safetensors files with checksums, written at once; snapshots have a writer of their own."""

import json
import zlib
from collections.abc import Mapping

import torch
from safetensors.torch import save

from edm2kit.torch_utils.files import crc32_of

# checksums: a JSON object with that of each tensor's bytes, and that of the other metadata
_CRC_KEY, _METADATA_CRC_KEY = "edm2_weights_crc32", "edm2_metadata_crc32"


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of `tensors`, with a CRC-32 of each and of `metadata`; the same bytes each time.

    The library writes metadata in an order that changes from run to run.
    """
    checksums = {
        _CRC_KEY: json.dumps(crc32_of(tensors), sort_keys=True),
        _METADATA_CRC_KEY: _crc32_of_metadata(metadata),
    }
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {**metadata, **checksums})
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _crc32_of_metadata(metadata: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(metadata, sort_keys=True).encode()):08x}"


def damaged_part(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str | None:
    """What of a file is not as `safetensors_bytes` wrote it: "weights" or "notes"; None if all is.

    A file of other programs, or of earlier versions, has fewer checksums; what has none is not compared.
    """
    if metadata.get(_CRC_KEY) not in (None, json.dumps(crc32_of(tensors), sort_keys=True)):
        return "weights"
    notes = {name: text for name, text in metadata.items() if name not in (_CRC_KEY, _METADATA_CRC_KEY)}
    if metadata.get(_METADATA_CRC_KEY) not in (None, _crc32_of_metadata(notes)):
        return "notes"
    return None
