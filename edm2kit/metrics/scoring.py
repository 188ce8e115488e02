"""Scores of images: one pass through every detector, shared among ranks, then all metrics of its features."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edm2kit.metrics import registry
from edm2kit.metrics.detectors.registry import Detector, load_detectors
from edm2kit.metrics.frechet import frechet_distance, frechet_influence
from edm2kit.metrics.frechet_variants import fdr
from edm2kit.metrics.moments import FeaturePass, FeatureStatistics, Moments, statistics_of
from edm2kit.metrics.per_class import ClassDistance, distances_by_class
from edm2kit.metrics.reference import Reference, load_reference
from edm2kit.metrics.score import Sample, Score
from edm2kit.torch_utils import dist

REPLICATES = 1000  # of the bootstrap
CONFIDENCE = 0.95
_BATCH = 32  # images at once, if they come as one tensor
_BLOCK_REPLICATES = 50
_NO_VARIANCE = 1e-12  # of the squared mean: what rounding leaves of equal images
_NEIGHBOUR_METRICS = ("precision", "recall", "density", "coverage")

# uint8 [N, 1 or 3, H, W]: one tensor, or batches, which may be pairs with classes, int64 [N]
Images = torch.Tensor | Iterable[torch.Tensor] | Iterable[tuple[torch.Tensor, torch.Tensor | None]]


def measure_reference(images: Images, metrics: Sequence[str], device: torch.device | str = "cpu") -> Reference:
    """Reference statistics of real images, for `score_images` or `save_reference`.

    `images` are uint8 [N, 1 or 3, H, W], one tensor or batches; `metrics` are keys of DETECTORS. Raises ValueError for
    an unknown metric, weights that cannot be loaded, and fewer than two images.

    Example: `reference = measure_reference(real_images, ["fd_lite0"])`
    """
    device = torch.device(device)
    return Reference(*image_statistics(images, load_detectors(metrics, device), device))


def score_images(
    images: Images,
    reference: Reference | str | Path,
    metrics: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    real: Images | None = None,
) -> dict[str, float]:
    """The Frechet distance of images from a reference, by detector (lower is better), and further metrics.

    `images` as in `measure_reference`; `reference`, or the path of one; `metrics` are names as for `--metrics`, by
    default all detectors in the reference. `real` images are needed for metrics that compare image by image. Raises
    ValueError if the reference lacks a metric, weights cannot be loaded, or there are fewer than two images.

    Example: `score_images(generated_images, "real.npz")` returns `{"fid": 3.2, "fd_dinov2": 81.5}`.
    """
    scorer = make_scorer(reference, torch.device(device), metrics)
    if real is not None:
        features = image_features(real, scorer.detectors, scorer.device)
        scorer = Scorer(scorer.reference, scorer.detectors, scorer.device, features, names=scorer.names)
    return scorer.score(images)


def image_statistics(
    images: Images, detectors: Sequence[Detector], device: torch.device
) -> tuple[int, dict[str, FeatureStatistics]]:
    """The number of images of all ranks together, and the statistics of their features by metric.

    `images`: those of this rank, uint8 [N, 1 or 3, H, W], one tensor or batches, possibly none. Every rank must call
    this; a ValueError or OSError on one rank is raised on all. Raises ValueError for fewer than two images.
    """
    return _run(FeaturePass(detectors, device), images).statistics()


def image_features(images: Images, detectors: Sequence[Detector], device: torch.device) -> dict[str, torch.Tensor]:
    """The features of all ranks' images by metric, float32 [N, F] on the CPU of rank 0; [0, F] on other ranks.

    Arguments and errors as for `image_statistics`. If batch k is on rank k modulo the number of ranks, the images are
    in order.
    """
    return _run(FeaturePass(detectors, device, keep=True), images).features()


def features_and_classes(
    images: Images, detectors: Sequence[Detector], device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The features as from `image_features`, and the classes of the images, int64 [N], [0] if they are unknown."""
    features = _run(FeaturePass(detectors, device, keep=True), images)
    return features.features(), features.labels()


def _run(features: FeaturePass, images: Images) -> FeaturePass:
    error = None
    try:
        for batch in images.split(_BATCH) if isinstance(images, torch.Tensor) else images:
            features.add(*batch) if isinstance(batch, tuple) else features.add(batch)
    except (ValueError, OSError) as caught:
        error = caught
    dist.raise_together(error)
    return features


@dataclass(frozen=True)
class Measurement:
    """Values by metric, and the 95% interval of each for which one is known.

    An interval says how much the value would vary with other generated images of the same number (for recall and
    coverage: other real images). It does not contain the bias of a small number of images. `by_class` are the distances
    within each class by detector, if they were asked for; `class_counts` the numbers of images of each class, {} if
    the classes are unknown.
    """

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    num_images: int
    by_class: Mapping[str, Mapping[int, ClassDistance]] = field(default_factory=dict)
    class_counts: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """Measures how far images are from reference statistics, by one or several metrics.

    `names` as for `--metrics`. With `real` and `heldout`, the features of real images by detector from
    `image_features`, metrics that compare image by image can be computed; that needs memory for the features of all
    images. `real_labels`, int64 [N], are the classes of the real images. With `real` but without `names`, precision,
    recall, density and coverage are computed. `more` are further references by name, whose distances are called
    "DETECTOR@NAME". With `per_class`, distances are computed within each class, too, from `real`.
    """

    reference: Reference
    detectors: Sequence[Detector]
    device: torch.device
    real: Mapping[str, torch.Tensor] | None = None
    heldout: Mapping[str, torch.Tensor] | None = None
    real_labels: torch.Tensor | None = None
    names: tuple[str, ...] | None = None
    more: Mapping[str, Reference] = field(default_factory=dict)
    replicates: int = 0
    per_class: bool = False

    def __repr__(self) -> str:
        detectors = ", ".join(detector.name for detector in self.detectors)
        return f"Scorer: {', '.join(self.names or (detectors,))} on {self.device}\n  {self.reference!r}"

    def score(self, images: Images) -> dict[str, float]:
        """The Frechet distance by detector of the images of all ranks; arguments and errors as for `image_statistics`.

        Other metrics are called "DETECTOR.METRIC"; see `edm2kit.metrics.registry.METRICS`.
        """
        return dict(self.measure(images).values)

    def measure(self, images: Images) -> Measurement:
        """The values as from `score`, with an interval for each if `replicates` is positive."""
        metrics = self._metrics()
        return self._finish(_run(self._feature_pass(metrics), images), metrics)

    def measure_features(
        self,
        features: Mapping[str, torch.Tensor],
        labels: torch.Tensor | None = None,
        warn_if_few: bool = True,
    ) -> Measurement:
        """The same from features that are known already, float32 [N, F] by detector, as from `features_and_classes`.

        `warn_if_few` is for distances that may be compared with those of other numbers of images.
        """
        empty = torch.empty(0, dtype=torch.int64)
        return self._measure_kept(features, empty if labels is None else labels, self._metrics(), warn_if_few)

    def check_names(self) -> None:
        """Raise ValueError if a metric lacks what it needs, before any image is generated."""
        self._metrics()

    def _feature_pass(self, metrics: Mapping[str, Sequence[str]]) -> FeaturePass:
        keep = self.replicates > 0 or self.per_class or any(metrics.values())
        return FeaturePass(self.detectors, self.device, keep)

    def _metrics(self) -> dict[str, tuple[str, ...]]:
        """The metrics of each detector besides its distance."""
        if self.per_class and (self.real is None or self.real_labels is None):
            raise ValueError(
                "distances by class need real images with classes; give --real PATH with class folders or labels"
            )
        detectors = [detector.name for detector in self.detectors]
        if self.names is None or set(self.names) <= set(detectors):
            return dict.fromkeys(detectors, () if self.real is None else _NEIGHBOUR_METRICS)
        inputs = {"real": self.real, "heldout": self.heldout, "real_labels": self.real_labels}
        given = {"reference", "head", *(name for name, value in inputs.items() if value is not None)}
        return registry.metrics_by_detector(self.names, detectors, given)

    def _finish(self, images: FeaturePass, metrics: Mapping[str, Sequence[str]]) -> Measurement:
        expected = self.reference.source.get("image_size")
        if expected is not None and images.image_size not in (None, expected):
            dist.warn0(
                f"the images are {images.image_size} pixels (height, width), those of the reference were {expected}: "
                "the distance contains the difference in sharpness; resize one of them with scripts/dataset_tool.py"
            )
        if not images.keep:
            count, statistics = images.statistics()
            self._check(count, statistics)
            return Measurement(self._distances(statistics), {}, count, class_counts=_class_counts(images.labels()))
        return dist.on_rank0(self._measure_kept, images.features(), images.labels(), metrics)

    def _measure_kept(
        self,
        features: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        metrics: Mapping[str, Sequence[str]],
        warn_if_few: bool = True,
    ) -> Measurement:
        # On the CPU, in the order of the images: the same bits for any number of ranks and size of batches.
        moments = []
        for rows in features.values():
            moments.append(Moments(rows.shape[1]))
            moments[-1].add(rows)
        count, statistics = statistics_of(self.detectors, moments)
        self._check(count, statistics, warn_if_few)
        values = self._distances(statistics)
        scores: dict[str, Score] = {name: Score(value) for name, value in values.items()}
        for detector in self.detectors:
            rows, own = features[detector.name], statistics[detector.name]
            if self.replicates > 0:
                references = {"": self.reference, **{f"@{name}": one for name, one in self.more.items()}}
                for suffix, reference in references.items():
                    name = f"{detector.name}{suffix}"
                    scores[name] = Score(values[name], frechet_influence(rows, own, reference.of(detector.name)))
            if metrics[detector.name]:
                influence = scores[detector.name].influence
                known = labels if len(labels) == count else None
                sample = self._sample(detector, rows, own, influence, known, metrics[detector.name])
            for metric in metrics[detector.name]:
                name = f"{detector.name}.{metric}"
                try:
                    scores[name] = registry.METRICS[metric].compute(sample)
                except ValueError as error:
                    if self.names is None or {metric, name} & set(self.names) or registry.ALL not in self.names:
                        raise
                    dist.warn0(f"{name} is left out: {error}")
        if self._wants_fdr(statistics):
            scores[registry.FDR] = fdr(scores)
        intervals = poisson_intervals(scores, self.replicates) if self.replicates > 0 else {}
        by_class = self._by_class(features, labels) if self.per_class else {}
        values = {name: score.value for name, score in scores.items()}
        return Measurement(values, intervals, count, by_class, _class_counts(labels))

    def _by_class(
        self, features: Mapping[str, torch.Tensor], labels: torch.Tensor
    ) -> dict[str, dict[int, ClassDistance]]:
        if self.real is None or self.real_labels is None or len(labels) != len(next(iter(features.values()))):
            raise ValueError("distances by class need the classes of all generated images")
        return {
            name: distances_by_class(rows, labels, self.real[name], self.real_labels, name)
            for name, rows in features.items()
        }

    def _wants_fdr(self, statistics: Mapping[str, FeatureStatistics]) -> bool:
        names = self.names or ()
        return registry.FDR in names or (registry.ALL in names and {"fid", "fd_dinov2"} <= set(statistics))

    def _sample(
        self,
        detector: Detector,
        rows: torch.Tensor,
        statistics: FeatureStatistics,
        influence: torch.Tensor | None,
        labels: torch.Tensor | None,
        metrics: Sequence[str],
    ) -> Sample:
        # mps has no float64
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        head = getattr(detector.net, "fc", None)
        return Sample(
            rows.to(device),
            statistics,
            self.reference.of(detector.name),
            real=None if self.real is None else self.real[detector.name].to(device),
            heldout=None if self.heldout is None else self.heldout[detector.name].to(device),
            head=head if isinstance(head, nn.Linear) else None,
            influence=influence,
            labels=labels,
            real_labels=self.real_labels,
            pair_visitors=registry.pair_visitors(metrics),
        )

    def _check(self, count: int, statistics: Mapping[str, FeatureStatistics], warn_if_few: bool = True) -> None:
        for detector in self.detectors:
            found = statistics[detector.name]
            if found.covariance.trace() <= _NO_VARIANCE * (found.mean @ found.mean):
                raise ValueError(
                    f"all {count} images have equal {detector.name} features: they are copies of one image"
                )
            if warn_if_few and count <= detector.num_features:
                dist.warn0(
                    f"{detector.name} has {detector.num_features} features: a distance from only {count} images is far "
                    "too large; compare it with distances from the same number of images only"
                )

    def _distances(self, statistics: Mapping[str, FeatureStatistics]) -> dict[str, float]:
        result = distances(statistics, self.reference)
        for name, reference in self.more.items():
            result |= {f"{metric}@{name}": value for metric, value in distances(statistics, reference).items()}
        return result


class Evaluator:
    """Scores images that come batch by batch, for example in a training loop.

    `scorer` from `make_scorer` says what to measure. Every rank must call `compute`.

    Example:

        evaluator = Evaluator(make_scorer("real.npz", torch.device("cuda")))
        for images in batches:  # uint8 [N, 3, H, W]
            evaluator.update(images)
        print(evaluator.compute())  # {"fid": 3.2}
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.reset()

    def __repr__(self) -> str:
        return f"Evaluator of {self.scorer!r}"

    def reset(self) -> None:
        """Forget all images."""
        self._metrics = self.scorer._metrics()
        self._pass = self.scorer._feature_pass(self._metrics)

    def update(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add a batch of this rank, uint8 [N, 1 or 3, H, W], and its classes, int64 [N], if they are known."""
        self._pass.add(images, labels)

    def compute(self) -> dict[str, float]:
        """The values of all images since the last `compute` or `reset`, as from `Scorer.score`; then forgets them."""
        measured = self.scorer._finish(self._pass, self._metrics)
        self.reset()
        return dict(measured.values)


def _class_counts(labels: torch.Tensor) -> dict[int, int]:
    classes, counts = labels.unique(return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def poisson_intervals(scores: Mapping[str, Score], replicates: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95% intervals of scores by the Poisson bootstrap of their first-order expansions.

    In each replicate every image has a Poisson(1) weight, and the score changes by the weighted mean of the influences.
    Unlike drawing images again, which makes copies, this neither shifts a Frechet distance upwards nor empties
    neighbourhoods, and it costs one product for all replicates. Scores without an influence have no interval unless
    they have an `extra_variance`. The ends are rounded to a ten-thousandth of the interval's width or finer: digits
    beyond that mean nothing, and depend on the number of threads.
    """
    rng = np.random.default_rng(seed)
    sizes = sorted({len(score.influence) for score in scores.values() if score.influence is not None})
    changes: dict[str, np.ndarray] = {}
    for size in sizes:
        ours = {k: s.influence for k, s in scores.items() if s.influence is not None and len(s.influence) == size}
        effects = torch.stack(list(ours.values()), dim=1).double().cpu().numpy()
        blocks = []
        for start in range(0, replicates, _BLOCK_REPLICATES):
            weights = rng.poisson(1, [min(_BLOCK_REPLICATES, replicates - start), size])
            blocks.append(weights @ effects / np.maximum(weights.sum(axis=1, keepdims=True), 1))
        changes |= dict(zip(ours, np.concatenate(blocks).T, strict=True))
    intervals = {}
    for name, score in scores.items():
        change = changes.get(name, np.zeros(replicates))
        if score.extra_variance > 0:
            change = change + np.sqrt(score.extra_variance) * rng.standard_normal(replicates)
        elif name not in changes:
            continue
        low, high = np.quantile(change, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        width = float(high - low)
        digits = 15 if width == 0 else 4 - math.floor(math.log10(width))
        intervals[name] = (round(score.value + float(low), digits), round(score.value + float(high), digits))
    return intervals


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
    """A scorer for `metrics`, by default all detectors in the reference (or the file of one).

    `metrics` may name detectors ("fid"), metrics ("kid"), one of one detector ("fid.kid") and "all". Raises ValueError,
    before any weights are loaded, if the reference lacks a detector.
    """
    if not isinstance(reference, Reference):
        reference = load_reference(reference)
    names = None if metrics is None else tuple(metrics)
    detectors = tuple(reference.statistics)
    if names is not None:
        detectors = registry.detectors_of(names, detectors)
    for name in detectors:
        reference.of(name)
    return Scorer(reference, load_detectors(detectors, device, weights_dir), device, names=names)
