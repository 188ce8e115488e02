"""Solvers against their papers' equations, written here on their own: in the authors' variables, with their symbols."""

import itertools
import math
from functools import partial

import pytest
import scipy.integrate
import torch

from edm2kit.sampling.multistep import deis, dpmpp2m, dpmpp3m, ipndm
from edm2kit.sampling.noise_levels import Churn, karras_sigmas
from edm2kit.sampling.solvers import euler, heun
from tests.support.fakes import Mixture

GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR, dtype=torch.float64), 0.2)
STEPS = (3, 8, 18)


def levels_of(num_steps):
    return karras_sigmas(num_steps, 0.002, 80, 7, torch.float64)


def D(x, sigma):
    return MIXTURE(x, torch.as_tensor(sigma, dtype=torch.float64))


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


# ---- Karras et al. 2022 (EDM), Algorithms 1 and 2


def edm_algorithm_2(t, x_next, S_churn, S_noise, randn, correct):
    N = len(t) - 1
    gamma = min(S_churn / N, math.sqrt(2) - 1)
    for i in range(N):
        x = x_next
        t_hat = t[i] + gamma * t[i]
        if gamma > 0:
            x = x + (t_hat**2 - t[i] ** 2) ** 0.5 * S_noise * randn(x)
        d = (x - D(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if correct and t[i + 1] != 0:
            d_prime = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x_next


def randn_from(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("S_churn", [0.0, 5.0, 100.0])
@pytest.mark.parametrize(("solver", "correct"), [(euler, False), (heun, True)])
def test_euler_and_heun(solver, correct, S_churn, num_steps):
    sigmas = levels_of(num_steps)
    ours = solver(MIXTURE, NOISE, sigmas, None, randn_from(1), Churn(S_churn=S_churn, S_noise=1.003))
    theirs = edm_algorithm_2(sigmas.tolist(), sigmas[0] * NOISE, S_churn, 1.003, randn_from(1), correct)
    assert_same(ours, theirs)


# ---- Lu et al. 2022 (DPM-Solver++), Algorithm 2, for a variance-preserving x = alpha x0 + sigma noise


class VP:
    """alpha, sigma and lambda = log(alpha / sigma) of a variance-preserving x whose ratio sigma / alpha is `level`."""

    def __init__(self, level):
        self.level = level
        self.alpha, self.sigma = 1 / math.sqrt(1 + level**2), level / math.sqrt(1 + level**2)

    @property
    def lam(self):
        return math.log(self.alpha / self.sigma)

    def x0(self, x):
        return D(x / self.alpha, self.level)


def dpm_solver_pp_2m(levels):
    *times, last = [VP(level) for level in levels]
    x, answers = times[0].alpha * levels[0] * NOISE, []
    for i in range(1, len(times)):
        s, t = times[i - 1], times[i]
        answers.append(s.x0(x))
        h = t.lam - s.lam
        estimate = answers[-1]
        if i > 1:
            r = (s.lam - times[i - 2].lam) / h
            estimate = (1 + 1 / (2 * r)) * answers[-1] - 1 / (2 * r) * answers[-2]
        x = t.sigma / s.sigma * x - t.alpha * (math.exp(-h) - 1) * estimate
    assert last.level == 0
    return times[-1].x0(x)  # the step to no noise is first-order: D itself


@pytest.mark.parametrize("num_steps", STEPS)
def test_dpm_solver_pp_2m(num_steps):
    sigmas = levels_of(num_steps)
    assert_same(dpmpp2m(MIXTURE, NOISE, sigmas), dpm_solver_pp_2m(sigmas.tolist()))


def phi_functions(h):
    """phi_1 to phi_3 of -h (the names that k-diffusion has for them)."""
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / h + 1
    return phi_1, phi_2, phi_2 / h - 0.5


def dpm_solver_pp_3m(levels):
    """The third-order multistep formula of the authors' code, after their first two steps, with alpha = 1."""
    x, answers, widths = levels[0] * NOISE, [], []
    for sigma, following in itertools.pairwise(levels):
        answers.append(D(x, sigma))
        if following == 0:
            return answers[-1]
        h = math.log(sigma / following)
        phi_1, phi_2, phi_3 = phi_functions(h)
        x = math.exp(-h) * x - phi_1 * answers[-1]
        if len(answers) == 2:
            x = x - 0.5 * phi_1 * (answers[-1] - answers[-2]) / (widths[-1] / h)
        elif len(answers) > 2:
            r0, r1 = widths[-1] / h, widths[-2] / h
            D1_0, D1_1 = (answers[-1] - answers[-2]) / r0, (answers[-2] - answers[-3]) / r1
            D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
            D2 = 1 / (r0 + r1) * (D1_0 - D1_1)
            x = x + phi_2 * D1 - phi_3 * D2
        widths.append(h)
    return None


@pytest.mark.parametrize("num_steps", STEPS)
def test_dpm_solver_pp_3m_as_published(num_steps):
    sigmas = levels_of(num_steps)
    assert_same(dpmpp3m(MIXTURE, NOISE, sigmas, curvature=0.5), dpm_solver_pp_3m(sigmas.tolist()))


# ---- polynomials through earlier evaluations, integrated numerically


def lagrange(nodes, k, u):
    product = 1.0
    for j, node in enumerate(nodes):
        if j != k:
            product *= (u - node) / (nodes[k] - node)
    return product


def integrate(function, low, high):
    return scipy.integrate.quad(function, low, high, epsabs=1e-12, epsrel=1e-12)[0]


@pytest.mark.parametrize("num_steps", STEPS)
def test_dpmpp3m_is_the_exact_integral_of_a_parabola_through_three_answers(num_steps):
    # x' = e^-h x + integral of e^-(h - u) D(u) du, u being lambda from the start of the step (Lu et al. 2022)
    levels = levels_of(num_steps).tolist()
    x, answers = levels[0] * NOISE, []
    for i, (sigma, following) in enumerate(itertools.pairwise(levels)):
        answers.insert(0, D(x, sigma))
        if following == 0:
            x = answers[0]
        elif i < 2:  # the first steps are those of dpmpp2m
            h, estimate = math.log(sigma / following), answers[0]
            if i == 1:
                estimate = answers[0] + (answers[0] - answers[1]) / (2 * math.log(levels[0] / sigma) / h)
            x = following / sigma * x + (1 - following / sigma) * estimate
        else:
            h, nodes = math.log(sigma / following), [math.log(sigma / levels[i - k]) for k in range(3)]
            x = following / sigma * x
            for k in range(3):
                weight = integrate(lambda u, k=k, h=h, nodes=nodes: math.exp(u - h) * lagrange(nodes, k, u), 0, h)
                x = x + weight * answers[k]
    assert_same(dpmpp3m(MIXTURE, NOISE, levels_of(num_steps)), x)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("variable", ["sigma", "log-sigma"])
def test_deis_is_the_exact_integral_of_a_polynomial_through_the_slopes(variable, order, num_steps):
    # Zhang & Chen 2022: dx = d dsigma, d interpolated in sigma (tAB) or in its logarithm
    levels = levels_of(num_steps).tolist()
    time = (lambda sigma: sigma) if variable == "sigma" else math.log
    x, slopes = levels[0] * NOISE, []
    for i, (sigma, following) in enumerate(itertools.pairwise(levels)):
        slopes = [(x - D(x, sigma)) / sigma, *slopes][:order]
        if following == 0:
            x = x - sigma * slopes[0]
            continue
        nodes = [time(levels[i - k]) for k in range(len(slopes))]
        for k, slope in enumerate(slopes):
            x = x + slope * integrate(lambda s, k=k, nodes=nodes: lagrange(nodes, k, time(s)), sigma, following)
    assert_same(deis(MIXTURE, NOISE, levels_of(num_steps), order=order, variable=variable), x)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm(order, num_steps):
    # Zhang & Chen 2022: slopes d combined with the weights of equally wide steps
    x, slopes = levels_of(num_steps)[0] * NOISE, []
    for sigma, following in itertools.pairwise(levels_of(num_steps).tolist()):
        slopes = [(x - D(x, sigma)) / sigma, *slopes][:order]
        d = slopes[0]
        if following > 0:
            if len(slopes) == 2:
                d = (3 * slopes[0] - slopes[1]) / 2
            if len(slopes) == 3:
                d = (23 * slopes[0] - 16 * slopes[1] + 5 * slopes[2]) / 12
            if len(slopes) == 4:
                d = (55 * slopes[0] - 59 * slopes[1] + 37 * slopes[2] - 9 * slopes[3]) / 24
        x = x + (following - sigma) * d
    assert_same(partial(ipndm, order=order)(MIXTURE, NOISE, levels_of(num_steps)), x)


def test_another_formula_would_be_found():
    # the tolerance is far below the difference between neighbouring formulas
    sigmas = levels_of(18)
    ends = [
        dpmpp2m(MIXTURE, NOISE, sigmas),
        dpmpp3m(MIXTURE, NOISE, sigmas),
        dpmpp3m(MIXTURE, NOISE, sigmas, curvature=0.5),
    ]
    for one, other in itertools.combinations(ends, 2):
        assert (one - other).abs().max() > 1e-4 * other.abs().max()
