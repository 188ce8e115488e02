"""Tangential damping (TCFG): only the part of the negative that it shares with D is led away from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edm2kit.guidance.base import Rule
from edm2kit.guidance.combine import Evaluation, linear
from edm2kit.guidance.rules.coordinates import inner


@dataclass(frozen=True)
class TangentialDamping:
    """The linear rule with each noise prediction e_neg replaced by its projection on v, per image.

    v is the first right singular vector of the matrix with the rows e_neg and e, where e = (x - D) / sigma. The
    projection depends on x, so it differs from one of denoised images. With u = (cos a, sin a) the first left singular
    vector, tan 2a = 2 <e_neg, e> / (|e_neg|^2 - |e|^2), it is e_neg + sin a (cos a e - sin a e_neg).
    """

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
    ) -> torch.Tensor:
        noise = at.x.to(D.dtype) - D  # sigma times the noise; the factor cancels
        damped = []
        for negative in negatives:
            noise_neg = at.x.to(D.dtype) - negative
            # |e_neg|^2 - |e|^2 without the loss of digits
            excess = inner(noise_neg - noise, noise_neg + noise)
            angle = torch.atan2(2 * inner(noise_neg, noise), excess) / 2
            shift = angle.sin() * (angle.cos() * noise - angle.sin() * noise_neg)
            damped.append(negative - shift)
        return linear(D, damped, weights, at)


RULE = Rule(
    "tangential damping (TCFG): away from what the negative has in common with D only",
    TangentialDamping,
    formula="D + sum of (w_i - 1) (D - x + P_i (x - D_neg_i)), P_i onto the first singular vector of both noises",
    source="Kwon et al. 2025 (arXiv 2503.18137); tested on SD3",
    pick_when="classifier-free guidance adds artefacts that both networks do not share; nothing needs to be tuned",
)
