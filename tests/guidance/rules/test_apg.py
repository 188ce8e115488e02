import math

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.combine import Combination, Evaluation, Guided, Negative, linear
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.rules.apg import AdaptiveProjection
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Counting, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR)
POS, NEG = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2), Gaussian(0.2, 0.3)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0])
D, D_NEG = POS(X, SIGMA), NEG(X, SIGMA)
AT = Evaluation(X, SIGMA)


def dot(a, b):
    return (a * b).flatten(1).sum(1)


def test_weight_1_is_off_bitwise_and_calls_no_negative():
    negative = Counting(NEG)
    off = guide(Choice("autoguidance", 1.0, rule="apg"), Parts(POS, negative))
    assert torch.equal(edm_sampler(off, X, num_steps=4), edm_sampler(POS, X, num_steps=4))
    assert negative.calls == []


def test_with_everything_kept_it_is_the_linear_rule():
    plain = AdaptiveProjection(parallel=1.0, norm=math.inf, momentum=0.0)
    torch.testing.assert_close(plain(D, [D_NEG], [2.5], AT), linear(D, [D_NEG], [2.5], AT), atol=1e-5, rtol=1e-5)
    two = ([D_NEG, X], [2.5, 0.5])
    torch.testing.assert_close(plain(D, *two, AT), linear(D, *two, AT), atol=1e-5, rtol=1e-5)


def test_with_nothing_kept_the_change_is_across():
    change = AdaptiveProjection(0.0, math.inf, 0.0)(D, [D_NEG], [3.0], AT) - D
    assert (dot(change, D).abs() < 1e-4 * change.flatten(1).norm(dim=1) * D.flatten(1).norm(dim=1)).all()
    half = AdaptiveProjection(0.5, math.inf, 0.0)(D, [D_NEG], [3.0], AT) - D
    torch.testing.assert_close(dot(half, D), 0.5 * 2 * dot(D - D_NEG, D), atol=1e-4, rtol=1e-4)


def test_long_differences_are_shortened_and_short_ones_not():
    short = AdaptiveProjection(1.0, 1.5, 0.0)
    lengths = (short(D, [D_NEG], [2.0], AT) - D).flatten(1).norm(dim=1)
    expected = (D - D_NEG).flatten(1).norm(dim=1).clamp(max=1.5)
    assert expected.min() < 1.4
    torch.testing.assert_close(lengths, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(short(D, [D], [2.0], AT), D)  # no difference, no direction


def constant_difference(x, sigma, labels=None):
    return POS(x, sigma, labels) - 1


def test_momentum_adds_a_share_of_the_step_before_and_counts_a_step_once():
    # a difference of 1 everywhere: with momentum b the steps see 1, 1 + b, 1 + b (1 + b), ...
    combined = Combination(POS, (Negative(constant_difference, 2.0),), AdaptiveProjection(1.0, math.inf, -0.5))
    seen, sigmas = [], torch.tensor([5.0, 2.0, 1.0, 0.0])
    run = for_images(combined, StackedGenerator("cpu", range(4)))
    for i in range(3):
        step = for_step(run, i, sigmas)
        for sigma in (sigmas[i], sigmas[i + 1] + 0.1):  # predictor and corrector
            change = step(X, sigma) - POS(X, sigma)
            torch.testing.assert_close(change, change.mean().expand_as(change), atol=1e-5, rtol=1e-5)
            seen.append(change.mean().item())
    assert seen == pytest.approx([1, 1, 0.5, 0.5, 0.75, 0.75], abs=1e-5)


@pytest.mark.parametrize("interval", [None, (0.05, 30.0)])
def test_a_run_leaves_nothing_to_the_next(interval):
    guided = guide(Choice("autoguidance", 2.0, interval, rule="apg"), Parts(POS, NEG))
    first = edm_sampler(guided, X, num_steps=6)
    assert torch.equal(edm_sampler(guided, X, num_steps=6), first)
    runs = [for_images(guided, StackedGenerator("cpu", range(4))) for _ in range(2)]
    assert all(torch.equal(edm_sampler(run, X, num_steps=6), first) for run in runs)
    without = guide(Choice("autoguidance", 2.0, interval, {"apg_momentum": 0.0}, rule="apg"), Parts(POS, NEG))
    assert not torch.equal(edm_sampler(without, X, num_steps=6), first)


def test_an_image_does_not_depend_on_its_batch():
    guided = guide(Choice("autoguidance", 2.0, options={"apg_norm": 1.0}, rule="apg"), Parts(POS, NEG))
    whole = edm_sampler(guided, X, num_steps=6)
    for k in range(4):
        torch.testing.assert_close(edm_sampler(guided, X[k : k + 1], num_steps=6), whole[k : k + 1])


def test_by_name_with_the_published_settings():
    guided = guide(Choice("autoguidance", 2.0, (1.0, 3.0), rule="apg"), Parts(POS, NEG))
    assert isinstance(guided, GuidanceInterval)
    rule = guided.guided.rule
    assert (rule.parallel, rule.norm, rule.momentum) == (0.0, 15.0, -0.5)


def test_pinned_value():
    guided = guide(Choice("autoguidance", 3.0, options={"apg_norm": 1.0}, rule="apg"), Parts(POS, NEG))
    x = edm_sampler(guided, X, num_steps=4)
    plain = edm_sampler(Guided(POS, NEG, 3.0), X, num_steps=4)
    assert [x.mean().item(), x[1, 1, 2, 0].item(), plain.mean().item()] == pytest.approx(PINNED, abs=1e-4)


PINNED = [12.195007, -16.421469, 1.936894]
