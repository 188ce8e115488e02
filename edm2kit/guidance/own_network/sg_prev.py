"""Self-guidance by the previous step (SG-prev): away from what the network answered one step before.

The two predictions have different inputs, x and the x of the previous step, so what is combined matters: D, the noise
or the velocity. Self-guidance combines predictions of noise, hence the default: e + (w - 1) (e - e_prev) is the
linear rule in D with the negative x - sigma e_prev. After an unguided Euler step the three are the same, because x lies
on the line from x_prev to D_prev: x - sigma e_prev = D_prev.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from edm2kit.denoiser import Wrapper
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.history import History
from edm2kit.guidance.option_types import number, one_of
from edm2kit.guidance.rules.coordinates import noise_level
from edm2kit.torch_utils.rng import StackedGenerator

SPACES = ("noise", "velocity", "denoised")


class Seen(NamedTuple):
    """An evaluation of the network: D at x and sigma, which broadcasts against x."""

    x: torch.Tensor
    sigma: torch.Tensor
    D: torch.Tensor

    def repeated_at(self, x: torch.Tensor, sigma: torch.Tensor, space: str) -> torch.Tensor:
        """The denoised image of x at sigma if the network predicted the same there, in the given space."""
        if space == "denoised":
            return self.D
        noise = (self.x - self.D) / self.sigma
        if space == "noise":
            return x - sigma * noise
        # a rectified flow has z = x / (1 + sigma) and the velocity n - y
        return (x - sigma * (noise - self.D)) / (1 + sigma)


@dataclass(frozen=True)
class PreviousStep(Wrapper):
    """The negative that the network's answer of the previous step makes, in steps i of N with i >= start N.

    Heun's second evaluation leads away from the first one of its step. Nothing is guided (the negative is D) in the
    first step of a run or interval, after noise was added again, and outside a run.
    """

    start: float
    space: str
    history: History[Seen] = field(default_factory=History, compare=False, repr=False)
    acts: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def derive(self, D: torch.Tensor, maps: Mapping[str, torch.Tensor], at: Evaluation) -> torch.Tensor:
        if at.i is None:
            return D
        now = Seen(at.x.to(D.dtype), noise_level(at, D), D)
        previous = self.history.latest
        if self.history.is_first:
            self.history.keep(now)
        if previous is None or not self.acts:
            return D
        return previous.repeated_at(now.x, now.sigma, self.space)

    def for_images(self, rng: StackedGenerator) -> "PreviousStep":
        return replace(self, history=History())

    def for_step(self, i: int, sigmas: torch.Tensor) -> "PreviousStep":
        self.history.begin(i, sigmas)
        return replace(self, acts=i >= self.start * (len(sigmas) - 1))


def _negative(parts: Parts, *, sg_prev_start: float, sg_prev_space: str) -> PreviousStep:
    return PreviousStep(sg_prev_start, sg_prev_space)


METHOD = Method(
    "self-guidance by the previous step (SG-prev): away from the network's answer one step before",
    "1 main",
    negative=_negative,
    weight=3.0,
    remembers=True,
    options=(
        Option(
            "sg-prev-start", number(0, 1), 0.5, "Share of the steps after which it acts; 0.5: the half with less noise"
        ),
        Option(
            "sg-prev-space",
            one_of(*SPACES),
            "noise",
            "Which prediction of the previous step is used again: noise, velocity (rectified flow) or denoised image",
        ),
    ),
    term="x - sigma e, e the noise predicted in the previous step",
    source="Li et al. 2024 (arXiv 2412.05827); tested on SD3 and FLUX",
    pick_when="no further evaluation is affordable, with any network; try small weights first with few steps",
)
