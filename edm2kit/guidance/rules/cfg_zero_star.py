"""CFG-Zero*: the negative velocity is scaled to fit the positive one, and the first steps stand still."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import count
from edm2kit.guidance.rules.coordinates import inner, noise_level, ratio, shortened_velocity


@dataclass(frozen=True)
class CFGZeroStar:
    """v + sum of (w - 1) (v - s v_neg) in velocities, s = <v, v_neg> / |v_neg|^2 per image, back in terms of D.

    The velocities are those of a rectified flow, n - y; s depends on this choice, since x does not cancel in it. In the
    first `zero_steps` steps of a run the velocity is 0: the image in the flow's variables, x / (1 + sigma), stays as it
    is, so in x it shrinks with the noise level.
    """

    zero_steps: int

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        if at.i is not None and at.i < self.zero_steps:
            return at.x.to(D.dtype) / (1 + noise_level(at, D))
        v = shortened_velocity(D, at)
        guided = D
        for weight, negative in zip(weights, negatives, strict=True):
            v_neg = shortened_velocity(negative, at)
            scale = ratio(inner(v, v_neg), inner(v_neg, v_neg), otherwise=1.0)
            guided = guided - (weight - 1) * (v - scale * v_neg)
        return guided


def _make(*, cfg_zero_star_steps: int) -> CFGZeroStar:
    return CFGZeroStar(cfg_zero_star_steps)


RULE = Rule(
    "CFG-Zero*: the negative velocity scaled to fit, and no movement in the first steps",
    _make,
    options=(
        Option(
            "cfg-zero-star-steps",
            count(0),
            1,
            "Number of first steps in which the image stands still (about 4 % of them); 0: none",
        ),
    ),
    formula="D - sum of (w_i - 1) (u - s_i u_i), u = x/(1 + sigma) - D, s_i = <u, u_i>/|u_i|^2; x/(1 + sigma) at first",
    source="Fan et al. 2025 (arXiv 2503.18886); tested on flow networks (SD3, Lumina), published weight 3.5",
    pick_when="the network is a flow, or early steps with a large weight lead images astray",
)
