"""Measuring the cells of a table, part by part, so that a killed run resumes within a cell."""

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
from edm2kit.experiments.documents import read_object
from edm2kit.experiments.paper_tables.networks import snapshot_of
from edm2kit.experiments.paper_tables.tables import Cell, Table
from edm2kit.guidance.records import settings_differences
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import FeatureStatistics, merge_statistics
from edm2kit.metrics.reference import Reference
from edm2kit.metrics.scoring import Scorer, image_statistics, make_scorer
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.arrays import read_npz
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.files import atomic_write, check_type, plain_json, provenance, write_json

# what a record holds of each range of seeds
_RUN: Mapping[str, Any] = {"value": float, "first_seed": int, "num_images": int, "made_by": list[Mapping[str, Any]]}


@dataclass(frozen=True)
class MeasureOptions:
    """`seeds` values per cell, each of `num` images; the state is saved every `save_every` images."""

    num: int
    seeds: int
    batch: int
    save_every: int
    precision: str = "auto"
    vae: str | None = None
    weights_dir: str | None = None


@dataclass(frozen=True)
class PartialStatistics:
    """Statistics of the first `done` images of a seed range, and what made them; `owner` says of which images."""

    owner: Mapping[str, Any]
    save_every: int
    done: int = 0
    elapsed_sec: float = 0.0
    statistics: FeatureStatistics | None = None
    made_by: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def plus(
        self, count: int, statistics: FeatureStatistics, elapsed_sec: float, made_by: Mapping[str, Any]
    ) -> "PartialStatistics":
        """With the next `count` images."""
        if self.statistics is not None:
            _, statistics = merge_statistics(self.done, self.statistics, count, statistics)
        makers = list(self.made_by)
        if made_by not in makers:
            makers.append(made_by)
        return replace(
            self,
            done=self.done + count,
            elapsed_sec=self.elapsed_sec + elapsed_sec,
            statistics=statistics,
            made_by=makers,
        )

    def value(self, reference: Reference, metric: str) -> float:
        """The distance from the reference. Raises ValueError if there are no images yet."""
        if self.statistics is None:
            raise ValueError("no images have been measured yet")
        theirs = reference.of(metric)
        return frechet_distance(self.statistics.mean, self.statistics.covariance, theirs.mean, theirs.covariance)

    def save(self, path: Path) -> None:
        """Write everything to an npz file, atomically. Raises ValueError if there are no images yet."""
        if self.statistics is None:
            raise ValueError("no images have been measured yet")
        header = {
            "owner": self.owner,
            "save_every": self.save_every,
            "done": self.done,
            "elapsed_sec": self.elapsed_sec,
            "made_by": self.made_by,
            "fingerprint": self.statistics.fingerprint,
        }
        with atomic_write(path) as file:
            np.savez(
                file, header=np.array(json.dumps(header)), mu=self.statistics.mean, sigma=self.statistics.covariance
            )


def load_partial(path: Path, owner: Mapping[str, Any], save_every: int) -> PartialStatistics:
    """The contents of `path` if they belong to `owner`, else none. Raises ValueError if the file is damaged."""
    if path.exists():
        try:
            arrays = read_npz(path)
            header = json.loads(str(arrays["header"]))
            statistics = FeatureStatistics(arrays["mu"], arrays["sigma"], header.pop("fingerprint"))
            if header["owner"] == owner:
                return PartialStatistics(**header, statistics=statistics)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it to start this range of seeds again") from error
    return PartialStatistics(owner, save_every)


def measure_cell(table: Table, cell: Cell, options: MeasureOptions, outdir: Path, device: torch.device) -> str | None:
    """Measure what is missing of a cell, on all ranks together, and write OUTDIR/CELL.json.

    Returns None, or the reason if networks or the reference are not available: other cells can still be measured.
    Raises ValueError if the folder holds this cell with other settings, or if another file is not available.
    """
    path = outdir / f"{cell.name}.json"
    record = dist.on_rank0(read_record, path, describe(table, cell, options.num))
    missing = [k * options.num for k in range(options.seeds) if str(k * options.num) not in record["runs"]]
    if not missing:
        dist.print0(f"{cell.name}: complete, skipped")
        return None
    sources, reason = dist.on_rank0(_sources, cell, outdir / "networks")
    if reason is not None:
        return reason
    generation, scorer = _load(table, cell, options, sources, device)
    dist.on_rank0(_add_identities, path, record, generation, scorer)
    record["settings"] = generation.settings
    dist.print0(f"{cell.name}: {generation.summary}")
    partial_path = outdir / f"{cell.name}.partial.npz"
    for first in missing:
        found = _measure_range(record, generation, scorer, options, partial_path, first)
        record["runs"][str(first)] = found
        dist.on_rank0(write_json, path, record)
        dist.on_rank0(partial_path.unlink, True)
        last = first + options.num - 1
        dist.print0(f"{cell.name}, seeds {first}-{last}: {found['value']:.6g} (published {cell.value})")
    return None


def describe(table: Table, cell: Cell, num: int) -> dict[str, Any]:
    """What the table asks for, of `num` images, as JSON: cells with the same description have the same value."""
    return plain_json(
        {
            "table": table.name,
            "row": cell.row,
            "metric": cell.metric,
            "net": cell.net.name,
            "gnet": None if cell.gnet is None else cell.gnet.name,
            "guidance": vars(cell.guidance),
            "sampler": {**vars(table.sampler), "churn": vars(table.sampler.churn)},
            "num_images": num,
        }
    )


def read_record(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The record at `path`, or a new one. Raises ValueError if it is damaged or of something else than `asked`."""
    if not path.exists():
        return {"asked": dict(asked), "runs": {}}
    try:
        record = read_object(path)
        found: Any = record.get("asked")
        check_type(found, Mapping[str, Any], "asked")
        check_type(record.get("runs"), Mapping[str, Any], "runs")
        for first, run in record["runs"].items():
            if not first.isdecimal():
                raise ValueError(f"runs has the key {first!r:.60}, which is not a first seed")
            check_type(run, Mapping[str, Any], f"runs.{first}")
            for name, hint in _RUN.items():
                check_type(run.get(name), hint, f"runs.{first}.{name}")
            for maker in run["made_by"]:
                for name, hint in (("processes", int), ("hardware", str), ("commit", str)):
                    check_type(maker.get(name), hint, f"runs.{first}.made_by.{name}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it to measure this cell again") from error
    _refuse_other_settings(path, found, asked)
    return record


def _refuse_other_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if changed := settings_differences(found, wanted):
        raise ValueError(f"{path} was measured with other settings ({'; '.join(changed[:3])}). Use another --outdir")


def _sources(cell: Cell, folder: Path) -> tuple[list[str], str | None]:
    """Paths of the networks and, last, of the reference; or the reason why one of them is not available."""
    try:
        networks = [str(snapshot_of(network, folder)) for network in cell.networks]
        return [*networks, str(fetch(cell.dataset.reference))], None
    except ValueError as error:
        return [], str(error)


def _load(
    table: Table, cell: Cell, options: MeasureOptions, sources: list[str], device: torch.device
) -> tuple[Generation, Scorer]:
    *networks, reference = sources
    request = Request(
        net=networks[0],
        gnet=networks[1] if len(networks) > 1 else None,
        guidance=cell.guidance,
        sampler=table.sampler,
        precision=options.precision,
        vae=options.vae,
    )
    return prepare(request, device), make_scorer(reference, device, [cell.metric], options.weights_dir)


def _add_identities(path: Path, record: dict[str, Any], generation: Generation, scorer: Scorer) -> None:
    """Add detector and reference to the record; refuse a record of other weights or another device."""
    if "settings" in record:
        _refuse_other_settings(path, record["settings"], generation.settings)
    [detector] = scorer.detectors
    record["detector"] = detector.fingerprint
    record["reference"] = {"num_images": scorer.reference.num_images, "source": dict(scorer.reference.source)}


def _measure_range(
    record: Mapping[str, Any], generation: Generation, scorer: Scorer, options: MeasureOptions, path: Path, first: int
) -> dict[str, Any]:
    """The value of the images of seeds first ... first + options.num - 1, resumed from `path` if possible."""
    metric = record["asked"]["metric"]
    owner = json.loads(json.dumps({"asked": record["asked"], "settings": generation.settings, "first_seed": first}))
    saved = SavedRange(path)
    done, save_every = dist.on_rank0(saved.open, owner, options.save_every)
    made_by = {**provenance(scorer.device), "processes": dist.world_size(), "batch": options.batch}
    if done:
        dist.print0(f"Resuming after {done} of {options.num} images")
    for stop in save_points(options.num, save_every):
        if stop <= done:
            continue
        started = time.monotonic()
        batches = (batch.images for batch in generation.batches(range(first + done, first + stop), options.batch))
        count, statistics = image_statistics(batches, scorer.detectors, scorer.device)
        elapsed_sec = time.monotonic() - started
        dist.on_rank0(saved.extend, count, statistics[metric], elapsed_sec, made_by)
        done = stop
    return dist.on_rank0(saved.result, scorer.reference, metric, first)


class SavedRange:
    """The images of one seed range measured so far, kept in the file `path`; used on rank 0 only."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = PartialStatistics({}, 0)

    def open(self, owner: Mapping[str, Any], save_every: int) -> tuple[int, int]:
        """Read what the file holds of `owner`; returns the number of images and the distance between saves."""
        self.partial = load_partial(self.path, owner, save_every)
        return self.partial.done, self.partial.save_every

    def extend(self, count: int, statistics: FeatureStatistics, elapsed_sec: float, made_by: Mapping[str, Any]) -> None:
        """Add the next `count` images and save."""
        self.partial = self.partial.plus(count, statistics, elapsed_sec, made_by)
        self.partial.save(self.path)

    def result(self, reference: Reference, metric: str, first: int) -> dict[str, Any]:
        """The value of the range, which starts at seed `first`, for the record of the cell."""
        return {
            "value": self.partial.value(reference, metric),
            "first_seed": first,
            "num_images": self.partial.done,
            "elapsed_sec": self.partial.elapsed_sec,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_by": list(self.partial.made_by),
        }


def save_points(num: int, save_every: int) -> list[int]:
    """Numbers of images after which to save: about every `save_every`, at equal distances of at least two.

    Two images are the fewest with a covariance.
    """
    parts = max(1, num // max(save_every, 2))
    return [num * (k + 1) // parts for k in range(parts)]
