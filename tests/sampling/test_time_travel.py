"""Time travel: what repeated steps cost, and that they leave an exact distribution unchanged."""

import math

import pytest
import torch

from edm2kit.guidance.losses.freedom import FreeDoMLevelStep
from edm2kit.guidance.losses.gradient_step import GradientStep
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import Churn, Sampler, TimeTravel, euler, time_travel
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Counting, Following, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
SIGMAS = karras_sigmas(16, 0.002, 80, 7, torch.float64)


def no_noise(x):
    raise AssertionError("noise was drawn")


@pytest.mark.parametrize("travel", [TimeTravel(times=1), TimeTravel(10, 100.0, 200.0), TimeTravel(10, 1.0, 1.0)])
def test_without_going_back_it_is_euler_bitwise(travel):
    assert torch.equal(time_travel(MIXTURE, X, SIGMAS, randn_like=no_noise, travel=travel), euler(MIXTURE, X, SIGMAS))


def test_each_time_costs_one_evaluation():
    counting = Counting(MIXTURE)
    time_travel(counting, X, SIGMAS, randn_like=torch.zeros_like, travel=TimeTravel(10, 3.4, 26.0))
    inside = sum(3.4 < sigma <= 26.0 for sigma in SIGMAS.tolist())
    assert inside == 4
    assert len(counting.calls) == 16 + 9 * inside
    assert [round(sigma, 6) for sigma, _ in counting.calls[3:13]] == [round(SIGMAS[3].item(), 6)] * 10


def test_the_way_back_leaves_the_variance_as_it_was():
    # steps so small that the ODE is exact: the state at each level has variance v + sigma^2
    v, m = 0.25, 0.2
    sigmas = torch.cat([torch.linspace(2.0, 1.0, 41, dtype=torch.float64), torch.zeros(1)]).double()[:-1]
    count = 40000
    noise = (m + torch.randn([count, 1, 1, 1], generator=GENERATOR).double() * math.sqrt(v + 4)) / 2
    rng = torch.Generator().manual_seed(1)

    def randn_like(x):
        return torch.randn(x.shape, generator=rng, dtype=x.dtype)

    for times, shrink in ((1, 1.0), (5, 1.0), (5, 0.9)):
        x = time_travel(
            Gaussian(m, v), noise, sigmas, None, lambda x, s=shrink: s * randn_like(x), travel=TimeTravel(times, 0, 9)
        )
        off = x.var().item() / (v + 1) - 1
        # 40000 samples tell the variance to 0.7%; noise that is a tenth too weak is seen
        assert (abs(off) < 0.03) == (shrink == 1.0), (times, shrink, off)


def test_going_back_brings_a_guided_sample_nearer_to_what_the_loss_asks_for():
    loss = Measurement(InpaintingOperator(torch.ones(1, 3, 3)), torch.randn([2, 3, 3], generator=GENERATOR), 3.0)
    pushed, rng = GradientStep(MIXTURE, loss, FreeDoMLevelStep(0.02)), StackedGenerator("cpu", range(4))
    once = euler(pushed, X, SIGMAS)
    often = time_travel(pushed, X, SIGMAS, randn_like=rng.randn_like, travel=TimeTravel(8, 0.1, 3.0))
    assert loss(often).mean() < loss(once).mean() - 0.01


def test_to_the_denoiser_each_time_is_a_step_of_its_own():
    inner = Following(MIXTURE)
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    time_travel(inner, X, sigmas, randn_like=torch.zeros_like, travel=TimeTravel(2, 1.5, 3.0))
    step = [("for_step", 0), ("call", 0), ("after_step", 0)]
    assert inner.heard == [*step, *step, ("for_step", 1), ("call", 1), ("after_step", 1)]


def test_an_image_does_not_depend_on_its_batch():
    travel = TimeTravel(3, 1.0, 10.0)
    whole = time_travel(MIXTURE, X, SIGMAS, None, StackedGenerator("cpu", range(4)).randn_like, travel=travel)
    alone = time_travel(MIXTURE, X[2:3], SIGMAS, None, StackedGenerator("cpu", [2]).randn_like, travel=travel)
    torch.testing.assert_close(alone, whole[2:3])


def test_a_sampler_hands_its_settings_on():
    travel = TimeTravel(2, 1.0, 10.0)
    sampler = Sampler(16, solver="time-travel", dtype=torch.float64, settings=travel)
    made = sampler(MIXTURE, X, randn_like=torch.ones_like)
    assert torch.equal(made, time_travel(MIXTURE, X, SIGMAS, randn_like=torch.ones_like, travel=travel))
    with pytest.raises(ValueError, match="do not belong to the solver heun"):
        Sampler(settings=travel)


def test_with_churn_the_step_starts_at_the_raised_level():
    counting = Counting(MIXTURE)
    sigmas = torch.tensor([2.0, 0.0])
    time_travel(counting, X, sigmas, randn_like=torch.zeros_like, churn=Churn(0.1), travel=TimeTravel(1))
    assert counting.calls[0][0] == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("settings", "wrong"), [((0, 1.0, 2.0), "0 times"), ((2, 3.0, 2.0), "expected 0 <= lo"), ((2, math.nan, 2.0), "lo")]
)
def test_wrong_settings_are_refused(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        TimeTravel(*settings)
