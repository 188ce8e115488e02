"""Checkpoints: the complete state of a training run, to resume it as if it had never stopped."""

import errno
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write, free_bytes

_NAME = re.compile(r"training-state-(\d+)\.pt")
_PART = re.compile(r"training-state-(\d+)\.part-(\d+)-of-(\d+)\.pt")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK_BYTES = 1 << 24
_MARKS_A_FOLDER = 0x10  # in the external attributes of a zip entry


def checkpoint_path(run_dir: Path, nimg: int) -> Path:
    """The file of the checkpoint at `nimg` images."""
    return run_dir / f"training-state-{nimg:010d}.pt"


class DivergenceError(ValueError):
    """A run that cannot continue, at `nimg` images.

    `images` are (position in the global order, sigma) of those with a bad loss.
    """

    def __init__(self, reason: str, nimg: int, images: Sequence[tuple[int, float]] = ()):
        super().__init__(reason)
        self.nimg, self.images = nimg, images


@torch.no_grad()
def nonfinite_part(net: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerFunctionEMA) -> str | None:
    """Which part of this rank's state is not finite, such as "the weights are"; None if all of it is."""
    own = getattr(optimizer, "optim", optimizer)  # what ShardedAdam holds on this rank
    parts: dict[str, list[torch.Tensor]] = {
        "the weights are": list(net.parameters()),
        "Adam's moments are": [state[key] for state in own.state.values() for key in ("exp_avg", "exp_avg_sq")],
        "the EMA weights are": [parameter for average in ema.averages for parameter in average.parameters()],
    }
    for what, tensors in parts.items():
        # the largest absolute value of each tensor; NaN if there is one
        if tensors and not torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all():
            return what
    return None


def check_finite(net: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerFunctionEMA, nimg: int) -> None:
    """Raise DivergenceError on every rank if weights, Adam's moments or EMAs are not finite on any rank."""
    found = next((text for text in dist.gather_objects(nonfinite_part(net, optimizer, ema)) if text), None)
    if found:
        raise DivergenceError(f"{found} not finite", nimg)


def bad_losses(losses: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> list[tuple[int, float]]:
    """(position, sigma) of the images of all ranks whose loss is not finite, from (positions, losses, sigmas)."""
    own = [
        (int(position), float(level))
        for positions, values, sigma in losses
        for position, value, level in zip(positions, values.cpu(), sigma.flatten().cpu(), strict=True)
        if not value.isfinite()
    ]
    return [image for part in dist.gather_objects(own) for image in part]


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


class _FirstError:
    """A file for torch.save, which replaces an error of the system by one of its own: keeps the first."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Write the result of `checkpoint_state`, atomically; each record carries a CRC-32.

    Raises OSError if it cannot be written, naming the file and, if the disk is full, the needed and the free space.
    """
    _save(checkpoint_path(run_dir, state["progress"]["nimg"]), state)


def save_part(run_dir: Path, state: Mapping[str, Any], rank: int, world_size: int) -> list[int]:
    """Write what one rank holds of a sharded state, as `save_checkpoint` does; returns the ranks still missing."""
    nimg = state["progress"]["nimg"]
    _save(_part_path(run_dir, nimg, rank, world_size), state)
    return [other for other in range(world_size) if not _part_path(run_dir, nimg, other, world_size).exists()]


def _part_path(run_dir: Path, nimg: int, rank: int, world_size: int) -> Path:
    return run_dir / f"training-state-{nimg:010d}.part-{rank}-of-{world_size}.pt"


def _save(path: Path, state: Mapping[str, Any]) -> None:
    needed = sum(tensor.nbytes for _, tensor in named_tensors(state))
    free = free_bytes(path.parent)
    try:
        with atomic_write(path) as file:
            target = _FirstError(file)
            try:
                torch.save(state, target)  # type: ignore[arg-type]  # needs write and flush only
            except RuntimeError as error:
                if target.error is None:
                    raise OSError(errno.EIO, f"the checkpoint could not be written ({error})") from error
                raise target.error from error
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        reason = f"{error.strerror}: the checkpoint needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB were free"
        raise OSError(error.errno, reason, str(path)) from error


def named_tensors(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor in nested dicts, with its path, such as "optimizer.state.3.exp_avg"."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from named_tensors(value, f"{name}.{key}".lstrip("."))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is complete, unchanged and finite.

    Compares the CRC-32 of every record. Raises OSError if the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if member.external_attr & _MARKS_A_FOLDER:  # torch.load would return memory it never wrote to
                        return f"the record {member.filename} is marked as a folder"
                    with archive.open(member) as record:
                        while record.read(_CHUNK_BYTES):
                            pass
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for name, tensor in named_tensors(state):
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    return f"{name} is not finite: the run had diverged"
            for part in ("net", "optimizer", "ema", "progress"):
                state[part]
        except Exception as error:  # zipfile and torch.load raise a dozen types of errors for damaged files
            if dist.is_out_of_memory(error) or isinstance(error, MemoryError):
                raise  # the file is fine
            return _first_line(error)
    return None


def join_parts(run_dir: Path) -> None:
    """Make a checkpoint of the parts that the ranks of a sharded run left after an error, and remove them.

    Parts of which some are missing or damaged are removed with a warning, as the run cannot continue from them.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for path in run_dir.glob("training-state-*.part-*.pt"):
        if match := _PART.fullmatch(path.name):
            found.setdefault((int(match[1]), int(match[3])), []).append(int(match[2]))
    for (nimg, world_size), ranks in sorted(found.items()):
        paths = [_part_path(run_dir, nimg, rank, world_size) for rank in sorted(ranks)]
        lost = [f"that of rank {rank} is missing" for rank in range(world_size) if rank not in ranks]
        lost += [f"{path.name} is damaged ({reason})" for path in paths if (reason := damage(path))]
        if lost:
            dist.warn0(
                f"the ranks could not save all parts of the state at {nimg} images ({'; '.join(lost[:4])}); training "
                "continues from the last checkpoint"
            )
        elif not checkpoint_path(run_dir, nimg).exists():
            save_checkpoint(run_dir, _joined([torch.load(path, weights_only=True, mmap=True) for path in paths]))
        for path in paths:
            path.unlink()


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The complete state of the parts of all ranks; of the weights, each has all."""
    net, progress, groups = parts[0]["net"], parts[0]["progress"], parts[0]["optimizer"]["param_groups"]
    moments = {number: values for part in parts for number, values in part["optimizer"]["state"].items()}
    averages = {}
    for std in parts[0]["ema"]:
        owned = {name: tensor for part in parts for name, tensor in part["ema"][std].items()}
        averages[std] = {name: owned.get(name, tensor) for name, tensor in net.items()}  # buffers never change
    optimizer = {"state": dict(sorted(moments.items())), "param_groups": groups}
    return {"net": net, "optimizer": optimizer, "ema": averages, "progress": progress}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def usable_checkpoint(run_dir: Path, run_id: str | None = None) -> Path | None:
    """The newest checkpoint that is not damaged; None if the folder has no checkpoints at all.

    Damaged ones that are newer are renamed to NAME.damaged, with a warning. Raises ValueError if all are damaged, and
    if the newest one belongs to another run than `run_id`; then it renames none.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(run_dir)):
        reason = damage(path)
        if reason is None:
            found = read_run_id(path)
            if None not in (found, run_id) and found != run_id:
                raise ValueError(
                    f"{path} belongs to another run ({found}), not to the one in this folder ({run_id}): it would "
                    "continue with weights of other settings or images. Move it away, or use another --outdir"
                )
            for newer, what in damaged:
                newer.rename(newer.with_name(f"{newer.name}.damaged"))
                dist.warn0(f"checkpoint {newer} is damaged ({what}); renamed it to {newer.name}.damaged")
            return path
        damaged.append((path, reason))
    if damaged:
        path, reason = damaged[0]
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason}), and {run_dir} has no earlier one that can. Restore one from "
            "a backup, or delete all checkpoints to start again from image 0"
        )
    return None


def load_checkpoint(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerFunctionEMA, device: torch.device
) -> dict[str, Any]:
    """Restore network, optimizer and EMAs, and return the progress. Raises ValueError if the file does not fit."""
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
        raise ValueError(f"checkpoint {path} cannot be read ({_first_line(error)})") from error


def read_run_id(path: Path) -> str | None:
    """The run that a checkpoint belongs to; None if it does not say, or cannot be read (loading it reports that)."""
    try:
        progress = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]
        return progress.get("run_id")
    except Exception:  # torch.load raises a dozen types of errors for damaged files
        return None


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all); none if the newest was written wrongly."""
    old = list_checkpoints(run_dir)[:-keep] if keep else []
    if old and (reason := damage(list_checkpoints(run_dir)[-1])):
        dist.warn0(f"the newest checkpoint in {run_dir} is damaged ({reason}); keeping all earlier ones")
        return
    for path in old:
        path.unlink()
