"""Damaged files with weights or statistics for `benchmarks.fuzz`: snapshots, checkpoints, classifiers, pickles."""

import contextlib
import dataclasses
import io
import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from benchmarks.fuzz_inputs import Parser, in_file, text_of, zip_of
from edm2kit.ema.any_training import PowerEMA, load_parameters_
from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.experiments.toy.model import ToyNet
from edm2kit.experiments.toy.training import RECIPES, load_network, network_path, save_network
from edm2kit.guidance.classifier.noise_classifier import (
    ClassifierHeader,
    NoiseClassifier,
    load_classifier,
    save_classifier,
)
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.reference import (
    Reference,
    load_reference,
    save_adm_reference,
    save_published_reference,
    save_reference,
)
from edm2kit.models import Precond, full_architecture
from edm2kit.snapshots.file_format import Header, check_weights, network_on_meta, read_header, save_snapshot
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.snapshots.published import read_published
from edm2kit.torch_utils.pickles.reader import load_pickle
from edm2kit.torch_utils.pickles.writer import dump_arrays
from edm2kit.training.checkpoint import checkpoint_path, checkpoint_state, damage, load_checkpoint, save_checkpoint

_NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}

_CLASSIFIER: dict[str, Any] = {
    "img_resolution": 4, "img_channels": 1, "num_classes": 2, "width": 8, "levels": 1, "sigma_data": 0.5,
}  # fmt: skip


def _tiny(**network: Any) -> tuple[Precond, Header]:
    architecture = full_architecture(
        img_resolution=4, img_channels=3, label_dim=2, sigma_data=0.5, network={**_NETWORK, **network}
    )
    header = Header(
        architecture=architecture, encoder={"kind": "rgb"}, nimg=1000, ema_std=0.1, label_names=("cat", "dog"),
        dtype="float16", run_id="0123", training_config={"loss": {"P_mean": -0.4}},
    )  # fmt: skip
    return Precond(**architecture), header


# snapshots


def _snapshot(folder: Path) -> bytes:
    net, header = _tiny()
    save_snapshot(folder / "seed.safetensors", net.state_dict(), header)
    return (folder / "seed.safetensors").read_bytes()


def _snapshot_headers(folder: Path) -> list[Any]:
    data = _snapshot(folder)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["edm2_snapshot"])
    return [header, text_of(header)]


def _read_header_text(data: bytes, folder: Path) -> object:
    text = text_of({"__metadata__": {"edm2_snapshot": data.decode("utf-8", "replace"), "format": "pt"}})
    path = folder / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return network_on_meta(read_header(path), path)


def _parameters(folder: Path) -> list[Any]:
    averages = PowerEMA(nn.Linear(3, 2), [0.1])
    averages.update(8)
    [path] = averages.save(folder / "ema")
    return [path.read_bytes()]


def _published(folder: Path) -> list[Any]:
    """A snapshot in the layout of NVIDIA's files, whose packages do not exist here."""
    net, header = _tiny()
    arguments = {key: header.architecture[key] for key in ("img_resolution", "img_channels", "label_dim")}
    contents = OrderedDict(
        encoder=_Persistent("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}}),
        dataset_kwargs={"path": "x.zip", "use_labels": True},
        loss_fn=_Persistent("EDM2Loss", {"P_mean": -0.4}),
        ema=_published_module(net, {"use_fp16": True, **arguments, **_NETWORK}),
    )
    persistence = ModuleType("torch_utils.persistence")
    persistence.__dict__["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    with mock.patch.dict(sys.modules, {persistence.__name__: persistence}):
        return [pickle.dumps(contents, 4)]


def _reconstruct_persistent_obj(meta: Mapping[str, Any]) -> None:
    raise AssertionError("named in a file, never called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class _Persistent:
    """An object as NVIDIA's persistence mechanism pickles it, with its source text."""

    def __init__(self, class_name: str, state: Mapping[str, Any]) -> None:
        source = "raise SystemExit"
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self) -> Any:
        return _reconstruct_persistent_obj, (self.meta,)


def _published_module(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    children = {name: _published_module(child, {}) for name, child in module._modules.items() if child is not None}
    if isinstance(module, nn.ModuleDict):
        copy = nn.ModuleDict()
        copy._modules = children
        return copy
    names = ("training", "_parameters", "_buffers", "_non_persistent_buffers_set")
    state = {name: module.__dict__[name] for name in names}
    state |= {"_modules": children, "_init_args": (), "_init_kwargs": dict(arguments)}
    return _Persistent(type(module).__name__, state)


def _read_published(path: Path) -> object:
    header, tensors = read_published(path)
    check_weights(path, network_on_meta(header, path), tensors)
    return [tensor.read() for tensor in tensors.values()]


# checkpoints: their readers know no kind of network, so the smallest module will do


def _training() -> tuple[nn.Module, torch.optim.Optimizer, PowerFunctionEMA]:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return net, optimizer, PowerFunctionEMA(net, [0.1])


def _checkpoint(folder: Path) -> list[Any]:
    save_checkpoint(folder, checkpoint_state(*_training(), {"nimg": 8, "elapsed_sec": 1.5, "run_id": "0123"}))
    return [checkpoint_path(folder, 8).read_bytes()]


def _checkpoint_members(folder: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_checkpoint(folder)[0])) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _read_checkpoint(path: Path) -> object:
    if (reason := damage(path)) is not None:
        raise ValueError(reason)
    return load_checkpoint(path, *_training(), torch.device("cpu"))


def _contents_of_checkpoint() -> Parser:
    """The pickle in a checkpoint, in a zip whose checksums fit."""
    members: dict[str, bytes] = {}

    def seeds(folder: Path) -> list[Any]:
        members.update(_checkpoint_members(folder))
        return [data for name, data in members.items() if name.endswith("/data.pkl")]

    def parse(data: bytes, folder: Path) -> object:
        path = folder / "a.pt"
        path.write_bytes(zip_of({k: data if k.endswith("/data.pkl") else v for k, v in members.items()}))
        return _read_checkpoint(path)

    return Parser(seeds, parse)


# classifiers


def _classifier(folder: Path) -> bytes:
    path = folder / "seed.safetensors"
    save_classifier(path, NoiseClassifier(**_CLASSIFIER), ClassifierHeader(_CLASSIFIER, 8, ("cat", "dog")))
    return path.read_bytes()


def _classifier_header() -> Parser:
    tensors: dict[str, torch.Tensor] = {}

    def seeds(folder: Path) -> list[Any]:
        tensors.update(load(_classifier(folder)))
        header = dataclasses.asdict(ClassifierHeader(_CLASSIFIER, 8, ("cat", "dog"), {"lr": 0.1}))
        return [header, text_of(header)]

    def parse(data: bytes, folder: Path) -> object:
        path = folder / "a.safetensors"
        path.write_bytes(save(tensors, {"edm2_classifier": data.decode("utf-8", "replace")}))
        return load_classifier(path)

    return Parser(seeds, parse)


def _toy_network(folder: Path) -> list[Any]:
    path = network_path(folder, "guide", 0)
    save_network(path, ToyNet(RECIPES["guide"].width), RECIPES["guide"], 0)
    return [path.read_bytes()]


# pickles and reference statistics


def _pickles(folder: Path) -> list[Any]:
    buffer = io.BytesIO()
    dump_arrays({"mu": np.arange(4.0), "sigma": np.eye(4), "n": 3}, buffer)
    plain = {"a": [1, 2.5, "b", None, True], "b": {"c": (1, 2)}}
    arrays = pickle.dumps({"d": np.arange(3, dtype=np.float32)}, 4)
    tensors = pickle.dumps(OrderedDict(a=torch.ones(2, 2), b=nn.Parameter(torch.zeros(3).half())), 4)
    return [buffer.getvalue(), arrays, tensors, *(pickle.dumps(plain, protocol) for protocol in (2, 4, 5))]


def _statistics() -> FeatureStatistics:
    return FeatureStatistics(np.zeros(3), np.eye(3), None)


def _references(folder: Path) -> list[Any]:
    statistics = _statistics()
    reference = Reference(9, {"fid": statistics, "sfid": statistics}, {"image_size": [4, 4], "crop": "center-crop"})
    save_reference(folder / "own.npz", reference)
    save_adm_reference(folder / "adm.npz", reference, np.zeros([1, 4, 4, 3], np.uint8))
    save_published_reference(folder / "edm2.pkl", Reference(9, {"fid": statistics}))
    np.savez(folder / "old.npz", mu=statistics.mean, sigma=statistics.covariance)
    return [(folder / name).read_bytes() for name in ("own.npz", "adm.npz", "edm2.pkl", "old.npz")]


def _reference_header(data: bytes, folder: Path) -> object:
    statistics = _statistics()
    arrays = {"header": np.array(data.decode("utf-8", "replace"))}
    arrays |= {"fid.mu": statistics.mean, "fid.sigma": statistics.covariance}
    np.savez(folder / "a.npz", **arrays)
    return _read_reference(folder / "a.npz")


def _read_reference(path: Path) -> object:
    with _small_detectors():
        reference = load_reference(path)
        return repr(reference), [reference.of(metric) for metric in reference.statistics]


@contextlib.contextmanager
def _small_detectors() -> Iterator[None]:
    """Inside, detectors return three numbers: statistics of the real ones are too large for millions of inputs."""
    with mock.patch.dict(DETECTORS, {n: dataclasses.replace(DETECTORS[n], num_features=3) for n in ("fid", "sfid")}):
        yield


_REFERENCE_HEADER = {"format_version": 1, "num_images": 9, "fingerprints": {"fid": None}, "source": {"a": [1]}}
PARSERS: Mapping[str, Parser] = {
    "snapshot header": Parser(_snapshot_headers, _read_header_text),
    "snapshot file": Parser(lambda folder: [_snapshot(folder)], in_file("a.safetensors", load_snapshot)),
    "published snapshot": Parser(_published, in_file("run-0000001-0.100.pkl", _read_published)),
    "averaged parameters": Parser(
        _parameters, in_file("a.safetensors", lambda path: load_parameters_(nn.Linear(3, 2), path))
    ),
    "checkpoint": Parser(_checkpoint, in_file("training-state-0000000008.pt", _read_checkpoint)),
    "checkpoint contents": _contents_of_checkpoint(),
    "classifier header": _classifier_header(),
    "classifier file": Parser(lambda folder: [_classifier(folder)], in_file("a.safetensors", load_classifier)),
    "toy network": Parser(
        _toy_network, in_file("guide-seed0.safetensors", lambda path: load_network(path.parent, "guide", 0))
    ),
    "pickle": Parser(_pickles, lambda data, folder: load_pickle(io.BytesIO(data))),
    "reference statistics": Parser(_references, in_file("a.npz", _read_reference)),
    "reference header": Parser(lambda folder: [_REFERENCE_HEADER, text_of(_REFERENCE_HEADER)], _reference_header),
}
