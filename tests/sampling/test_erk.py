"""ERK-Guid against Heun, closed forms and a pinned value."""

import itertools

import pytest
import torch

from edm2kit.sampling.solvers import Churn, Sampler, Stiffness, erk, heun, stiffness_of
from tests.support.fakes import Constant, Counting, Following, Gaussian

NOISE = torch.randn([3, 2, 4, 4], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
M, V = 0.7, 0.3
SIGMAS = Sampler(7, dtype=torch.float64).sigmas()


def slope(sigma):
    return sigma / (V + sigma**2)


def test_without_weight_it_is_heun_bitwise():
    off = Stiffness(w_stiff=0.0)
    assert torch.equal(erk(Gaussian(M, V), NOISE, SIGMAS, stiffness=off), heun(Gaussian(M, V), NOISE, SIGMAS))


@pytest.mark.parametrize(
    ("num_steps", "pair"),
    [
        (4, (0.5, 0.1)),
        (8, (0.5, 0.1)),
        (11, (0.5, 0.1)),
        (12, (0.75, 0.3)),
        (16, (0.75, 0.3)),
        (22, (0.75, 0.3)),
        (23, (2.0, 0.5)),
        (32, (2.0, 0.5)),
        (64, (2.0, 0.5)),
    ],
)
def test_the_default_is_the_published_pair_for_the_number_of_steps(num_steps, pair):
    sigmas = Sampler(num_steps, dtype=torch.float64).sigmas()
    default = erk(Gaussian(M, V), NOISE, sigmas)
    assert torch.equal(default, erk(Gaussian(M, V), NOISE, sigmas, stiffness=Stiffness(*pair)))
    if num_steps > 4:
        assert not torch.equal(default, heun(Gaussian(M, V), NOISE, sigmas))


def test_below_the_threshold_it_is_heun_bitwise():
    calm = Stiffness(w_stiff=2.0, w_con=10.0)
    assert torch.equal(erk(Gaussian(M, V), NOISE, SIGMAS, stiffness=calm), heun(Gaussian(M, V), NOISE, SIGMAS))


def test_of_a_gaussian_the_stiffness_is_known():
    for sigma in (0.1, 0.5, 3.0):
        a, b = NOISE, NOISE.flip(0)
        slopes = [(x - Gaussian(M, V)(x, sigma)) / sigma for x in (a, b)]
        rho, v = stiffness_of(a[:1], slopes[0][:1], b[:1], slopes[1][:1])
        assert rho.item() == pytest.approx(slope(sigma), rel=1e-12)
        torch.testing.assert_close(v, (a - b)[:1] / (a - b)[:1].norm())


def test_of_a_gaussian_every_step_is_known():
    # in one dimension the correction is -h (w h rho)^2 d: no step but the first and the last is without it
    w_stiff, x, factor = 1.5, NOISE[:, :1, :1, :1] * 80, 1.0
    levels = SIGMAS.tolist()
    for k, (sigma, after) in enumerate(itertools.pairwise(levels)):
        h, a, b = sigma - after, slope(sigma), slope(after) if after else 0.0
        step = 1 - h * a if after == 0 else 1 - h / 2 * (a + b * (1 - h * a))
        if 0 < k < len(levels) - 2 and a > 0.25:
            step -= h * (w_stiff * h * a) ** 2 * a
        factor *= step
    result = erk(Gaussian(M, V), NOISE[:, :1, :1, :1], SIGMAS, stiffness=Stiffness(w_stiff, 0.25))
    torch.testing.assert_close(result, M + factor * (x - M), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(result, heun(Gaussian(M, V), NOISE[:, :1, :1, :1], SIGMAS), atol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_first_and_last_steps_are_heun_s(num_steps):
    sigmas = Sampler(num_steps, dtype=torch.float64).sigmas()
    strong = Stiffness(w_stiff=5.0, w_con=0.0)
    assert torch.equal(erk(Gaussian(M, V), NOISE, sigmas, stiffness=strong), heun(Gaussian(M, V), NOISE, sigmas))


def test_it_costs_what_heun_costs_and_follows_the_run():
    counting, following = Counting(Gaussian(M, V)), Following(Gaussian(M, V))
    erk(counting, NOISE, Sampler(32).sigmas())
    assert len(counting.calls) == 63
    erk(following, NOISE, torch.tensor([3.0, 1.0, 0.0]))
    first = [("for_step", 0), ("call", 0), ("call", 0), ("after_step", 0)]
    assert following.heard == [*first, ("for_step", 1), ("call", 1), ("after_step", 1)]


def test_an_image_does_not_depend_on_its_batch():
    strong = Stiffness(w_stiff=2.0, w_con=0.3)
    whole = erk(Gaussian(M, V), NOISE, SIGMAS, stiffness=strong)
    for k in range(3):
        torch.testing.assert_close(erk(Gaussian(M, V), NOISE[k : k + 1], SIGMAS, stiffness=strong), whole[k : k + 1])


def test_where_noise_is_added_it_is_heun_s_and_a_flat_answer_stays_finite():
    churned = {"churn": Churn(S_churn=2.0), "randn_like": torch.ones_like}
    strong = Stiffness(w_stiff=5.0, w_con=0.0)
    same = heun(Gaussian(M, V), NOISE, SIGMAS, **churned)
    assert torch.equal(erk(Gaussian(M, V), NOISE, SIGMAS, stiffness=strong, **churned), same)
    assert erk(Constant(0.5), torch.zeros_like(NOISE), SIGMAS, stiffness=strong).isfinite().all()


def test_pinned_value():
    x = Sampler(6, solver="erk", settings=Stiffness(2.0, 0.1), dtype=torch.float64)(Gaussian(M, V), NOISE)
    assert [x.mean().item(), x[1, 1, 2, 3].item()] == pytest.approx(PINNED, abs=1e-9)


PINNED = [0.4698682046885383, -2.520178014060063]


@pytest.mark.parametrize(("settings", "wrong"), [((-1.0, 0.1), "w_stiff is -1"), ((1.0, float("nan")), "w_con is nan")])
def test_settings_that_make_no_sense_are_refused(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        Stiffness(*settings)
