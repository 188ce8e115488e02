"""Peak memory of training against its forecast, each setting in a separate process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness
from benchmarks.trainers import SMALL, images_for, make_trainer, preset_config
from edm2kit.cli import click_types as cli
from edm2kit.models import full_architecture
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import provenance
from edm2kit.training.config import TrainConfig
from edm2kit.training.log import make_forecast

# name -> (ranks, options of the run)
SETTINGS = {
    "plain": (1, {}),
    "recompute": (1, {"recompute": True}),
    "plain, 2 ranks": (2, {}),
    "shard, 2 ranks": (2, {"shard": True}),
    "shard + recompute, 2 ranks": (2, {"shard": True, "recompute": True}),
}


@click.command(cls=cli.Command)
@click.option("--channels", default=128, show_default=True, help="Channels of the first level")
@click.option("--batch", default=4, show_default=True, help="Images per rank and step")
@click.option("--resolution", default=32, show_default=True, help="Side of the images in pixels")
@harness.out_option
@click.option("--worker", type=click.Choice(list(SETTINGS)), hidden=True, help="Measure this setting in this process")
def main(channels: int, batch: int, resolution: int, out: Path, worker: str | None) -> None:
    """Train two steps in every setting; writes memory.json."""
    if worker:
        work(worker, channels, batch, resolution, out)
        return
    rows = [_run(name, channels, batch, resolution) for name in SETTINGS]
    for row in rows:
        click.echo(f"{row['name']:30s} {row['measured_bytes'] / 1e9:.2f} GB, {row['error']:+.1%} from the forecast")
    record = {
        "job": "memory",
        "kind": "memory",
        "channels": channels,
        "batch": batch,
        "resolution": resolution,
        "rows": rows,
        "xxl_bytes": xxl_forecast(),
        "command": harness.command(),
        "provenance": provenance(),
    }
    harness.save(record, out)


def _run(name: str, channels: int, batch: int, resolution: int) -> dict[str, Any]:
    ranks = SETTINGS[name][0]
    with tempfile.TemporaryDirectory() as folder:
        options = {"--worker": name, "--channels": channels, "--batch": batch, "--resolution": resolution}
        worker = [
            "-m",
            "benchmarks.memory",
            *(str(part) for option in options.items() for part in option),
            "--out",
            folder,
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        line = [sys.executable, *launcher, *worker]
        subprocess.run(line, check=True, cwd=harness.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    measured, forecast = max(part["measured_bytes"] for part in found), found[0]["forecast_bytes"]
    return {"name": name, "ranks": ranks, **found[0], "measured_bytes": measured, "error": measured / forecast - 1}


def xxl_forecast() -> dict[str, dict[str, int]]:
    """Forecast bytes per GPU of edm2-img512-xxl at one image per pass: number of GPUs -> options -> bytes."""
    config = preset_config("edm2-img512-xxl", batch_gpu=1)
    architecture = full_architecture(64, 4, 1000, config.sigma_data, config.network)
    found: dict[str, dict[str, int]] = {}
    for ranks in (1, 4, 8):
        forecast = make_forecast(config, architecture, 1, ranks)
        choices = {"as it is": forecast.memory, **forecast.choices}
        found[str(ranks)] = {name: memory.total for name, memory in choices.items()}
    return found


def work(name: str, channels: int, batch: int, resolution: int, out: Path) -> None:
    """Train in one setting and write the result."""
    torch.set_num_threads(1)
    with dist.session("cpu"):
        found = peak_memory(SETTINGS[name][1], channels, batch, resolution)
        (out / f"{dist.rank()}.json").write_text(json.dumps(found))


def peak_memory(options: dict[str, Any], channels: int, batch: int, resolution: int) -> dict[str, Any]:
    """Bytes that two steps add to a process that has trained a tiny network, and their forecast."""
    tiny = TrainConfig(network={**SMALL, "model_channels": 8, "channels_per_head": 8}, batch_size=dist.world_size())
    _train(tiny, 8, 1)
    before = harness.peak_rss()
    network = {**SMALL, "model_channels": channels, "channels_per_head": 32}
    config = TrainConfig(network=network, batch_size=batch * dist.world_size(), **options)
    architecture = _train(config, resolution, batch)
    forecast = make_forecast(config, architecture, batch, dist.world_size())
    return {
        "parameters": forecast.parameters,
        "state_bytes": forecast.memory.state,
        "activation_bytes": forecast.memory.activations,
        "forecast_bytes": forecast.memory.state + forecast.memory.activations,  # no images are generated here
        "measured_bytes": harness.peak_rss() - before,
    }


def _train(config: TrainConfig, resolution: int, batch: int) -> dict[str, Any]:
    trainer = make_trainer(config, resolution)
    for _ in range(2):
        trainer.step(images_for(trainer, batch), 1)
    return dict(trainer.header.architecture)


if __name__ == "__main__":
    main()
