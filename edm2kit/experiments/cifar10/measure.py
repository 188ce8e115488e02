"""Scores of settings, kept in files, so that a search or a scoring run that is stopped resumes."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.cli.generation import prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.image_source import image_batches, open_images
from edm2kit.experiments.cifar10.networks import words
from edm2kit.experiments.cifar10.settings import (
    BATCH,
    DETECTORS,
    INFINITY,
    METHODS,
    METRICS,
    PART,
    REFERENCE_IMAGES,
    SCORE_SEEDS,
    START,
    TUNE_SEED,
    TUNED_ON,
    Method,
    Setting,
)
from edm2kit.metrics.detectors.registry import load_detectors
from edm2kit.metrics.moments import Moments, statistics_of
from edm2kit.metrics.reference import Reference
from edm2kit.metrics.scoring import REPLICATES, Scorer, image_features
from edm2kit.torch_utils.files import atomic_write, plain_json, provenance, sha256_of, write_json

_CPU = torch.device("cpu")


def real_features(out: Path, detectors: Sequence[str] = DETECTORS) -> dict[str, torch.Tensor]:
    """The features of REFERENCE_IMAGES training images, float32 [N, F] by detector; kept in OUT/real."""
    found = {}
    for name in detectors:
        path = out / "real" / f"{name}.npy"
        if not path.exists():
            images = open_images(out / "train.zip")
            picked = np.linspace(0, len(images) - 1, min(REFERENCE_IMAGES, len(images))).astype(int)
            batches = image_batches(images, picked, 32, 1)
            _save_array(path, image_features(batches, load_detectors([name], _CPU), _CPU)[name])
        found[name] = torch.from_numpy(np.load(path))
    return found


def _save_array(path: Path, values: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        np.save(stream, values.numpy())


def make_scorer(real: Mapping[str, torch.Tensor], metrics: Sequence[str], num: int, replicates: int = 0) -> Scorer:
    """A scorer against the training images; metrics of single images compare with `num` of them."""
    detectors = load_detectors(tuple(real), _CPU)
    moments = []
    for rows in real.values():
        moments.append(Moments(rows.shape[1]))
        moments[-1].add(rows)
    reference = Reference(*statistics_of(detectors, moments))
    compared = {name: _spread(rows, num) for name, rows in real.items()}
    return Scorer(reference, detectors, _CPU, compared, names=tuple(metrics), replicates=replicates)


def _spread(rows: torch.Tensor, num: int) -> torch.Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(num, len(rows))).long()]


class Trials:
    """The scores of the search by setting, in OUT/trials.json: fd_lite0 of `num` images of the same seeds."""

    def __init__(self, out: Path, num: int, report: Callable[[str], None]):
        self.out, self.num, self.report = out, num, report
        self.path = out / "trials.json"
        self.records: list[dict[str, Any]] = []
        if self.path.exists():
            self.records = json.loads(self.path.read_text(encoding="utf-8"))
        self.scorer = make_scorer(real_features(out, [TUNED_ON]), [TUNED_ON], num)

    def value(self, setting: Setting) -> float:
        """The score of a setting, measured once per set of networks."""
        key = plain_json(
            {"setting": asdict(setting), "files": _files(self.out, setting), "num": self.num, "first_seed": TUNE_SEED}
        )
        for record in self.records:
            if record["key"] == key:
                return record["value"]
        started = time.monotonic()
        generation = prepare(parse_request(words(self.out, setting)), _CPU)
        seeds = range(TUNE_SEED, TUNE_SEED + self.num)
        value = self.scorer.score(batch.images for batch in generation.batches(seeds, BATCH))[TUNED_ON]
        seconds = round(time.monotonic() - started, 1)
        self.records.append({"key": key, "value": value, "elapsed_sec": seconds, **provenance(_CPU)})
        write_json(self.path, self.records)
        self.report(f"{value:8.2f}  {seconds:5.0f} s  {describe(setting)}")
        return value


def describe(setting: Setting) -> str:
    """A setting in one line."""
    text = f"EMA {setting.ema:.2f}"
    if setting.guide is None:
        return text
    guide = setting.guide
    if setting.guide_ema is not None:
        age = "" if setting.guide_nimg is None else f" at {setting.guide_nimg // 1024}Ki"
        guide = f"{guide}{age}, EMA {setting.guide_ema:.2f}"
    text += f", guide {guide}, w {setting.weight:g}"
    low, high = setting.interval
    return text if (low, high) == (0.0, float("inf")) else f"{text}, sigma in ({low:g}, {high:g}]"


def search(method: Method, start: Setting, trials: Trials) -> Setting:
    """The best setting of a method, one axis after the other (coordinate search)."""
    best = start.with_values(method.start)
    for values in method.axes:
        candidates = [best.with_values(value) for value in values]
        best = min((best, *candidates), key=trials.value)
    return best


def tune(out: Path, num: int, names: Sequence[str], report: Callable[[str], None]) -> dict[str, Setting]:
    """The best setting of each method of METHODS in `names`; written to OUT/best.json."""
    trials = Trials(out, num, report)
    best: dict[str, Setting] = read_best(out)
    for name in names:
        method = METHODS[name]
        start = START if method.base is None else best[method.base]
        report(f"{method.title}:")
        best[name] = search(method, start, trials)
        write_json(out / "best.json", {key: plain_json(asdict(setting)) for key, setting in best.items()})
    return best


def read_best(out: Path) -> dict[str, Setting]:
    """The settings that `tune` has found so far."""
    path = out / "best.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: setting_from_json(values) for name, values in content.items()}


def setting_from_json(values: Mapping[str, Any]) -> Setting:
    """A setting from a record, whose lists were tuples and whose infinity may be a text."""
    values = dict(values)
    values["interval"] = tuple(float(bound) for bound in values["interval"])
    values["sampler"] = tuple(values["sampler"])
    return Setting(**values)


def score(
    out: Path, num: int, names: Sequence[str], first_seeds: Sequence[int], report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Score the best setting of each method, and "real", on `num` images from each of the first seeds.

    For "real" they are held-out images instead. There is a point for each range of seeds, and one with the images of
    all ranges together. Features are kept in OUT/features, and points in OUT/scores.json.
    """
    path = out / "scores.json"
    points: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    real, best = real_features(out), read_best(out)
    for name in names:
        setting = None if name == "real" else best[name]
        parts = []
        for k, first in enumerate(first_seeds):
            if setting is None:
                parts.append(_heldout_features(out, k * num, num))
            else:
                parts.append(_generated_features(out, setting, first, num))
        ranges = [(f"{first}-{first + num - 1}", part) for first, part in zip(first_seeds, parts, strict=True)]
        together = {name: torch.cat([part[name] for part in parts]) for name in DETECTORS}
        for title, features in [*ranges, ("all", together)]:
            count = len(features[TUNED_ON])
            key = {
                "method": name,
                "images": title,
                "num": count,
                "setting": None if setting is None else plain_json(asdict(setting)),
                "files": _files(out, setting),
            }
            if any(point["key"] == key for point in points):
                continue
            metrics = (*METRICS, INFINITY) if title == "all" else METRICS
            measured = make_scorer(real, metrics, count, REPLICATES).measure_features(features)
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


def _files(out: Path, setting: Setting | None) -> dict[str, str]:
    """The hashes of the networks of a setting; real images have none."""
    if setting is None:
        return {}
    request = parse_request(words(out, setting))
    return {name: sha256_of(path) for name, path in (("net", request.net), ("gnet", request.gnet)) if path}


def _generated_features(out: Path, setting: Setting, first: int, num: int) -> dict[str, torch.Tensor]:
    """The features of the images of seeds first, ..., first + num - 1, generated in parts that are kept."""
    identity = json.dumps([plain_json(asdict(setting)), _files(out, setting)], sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    parts = []
    for start in range(first, first + num, PART):
        seeds = range(start, min(start + PART, first + num))
        paths = {d: out / "features" / name / f"{seeds.start}-{seeds.stop - 1}-{d}.npy" for d in DETECTORS}
        if not all(path.exists() for path in paths.values()):
            generation = prepare(parse_request(words(out, setting)), _CPU)
            batches = (batch.images for batch in generation.batches(seeds, BATCH))
            found = image_features(batches, load_detectors(DETECTORS, _CPU), _CPU)
            for detector, path in paths.items():
                _save_array(path, found[detector])
        parts.append({d: torch.from_numpy(np.load(path)) for d, path in paths.items()})
    return {d: torch.cat([part[d] for part in parts]) for d in DETECTORS}


def _heldout_features(out: Path, start: int, num: int) -> dict[str, torch.Tensor]:
    """The features of held-out images start, ..., start + num - 1 of a fixed random order."""
    images = open_images(out / "heldout.zip")
    if start + num > len(images):
        raise ValueError(f"there are {len(images)} held-out images; lower --num to {len(images) // len(SCORE_SEEDS)}")
    paths = {d: out / "features" / "heldout" / f"{start}-{start + num - 1}-{d}.npy" for d in DETECTORS}
    if not all(path.exists() for path in paths.values()):
        picked = np.random.default_rng(0).permutation(len(images))[start : start + num]
        found = image_features(image_batches(images, picked, 32, 1), load_detectors(DETECTORS, _CPU), _CPU)
        for detector, path in paths.items():
            _save_array(path, found[detector])
    return {d: torch.from_numpy(np.load(path)) for d, path in paths.items()}
