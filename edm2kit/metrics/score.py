"""What a metric computes from, and what it returns: a value, and the effect of each image on it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import nn

from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.neighbours import BallCounts, Neighbourhood
from edm2kit.metrics.pairs import PairVisitor, scaled_rows, visit_pairs

_Visitor = TypeVar("_Visitor", bound=PairVisitor)


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
    Frechet distance, if intervals are wanted. `pair_visitors` make what `visited` will be asked for.
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
    pair_visitors: tuple[Callable[["Sample"], PairVisitor], ...] = ()

    @cached_property
    def _visited(self) -> dict[Callable[["Sample"], PairVisitor], PairVisitor]:
        return {}

    def visited(self, make: Callable[["Sample"], _Visitor]) -> _Visitor:
        """What `make` makes of this sample, after it has visited all pairs of images.

        The first call also shows the pairs to all of `pair_visitors`, so that they are computed once. Raises ValueError
        as `make` does.
        """
        if make not in self._visited:
            made: dict[Callable[[Sample], PairVisitor], PairVisitor] = {make: make(self)}
            for other in self.pair_visitors:
                if other not in made and other not in self._visited:
                    with contextlib.suppress(ValueError):  # it is raised when this one is asked for
                        made[other] = other(self)
            visit_pairs(*scaled_rows(self.generated, self.real_features), list(made.values()))
            self._visited.update(made)
        return cast(_Visitor, self._visited[make])

    @cached_property
    def neighbours(self) -> Neighbourhood:
        """Computed once for all metrics that need it."""
        return self.visited(ball_counts).found()

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


def ball_counts(sample: Sample) -> BallCounts:
    """What `Sample.neighbours` comes from. Raises ValueError for too few images and features that are not finite."""
    return BallCounts(sample.real_features, sample.generated)
