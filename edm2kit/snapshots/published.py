"""NVIDIA's published snapshots (pickles), read without executing them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.models.encoders import StabilityVAEEncoder
from edm2kit.models.networks import full_architecture
from edm2kit.models.vae import STABILITY_VAE
from edm2kit.snapshots.file_format import STORED_DTYPES, Header, SnapshotWriter, check_weights, network_on_meta
from edm2kit.torch_utils.files import sampled_sha256
from edm2kit.torch_utils.pickles.reader import Record, StoredTensor, load_pickle

# {run}-{thousands of images}-{relative EMA length}.pkl
_FILE_NAME = re.compile(r"(?P<run>.+)-(?P<kimg>\d{7})-(?P<std>0\.\d{3})\.pkl")
_MAX_SIZE = 1 << 20  # of one architecture argument; a million channels would take a year to initialize


def read_published(path: str | Path) -> tuple[Header, dict[str, StoredTensor]]:
    """Header and tensors of a published snapshot; the tensors stay in the file.

    Number of images and EMA length come from the published file name (0 and None if it has been changed), everything
    else from the pickle. Raises ValueError, in one line, for a pickle that is not such a snapshot.
    """
    path = Path(path)
    contents = load_pickle(path)
    try:
        if type(contents) is not dict or not {"ema", "encoder"} <= contents.keys():
            raise ValueError("a snapshot has the entries ema and encoder")
        tensors = dict(_named_tensors(contents["ema"]))
        # several names may share a tensor's bytes: a file of a megabyte must not become a network of a terabyte
        if sum(tensor.num_bytes for tensor in tensors.values()) > path.stat().st_size:
            raise ValueError("its weights are larger than the file")
        return _header(path, contents, tensors), tensors
    except ValueError as error:
        # names in the message come from the file, and might move a terminal's cursor
        message = str(error)
        text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message[:400])
        if len(message) > 400:
            text += "..."
        raise ValueError(f"{path}: not a published snapshot: {text}") from error


def convert_published(path: str | Path, dest: str | Path) -> Header:
    """Write a published snapshot as a snapshot of this project; returns its header.

    Holds one tensor at a time in memory. Raises ValueError, in one line, for a pickle that is not such a snapshot.
    """
    header, tensors = read_published(path)
    net = network_on_meta(header, path)
    check_weights(path, net, tensors)
    state = net.state_dict()
    with SnapshotWriter(dest, header, {name: tensor.shape for name, tensor in state.items()}) as writer:
        for name in state:
            writer.write(name, tensors[name].read())
    return header


def published_time(name: str) -> tuple[str, int, float] | None:
    """(run, nimg, EMA length) according to a published file name; None for any other name."""
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        return None
    # names round down to thousands, and training counts in batches of 2048: take the multiple of 1024 in between
    return match["run"], (int(match["kimg"]) * 1000 + 999) // 1024 * 1024, float(match["std"])


def _header(path: Path, contents: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Header:
    run, nimg, ema_std = published_time(path.name) or ("", 0, None)
    if run == "network-snapshot":  # the file name of training, which names no run
        run = ""
    loss = contents.get("loss_fn")
    # the dtype that stores every weight exactly
    dtypes = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    names = [name for name, (_, dtype) in STORED_DTYPES.items() if dtypes == {dtype}]
    return Header(
        architecture=_architecture(contents["ema"], len(tensors)),
        encoder=_encoder(contents["encoder"]),
        nimg=nimg,
        ema_std=ema_std,
        dtype=names[0] if names else "float32",
        run_id=run,
        training_config={
            "published_file": path.name,
            "published_content": sampled_sha256(path),  # which file of that name
            "loss": _scalars(loss.state) if type(loss) is Record else {},
            "dataset": _scalars(contents.get("dataset_kwargs")),
        },
    )


def _scalars(values: Any) -> dict[str, Any]:
    if type(values) is not dict:
        return {}
    return {key: value for key, value in values.items() if type(value) in (bool, int, float, str)}


# the network


def _named_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Parameters and buffers under the names of `Module.state_dict()`."""
    if type(module) is not Record or module.state is None:
        raise ValueError(f"{prefix or 'ema'!r:.100} is not a module")
    yield from _own_tensors(module.state, "_parameters", prefix)
    yield from _own_tensors(module.state, "_buffers", prefix)
    for name, child in _entries(module.state, "_modules", prefix):
        yield from _named_tensors(child, f"{prefix}{name}.")


def _own_tensors(state: Mapping[str, Any], kind: str, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    not_saved = state.get("_non_persistent_buffers_set", ())
    if not isinstance(not_saved, set | list | tuple | dict):
        raise ValueError(f"{prefix or 'ema'!r:.100} has no set of buffers that are not saved")
    for name, tensor in _entries(state, kind, prefix):
        if name in not_saved:
            continue
        if type(tensor) is not StoredTensor:
            raise ValueError(f"{prefix + name!r:.100} is not a tensor")
        yield prefix + name, tensor


def _entries(state: Mapping[str, Any], kind: str, prefix: str) -> list[tuple[str, Any]]:
    entries = state.get(kind)
    if type(entries) is not dict:
        raise ValueError(f"{prefix or 'ema'!r:.100} has no {kind}")
    return [(name, value) for name, value in entries.items() if value is not None]


def _architecture(ema: Record, num_tensors: int) -> dict[str, Any]:
    arguments = _arguments(ema)
    arguments.pop("use_fp16", None)  # the caller chooses the precision of computation
    for name, value in arguments.items():
        # every block has weights of its own, so there are never more blocks than tensors
        limit = max(num_tensors, 1) if name == "num_blocks" else _MAX_SIZE
        numbers = value if type(value) in (list, tuple) else [value]
        if len(numbers) > 100:
            raise ValueError(f"the network's {name!r:.60} is {value!r:.60}")
        for number in numbers:
            if number is None:
                continue
            if type(number) not in (bool, int, float) or not 0 <= number <= limit:
                raise ValueError(f"the network's {name!r:.60} is {value!r:.60}")
    try:
        shape = {name: arguments.pop(name) for name in ("img_resolution", "img_channels", "label_dim")}
    except KeyError as error:
        raise ValueError(f"the network has no argument {error}") from error
    return full_architecture(**shape, sigma_data=arguments.pop("sigma_data", 0.5), network=arguments)


def _arguments(record: Any) -> dict[str, Any]:
    """The keyword arguments that an object was created with."""
    if type(record) is not Record or type(record.state) is not dict:
        raise ValueError("ema or encoder is not an object")
    arguments = record.state.get("_init_kwargs", {})
    if record.state.get("_init_args", ()) != () or type(arguments) is not dict:
        raise ValueError(f"{record.class_name!r:.60} was created with positional arguments")
    return dict(arguments)


# the encoder


def _encoder(record: Any) -> dict[str, Any]:
    arguments = _arguments(record)
    if record.class_name == "StandardRGBEncoder":
        if arguments:
            raise ValueError(f"the RGB encoder has the unknown argument {next(iter(arguments))!r:.60}")
        return {"kind": "rgb"}
    if record.class_name != "StabilityVAEEncoder":
        raise ValueError(f"unknown encoder {record.class_name!r:.60}; known: StandardRGBEncoder, StabilityVAEEncoder")
    return _vae_spec(arguments, record.state)


def _vae_spec(arguments: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    arguments.pop("batch_size", None)  # how many images are encoded at once
    if arguments.get("vae_name", STABILITY_VAE) != STABILITY_VAE:
        raise ValueError(f"its VAE is {arguments['vae_name']!r:.60}; published networks use {STABILITY_VAE}")
    try:
        with np.errstate(all="ignore"):  # reported below
            encoder = StabilityVAEEncoder(**arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"unknown VAE encoder: {error}") from error
    if any(one.numel() != 4 or not one.isfinite().all() for one in (encoder.scale, encoder.bias)):
        raise ValueError("scale and bias of the VAE encoder are not four finite numbers")
    for name in ("scale", "bias"):
        stored, ours = state.get(name), getattr(encoder, name).flatten().numpy()
        if stored is None:
            continue
        if type(stored) is not np.ndarray or stored.shape != ours.shape or not np.allclose(stored, ours, rtol=1e-4):
            raise ValueError(f"the VAE encoder's {name} does not follow from its arguments")
    return encoder.spec()
