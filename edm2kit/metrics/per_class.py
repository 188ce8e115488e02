"""The Frechet distance of each class from real images of the same class (intra-class FID)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import Moments
from edm2kit.torch_utils import dist

_LISTED = 5  # classes named in a message


@dataclass(frozen=True)
class ClassDistance:
    """The distance of the generated images of a class from its real images, and how many of both there are."""

    distance: float
    num_images: int
    num_real: int


def distances_by_class(
    generated: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, real_labels: torch.Tensor, name: str = "features"
) -> dict[int, ClassDistance]:
    """The Frechet distance of generated from real features, float32 [N, F] each, within every class.

    `labels` and `real_labels` are classes, int64 [N]. Classes with fewer than two images on one side are left out with
    a warning; if a class has no more images than features, a warning says that its distance is far too large. `name` is
    the detector in these messages. Raises ValueError if no class remains. Miyato and Koyama 2018 (arXiv 1802.05637)
    call the mean of these distances intra FID.
    """
    result, left_out = {}, []
    for number in torch.unique(torch.cat([labels, real_labels])).tolist():
        ours, theirs = generated[labels == number], real[real_labels == number]
        if min(len(ours), len(theirs)) < 2:
            left_out.append(number)
            continue
        result[number] = ClassDistance(_distance(ours, theirs), len(ours), len(theirs))
    if left_out:
        dist.warn0(f"{name}: classes with fewer than 2 generated or real images are left out: {_some(left_out)}")
    if not result:
        raise ValueError("no class has at least 2 generated and 2 real images; distances by class need both")
    fewest = min(min(one.num_images, one.num_real) for one in result.values())
    if fewest <= generated.shape[1]:
        dist.warn0(
            f"{name} has {generated.shape[1]} features, and a class as few as {fewest} images: distances by class are "
            "far too large. Compare them only with those of equally many images of each class"
        )
    return result


def _some(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return ", ".join(map(str, numbers[:_LISTED])) + more


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The Frechet distance of the rows of `x` [N, F] and `y` [M, F]."""
    if min(len(x), len(y)) > x.shape[1]:
        moments = [Moments(x.shape[1], rows.device) for rows in (x, y)]
        for one, rows in zip(moments, (x, y), strict=True):
            one.add(rows)
        return frechet_distance(*(part for one in moments for part in one.mean_and_covariance()[1:]))
    # With few images, the trace of (S1 S2)^(1/2) is the sum of the singular values of X Y^T, centred and scaled, which
    # is small: covariances of 2048 features would take seconds for each of 1000 classes.
    sets = [rows.double() for rows in (x, y)]
    means = [rows.mean(dim=0) for rows in sets]
    x, y = ((rows - mean) / np.sqrt(len(rows) - 1) for rows, mean in zip(sets, means, strict=True))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the detector returned features that are not finite (NaN or infinity)")
    shift = (means[0] - means[1]).square().sum()
    value = shift + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return max(float(value), 0.0)


def class_table(by_detector: Mapping[str, Mapping[int, ClassDistance]], names: tuple[str, ...] | None = None) -> str:
    """A line per class: its number and name, generated and real images, and its distance by each detector; the mean."""
    numbers = list(next(iter(by_detector.values())))
    rows = [["class", "images", "real", *by_detector]]
    for number in numbers:
        first = next(iter(by_detector.values()))[number]
        title = f"{number} {names[number]}" if names else str(number)
        distances = [f"{found[number].distance:.6g}" for found in by_detector.values()]
        rows.append([title, str(first.num_images), str(first.num_real), *distances])
    means = [np.mean([one.distance for one in found.values()]) for found in by_detector.values()]
    rows.append(["mean", "", "", *(f"{mean:.6g}" for mean in means)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for title, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([title.ljust(widths[0]), *padded]))
    return "\n".join(lines)
