"""Restart sampling: what it costs, where it restarts, and that it converges like Heun."""

import pytest
import torch

from edm2kit.experiments.solvers.convergence import MIXTURE as PLANE
from edm2kit.experiments.solvers.convergence import order_of, solve
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.restart import DEFAULT, Restart, parse_intervals, restart
from edm2kit.sampling.solvers import Sampler, heun
from tests.support.fakes import Constant, Counting, Following, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)


def test_without_restarts_it_is_heun_bitwise():
    sigmas = karras_sigmas(12, 0.002, 80, 7, torch.float64)
    for settings in (Restart(()), Restart(((4, 0, 0.1, 1.0),)), Restart(((4, 3, 100.0, 200.0),))):
        assert torch.equal(restart(MIXTURE, NOISE, sigmas, settings=settings), heun(MIXTURE, NOISE, sigmas))


def test_the_default_setting_costs_203_evaluations():
    counting = Counting(MIXTURE)
    restart(counting, NOISE, karras_sigmas(36, 0.002, 80, 7), randn_like=torch.zeros_like)
    assert len(counting.calls) == 203


def test_a_restart_leads_from_its_lower_end_back_to_its_upper_end():
    counting = Counting(MIXTURE)
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    restart(counting, NOISE, sigmas, randn_like=torch.zeros_like, settings=Restart(((2, 2, 1.9, 5.0),)))
    levels = [sigma for sigma, _ in counting.calls]
    assert levels == pytest.approx([8, 4, 4, 2, 5, 2, 5, 2, 2, 1, 1])


def test_the_added_noise_has_the_variance_of_the_way_back():
    # towards a constant D an ODE step multiplies the distance to D by sigma_next / sigma
    sigmas = torch.tensor([8.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    seen = []

    def denoiser(x, sigma, condition=None):
        seen.append((float(sigma), x))
        return torch.full_like(x, 0.0)

    restart(denoiser, NOISE, sigmas, randn_like=torch.ones_like, settings=Restart(((2, 1, 2.0, 6.0),)))
    at_six = next(x for sigma, x in seen if abs(sigma - 6) < 1e-9)
    torch.testing.assert_close(at_six, 2 * NOISE + (36 - 4) ** 0.5)


def test_with_fixed_noise_the_error_falls_with_order_2():
    quarter = karras_sigmas(5, 0.002, 80, 7, torch.float64).tolist()
    low, high = quarter[3], quarter[2]

    def run(num_steps):
        rng = torch.Generator().manual_seed(1)
        settings = Restart((((num_steps - 1) // 2 + 1, 2, low, high),))

        def solver(denoiser, noise, sigmas):
            def randn_like(x):
                return torch.randn(x.shape, generator=rng, dtype=x.dtype)

            return restart(denoiser, noise, sigmas, randn_like=randn_like, settings=settings)

        return solve(solver, PLANE, num_steps)

    truth, steps = run(1025), (33, 65, 129)
    errors = [float((run(count) - truth).square().mean().sqrt()) for count in steps]
    assert order_of(steps, errors) == pytest.approx(2, abs=0.2)


def test_a_denoiser_that_follows_the_run_sees_all_its_levels_at_every_step():
    following = Following(Gaussian(0, 1))
    sigmas = torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    restart(following, NOISE, sigmas, randn_like=torch.zeros_like, settings=Restart(((3, 1, 2.0, 6.0),)))
    steps = [number for word, number in following.heard if word == "for_step"]
    assert steps == [0, 1, 1, 2, 2]  # 8, 4; then among 8, 6, 3.5, 2, 0: 6 and 3.5; then 2


def test_guidance_in_an_interval_of_levels_holds_in_restarts():
    counting = Counting(Constant(1.0))
    guided = GuidanceInterval(Guided(MIXTURE, counting, 2.0), MIXTURE, 1.0, 3.0)
    sigmas = torch.tensor([8.0, 3.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    restart(guided, NOISE, sigmas, randn_like=torch.zeros_like, settings=Restart(((3, 1, 0.5, 6.0),)))
    levels = [sigma for sigma, _ in counting.calls]
    assert levels[:2] == [3, 1]  # the run
    assert all(0.5 <= level <= 6 for level in levels)


def test_intervals_from_text():
    assert parse_intervals("4,1,1.09,1.92 6,6,0.06,0.3") == ((4, 1, 1.09, 1.92), (6, 6, 0.06, 0.3))
    for text in ("4,1", "a,b,c,d", "4,1,1,2,3"):
        with pytest.raises(ValueError, match="is not an interval LEVELS,TIMES,LO,HI"):
            parse_intervals(text)


@pytest.mark.parametrize(
    ("interval", "wrong"),
    [((1, 1, 0.1, 1.0), "2 levels"), ((2, -1, 0.1, 1.0), "0 times"), ((2, 1, 1.0, 0.1), "lo < hi")],
)
def test_wrong_intervals_are_refused(interval, wrong):
    with pytest.raises(ValueError, match=wrong):
        Restart((interval,))


def test_a_sampler_hands_its_settings_on():
    settings = Restart(((3, 2, 0.5, 2.0),))
    made = Sampler(8, solver="restart", dtype=torch.float64, settings=settings)(
        MIXTURE, NOISE, randn_like=torch.ones_like
    )
    sigmas = karras_sigmas(8, 0.002, 80, 7, torch.float64)
    assert torch.equal(made, restart(MIXTURE, NOISE, sigmas, randn_like=torch.ones_like, settings=settings))
    assert Restart() == DEFAULT
