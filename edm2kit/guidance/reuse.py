"""Cheaper guidance: differences D - D_neg of earlier evaluations are used again, or guidance stops for good."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import levels_of
from edm2kit.guidance.combine import Combination, Evaluation
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class Reuse:
    """When the negatives are evaluated; by default at every evaluation.

    - `every`: only in every k-th guided step; in between, the last difference D - D_neg is added to the new D. If
      restart sampling goes back to a higher noise level than that of the last difference, it is evaluated there.
      Compress guidance (arXiv 2408.11194), published for k from 2 to 5, on EDM2-XXL among others.
    - `stop`: guidance of an image stops once the cosine between D and D_neg exceeds this number, for all
      negatives, from the next step on. At high noise levels, where both are near the mean of all images, the cosine
      is close to 1; it must have been lower before. Adaptive guidance (arXiv 2312.12487), published with .991 for
      predictions of the noise, and without that condition. On a GPU, each evaluation waits to see if all have
      stopped.
    - `once`: once in a step, so that Heun's second evaluation uses the difference of the first.

    Raises ValueError if `every` is below 1 or `stop` is not from -1 to 1.

    Example: `guide(Choice("autoguidance", 2.0, reuse=Reuse(every=2)), Parts(net, weaker_net))`.
    """

    every: int = field(
        default=1, metadata={"option": "--guidance-every", "help": "Evaluate the guide every N steps", "min": 1}
    )
    stop: float | None = field(
        default=None,
        metadata={
            "option": "--guidance-stop",
            "metavar": "TAU",
            "help": "Stop guiding an image when cos(D, D_neg) > TAU",
        },
    )
    once: bool = field(
        default=False, metadata={"option": "--guidance-once", "help": "Evaluate the guide once in a Heun step"}
    )

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"guidance every {self.every} steps; expected at least 1")
        if self.stop is not None and not -1 <= self.stop <= 1:  # also refuses NaN
            raise ValueError(f"guidance stops at a cosine of {self.stop:g}; expected a number from -1 to 1")

    def __str__(self) -> str:
        words = []
        if self.every > 1:
            words.append(f"evaluated every {self.every} steps")
        if self.once:
            words.append("once a step")
        if self.stop is not None:
            words.append(f"until cos(D, D_neg) > {self.stop:g}")
        return ", ".join(words) or "always evaluated"


NO_REUSE = Reuse()


class RunMemory:
    """What `Reusing` keeps of the images of one batch: the last evaluation of the negatives, and who has stopped."""

    def __init__(self) -> None:
        self.steps = 0  # guided steps so far; a step that a solver repeats counts each time
        self.D: torch.Tensor | None = None  # of the main network at the last evaluation
        self.differences: tuple[torch.Tensor, ...] = ()
        self.evaluated_in = 0  # the step of these differences
        self.evaluated_at = math.inf  # the noise level at which that step began
        self.below: torch.Tensor | None = None  # bool [N], the images whose cosine has been up to `stop`
        self.passed: torch.Tensor | None = None  # bool [N], those whose cosine has risen above it since


@dataclass(frozen=True)
class Reusing(Combination):
    """A `Combination` whose negatives are evaluated only as often as `reuse` says.

    The rule and the weights act at every evaluation, on the new D and on negatives D - difference. An image that has
    stopped gets the D of the main network, bit for bit; the negatives are evaluated until all images of the batch
    have stopped. With the default `Reuse` this is `Combination`, bit for bit. Raises ValueError if it is called before
    `for_images` and `for_step`.

    Example: `Reusing(net, (Negative(weaker_net, 2.0),), reuse=Reuse(every=2, once=True))`.
    """

    reuse: Reuse = NO_REUSE
    memory: RunMemory | None = field(default=None, repr=False)
    step: int = 0
    level: float = 0.0  # the noise level at which the step begins
    stopped: torch.Tensor | None = None  # bool [N], constant within a step

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        memory = self._known()
        is_off = all(negative.weight == 1 for negative in self.negatives)
        if is_off or self.stopped is None:
            return super().__call__(x, sigma, condition)
        if bool(self.stopped.all()):
            return self.pos(x, sigma, condition)
        guided = super().__call__(x, sigma, condition)
        assert memory.D is not None
        stopped = self.stopped.reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(stopped, memory.D.to(guided.dtype), guided)

    def _evaluate(self, sources: Sequence[Any], at: Evaluation) -> tuple[torch.Tensor, list[torch.Tensor]]:
        memory = self._known()
        if self._can_reuse(memory, len(sources)):
            D = memory.D = self.pos(at.x, at.sigma, at.condition)
            return D, [D - difference for difference in memory.differences]
        D, results = super()._evaluate(sources, at)
        memory.D, memory.evaluated_in, memory.evaluated_at = D, self.step, self.level
        memory.differences = tuple(D - result for result in results)
        if self.reuse.stop is not None:
            above = torch.stack([_cosine(D, result) for result in results]).amin(dim=0) > self.reuse.stop
            if memory.below is None or memory.passed is None:
                memory.below = memory.passed = torch.zeros_like(above)
            memory.passed = memory.passed | (memory.below & above)
            memory.below = memory.below | ~above
        return D, results

    def _can_reuse(self, memory: RunMemory, count: int) -> bool:
        if len(memory.differences) != count:
            return False
        if memory.evaluated_in == self.step:
            return self.reuse.once
        return self.step - memory.evaluated_in < self.reuse.every and self.level <= memory.evaluated_at

    def for_images(self, rng: StackedGenerator) -> "Reusing":
        return replace(super().for_images(rng), memory=RunMemory(), step=0, stopped=None)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Reusing":
        memory = self._known()
        memory.steps += 1
        followed: Any = super().for_step(i, sigmas)
        return replace(followed, step=memory.steps, level=levels_of(sigmas)[i], stopped=memory.passed)

    def _known(self) -> RunMemory:
        if self.memory is None:
            raise ValueError(
                "guidance that is reused needs to know where a run begins. Call "
                "edm2kit.denoiser.for_images(denoiser, StackedGenerator(device, seeds)) first, as the engine does"
            )
        return self.memory


def _cosine(D: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The cosine between two images over all their values, [N]."""
    cosine = torch.nn.functional.cosine_similarity(D.flatten(1).float(), other.flatten(1).float(), dim=1)
    return cosine.clamp(max=1.0)  # rounding may give more
