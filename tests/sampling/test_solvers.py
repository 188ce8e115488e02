"""Heun and Euler against golden values and closed forms, and the interface between solver and denoiser."""

import itertools
import math

import pytest
import torch

from edm2kit.guidance.combine import Guided
from edm2kit.sampling.solvers import Churn, Sampler, edm_sampler, euler, heun
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden
from tests.support.fakes import Constant, Counting, Following, Gaussian

NOISE = torch.randn([3, 2, 4, 4], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def reference():
    return golden.load("sampler.npz")


@pytest.fixture(scope="module")
def pair(reference):
    net = golden.network("cond", golden.part(golden.load("network_cond.npz"), "state/"))
    return net, golden.network("cond", golden.part(reference, "gstate/"))


# ---- golden values


@pytest.mark.parametrize(
    ("name", "weight", "settings"),
    [
        ("steps8_w1_float32", 1.0, {"num_steps": 8}),
        ("steps8_w2.1_float32", 2.1, {"num_steps": 8}),
        (
            "steps5_w2.1_float64",
            2.1,
            {"num_steps": 5, "sigma_min": 0.01, "sigma_max": 20, "rho": 5, "dtype": torch.float64},
        ),
    ],
)
def test_guided_sampling_equals_the_reference(reference, pair, name, weight, settings):
    x = edm_sampler(Guided(*pair, weight), reference["noise"], reference["labels"], **settings)
    assert x.dtype == reference[f"out/{name}"].dtype == settings.get("dtype", torch.float32)
    golden.assert_close(x, reference[f"out/{name}"], 1e-4)


def test_sampling_with_churn_equals_the_reference(reference, pair):
    rng = StackedGenerator("cpu", reference["churn_seeds"].tolist())
    settings = {"num_steps": 6, "S_churn": 10, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
    x = edm_sampler(Guided(*pair, 2.1), reference["noise"], reference["labels"], randn_like=rng.randn_like, **settings)
    golden.assert_close(x, reference["out/churn"], 1e-4)


# ---- closed forms: on a Gaussian every step is x - m -> factor * (x - m)


def slope(sigma, variance):
    return sigma / (variance + sigma**2)


def heun_factor(sigmas, variance):
    factor = 1.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        h, a, b = sigma_next - sigma, slope(sigma, variance), slope(sigma_next, variance)
        factor *= 1 + h * a if sigma_next == 0 else 1 + h / 2 * (a + b * (1 + h * a))
    return factor


@pytest.mark.parametrize("num_steps", [1, 2, 7, 32])
def test_a_float64_run_equals_the_closed_form_to_1e10(num_steps):
    sampler = Sampler(num_steps, dtype=torch.float64)
    factor = heun_factor(sampler.sigmas().tolist(), 0.3)
    x = edm_sampler(Gaussian(0.7, 0.3), NOISE, num_steps=num_steps, dtype=torch.float64)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, 0.7 + factor * (80 * NOISE - 0.7), atol=1e-10, rtol=1e-10)


def test_euler_equals_its_closed_form():
    sampler = Sampler(9, solver="euler", dtype=torch.float64)
    sigmas, factor = sampler.sigmas().tolist(), 1.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        factor *= 1 + (sigma_next - sigma) * slope(sigma, 0.3)
    torch.testing.assert_close(sampler(Gaussian(0.7, 0.3), NOISE), 0.7 + factor * (80 * NOISE - 0.7))


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_churn_adds_the_noise_it_states_where_it_states(solver):
    # towards a constant D every step multiplies the distance to D by sigma_next / sigma_hat, in both solvers
    churn = Churn(S_churn=0.8, S_min=0.05, S_max=50, S_noise=1.1)
    sampler = Sampler(4, churn=churn, solver=solver, dtype=torch.float64)
    sigmas, x = sampler.sigmas().tolist(), 80 * NOISE
    for sigma, sigma_next in itertools.pairwise(sigmas):
        raised = sigma * 1.2 if 0.05 <= sigma <= 50 else sigma
        x = x + 1.1 * math.sqrt(raised**2 - sigma**2)
        x = 0.5 + (x - 0.5) * sigma_next / raised
    result = sampler(Constant(0.5), NOISE, randn_like=torch.ones_like)
    torch.testing.assert_close(result, x, atol=1e-10, rtol=1e-10)


def test_churn_per_step_is_capped():
    x, sigma = Churn(S_churn=1e9).raise_noise(NOISE, 0, torch.tensor([2.0, 0.0], dtype=torch.float64), torch.zeros_like)
    assert sigma.item() == pytest.approx(2 * math.sqrt(2))
    assert torch.equal(x, NOISE)


# ---- the seam


def test_heun_costs_two_evaluations_a_step_but_one_in_the_last():
    counting = Counting(Gaussian(0, 1))
    edm_sampler(counting, NOISE)
    assert len(counting.calls) == Sampler().evaluations() == 63
    # what the denoiser is told falls from sigma_max to sigma_min and never reaches 0
    assert counting.calls[0][0] == pytest.approx(80)
    assert counting.calls[-1][0] == pytest.approx(0.002)


def test_euler_costs_one_evaluation_a_step():
    counting = Counting(Gaussian(0, 1))
    Sampler(5, solver="euler")(counting, NOISE)
    assert len(counting.calls) == Sampler(5, solver="euler").evaluations() == 5


@pytest.mark.parametrize(("solver", "calls_of_a_step"), [(heun, 2), (euler, 1)])
def test_a_denoiser_that_follows_the_run_is_told_of_each_step_once(solver, calls_of_a_step):
    following = Following(Gaussian(0, 1))
    solver(following, NOISE, torch.tensor([3.0, 1.0, 0.0]))
    first = [("for_step", 0), *[("call", 0)] * calls_of_a_step, ("after_step", 0)]
    assert following.heard == [*first, ("for_step", 1), ("call", 1), ("after_step", 1)]


class Moving(Gaussian):
    def after_step(self, x, i, sigmas):
        return x + 100 if i == 0 else x


def test_what_after_step_returns_is_where_the_next_step_starts():
    sigmas = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    factor = 1 - slope(1.0, 0.3)
    moved, plain = (heun(kind(0.7, 0.3), NOISE, sigmas) for kind in (Moving, Gaussian))
    torch.testing.assert_close(moved, plain + 100 * factor)


def test_labels_reach_the_denoiser_untouched():
    counting, labels = Counting(Gaussian(0, 1)), torch.eye(3)
    edm_sampler(counting, NOISE, labels, num_steps=2)
    assert all(seen is labels for _, seen in counting.calls)


def test_no_gradients_inside_but_a_denoiser_may_turn_them_on():
    def denoiser(x, sigma, labels):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return x - torch.autograd.grad((x**2).sum() / 2, x)[0]

    assert not edm_sampler(denoiser, NOISE, num_steps=3).requires_grad


def test_the_same_result_whatever_global_generators_hold():
    torch.manual_seed(1)
    first = edm_sampler(Gaussian(0, 1), NOISE, num_steps=3)
    state = torch.get_rng_state()
    assert torch.equal(first, edm_sampler(Gaussian(0, 1), NOISE, num_steps=3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"S_churn": -1}, "S_churn is -1"),
        ({"S_noise": math.nan}, "S_noise is nan"),
        ({"num_steps": 0}, "steps is 0"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        edm_sampler(Gaussian(0, 1), NOISE, **settings)


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'huen' is unknown; expected one of heun, euler"):
        Sampler(solver="huen")
