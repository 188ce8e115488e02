"""How many images fit into memory at a time: --batch-gpu auto, and advice before a run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import check_type
from edm2kit.training.config import TrainConfig
from edm2kit.training.log import Forecast, make_forecast

USABLE = 0.85  # of free memory: the forecast leaves out the allocator's gaps and workspaces


def fitting_size(
    config: TrainConfig, architecture: dict[str, Any], share: int, processes: int, device: torch.device
) -> int:
    """The largest divisor of `share`, the images of a process per step, that fits into every rank's memory."""
    memory = make_forecast(config, architecture, share, processes).memory
    free = min(dist.gather_objects(free_memory(device)))
    return largest_divisor(share, int(share * (USABLE * free - memory.state) / max(memory.activations, 1)))


def recorded_size(record: Mapping[str, Any] | None, processes: int) -> int | None:
    """The micro-batch that a run with as many processes began with, so that resuming it gives the same results."""
    sizes = None if record is None or record.get("world_size") != processes else record.get("micro_batches")
    if not sizes:
        return None
    check_type(sizes, list[int], "micro_batches in run.json")
    return max(sizes)


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, or this process's part of the free memory of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    if found is None:
        raise ValueError("the free memory of this machine is unknown; give --batch-gpu as a number of images")
    return int(found[1]) * 1024 // max(1, dist.env_int("LOCAL_WORLD_SIZE", 1))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, which may be 1."""
    return next((k for k in range(min(limit, number), 1, -1) if number % k == 0), 1)


def memory_advice(forecast: Forecast, free_bytes: int, micro_batch: int) -> str | None:
    """What to do if a run needs more than `free_bytes` on its GPU with `micro_batch` images at a time; None if it fits.

    The forecast is a lower bound, so a run that fits may still run out of memory.
    """
    needed = forecast.memory
    if needed.total <= free_bytes:
        return None
    helpful = [name for name, choice in forecast.choices.items() if choice.total <= free_bytes]
    # activations are in proportion to the images
    fitting = int(micro_batch * (free_bytes - needed.state) / max(needed.activations, 1))
    if fitting >= 1 and needed.state + needed.sampling <= free_bytes:
        helpful.insert(0, f"--batch-gpu {1 << (fitting.bit_length() - 1)}")
    advice = f"use {' or '.join(helpful)}"
    if not helpful:
        advice = "none of --batch-gpu, --recompute and --shard suffices; use a larger GPU or a smaller network"
    needs = f"a process needs {needed.total / 1e9:.1f} GB or more, and its GPU has {free_bytes / 1e9:.1f} GB free"
    return f"{needs}; {advice}"
