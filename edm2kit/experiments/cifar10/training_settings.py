"""Which training settings suit few small images: short runs that differ from the preset in one setting each."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.cli.generation import prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.experiments.cifar10.measure import compared, real_features, reference_file, save_array
from edm2kit.experiments.cifar10.settings import BATCH, DETECTORS, UNGUIDED_SAMPLER
from edm2kit.experiments.documents import markdown_table
from edm2kit.metrics.detectors.registry import load_detectors
from edm2kit.metrics.reference import load_reference
from edm2kit.metrics.scoring import REPLICATES, Scorer, image_features
from edm2kit.snapshots.file_format import read_header, snapshot_name
from edm2kit.torch_utils.files import provenance, write_json

TRIED_RECORD = "settings.json"  # in the folder of the study
EMA_STD = 0.1
METRICS = ("fd_lite0", "fd_lite0.fd_infinity", "fd_lite0.precision", "fd_lite0.recall")
# what is tried -> (title, options of train.py beside --preset cifar10); the first two differ by chance only, and the
# others mostly in one setting
TRIED: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": ("the preset", ()),
    "seed_2": ("the preset, another seed", ("--seed", "2")),
    "lr_0p01": ("learning rate 0.01", ("--lr", "0.01")),
    "lr_0p04": ("learning rate 0.04", ("--lr", "0.04")),
    "lr_0p08": ("learning rate 0.08", ("--lr", "0.08")),
    "decay_250": ("decay after 250 batches", ("--decay", "250")),
    "decay_4000": ("decay after 4,000 batches", ("--decay", "4000")),
    "batch_16": ("batch 16", ("--batch", "16")),
    "batch_16_lr_0p01": ("batch 16, learning rate 0.01", ("--batch", "16", "--lr", "0.01")),
    "batch_16_lr_0p04": ("batch 16, learning rate 0.04", ("--batch", "16", "--lr", "0.04")),
    "batch_128": ("batch 128", ("--batch", "128")),
    "P_-0p8_1p6": ("P_mean -0.8, P_std 1.6", ("--P_mean", "-0.8", "--P_std", "1.6")),
    "P_-0p4_1p0": ("P_mean -0.4, P_std 1.0", ("--P_mean", "-0.4", "--P_std", "1.0")),
    "P_-1p0_1p4": ("P_mean -1.0, P_std 1.4", ("--P_mean", "-1.0", "--P_std", "1.4")),
    "label_dropout_0": ("no label dropout", ("--label-dropout", "0")),
    "dropout_0p1": ("dropout 0.1", ("--dropout", "0.1")),
    "flip": ("mirrored images", ("--flip", "yes")),
}


def try_settings(out: Path, nimg: int, num: int, device: str, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train every entry of TRIED on `nimg` images, and score `num` images of each with the same seeds.

    Snapshots are in OUT/settings/NAME, points in OUT/settings.json; what is there is not made again. Raises ValueError
    if a training run fails or is stopped.
    """
    path = out / TRIED_RECORD
    points: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for name in TRIED:
        snapshot = out / "settings" / name / snapshot_name(nimg, EMA_STD)
        if not snapshot.exists():
            _train(out, name, nimg, device)
        if any(point["name"] == name and (point["nimg"], point["num"]) == (nimg, num) for point in points):
            continue
        config = read_header(snapshot).training_config
        measured = _score(out, snapshot, num)
        points.append(
            {
                "name": name,
                "nimg": nimg,
                "num": num,
                "config": {**config, "data": Path(config["data"]).name},
                "results": dict(measured.values),
                "intervals": {metric: list(bounds) for metric, bounds in measured.intervals.items()},
                **provenance(torch.device("cpu")),
            }
        )
        write_json(path, points)
        report(f"{TRIED[name][0]}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in measured.values.items()))
    return points


def _train(out: Path, name: str, nimg: int, device: str) -> None:
    words = ["--preset", "cifar10", *TRIED[name][1], "--data", str(out / "train.zip"), "--device", device]
    words += ["--duration", str(nimg), "--snapshot", str(nimg), "--outdir", str(out / "settings" / name)]
    done = subprocess.run([sys.executable, "-m", "edm2kit.cli.train", *words, "--samples", "0", "--workers", "0"])
    if done.returncode:
        raise ValueError(f"the training run {name} ended with exit code {done.returncode}; see above")


def _score(out: Path, snapshot: Path, num: int) -> Any:
    cpu = torch.device("cpu")
    detectors = load_detectors(DETECTORS[:1], cpu)
    kept = snapshot.with_name(f"{snapshot.stem}-{num}-{detectors[0].name}.npy")
    if not kept.exists():
        request = parse_request(["--net", str(snapshot), *UNGUIDED_SAMPLER, "--balanced"])
        batches = (batch.images for batch in prepare(request, cpu).batches(range(num), BATCH))
        save_array(kept, image_features(batches, detectors, cpu)[detectors[0].name])
    real = compared(real_features(out, DETECTORS[:1]), num)
    scorer = Scorer(load_reference(reference_file(out)), detectors, cpu, real, names=METRICS, replicates=REPLICATES)
    return scorer.measure_features({detectors[0].name: torch.from_numpy(np.load(kept))})


def settings_table(points: Sequence[Mapping[str, Any]]) -> str:
    """The table of the README: each setting, its scores with intervals, and the difference from the preset."""
    if not points:
        return "Not measured yet."
    base = next(point for point in points if point["name"] == "base")
    rows = []
    for point in sorted(points, key=lambda point: list(TRIED).index(point["name"])):
        value = point["results"]["fd_lite0.fd_infinity"]
        low, high = point["intervals"]["fd_lite0.fd_infinity"]
        change = value - base["results"]["fd_lite0.fd_infinity"]
        rows.append(
            (
                TRIED[point["name"]][0],
                f"{value:.1f} ({low:.1f} to {high:.1f})",
                "" if point is base else f"{change:+.1f}",
                f"{point['results']['fd_lite0']:.1f}",
                f"{point['results']['fd_lite0.precision']:.3f}",
                f"{point['results']['fd_lite0.recall']:.3f}",
            )
        )
    return markdown_table(("setting", "fd_infinity", "change", "fd_lite0", "precision", "recall"), rows, "lrrrrr")
