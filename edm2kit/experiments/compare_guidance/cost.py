"""Cost of the rows: time and multiply-adds per image; and what the training of a distilled network took."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from edm2kit.cli.generation import Generation
from edm2kit.experiments.runs.folder import read_log
from edm2kit.snapshots.file_format import read_header
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import provenance
from edm2kit.training.log import STATS_NAME
from edm2kit.training.run import RECORD_NAME


class _Counter(TorchDispatchMode):
    """Counts the operations of everything that runs inside, gradients included.

    PyTorch's own FlopCounterMode also sorts them by module, and fails where `torch.autograd.grad` is called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = flop_registry.get(func._overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def count_multiply_adds(generation: Generation, batch: int) -> float:
    """Multiply-adds per image of a batch of `batch` images, of all networks and all steps together."""
    with _Counter() as counter:
        generation.engine.generate(range(batch))
    return counter.total / 2 / batch


def measure_costs(generations: Mapping[str, Generation], batch: int, rounds: int) -> dict[str, Any]:
    """Minimum of `rounds` times and multiply-adds, both per image in batches of `batch`, by row; and the provenance.

    The rows take turns, so that a change of the machine's pace affects all of them.
    """
    multiply_adds, seconds = {}, dict.fromkeys(generations, float("inf"))
    with progress_bar(len(generations) * (rounds + 1), "batch", what="cost") as bar:
        for name, generation in generations.items():
            multiply_adds[name] = count_multiply_adds(generation, batch)
            bar.update()
        for _ in range(rounds):
            for name, generation in generations.items():
                started = time.perf_counter()
                generation.engine.generate(range(batch)).images.cpu()  # .cpu() waits for the device
                seconds[name] = min(seconds[name], (time.perf_counter() - started) / batch)
                bar.update()
    device = next(iter(generations.values())).engine.device
    rows = {name: {"seconds": round(seconds[name], 5), "multiply_adds": multiply_adds[name]} for name in generations}
    return {"rows": rows, "batch": batch, "rounds": rounds, **provenance(device)}


def describe_student(snapshot: Path) -> dict[str, Any]:
    """Teacher and training of a network distilled by scripts/distill.py, from its snapshot and run folder.

    Raises ValueError if the snapshot was not distilled, or is not in its run folder any more.
    """
    header = read_header(snapshot)
    try:
        teacher = header.training_config["teacher"]
        lines, _ = read_log(snapshot.parent / STATS_NAME)
        run = json.loads((snapshot.parent / RECORD_NAME).read_text(encoding="utf-8"))
        seconds = next(line["elapsed_sec"] for line in lines if line["nimg"] == header.nimg)
    except (KeyError, OSError, ValueError, TypeError, StopIteration, RecursionError) as error:
        raise ValueError(f"{snapshot} is not a distilled network in the run folder of scripts/distill.py") from error
    training = {"nimg": header.nimg, "seconds": seconds, "ema_std": header.ema_std}
    training |= {key: run[key] for key in ("command", "commit", "hardware")}
    return {"teacher": teacher, "training": training}
