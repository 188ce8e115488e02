import math

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.registry import RULES, Choice, Parts, guide
from edm2kit.guidance.rules.fbg import Feedback
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import heun
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Counting, Gaussian
from tests.support.rule_spaces import MAIN, NOISE, WEAK

PUBLISHED = {"fbg_prior": 0.999, "fbg_t_reference": 0.556, "fbg_t_evidence": 0.429, "fbg_max_weight": 10.0}
SIGMAS = karras_sigmas(64, 0.002, 80, 7, torch.float64)
RULE = Feedback(0.999, 0.556, 0.429, 10.0)


def rng(n=4):
    return StackedGenerator("cpu", range(n))


def log_density(x, mean, variance):
    normal = torch.distributions.Normal(mean, variance.sqrt())
    return normal.log_prob(x).flatten(1).sum(1)


@pytest.mark.parametrize("weak", [WEAK, Gaussian(-0.1, 0.4)])
def test_the_authors_sampler(weak):
    # their algorithm in their own (EDM) variables, with densities instead of differences of squares
    prior, t0, t1, highest, num_steps = 0.999, 0.556, 0.429, 10.0, len(SIGMAS) - 1
    delta = math.log((1 - prior) * 3 / (3 - 1)) / ((1 - t0) * num_steps)
    i1 = round((1 - t1) * num_steps)
    tau = abs(2 * (SIGMAS[i1] ** 2 - SIGMAS[i1 + 1] ** 2) * (SIGMAS[i1 + 1] / SIGMAS[i1]) ** 2 * delta / 10)
    lowest = math.log((1 - prior) * highest / (highest - 1))
    generator = torch.Generator().manual_seed(3)
    guided = for_images(guide(Choice("autoguidance", 2.0, rule="fbg"), Parts(MAIN, weak)), rng())
    x, L, weights = SIGMAS[0] * NOISE, torch.zeros(4, dtype=torch.float64), []
    for i in range(num_steps):
        sigma, sigma_next = SIGMAS[i], SIGMAS[i + 1]
        D, D_neg = MAIN(x, sigma), weak(x, sigma)
        weight = (L.exp() / (L.exp() - (1 - prior))).clamp(max=highest)
        weights.append(weight)
        D_guided = D_neg + weight.reshape(-1, 1, 1, 1) * (D - D_neg)
        ours = for_step(guided, i, SIGMAS)(x, sigma)
        assert (ours - D_guided).abs().max() < 1e-6 * (D_guided - x).abs().max()
        if sigma_next == 0:
            break
        r = (sigma_next / sigma) ** 2
        variance = (sigma**2 - sigma_next**2) * r
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x_next = r * x + (1 - r) * D_guided + variance.sqrt() * noise
        p = [log_density(x_next, r * x + (1 - r) * y, variance) for y in (D, D_neg)]
        L = (L + tau * (p[0] - p[1]) + delta).clamp(lowest, 3)
        x = x_next
    assert weights[0].tolist() == pytest.approx([1 / prior] * 4)
    assert max(w.max() for w in weights) > 2  # the feedback did something
    assert max(w.max() - w.min() for w in weights) > 1e-3  # and images differ


def test_without_evidence_the_weight_is_3_at_the_reference_time():
    # equal predictions: L falls by the same amount in every step
    sigmas = karras_sigmas(1000, 0.002, 80, 7, torch.float64)
    offset, _ = RULE.constants(sigmas)
    L = torch.tensor(offset * (1 - 0.556) * 1000)
    assert RULE.weight_of(L).item() == pytest.approx(3.0, rel=1e-5)


def test_weights_in_closed_form():
    L = torch.tensor([0.0, math.log(0.002), math.log(0.001), -50.0, 3.0], dtype=torch.float64)
    assert RULE.weight_of(L).tolist() == pytest.approx([1 / 0.999, 2.0, 10.0, 10.0, 1 / (1 - 0.001 / math.exp(3))])
    assert RULE.evidence_of(2.0) == pytest.approx(math.log(0.002))


def test_the_corrector_has_the_weight_of_its_step_and_costs_are_those_of_the_pair():
    negative, positive = Counting(WEAK), Counting(MAIN)
    guided = for_images(guide(Choice("autoguidance", 2.0, rule="fbg"), Parts(positive, negative)), rng())
    heun(guided, NOISE, SIGMAS[::8])
    assert len(negative.calls) == len(positive.calls) == 2 * (len(SIGMAS[::8]) - 1) - 1
    step = for_step(for_images(guide(Choice("autoguidance", 2.0, rule="fbg"), Parts(MAIN, WEAK)), rng()), 0, SIGMAS)
    first = step(80 * NOISE, SIGMAS[0])
    assert torch.equal(step(80 * NOISE, SIGMAS[0]), first)


def test_a_run_leaves_nothing_to_the_next_and_images_do_not_depend_on_their_batch():
    guided = guide(Choice("autoguidance", 2.0, rule="fbg"), Parts(MAIN, WEAK))
    first = heun(guided, NOISE, SIGMAS[::4])
    assert torch.equal(heun(guided, NOISE, SIGMAS[::4]), first)
    assert torch.equal(heun(for_images(guided, rng()), NOISE, SIGMAS[::4]), first)
    for k in range(4):
        torch.testing.assert_close(heun(guided, NOISE[k : k + 1], SIGMAS[::4]), first[k : k + 1])


def test_where_churn_sets_in_the_noise_level_does_not_fall_and_tells_nothing():
    # below S_max churn lifts a level above the one of the step before: the variance of a step would be negative
    guided = for_images(guide(Choice("autoguidance", 2.0, rule="fbg"), Parts(MAIN, WEAK)), rng())
    offset, _ = RULE.constants(SIGMAS)
    evidence = []
    for i, raised in ((30, 1.0), (31, 1.0), (32, 1.4), (33, 1.4)):
        sigma = raised * SIGMAS[i]
        step = for_step(guided, i, SIGMAS)
        step(MAIN.means[[0, 1, 2, 0]] + sigma * NOISE, sigma)
        evidence.append(guided.rule.path.evidence[0].flatten())
    changes = torch.stack(evidence).diff(dim=0) - offset
    assert (changes[0].abs() > 1e-9).all()
    assert changes[1].tolist() == pytest.approx([0] * 4, abs=1e-12)
    assert (changes[2].abs() > 1e-9).all()


def test_outside_a_run_there_is_no_evidence():
    guided = guide(Choice("autoguidance", 2.0, rule="fbg"), Parts(MAIN, WEAK))
    x, sigma = NOISE, SIGMAS[30]
    D, D_neg = MAIN(x, sigma), WEAK(x, sigma)
    torch.testing.assert_close(guided(x, sigma), D_neg + (D - D_neg) / 0.999)


def test_defaults_are_published_and_wrong_settings_are_refused():
    assert {option.keyword: option.default for option in RULES["fbg"].options} == PUBLISHED
    for option, text in zip(RULES["fbg"].options, ("1", "1", "1.1", "1"), strict=True):
        with pytest.raises(ValueError, match="is not a number from"):
            option.parse(text)
