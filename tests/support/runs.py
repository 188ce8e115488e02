"""A training run whose averages are known: weights on a random walk, averaged at every step."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.file_format import Header, save_snapshot, snapshot_name
from edm2kit.snapshots.loading import Weights
from tests.support.fake_published import ARCHITECTURE

STORED = (0.05, 0.1)
STEP_NIMG, NUM_STEPS, NUM_TIMES = 1000, 256, 16
HEADER = Header(ARCHITECTURE, {"kind": "rgb"}, 0, None, ("ant", "bee", "cat", "dog"), "float32", "walk", {"lr": 1})


@dataclass(frozen=True)
class Walk:
    """`snapshots` of the lengths STORED at NUM_TIMES times; `averages` of each length tracked all along, at the end."""

    snapshots: list[Weights]
    averages: dict[float, dict[str, torch.Tensor]]
    last: dict[str, torch.Tensor]


def walk(tracked: tuple[float, ...]) -> Walk:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Precond(**ARCHITECTURE)
        ema, snapshots = PowerFunctionEMA(net, (*STORED, *tracked)), []
        for step in range(1, NUM_STEPS + 1):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            ema.update(step * STEP_NIMG, STEP_NIMG)
            if step % (NUM_STEPS // NUM_TIMES) == 0:
                snapshots += [snapshot(step * STEP_NIMG, std, copied(average)) for std, average in averages_of(ema)[:2]]
    return Walk(snapshots, {std: copied(average) for std, average in averages_of(ema)}, copied(net))


def averages_of(ema: PowerFunctionEMA) -> list[tuple[float, Precond]]:
    return list(zip(ema.stds, ema.averages, strict=True))


def copied(net: Precond) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def snapshot(nimg: int, std: float, state: dict[str, torch.Tensor]) -> Weights:
    """A snapshot in memory."""
    return Weights(snapshot_name(nimg, std), dataclasses.replace(HEADER, nimg=nimg, ema_std=std), state)


def changed(weights: Weights, name: str | None = None, **header: object) -> Weights:
    """`weights` with other values in its header."""
    return dataclasses.replace(weights, name=name or weights.name, header=dataclasses.replace(weights.header, **header))


def with_tensors(weights: Weights, **tensors: torch.Tensor) -> Weights:
    """`weights` with other tensors, named with __ for a dot."""
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return dataclasses.replace(weights, tensors={**weights.tensors, **new})


def write(folder: Path, snapshots: list[Weights], dtype: str = "float32") -> Path:
    """`snapshots` as files under their names."""
    folder.mkdir(exist_ok=True, parents=True)
    for weights in snapshots:
        header = dataclasses.replace(weights.header, dtype=dtype)
        save_snapshot(folder / weights.name, weights.tensors, header)
    return folder
