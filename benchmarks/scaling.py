"""Weak scaling on one machine: two ranks of one thread each against two independent processes."""

import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from benchmarks import harness
from benchmarks.step_model import BACKWARD_COST, Links, Machine, TrainingJob, all_reduce_sec, step_time
from benchmarks.trainers import SMALL, Clock, images_for, make_trainer, preset_config
from edm2kit.cli import click_types as cli
from edm2kit.data.batches import MicroBatch
from edm2kit.data.image_files import decode_array
from edm2kit.models import full_architecture
from edm2kit.models.cost import evaluation_cost
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import provenance
from edm2kit.training.config import TrainConfig, preset_names
from edm2kit.training.loop import Trainer

GOAL = 0.85
# way -> processes, share of the batch
WAYS = {"quarter": (1, 0.25), "half": (1, 0.5), "alone": (1, 1), "pair": (2, 1)}
_ALL_REDUCE_BYTES = 32 << 20


@click.command(cls=cli.Command)
@click.option("--rounds", default=2, show_default=True, help="Rounds in which the ways take turns")
@click.option("--steps", default=4, show_default=True, help="Steps per measurement")
@click.option("--batch", default=8, show_default=True, help="Images per rank and step")
@click.option("--channels", default=64, show_default=True, help="Channels of the first level")
@harness.out_option
@click.option("--worker", is_flag=True, hidden=True, help="Measure in this process")
def main(rounds: int, steps: int, batch: int, channels: int, out: Path, worker: bool) -> None:
    """Time one process, two independent ones and two ranks, in turns; writes scaling.json.

    One process with a quarter and a half of the batch gives the step model its speeds; the others test the model.
    """
    if worker:
        work(steps, batch, channels, out)
        return
    ways = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for way, found in ways.items():
                found.append(_run(way, Path(folder), steps, batch, channels))
                click.echo(f"{way:12s} {found[-1][0]['step_sec']:.3f} s per step")
    record = summary(ways, batch, channels) | {"presets": preset_costs(), "png_decodes_per_sec": decoding_speed()}
    harness.save(record, out)
    click.echo(json.dumps({key: record[key] for key in ("step_sec", "efficiency", "overlap", "model")}, indent=1))


def _run(way: str, folder: Path, steps: int, batch: int, channels: int) -> list[dict[str, Any]]:
    """The results of the processes of one way."""
    processes, share = WAYS[way]
    options = {"--steps": steps, "--batch": round(batch * share), "--channels": channels, "--out": folder}
    worker = ["-m", "benchmarks.scaling", "--worker", *(str(part) for option in options.items() for part in option)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
    subprocess.run([sys.executable, *launcher, *worker], env=environment, cwd=harness.ROOT, check=True)
    return [json.loads((folder / f"{k}.json").read_text()) for k in range(processes)]


def summary(ways: dict[str, list[list[dict[str, Any]]]], batch: int, channels: int) -> dict[str, Any]:
    """The record: medians over rounds; the slower of two processes counts."""
    seconds = {way: [found[0]["step_sec"] for found in rounds] for way, rounds in ways.items()}
    step_sec = {way: statistics.median(found) for way, found in seconds.items()}
    middle = {way: found.index(statistics.median_low(found)) for way, found in seconds.items()}
    first = {way: rounds[middle[way]][0] for way, rounds in ways.items()}
    for way in ("independent", "ranks"):
        seconds[way] = [
            max(both) for found in ways["pair"] for both in zip(*(part["blocks"][way] for part in found), strict=True)
        ]
        step_sec[way] = statistics.median(seconds[way])
    by_block = [apart / together for apart, together in zip(seconds["independent"], seconds["ranks"], strict=True)]
    return {
        "job": "scaling",
        "kind": "scaling",
        "channels": channels,
        "batch": batch,
        "parameters": first["pair"]["parameters"],
        "step_sec": step_sec,
        "efficiency": statistics.median(by_block),
        "efficiency_range": [min(by_block), max(by_block)],
        "blocks": len(by_block),
        "goal": GOAL,
        "phases_sec": {way: found["phases_sec"] for way, found in first.items()},
        "overlap": first["pair"]["overlap"],
        "all_reduce_bytes_per_sec": first["pair"]["all_reduce_bytes_per_sec"],
        "model": check_model(step_sec, first, batch),
        "command": harness.command(),
        "provenance": provenance(),
    }


def check_model(step_sec: dict[str, float], found: dict[str, dict[str, Any]], batch: int) -> dict[str, Any]:
    """The step model against measurements; its speeds come from smaller batches and a separate all-reduce."""
    half, bandwidth = found["half"], found["pair"]["all_reduce_bytes_per_sec"]
    links = Links(group=2, inside=bandwidth, between=bandwidth, latency_sec=0)
    job = TrainingJob(half["parameters"], half["multiply_adds"], batch // 2)
    passes = {way: found[way]["phases_sec"]["compute and communication"] for way in ("quarter", "half")}
    speed = BACKWARD_COST + 1
    speed *= job.multiply_adds * (batch // 2 - batch // 4) / (passes["half"] - passes["quarter"])
    memory = step_time(job, Machine(1, 1, links, 0), 1).update / (half["step_sec"] - passes["half"])
    # the processor that computes also moves the bytes, so nothing is hidden
    machine = Machine(speed, memory, links, overlap=0)
    machine = dataclasses.replace(machine, pass_sec=passes["half"] - step_time(job, machine, 1).compute)
    answers = {}
    for way, ranks in (("alone", 1), ("ranks", 2)):
        forecast = step_time(TrainingJob(job.parameters, job.multiply_adds, batch * ranks), machine, ranks)
        answers[way] = {
            "forecast_sec": forecast.total,
            "communication_sec": forecast.communication,
            "measured_sec": step_sec[way],
            "error": forecast.total / step_sec[way] - 1,
        }
    return answers


def preset_costs() -> dict[str, dict[str, float]]:
    """Weights and multiply-adds of the published configurations, for the forecasts of other machines."""
    costs = {}
    for preset in (name for name in preset_names() if name.startswith("edm2-")):
        config = preset_config(preset)
        channels = 4 if "img512" in preset else 3
        cost = evaluation_cost(full_architecture(64, channels, 1000, config.sigma_data, config.network))
        costs[preset] = {"parameters": cost.parameters, "multiply_adds": cost.multiply_adds}
    return costs


def decoding_speed(count: int = 200) -> float:
    """Number of 64x64 RGB PNGs of smooth pictures that one core decodes per second."""
    ramp = np.linspace(0, 255, 64)[:, None, None] * np.linspace(0.5, 1, 64)[:, None] * np.array([1, 0.7, 0.4])
    noise = np.random.default_rng(0).integers(0, 16, ramp.shape)
    file = io.BytesIO()
    Image.fromarray((ramp * 0.9 + noise).astype(np.uint8)).save(file, "png")
    run = partial(_decode, file.getvalue(), count)
    return count / statistics.median(harness.interleave({"png": run})["png"])


def _decode(data: bytes, count: int) -> None:
    for _ in range(count):
        decode_array(data, "a png in memory")


def work(steps: int, batch: int, channels: int, out: Path) -> None:
    """Train for some steps on one core and write the times."""
    core = int(os.environ["LOCAL_RANK"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    torch.set_num_threads(1)
    harness.keep_memory()
    with dist.session("cpu"):
        found = time_steps(steps, batch, channels)
        (out / f"{core}.json").write_text(json.dumps(found))


def time_steps(steps: int, batch: int, channels: int) -> dict[str, Any]:
    """Seconds of a step and its phases on this rank; with two ranks also the overlap of communication."""
    network = {**SMALL, "model_channels": channels, "channels_per_head": min(channels, 64)}
    config = TrainConfig(network=network, batch_size=batch * dist.world_size(), rampup_nimg=0)
    trainer = make_trainer(config)
    stream, clock, seconds = images_for(trainer, batch), Clock(), []
    for _ in range(2):
        trainer.step(stream, 1)
    clock.watch(trainer.optimizer, "step", "update")
    clock.watch(trainer.ema, "update", "averages")
    clock.watch(trainer, "_sanitize_gradients", "cleaning")
    clock.watch(trainer, "_accumulate", "compute and communication")
    for _ in range(steps):
        dist.barrier()
        began = time.perf_counter()
        trainer.step(stream, 1)
        dist.any_rank(False)  # as the training loop does after each step
        seconds.append(time.perf_counter() - began)
    phases = {name: total / steps for name, total in clock.seconds.items()}
    phases["normalising"] = max(sum(seconds) / steps - sum(phases.values()), 0)
    found = {
        "step_sec": statistics.median(seconds),
        "phases_sec": phases,
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "multiply_adds": evaluation_cost(trainer.header.architecture).multiply_adds,
    }
    if dist.world_size() > 1:
        found["blocks"] = apart_and_together(trainer, stream, steps)
        found["all_reduce_bytes_per_sec"] = all_reduce_speed()
        found["overlap"] = watch_overlap(trainer, stream)
    return found


def apart_and_together(trainer: Trainer, stream: Iterator[MicroBatch], blocks: int) -> dict[str, list[float]]:
    """Seconds per step in blocks of two steps: independently, and as ranks that communicate.

    The two take turns within the same processes, since a machine's pace changes from minute to minute by more than the
    difference to be measured.
    """
    together, seconds = trainer.ddp, {"independent": [], "ranks": []}
    for _ in range(blocks):
        for way, found in seconds.items():
            trainer.ddp = together if way == "ranks" else trainer.net
            dist.barrier()
            began = time.perf_counter()
            for _ in range(2):
                trainer.step(stream, 1)
                if way == "ranks":
                    dist.any_rank(False)  # as the training loop does after each step
            found.append((time.perf_counter() - began) / 2)
    return seconds


def all_reduce_speed() -> float:
    """Bytes per second in the sense of `Links`, of an all-reduce with nothing else going on."""
    tensor, seconds = torch.ones(_ALL_REDUCE_BYTES // 4), []
    for _ in range(7):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce_sum_(tensor)
        seconds.append(time.perf_counter() - began)
    unit = Links(dist.world_size(), 1, 1, 0)
    return all_reduce_sec(_ALL_REDUCE_BYTES, unit, dist.world_size()) / statistics.median(seconds)


def watch_overlap(trainer: Trainer, stream: Iterator[MicroBatch]) -> dict[str, Any]:
    """How much of the gradients is sent before the last one is computed, and how long the step waits after it."""
    sent: list[tuple[float, int]] = []

    def hook(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append((time.perf_counter(), bucket.buffer().numel() * 4))
        return default_hooks.allreduce_hook(None, bucket)

    trainer.ddp.register_comm_hook(None, hook)
    accumulate = trainer._accumulate
    ended = []

    def and_note(batch: Any) -> None:
        accumulate(batch)
        ended.append(time.perf_counter())

    trainer._accumulate = and_note
    trainer.step(stream, 1)
    began, total = sent[0][0], sum(count for _, count in sent)
    return {
        "buckets": len(sent),
        "bucket_bytes": [count for _, count in sent],
        "sent_before_end_sec": [ended[0] - when for when, _ in sent],
        "share_before_the_last": 1 - sent[-1][1] / total,
        "first_bucket_before_end_sec": ended[0] - began,
        "waited_after_last_gradient_sec": ended[0] - sent[-1][0],
    }


if __name__ == "__main__":
    main()
