"""Dropout guidance and input-noise guidance: away from the network degraded by dropout, or by noise on its input.

Dropout leaves x and the noise level as they are, so combining D is the same as combining scores or noise predictions.

Input noise evaluates the network at another x and another noise level. Combining scores or noise predictions would then
not be the same as combining D: the negative noise prediction (x_hat - D(x_hat)) / sigma_hat, x_hat = x + a n, contains
the added noise n, which an extrapolation by w would add to the image with a factor of w - 1. Karras et al. degrade the
denoiser and extrapolate D (their Eq. 3 and code): the degraded denoiser stands for a denoiser of x at sigma with a
larger error, because it saw more noise. So D is the authors' space, and this file combines D without correction.

Other methods differ: sag.py and self_guidance.py combine noise predictions at different inputs.
"""

import math
from dataclasses import dataclass, field

import torch

from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.attention_blocks import require_edits
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed
from edm2kit.guidance.option_types import number
from edm2kit.guidance.step_generators import StepGenerators


@dataclass(frozen=True)
class Dropout(Wrapper):
    """The change that drops a share `rate` of the activations in every block, different ones per image and step.

    It acts where the network has its own dropout in training.
    """

    rate: float
    random: StepGenerators = field(default_factory=StepGenerators)

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if self.rate == 0:
            return call
        generators = self.random.generators()  # one stream of numbers through all blocks

        def drop(block: str, y: torch.Tensor) -> torch.Tensor:
            kept = generators.rand(y.shape) >= self.rate
            return y * kept.to(y) / (1 - self.rate)

        return call._replace(edits={**call.edits, "dropout": drop})


@dataclass(frozen=True)
class InputNoise(Wrapper):
    """The change to a noise level (1 + delta) times as high, with matching noise added to the input.

    D(x + sigma sqrt((1 + delta)^2 - 1) n; (1 + delta) sigma), n ~ N(0, I) per image and step.
    """

    delta: float
    random: StepGenerators = field(default_factory=StepGenerators)

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if self.delta == 0:
            return call
        sigma = torch.as_tensor(call.sigma, dtype=call.x.dtype, device=call.x.device)
        added = sigma.reshape(-1, 1, 1, 1) * math.sqrt((1 + self.delta) ** 2 - 1)
        x = call.x + added * self.random.generators().randn_like(call.x)
        return call._replace(x=x, sigma=call.sigma * (1 + self.delta))


def _with_dropout(parts: Parts, *, dropout_rate: float) -> Denoiser:
    return Perturbed(require_edits(parts.net, "dropout guidance", "dropout"), Dropout(dropout_rate))


def _with_input_noise(parts: Parts, *, input_noise_delta: float) -> Denoiser:
    return Perturbed(parts.net, InputNoise(input_noise_delta))


_SOURCE = "Karras et al. 2024 (autoguidance, arXiv 2406.02507), Section 4"

DROPOUT = Method(
    "dropout guidance: away from the network with dropout",
    "2 main",
    negative=_with_dropout,
    weight=2.25,  # of networks with dropout .05 and .10
    options=(Option("dropout-rate", number(0, 0.99), 0.1, "Share of the activations that is dropped, from 0 to 0.99"),),
    term="D(x; sigma, c) with dropout",
    source=_SOURCE,
    pick_when="studying degradations; it does not help a network that was trained without dropout",
)
INPUT_NOISE = Method(
    "input-noise guidance: away from the network evaluated on a noisier input",
    "2 main",
    negative=_with_input_noise,
    weight=2.0,  # of networks with delta .1 and .2
    options=(
        Option(
            "input-noise-delta", number(0), 0.2, "Relative increase of the noise level; the input has (1 + delta) sigma"
        ),
    ),
    term="D(x + noise; (1 + delta) sigma, c)",
    source=_SOURCE,
    pick_when="studying degradations; it works with any denoiser, but does not help one trained as usual",
)
