"""The process group, and everything that depends on which rank this is."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed


def rank() -> int:
    """This process's rank; 0 where no process group runs."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 where no process group runs."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is cuda (this process's own GPU), else mps, else cpu.

    Raises ValueError where the device is not there, naming those that are.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in has.items() if there)
    kind = name.split(":")[0]
    if not has.get(kind, False):
        raise ValueError(f"--device {name}: not available here; use one of auto, {', '.join(k for k in has if has[k])}")
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s); start one process per GPU "
            "(torchrun --nproc-per-node)"
        )
    return torch.device(name)


_had_group = False


def exit_process(code: int) -> None:
    """End this process with `code`; at once, output flushed, where it was part of a process group.

    Gloo's threads outlive the group, and an interpreter that takes its time to end while one of them still drops
    a tensor aborts now and then (exit code -6 from about one of 30 runs on a busy machine, torch 2.13).
    """
    if _had_group:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def session(device: str = "auto", timeout_minutes: float = 30) -> Iterator[torch.device]:
    """Join the process group that torchrun announced, if any; leave it at the end.

    Yields this process's device. A plain `python x.py` runs without a process group. CPU tensors always travel
    over gloo, CUDA tensors over nccl.
    """
    picked = pick_device(device)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    started = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        global _had_group
        started = _had_group = True
    try:
        yield picked
    except (ValueError, OSError) as error:
        if started and not _is_first_to_say(str(error)):
            raise SaidElsewhere(str(error)) from error
        raise
    finally:
        if started:
            torch.distributed.destroy_process_group()


class SaidElsewhere(ValueError):
    """An error that another rank has met in the same words, and tells."""


def _is_first_to_say(text: str) -> bool:
    """Whether no other rank has asked about the same words; true where nobody can be asked any more."""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return store.add(f"error/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except (RuntimeError, AttributeError):  # the node that keeps the store is gone, or a torch without this function
        return True


def print0(*args: object) -> None:
    """Print on rank 0 only, at once."""
    if rank() == 0:
        print(*args, flush=True)


def warn0(message: str) -> None:
    """Print a warning to standard error on rank 0 only."""
    if rank() == 0:
        print(f"Warning: {message}", file=sys.stderr, flush=True)


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by its sum over all ranks, in place; returns it."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast_(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Replace `tensor` by rank `source`'s, in place; returns it."""
    if world_size() > 1:
        torch.distributed.broadcast(tensor, source)
    return tensor


def send_to_rank0(tensor: torch.Tensor | None, source: int, like: torch.Tensor) -> torch.Tensor | None:
    """Rank `source`'s `tensor` in rank 0's host memory, shaped and laid out as `like`; None elsewhere."""
    if rank() == source:
        tensor = tensor.detach().cpu()
        if source == 0:
            return tensor
        torch.distributed.send(tensor.contiguous(), 0)
    elif rank() == 0:
        received = torch.empty(like.shape, dtype=like.dtype)
        torch.distributed.recv(received, source)
        return torch.empty_like(like, device="cpu").copy_(received)
    return None


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on one (a tiny CPU all-reduce)."""
    return bool(all_reduce_sum_(torch.tensor(int(flag))).item())


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank (any picklable object; only ever pickled by our own rank 0)."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(box, value)
    return box


def gather_on_rank0(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on rank 0; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    box: list[Any] | None = [None] * world_size() if rank() == 0 else None
    torch.distributed.gather_object(value, box, dst=0)
    return box or []


def raise_together(error: Exception | None) -> None:
    """Raise on every rank when one rank met an error, so that none is left waiting for the others.

    Each rank passes its own error or None; ranks without one raise a ValueError that quotes the first.
    """
    texts = [text for text in gather_objects(None if error is None else str(error)) if text is not None]
    if error is not None:
        raise error
    if texts:
        raise ValueError(texts[0])


def on_rank0(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` on rank 0 alone and give its result to every rank.

    The others wait; where the call raises ValueError or OSError, every rank raises.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = function(*args)
        except (ValueError, OSError) as caught:
            error = caught
    raise_together(error)
    return broadcast_object(result)
