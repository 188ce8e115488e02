"""What a metric computes from, and what it returns: a value, and the effect of each image on it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.neighbours import Neighbourhood, neighbourhood


@dataclass(frozen=True)
class Score:
    """The value of a metric and how it varies with the choice of images.

    `influence` [n], float64: how the value changes, to first order, if the weight of an image grows, times n, with mean
    zero; None if unknown. `extra_variance` is the variance from random subsets and directions.
    """

    value: float
    influence: torch.Tensor | None = None
    extra_variance: float = 0.0

    @classmethod
    def mean_of(cls, contributions: torch.Tensor, factor: float = 1.0) -> "Score":
        """The mean of contributions [n] of images, times `factor`."""
        values = contributions.double().cpu() * factor
        mean = values.mean()
        return cls(float(mean), values - mean)


@dataclass(frozen=True)
class Sample:
    """The features of one detector, float32 [N, F] each, from which metrics are computed.

    `generated` are those to judge, `real` those of real images, `heldout` those of real images that the network was
    not trained on, `reference` the statistics of all real images, `head` the classifier of the detector.
    `labels` and `real_labels`, int64 [N], are classes. `influence` [N] are the effects of the generated images on the
    Frechet distance, if intervals are wanted.
    """

    generated: torch.Tensor
    statistics: FeatureStatistics
    reference: FeatureStatistics | None = None
    real: torch.Tensor | None = None
    heldout: torch.Tensor | None = None
    head: nn.Linear | None = None
    influence: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    real_labels: torch.Tensor | None = None
    seed: int = 0

    @cached_property
    def neighbours(self) -> Neighbourhood:
        """Computed once for all metrics that need it."""
        return neighbourhood(self.real_features, self.generated)

    @property
    def real_features(self) -> torch.Tensor:
        """`real`; raises ValueError if it is missing."""
        if self.real is None:
            raise ValueError("this metric needs the features of real images; give --real")
        return self.real

    @property
    def reference_statistics(self) -> FeatureStatistics:
        """`reference`; raises ValueError if it is missing."""
        if self.reference is None:
            raise ValueError("this metric needs reference statistics; give --ref")
        return self.reference
