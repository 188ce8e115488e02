"""The search of the best settings, and their scores, kept in files, so that what is stopped resumes."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.cli.generation import prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.image_source import image_batches, open_images
from edm2kit.experiments.cifar10.networks import describe, is_searched, search_folder, settings_file, words
from edm2kit.experiments.cifar10.settings import (
    BATCH,
    DETECTORS,
    GUIDES,
    HALVINGS,
    INFINITY,
    LARGE_METRICS,
    METHODS,
    METRICS,
    PART,
    REAL_IMAGES,
    TUNED_ON,
)
from edm2kit.metrics.detectors.registry import load_detectors
from edm2kit.metrics.moments import Moments, statistics_of
from edm2kit.metrics.reference import load_reference, save_reference
from edm2kit.metrics.scoring import REPLICATES, Scorer, image_features, measure_reference
from edm2kit.torch_utils.files import atomic_write, provenance, write_json

_CPU = torch.device("cpu")


def real_features(out: Path, detectors: Sequence[str] = DETECTORS) -> dict[str, torch.Tensor]:
    """The features of REAL_IMAGES training images, float32 [N, F] by detector; kept in OUT/real."""
    found = {}
    for name in detectors:
        path = out / "real" / f"{name}.npy"
        if not path.exists():
            images = open_images(out / "train.zip")
            picked = np.linspace(0, len(images) - 1, min(REAL_IMAGES, len(images))).astype(int)
            batches = image_batches(images, picked, 32, 1)
            save_array(path, image_features(batches, load_detectors([name], _CPU), _CPU)[name])
        found[name] = torch.from_numpy(np.load(path))
    return found


def save_array(path: Path, values: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        np.save(stream, values.numpy())


def reference_file(out: Path) -> Path:
    """OUT/reference.npz: the statistics that distances are measured from.

    Those of the first detector are of all training images, those of the others, which take longer, of REAL_IMAGES.
    """
    path = out / "reference.npz"
    if not path.exists():
        images = open_images(out / "train.zip")
        found = measure_reference(image_batches(images, range(len(images)), 32, 1), DETECTORS[:1], _CPU)
        statistics = dict(found.statistics)
        for name, rows in real_features(out, DETECTORS[1:]).items():
            moments = Moments(rows.shape[1])
            moments.add(rows)
            statistics |= statistics_of(load_detectors([name], _CPU), [moments])[1]
        save_reference(path, replace(found, statistics=statistics))
    return path


def compared(real: Mapping[str, torch.Tensor], num: int) -> dict[str, torch.Tensor]:
    """At most `num` rows of the features of each detector, evenly over the classes."""
    return {name: rows[torch.linspace(0, len(rows) - 1, min(num, len(rows))).long()] for name, rows in real.items()}


def tune(out: Path, num: int, names: Sequence[str]) -> None:
    """Search the best settings of each method of METHODS in `names` by edm2kit-tune; a search that ended is skipped.

    Raises ValueError if a search fails.
    """
    reference_file(out)
    for name in names:
        if is_searched(out, name):
            continue
        # a process of its own, as a search ends by itself, takes signals, and may be started several times
        done = subprocess.run([sys.executable, "-m", "edm2kit.cli.tune", *search_words(out, name, num)])
        if done.returncode:
            raise ValueError(f"the search of {name} ended with exit code {done.returncode}; see above")


def search_words(out: Path, name: str, num: int) -> list[str]:
    """The command line of `edm2kit-tune` for a method of METHODS."""
    method = METHODS[name]
    found = ["search", "--main", str(out / "runs" / "main"), *method.search]
    for guide in method.guides:
        found += ["--guide", f"{guide}={out / 'runs' / GUIDES[guide]}"]
    found += ["--ref", str(out / "reference.npz"), "--metric", TUNED_ON, "--num", str(num)]
    found += ["--halvings", str(HALVINGS), "--budget", f"{method.budget * num}img", "--confirm", str(method.confirm)]
    return [*found, "--batch", str(BATCH), "--outdir", str(search_folder(out, name)), "--", *method.sampler]


def score(
    out: Path,
    num: int,
    names: Sequence[str],
    first_seeds: Sequence[int],
    report: Callable[[str], None],
    large: bool = False,
) -> list[dict[str, Any]]:
    """Score the best settings of each method, and "real", on `num` images from each of the first seeds.

    For "real" they are held-out images instead, as many as there are. There is a point for each range of seeds, and one
    with the images of all ranges together. Features are kept in OUT/features, and points in OUT/scores.json. With
    `large`, only the distances LARGE_METRICS of the first detector are measured, so that images can be many.
    """
    path = out / "scores.json"
    points: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    used = DETECTORS[:1] if large else DETECTORS
    real, reference = real_features(out, used), load_reference(reference_file(out))
    detectors = load_detectors(used, _CPU)
    heldout = len(open_images(out / "heldout.zip")) // len(first_seeds)
    for name in names:
        file = None if name == "real" else settings_file(out, name)
        size = min(num, heldout) if file is None else num
        setting = None if file is None else describe(out, file)
        parts = []
        for k, first in enumerate(first_seeds):
            if file is None:
                parts.append(_heldout_features(out, k * size, size, used))
            else:
                parts.append(_generated_features(out, file, first, num, used))
        ranges = [(f"{first}-{first + size - 1}", part) for first, part in zip(first_seeds, parts, strict=True)]
        together = {name: torch.cat([part[name] for part in parts]) for name in used}
        for title, features in [*ranges, ("all", together)]:
            count = len(features[used[0]])
            key = {"method": name, "images": title, "num": count, "setting": setting, "reference": reference.num_images}
            if large:
                key["detectors"] = list(used)
            if any(point["key"] == key for point in points):
                continue
            metrics = LARGE_METRICS if large else (*METRICS, *(INFINITY if title == "all" else ()))
            scorer = Scorer(reference, detectors, _CPU, compared(real, count), names=metrics, replicates=REPLICATES)
            measured = scorer.measure_features(features)
            points.append(
                {
                    "key": key,
                    "results": dict(measured.values),
                    "intervals": {metric: list(bounds) for metric, bounds in measured.intervals.items()},
                    **provenance(_CPU),
                }
            )
            write_json(path, points)
            shown = ", ".join(f"{metric} {value:.4g}" for metric, value in measured.values.items())
            report(f"{name}, {title}: {shown}")
    return points


def _generated_features(
    out: Path, settings: Path, first: int, num: int, used: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The features of the images of seeds first, ..., first + num - 1, generated in parts that are kept."""
    identity = json.dumps(describe(out, settings), sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    parts = []
    for start in range(first, first + num, PART):
        seeds = range(start, min(start + PART, first + num))
        paths = {d: out / "features" / name / f"{seeds.start}-{seeds.stop - 1}-{d}.npy" for d in used}
        if not all(path.exists() for path in paths.values()):
            generation = prepare(parse_request(words(settings)), _CPU)
            batches = (batch.images for batch in generation.batches(seeds, BATCH))
            found = image_features(batches, load_detectors(used, _CPU), _CPU)
            for detector, path in paths.items():
                save_array(path, found[detector])
        parts.append({d: torch.from_numpy(np.load(path)) for d, path in paths.items()})
    return {d: torch.cat([part[d] for part in parts]) for d in used}


def _heldout_features(out: Path, start: int, num: int, used: Sequence[str]) -> dict[str, torch.Tensor]:
    """The features of held-out images start, ..., start + num - 1 of a fixed random order."""
    images = open_images(out / "heldout.zip")
    paths = {d: out / "features" / "heldout" / f"{start}-{start + num - 1}-{d}.npy" for d in used}
    if not all(path.exists() for path in paths.values()):
        picked = np.random.default_rng(0).permutation(len(images))[start : start + num]
        found = image_features(image_batches(images, picked, 32, 1), load_detectors(used, _CPU), _CPU)
        for detector, path in paths.items():
            save_array(path, found[detector])
    return {d: torch.from_numpy(np.load(path)) for d, path in paths.items()}
