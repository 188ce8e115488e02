"""Scores of the rows, one file each, written point by point: what is there is not measured again."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.cli.generation import prepare
from edm2kit.cli.image_source import ArchiveImages, NpzImages, image_batches
from edm2kit.experiments.compare_guidance.rows import Row
from edm2kit.guidance.records import words_with_current_names
from edm2kit.metrics.scoring import Scorer
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import sha256_of
from edm2kit.torch_utils.provenance import provenance
from edm2kit.torch_utils.records import differences, plain_json, write_json

Point = Mapping[str, Any]  # weight, first_seed, results by metric, and what made them


@dataclass(frozen=True)
class Yardstick:
    """What images are measured by; `identity` tells it in JSON's terms. `num` images for each value."""

    scorer: Scorer
    identity: Mapping[str, Any]
    num: int
    batch: int


def measure_row(
    path: Path, row: Row, networks: Mapping[str, str], yardstick: Yardstick, weights: Sequence[float | None], seeds
) -> dict[str, Any]:
    """The record of `row` at `path`, with a point for each of `weights` and of `seeds` (first of so many).

    Points that are there stay. Raises ValueError where the record is of other networks, options or images.
    """
    asked = plain_json(
        {
            "row": row.name,
            "options": row.options,
            "files": {name: sha256_of(networks[name]) for name in row.needs},
            "num_images": yardstick.num,
            **yardstick.identity,
        }
    )
    record = dist.on_rank0(read_record, path, asked)
    for weight in weights:
        left = [seed for seed in seeds if find(record, weight, seed) is None]
        if not left:
            continue
        generation = prepare(row.request(weight, networks), yardstick.scorer.device)
        for seed in left:
            images = range(seed, seed + yardstick.num)
            batches = (batch.images for batch in generation.batches(images, yardstick.batch))
            _add(record, path, yardstick, {"weight": weight, "first_seed": seed}, batches)
    return record


def measure_real(
    path: Path, source: ArchiveImages | NpzImages, yardstick: Yardstick, selections: Sequence[int]
) -> dict[str, Any]:
    """The record of real images, one point for each random selection of them, in place of seeds."""
    record = dist.on_rank0(
        read_record, path, plain_json({"row": "real", "num_images": yardstick.num, **yardstick.identity})
    )
    for seed in selections:
        if find(record, None, seed) is None:
            picked = np.sort(np.random.default_rng(seed).permutation(len(source))[: yardstick.num])
            batches = image_batches(source, picked, yardstick.batch, 1)
            _add(record, path, yardstick, {"weight": None, "first_seed": seed}, batches)
    return record


def _add(record: dict[str, Any], path: Path, yardstick: Yardstick, point: Mapping[str, Any], batches) -> None:
    started = time.monotonic()
    results = yardstick.scorer.score(batches)
    record["points"].append(
        {
            **point,
            "results": results,
            "elapsed_sec": round(time.monotonic() - started, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "processes": dist.world_size(),
            **provenance(yardstick.scorer.device),
        }
    )
    dist.on_rank0(write_json, path, record)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
    dist.print0(f"{record['asked']['row']}, weight {point['weight']}, from seed {point['first_seed']}: {shown}")


def read_record(path: Path, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record at `path`, without points where there is none; ValueError where it is not of what is `asked`."""
    if not path.exists():
        return {"asked": asked, "points": []}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure this row anew") from error
    if asked is not None and (changed := differences(_with_current_words(found), _with_current_words(asked))):
        raise ValueError(f"{path} was measured otherwise ({'; '.join(changed[:3])}); choose another --outdir")
    return record


def _with_current_words(asked: Mapping[str, Any]) -> dict[str, Any]:
    words = asked.get("options")
    return dict(asked) if words is None else {**asked, "options": words_with_current_names(words)}


def find(record: Mapping[str, Any], weight: float | None, first_seed: int) -> Point | None:
    """The point of that weight and those images."""
    key = (weight, first_seed)
    return next((p for p in record["points"] if (p["weight"], p["first_seed"]) == key), None)


def best_weight(
    name: str, record: Mapping[str, Any], weights: Sequence[float], seeds: Sequence[int], metric: str
) -> float:
    """The weight of row `name` whose images are nearest, on average over `seeds`; ValueError for a missing point."""
    means = {}
    for weight in weights:
        points = [find(record, weight, seed) for seed in seeds]
        if None in points:
            raise ValueError(f"{name} is not tuned at weight {weight:g} yet; run `tune` first")
        means[weight] = sum(point["results"][metric] for point in points) / len(points)
    return min(means, key=means.__getitem__)
