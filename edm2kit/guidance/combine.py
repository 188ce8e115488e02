"""A network led away from one negative or several, by the linear formula or another rule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from edm2kit.denoiser import Denoiser, after_step, for_images, for_step
from edm2kit.guidance.network_call import Call, Perturbed, in_one_call
from edm2kit.torch_utils.rng import StackedGenerator

# (D, its negatives, their weights) -> the guided D
Combine = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[float]], torch.Tensor]


@runtime_checkable
class Beside(Protocol):
    """A negative that is made from the positive answer: `beside(D, maps, x, sigma, labels)` returns D_neg.

    `maps` holds the attention maps of the blocks named in `reads`, from the very call that gave D.
    """

    reads: tuple[str, ...]

    def beside(
        self,
        D: torch.Tensor,
        maps: dict[str, torch.Tensor],
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor: ...


def linear(D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """D_neg + w (D - D_neg); with several negatives D + sum of (w_i - 1) (D - D_neg_i), the same for one."""
    if len(negatives) == 1:
        return negatives[0] + weights[0] * (D - negatives[0])
    return D + sum((w - 1) * (D - negative) for w, negative in zip(weights, negatives, strict=True))


@dataclass(frozen=True)
class Combined:
    """`pos` led away from each of `negs` with the weight at the same place.

    A negative is a denoiser, or is made from the positive answer (`Beside`); one that is `pos` itself called with
    other arguments (`Perturbed`) is evaluated in one batch with it. One of weight 1 is off: it is never
    called, and with all of them off the answer is that of `pos`, bit for bit. `rule` puts the answers together, in
    float32 or better. Adding methods up: Karras et al. 2024 (autoguidance), App. B.2. Raises ValueError on a weight
    that is not finite.
    """

    pos: Denoiser
    negs: tuple[Any, ...]
    weights: tuple[float, ...]
    rule: Combine = linear

    def __post_init__(self) -> None:
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ValueError(f"the guidance weight is {weight}; expected a finite number (1 is off)")
        if len(self.negs) != len(self.weights):
            raise ValueError(f"{len(self.negs)} negatives with {len(self.weights)} weights; expected as many")

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        active = [(neg, weight) for neg, weight in zip(self.negs, self.weights, strict=True) if weight != 1]
        if not active:
            return self.pos(x, sigma, labels)
        D, negatives = self._answers([neg for neg, _ in active], x, sigma, labels)
        dtype = torch.float32
        for part in (D, *negatives):
            dtype = torch.promote_types(dtype, part.dtype)
        return self.rule(D.to(dtype), [part.to(dtype) for part in negatives], [weight for _, weight in active])

    def _answers(
        self, negs: Sequence[Any], x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The positive answer and the negative ones; changed calls of the positive network make one batch with it."""
        plain, changed = Call(x, sigma, labels), [k for k, neg in enumerate(negs) if self._is_changed_call(neg)]
        calls = [negs[k].change(plain) for k in changed]
        reads = tuple(dict.fromkeys(block for neg in negs for block in getattr(neg, "reads", ())))
        if reads:
            D, maps = self.pos(x, sigma, labels, return_attention=reads)
            answers = in_one_call(self.pos, calls) if calls else []
        else:
            D, *answers = in_one_call(self.pos, [plain, *calls]) if calls else [self.pos(x, sigma, labels)]
            maps = {}
        known = dict(zip(changed, answers, strict=True))
        for k, neg in enumerate(negs):
            if isinstance(neg, Beside):
                known[k] = neg.beside(D, maps, x, sigma, labels)
            elif k not in known:
                known[k] = neg(x, sigma, labels)
        return D, [known[k] for k in range(len(negs))]

    def _is_changed_call(self, neg: Any) -> bool:
        return isinstance(neg, Perturbed) and neg.net is self.pos

    def scaled(self, share: float) -> "Combined":
        """The same, guided by `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, weights=tuple(1 + (weight - 1) * share for weight in self.weights))

    def for_images(self, rng: StackedGenerator) -> "Combined":
        return self._followed(lambda part: for_images(part, rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Combined":
        return self._followed(lambda part: for_step(part, i, sigmas))

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        x = after_step(self.pos, x, i, sigmas)
        for neg, weight in zip(self.negs, self.weights, strict=True):
            x = x if weight == 1 else after_step(neg, x, i, sigmas)
        return x

    def _followed(self, follow: Callable[[Any], Any]) -> "Combined":
        negs = (neg if w == 1 else follow(neg) for neg, w in zip(self.negs, self.weights, strict=True))
        return replace(self, pos=follow(self.pos), negs=tuple(negs), rule=follow(self.rule))
