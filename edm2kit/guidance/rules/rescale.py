"""Rescaled guidance: the linear rule with the contrast of the unguided prediction.

The paper matches the standard deviation of what its network predicts, a noise or a velocity. The linear rule gives the
same D whatever is predicted, but the standard deviations differ: D = x - sigma eps contains x as well. Measured in D,
the correction differs by 7 to 25 %. What an EDM2 network predicts is F in D = c_skip x + c_out F. With the angle phi
whose tangent is sigma / sigma_data, c_skip = cos(phi)^2 and c_out = sigma_data sin(phi), so that -F is the velocity v
of Salimans & Ho 2022 for data divided by sigma_data. `v` is therefore the network's own output, and the default.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Option, Rule
from edm2kit.guidance.combine import Evaluation, linear
from edm2kit.guidance.option_types import number, one_of

SPACES = ("v", "eps", "D")


@dataclass(frozen=True)
class StdRescale:
    """The linear rule's result, moved by `share` towards the standard deviation of D, per image over all pixels.

    `space` is where both are measured and the result is rescaled: `v`, what an EDM2 network predicts, for data of
    deviation `sigma_data`; `eps`, the noise; `D` itself.
    """

    share: float
    space: str = "v"
    sigma_data: float = 0.5

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        guided = linear(D, negatives, weights, at)
        if self.share == 0:
            return guided
        offset, scale = self.space_at(at, D)
        plain, moved = (D - offset) / scale, (guided - offset) / scale
        before, after = _std(plain), _std(moved)
        ratio = torch.where(after > 0, before / after, 1.0)
        return offset + scale * moved * (self.share * ratio + (1 - self.share))

    def space_at(self, at: Evaluation, D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(offset, scale) of D = offset + scale * prediction at this x and noise level."""
        if self.space == "D":
            return torch.zeros_like(D), torch.ones_like(D)
        x = at.x.to(D.dtype)
        sigma = torch.as_tensor(at.sigma, dtype=D.dtype, device=D.device).reshape(-1, *[1] * (D.ndim - 1))
        if self.space == "eps":
            return x, -sigma
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total * x, sigma * self.sigma_data / total.sqrt()


def _std(prediction: torch.Tensor) -> torch.Tensor:
    return prediction.flatten(1).std(dim=1).reshape(-1, *[1] * (prediction.ndim - 1))


def _make(*, rescale_share: float, rescale_space: str) -> StdRescale:
    return StdRescale(rescale_share, rescale_space)


RULE = Rule(
    "the linear rule with the contrast of the unguided prediction",
    _make,
    options=(
        Option(
            "rescale-share",
            number(0, 1),
            0.7,
            "Share of the correction: 0 the linear rule, 1 the standard deviation of the unguided prediction",
        ),
        Option(
            "rescale-space",
            one_of(*SPACES),
            "v",
            "What is rescaled: v, the output of an EDM2 network; eps, the noise that it implies; or D",
        ),
    ),
    formula="s G std(P)/std(G) + (1 - s) G, P and G the unguided and the linear rule's prediction in v, eps or D",
    source="Lin et al. 2023 (arXiv 2305.08891)",
    pick_when="large weights give overexposed or oversaturated images",
)
