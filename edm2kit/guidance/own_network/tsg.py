"""Time-step guidance: away from a network that is told the noise level inexactly."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import network_of
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import Call, Perturbed
from edm2kit.guidance.option_types import number
from edm2kit.guidance.random_draws import Draws
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class NoisyEmbedding:
    """The change that adds scale * t^power * n to the noise embedding, n ~ N(0, I) per image and step.

    t is the logarithm of the noise level, from 0 at `sigma_min` to 1 at `sigma_max`; a sampling run sets both to its
    own ends. The embedding has unit RMS before labels join it. Preconditioning keeps the true noise level.
    """

    scale: float
    power: float
    draws: Draws = field(default_factory=Draws)
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __call__(self, call: Call) -> Call:
        if self.scale == 0:
            return call
        sigma = torch.as_tensor(call.sigma, dtype=torch.float32).expand(len(call.x))
        t = (sigma.log() - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        amount = self.scale * t.clamp(0, 1) ** self.power
        return call._replace(edits={**call.edits, "embedding": partial(_add_noise, amount, self.draws.source())})

    def for_images(self, rng: StackedGenerator) -> "NoisyEmbedding":
        return replace(self, draws=self.draws.for_images(rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "NoisyEmbedding":
        ends = {"sigma_min": float(sigmas[-2]), "sigma_max": float(sigmas[0])} if len(sigmas) > 2 else {}
        return replace(self, draws=self.draws.for_step(i, sigmas), **ends)


def _add_noise(amount: torch.Tensor, source: StackedGenerator, emb: torch.Tensor) -> torch.Tensor:
    return emb + amount.to(emb)[:, None] * source.randn(emb.shape).to(emb)


def _negative(parts: Parts, *, tsg_scale: float, tsg_power: float) -> Denoiser:
    return Perturbed(network_of(parts.net), NoisyEmbedding(tsg_scale, tsg_power))


METHOD = Method(
    "time-step guidance: noise is added to the embedding of the noise level",
    "2 main",
    negative=_negative,
    options=(  # the published values were not reached; they are tuned per network
        Option("tsg-scale", number(0), 0.3, "size of the noise, the embedding having size 1"),
        Option("tsg-power", number(0), 0.0, "how much less of it at low noise levels: t^power"),
    ),
    term="D(x; sigma + noise in its embedding, c)",
    source="Sadat et al. 2024 (arXiv 2407.02687)",
)
