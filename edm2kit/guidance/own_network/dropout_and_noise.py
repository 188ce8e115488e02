"""The network spoilt on purpose, by dropout or by noise on its input, as a bad version of itself."""

import math
from dataclasses import dataclass, field, replace

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import network_of
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import Call, Perturbed
from edm2kit.guidance.option_types import number
from edm2kit.guidance.random_draws import Draws
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class Dropout:
    """The change that drops a share `rate` of the activations in every block, others per image and step.

    It happens where the network has its own dropout in training.
    """

    rate: float
    draws: Draws = field(default_factory=Draws)

    def __call__(self, call: Call) -> Call:
        if self.rate == 0:
            return call
        drop = _Drop(self.rate, self.draws.source())  # one stream through all blocks
        return call._replace(edits={**call.edits, "dropout": drop})

    def for_images(self, rng: StackedGenerator) -> "Dropout":
        return replace(self, draws=self.draws.for_images(rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Dropout":
        return replace(self, draws=self.draws.for_step(i, sigmas))


@dataclass(frozen=True)
class _Drop:
    rate: float
    source: StackedGenerator

    def __call__(self, block: str, y: torch.Tensor) -> torch.Tensor:
        kept = self.source.rand(y.shape) >= self.rate
        return y * kept.to(y) / (1 - self.rate)


@dataclass(frozen=True)
class InputNoise:
    """The change to a noise level (1 + delta) times as high, with the noise to match added to the input.

    D(x + sigma sqrt((1 + delta)^2 - 1) n; (1 + delta) sigma), n ~ N(0, I) per image and step.
    """

    delta: float
    draws: Draws = field(default_factory=Draws)

    def __call__(self, call: Call) -> Call:
        if self.delta == 0:
            return call
        sigma = torch.as_tensor(call.sigma, dtype=call.x.dtype, device=call.x.device)
        added = sigma.reshape(-1, 1, 1, 1) * math.sqrt((1 + self.delta) ** 2 - 1)
        x = call.x + added * self.draws.source().randn_like(call.x)
        return call._replace(x=x, sigma=call.sigma * (1 + self.delta))

    def for_images(self, rng: StackedGenerator) -> "InputNoise":
        return replace(self, draws=self.draws.for_images(rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "InputNoise":
        return replace(self, draws=self.draws.for_step(i, sigmas))


def _dropped(parts: Parts, *, dropout_rate: float) -> Denoiser:
    return Perturbed(network_of(parts.net), Dropout(dropout_rate))


def _noised(parts: Parts, *, input_noise_delta: float) -> Denoiser:
    return Perturbed(parts.net, InputNoise(input_noise_delta))


_SOURCE = "Karras et al. 2024 (autoguidance, arXiv 2406.02507), Section 4"

DROPOUT = Method(
    "the network with dropout; found to be of no use for a network that was trained without",
    "2 main",
    negative=_dropped,
    weight=2.25,  # of networks with dropout .05 and .10
    options=(Option("dropout-rate", number(0, 0.99), 0.1, "share of activations that are dropped"),),
    term="D(x; sigma, c) with dropout",
    source=_SOURCE,
)
INPUT_NOISE = Method(
    "the network on a noisier input; found to be of no use for a network that was trained without",
    "2 main",
    negative=_noised,
    weight=2.0,  # of networks with delta .1 and .2
    options=(Option("input-noise-delta", number(0), 0.2, "how much higher the noise level is: (1 + delta) sigma"),),
    term="D(x + noise; (1 + delta) sigma, c)",
    source=_SOURCE,
)
