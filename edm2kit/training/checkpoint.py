"""Checkpoints: the complete state of a training run, to resume it as if it had never stopped."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write

_NAME = re.compile(r"training-state-(\d+)\.pt")


def checkpoint_path(run_dir: Path, nimg: int) -> Path:
    """The file of the checkpoint at `nimg` images."""
    return run_dir / f"training-state-{nimg:010d}.pt"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints in the run folder, oldest first."""
    found = [(int(m[1]), path) for path in run_dir.glob("training-state-*.pt") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_state(
    net: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerFunctionEMA, progress: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of a checkpoint; `progress` holds plain numbers and strings, including "nimg".

    Every rank must call it, because the state may be sharded; only rank 0 receives the complete state.
    """
    states = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
    return {**states, "progress": dict(progress)}


def save_checkpoint(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Write the result of `checkpoint_state`, atomically."""
    with atomic_write(checkpoint_path(run_dir, state["progress"]["nimg"])) as file:
        torch.save(state, file)


def load_checkpoint(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerFunctionEMA, device: torch.device
) -> dict[str, Any]:
    """Restore network, optimizer and EMAs, and return the progress. Raises ValueError if the file is damaged."""
    try:
        # a GPU has no room for a second copy, so tensors are copied there from the mapped file
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=device.type != "cpu")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        return state["progress"]
    except Exception as error:  # torch.load raises a dozen types of errors for damaged files
        if dist.is_out_of_memory(error):
            raise  # the file is fine
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason}); delete it to resume from the one before it"
        ) from error


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all)."""
    for path in list_checkpoints(run_dir)[:-keep] if keep else []:
        path.unlink()
