import math

import pytest
import torch

from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.losses.dps import DPSStep
from edm2kit.guidance.losses.freedom import FreeDoMLevelStep, FreeDoMStep
from edm2kit.guidance.losses.gradient import slope
from edm2kit.guidance.losses.gradient_step import GradientStep, StepStart
from edm2kit.guidance.losses.polyak import PolyakStep, TruePolyakStep
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.sampling.solvers import edm_sampler, euler, heun
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import authors
from tests.support.fakes import Constant, Counting, Following, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
TARGET = torch.randn([2, 3, 3], generator=GENERATOR)
SQUARES = Measurement(InpaintingOperator(torch.ones(1, 3, 3)), TARGET, 0.5**0.5)
RULES = [DPSStep(), FreeDoMLevelStep(), FreeDoMStep(), PolyakStep(), TruePolyakStep()]
SIGMAS = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)


def never(D):
    raise AssertionError("the loss was called")


def unchanged(x, sigma, labels=None):
    return x


def start_of_step(sigma=2.0):
    level = torch.tensor(sigma, dtype=torch.float64)
    return StepStart(X, level.reshape(1, 1, 1, 1), *slope(MIXTURE, SQUARES, X, level, None))


def lengths(x):
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


# ---- the universal tests


@pytest.mark.parametrize("rule", RULES)
def test_scale_0_is_off_bitwise_and_calls_no_loss(rule):
    off = GradientStep(MIXTURE, never, rule, 0.0)
    assert torch.equal(edm_sampler(off, X, num_steps=4), edm_sampler(MIXTURE, X, num_steps=4))


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_loss_moves_nothing(rule):
    pushed = GradientStep(MIXTURE, lambda D: torch.ones(len(D)), rule, 3.0)
    assert torch.equal(edm_sampler(pushed, X, num_steps=4), edm_sampler(MIXTURE, X, num_steps=4))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backprop", [True, False])
def test_an_image_does_not_depend_on_its_batch(rule, backprop):
    pushed = GradientStep(MIXTURE, SQUARES, rule, 0.5, backprop)
    whole = edm_sampler(pushed, X, num_steps=4, dtype=torch.float64)
    for k in range(4):
        alone = edm_sampler(pushed, X[k : k + 1], num_steps=4, dtype=torch.float64)
        torch.testing.assert_close(alone, whole[k : k + 1])


def test_the_evaluations_are_those_of_the_run_and_one_a_step_has_the_loss():
    counting, losses = Counting(MIXTURE), []

    def noted(D):
        losses.append(D)
        return SQUARES(D)

    edm_sampler(GradientStep(counting, noted, FreeDoMStep(), 1.0), X)
    assert (len(counting.calls), len(losses)) == (63, 32)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_brings_samples_nearer_to_what_the_loss_asks_for(rule):
    plain = SQUARES(euler(MIXTURE, X, SIGMAS)).mean()
    assert SQUARES(euler(GradientStep(MIXTURE, SQUARES, rule, 0.05), X, SIGMAS)).mean() < plain - 0.01


# ---- closed forms: where a single step ends


@pytest.mark.parametrize("solver", [euler, heun])
def test_x_is_moved_once_after_the_step_by_the_gradient_at_its_start(solver):
    two = torch.tensor([2.0, 1.0], dtype=torch.float64)
    at = StepStart(2 * X, torch.full([1, 1, 1, 1], 2.0), *slope(MIXTURE, SQUARES, 2 * X, two[0], None))
    of_norm = at.gradient / (2 * at.loss.sqrt().reshape(-1, 1, 1, 1))
    expected = solver(MIXTURE, X, two) - 0.3 * 0.2 * math.sqrt(2) * of_norm
    torch.testing.assert_close(solver(GradientStep(MIXTURE, SQUARES, FreeDoMLevelStep(0.2), 0.3), X, two), expected)


@pytest.mark.parametrize("rule", RULES)
def test_an_image_without_slope_stays_where_it_is_and_the_others_move(rule):
    at = start_of_step()
    steep = torch.tensor([1.0, 0.0, 1.0, 1.0]).reshape(-1, 1, 1, 1)
    shift = rule(at._replace(gradient=at.gradient * steep, loss=at.loss * steep.flatten()), SIGMAS[1])
    assert (lengths(shift) > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_the_unit_of_the_loss_decides_no_direction_and_no_step_vanishes(sigma, sigma_next, dtype):
    # at sigma 80 the slope of a denoiser is 4e-5 or less: the gradient of a mean over pixels is shorter than 1e-6 there
    x, level = (sigma * X).to(dtype), torch.tensor(sigma, dtype=dtype)
    shifts = {}
    for unit in (1.0, 1e-4, 1e-12):
        found = slope(MIXTURE, lambda D, unit=unit: unit * SQUARES(D), x, level, None)
        at = StepStart(x, level.reshape(1, 1, 1, 1), *found)
        for rule in (FreeDoMStep(), TruePolyakStep()):
            shifts.setdefault(rule, []).append(rule(at, torch.tensor(sigma_next, dtype=dtype)))
        for rule in (DPSStep(), FreeDoMLevelStep()):
            shifts.setdefault(rule, []).append(rule(at, torch.tensor(sigma_next, dtype=dtype)) / unit**0.5)
    for rule, (first, *others) in shifts.items():
        assert (lengths(first) > 0).all(), rule
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4 * float(first.abs().max()))


def test_a_gradient_that_is_no_number_is_not_taken_for_none():
    at = start_of_step()
    for rule in RULES:
        shift = rule(at._replace(gradient=at.gradient * torch.nan), SIGMAS[1])
        assert shift.isnan().all()


# ---- the contract


def test_an_interval_decides_which_steps_push():
    losses = []

    def noted(D):
        losses.append(D)
        return SQUARES(D)

    gated = GuidanceInterval(GradientStep(MIXTURE, noted, FreeDoMStep()), MIXTURE, 0.28, 2.90)
    edm_sampler(gated, X)
    assert len(losses) == 7


def test_a_guided_denoiser_can_be_pushed_and_told_to_follow_the_run():
    inner = Following(Constant(0.0))
    pushed = GradientStep(Guided(inner, Constant(1.0), 2.0), SQUARES, FreeDoMLevelStep())
    edm_sampler(pushed.for_images(StackedGenerator("cpu", range(4))), X, num_steps=1)
    assert inner.heard == [("for_images", 4), ("for_step", 0), ("call", 0), ("after_step", 0)]
    assert pushed.scaled(0.5).scale == 0.5


def test_a_call_outside_of_a_run_and_an_infinite_scale_are_refused():
    with pytest.raises(ValueError, match="after each step: call for_step"):
        GradientStep(MIXTURE, SQUARES, FreeDoMStep())(X, torch.tensor(1.0))
    with pytest.raises(ValueError, match="scale of loss guidance"):
        GradientStep(MIXTURE, SQUARES, FreeDoMStep(), math.inf)
