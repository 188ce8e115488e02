import math

import pytest
import torch

from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.guidance.losses.score import LossGuided
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting, Following, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0], dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
TARGET = torch.randn([2, 3, 3], generator=GENERATOR)
LOSS = Measurement(InpaintingOperator(torch.ones(1, 3, 3)), TARGET, 0.7)


def never(D):
    raise AssertionError("the loss was called")


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, D, calls):
        ctx.calls = calls
        return D.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.calls.append(gradient)
        return gradient, None


@pytest.mark.parametrize("backprop", [True, False])
def test_scale_0_is_off_bitwise_and_calls_no_loss(backprop):
    off = LossGuided(MIXTURE, never, 0.0, backprop)
    assert torch.equal(edm_sampler(off, X, num_steps=4), edm_sampler(MIXTURE, X, num_steps=4))


@pytest.mark.parametrize("backprop", [True, False])
def test_a_constant_loss_makes_the_scale_irrelevant(backprop):
    for constant in (lambda D: torch.ones(len(D)), lambda D: 0 * D.sum((1, 2, 3)) + 1):
        assert torch.equal(LossGuided(MIXTURE, constant, 5.0, backprop)(X, SIGMA), MIXTURE(X, SIGMA))


@pytest.mark.parametrize("backprop", [True, False])
def test_the_answer_is_affine_in_the_scale(backprop):
    D = [LossGuided(MIXTURE, LOSS, scale, backprop)(X, SIGMA) for scale in (-1.0, 0.5, 2.0)]
    torch.testing.assert_close(D[0] - 2 * D[1] + D[2], torch.zeros_like(D[0]), atol=1e-12, rtol=0)
    assert (D[1] - D[0]).abs().max() > 0.1


@pytest.mark.parametrize("backprop", [True, False])
def test_an_image_does_not_depend_on_its_batch(backprop):
    guided = LossGuided(MIXTURE, LOSS, 1.0, backprop)
    for k in range(4):
        torch.testing.assert_close(guided(X[k : k + 1], SIGMA[k : k + 1]), guided(X, SIGMA)[k : k + 1])


@pytest.mark.parametrize("backprop", [True, False])
def test_an_evaluation_is_one_call_of_the_denoiser(backprop):
    counting = Counting(MIXTURE)
    edm_sampler(LossGuided(counting, LOSS, 0.1, backprop), X.float())
    assert len(counting.calls) == 63


@pytest.mark.parametrize(("backprop", "passes"), [(True, 7), (False, 0)])
def test_the_denoiser_runs_backwards_only_where_asked_for(backprop, passes):
    calls = []
    guided = LossGuided(lambda x, s, l: _Backward.apply(MIXTURE(x, s, l), calls), LOSS, 0.1, backprop)
    edm_sampler(guided, X, num_steps=4)
    assert len(calls) == passes


def test_the_score_is_that_of_the_density_times_exp_of_minus_the_loss():
    # autograd through the density itself: log p(x; sigma) of one Gaussian, and the loss of its denoised image
    v, m, s = 0.25, 0.2, 0.7
    x, sigma = X[:1].clone().requires_grad_(), torch.tensor(0.8, dtype=torch.float64)
    D = Gaussian(m, v)(x, sigma)
    log_p = -((x - m) ** 2).sum() / (2 * (v + sigma**2)) - 3 * ((D - TARGET) ** 2).sum() / (2 * s**2)
    score = torch.autograd.grad(log_p, x)[0]
    guided = LossGuided(Gaussian(m, v), LOSS, 3.0)(x.detach(), sigma)
    torch.testing.assert_close(guided, x.detach() + sigma**2 * score)


def test_nothing_is_left_behind_that_wants_a_gradient():
    with torch.no_grad():
        for backprop in (True, False):
            assert not LossGuided(MIXTURE, LOSS, 1.0, backprop)(X, SIGMA).requires_grad


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="scale of loss guidance"):
        LossGuided(MIXTURE, LOSS, scale)


def test_what_it_wraps_follows_the_run_and_a_share_of_the_scale_is_that():
    inner = Following(Constant(0.0))
    guided = LossGuided(inner, LOSS, 2.0).scaled(0.5)
    assert guided.scale == 1.0
    edm_sampler(guided.for_images(StackedGenerator("cpu", range(4))), X, num_steps=1)
    assert inner.heard == [("for_images", 4), ("for_step", 0), ("call", 0), ("after_step", 0)]
