"""Feedback guidance (FBG): each image's weight follows from how well its own path so far fits the condition."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from edm2kit.denoiser import levels_of
from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.history import Steps
from edm2kit.guidance.option_types import number
from edm2kit.guidance.rules.coordinates import inner, noise_level
from edm2kit.torch_utils.rng import StackedGenerator

Level = TypeVar("Level", float, torch.Tensor)
REFERENCE_WEIGHT = 3.0  # what the weight reaches at t0 if the path shows no evidence
HIGHEST_EVIDENCE = 3.0


class Path:
    """What is known of the images of one sampling run: their evidence, and where the last step began."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.is_step_new = False
        self.evidence: list[torch.Tensor] = []  # per negative, [N, 1, 1, 1]
        self.last: tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Evaluation] | None = None

    def begin(self, i: int, sigmas: torch.Tensor) -> None:
        if not self.steps.continues(i, sigmas):  # another run, or noise was added to this one
            self.evidence, self.last = [], None
        self.is_step_new = True


@dataclass(frozen=True)
class Feedback:
    """D + (w - 1) (g - 1) (D - D_neg), with g = e^L / (e^L - (1 - prior)) from the evidence L of each image.

    The networks' mixture is prior p(x|c) + (1 - prior) p(x); w 2 gives the published D_neg + g (D - D_neg), with g up
    to `max_weight`. L is 0 at first, so g is 1 / prior. After a step from x at sigma to x' at sigma' it grows by
    temperature (log p(x' | x, D) - log p(x' | x, D_neg)) + offset, both densities being those of a stochastic step, of
    variance s^2 = (sigma^2 - sigma'^2) sigma'^2 / sigma^2. Guidance thus grows while the two networks' predictions
    remain equally likely, and fades once the condition's is the more likely one.

    Offset and temperature follow from two times, which run from 1 (first step) to 0: without evidence g is 3 at
    `t_reference`, and s^2 at `t_evidence` decides how much the evidence counts. x' is the x of the next step, so
    nothing else is evaluated; with churn, x' and sigma' are those after noise was added. If sigma' is not below sigma,
    as it happens where churn sets in below S_max, there was no such step, and only the offset counts. Each negative has
    an evidence of its own, which is forgotten when noise leads back to a higher level. Outside a run L is 0.
    """

    prior: float
    t_reference: float
    t_evidence: float
    max_weight: float
    path: Path = field(default_factory=Path, compare=False, repr=False)

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        guided = D
        for weight, negative, evidence in zip(weights, negatives, self._evidence(D, negatives, at), strict=True):
            guided = guided + (weight - 1) * (self.weight_of(evidence) - 1) * (D - negative)
        return guided

    def weight_of(self, evidence: torch.Tensor) -> torch.Tensor:
        """g of the evidence L, up to `max_weight`."""
        lowest = self.evidence_of(self.max_weight)
        likelihood = evidence.clamp(min=lowest).exp()
        return (likelihood / (likelihood - (1 - self.prior))).clamp(max=self.max_weight)

    def evidence_of(self, weight: float) -> float:
        """The evidence L at which g is `weight`."""
        return math.log((1 - self.prior) * weight / (weight - 1))

    def _evidence(self, D: torch.Tensor, negatives: Sequence[torch.Tensor], at: Evaluation) -> Sequence[torch.Tensor]:
        path = self.path
        none = [torch.zeros_like(noise_level(at, D)).expand(len(D), *[1] * (D.ndim - 1)) for _ in negatives]
        if at.i is None:
            return none
        if path.is_step_new:
            known = path.evidence if len(path.evidence) == len(negatives) else none
            if path.last is not None and len(path.last[2]) == len(negatives):
                known = self._updated(known, path.last, D, at)
            path.evidence = list(known)
            path.last = at.x.to(D.dtype), D, list(negatives), at
            path.is_step_new = False  # the corrector's call changes nothing
        return path.evidence

    def _updated(
        self,
        evidence: Sequence[torch.Tensor],
        last: tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Evaluation],
        D_now: torch.Tensor,
        at: Evaluation,
    ) -> list[torch.Tensor]:
        x, D, negatives, before = last
        x_next = at.x.to(D.dtype)
        assert at.sigmas is not None
        offset, temperature = self.constants(at.sigmas)
        share, variance = _stochastic_step(noise_level(before, D), noise_level(at, D_now))
        updated = []
        for known, negative in zip(evidence, negatives, strict=True):
            # |x' - m|^2 - |x' - m_neg|^2 of the two means, without subtracting large numbers
            mean, mean_neg = (share * x + (1 - share) * y for y in (D, negative))
            excess = inner((1 - share) * (negative - D), 2 * x_next - mean - mean_neg)
            misfit = torch.where(variance > 0, temperature / (2 * variance) * excess, 0)
            new = known - misfit + offset
            updated.append(new.clamp(self.evidence_of(self.max_weight), HIGHEST_EVIDENCE))
        return updated

    def constants(self, sigmas: torch.Tensor) -> tuple[float, float]:
        """Offset and temperature of a run with these noise levels."""
        num_steps = len(sigmas) - 1
        offset = self.evidence_of(REFERENCE_WEIGHT) / ((1 - self.t_reference) * num_steps)
        step = min(round((1 - self.t_evidence) * num_steps), max(num_steps - 2, 0))  # the last one ends without noise
        _, variance = _stochastic_step(*levels_of(sigmas)[step : step + 2])
        return offset, abs(2 * variance * offset / 10)

    def for_images(self, rng: StackedGenerator) -> "Feedback":
        return replace(self, path=Path())

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Feedback":
        self.path.begin(i, sigmas)
        return self


def _stochastic_step(sigma: Level, sigma_next: Level) -> tuple[Level, Level]:
    """(r, s^2): given D, a stochastic step has the mean r x + (1 - r) D and the variance s^2."""
    share = (sigma_next / sigma) ** 2
    return share, (sigma**2 - sigma_next**2) * share


def _make(*, fbg_prior: float, fbg_t_reference: float, fbg_t_evidence: float, fbg_max_weight: float) -> Feedback:
    return Feedback(fbg_prior, fbg_t_reference, fbg_t_evidence, fbg_max_weight)


RULE = Rule(
    "feedback guidance (FBG): a weight per image and step, large as long as its path does not show its condition",
    _make,
    options=(  # the best settings for EDM2-XS by FD-DINOv2
        Option(
            "fbg-prior", number(0.001, 0.999999), 0.999, "Assumed share of images that follow their condition anyway"
        ),
        Option(
            "fbg-t-reference", number(0, 0.99), 0.556, "Time from 1 (start) to 0 when an unclear image has weight 3"
        ),
        Option("fbg-t-evidence", number(0, 1), 0.429, "Time from 1 (start) to 0 whose step sizes the evidence"),
        Option("fbg-max-weight", number(1.001, 1e6), 10.0, "Largest weight, reached while w is 2"),
    ),
    formula="D + sum of (w_i - 1) (g_i - 1) (D - D_neg_i), g = e^L/(e^L - (1 - prior)), L the evidence of the path",
    source="Koulischer et al. 2025 (arXiv 2506.06085); tested on EDM2-XS, 64 stochastic steps, which is w 2",
    pick_when="some conditions need much guidance and others none; best with a stochastic sampler (--S_churn)",
)
