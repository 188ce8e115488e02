"""How cost grows: images per second against batch, resolution and width of the network."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness
from benchmarks.trainers import SMALL, images_for, make_trainer
from edm2kit.cli import click_types as cli
from edm2kit.models import Precond, full_architecture
from edm2kit.models.cost import evaluation_cost
from edm2kit.models.edm2 import freeze_
from edm2kit.torch_utils.files import provenance
from edm2kit.training.config import TrainConfig

BASE = {"batch": 8, "resolution": 32, "channels": 32}
AXES = {"batch": (1, 2, 4, 8, 16, 32), "resolution": (8, 16, 32, 64), "channels": (16, 32, 64, 128)}
TOY_AXES = {"batch": (1, 2), "resolution": (8, 16), "channels": (8, 16)}
UNITS = {
    "batch": "batch: images",
    "resolution": "resolution: pixels per side",
    "channels": "size: channels of the first level",
}


@click.command(cls=cli.Command)
@harness.runs_option(5)
@click.option("--toy", is_flag=True, help="Use tiny shapes, to test the script")
@harness.out_option
def main(runs: int, toy: bool, out: Path) -> None:
    """Measure speed along each axis around batch 8, 32x32 pixels, 32 channels; writes growth.json."""
    base = {"batch": 2, "resolution": 8, "channels": 8} if toy else BASE
    axes = {axis: measure_axis(axis, values, base, runs) for axis, values in (TOY_AXES if toy else AXES).items()}
    record = {
        "job": "growth",
        "kind": "growth",
        "base": base,
        "axes": axes,
        "runs": runs,
        "command": harness.command(),
        "provenance": provenance(),
    }
    harness.save(record, out)


def measure_axis(axis: str, values: tuple[int, ...], base: Mapping[str, int], runs: int) -> list[dict[str, Any]]:
    """Images per second of evaluations and training steps at each value of one axis, the others at `base`."""
    points = [{**base, axis: value} for value in values]
    ways = {"evaluation": evaluation, "training": training_step}
    contenders = {f"{way} {k}": make(**point) for way, make in ways.items() for k, point in enumerate(points)}
    seconds = {label: statistics.median(found) for label, found in harness.interleave(contenders, runs, 1).items()}
    rows = []
    for k, point in enumerate(points):
        row = {axis: point[axis], "multiply_adds": evaluation_cost(architecture(**point)).multiply_adds}
        for way in ways:
            row[f"{way}_images_per_sec"] = point["batch"] / seconds[f"{way} {k}"]
        rows.append(row)
        click.echo("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return rows


def network(channels: int) -> dict[str, Any]:
    return {**SMALL, "model_channels": channels, "channels_per_head": min(channels, 64)}


def architecture(batch: int, resolution: int, channels: int) -> dict[str, Any]:
    return full_architecture(resolution, 3, 10, 0.5, network(channels))


def evaluation(batch: int, resolution: int, channels: int) -> Callable[[], object]:
    """One evaluation of `batch` images, as in sampling."""
    net = freeze_(Precond(**architecture(batch, resolution, channels)))
    x, sigma = torch.randn(batch, 3, resolution, resolution), torch.ones(batch)
    labels = torch.eye(10)[torch.arange(batch) % 10]
    return torch.no_grad()(partial(net, x, sigma, labels))


def training_step(batch: int, resolution: int, channels: int) -> Callable[[], object]:
    """One complete training step on `batch` images."""
    trainer = make_trainer(TrainConfig(network=network(channels), batch_size=batch, rampup_nimg=0), resolution)
    return partial(trainer.step, images_for(trainer, batch), 1)


if __name__ == "__main__":
    main()
