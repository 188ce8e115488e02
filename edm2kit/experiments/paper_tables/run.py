"""Measuring the cells of a table, a stretch of images at a time, so that a killed run goes on within a cell."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.cli.generation import Generation, Request, prepare
from edm2kit.experiments.paper_tables.networks import obtain
from edm2kit.experiments.paper_tables.tables import Cell, Table
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.merging import merge_statistics
from edm2kit.metrics.reference import FeatureStatistics, Reference
from edm2kit.metrics.scoring import Scorer, image_statistics, make_scorer
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.arrays import read_npz
from edm2kit.torch_utils.files import atomic_write, fetch
from edm2kit.torch_utils.provenance import provenance
from edm2kit.torch_utils.records import differences, plain_json, write_json


@dataclass(frozen=True)
class How:
    """`num` images for each value, `seeds` values; `save_every` images the work so far is put on disk."""

    num: int
    seeds: int
    batch: int
    save_every: int
    precision: str = "auto"
    vae: str | None = None
    weights_dir: str | None = None


@dataclass(frozen=True)
class Progress:
    """Statistics of the first `done` images of a range, and what made them; `owner` says of which images."""

    owner: Mapping[str, Any]
    save_every: int
    done: int = 0
    elapsed_sec: float = 0.0
    statistics: FeatureStatistics | None = None
    made_by: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def plus(
        self, count: int, statistics: FeatureStatistics, elapsed_sec: float, made_by: Mapping[str, Any]
    ) -> "Progress":
        """With the next `count` images."""
        if self.statistics is not None:
            _, statistics = merge_statistics(self.done, self.statistics, count, statistics)
        makers = [*self.made_by, *([made_by] if made_by not in self.made_by else [])]
        total_sec = self.elapsed_sec + elapsed_sec
        return replace(self, done=self.done + count, elapsed_sec=total_sec, statistics=statistics, made_by=makers)

    def save(self, path: Path) -> None:
        """Write it all, atomically."""
        header = {name: getattr(self, name) for name in ("owner", "save_every", "done", "elapsed_sec", "made_by")}
        header["fingerprint"] = self.statistics.fingerprint
        with atomic_write(path) as file:
            np.savez(
                file, header=np.array(json.dumps(header)), mu=self.statistics.mean, sigma=self.statistics.covariance
            )


def load_progress(path: Path, owner: Mapping[str, Any], save_every: int) -> Progress:
    """What `path` holds, if it is of `owner`, else the beginning. Raises ValueError where the file is damaged."""
    if path.exists():
        try:
            arrays = read_npz(path)
            header = json.loads(str(arrays["header"]))
            statistics = FeatureStatistics(arrays["mu"], arrays["sigma"], header.pop("fingerprint"))
            if header["owner"] == owner:
                return Progress(**header, statistics=statistics)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to start this range of seeds anew") from error
    return Progress(owner, save_every)


def run_cell(table: Table, cell: Cell, how: How, outdir: Path, device: torch.device) -> str | None:
    """Measure what is left of a cell, on all ranks together, and write it to OUTDIR/CELL.json.

    Returns the reason where networks or reference cannot be had, None otherwise: other cells can still be measured.
    Raises ValueError where the folder holds the cell measured otherwise, or other files cannot be had.
    """
    path = outdir / f"{cell.name}.json"
    record = dist.on_rank0(read_record, path, describe(table, cell, how))
    left = [k * how.num for k in range(how.seeds) if str(k * how.num) not in record["runs"]]
    if not left:
        dist.print0(f"{cell.name}: finished before")
        return None
    paths, missing = dist.on_rank0(_obtain, cell, outdir / "networks")
    if missing is not None:
        return missing
    generation, scorer = _load(table, cell, how, paths, device)
    dist.on_rank0(_claim, path, record, generation, scorer)
    record["settings"] = generation.settings
    dist.print0(f"{cell.name}: {generation.summary}")
    partial = outdir / f"{cell.name}.partial.npz"
    for first in left:
        value = _measure(record, generation, scorer, how, partial, first)
        record["runs"][str(first)] = value
        dist.on_rank0(_finish_range, path, partial, record)
        dist.print0(f"{cell.name}, seeds {first}-{first + how.num - 1}: {value['value']:.6g} (published {cell.value})")
    return None


def describe(table: Table, cell: Cell, how: How) -> dict[str, Any]:
    """What the table asks for, in JSON's terms: enough to tell finished work from other work."""
    return plain_json(
        {
            "table": table.name,
            "row": cell.row,
            "metric": cell.metric,
            "net": cell.net.name,
            "gnet": None if cell.gnet is None else cell.gnet.name,
            "guidance": vars(cell.guidance),
            "sampler": {**vars(table.sampler), "churn": vars(table.sampler.churn)},
            "num_images": how.num,
        }
    )


def read_record(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The record at `path`, or a new one; ValueError where it is of something else than `asked`."""
    if not path.exists():
        return {"asked": dict(asked), "runs": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, _ = record["asked"], record["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure this cell anew") from error
    _refuse_other_settings(path, found, asked)
    return record


def _refuse_other_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if changed := differences(found, wanted):
        raise ValueError(f"{path} was measured with {'; '.join(changed[:3])}; choose another --outdir")


def _obtain(cell: Cell, folder: Path) -> tuple[list[str], str | None]:
    """Paths of the networks, then of the reference; or why one of them cannot be had."""
    try:
        return [*(str(obtain(network, folder)) for network in cell.networks), str(fetch(cell.dataset.reference))], None
    except ValueError as error:
        return [], str(error)


def _load(table: Table, cell: Cell, how: How, paths: list[str], device: torch.device) -> tuple[Generation, Scorer]:
    *networks, reference = paths
    gnet = networks[1] if len(networks) > 1 else None
    request = Request(networks[0], gnet, cell.guidance, table.sampler, None, how.precision, how.vae)
    return prepare(request, device), make_scorer(reference, device, [cell.metric], how.weights_dir)


def _claim(path: Path, record: dict[str, Any], generation: Generation, scorer: Scorer) -> None:
    """Refuse to add to a record of other weights or another device, and note what this one is of."""
    if "settings" in record:
        _refuse_other_settings(path, record["settings"], generation.settings)
    [detector] = scorer.detectors
    record["detector"] = detector.fingerprint
    record["reference"] = {"num_images": scorer.reference.num_images, "source": dict(scorer.reference.source)}


def _measure(
    record: Mapping[str, Any], generation: Generation, scorer: Scorer, how: How, path: Path, first: int
) -> dict[str, Any]:
    """The value of the images of seeds first ... first + how.num - 1, taken up where an earlier run left it."""
    owner = json.loads(json.dumps({"asked": record["asked"], "settings": generation.settings, "first_seed": first}))
    kept: list[Progress] = []  # one, on rank 0
    done, save_every = dist.on_rank0(_start, kept, path, owner, how.save_every)
    made_by = {**provenance(scorer.device), "processes": dist.world_size(), "batch": how.batch}
    if done:
        dist.print0(f"{done} of {how.num} images are done already")
    for stop in _stops(how.num, save_every):
        if stop <= done:
            continue
        started = time.monotonic()
        batches = (batch.images for batch in generation.batches(range(first + done, first + stop), how.batch))
        count, statistics = image_statistics(batches, scorer.detectors, scorer.device)
        elapsed_sec = time.monotonic() - started
        dist.on_rank0(_keep, kept, path, count, statistics[record["asked"]["metric"]], elapsed_sec, made_by)
        done = stop
    return dist.on_rank0(_value, kept, scorer.reference, record["asked"]["metric"], first)


def _start(kept: list[Progress], path: Path, owner: Mapping[str, Any], save_every: int) -> tuple[int, int]:
    kept.append(load_progress(path, owner, save_every))
    return kept[0].done, kept[0].save_every


def _stops(num: int, save_every: int) -> list[int]:
    """Where to save: every so many images, spread evenly, so that no stretch is too short for a covariance."""
    stretches = max(1, num // max(save_every, 2))
    return [num * (k + 1) // stretches for k in range(stretches)]


def _keep(
    kept: list[Progress],
    path: Path,
    count: int,
    statistics: FeatureStatistics,
    elapsed_sec: float,
    made_by: Mapping[str, Any],
) -> None:
    kept[0] = kept[0].plus(count, statistics, elapsed_sec, made_by)
    kept[0].save(path)


def _value(kept: list[Progress], reference: Reference, metric: str, first: int) -> dict[str, Any]:
    ours, theirs = kept[0].statistics, reference.of(metric)
    return {
        "value": frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance),
        "first_seed": first,
        "num_images": kept[0].done,
        "elapsed_sec": kept[0].elapsed_sec,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": list(kept[0].made_by),
    }


def _finish_range(path: Path, partial: Path, record: Mapping[str, Any]) -> None:
    write_json(path, record)
    partial.unlink(missing_ok=True)
