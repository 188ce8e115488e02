"""Scores of images: Frechet distances by several metrics in one pass, shared among ranks, and a table of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edm2kit.metrics.detectors.registry import Detector, load_detector
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import FeatureStatistics, Moments, sum_over_ranks_
from edm2kit.metrics.precision_recall import neighbour_scores
from edm2kit.metrics.reference import Reference, load_reference
from edm2kit.torch_utils import dist

_BATCH = 32  # images at once, if they come as one tensor

Images = torch.Tensor | Iterable[torch.Tensor]  # uint8 [N, 1 or 3, H, W]: one tensor, or batches
Runs = Mapping[str, Mapping[str, float]]  # run -> metric -> value


def measure_reference(images: Images, metrics: Sequence[str], device: torch.device | str = "cpu") -> Reference:
    """Reference statistics of real images, for `score_images` or `save_reference`.

    `images` are uint8 [N, 1 or 3, H, W], one tensor or batches; `metrics` are keys of DETECTORS. Raises ValueError for
    an unknown metric, weights that cannot be loaded, and fewer than two images.

    Example: `reference = measure_reference(real_images, ["fd_random"])`
    """
    device = torch.device(device)
    return Reference(*image_statistics(images, [load_detector(name, device) for name in metrics], device))


def score_images(
    images: Images,
    reference: Reference | str | Path,
    metrics: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The Frechet distance of images from a reference, by metric; lower is better.

    `images` as in `measure_reference`; `reference`, or the path of one; `metrics`, by default all in the reference.
    Raises ValueError if the reference lacks a metric, weights cannot be loaded, or there are fewer than two images.

    Example: `score_images(generated_images, "real.npz")` returns `{"fid": 3.2, "fd_dinov2": 81.5}`.
    """
    return make_scorer(reference, torch.device(device), metrics).score(images)


def image_statistics(
    images: Images, detectors: Sequence[Detector], device: torch.device
) -> tuple[int, dict[str, FeatureStatistics]]:
    """The number of images of all ranks together, and the statistics of their features by metric.

    `images`: those of this rank, uint8 [N, 1 or 3, H, W], one tensor or batches, possibly none. Every rank must call
    this; a ValueError or OSError on one rank is raised on all. Raises ValueError for fewer than two images.
    """
    count, statistics, _ = _measure(images, detectors, device, keep_features=False)
    return count, statistics


def image_features(images: Images, detectors: Sequence[Detector], device: torch.device) -> dict[str, torch.Tensor]:
    """The features of all ranks' images by metric, float32 [N, F] on the CPU of rank 0; [0, F] on other ranks.

    Arguments and errors as for `image_statistics`. The order of the images is not kept.
    """
    return _measure(images, detectors, device, keep_features=True)[2]


def _measure(
    images: Images, detectors: Sequence[Detector], device: torch.device, keep_features: bool
) -> tuple[int, dict[str, FeatureStatistics], dict[str, torch.Tensor]]:
    """Count, statistics and, with `keep_features`, features of all ranks' images; 400 MB for 50,000 by Inception."""
    moments = [Moments(detector.num_features, device) for detector in detectors]
    kept = [[torch.empty(0, detector.num_features)] for detector in detectors]
    error = None
    try:
        for batch in images.split(_BATCH) if isinstance(images, torch.Tensor) else images:
            batch = batch.to(device)
            for detector, moment, rows in zip(detectors, moments, kept, strict=True):
                features = detector(batch)
                moment.add(features)
                if keep_features:
                    rows.append(features.cpu())
    except (ValueError, OSError) as caught:
        error = caught
    dist.raise_together(error)
    sum_over_ranks_(moments)
    count, statistics, features_of = 0, {}, {}
    for detector, moment, rows in zip(detectors, moments, kept, strict=True):
        count, mean, covariance = moment.mean_and_covariance()
        statistics[detector.name] = FeatureStatistics(mean, covariance, detector.fingerprint)
        if keep_features:
            features_of[detector.name] = torch.cat([rows[0], *dist.gather_on_rank0(torch.cat(rows))])
    return count, statistics, features_of


@dataclass(frozen=True)
class Scorer:
    """Measures how far images are from reference statistics, by one or several metrics.

    With `real`, the features of real images by metric from `image_features`, it also computes precision, recall,
    density and coverage; that needs memory for the features of all images.
    """

    reference: Reference
    detectors: Sequence[Detector]
    device: torch.device
    real: Mapping[str, torch.Tensor] | None = None

    def score(self, images: Images) -> dict[str, float]:
        """The Frechet distance by metric of the images of all ranks; arguments and errors as for `image_statistics`.

        With `real` also "METRIC.precision" and so on; see `edm2kit.metrics.precision_recall.neighbour_scores`.
        """
        count, statistics, features = _measure(images, self.detectors, self.device, self.real is not None)
        for detector in self.detectors:
            if count <= detector.num_features:
                dist.warn0(
                    f"{detector.name} has {detector.num_features} features: a distance from only {count} images is far "
                    "too large; compare it with distances from the same number of images only"
                )
        result = distances(statistics, self.reference)
        if self.real is not None:
            compute_device = torch.device("cpu") if self.device.type == "mps" else self.device  # mps has no float64
            for name, rows in features.items():
                real = self.real[name].to(compute_device)
                scores = dist.on_rank0(neighbour_scores, real, rows.to(compute_device))
                result |= {f"{name}.{score}": value for score, value in scores.items()}
        return result


def distances(statistics: Mapping[str, FeatureStatistics], reference: Reference) -> dict[str, float]:
    """The Frechet distance from the reference by metric. Raises ValueError as `Reference.of` does."""
    result = {}
    for metric, ours in statistics.items():
        theirs = reference.of(metric)
        result[metric] = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    return result


def make_scorer(
    reference: Reference | str | Path,
    device: torch.device,
    metrics: Sequence[str] | None = None,
    weights_dir: str | Path | None = None,
) -> Scorer:
    """A scorer for `metrics`, by default all in the reference (or the file of one).

    Raises ValueError, before any weights are loaded, if the reference lacks a metric.
    """
    if not isinstance(reference, Reference):
        reference = load_reference(reference)
    names = tuple(reference.statistics) if metrics is None else tuple(metrics)
    for name in names:
        reference.of(name)
    return Scorer(reference, [load_detector(name, device, weights_dir) for name in names], device)


def summary(runs: Runs) -> dict[str, dict[str, Any]]:
    """Minimum, mean and all values by metric; papers report the minimum of three runs."""
    result = {}
    for metric in next(iter(runs.values())):
        values = {run: by_metric[metric] for run, by_metric in runs.items()}
        result[metric] = {"min": min(values.values()), "mean": sum(values.values()) / len(values), "values": values}
    return result


def table(runs: Runs) -> str:
    """One line per run and one column per metric, followed by minimum and mean if there are several runs."""
    rows = {run: list(by_metric.values()) for run, by_metric in runs.items()}
    columns = summary(runs)
    if len(runs) > 1:
        rows["min"] = [column["min"] for column in columns.values()]
        rows["mean"] = [column["mean"] for column in columns.values()]
    name_width = max(map(len, rows))
    lines = [" " * name_width, *(name.ljust(name_width) for name in rows)]
    for metric, values in zip(columns, zip(*rows.values(), strict=True), strict=True):
        cells = [metric, *(f"{value:.6g}" for value in values)]
        width = max(map(len, cells))
        lines = [f"{line}  {cell.rjust(width)}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(lines)
