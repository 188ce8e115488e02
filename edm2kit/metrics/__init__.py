"""Scores of generated images: Frechet distances and the other metrics of the field.

Example:

    from edm2kit.metrics import measure_reference, score_images

    reference = measure_reference(real_images, ["fd_lite0"])  # uint8 [N, 3, H, W]
    print(score_images(generated_images, reference))
"""

from edm2kit.metrics.detectors.clip import clip_detector
from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.exported import export_detector, exported_detector
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.detectors.preprocess import Preprocessing
from edm2kit.metrics.detectors.registry import DETECTORS, Detector, load_detector, register_detector
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import FeatureStatistics, Moments, merge_statistics
from edm2kit.metrics.precision_recall import neighbour_scores
from edm2kit.metrics.reference import Reference, load_reference, save_reference
from edm2kit.metrics.registry import METRICS, Metric
from edm2kit.metrics.score import Sample, Score
from edm2kit.metrics.scoring import (
    Evaluator,
    Measurement,
    Scorer,
    image_features,
    image_statistics,
    make_scorer,
    measure_reference,
    score_images,
)

__all__ = [
    "DETECTORS",
    "METRICS",
    "DINOv2ViT",
    "Detector",
    "Evaluator",
    "FeatureStatistics",
    "InceptionV3",
    "Measurement",
    "Metric",
    "Moments",
    "Preprocessing",
    "Reference",
    "Sample",
    "Score",
    "Scorer",
    "clip_detector",
    "export_detector",
    "exported_detector",
    "frechet_distance",
    "image_features",
    "image_statistics",
    "load_detector",
    "load_reference",
    "make_scorer",
    "measure_reference",
    "merge_statistics",
    "neighbour_scores",
    "register_detector",
    "save_reference",
    "score_images",
]
