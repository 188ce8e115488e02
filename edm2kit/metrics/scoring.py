"""Images in, distances out: several metrics in one pass, shared among ranks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edm2kit.metrics.detectors.registry import Detector, load_detector
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import Moments, sum_over_ranks_
from edm2kit.metrics.precision_recall import Keeping, neighbour_scores
from edm2kit.metrics.reference import FeatureStatistics, Reference, load_reference
from edm2kit.torch_utils import dist


def image_statistics(
    batches: Iterable[torch.Tensor], detectors: Sequence[Detector], device: torch.device
) -> tuple[int, dict[str, FeatureStatistics]]:
    """Number of images of all ranks together, and the statistics of their features by metric.

    `batches`: this rank's images, uint8 [N, 1 or 3, H, W], possibly none. Every rank must call this. A ValueError or
    OSError that one rank meets is raised on all. Raises ValueError for fewer than two images.
    """
    moments = [Moments(detector.num_features, device) for detector in detectors]
    error = None
    try:
        for images in batches:
            images = images.to(device)
            for detector, moment in zip(detectors, moments, strict=True):
                moment.add(detector(images))
    except (ValueError, OSError) as caught:
        error = caught
    dist.raise_together(error)
    sum_over_ranks_(moments)
    statistics, count = {}, 0
    for detector, moment in zip(detectors, moments, strict=True):
        count, mean, covariance = moment.mean_and_covariance()
        statistics[detector.name] = FeatureStatistics(mean, covariance, detector.fingerprint)
    return count, statistics


def image_features(
    batches: Iterable[torch.Tensor], detectors: Sequence[Detector], device: torch.device
) -> dict[str, torch.Tensor]:
    """The features of all ranks' images by metric, on rank 0 (none elsewhere); arguments as `image_statistics`."""
    keeping = [Keeping(detector) for detector in detectors]
    image_statistics(batches, keeping, device)
    return {detector.name: detector.features() for detector in keeping}


@dataclass(frozen=True)
class Scorer:
    """Measures how far images are from reference statistics, by one or several metrics at once.

    With `real`, features of real images by metric as of `image_features`, also how they lie among real ones; that
    takes memory for the features of all images.
    """

    reference: Reference
    detectors: Sequence[Detector]
    device: torch.device
    real: Mapping[str, torch.Tensor] | None = None

    def score(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """The Frechet distance by metric of this and all other ranks' images; see `image_statistics`.

        With `real` also "METRIC.precision" and so on; see `edm2kit.metrics.precision_recall.neighbour_scores`.
        """
        detectors = self.detectors if self.real is None else [Keeping(detector) for detector in self.detectors]
        count, statistics = image_statistics(batches, detectors, self.device)
        for detector in self.detectors:
            if count <= detector.num_features:
                dist.warn0(
                    f"{detector.name} has {detector.num_features} features: a distance from {count} images is far too "
                    "large, and compares only with one from as many images"
                )
        result = distances(statistics, self.reference)
        if self.real is not None:
            for detector in detectors:
                features = detector.features()
                found = dist.on_rank0(_among, self.real[detector.name], features, self.device)
                result |= {f"{detector.name}.{name}": value for name, value in found.items()}
        return result


def _among(real: torch.Tensor, features: torch.Tensor, device: torch.device) -> dict[str, float]:
    where = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    return neighbour_scores(real.to(where), features.to(where))


def distances(statistics: Mapping[str, FeatureStatistics], reference: Reference) -> dict[str, float]:
    """Frechet distance from the reference by metric. Raises ValueError as `Reference.of` does."""
    result = {}
    for metric, ours in statistics.items():
        theirs = reference.of(metric)
        result[metric] = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    return result


def make_scorer(
    reference_path: str | Path,
    device: torch.device,
    metrics: Sequence[str] | None = None,
    weights_dir: str | Path | None = None,
) -> Scorer:
    """A scorer by `metrics`, None meaning all that the reference holds.

    Raises ValueError, before any weights are loaded, where the reference does not serve them.
    """
    reference = load_reference(reference_path)
    names = tuple(reference.statistics) if metrics is None else tuple(metrics)
    for name in names:
        reference.of(name)
    return Scorer(reference, [load_detector(name, device, weights_dir) for name in names], device)
