import math

import pytest
import torch

from edm2kit.denoiser import for_images
from edm2kit.guidance.losses.gradient import slope, slope_at
from edm2kit.guidance.losses.gradient_step import GradientStep
from edm2kit.guidance.losses.lgd import MonteCarloAverage
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.guidance.losses.tfg import TFG, increasing
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import euler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fake_gpu import DEVICE, FakeGPU
from tests.support.fakes import Counting, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR, dtype=torch.float64), 0.2)
LOSS = Measurement(InpaintingOperator(torch.ones(1, 3, 3)), torch.randn([2, 3, 3], generator=GENERATOR), 3.0)
SIGMAS = karras_sigmas(6, 0.01, 5, 7, torch.float64)


def sampled(rng=range(4), **settings):
    return euler(for_images(TFG(MIXTURE, LOSS, **settings), StackedGenerator("cpu", rng)), X[: len(rng)], SIGMAS)


def test_without_rho_and_mu_it_is_off_bitwise():
    def never(D):
        raise AssertionError("the loss was called")

    plain = euler(MIXTURE, X, SIGMAS)
    assert torch.equal(euler(TFG(MIXTURE, never, rho=0.0, mu=0.0), X, SIGMAS), plain)
    assert torch.equal(euler(TFG(MIXTURE, never, rho=0.0, iterations=0), X, SIGMAS), plain)


def test_a_constant_loss_leaves_plain_ddim():
    constant = for_images(TFG(MIXTURE, lambda D: torch.ones(len(D)), 9.0, 9.0), StackedGenerator("cpu", range(4)))
    assert torch.equal(euler(constant, X, SIGMAS), euler(MIXTURE, X, SIGMAS))


def vp_step(x, sigma, sigma_next, rho, mu, iterations):
    """TFG's algorithm as published, for a variance-preserving x and one deterministic DDIM step, at gamma = 0."""
    alpha_bar, alpha_bar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    alpha = alpha_bar / alpha_bar_next
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        x0 = MIXTURE(leaf / alpha_bar.sqrt(), sigma)
        delta_t = -rho * torch.autograd.grad(LOSS(x0).sum(), leaf)[0]
    x0 = x0.detach()
    delta_0 = torch.zeros_like(x)
    for _ in range(iterations):
        delta_0 = delta_0 - mu * slope_at(LOSS, x0 + delta_0).gradient
    noise = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    x_next = alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next).sqrt() * noise
    return x_next + delta_t / alpha.sqrt() + alpha_bar_next.sqrt() * delta_0


def test_the_run_is_that_of_the_published_algorithm():
    rho, mu, iterations = 0.3, 0.4, 3
    x = X * SIGMAS[0] / (1 + SIGMAS[0] ** 2).sqrt()
    for i in range(6):
        grown = increasing(i, SIGMAS)
        x = vp_step(x, SIGMAS[i], SIGMAS[i + 1], rho * grown, mu * grown, iterations)
    ours = sampled(rho=rho, mu=mu, gamma=0.0, iterations=iterations)
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-13)
    assert (ours - euler(MIXTURE, X, SIGMAS)).abs().max() > 0.1


def test_the_weights_grow_along_the_run_with_mean_one():
    weights = [increasing(i, SIGMAS) for i in range(6)]
    assert sum(weights) / 6 == pytest.approx(1)
    assert weights == sorted(weights)
    # in proportion to 1 - beta of each step
    alphas = [(1 + SIGMAS[i + 1] ** 2) / (1 + SIGMAS[i] ** 2) for i in range(6)]
    assert weights[4] / weights[1] == pytest.approx((alphas[4] / alphas[1]).item())


def test_without_mu_and_gamma_it_is_dps():
    def rule(at, sigma_next):
        i = SIGMAS.tolist().index(at.sigma.item())
        return 0.5 * increasing(i, SIGMAS) * (1 + at.sigma**2) * at.gradient

    torch.testing.assert_close(sampled(rho=0.5, mu=0.0, gamma=0.0), euler(GradientStep(MIXTURE, LOSS, rule), X, SIGMAS))


def test_without_rho_the_denoiser_is_not_run_backwards():
    def forwards_only(x, sigma, labels=None):
        assert not x.requires_grad
        return MIXTURE(x, sigma)

    unified = for_images(TFG(forwards_only, LOSS, rho=0.0), StackedGenerator("cpu", range(4)))
    assert (euler(unified, X, SIGMAS) - euler(MIXTURE, X, SIGMAS)).abs().max() > 0.01


def test_with_gamma_it_is_the_gradient_of_the_average():
    unified = for_images(TFG(MIXTURE, LOSS, 0.5, 0.0, gamma=2.0, count=3), StackedGenerator("cpu", range(4)))
    x, two = 5 * X, SIGMAS[:2]
    step = unified.for_step(0, two)
    step(x, two[0])

    def spread(sigma):
        return 2.0 * sigma / math.sqrt(1 + sigma**2)

    average = for_images(MonteCarloAverage(LOSS, 3, r=spread), StackedGenerator("cpu", range(4))).for_step(0, two)
    shift = -0.5 * (1 + two[0] ** 2) * slope(MIXTURE, average, x, two[0], None).gradient
    torch.testing.assert_close(step.after_step(x, 0, two), x + shift)


def test_an_image_does_not_depend_on_its_batch():
    settings = {"rho": 0.5, "gamma": 1.0, "count": 2}
    assert torch.equal(sampled(**settings), sampled(**settings))
    torch.testing.assert_close(sampled(range(2), **settings), sampled(**settings)[:2])


def test_the_cost_is_one_call_a_step():
    counting = Counting(MIXTURE)
    euler(TFG(counting, LOSS, gamma=0.0), X, SIGMAS)
    assert len(counting.calls) == 6


def test_wrong_settings_and_calls_outside_of_a_run_are_refused():
    with pytest.raises(ValueError, match="gamma -1"):
        TFG(MIXTURE, LOSS, gamma=-1.0)
    with pytest.raises(ValueError, match="expected a finite number"):
        TFG(MIXTURE, LOSS, rho=math.nan)
    with pytest.raises(ValueError, match="call for_step"):
        TFG(MIXTURE, LOSS)(X, SIGMAS[0])
    assert TFG(MIXTURE, LOSS, 1.0, 0.5).scaled(0.5).mu == 0.25


def test_growth_on_a_device_without_float64():
    sigmas = torch.tensor([5.0, 1.0, 0.2, 0.0])
    with FakeGPU(float64=False):
        assert increasing(1, sigmas.to(DEVICE)) > 0
