"""Snapshots and statistics in the layout of NVIDIA's published files, made from networks of our own.

The two packages that such files name don't exist here; while a file is written, empty stand-ins do.
"""

import contextlib
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

TRAP = "raise SystemExit('source text embedded in a snapshot must never be executed')\n"
ARCHITECTURE = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
}
_MODULE_STATE = tuple(nn.Module().__dict__)


class EasyDict(dict):
    """Pickled as dnnlib.util.EasyDict."""

    __module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta: dict) -> None:
    raise AssertionError("only ever named, never called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """An object that pickles with its source text, as NVIDIA's persistence mechanism writes it."""

    def __init__(self, class_name: str, state: Mapping[str, Any], module_src: str = TRAP):
        self.meta = EasyDict(type="class", version=6, module_src=module_src, class_name=class_name, state=dict(state))

    def __reduce__(self) -> tuple:
        return _reconstruct_persistent_obj, (self.meta,)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """The packages named in the files, for as long as pickle looks whether they exist."""
    persistence, dnnlib, util = (ModuleType(n) for n in ("torch_utils.persistence", "dnnlib", "dnnlib.util"))
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict, dnnlib.util = EasyDict, util
    added = {module.__name__: module for module in (persistence, dnnlib, util)}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def module_object(module: nn.Module, class_name: str, arguments: Mapping[str, Any]) -> Persistent:
    """An nn.Module with all below it; `arguments` are recorded as those it was made with."""
    state = {key: module.__dict__[key] for key in _MODULE_STATE}
    children = {
        name: child if child is None else _child(child) for name, child in module._modules.items() if child is not None
    }
    state |= {"_modules": children, "_init_args": (), "_init_kwargs": dict(arguments)}
    return Persistent(class_name, state)


def _child(module: nn.Module) -> Any:
    if not isinstance(module, nn.ModuleDict):
        return module_object(module, type(module).__name__, {})
    copy = nn.ModuleDict()
    copy._modules = {name: _child(child) for name, child in module._modules.items()}
    return copy


def encoder_object(kind: str) -> Persistent:
    if kind == "rgb":
        return Persistent("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}})
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    state = {"_init_args": (), "_init_kwargs": {}, "batch_size": 8, "_vae": None}
    arrays = {"scale": scale, "bias": np.float32([-5.81, -3.25, -0.12, 2.15]) * scale}
    return Persistent("StabilityVAEEncoder", {**state, **arrays})


def write_snapshot(path: str | Path, net: nn.Module, arguments: Mapping[str, Any], **changes: Any) -> Path:
    """Pickle `net` (its weights as they are; published ones are float16) made with `arguments`.

    The encoder follows from the number of image channels; `changes` replace entries of the file.
    """
    contents = EasyDict(
        encoder=encoder_object("vae" if arguments.get("img_channels") == 4 else "rgb"),
        dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset", path="x.zip", use_labels=True),
        loss_fn=Persistent("EDM2Loss", {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5}),
        ema=module_object(net, "Precond", {"use_fp16": True, **arguments}),
    )
    contents.update(changes)
    return write_pickle(path, contents)


def write_pickle(path: str | Path, contents: Any) -> Path:
    """`contents`, which may hold EasyDict and Persistent, as a pickle of protocol 4."""
    with stand_ins(), open(path, "wb") as file:
        pickle.dump(contents, file, protocol=4)
    return Path(path)
