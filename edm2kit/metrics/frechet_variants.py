"""Variants of the Frechet distance: extrapolated to infinitely many images, and averaged over encoders."""

from collections.abc import Mapping

import numpy as np
import torch

from edm2kit.metrics.frechet import growing_distances
from edm2kit.metrics.score import Sample, Score
from edm2kit.torch_utils import dist

_POINTS = 15
_MIN_IMAGES = 5000

# distances of the ImageNet validation set from the training set at 256 pixels
FD_VALIDATION = {"fid": 1.68, "fd_dinov2": 14.19}


def fd_infinity(sample: Sample) -> Score:
    """The Frechet distance of infinitely many images: distances at 15 sizes n are fitted by a line in 1 / n.

    The value is the line's intercept.
    The sizes are evenly spaced from 5000 (half of all images if there are fewer than 10,000) to all images; the subsets
    are nested in a random order. Chong and Forsyth 2020 (arXiv 1911.07023).
    """
    rows, reference = sample.generated, sample.reference_statistics
    smallest = min(_MIN_IMAGES, len(rows) // 2)
    if smallest < 2:
        raise ValueError(f"fd_infinity needs at least 4 images; got {len(rows)}")
    if smallest <= rows.shape[1]:
        dist.warn0(
            f"fd_infinity extrapolates from {smallest} images with {rows.shape[1]} features: a distance from so few "
            "does not yet fall as 1 / n, so the value is a rough guess. Use more images"
        )
    sizes = np.unique(np.linspace(smallest, len(rows), _POINTS).astype(int))
    order = torch.from_numpy(np.random.default_rng(sample.seed).permutation(len(rows)))
    distances = growing_distances(rows[order.to(rows.device)], sizes.tolist(), reference)
    design = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)
    (intercept, _), *_ = np.linalg.lstsq(design, np.array(distances), rcond=None)
    return Score(float(intercept), sample.influence)


def fdr(scores: Mapping[str, Score]) -> Score:
    """The mean of distances divided by those of the ImageNet validation set, over the encoders with such a value.

    `scores` are Frechet distances by detector. Only meaningful for ImageNet at 256 pixels. Raises ValueError if fewer
    than two detectors have a value.
    """
    parts = {name: score for name, score in scores.items() if name in FD_VALIDATION}
    if len(parts) < 2:
        raise ValueError(f"fdr needs the distances of at least two of {', '.join(FD_VALIDATION)}; got {list(parts)}")
    value = float(np.mean([score.value / FD_VALIDATION[name] for name, score in parts.items()]))
    influence = torch.zeros(1, dtype=torch.float64)
    for name, score in parts.items():
        if score.influence is None:
            return Score(value)
        influence = influence + score.influence / FD_VALIDATION[name] / len(parts)
    return Score(value, influence)
