"""A denoiser led away from one other or several: the formula that most guidance methods share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, Wrapper, after_step, for_step
from edm2kit.guidance.network_call import NetworkCall, Perturbed, in_one_call


@dataclass(frozen=True)
class Guided(Wrapper):
    """The denoiser D_neg + weight * (D_pos - D_neg), both at the same x, sigma and condition.

    With a weaker network as `neg` this is autoguidance (Karras et al. 2024, Eq. 3), with an unconditional one
    classifier-free guidance (Ho & Salimans 2022). At weight 1 guidance is off: `neg` is never called and the result is
    that of `pos`, bit for bit. Weights below 1 interpolate; negative ones are allowed. The difference is taken in
    float32 or better, because weight - 1 amplifies rounding. Either part may itself be guided.
    Raises ValueError if the weight is not finite.

    Example: `edm_sampler(Guided(net, weaker_net, 2.0), noise, labels)`.
    """

    pos: Denoiser
    neg: Denoiser
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def is_off(self) -> bool:
        return self.weight == 1

    def idle_fields(self) -> frozenset[str]:
        return frozenset({"neg"}) if self.is_off else frozenset()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        D_pos = self.pos(x, sigma, condition)
        if self.is_off:
            return D_pos
        D_neg = self.neg(x, sigma, condition)
        dtype = _joint_dtype(D_pos, D_neg)
        D_pos, D_neg = D_pos.to(dtype), D_neg.to(dtype)
        return D_neg + self.weight * (D_pos - D_neg)

    def scaled(self, share: float) -> "Guided":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, weight=1 + (self.weight - 1) * share)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Guided":
        # the negative takes its random numbers first: this order decides the images of a seed
        neg = self.neg if self.is_off else for_step(self.neg, i, sigmas)
        return replace(self, pos=for_step(self.pos, i, sigmas), neg=neg)


class Evaluation(NamedTuple):
    """One evaluation of a denoiser: its arguments, and the step it belongs to.

    `x` [N, C, H, W]; `sigma` [N] or a scalar; `condition` of the images; step `i` goes from `sigmas[i]` to
    `sigmas[i + 1]`. Outside a sampling run, where there is no step, `i` and `sigmas` are None.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    condition: ConditionLike = None
    i: int | None = None
    sigmas: torch.Tensor | None = None


class Combine(Protocol):
    """A rule: (D, its negatives, their weights, where they were evaluated) -> the guided D.

    D and the negatives are float32 or better, [N, C, H, W]; none of the weights is 1. A rule may have `for_images` and
    `for_step`, as denoisers do.
    """

    def __call__(
        self, D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation, /
    ) -> torch.Tensor: ...


def linear(
    D: torch.Tensor, negatives: Sequence[torch.Tensor], weights: Sequence[float], at: Evaluation
) -> torch.Tensor:
    """D_neg + w (D - D_neg); with several negatives D + sum of (w_i - 1) (D - D_neg_i), which is the same for one."""
    if len(negatives) == 1:
        return negatives[0] + weights[0] * (D - negatives[0])
    return D + sum((w - 1) * (D - negative) for w, negative in zip(weights, negatives, strict=True))


@runtime_checkable
class DerivedNegative(Protocol):
    """A negative that needs the positive result: `derive(D, maps, at)` returns D_neg.

    `maps` holds the attention maps [N, heads, H*W, H*W] of the blocks named in `reads`, from the call that gave D. A
    negative that differs if other methods are active at the same time may offer `in_combination()`, which returns it.
    """

    @property
    def reads(self) -> tuple[str, ...]: ...

    def derive(self, D: torch.Tensor, maps: Mapping[str, torch.Tensor], at: Evaluation) -> torch.Tensor: ...


@dataclass(frozen=True)
class Negative(Wrapper):
    """What a `Combination` leads away from, and how far: `source` is a denoiser or a `DerivedNegative`.

    At weight 1 it is off: never called, and it does not follow the sampling run. Raises ValueError if the weight is
    not finite.
    """

    source: Any
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def idle_fields(self) -> frozenset[str]:
        return frozenset({"source"}) if self.weight == 1 else frozenset()


@dataclass(frozen=True)
class Combination(Wrapper):
    """`pos` led away from several negatives, each with its own weight, by any rule.

    A negative that is `pos` itself called with other arguments (`Perturbed`) is evaluated in one batch with it. With
    all weights 1 the result is that of `pos`, bit for bit. `rule` combines the results in float32 or better.
    Adding differences: Karras et al. 2024 (autoguidance), App. B.2.

    Example: `Combination(net, (Negative(weaker_net, 2.0), Negative(unconditional_net, 1.5)))`.
    """

    pos: Denoiser
    negatives: tuple[Negative, ...]
    rule: Combine = linear
    i: int | None = None
    sigmas: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        active = [negative for negative in self.negatives if negative.weight != 1]
        if not active:
            return self.pos(x, sigma, condition)
        at = Evaluation(x, sigma, condition, self.i, self.sigmas)
        D, results = self._evaluate([negative.source for negative in active], at)
        dtype = _joint_dtype(D, *results)
        D = D.to(dtype)
        results = [result.to(dtype) for result in results]
        weights = [negative.weight for negative in active]
        return self.rule(D, results, weights, at)

    def _evaluate(self, sources: Sequence[Any], at: Evaluation) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """D and the negatives. Changed calls of the positive network form one batch with its plain call."""
        x, sigma, condition = at[:3]
        plain = NetworkCall(x, sigma, condition)
        changed = []
        for k, source in enumerate(sources):
            if isinstance(source, Perturbed) and source.net is self.pos:
                changed.append(k)
        calls = [sources[k].change(plain) for k in changed]
        reads = tuple(dict.fromkeys(block for source in sources for block in getattr(source, "reads", ())))
        maps: Mapping[str, torch.Tensor] = {}
        if reads:
            network: Any = self.pos
            D, maps = network(x, sigma, condition, return_attention=reads)
            answers = in_one_call(self.pos, calls) if calls else []
        elif calls:
            D, *answers = in_one_call(self.pos, [plain, *calls])
        else:
            D, answers = self.pos(x, sigma, condition), []
        results = dict(zip(changed, answers, strict=True))
        for k, source in enumerate(sources):
            if isinstance(source, DerivedNegative):
                results[k] = source.derive(D, maps, at)
            elif k not in results:
                results[k] = source(x, sigma, condition)
        return D, [results[k] for k in range(len(sources))]

    def scaled(self, share: float) -> "Combination":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        negatives = (replace(negative, weight=1 + (negative.weight - 1) * share) for negative in self.negatives)
        return replace(self, negatives=tuple(negatives))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Combination":
        return replace(super().for_step(i, sigmas), i=i, sigmas=sigmas)

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        x = after_step(self.pos, x, i, sigmas)
        for negative in self.negatives:
            # a negative built on the positive denoiser would move x a second time
            if not _is_built_on(negative.source, self.pos):
                x = after_step(negative, x, i, sigmas)
        return x

    def _with_parts(self, follow: Callable[[Any], Any]) -> Self:
        followed = super()._with_parts(follow)
        negatives = list(followed.negatives)
        for k, negative in enumerate(self.negatives):
            # negatives built on the positive denoiser stay built on it
            if _is_built_on(negative.source, self.pos):
                negatives[k] = replace(negatives[k], source=replace(negatives[k].source, net=followed.pos))
        return replace(followed, negatives=tuple(negatives))


def _check_weight(weight: float) -> None:
    if not math.isfinite(weight):
        raise ValueError(f"the guidance weight is {weight}; expected a finite number (1 is off)")


def _is_built_on(source: Any, denoiser: Denoiser) -> bool:
    return isinstance(source, Wrapper) and getattr(source, "net", None) is denoiser


def _joint_dtype(*results: torch.Tensor) -> torch.dtype:
    """The widest dtype of `results`, at least float32."""
    dtype = torch.float32
    for result in results:
        dtype = torch.promote_types(dtype, result.dtype)
    return dtype


def lead_away(net: Denoiser, negatives: Sequence[Negative], rule: Combine) -> Guided | Combination:
    """The denoiser `net` led away from `negatives`, as simple as the rule allows."""
    only = negatives[0]
    if len(negatives) == 1 and rule is linear and not isinstance(only.source, DerivedNegative | Perturbed):
        return Guided(net, only.source, only.weight)
    return Combination(net, tuple(negatives), rule)
