"""The order of convergence of a solver, measured on a mixture of Gaussians with a known denoiser."""

import functools

from edm2kit.experiments.solvers.convergence import FIT_STEPS, MIXTURE, errors, order_of, reference


@functools.cache
def _truth():
    return reference(MIXTURE)


def fitted_order(solver) -> float:
    """The slope of log(error) against log(steps), negated."""
    return order_of(FIT_STEPS, errors(solver, MIXTURE, FIT_STEPS, _truth()))
