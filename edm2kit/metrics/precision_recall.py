"""Precision and recall, density and coverage: do generated images look real, and do they cover all real images?"""

import torch

from edm2kit.metrics.neighbours import COVERAGE_NEIGHBOURS, MANIFOLD_NEIGHBOURS, neighbourhood
from edm2kit.metrics.score import Sample, Score


def neighbour_scores(
    real: torch.Tensor,
    fake: torch.Tensor,
    manifold_neighbours: int = MANIFOLD_NEIGHBOURS,
    coverage_neighbours: int = COVERAGE_NEIGHBOURS,
) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features [M, F] against real features [N, F].

    The ball around an image reaches to its k-th nearest neighbour in its own set. With k = `manifold_neighbours`,
    `precision` is the fraction of generated images inside a real ball, and `recall` the fraction of real images inside
    a generated ball. With k = `coverage_neighbours`, `density` is the mean number of real balls around a generated
    image, divided by k, and `coverage` the fraction of real balls that contain a generated image.

    All four depend on N and M, so compare only values from equal numbers of images. Raises ValueError for other shapes,
    too few images, and features that are not finite.

    Example: `neighbour_scores(detector(real_images), detector(fake_images))["recall"]`
    """
    found = neighbourhood(real, fake, manifold_neighbours, coverage_neighbours)
    return {
        "precision": found.is_precise.double().mean().item(),
        "recall": found.is_recalled.double().mean().item(),
        "density": found.num_balls.double().mean().item() / coverage_neighbours,
        "coverage": found.is_covered.double().mean().item(),
    }


def precision(sample: Sample) -> Score:
    """The fraction of generated images inside a ball around a real image."""
    return Score.mean_of(sample.neighbours.is_precise)


def recall(sample: Sample) -> Score:
    """The fraction of real images inside a ball around a generated image; the interval is over real images."""
    return Score.mean_of(sample.neighbours.is_recalled)


def density(sample: Sample) -> Score:
    """The mean number of real balls around a generated image, divided by 5."""
    return Score.mean_of(sample.neighbours.num_balls, 1 / COVERAGE_NEIGHBOURS)


def coverage(sample: Sample) -> Score:
    """The fraction of real balls that contain a generated image; the interval is over real images."""
    return Score.mean_of(sample.neighbours.is_covered)
