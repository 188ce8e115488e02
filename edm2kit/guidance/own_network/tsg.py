"""Time-step guidance (TSG): away from a network whose noise embedding is perturbed.

Only the embedding changes: x, the preconditioning and the noise level that turns a prediction into a step stay. With
the same x and sigma, eps = (x - D) / sigma is affine in D, so combining D is the same as the paper's combination of
noise predictions. (A method that evaluates the network at another noise level is different: see dropout_and_noise.py.)

Published settings (t from 0 to 1000 is the time step of those networks):

    DiT-XL/2, with classes     w 2.5  scale 2     power 1
    DiT-XL/2, unconditional    w 5    scale 1     power 0, t in [200, 800]
    Stable Diffusion, text     w 4    scale 3     power 0.25, t in [400, 1000]
    Stable Diffusion, no text  w 3    scale 1.25  power 0, t in [100, 900]

A range of t is an interval of noise levels here. None are published for EDM2, whose embedding may have another
magnitude than theirs. The paper can also restrict the noise to the first layers of a transformer; here it enters all
blocks, because an EDM2 network computes one embedding for all of them.
"""

import math
from dataclasses import dataclass, field, replace

import torch

from edm2kit.denoiser import Denoiser, Wrapper, levels_of
from edm2kit.guidance.attention_blocks import require_edits
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed
from edm2kit.guidance.option_types import number
from edm2kit.guidance.step_generators import StepGenerators


@dataclass(frozen=True)
class NoisyEmbedding(Wrapper):
    """The change that adds scale * t^power * n to the noise embedding, n ~ N(0, I) per image and step.

    t is the logarithm of the noise level, scaled from 0 at `sigma_min` to 1 at `sigma_max`; a sampling run sets both
    to its own ends. The embedding has unit RMS before labels are added. Preconditioning uses the true noise level.
    """

    scale: float
    power: float
    random: StepGenerators = field(default_factory=StepGenerators)
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if self.scale == 0:
            return call
        sigma = torch.as_tensor(call.sigma, dtype=torch.float32).expand(len(call.x))
        t = (sigma.log() - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        amount = self.scale * t.clamp(0, 1) ** self.power
        generators = self.random.generators()

        def add_noise(emb: torch.Tensor) -> torch.Tensor:
            return emb + amount.to(emb)[:, None] * generators.randn(emb.shape).to(emb)

        return call._replace(edits={**call.edits, "embedding": add_noise})

    def for_step(self, i: int, sigmas: torch.Tensor) -> "NoisyEmbedding":
        followed = super().for_step(i, sigmas)
        if len(sigmas) <= 2:
            return followed
        return replace(followed, sigma_min=levels_of(sigmas)[-2], sigma_max=levels_of(sigmas)[0])


def _negative(parts: Parts, *, tsg_scale: float, tsg_power: float) -> Denoiser:
    return Perturbed(require_edits(parts.net, "time-step guidance", "embedding"), NoisyEmbedding(tsg_scale, tsg_power))


METHOD = Method(
    "time-step guidance (TSG): away from the network with a perturbed noise embedding",
    "2 main",
    negative=_negative,
    weight=2.5,
    options=(  # as published for DiT-XL/2 with classes; tune them per network
        Option(
            "tsg-scale",
            number(0),
            2.0,
            "RMS of the noise added to the embedding, whose own RMS is 1; published for DiT and Stable Diffusion: 1 to "
            "3, none for EDM2",
        ),
        Option("tsg-power", number(0), 1.0, "Exponent p of t^p: the larger, the less noise at low noise levels"),
    ),
    term="D(x; sigma + noise in its embedding, c)",
    source="Sadat et al. 2024 (arXiv 2407.02687)",
    pick_when="you have a single network, conditional or not, without attention or label dropout",
)
