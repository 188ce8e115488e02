"""NVIDIA's published snapshots, read without executing them, as networks and headers of this project."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.models.edm2 import full_architecture
from edm2kit.models.encoders import StabilityVAEEncoder
from edm2kit.snapshots.file_format import DTYPES, Header, Snapshot, SnapshotWriter, build_network, make_encoder
from edm2kit.snapshots.weights import Span, Weights
from edm2kit.torch_utils.pickles.reader import Record, StoredTensor, load_pickle

# {run}-{thousands of images}-{relative EMA length}.pkl
_FILE_NAME = re.compile(r"(?P<run>.+)-(?P<kimg>\d{7})-(?P<std>0\.\d{3})\.pkl")
_VAE = "stabilityai/sd-vae-ft-mse"
_MAX_SIZE = 1 << 20  # of one architecture argument; a million channels would take a year to draw


def open_published(path: str | Path) -> Weights:
    """Header and tensors of a published snapshot, no weight read.

    Images and EMA length come from a published file name (0 and None where it has been changed), everything else
    from the pickle. Raises ValueError, in one line, for a pickle that is not such a snapshot.
    """
    header, tensors = _open(Path(path))
    spans = {name: _span(tensor) for name, tensor in tensors.items()}
    return Weights(Path(path).name, header, spans, Path(path))


def load_published(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Snapshot:
    """A published snapshot as a network in eval mode, float32 weights, `dtype` inside the U-Net.

    Raises ValueError, in one line, for a pickle that is not such a snapshot.
    """
    header, tensors = _open(Path(path))
    net = build_network(header, path)
    _check_fit(path, net.state_dict(), tensors)
    state = {name: tensor.read().to(device, torch.float32) for name, tensor in tensors.items()}
    net.load_state_dict(state, assign=True)
    net.compute_dtype = dtype
    return Snapshot(net.eval().requires_grad_(False), make_encoder(header.encoder), header)


def convert_published(path: str | Path, dest: str | Path) -> Header:
    """Write a published snapshot as a snapshot of this project; returns its header.

    Holds one tensor at a time. Raises ValueError, in one line, for a pickle that is not such a snapshot.
    """
    header, tensors = _open(Path(path))
    state = build_network(header, path).state_dict()
    _check_fit(path, state, tensors)
    with SnapshotWriter(dest, header, {name: tensor.shape for name, tensor in state.items()}) as writer:
        for name in state:
            writer.write(name, tensors[name].read())
    return header


def published_time(name: str) -> tuple[str, int, float] | None:
    """(run, nimg, EMA length) that a published file name tells; None for another name."""
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        return None
    # names round down to thousands, training went by batches of 2048: the multiple of 1024 in between
    return match["run"], (int(match["kimg"]) * 1000 + 999) // 1024 * 1024, float(match["std"])


def _open(path: Path) -> tuple[Header, dict[str, StoredTensor]]:
    contents = load_pickle(path)
    try:
        if type(contents) is not dict or not {"ema", "encoder"} <= contents.keys():
            raise ValueError("a snapshot has the entries ema and encoder")
        tensors = dict(_named_tensors(contents["ema"]))
        # several names may share a tensor's bytes; a file of a megabyte is no network of a terabyte
        if sum(tensor.num_bytes for tensor in tensors.values()) > path.stat().st_size:
            raise ValueError("its weights are larger than the file")
        return _header(path, contents, tensors), tensors
    except ValueError as error:
        raise ValueError(f"{path}: not a published snapshot: {_readable(error)}") from error


def _readable(error: ValueError) -> str:
    """The message on one short line: names in it are the file's, and might move a terminal's cursor."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(error)[:400])
    return text if len(str(error)) <= 400 else f"{text}..."


def _header(path: Path, contents: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Header:
    run, nimg, ema_std = published_time(path.name) or ("", 0, None)
    loss = contents.get("loss_fn")
    return Header(
        architecture=_architecture(contents["ema"], len(tensors)),
        encoder=_encoder(contents["encoder"]),
        nimg=nimg,
        ema_std=ema_std,
        dtype=_dtype(tensors),
        run_id="" if run == "network-snapshot" else run,
        training_config={
            "published_file": path.name,
            "loss": _scalars(loss.state) if type(loss) is Record else {},
            "dataset": _scalars(contents.get("dataset_kwargs")),
        },
    )


def _dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """The dtype that keeps every weight as it is."""
    found = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    return next((name for name, (_, dtype) in DTYPES.items() if found == {dtype}), "float32")


def _scalars(values: Any) -> dict[str, Any]:
    there = values if type(values) is dict else {}
    return {key: value for key, value in there.items() if type(value) in (bool, int, float, str)}


# the network


def _named_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Parameters and buffers under the names of `Module.state_dict()`."""
    if type(module) is not Record:
        raise ValueError(f"{prefix or 'ema'!r:.100} is not a module")
    transient = module.state.get("_non_persistent_buffers_set", ())
    for name, tensor in [*_entries(module, "_parameters", prefix), *_entries(module, "_buffers", prefix)]:
        if name not in transient and type(tensor) is not StoredTensor:
            raise ValueError(f"{prefix + name!r:.100} is not a tensor")
        if name not in transient:
            yield prefix + name, tensor
    for name, child in _entries(module, "_modules", prefix):
        yield from _named_tensors(child, f"{prefix}{name}.")


def _entries(module: Record, kind: str, prefix: str) -> list[tuple[str, Any]]:
    entries = module.state.get(kind) if module.state else None
    if type(entries) is not dict:
        raise ValueError(f"{prefix or 'ema'!r:.100} has no {kind}")
    return [(name, value) for name, value in entries.items() if value is not None]


def _architecture(ema: Record, num_tensors: int) -> dict[str, Any]:
    arguments = _arguments(ema)
    arguments.pop("use_fp16", None)  # whoever loads a network chooses what it computes in
    for name, value in arguments.items():
        numbers = value if type(value) in (list, tuple) else [value]
        # each block brings weights of its own, so no count exceeds theirs by much
        limit = max(num_tensors, 1) if name == "num_blocks" else _MAX_SIZE
        if len(numbers) > 100 or not all(_is_size(number, limit) for number in numbers):
            raise ValueError(f"the network's {name!r:.60} is {value!r:.60}")
    try:
        given = [arguments.pop(name) for name in ("img_resolution", "img_channels", "label_dim")]
    except KeyError as error:
        raise ValueError(f"the network has no argument {error}") from error
    return full_architecture(*given, arguments.pop("sigma_data", 0.5), arguments)


def _is_size(value: Any, limit: int) -> bool:
    return value is None or (type(value) in (bool, int, float) and 0 <= value <= limit)


def _arguments(record: Any) -> dict[str, Any]:
    """Keyword arguments that an object was made with."""
    if type(record) is not Record or type(record.state) is not dict:
        raise ValueError("ema or encoder is not an object")
    arguments = record.state.get("_init_kwargs", {})
    if record.state.get("_init_args", ()) != () or type(arguments) is not dict:
        raise ValueError(f"{record.class_name!r:.60} was made with unnamed arguments")
    return dict(arguments)


def _check_fit(path: str | Path, state: Mapping[str, torch.Tensor], tensors: Mapping[str, StoredTensor]) -> None:
    for name in {**state, **tensors}:
        if name not in state or name not in tensors or tuple(state[name].shape) != tensors[name].shape:
            raise ValueError(f"{path}: weights do not fit the network's arguments (first at {name!r:.100})")


def _span(tensor: StoredTensor) -> Span | torch.Tensor:
    if tensor.position is None:
        return tensor.read()
    return Span(tensor.position, tensor.dtype, torch.Size(tensor.shape))


# the encoder


def _encoder(record: Any) -> dict[str, Any]:
    arguments = _arguments(record)
    if record.class_name == "StandardRGBEncoder":
        if arguments:
            raise ValueError(f"the RGB encoder has the unknown argument {next(iter(arguments))!r:.60}")
        return {"kind": "rgb"}
    if record.class_name != "StabilityVAEEncoder":
        raise ValueError(f"unknown encoder {record.class_name!r:.60}; there is StandardRGBEncoder, StabilityVAEEncoder")
    return _vae_spec(record, arguments)


def _vae_spec(record: Record, arguments: dict[str, Any]) -> dict[str, Any]:
    arguments.pop("batch_size", None)  # how many images are encoded at once
    if arguments.get("vae_name", _VAE) != _VAE:
        raise ValueError(f"its VAE is {arguments['vae_name']!r:.60}; published networks use {_VAE}")
    try:
        with np.errstate(all="ignore"):  # told below
            encoder = StabilityVAEEncoder(**arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"unknown VAE encoder: {error}") from error
    if any(one.numel() != 4 or not one.isfinite().all() for one in (encoder.scale, encoder.bias)):
        raise ValueError("scale and bias of the VAE encoder are not four finite numbers")
    for name in ("scale", "bias"):
        stored, ours = record.state.get(name), getattr(encoder, name).flatten().numpy()
        if stored is None:
            continue
        if type(stored) is not np.ndarray or stored.shape != ours.shape or not np.allclose(stored, ours, rtol=1e-4):
            raise ValueError(f"the VAE encoder's {name} does not follow from its arguments")
    return encoder.spec()
