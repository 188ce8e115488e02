"""The smallest real thing: a hundred pictures, a network that trains on them in seconds, and ways to run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.support import ROOT

TINY = {
    "network": {
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "channels_per_head": 8,
    },
    "ref_lr": 0.01,
    "ref_batches": 100,
    "rampup_nimg": 40,
    "duration_nimg": 160,
    "batch_size": 16,
    "workers": 0,
    "status_every_nimg": 80,
    "snapshot_every_nimg": 1000,
    "checkpoint_every_nimg": 64,
}


def make_dataset(folder: Path, num_images: int = 100, num_classes: int = 4, channels: int = 3, size: int = 8) -> Path:
    """A folder of random pictures with dataset.json (none where `num_classes` is 0)."""
    random, labels = np.random.default_rng(0), []
    for k in range(num_images):
        path = folder / "00000" / f"img{k:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (size, size, channels), dtype=np.uint8)
        Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(path)
        labels.append([f"00000/{path.name}", k % max(num_classes, 1)])
    if num_classes:
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def write_config(path: Path, **changes: object) -> Path:
    """The tiny configuration as a YAML file, with `changes`."""
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def command(script: str, *arguments: object, ranks: int = 1) -> list[str]:
    """The command line that runs one of the project's scripts, under torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(ROOT / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread a process, and output as it comes."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(script: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run a script of the project to its end, whatever its exit code, with its output."""
    return subprocess.run(
        command(script, *arguments, ranks=ranks), capture_output=True, text=True, env=environment(), timeout=240
    )
