"""Self-guidance (SG): away from the network told that there is more noise in the same image."""

from dataclasses import dataclass

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.option_types import number

_BETA_MIN, _BETA_RANGE = 0.1, 19.9  # of a DDPM: beta from 0.1 to 20


def later_noise_level(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """The noise level of a DDPM that is `shift` later in time than at `sigma`; time ends at 1, where sigma is 152.

    1 + sigma^2 = exp(9.95 t^2 + 0.1 t). Song et al. 2021; Karras et al. 2022 (EDM), Table 1.
    """
    level = sigma if sigma.device.type == "mps" else sigma.double()  # mps has no float64
    t = ((_BETA_MIN**2 + 2 * _BETA_RANGE * torch.log1p(level**2)).sqrt() - _BETA_MIN) / _BETA_RANGE
    later = (t + shift).clamp(max=1)
    noisier = torch.expm1(_BETA_RANGE / 2 * later**2 + _BETA_MIN * later).sqrt()
    return torch.maximum(noisier, level).to(sigma.dtype)


@dataclass(frozen=True)
class ToldMoreNoise(Wrapper):
    """The negative x - sigma e, e being the noise that `net` predicts for x at a time that is `shift` later.

    The authors evaluate a network twice at the same z = x / sqrt(1 + sigma^2), once with a later time, and combine the
    predictions of noise. With s the noise level of that time, z is x' = x sqrt((1 + s^2) / (1 + sigma^2)) in EDM's
    variables, and e = (x' - D(x'; s)) / s. The inputs differ, so D itself would be another negative.
    """

    net: Denoiser
    shift: float

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        if self.shift == 0:
            return self.net(x, sigma, condition)
        sigma = torch.as_tensor(sigma, device=x.device)
        later = later_noise_level(sigma, self.shift)
        before, after = (level.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for level in (sigma, later))
        x_later = x * ((1 + after**2) / (1 + before**2)).sqrt()
        D_later = self.net(x_later, later, condition)
        return x - before / after * (x_later - D_later)


def _negative(parts: Parts, *, self_guidance_shift: float) -> Denoiser:
    return ToldMoreNoise(parts.net, self_guidance_shift)


METHOD = Method(
    "self-guidance (SG): away from the network told that there is more noise",
    "2 main",
    negative=_negative,
    weight=3.0,
    options=(
        Option(
            "self-guidance-shift",
            number(0, 1),
            0.01,
            "How much later the negative's time is, of 1 in all; 0.01 is 10 of a DDPM's 1,000 steps",
        ),
    ),
    term="x - sigma e, e the noise predicted for x at a later time",
    source="Li et al. 2024 (arXiv 2412.05827); tested on SD3 and FLUX, without gain in an independent test on JiT",
    pick_when="you have a single denoiser of any kind, without classes or attention; the gain is disputed",
)
