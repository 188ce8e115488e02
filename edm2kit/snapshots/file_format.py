"""The snapshot file: safetensors weights, and a JSON header that describes them completely."""

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edm2kit.models.networks import DEFAULT_NETWORK, NETWORKS
from edm2kit.models.preconditioning import Preconditioner
from edm2kit.torch_utils.file_kinds import START_BYTES, kind_of_file
from edm2kit.torch_utils.files import atomic_write, check_fields, check_type, code_commit, crc32_of

FORMAT_VERSION = 2  # 2 names the kind of network; files of version 1 all hold "edm2"
_HEADER_KEY = "edm2_snapshot"
# checksums as 8 hexadecimal digits: of the header's text, and a JSON object with that of each tensor's bytes
_HEADER_CRC_KEY, _WEIGHTS_CRC_KEY = "edm2_snapshot_crc32", "edm2_weights_crc32"
_WRITE_AGAIN = "copy or write the file again"
_MAX_BLOCKS = 1000  # EDM2-XXL has 12
_SIZES = ("img_resolution", "img_channels", "label_dim", "sigma_data")
_MAX_SIZE = 1 << 24
# how a header names a dtype -> how safetensors names it, and the dtype
STORED_DTYPES = {
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float32": ("F32", torch.float32),
}


@dataclass(frozen=True)
class Header:
    """Everything about a snapshot except its weights; reading it loads no weights.

    - `architecture`: the arguments that build the network; `network`: its kind, a key of `NETWORKS`.
    - `encoder`: the `spec()` of the encoder.
    - `nimg`: training images seen, exactly. `ema_std`: relative EMA length, None for raw weights.
    - `label_names`: a name per class, or None.
    - `label_kind`: "classes" or "vectors", the meaning of the label_dim numbers that the network receives.
    - `dtype`: of the stored weights.
    - `run_id`: identifies the training run; two snapshots of one run share it.
    - `training_config`: the run's complete configuration.
    - `recipe`: how a rebuilt EMA was made, None for snapshots written by training.
    - `commit`: of the code that wrote the file.
    - `buffers`: names of the tensors that training does not learn; None in files that do not list them.
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
    network: str = DEFAULT_NETWORK
    label_kind: str = "classes"
    buffers: tuple[str, ...] | None = None

    @property
    def classes_without_images(self) -> tuple[int, ...]:
        """The classes that had no image in training, as far as the file says."""
        found = self.training_config.get("classes_without_images", [])
        return tuple(k for k in found if type(k) is int) if isinstance(found, list) else ()

    def __repr__(self) -> str:
        ema = "raw weights" if self.ema_std is None else f"EMA length {self.ema_std:g}"
        rebuilt = "" if self.recipe is None else " (rebuilt)"
        labels = "no labels"
        if label_dim := self.architecture.get("label_dim"):
            labels = f"label vectors of {label_dim} numbers" if self.label_kind == "vectors" else f"{label_dim} classes"
        if self.label_names:
            labels += f" ({', '.join(self.label_names[:3])}{', ...' if len(self.label_names) > 3 else ''})"
        run = f", run {self.run_id}" if self.run_id else ""
        return f"Header: trained on {self.nimg:,} images, {ema}{rebuilt}, {labels}, {self.dtype}{run}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Header":
        values = json.loads(text)
        version = values.get("format_version", 0)
        check_type(version, int, "format_version")
        if version > FORMAT_VERSION:
            raise ValueError(f"snapshot format {version} is newer than {FORMAT_VERSION}; update this code")
        values["format_version"] = FORMAT_VERSION  # what older versions leave out has its default
        for name in ("label_names", "buffers"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        check_fields(values, Header)
        if values["nimg"] < 0 or values.get("label_kind", "classes") not in ("classes", "vectors"):
            raise ValueError(f"it has nimg {values['nimg']} and label_kind {values.get('label_kind')!r:.60}")
        return Header(**values)


def snapshot_name(nimg: int, ema_std: float | None, prefix: str = "network-snapshot", *, exact: bool = False) -> str:
    """The usual file name: thousands of images, and the EMA length. For people; programs read the header.

    A length has three decimals, or as many as it needs, so that 0.0125 and 0.013 have different names. `exact` adds
    the last three digits of the images, for a second snapshot within the same thousand.
    """
    length = "raw"
    if ema_std is not None:
        rounded = f"{ema_std:.3f}"
        length = rounded if float(rounded) == ema_std else str(float(ema_std))
    digits = f".{nimg % 1000:03d}" if exact else ""
    return f"{prefix}-{nimg // 1000:07d}{digits}-{length}.safetensors"


def stored_dtype(tensor_name: str, shape: torch.Size, dtype: str) -> str:
    """The dtype that a tensor of a network is stored in: `dtype` for matrices and kernels, float32 for the rest.

    Vectors such as Fourier frequencies are tiny, and half precision would shift the phases by up to 0.02 rad.
    """
    return dtype if len(shape) > 1 else "float32"


class SnapshotWriter:
    """Writes a snapshot tensor by tensor, or part by part, in the order of `shapes`, without a second copy in memory.

    Use it as a context manager. The file appears under its name only when it is complete. It has a CRC-32 of the header
    and of each tensor, which are compared when they are read.

    Example:

        with SnapshotWriter(path, header, {name: tensor.shape for name, tensor in state.items()}) as writer:
            for name, tensor in state.items():
                writer.write(name, tensor)
    """

    def __init__(self, path: str | Path, header: Header, shapes: Mapping[str, torch.Size]):
        if header.dtype not in STORED_DTYPES:
            raise ValueError(f"the dtype of a snapshot must be one of {', '.join(STORED_DTYPES)}; got {header.dtype!r}")
        self.path, self.header = Path(path), header
        self._layout = {
            name: (stored_dtype(name, shape, header.dtype), torch.Size(shape)) for name, shape in shapes.items()
        }
        self._left = {name: shape.numel() for name, (_, shape) in self._layout.items()}  # values still to be written
        self._crc32 = dict.fromkeys(self._layout, 0)

    def _preamble(self) -> bytes:
        header = self.header.to_json()
        checksums = {name: f"{crc32:08x}" for name, crc32 in self._crc32.items()}
        metadata = {
            _HEADER_KEY: header,
            "format": "pt",
            _HEADER_CRC_KEY: f"{zlib.crc32(header.encode()):08x}",
            _WEIGHTS_CRC_KEY: json.dumps(checksums),
        }
        entries: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for name, (dtype, shape) in self._layout.items():
            size = shape.numel() * STORED_DTYPES[dtype][1].itemsize
            entries[name] = {
                "dtype": STORED_DTYPES[dtype][0],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
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
        """Append one tensor; raises ValueError if it is not the next one, or not finite in the stored dtype."""
        if name not in self._layout or tensor.shape != self._layout[name][1]:
            raise ValueError(f"snapshot tensor {name} {list(tensor.shape)} does not belong in {self.path}")
        self.write_part(name, tensor.detach().flatten())

    def write_part(self, name: str, values: torch.Tensor) -> None:
        """Append the next `values` [n] of a flattened tensor that comes in several parts; raises as `write`."""
        expected = next(iter(self._left), None)
        if name != expected or len(values) > self._left[name]:
            raise ValueError(f"snapshot tensor {name} [{len(values)}] out of order; expected {expected}")
        stored = values.to("cpu", STORED_DTYPES[self._layout[name][0]][1]).contiguous()
        # checking the extremes takes a tenth of the time of checking all
        if len(values) and not all(math.isfinite(extreme) for extreme in torch.aminmax(stored)):
            raise ValueError(
                f"{name} is not finite as {stored.dtype}: training has diverged, or the weights need dtype float32"
            )
        data = stored.view(torch.uint8).numpy().data
        self._file.write(data)
        self._crc32[name] = zlib.crc32(data, self._crc32[name])
        self._left[name] -= len(values)
        if not self._left[name]:
            del self._left[name]

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            try:
                if self._left:
                    raise ValueError(f"snapshot {self.path}: tensor {next(iter(self._left))} was never written")
                # again, with the checksums, which are known now; they have the same number of digits
                self._file.seek(0)
                self._file.write(self._preamble())
            except (ValueError, OSError) as failure:
                self._context.__exit__(type(failure), failure, None)
                raise
        self._context.__exit__(*error)


def save_snapshot(path: str | Path, net_state: Mapping[str, torch.Tensor], header: Header) -> None:
    """Write a snapshot atomically: `net_state` is a network's `state_dict()`; it is converted to `header.dtype`.

    Raises ValueError for an unknown dtype and for weights that are not finite.

    Example: `save_snapshot("mine.safetensors", net.state_dict(), read_header("theirs.safetensors"))`.
    """
    with SnapshotWriter(path, header, {name: tensor.shape for name, tensor in net_state.items()}) as writer:
        for name, tensor in net_state.items():
            writer.write(name, tensor)


def read_header(path: str | Path) -> Header:
    """The header of a local snapshot. Raises ValueError for a file that is missing, truncated or not a snapshot.

    Example: `read_header("network-snapshot-0016777-0.050.safetensors").nimg`.
    """
    with _open(path) as file:
        metadata = file.metadata() or {}
    text = metadata.get(_HEADER_KEY)
    if text is None:
        raise ValueError(f"{path} is a safetensors file but not a snapshot of this project (no {_HEADER_KEY} header)")
    if metadata.get(_HEADER_CRC_KEY) not in (None, f"{zlib.crc32(text.encode()):08x}"):
        raise ValueError(f"{path} is damaged: its header does not match its checksum; {_WRITE_AGAIN}")
    try:
        return Header.from_json(text)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError, ValueError) as error:
        if "is newer than" in str(error):
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(f"{path}: the snapshot header is damaged ({error})") from error


def read_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one at a time, on the CPU, as stored. Raises ValueError if one does not match its checksum."""
    with _open(path) as file:
        names = list(file.keys())
        checksums = _checksums(path, file.metadata() or {}, names)
        for name in names:
            tensor = file.get_tensor(name)
            if checksums and crc32_of({name: tensor})[name] != f"{checksums[name]:08x}":
                raise damaged_weights(path, name)
            yield name, tensor


def damaged_weights(path: object, name: str) -> ValueError:
    """The error for a tensor that does not match its checksum."""
    return ValueError(f"{path} is damaged: the weights {name} do not match their checksum; {_WRITE_AGAIN}")


def _checksums(path: str | Path, metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, int]:
    """The CRC-32 of each tensor; {} if the file has none, as other programs and earlier versions write it."""
    text = metadata.get(_WEIGHTS_CRC_KEY)
    if text is None:
        return {}
    try:
        found = {name: int(digits, 16) for name, digits in json.loads(text).items()}
        if found.keys() != set(names):
            raise ValueError("they are of other tensors")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its checksums cannot be read ({error}); {_WRITE_AGAIN}") from error
    return found


def tensor_layout(path: str | Path) -> dict[str, tuple[int, torch.dtype, torch.Size, int | None]]:
    """(offset of the first byte, dtype, shape, CRC-32 if known) of each tensor in a snapshot file, by name."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    checksums = _checksums(path, entries.pop("__metadata__", {}), entries)
    dtypes = dict(STORED_DTYPES.values())
    layout = {}
    for name, entry in entries.items():
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{path}: {name} is stored as {entry['dtype']}; expected one of {', '.join(dtypes)}")
        offset = 8 + length + entry["data_offsets"][0]
        layout[name] = (offset, dtypes[entry["dtype"]], torch.Size(entry["shape"]), checksums.get(name))
    return layout


def _open(path: str | Path) -> Any:
    if not os.path.isfile(path):
        raise ValueError(f"no snapshot at {path}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
        kind = "a zip, or weights that torch.save wrote" if start.startswith(b"PK") else kind_of_file(start)
        if kind is not None and start[8:9] != b"{":  # where the header of a damaged snapshot begins
            raise ValueError(f"{path} is not a snapshot, but {kind}") from error
        raise ValueError(f"{path} is not a complete snapshot ({error}); copy or write it again") from error


def network_on_meta(header: Header, source: str | Path = "the snapshot") -> Preconditioner:
    """A network of the header's kind and architecture on the meta device: names and shapes, but no weights.

    Raises ValueError, beginning with `source`, if this code does not know the kind, lacks a package for it, or cannot
    build the architecture.
    """
    if header.network == "parameters":
        raise ValueError(
            f"{source} holds parameters of a module that PowerEMA averaged; load them with "
            "edm2kit.ema.any_training.load_parameters_(module, path)"
        )
    if header.network not in NETWORKS:
        raise ValueError(
            f"{source} holds a network of kind {header.network!r}, which this version does not know (it knows "
            f"{', '.join(NETWORKS)}); update this code"
        )
    kind = NETWORKS[header.network]
    label_dim = header.architecture.get("label_dim")
    if header.label_names is not None and len(header.label_names) != label_dim:
        raise ValueError(
            f"{source}: its header names {len(header.label_names)} classes, but the network has {label_dim}"
        )
    try:
        # a damaged file may ask for a network that takes a year to build
        blocks = kind.count_blocks({**kind.defaults, **header.architecture})
        if blocks > _MAX_BLOCKS:
            raise ValueError(f"it asks for {blocks} blocks; at most {_MAX_BLOCKS} are allowed")
        sizes = {name: header.architecture[name] for name in _SIZES if name in header.architecture}
        for name, value in sizes.items():
            check_type(value, float if name == "sigma_data" else int, name)
            if not 0 <= value <= _MAX_SIZE:
                raise ValueError(f"{name} is {value}; at most {_MAX_SIZE} is allowed")
        rest = {name: value for name, value in header.architecture.items() if name not in sizes}
        kind.check_arguments(rest, header.network)
        with torch.device("meta"):
            return kind.build(**header.architecture)
    except (TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        message = re.sub(r"\w+\.__init__\(\) ", "", str(error).partition("\n")[0])
        raise ValueError(f"{source}: cannot build its network: {message}") from error


def check_weights(source: str | Path, net: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError, beginning with `source`, unless `tensors` (which have shapes) are the weights of `net`."""
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise ValueError(f"{source}: weights do not fit the header's architecture (first at {name!r:.100})")
