"""Scores of the rows: one record per row, written point by point, so that nothing is measured twice."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.cli.generation import prepare
from edm2kit.cli.image_source import ScoredImages, image_batches
from edm2kit.experiments.compare_guidance.cost import count_multiply_adds
from edm2kit.experiments.compare_guidance.rows import ComparisonRow
from edm2kit.experiments.documents import read_object
from edm2kit.guidance.records import words_with_current_names
from edm2kit.metrics.scoring import Scorer
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import check_type, differences, plain_json, provenance, sha256_of, write_json

_COUNTED_IMAGES = 2
Point = Mapping[str, Any]  # weight, first_seed, results by metric, and what made them
_POINT: Mapping[str, Any] = {"weight": float | None, "first_seed": int, "results": Mapping[str, Any]}


@dataclass(frozen=True)
class Scoring:
    """How images are scored: `num` per value, by `scorer`; `identity` describes scorer and reference as JSON."""

    scorer: Scorer
    identity: Mapping[str, Any]
    num: int
    batch: int


def measure_row(
    path: Path,
    row: ComparisonRow,
    networks: Mapping[str, str],
    scoring: Scoring,
    weights: Sequence[float | None],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """The record of `row` at `path`, with a point per weight and first seed; existing points are kept.

    Raises ValueError if the record has other networks, options or images.
    """
    asked = plain_json(
        {
            "row": row.name,
            "options": row.options,
            "files": {name: sha256_of(networks[name]) for name in row.needs},
            "num_images": scoring.num,
            **scoring.identity,
        }
    )
    record = dist.on_rank0(read_record, path, asked)
    for weight in weights:
        missing = [seed for seed in seeds if find_point(record, weight, seed) is None]
        if not missing:
            continue
        generation = prepare(row.request(weight, networks), scoring.scorer.device)
        for seed in missing:
            images = range(seed, seed + scoring.num)
            batches = (batch.images for batch in generation.batches(images, scoring.batch))
            _add_point(record, path, scoring, weight, seed, batches)
    return record


def measure_cost(path: Path, row: ComparisonRow, networks: Mapping[str, str], device: torch.device) -> None:
    """Add the multiply-adds per image at the reported weight to the record at `path`, if they are not there yet."""
    record = dist.on_rank0(read_record, path)
    if "multiply_adds" in record:
        return
    generation = prepare(row.request(record["points"][0]["weight"], networks), device)
    record["multiply_adds"] = count_multiply_adds(generation, _COUNTED_IMAGES)
    dist.on_rank0(write_json, path, record)


def measure_real(path: Path, source: ScoredImages, scoring: Scoring, selections: Sequence[int]) -> dict[str, Any]:
    """The record of real images, with a point per random selection of them instead of per first seed."""
    asked = plain_json({"row": "real", "num_images": scoring.num, **scoring.identity})
    record = dist.on_rank0(read_record, path, asked)
    for seed in selections:
        if find_point(record, None, seed) is None:
            shuffled = np.random.default_rng(seed).permutation(len(source))
            picked = sorted(shuffled[: scoring.num].tolist())
            _add_point(record, path, scoring, None, seed, image_batches(source, picked, scoring.batch, 1))
    return record


def _add_point(
    record: dict[str, Any],
    path: Path,
    scoring: Scoring,
    weight: float | None,
    first_seed: int,
    batches: Iterable[torch.Tensor],
) -> None:
    started = time.monotonic()
    results = scoring.scorer.score(batches)
    record["points"].append(
        {
            "weight": weight,
            "first_seed": first_seed,
            "results": results,
            "elapsed_sec": round(time.monotonic() - started, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "processes": dist.world_size(),
            **provenance(scoring.scorer.device),
        }
    )
    dist.on_rank0(write_json, path, record)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
    dist.print0(f"{record['asked']['row']}, weight {weight}, from seed {first_seed}: {shown}")


def read_record(path: Path, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record at `path`, without points if there is no file.

    Raises ValueError if it is damaged, or if `asked` is given and differs from what the record was asked for.
    """
    if not path.exists():
        return {"asked": asked, "points": []}
    try:
        record = read_object(path)
        check_type(record.get("asked"), Mapping[str, Any], "asked")
        check_type(record.get("multiply_adds"), float | None, "multiply_adds")
        check_points(record.get("points"), "points")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it to measure this row again") from error
    found = record["asked"]
    if asked is not None and "real_content" not in found:  # which earlier versions did not record
        asked = {name: value for name, value in asked.items() if name != "real_content"}
    if asked is not None and (changed := differences(_with_current_names(found), _with_current_names(asked))):
        raise ValueError(f"{path} was measured with other settings ({'; '.join(changed[:3])}). Use another --outdir")
    return record


def check_points(points: Any, name: str) -> None:
    """Raise ValueError, starting with `name`, unless `points` are as `measure_row` writes them."""
    check_type(points, list[Mapping[str, Any]], name)
    for number, point in enumerate(points):
        if "weight" not in point:
            raise ValueError(f"{name}[{number}] has no weight")
        for key, hint in _POINT.items():
            check_type(point.get(key), hint, f"{name}[{number}].{key}")
        for metric, value in point["results"].items():  # which may be NaN
            if not isinstance(value, float):
                check_type(value, float, f"{name}[{number}].results.{metric}")


def _with_current_names(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a record was asked for, with the names that guidance methods have today."""
    words = asked.get("options")
    return dict(asked) if not isinstance(words, str) else {**asked, "options": words_with_current_names(words)}


def find_point(record: Mapping[str, Any], weight: float | None, first_seed: int) -> Point | None:
    """The point of that weight and first seed, if the record has it."""
    for point in record["points"]:
        if (point["weight"], point["first_seed"]) == (weight, first_seed):
            return point
    return None


def best_weight(
    name: str, record: Mapping[str, Any], weights: Sequence[float], seeds: Sequence[int], metric: str
) -> float:
    """The weight of row `name` with the smallest distance, on average over `seeds`.

    Raises ValueError if a point is missing.
    """
    means = {}
    for weight in weights:
        results = []
        for seed in seeds:
            point = find_point(record, weight, seed)
            if point is None or metric not in point["results"]:
                raise ValueError(f"{name} is not tuned at weight {weight:g} yet. Run `tune` first")
            results.append(point["results"][metric])
        means[weight] = sum(results) / len(results)
    return min(means, key=means.__getitem__)
