"""Snapshots: safetensors weights plus a JSON header that says all there is to know about them."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from edm2kit.models.edm2 import Precond
from edm2kit.models.encoders import Encoder, make_encoder
from edm2kit.torch_utils.files import atomic_write, fetch
from edm2kit.torch_utils.provenance import code_commit

FORMAT_VERSION = 1
_HEADER_KEY = "edm2_snapshot"
_MAX_BLOCKS = 1000  # of an encoder, all its levels together; XXL has 12
DTYPES = {"float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16), "float32": ("F32", torch.float32)}


@dataclass(frozen=True)
class Header:
    """Everything a snapshot says of itself; reading it loads no weights.

    `architecture`: Precond's arguments; `encoder`: an encoder's `spec()`; `nimg`: training images seen, exactly;
    `ema_std`: relative EMA length, None for raw weights; `label_names` per class or None; `dtype` of the stored
    weights; `run_id` names the training run (two snapshots of one run share it); `training_config` the run's
    resolved configuration; `recipe` how a reconstruction was made; `commit` of the code that wrote it.
    """

    architecture: Mapping[str, Any]
    encoder: Mapping[str, Any]
    nimg: int
    ema_std: float | None
    label_names: tuple[str, ...] | None = None
    dtype: str = "float16"
    run_id: str = ""
    training_config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    commit: str = field(default_factory=code_commit)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Header":
        values = json.loads(text)
        if values.get("format_version", 0) > FORMAT_VERSION:
            raise ValueError(
                f"snapshot format {values['format_version']} is newer than {FORMAT_VERSION}; update this code"
            )
        if values["label_names"] is not None:
            values["label_names"] = tuple(values["label_names"])
        return Header(**values)


@dataclass(frozen=True)
class Snapshot:
    """A network ready to evaluate, the encoder that goes with it, and the header it came with."""

    net: Precond
    encoder: Encoder
    header: Header


def snapshot_name(nimg: int, ema_std: float | None, prefix: str = "network-snapshot") -> str:
    """The customary file name, thousands of images and EMA length. Decoration: the header is the truth.

    A length takes three decimals, more where it has more: 0.0125 and 0.013 don't share a name.
    """
    if ema_std is None:
        length = "raw"
    else:
        length = next(text for text in (f"{ema_std:.3f}", str(float(ema_std))) if float(text) == ema_std)
    return f"{prefix}-{nimg // 1000:07d}-{length}.safetensors"


def is_published_pickle(path: str | Path) -> bool:
    """Whether the file is a pickle (as published by NVIDIA) rather than one of our snapshots."""
    with open(path, "rb") as file:
        start = file.read(9)
    # the first byte alone will not do: safetensors starts with a length, which may end in 0x80, and then has a brace
    return start[:1] == b"\x80" and start[8:] != b"{"


def stored_dtype(tensor_name: str, shape: torch.Size, dtype: str) -> str:
    """The dtype that a tensor of a network is stored in: `dtype` for weights, float32 for the rest.

    Fourier frequencies and gains are tiny, and half precision would shift the phases by up to 0.02 rad.
    """
    return dtype if len(shape) > 1 else "float32"


class SnapshotWriter:
    """Writes a snapshot tensor by tensor, or part by part, in the order of `shapes`, holding no second copy of it.

    Use as a context manager; the file appears under its name, with usual permissions, only when it is whole.
    """

    def __init__(self, path: str | Path, header: Header, shapes: Mapping[str, torch.Size]):
        if header.dtype not in DTYPES:
            raise ValueError(f"a snapshot's dtype is one of {', '.join(DTYPES)}; got {header.dtype!r}")
        self.path, self.header = Path(path), header
        self._layout = {
            name: (stored_dtype(name, shape, header.dtype), torch.Size(shape)) for name, shape in shapes.items()
        }
        self._left = {name: shape.numel() for name, (_, shape) in self._layout.items()}  # values yet to come

    def _preamble(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {_HEADER_KEY: self.header.to_json(), "format": "pt"}}
        offset = 0
        for name, (dtype, shape) in self._layout.items():
            size = shape.numel() * DTYPES[dtype][1].itemsize
            entries[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # the format wants tensors aligned
        return len(text).to_bytes(8, "little") + text

    def __enter__(self) -> "SnapshotWriter":
        self._context = atomic_write(self.path, "wb")
        self._file: IO[bytes] = self._context.__enter__()
        self._file.write(self._preamble())
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor; ValueError where it is not the next one of the layout, or not finite once stored."""
        if name not in self._layout or tensor.shape != self._layout[name][1]:
            raise ValueError(f"snapshot tensor {name} {list(tensor.shape)} does not belong into {self.path}")
        self.write_part(name, tensor.detach().flatten())

    def write_part(self, name: str, values: torch.Tensor) -> None:
        """Append the next `values` [n] of a tensor that comes in several parts, front to back; errors as `write`."""
        expected = next(iter(self._left), None)
        if name != expected or len(values) > self._left[name]:
            raise ValueError(f"snapshot tensor {name} [{len(values)}] out of order; expected {expected}")
        stored = values.to("cpu", DTYPES[self._layout[name][0]][1]).contiguous()
        # the extremes speak for all at a tenth of the time
        if len(values) and not all(math.isfinite(extreme) for extreme in torch.aminmax(stored)):
            raise ValueError(f"{name} is not finite as {stored.dtype}: the network has diverged, or needs float32")
        self._file.write(memoryview(stored.view(torch.uint8).numpy()))
        self._left[name] -= len(values)
        if not self._left[name]:
            del self._left[name]

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._left:
            missing = ValueError(f"snapshot {self.path}: tensor {next(iter(self._left))} was never written")
            self._context.__exit__(type(missing), missing, None)
            raise missing
        self._context.__exit__(*error)


def save_snapshot(path: str | Path, net_state: Mapping[str, torch.Tensor], header: Header) -> None:
    """Write a snapshot atomically: `net_state` as a network's `state_dict()`, converted to `header.dtype`."""
    with SnapshotWriter(path, header, {name: tensor.shape for name, tensor in net_state.items()}) as writer:
        for name, tensor in net_state.items():
            writer.write(name, tensor)


def read_header(path: str | Path) -> Header:
    """The header alone. Raises ValueError for a file that is missing, truncated or not a snapshot."""
    with _open(path) as file:
        text = (file.metadata() or {}).get(_HEADER_KEY)
    if text is None:
        raise ValueError(f"{path} is a safetensors file but not a snapshot of this project (no {_HEADER_KEY} header)")
    try:
        return Header.from_json(text)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the snapshot header is damaged ({error})") from error


def read_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one at a time, on the CPU, as stored."""
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)


def _open(path: str | Path) -> Any:
    if not os.path.isfile(path):
        raise ValueError(f"no snapshot at {path}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole snapshot ({error}); copy or write it again") from error


def build_network(header: Header, source: str | Path = "the snapshot") -> Precond:
    """A network of the header's architecture, weights not yet set.

    Raises ValueError, beginning with `source`, for arguments that make none or that this code does not know.
    """
    try:
        # a file may ask for a network that takes a year to draw
        blocks = header.architecture.get("num_blocks", 0) * len(header.architecture.get("channel_mult", ()))
        if blocks > _MAX_BLOCKS:
            raise ValueError(f"it asks for {blocks} blocks, where {_MAX_BLOCKS} are the most")
        with torch.device("meta"):
            return Precond(**header.architecture)
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        message = re.sub(r"\w+\.__init__\(\) ", "", str(error).partition("\n")[0])
        raise ValueError(f"{source}: its architecture does not fit this code: {message}") from error


def load_snapshot(
    path_or_url: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Snapshot:
    """Load a network for evaluation: eval mode, no gradients, float32 weights, `dtype` inside the U-Net.

    Accepts our snapshots and NVIDIA's published pickles (read without executing them), as paths or URLs. Raises
    ValueError with the reason where the file is missing, damaged, or does not fit its own header.
    """
    path = fetch(path_or_url)
    if path.is_file() and is_published_pickle(path):
        from edm2kit.snapshots.published import load_published

        return load_published(path, device, dtype)
    header = read_header(path)
    net = build_network(header, path)
    state = {name: tensor.to(device, torch.float32) for name, tensor in read_tensors(path)}
    _assign(net, state, path)
    net.compute_dtype = dtype
    return Snapshot(net.eval().requires_grad_(False), make_encoder(header.encoder), header)


def _assign(net: Precond, state: dict[str, torch.Tensor], source: str | Path) -> None:
    expected = {name: tensor.shape for name, tensor in net.state_dict().items()}
    if wrong := [
        n for n in {**expected, **state} if n not in state or n not in expected or state[n].shape != expected[n]
    ]:
        raise ValueError(f"{source}: weights do not fit the header's architecture (first at {wrong[0]})")
    net.load_state_dict(state, assign=True)
