"""History-guided sampling (HiGS): away from the average of what the network answered in earlier steps.

D and the average belong to different x, so what is combined matters; the paper computes in D.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, levels_of
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.history import History
from edm2kit.guidance.option_types import number
from edm2kit.guidance.rules.coordinates import inner, ratio
from edm2kit.torch_utils.rng import StackedGenerator


class Average(NamedTuple):
    """A weighted sum of earlier D, and the sum of the weights."""

    total: torch.Tensor
    weight: float

    def with_latest(self, D: torch.Tensor, share: float) -> "Average":
        """The same with D in it; each earlier one counts 1 - share times as much as the one after it."""
        return Average(D + (1 - share) * self.total, 1 + (1 - share) * self.weight)


def cosine_basis(size: int) -> torch.Tensor:
    """The orthonormal DCT-II of vectors of `size` values, float64 [size, size]; row k has frequency k / size."""
    k, position = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * k * (2 * position + 1) / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def high_frequencies(images: torch.Tensor, cut: float) -> torch.Tensor:
    """`images` [N, C, H, W] without their cosine components of frequency sqrt((k/H)^2 + (l/W)^2) up to `cut`.

    A negative `cut` leaves images as they are, and 0 removes their mean.
    """
    if cut < 0:
        return images
    height, width = images.shape[2:]
    down, across = (torch.arange(size, dtype=torch.float64) / size for size in (height, width))
    low = (down[:, None] ** 2 + across**2).sqrt() <= cut
    rows, columns = (cosine_basis(size).to(images) for size in (height, width))
    components = (rows @ images @ columns.T).masked_fill(~low.to(images.device), 0)
    return images - rows.T @ components @ columns


@dataclass(frozen=True)
class HistoryGuided(Wrapper):
    """D + (w - 1) high(d - (1 - parallel) d along D), d = D - h, h the weighted mean of D in earlier steps.

    The step before has the weight 1 in h, the one before that 1 - average, and so on. `high` removes frequencies up to
    `cut`. It acts in steps whose time t = sigma / (1 + sigma), that of a flow, is in [t_low, t_high]; D is remembered
    in all. The first step of a run or interval has no history and is not guided. Sadat et al. 2025 (arXiv
    2509.22300).
    """

    net: Denoiser
    weight: float
    average: float
    parallel: float
    cut: float
    t_low: float
    t_high: float
    history: History[Average] = field(default_factory=History, compare=False, repr=False)
    i: int | None = None
    time: float = 0.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        D = self.net(x, sigma, condition)
        if self.i is None:
            return D
        before = self.history.latest
        if self.history.is_first:
            earlier = Average(torch.zeros_like(D), 0.0) if before is None else before
            self.history.keep(earlier.with_latest(D, self.average))
        if before is None or self.weight == 1 or not self.t_low <= self.time <= self.t_high:
            return D
        difference = D - before.total / before.weight
        along = ratio(inner(difference, D), inner(D, D), otherwise=0.0) * D
        return D + (self.weight - 1) * high_frequencies(difference - (1 - self.parallel) * along, self.cut)

    def scaled(self, share: float) -> "HistoryGuided":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, weight=1 + (self.weight - 1) * share)

    def for_images(self, rng: StackedGenerator) -> "HistoryGuided":
        return replace(super().for_images(rng), history=History())

    def for_step(self, i: int, sigmas: torch.Tensor) -> "HistoryGuided":
        self.history.begin(i, sigmas)
        sigma = levels_of(sigmas)[i]
        return replace(super().for_step(i, sigmas), i=i, time=sigma / (1 + sigma))


def _build(
    parts: Parts,
    weight: float,
    *,
    higs_average: float,
    higs_parallel: float,
    higs_cut: float,
    higs_t_low: float,
    higs_t_high: float,
) -> Denoiser:
    if higs_t_low > higs_t_high:
        raise ValueError(f"--higs-t-low is {higs_t_low:g} and --higs-t-high {higs_t_high:g}; nothing is in between")
    if weight == 1:
        return parts.net
    return HistoryGuided(parts.net, weight, higs_average, higs_parallel, higs_cut, higs_t_low, higs_t_high)


METHOD = Method(
    "history-guided sampling (HiGS): away from the average answer of earlier steps",
    "1 main",
    build=_build,
    around=True,
    weight=2.0,
    remembers=True,
    options=(
        Option("higs-average", number(0.001, 1), 0.75, "How fast earlier answers are forgotten; 1: the last one alone"),
        Option("higs-parallel", number(), 0.0, "Share of the difference along D that is kept: 0 none, 1 all"),
        Option(
            "higs-cut",
            number(-1, 1.5),
            0.05,
            "Largest frequency removed from the difference, 1 being that of single pixels; -1: none",
        ),
        Option("higs-t-low", number(0, 1), 0.4, "Lowest time sigma/(1 + sigma) at which it acts; 0.4 is sigma 0.67"),
        Option("higs-t-high", number(0, 1), 0.95, "Highest time sigma/(1 + sigma) at which it acts; 0.95 is sigma 19"),
    ),
    formula="D + (w - 1) high(d - (1 - parallel) d along D), d = D - mean of earlier D",
    source="Sadat et al. 2025 (arXiv 2509.22300); tested on SiT at 256x256",
    pick_when="images lack detail and no further evaluation is affordable, or on top of cfg or autoguidance",
)
