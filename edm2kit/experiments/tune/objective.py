"""What a candidate is worth: its images from the seeds that all candidates share, scored by one metric."""

import contextlib
import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.cli.generation import Generation, prepare
from edm2kit.experiments.tune.sources import NetworkCache
from edm2kit.experiments.tune.space import Candidate, Space
from edm2kit.metrics.registry import ALL, FDR, METRICS
from edm2kit.metrics.scoring import Measurement, Scorer, features_and_classes
from edm2kit.torch_utils.arrays import read_npz
from edm2kit.torch_utils.files import atomic_write

FIRST_SEED = 1_000_000  # far from the seeds of any report
_MAX_KEPT_BYTES = 1 << 40  # of features


def direction(metric: str) -> int:
    """1 if small values of a metric are good, -1 if large ones are.

    Raises ValueError for "all", and for metrics of which neither is good.
    """
    own = metric.partition(".")[2] or metric
    if metric == ALL:
        raise ValueError("a search needs a single metric, such as fd_lite0 or fid.kid, not all")
    if own not in METRICS or metric == FDR:
        return 1
    better = METRICS[own].better
    if better not in ("lower", "higher"):
        raise ValueError(
            f"{metric} is good {better}, so there is nothing to make small or large; choose another metric"
        )
    return 1 if better == "lower" else -1


@dataclass(frozen=True)
class Objective:
    """Generates and scores candidates. Image k of every candidate has the seed FIRST_SEED + k, whatever the number.

    Features of generated images are kept in `folder`, so that a candidate that goes on to more images, or whose process
    was killed, generates only what is missing.
    """

    space: Space
    cache: NetworkCache
    scorer: Scorer
    metric: str
    batch: int
    folder: Path
    on_images: Callable[[int], Any] = lambda count: None  # called with the size of each batch that was generated

    def generation(self, candidate: Candidate, quiet: bool = True) -> Generation:
        """The engine for a candidate's images. Raises ValueError if its networks or settings do not fit.

        Unless `quiet` is False, warnings are dropped: they would be the same for hundreds of candidates.
        """
        loaded = {"net": self.cache.get(candidate.main)}
        if candidate.guide is not None:
            loaded["gnet"] = self.cache.get(candidate.guide)
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            return prepare(self.space.request(candidate), self.scorer.device, loaded=loaded)

    def measure(self, candidate: Candidate, num_images: int) -> Measurement:
        """Every value of the metric's detector over the first `num_images` seeds. Raises ValueError as `generation`."""
        path = self.folder / f"{hashlib.sha256(candidate.key.encode()).hexdigest()[:24]}.npz"
        kept = _read(path, [detector.name for detector in self.scorer.detectors])
        have = len(next(iter(kept.values()))) if kept else 0
        if have < num_images:
            fresh = self._features(candidate, range(FIRST_SEED + have, FIRST_SEED + num_images))
            kept = fresh if not kept else {name: np.concatenate([kept[name], fresh[name]]) for name in fresh}
            with atomic_write(path) as file:
                np.savez(file, **kept)  # type: ignore[arg-type]
        return self._score({name: rows[:num_images] for name, rows in kept.items()})

    def measure_seeds(self, candidate: Candidate, seeds: Sequence[int], replicates: int = 0) -> Measurement:
        """The same over other seeds, which are not kept; with `replicates`, with intervals."""
        scorer = replace(self.scorer, replicates=replicates)
        return self._score(self._features(candidate, seeds), scorer)

    def value(self, measurement: Measurement) -> float:
        """What the search makes small."""
        return direction(self.metric) * self.reading(measurement)

    def reading(self, measurement: Measurement) -> float:
        """The value of the metric itself."""
        return measurement.values[self.name_in(measurement)]

    def name_in(self, measurement: Measurement) -> str:
        """The name of the metric among the values, which has its detector's name in front."""
        if self.metric in measurement.values:
            return self.metric
        # a metric without its detector's name, which is the only one
        found = [name for name in measurement.values if name.endswith(f".{self.metric}")]
        if len(found) != 1:
            raise ValueError(
                f"{self.metric} has {len(found)} values; name its detector, such as fd_lite0.{self.metric}"
            )
        return found[0]

    def timed(self, candidate: Candidate, num_images: int) -> float:
        """Seconds per image at the first `num_images` of fresh seeds, the networks loaded before."""
        generation = self.generation(candidate)
        started = time.monotonic()
        batches = ((batch.images, batch.classes) for batch in generation.engine.batches(range(num_images), self.batch))
        features_and_classes(batches, self.scorer.detectors, self.scorer.device)
        return (time.monotonic() - started) / num_images

    def _features(self, candidate: Candidate, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        batches = self.generation(candidate).engine.batches(seeds, self.batch)
        pairs = self._counted((batch.images, batch.classes) for batch in batches)
        features, classes = features_and_classes(pairs, self.scorer.detectors, self.scorer.device)
        found = {name: rows.numpy() for name, rows in features.items()}
        # a network without classes has none to keep
        return {**found, "classes": classes.numpy() if len(classes) else np.full(len(seeds), -1)}

    def _counted(self, pairs: Iterable[Any]) -> Iterator[Any]:
        """`pairs`, each counted when the next is asked for: then its features are known."""
        for pair in pairs:
            yield pair
            self.on_images(len(pair[0]))

    def _score(self, kept: Mapping[str, np.ndarray], scorer: Scorer | None = None) -> Measurement:
        classes = torch.from_numpy(kept["classes"])
        known = classes if len(classes) and int(classes.min()) >= 0 else classes[:0]
        features = {name: torch.from_numpy(rows) for name, rows in kept.items() if name != "classes"}
        return (scorer or self.scorer).measure_features(features, known, warn_if_few=False)


def _read(path: Path, detectors: Sequence[str]) -> dict[str, np.ndarray]:
    """Kept features, {} if there are none or if they are damaged."""
    try:
        arrays = read_npz(path, max_bytes=_MAX_KEPT_BYTES)
        return {name: arrays[name] for name in (*detectors, "classes")}
    except (OSError, ValueError, KeyError):
        return {}
