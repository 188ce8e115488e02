"""Multistep solvers: one evaluation a step, and a higher order from the evaluations of earlier steps.

`dpmpp2m`, `dpmpp3m` and `unipc` interpolate D in lambda = -log(sigma) and solve the rest of the ODE exactly;
`ipndm` and `deis` interpolate the slope d = (x - D) / sigma. In all of them, a step to 0 is Euler. All take the
arguments of `edm2kit.sampling.solvers.heun` and refuse churn, which would make the earlier evaluations inconsistent
with the later ones. docs/solvers.md has their orders of convergence, as measured.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, after_step, for_step, levels_of
from edm2kit.sampling.noise_levels import NO_CHURN, Churn, RandnLike, refuse_churn

History = Sequence[torch.Tensor]  # of the evaluations so far, the latest first
# (x, history, levels, i) -> x after step i; levels[i - k] is the noise level of history[k]
Step = Callable[[torch.Tensor, History, Sequence[float], int], torch.Tensor]


def _run(
    step: Step,
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike,
    keep: int,
    slopes: bool = False,
) -> torch.Tensor:
    """Apply `step` at each noise level to the last `keep` values of D, or of (x - D) / sigma with `slopes`."""
    levels = levels_of(sigmas)
    x = noise.to(sigmas.dtype) * sigmas[0]
    history: list[torch.Tensor] = []
    for i in range(len(sigmas) - 1):
        D = for_step(denoiser, i, sigmas)
        estimate = D(x, sigmas[i], condition).to(x.dtype)
        if slopes:
            estimate = (x - estimate) / sigmas[i]
        history = [estimate, *history[: keep - 1]]
        x = after_step(D, step(x, history, levels, i), i, sigmas)
    return x


def _log_step(sigma: float, sigma_next: float) -> float:
    """The width of a step in lambda = -log(sigma); infinite for a step to 0."""
    return math.inf if sigma_next == 0 else math.log(sigma / sigma_next)


def _exponential_step(x: torch.Tensor, D: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """The exact result of a step if D were constant in it, which is also the Euler step: all of D for a step to 0."""
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * D


@torch.no_grad()
def dpmpp2m(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
) -> torch.Tensor:
    """DPM-Solver++(2M): D extrapolated from the last two evaluations; order 2, the first and the last step Euler.

    Arguments as in `heun`. Raises ValueError with churn. Lu et al. 2022 (arXiv 2211.01095), Alg. 2.

    Example: `dpmpp2m(net, torch.randn(4, 3, 64, 64), karras_sigmas(25, 0.002, 80, 7))`.
    """
    refuse_churn("dpmpp2m", churn)

    def step(x: torch.Tensor, history: History, levels: Sequence[float], i: int) -> torch.Tensor:
        D, *earlier = history
        if earlier and levels[i + 1] > 0:
            r = _log_step(levels[i - 1], levels[i]) / _log_step(levels[i], levels[i + 1])
            D = D + (D - earlier[0]) / (2 * r)
        return _exponential_step(x, D, levels[i], levels[i + 1])

    return _run(step, denoiser, noise, sigmas, condition, keep=2)


@torch.no_grad()
def dpmpp3m(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    curvature: float = 1.0,
) -> torch.Tensor:
    """DPM-Solver++(3M): a parabola through the last three evaluations of D, integrated exactly; order 3.

    The authors' code, and those who follow it, take half of the second derivative, which leaves order 2: that is
    `curvature` 0.5. The first and the last step are Euler, the second one is like `dpmpp2m`. Arguments as in `heun`.
    Raises ValueError with churn. Lu et al. 2022 (arXiv 2211.01095).

    Example: `dpmpp3m(net, torch.randn(4, 3, 64, 64), karras_sigmas(25, 0.002, 80, 7))`.
    """
    refuse_churn("dpmpp3m", churn)

    def step(x: torch.Tensor, history: History, levels: Sequence[float], i: int) -> torch.Tensor:
        D, *earlier = history
        if not earlier or levels[i + 1] == 0:
            return _exponential_step(x, D, levels[i], levels[i + 1])
        h = _log_step(levels[i], levels[i + 1])
        r0 = _log_step(levels[i - 1], levels[i]) / h
        slope = (D - earlier[0]) / r0
        if len(earlier) == 1:
            return _exponential_step(x, D + slope / 2, levels[i], levels[i + 1])
        r1 = _log_step(levels[i - 2], levels[i - 1]) / h
        # Newton's divided differences in units of h: D(lambda) = D + first t + second t^2 with t from 0 to 1
        second = (slope - (earlier[0] - earlier[1]) / r1) / (r0 + r1)
        first = slope + r0 * second
        linear, quadratic = _moments(h, 2)
        return _exponential_step(x, D, levels[i], levels[i + 1]) + linear * first + (quadratic * curvature) * second

    return _run(step, denoiser, noise, sigmas, condition, keep=3)


def _moments(h: float, count: int) -> list[float]:
    """h times the integrals of exp(-h (1 - t)) t^k over t from 0 to 1, for k = 1 to `count`."""
    moments, previous = [], -math.expm1(-h)
    for k in range(1, count + 1):
        previous = 1 - k * previous / h  # integration by parts
        moments.append(previous)
    return moments


@torch.no_grad()
def unipc(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    order: int = 2,
) -> torch.Tensor:
    """UniPC: a predictor of the given order, corrected by the next step's evaluation, which raises the order by one.

    The corrector costs no evaluation: it uses the one that the next step needs. The variant is bh2 on D, with lower
    orders in the first and last steps, as in the authors' code; order 2 is theirs for guided sampling. What
    `after_step` changed in x stays. Arguments as in `heun`. Raises ValueError with churn. Zhao et al. 2023
    (arXiv 2302.04867).

    Example: `unipc(net, torch.randn(4, 3, 64, 64), karras_sigmas(16, 0.002, 80, 7))`.
    """
    refuse_churn("unipc", churn)
    levels, num_steps = levels_of(sigmas), len(sigmas) - 1
    x = noise.to(sigmas.dtype) * sigmas[0]
    history: list[torch.Tensor] = []
    start = predicted = x  # of the last step
    used = 0  # the order of the last step
    for i in range(num_steps):
        D = for_step(denoiser, i, sigmas)
        latest = D(x, sigmas[i], condition).to(x.dtype)
        if i > 0:
            x = x + (_unified_step(start, history[:used], levels, i - 1, latest) - predicted)
        history = [latest, *history[: order - 1]]
        used = min(order, i + 1, num_steps - i)
        start, predicted = x, _unified_step(x, history[:used], levels, i)
        x = after_step(D, predicted, i, sigmas)
    return x


def _unified_step(
    x: torch.Tensor, history: History, levels: Sequence[float], i: int, following: torch.Tensor | None = None
) -> torch.Tensor:
    """Step i by the evaluations `history` (UniP), and the one at its end, `following`, if it is known (UniC)."""
    D, sigma, sigma_next = history[0], levels[i], levels[i + 1]
    h = _log_step(sigma, sigma_next)
    # positions in the step, 0 its start and 1 its end, and the differences to D there
    positions = [-math.log(levels[i - k] / sigma) / h for k in range(1, len(history))]
    differences = [earlier - D for earlier in history[1:]]
    if following is not None:
        positions.append(1.0)
        differences.append(following - D)
    weights = [0.5]  # exact up to the order of the step; so in the authors' code
    if len(positions) > 1:
        moments = np.array(_moments(h, len(positions))) / -math.expm1(-h)
        powers = np.array(positions)[None, :] ** np.arange(len(positions))[:, None]
        weights = np.linalg.solve(powers, moments).tolist()
    estimate = D
    for weight, position, difference in zip(weights, positions, differences, strict=False):
        estimate = estimate + weight / position * difference
    return _exponential_step(x, estimate, sigma, sigma_next)


# Adams-Bashforth weights of the latest slopes, for steps of equal width
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@torch.no_grad()
def ipndm(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    order: int = 4,
) -> torch.Tensor:
    """iPNDM: Adams-Bashforth steps on d = (x - D) / sigma, with the weights of equally wide steps.

    The steps are not equally wide, so that `order`, 1 to 4, is the number of slopes; the order of convergence is at
    most 2. Arguments as in `heun`. Raises ValueError with churn. Liu et al. 2022 (arXiv 2202.09778); Zhang & Chen 2022
    (arXiv 2204.13902).

    Example: `ipndm(net, torch.randn(4, 3, 64, 64), karras_sigmas(16, 0.002, 80, 7))`.
    """
    refuse_churn("ipndm", churn)

    def step(x: torch.Tensor, history: History, levels: Sequence[float], i: int) -> torch.Tensor:
        weights = _ADAMS_BASHFORTH[len(history) - 1] if levels[i + 1] > 0 else _ADAMS_BASHFORTH[0]
        slope = sum(weight * d for weight, d in zip(weights, history, strict=False))
        return x + (levels[i + 1] - levels[i]) * slope

    return _run(step, denoiser, noise, sigmas, condition, keep=order, slopes=True)


@torch.no_grad()
def deis(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    order: int = 4,
    variable: Literal["log-sigma", "sigma"] = "log-sigma",
) -> torch.Tensor:
    """DEIS: a polynomial through the last `order` slopes d = (x - D) / sigma, integrated exactly over the step.

    It is a polynomial in log(sigma), or in sigma, which is the time of EDM, with the other `variable` (tAB; less
    accurate for a mixture of Gaussians, see docs/solvers.md). Arguments as in `heun`. Raises ValueError with churn.
    Zhang & Chen 2022 (arXiv 2204.13902).

    Example: `deis(net, torch.randn(4, 3, 64, 64), karras_sigmas(16, 0.002, 80, 7))`.
    """
    refuse_churn("deis", churn)

    def step(x: torch.Tensor, history: History, levels: Sequence[float], i: int) -> torch.Tensor:
        past = [levels[i - k] for k in range(len(history))]
        if levels[i + 1] == 0:
            weights = [-levels[i]]
        elif variable == "sigma":
            weights = _lagrange_integrals(past, levels[i], levels[i + 1])
        else:
            logs = [math.log(level) for level in past]
            weights = _lagrange_integrals(logs, logs[0], math.log(levels[i + 1]), np.exp)
        return x + sum(weight * d for weight, d in zip(weights, history, strict=False))

    return _run(step, denoiser, noise, sigmas, condition, keep=order, slopes=True)


def _lagrange_integrals(
    nodes: Sequence[float],
    start: float,
    end: float,
    density: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> list[float]:
    """For each node, the integral of density(u) times its Lagrange polynomial, over u from `start` to `end`."""
    points, weights = np.polynomial.legendre.leggauss(16)
    u = (start + end) / 2 + (end - start) / 2 * points
    integrals = []
    for k, node in enumerate(nodes):
        polynomial = density(u)
        for other in [*nodes[:k], *nodes[k + 1 :]]:
            polynomial = polynomial * (u - other) / (node - other)
        integrals.append(float((end - start) / 2 * (weights * polynomial).sum()))
    return integrals
