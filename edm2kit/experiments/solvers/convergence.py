"""Errors of solvers on a mixture of Gaussians, whose denoiser is known exactly, and the order at which they fall."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser
from edm2kit.guidance.combine import Guided
from edm2kit.sampling.multistep import deis, dpmpp3m, unipc
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import SOLVERS

Solver = Callable[..., torch.Tensor]
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
NUM_POINTS = 64
FINE_STEPS = 1500  # of the reference
FIT_STEPS = (65, 97, 129, 193)  # the error of all solvers falls as a power of the step, and is far from rounding
HEUN_STEPS = 32  # the published sampler, which the others are compared with
ALLOWANCE = 1.01  # within 1 % of its error
_SEED = 0


@dataclass(frozen=True)
class GaussianMixture:
    """The exact denoiser of equally likely Gaussians in the plane, means [K, 1, 1, 2], of one variance."""

    means: torch.Tensor
    variance: float

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        total = self.variance + sigma**2
        log_p = -((x[:, None] - self.means) ** 2).flatten(2).sum(2) / (2 * total)
        mean = torch.einsum("nk,kchw->nchw", log_p.softmax(1), self.means)
        return (self.variance * x + sigma**2 * mean) / total


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)


MIXTURE = GaussianMixture(_random(5, 1, 1, 2), 0.25)
# the guide network is the same mixture, blurred
GUIDED = Guided(MIXTURE, GaussianMixture(MIXTURE.means, 0.5), 2.0)
DENOISERS: dict[str, Denoiser] = {"alone": MIXTURE, "autoguided": GUIDED}

# what is measured: name -> (solver, evaluations of N steps, the order that its formula promises)
MEASURED: dict[str, tuple[Solver, Callable[[int], int], int]] = {
    "euler": (SOLVERS["euler"], lambda n: n, 1),
    "heun": (SOLVERS["heun"], lambda n: 2 * n - 1, 2),
    "dpmpp2m": (SOLVERS["dpmpp2m"], lambda n: n, 2),
    "dpmpp3m": (dpmpp3m, lambda n: n, 3),
    "dpmpp3m, curvature 0.5": (functools.partial(dpmpp3m, curvature=0.5), lambda n: n, 2),
    "unipc": (unipc, lambda n: n, 3),
    "unipc, order 3": (functools.partial(unipc, order=3), lambda n: n, 4),
    "deis": (deis, lambda n: n, 4),
    "deis, in sigma": (functools.partial(deis, variable="sigma"), lambda n: n, 4),
    "ipndm": (SOLVERS["ipndm"], lambda n: n, 2),
}
# those of the command line, with their defaults
BY_NAME = ("euler", "heun", "dpmpp2m", "dpmpp3m", "unipc", "deis", "ipndm")


def solve(solver: Solver, denoiser: Denoiser, num_steps: int) -> torch.Tensor:
    """Where a solver brings a fixed set of points in this number of steps, float64 [NUM_POINTS, 1, 1, 2]."""
    sigmas = karras_sigmas(num_steps, SIGMA_MIN, SIGMA_MAX, RHO, torch.float64)
    return solver(denoiser, _random(NUM_POINTS, 1, 1, 2), sigmas)


def reference(denoiser: Denoiser) -> torch.Tensor:
    """The result of so many steps of the best solver that its error does not count.

    The step from SIGMA_MIN to 0 is Euler, as in every solver measured here, so that it is not part of their errors.
    """
    return solve(functools.partial(unipc, order=3), denoiser, FINE_STEPS)


def errors(solver: Solver, denoiser: Denoiser, steps: Sequence[int], truth: torch.Tensor) -> list[float]:
    """The root mean square distance to `truth`, per coordinate, for each number of steps."""
    return [float((solve(solver, denoiser, count) - truth).square().mean().sqrt()) for count in steps]


def order_of(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The order of convergence: minus the slope of a line fitted to log(error) over log(steps - 1).

    The last step, to noise level 0, is the same for every number of steps.
    """
    x = torch.tensor([math.log(count - 1) for count in steps], dtype=torch.float64)
    y = torch.tensor([math.log(error) for error in errors], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / (x * x).sum())


def fewest_evaluations(solver: Solver, cost: Callable[[int], int], denoiser: Denoiser, truth: torch.Tensor) -> int:
    """The fewest evaluations from which on the error is within 1 % of that of 32 Heun steps, or below; 0 if none are.

    At most 400 steps are tried.
    "From which on" means up to 1.5 times as many steps: an error may be small by chance at one number of steps.
    """
    goal = ALLOWANCE * errors(SOLVERS["heun"], denoiser, [HEUN_STEPS], truth)[0]
    first = 0
    for count in range(4, 401):
        if errors(solver, denoiser, [count], truth)[0] > goal:
            first = 0
        elif first == 0:
            first = count
        elif count >= 1.5 * first:
            break
    return cost(first) if first else 0


def measure(steps: Sequence[int]) -> dict[str, Mapping[str, Mapping[str, object]]]:
    """For each denoiser and solver: errors by number of steps, the order fitted over FIT_STEPS, evaluations needed."""
    results: dict[str, Mapping[str, Mapping[str, object]]] = {}
    for name, denoiser in DENOISERS.items():
        truth = reference(denoiser)
        rows = {}
        for solver_name, (solver, cost, expected) in MEASURED.items():
            rows[solver_name] = {
                "evaluations": [cost(count) for count in steps],
                "errors": errors(solver, denoiser, steps, truth),
                "order": order_of(FIT_STEPS, errors(solver, denoiser, FIT_STEPS, truth)),
                "expected_order": expected,
                "evaluations_like_32_heun_steps": fewest_evaluations(solver, cost, denoiser, truth),
            }
        results[name] = rows
    return results
