"""What rows cost: time and multiply-adds for an image, taken in turns."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from edm2kit.cli.generation import Generation
from edm2kit.snapshots.file_format import read_header
from edm2kit.torch_utils.provenance import provenance
from edm2kit.training.log import STATS_NAME
from edm2kit.training.run import RECORD_NAME


def measure_costs(generations: Mapping[str, Generation], batch: int, rounds: int) -> dict[str, Any]:
    """Least of `rounds` times, and multiply-adds, per image in batches of `batch`, by row; and what measured them."""
    adds, seconds = {}, {name: float("inf") for name in generations}
    for name, generation in generations.items():
        with FlopCounterMode(display=False) as counter:
            generation.engine.generate(range(batch))
        adds[name] = counter.get_total_flops() / 2 / batch
    for _ in range(rounds):
        for name, generation in generations.items():
            seconds[name] = min(seconds[name], _draw_sec(generation, batch) / batch)
    device = next(iter(generations.values())).engine.device
    rows = {name: {"seconds": round(seconds[name], 5), "multiply_adds": adds[name]} for name in generations}
    return {"rows": rows, "batch": batch, "rounds": rounds, **provenance(device)}


def _draw_sec(generation: Generation, batch: int) -> float:
    started = time.perf_counter()
    drawn = generation.engine.generate(range(batch))
    drawn.images.cpu()  # waits for the device
    return time.perf_counter() - started


def describe_student(snapshot: Path) -> dict[str, Any]:
    """Teacher and training of a student of scripts/distill.py, from its snapshot and the run folder around it.

    Raises ValueError where it is no student, or lies elsewhere.
    """
    header = read_header(snapshot)
    try:
        teacher = header.training_config["teacher"]
        lines = (snapshot.parent / STATS_NAME).read_text(encoding="utf-8").splitlines()
        run = json.loads((snapshot.parent / RECORD_NAME).read_text(encoding="utf-8"))
        seconds = next(line["elapsed_sec"] for line in map(json.loads, lines) if line["nimg"] == header.nimg)
    except (KeyError, OSError, ValueError, StopIteration) as error:
        raise ValueError(f"{snapshot} is no student in the run folder that scripts/distill.py wrote") from error
    training = {"nimg": header.nimg, "seconds": seconds, "ema_std": header.ema_std}
    return {
        "teacher": teacher,
        "training": {**training, **{key: run[key] for key in ("command", "commit", "hardware")}},
    }
