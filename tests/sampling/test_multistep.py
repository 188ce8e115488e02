"""Multistep solvers: equal to diffusers' schedulers, with the order of convergence that their formulas promise."""

import functools
import itertools

import pytest
import torch

from edm2kit.sampling.multistep import deis, dpmpp2m, dpmpp3m, ipndm, unipc
from edm2kit.sampling.noise_levels import Churn, karras_sigmas
from edm2kit.sampling.solvers import SOLVERS, WITHOUT_CHURN, Sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.convergence import fitted_order
from tests.support.fakes import Constant, Counting, Following, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
MULTISTEP = {"dpmpp2m": dpmpp2m, "dpmpp3m": dpmpp3m, "unipc": unipc, "deis": deis, "ipndm": ipndm}


# ---- the schedulers of diffusers

their_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def diffusers():
    return pytest.importorskip("diffusers")


def run_scheduler(scheduler, sigmas, steps):
    """x after `steps` steps of a scheduler for variance-preserving x that takes the clean image, in our coordinates."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    x = NOISE * sigmas[0]
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas[: steps + 1])):
        scaled = x / (1 + sigma**2).sqrt()
        result = scheduler.step(MIXTURE(x, sigma), scheduler.timesteps[i], scaled).prev_sample
        x = result * (1 + following**2).sqrt()
        yield x


class Trace:
    """A denoiser that keeps the x of every step's end."""

    def __init__(self):
        self.ends = []

    def __call__(self, x, sigma, condition=None):
        return MIXTURE(x, sigma)

    def after_step(self, x, i, sigmas):
        self.ends.append(x)
        return x


def assert_same_steps(solver, expected, sigmas, steps):
    trace = Trace()
    solver(trace, NOISE, sigmas)
    expected = list(expected)
    assert len(expected) == steps
    for ours, theirs in zip(trace.ends, expected, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("order", "solver"), [(2, dpmpp2m), (3, functools.partial(dpmpp3m, curvature=0.5))])
@their_warnings
def test_dpm_solver_equals_that_of_diffusers(order, solver):
    sigmas = karras_sigmas(20, 0.002, 80, 7, torch.float64)
    scheduler = diffusers().DPMSolverMultistepScheduler(
        solver_order=order, prediction_type="sample", final_sigmas_type="zero", use_karras_sigmas=True
    )
    assert_same_steps(solver, run_scheduler(scheduler, sigmas, 20), sigmas, 20)


@pytest.mark.parametrize("order", [1, 2, 3])
@their_warnings
def test_unipc_equals_that_of_diffusers(order):
    # their corrector replaces x after the next evaluation, so that steps are compared up to the last evaluation
    sigmas = karras_sigmas(12, 0.002, 80, 7, torch.float64)
    scheduler = diffusers().UniPCMultistepScheduler(
        solver_order=order, prediction_type="sample", final_sigmas_type="zero", use_karras_sigmas=True
    )
    assert_same_steps(functools.partial(unipc, order=order), run_scheduler(scheduler, sigmas, 12), sigmas, 12)


@pytest.mark.parametrize("order", [2, 3])
@their_warnings
def test_deis_equals_that_of_diffusers_up_to_the_steps_for_which_they_lower_the_order(order):
    sigmas = karras_sigmas(12, 0.002, 80, 7, torch.float64)
    scheduler = diffusers().DEISMultistepScheduler(solver_order=order, prediction_type="sample", use_karras_sigmas=True)
    assert_same_steps(functools.partial(deis, order=order), run_scheduler(scheduler, sigmas, 10), sigmas, 10)


def test_ipndm_equals_that_of_diffusers_in_our_coordinates():
    sigmas = karras_sigmas(12, 0.002, 80, 7, torch.float64)
    scheduler = diffusers().IPNDMScheduler()
    scheduler.set_timesteps(12)
    # their step takes any pair (alpha, beta) with x = alpha x0 + beta noise; ours is (1, sigma)
    scheduler.alphas, scheduler.betas = torch.ones_like(sigmas), sigmas

    def theirs():
        x = NOISE * sigmas[0]
        for i, timestep in enumerate(scheduler.timesteps[:11]):
            d = (x - MIXTURE(x, sigmas[i])) / sigmas[i]
            x = scheduler.step(d - sigmas[i] * x, timestep, x).prev_sample
            yield x

    assert_same_steps(ipndm, theirs(), sigmas, 11)


# ---- order of convergence


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (SOLVERS["euler"], 1),
        (SOLVERS["heun"], 2),
        (dpmpp2m, 2),
        (dpmpp3m, 3),
        (functools.partial(dpmpp3m, curvature=0.5), 2),  # as in the authors' code
        (unipc, 3),
        (functools.partial(unipc, order=1), 2),
        (functools.partial(unipc, order=3), 4),
        (deis, 4),
        (functools.partial(deis, order=2), 2),
        (functools.partial(deis, order=3), 3),
        (functools.partial(deis, variable="sigma"), 4),
        (ipndm, 2),
        (functools.partial(ipndm, order=2), 2),
    ],
)
def test_the_error_falls_with_the_order_of_the_solver(solver, order):
    assert fitted_order(solver) == pytest.approx(order, abs=0.35)


# ---- closed forms and the seam


@pytest.mark.parametrize("solver", MULTISTEP.values(), ids=MULTISTEP)
def test_a_constant_denoiser_is_reached_exactly(solver):
    sigmas = karras_sigmas(7, 0.002, 80, 7, torch.float64)
    torch.testing.assert_close(solver(Constant(0.5), NOISE, sigmas), torch.full_like(NOISE, 0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", MULTISTEP.values(), ids=MULTISTEP)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9])
def test_each_step_costs_one_evaluation_at_its_start(solver, num_steps):
    counting = Counting(MIXTURE)
    sigmas = karras_sigmas(num_steps, 0.002, 80, 7)
    assert bool(solver(counting, NOISE, sigmas).isfinite().all())
    assert [sigma for sigma, _ in counting.calls] == sigmas[:-1].tolist()


@pytest.mark.parametrize("solver", MULTISTEP.values(), ids=MULTISTEP)
def test_a_single_step_is_euler(solver):
    sigmas = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    first, expected = Trace(), Trace()
    solver(first, NOISE, sigmas)
    SOLVERS["euler"](expected, NOISE, sigmas)
    torch.testing.assert_close(first.ends[0], expected.ends[0])


@pytest.mark.parametrize("solver", MULTISTEP.values(), ids=MULTISTEP)
def test_a_denoiser_that_follows_the_run_is_told_of_each_step_once(solver):
    following = Following(Gaussian(0, 1))
    solver(following, NOISE, torch.tensor([3.0, 1.0, 0.0]))
    step = ["for_step", "call", "after_step"]
    assert following.heard == [*((word, 0) for word in step), *((word, 1) for word in step)]


class Moving(Gaussian):
    def after_step(self, x, i, sigmas):
        return x + 5 if i == 1 else x


@pytest.mark.parametrize("solver", [unipc, dpmpp2m])
def test_what_after_step_changes_stays(solver):
    # the distribution is so wide that D = x, which is what a move leaves behind
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    moved, plain = (solver(kind(0.0, 1e12), NOISE, sigmas) for kind in (Moving, Gaussian))
    torch.testing.assert_close(moved - plain, torch.full_like(NOISE, 5.0), rtol=0.2, atol=0)


@pytest.mark.parametrize("solver", MULTISTEP.values(), ids=MULTISTEP)
def test_the_result_has_the_dtype_of_the_levels(solver):
    low, high = (
        solver(MIXTURE, NOISE, karras_sigmas(12, 0.01, 20, 7, dtype)) for dtype in (torch.float32, NOISE.dtype)
    )
    assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(low.double(), high, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_CHURN)
def test_churn_is_refused(name):
    with pytest.raises(ValueError, match=f"the solver {name} combines evaluations of several steps"):
        Sampler(solver=name, churn=Churn(S_churn=1))
    with pytest.raises(ValueError, match="leave out S_churn"):
        SOLVERS[name](MIXTURE, NOISE, karras_sigmas(4, 0.01, 20, 7), churn=Churn(S_churn=1))


@pytest.mark.parametrize("name", WITHOUT_CHURN)
def test_an_image_does_not_depend_on_its_batch(name):
    sampler = Sampler(10, solver=name)
    together = sampler(MIXTURE, NOISE.float(), None, StackedGenerator("cpu", range(4)).randn_like)
    alone = sampler(MIXTURE, NOISE[2:3].float(), None, StackedGenerator("cpu", [2]).randn_like)
    torch.testing.assert_close(alone, together[2:3], atol=1e-5, rtol=1e-5)
