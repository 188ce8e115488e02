import math

import pytest
import torch

from edm2kit.denoiser import for_images
from edm2kit.guidance.losses.gradient import c_out, slope_at
from edm2kit.guidance.losses.lgd import ClosedFormAverage, MonteCarloAverage
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.guidance.losses.score import LossGuided
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Gaussian

# prior N(m, v), observation y with noise s_y: the posterior is N(.788, .257^2)
V, M, S_Y, Y = 0.25, 0.2, 0.3, 1.0
OBSERVED = Measurement(InpaintingOperator(torch.ones(1, 1, 1)), torch.full([1, 1, 1], Y), S_Y)
PRIOR = Gaussian(M, V)


def sampled(loss, num_steps=32, backprop=True, count=2):
    """Mean and deviation that a Gaussian start ends at; the maps are affine, so two points tell."""
    T = 80.0
    start = torch.tensor([-1.0, 1.0] * (count // 2), dtype=torch.float64).reshape(-1, 1, 1, 1)
    noise = (M + start * math.sqrt(V + T**2)) / T
    guided = for_images(LossGuided(PRIOR, loss, 1.0, backprop), StackedGenerator("cpu", range(count)))
    x = edm_sampler(guided, noise, num_steps=num_steps, dtype=torch.float64).flatten()
    low, high = x[::2].mean().item(), x[1::2].mean().item()
    return (low + high) / 2, (high - low) / 2


def test_the_spread_is_that_of_the_paper_for_data_of_unit_variance():
    for sigma in (0.1, 1.0, 80.0):
        level = torch.tensor(sigma)
        assert c_out(level, 1.0).item() == pytest.approx(sigma / math.sqrt(1 + sigma**2))
    assert c_out(torch.tensor(80.0), 0.5).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("backprop", [True, False])
def test_c5_the_exact_average_reaches_the_posterior(backprop):
    assert sampled(ClosedFormAverage(OBSERVED), 32, backprop) == pytest.approx((0.786, 0.262), abs=6e-4)
    # the start has the prior's mean, not yet the posterior's: at T = 80 the way left to go is .0019
    mean, std = (M / V + Y / S_Y**2) / (1 / V + 1 / S_Y**2), (1 / V + 1 / S_Y**2) ** -0.5
    assert (mean, std) == pytest.approx((0.788, 0.257), abs=6e-4)
    missing = (mean - M) * std / math.sqrt(std**2 + 80**2)
    assert sampled(ClosedFormAverage(OBSERVED), 256, backprop) == pytest.approx((mean - missing, std), abs=2e-4)


def test_c5_negative_control_without_the_average_it_does_not():
    assert sampled(OBSERVED) == pytest.approx((1.155, 0.132), abs=6e-4)


def test_c5_the_drawn_average_reaches_the_posterior():
    # 64 draws of each of 200 images
    mean, std = sampled(MonteCarloAverage(OBSERVED, 64), 32, count=200)
    assert (mean, std) == (pytest.approx(0.786, abs=0.03), pytest.approx(0.262, abs=0.03))


def test_the_drawn_gradient_is_the_closed_form_one():
    D, sigma, r2 = torch.full([1, 1, 1, 1], 0.4, dtype=torch.float64), torch.tensor(0.6), 0.6**2 * V / (0.6**2 + V)
    loss = for_images(MonteCarloAverage(OBSERVED, 2000), StackedGenerator("cpu", [0])).at(sigma)
    assert slope_at(loss, D).gradient.item() == pytest.approx((0.4 - Y) / (S_Y**2 + r2), rel=0.03)
    assert slope_at(ClosedFormAverage(OBSERVED).at(sigma), D).gradient.item() == pytest.approx(
        (0.4 - Y) / (S_Y**2 + r2), rel=1e-6
    )


def test_the_value_is_minus_the_log_of_the_mean():
    D, sigma = torch.zeros(1, 1, 1, 1), torch.tensor(1.0)
    loss = for_images(MonteCarloAverage(lambda images: images.flatten(), 3), StackedGenerator("cpu", [5])).at(sigma)
    z = StackedGenerator("cpu", [5]).randn([1, 3])[0]
    r = 0.5 / math.sqrt(1.25)
    assert loss(D).item() == pytest.approx(-(-r * z).exp().mean().log().item(), rel=1e-5)


def test_without_spread_the_average_is_the_loss_itself():
    D = torch.randn([3, 1, 1, 1], generator=torch.Generator().manual_seed(0))
    loss = for_images(MonteCarloAverage(OBSERVED, 4, r=torch.zeros_like), StackedGenerator("cpu", range(3)))
    torch.testing.assert_close(loss.at(torch.tensor(1.0))(D), OBSERVED(D))


def test_draws_are_an_images_own_and_stay_the_same_through_a_step():
    D, sigma = torch.zeros(3, 1, 1, 1), torch.tensor(1.0)
    sigmas = torch.tensor([1.0, 0.5, 0.0])

    def losses(seeds, step=0):
        loss = for_images(MonteCarloAverage(OBSERVED, 4), StackedGenerator("cpu", seeds))
        for i in range(step + 1):
            here = loss.for_step(i, sigmas)
        return torch.stack([here.at(sigma)(D[: len(seeds)]) for _ in range(2)])

    whole = losses([3, 4, 5])
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(losses([4])[0], whole[0, 1:2])
    assert not torch.equal(losses([3, 4, 5], step=1), whole)


def test_an_average_of_nothing_is_refused():
    with pytest.raises(ValueError, match="expected at least 1"):
        MonteCarloAverage(OBSERVED, 0)
