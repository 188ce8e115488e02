"""Weak scaling on one machine: two ranks of one thread against two processes that know nothing of each other."""

import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.step_model import BACKWARD_COST, Job, Links, Machine, all_reduce_sec, step_time
from benchmarks.trainers import SMALL, Clock, images_for, make_trainer, preset_config
from torch_utils import cli, dist
from torch_utils.provenance import provenance
from training.config import TrainConfig, preset_names
from training.flops import evaluation_cost
from training.images import decode_array
from training.networks import full_architecture

GOAL = 0.85
# way -> processes, share of the batch
WAYS = {"quarter": (1, 0.25), "half": (1, 0.5), "alone": (1, 1), "independent": (2, 1), "ranks": (2, 1)}
_ALL_REDUCE_BYTES = 32 << 20


@click.command(cls=cli.Command)
@click.option("--rounds", default=3, show_default=True, help="Times that the ways take turns.")
@click.option("--steps", default=5, show_default=True, help="Steps measured in each.")
@click.option("--batch", default=8, show_default=True, help="Images of a rank and step.")
@click.option("--channels", default=64, show_default=True, help="Width of the network.")
@click.option("--out", type=click.Path(path_type=Path), default=harness.RECORDS, help="Folder of the record.")
@click.option("--worker", is_flag=True, hidden=True, help="Be one of the processes that are measured.")
def main(rounds: int, steps: int, batch: int, channels: int, out: Path, worker: bool) -> None:
    """Time one process alone, two side by side and two ranks, in turns, and write scaling.json.

    One process with a quarter and with half of the batch gives the step model its speeds, so that the others test it.
    """
    if worker:
        work(steps, batch, channels, out)
        return
    ways = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for way, found in ways.items():
                found.append(_run(way, Path(folder), steps, batch, channels))
                click.echo(f"{way:12s} {found[-1][0]['step_sec']:.3f} s a step")
    record = summary(ways, batch, channels) | {"presets": preset_costs(), "png_decodes_per_sec": decoding_speed()}
    harness.save(record, out)
    click.echo(json.dumps({key: record[key] for key in ("step_sec", "efficiency", "overlap", "model")}, indent=1))


def _run(way: str, folder: Path, steps: int, batch: int, channels: int) -> list[dict[str, Any]]:
    """What each process of one way found."""
    processes, share = WAYS[way]
    options = {"--steps": steps, "--batch": round(batch * share), "--channels": channels, "--out": folder}
    worker = [__file__, "--worker", *(str(part) for option in options.items() for part in option)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if way == "ranks" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, *launcher, *worker], env={**environment, "LOCAL_RANK": str(k)})
        for k in range(1 if way == "ranks" else processes)
    ]
    if any([process.wait() for process in started]):  # a list: wait for all of them
        raise ValueError(f"a process of the way {way!r} failed")
    return [json.loads((folder / f"{k}.json").read_text()) for k in range(processes)]


def summary(ways: dict[str, list[list[dict[str, Any]]]], batch: int, channels: int) -> dict[str, Any]:
    """The record: medians over rounds, the slowest process of each counting."""
    slowest = {way: [max(process["step_sec"] for process in found) for found in ways[way]] for way in ways}
    step_sec = {way: statistics.median(seconds) for way, seconds in slowest.items()}
    by_round = [two / ranks for two, ranks in zip(slowest["independent"], slowest["ranks"], strict=True)]
    middle = {way: seconds.index(statistics.median_low(seconds)) for way, seconds in slowest.items()}
    first = {way: rounds[middle[way]][0] for way, rounds in ways.items()}
    return {
        "job": "scaling",
        "kind": "scaling",
        "channels": channels,
        "batch": batch,
        "parameters": first["ranks"]["parameters"],
        "step_sec": step_sec,
        "efficiency": statistics.median(by_round),
        "efficiency_range": [min(by_round), max(by_round)],
        "goal": GOAL,
        "phases_sec": {way: found["phases_sec"] for way, found in first.items()},
        "overlap": first["ranks"]["overlap"],
        "all_reduce_bytes_per_sec": first["ranks"]["all_reduce_bytes_per_sec"],
        "model": check_model(step_sec, first, batch),
        "command": " ".join(["python", *sys.argv]),
        "provenance": provenance(),
    }


def check_model(step_sec: dict[str, float], found: dict[str, dict[str, Any]], batch: int) -> dict[str, Any]:
    """The step model against measurements; its speeds are those of smaller batches and of an all-reduce by itself."""
    half, bandwidth = found["half"], found["ranks"]["all_reduce_bytes_per_sec"]
    links = Links(group=2, inside=bandwidth, between=bandwidth, latency_sec=0)
    job = Job(half["parameters"], half["multiply_adds"], batch // 2)
    passes = {way: found[way]["phases_sec"]["compute and communication"] for way in ("quarter", "half")}
    speed = BACKWARD_COST + 1
    speed *= job.multiply_adds * (batch // 2 - batch // 4) / (passes["half"] - passes["quarter"])
    memory = step_time(job, Machine(1, 1, links, 0), 1).update / (half["step_sec"] - passes["half"])
    # the processor that computes moves the bytes: nothing hides
    machine = Machine(speed, memory, links, overlap=0)
    machine = dataclasses.replace(machine, pass_sec=passes["half"] - step_time(job, machine, 1).compute)
    answers = {}
    for way, ranks in (("alone", 1), ("ranks", 2)):
        forecast = step_time(Job(job.parameters, job.multiply_adds, batch * ranks), machine, ranks)
        answers[way] = {
            "forecast_sec": forecast.total,
            "communication_sec": forecast.communication,
            "measured_sec": step_sec[way],
            "error": forecast.total / step_sec[way] - 1,
        }
    return answers


def preset_costs() -> dict[str, dict[str, float]]:
    """Weights and multiply-adds of the published configurations, for the forecast on machines that are not here."""
    costs = {}
    for preset in (name for name in preset_names() if name.startswith("edm2-")):
        config = preset_config(preset)
        channels = 4 if "img512" in preset else 3
        cost = evaluation_cost(full_architecture(64, channels, 1000, config.sigma_data, config.network))
        costs[preset] = {"parameters": cost.parameters, "multiply_adds": cost.multiply_adds}
    return costs


def decoding_speed(count: int = 200) -> float:
    """64x64 RGB PNGs of smooth pictures that one core decodes in a second."""
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
    """Train for some steps on one core and write what they took."""
    core = int(os.environ["LOCAL_RANK"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    torch.set_num_threads(1)
    harness.keep_memory()
    with dist.session("cpu"):
        found = time_steps(steps, batch, channels)
        (out / f"{core}.json").write_text(json.dumps(found))


def time_steps(steps: int, batch: int, channels: int) -> dict[str, Any]:
    """Seconds of a step and of its phases, on this rank; with two ranks also what their communication does."""
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
        dist.any_rank(False)  # as the training loop asks after each step
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
        found["all_reduce_bytes_per_sec"] = all_reduce_speed()
        found["overlap"] = watch_overlap(trainer, stream)
    return found


def all_reduce_speed() -> float:
    """Bytes a second in the sense of `Links`: of a sum that all ranks wait for, nothing else going on."""
    tensor, seconds = torch.ones(_ALL_REDUCE_BYTES // 4), []
    for _ in range(7):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce_sum_(tensor)
        seconds.append(time.perf_counter() - began)
    unit = Links(dist.world_size(), 1, 1, 0)
    return all_reduce_sec(_ALL_REDUCE_BYTES, unit, dist.world_size()) / statistics.median(seconds)


def watch_overlap(trainer: Any, stream: Any) -> dict[str, Any]:
    """How much of the gradients is on its way before the last of them is computed, and how long is waited then."""
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
