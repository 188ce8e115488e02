"""What all checks together cost in training: steps with and without them take turns in one process.

Each step reads its images from a zip, all of them for the first time, so that every checksum is compared.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed
from PIL import Image

from benchmarks import harness
from benchmarks.trainers import SMALL, make_trainer
from edm2kit.cli import click_types as cli
from edm2kit.data.archive import ZipArchive
from edm2kit.data.batches import MicroBatch
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.image_files import encode_png
from edm2kit.data.output import PartialDataset
from edm2kit.torch_utils.files import provenance
from edm2kit.torch_utils.heartbeat import BEAT_SEC, Heartbeat
from edm2kit.training.checkpoint import check_finite, checkpoint_state, damage, list_checkpoints, save_checkpoint
from edm2kit.training.config import TrainConfig
from edm2kit.training.loop import Trainer

GOAL = 0.01
RESOLUTION, CLASSES = 32, 10
CHECKPOINT_EVERY_SEC = 1800.0  # more often than by default


@click.command(cls=cli.Command)
@click.option("--pairs", metavar="N", type=cli.AtLeast(int, 3), default=40, help="Steps of each kind")
@click.option("--batch", metavar="N", type=cli.AtLeast(int, 1), default=16, help="Images per step")
@harness.out_option
def main(pairs: int, batch: int, out: Path) -> None:
    """Measure steps with and without checks, and what the rarer checks add; writes checks.json."""
    torch.set_num_threads(1)
    harness.keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        source = ImageDataset(write_pictures(Path(folder) / "pictures.zip", 8 * batch))
        config = TrainConfig(network=SMALL, batch_size=batch, max_lost_steps=10)
        trainer = make_trainer(config, RESOLUTION, 3, CLASSES)
        steps = measure_steps(trainer, source, batch, pairs)
        step_sec = statistics.median(steps["cpu_sec"]["with"])
        # the finite state is looked at with every status line, which comes once in so many steps by default
        every = TrainConfig().status_every_nimg // TrainConfig().batch_size
        finite_sec = cpu_sec(lambda: check_finite(trainer.net, trainer.optimizer, trainer.ema, trainer.nimg), 7)
        progress = {"nimg": trainer.nimg, "elapsed_sec": 1.0, "run_id": "a"}
        save_checkpoint(Path(folder), checkpoint_state(trainer.net, trainer.optimizer, trainer.ema, progress))
        damage_sec = cpu_sec(lambda: damage(list_checkpoints(Path(folder))[-1]), 5)
    beat_sec = beat()
    shares = {
        "gradients made finite, lost steps counted, checksums of records": statistics.median(steps["share_of_checks"]),
        "weights, moments and averages finite, with each status line": finite_sec / (every * step_sec),
        "heartbeat of two ranks": beat_sec / BEAT_SEC,
        "each checkpoint read again, every 30 minutes": damage_sec / CHECKPOINT_EVERY_SEC,
    }
    record = {
        "job": "checks",
        "batch": batch,
        "resolution": RESOLUTION,
        "parameters": sum(parameter.numel() for parameter in trainer.net.parameters()),
        "pairs": pairs,
        "goal": GOAL,
        "step_sec": step_sec,
        "ratios": steps["ratios"],
        "steps_per_status": every,
        "seconds": {"finite": finite_sec, "checkpoint": damage_sec, "beat": beat_sec},
        "shares": shares,
        "total": sum(shares.values()),
        "load_average": os.getloadavg()[0],
        "command": harness.command(),
        "provenance": provenance(),
        "cpu": harness.cpu(),
    }
    for name, share in shares.items():
        click.echo(f"{share:8.4%}  {name}")
    for clock, found in steps["ratios"].items():
        click.echo(f"steps with checks take {found['median']:.4f} of those without ({clock}, +- {found['error']:.4f})")
    harness.save(record, out)


def write_pictures(path: Path, count: int) -> Path:
    """A training set of random pictures, as convert writes it."""
    random = np.random.default_rng(0)
    with PartialDataset(path, {"images": count}) as output:
        for k in range(count):
            pixels = random.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
            output.add(f"{k:08d}.png", encode_png(Image.fromarray(pixels)))
        output.finish({"labels": None})
    return path


def measure_steps(trainer: Trainer, source: ImageDataset, batch: int, pairs: int) -> dict[str, Any]:
    """Ratios of steps with checks to those without, in turns; and the share of a step's time inside its checks."""
    assert isinstance(source._archive, ZipArchive)
    own, spent = _Switch(trainer), _Spent()
    stream = _batches(source, batch)
    wall: dict[str, list[float]] = {"with": [], "without": []}
    cpu: dict[str, list[float]] = {"with": [], "without": []}
    shares: list[float] = []
    for number in range(-1, pairs):
        for kind in ("with", "without") if number % 2 else ("without", "with"):
            source._archive._verified[:] = kind == "without"
            own.switch(kind == "with", spent)
            spent.seconds = 0.0
            began = time.perf_counter(), time.process_time()
            trainer.step(stream, 1)
            trainer.check_gradients()
            ended = time.perf_counter(), time.process_time()
            if number >= 0:
                wall[kind].append(ended[0] - began[0])
                cpu[kind].append(ended[1] - began[1])
                if kind == "with":
                    shares.append((spent.seconds + _checksums_sec(source, batch)) / (ended[1] - began[1]))
    return {
        "cpu_sec": cpu,
        "share_of_checks": shares,
        "ratios": {"processor time": _ratio(cpu), "wall time": _ratio(wall)},
    }


class _Spent:
    """Processor time inside checks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, check: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            began = time.process_time()
            check()
            self.seconds += time.process_time() - began

        return run


class _Switch:
    """Switches the checks of a trainer on and off."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.checks = trainer, (trainer._sanitize_gradients, trainer.check_gradients)

    def switch(self, on: bool, spent: _Spent) -> None:
        names = ("_sanitize_gradients", "check_gradients")
        for name, check in zip(names, self.checks, strict=True):
            setattr(self.trainer, name, spent.timed(check) if on else lambda: None)


def _batches(source: ImageDataset, batch: int) -> Iterator[MicroBatch]:
    position = 0
    while True:
        indices = np.arange(position, position + batch) % len(source)
        labels = torch.eye(CLASSES)[torch.arange(batch) % CLASSES]
        yield MicroBatch(torch.from_numpy(source.read(indices)), labels, torch.arange(position, position + batch))
        position += batch


def _checksums_sec(source: ImageDataset, batch: int) -> float:
    """Processor time that comparing the checksums of a batch takes: reading it with and without."""
    assert isinstance(source._archive, ZipArchive)
    times = []
    for verified in (False, True):
        found = []
        for _ in range(5):
            source._archive._verified[:] = verified
            began = time.process_time()
            source.read(np.arange(batch))
            found.append(time.process_time() - began)
        times.append(min(found))
    return max(times[0] - times[1], 0.0)


def _ratio(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median over pairs, and its standard error."""
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    error = 1.253 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median
    return {"median": statistics.median(ratios), "error": error}


def cpu_sec(work: Callable[[], object], runs: int) -> float:
    """The median processor time of `work`."""
    found = []
    for _ in range(runs):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def beat() -> float:
    """Processor time of one report and look, the store in this process included."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    ranks = [Heartbeat(store, rank, 2, lambda: 0, lambda text: None) for rank in range(2)]
    ranks[1].beat()
    return cpu_sec(ranks[0].beat, 50)


if __name__ == "__main__":
    main()
