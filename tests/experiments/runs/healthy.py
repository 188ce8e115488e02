"""The folder of a healthy training run, as training leaves it, made without training."""

import json
from pathlib import Path

import numpy as np

from edm2kit.experiments.runs.expected_loss import DataMoments, filter_loss_between
from edm2kit.training.config import TrainConfig, write_config
from edm2kit.training.learning_rate import learning_rate
from edm2kit.training.loss import noise_bins
from tests.support import runs

DURATION, STATUS = 256_000, 4_000
CONFIG = {
    "data": "images",
    "encoder": {"kind": "rgb"},
    "batch_size": 100,
    "duration_nimg": DURATION,
    "rampup_nimg": 8_000,
    "ref_lr": 0.01,
    "ref_batches": 500,
    "snapshot_every_nimg": 16_000,
    "status_every_nimg": STATUS,
}


def moments() -> DataMoments:
    """Data with a spectrum that falls off, of variance 1/4."""
    powers = 1 / (1 + np.arange(64.0).reshape(1, 8, 8)) ** 1.5
    return DataMoments(0.25, np.repeat(powers * 0.25 / powers.mean(), 3, axis=0), 1000)


def stats(config: TrainConfig) -> list[dict]:
    """Lines of a log: losses fall below those of the filter, gradients shrink a little, speed is even."""
    rng = np.random.default_rng(0)
    goals = {
        name: filter_loss_between(moments(), low, high, config.P_mean, config.P_std, 0.5) - 0.2
        for name, low, high in noise_bins(config.P_mean, config.P_std)
    }
    lines = []
    for nimg in range(STATUS, config.duration_nimg + 1, STATUS):
        progress = nimg / config.duration_nimg
        line = {
            "nimg": nimg,
            "elapsed_sec": nimg / 100,
            "images_per_sec": 100 + rng.normal(),
            "gradient_norm": 1000 * (0.6 + 0.4 * np.exp(-8 * progress)) * np.exp(0.1 * rng.normal()),
            "nonfinite_gradients": 0,
            "lr": learning_rate(nimg, config.batch_size, config.ref_lr, config.ref_batches, config.rampup_nimg),
            "cpu_peak_gb": 1.0,
        }
        for name, goal in goals.items():
            line[name] = goal + (1.2 - goal) * np.exp(-30 * progress) + 0.02 * rng.normal()
        line["loss"] = float(np.mean([line[name] for name in goals]))
        lines.append(line)
    return lines


def heldout(config: TrainConfig) -> list[dict]:
    """Lines of heldout.jsonl without any gap beyond its error."""
    lines = []
    for nimg in range(16_000, config.duration_nimg + 1, 16_000):
        names = ["loss", *(name for name, _, _ in noise_bins(config.P_mean, config.P_std))]
        level = -0.5 + np.exp(-nimg / 20_000)
        lines.append(
            {
                "nimg": nimg,
                "images": 500,
                "heldout": dict.fromkeys(names, level + 0.005),
                "training": dict.fromkeys(names, level),
                "gap_error": dict.fromkeys(names, 0.01),
            }
        )
    return lines


def write_run(folder: Path, snapshots: bool = True, **changes: object) -> Path:
    """A run folder with `changes` in its configuration."""
    config = TrainConfig(**{**CONFIG, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / "config.yaml")
    record = {"run_id": runs.HEADER.run_id, "data_identity": {"num_images": 5000}, "label_names": None}
    (folder / "run.json").write_text(json.dumps(record))
    write_lines(folder / "stats.jsonl", stats(config))
    write_lines(folder / "heldout.jsonl", heldout(config))
    if snapshots:
        runs.write(folder, runs.walk(()).snapshots)
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    """Replace a log."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
