import math

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.combine import Combination, Evaluation, Guided, Negative, linear
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.rules.apg import PUBLISHED, AdaptiveProjection
from edm2kit.sampling.restart import Restart, restart
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


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        # a difference of 1 everywhere: with momentum b the updates see 1, 1 + b, 1 + b (1 + b), ...
        ("evaluation", [1, 0.5, 0.75, 0.625, 0.6875, 0.65625]),
        ("step", [1, 1, 0.5, 0.5, 0.75, 0.75]),
    ],
)
def test_momentum_adds_a_share_of_the_update_before(update, expected):
    rule = AdaptiveProjection(1.0, math.inf, -0.5, update)
    combined = Combination(POS, (Negative(constant_difference, 2.0),), rule)
    seen, sigmas = [], torch.tensor([5.0, 2.0, 1.0, 0.0])
    run = for_images(combined, StackedGenerator("cpu", range(4)))
    for i in range(3):
        step = for_step(run, i, sigmas)
        for sigma in (sigmas[i], sigmas[i + 1] + 0.1):  # predictor and corrector
            change = step(X, sigma) - POS(X, sigma)
            torch.testing.assert_close(change, change.mean().expand_as(change), atol=1e-5, rtol=1e-5)
            seen.append(change.mean().item())
    assert seen == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 6])
def test_momentum_begins_again_where_noise_was_added_and_goes_on_after_it(levels):
    # whatever the number of the step: a restart has numbers of its own for the steps of its interval
    changes, ends = [], []

    class Noted:
        def __init__(self, inner, end=None):
            self.inner, self.start = inner, end

        def __call__(self, x, sigma, labels=None):
            D = self.inner(x, sigma, labels)
            changes.append((self.start, float(sigma), (D - POS(x, sigma)).flatten()[0].item()))
            return D

        def for_step(self, i, sigmas):
            ends.append(float(sigmas[i + 1]))
            return Noted(for_step(self.inner, i, sigmas), float(sigmas[i]))

    rule = AdaptiveProjection(1.0, math.inf, -0.5)
    run = for_images(Combination(POS, (Negative(constant_difference, 2.0),), rule), StackedGenerator("cpu", range(4)))
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.0])
    restart(Noted(run), X, sigmas, settings=Restart(((levels, 1, 0.5, 3.0),)))
    expected, last, end = [], 0.0, None
    for start, sigma, _ in changes:
        if sigma == start and start != end:
            last = 0.0  # the step does not begin where the one before ended
        if sigma == start:
            end = ends.pop(0)
        last = 1 - 0.5 * last
        expected.append(last)
    assert [change for *_, change in changes] == pytest.approx(expected, abs=1e-4)
    assert expected.count(1.0) == 2  # at the start of the run and of the restart


def test_outside_a_run_there_is_no_momentum():
    combined = Combination(POS, (Negative(NEG, 2.0),), AdaptiveProjection(0.0, 2.5, -0.75))
    assert torch.equal(combined(X, SIGMA), combined(X, SIGMA))


class MomentumBuffer:
    """The authors' running average; it lives as long as the sampling run."""

    def __init__(self, momentum):
        self.momentum, self.running_average = momentum, 0

    def update(self, value):
        self.running_average = value + self.momentum * self.running_average
        return self.running_average


def apg_as_published(pred_cond, pred_uncond, guidance_scale, buffer, eta, norm_threshold):
    diff = buffer.update(pred_cond - pred_uncond)
    norm = diff.norm(p=2, dim=[-1, -2, -3], keepdim=True)
    diff = diff * torch.minimum(torch.ones_like(diff), norm_threshold / norm)
    v1 = pred_cond / pred_cond.norm(p=2, dim=[-1, -2, -3], keepdim=True)
    parallel = (diff * v1).sum(dim=[-1, -2, -3], keepdim=True) * v1
    return pred_cond + (guidance_scale - 1) * (diff - parallel + eta * parallel)


@pytest.mark.parametrize("settings", PUBLISHED.values(), ids=PUBLISHED)
def test_a_run_is_that_of_the_authors(settings):
    # their update at both evaluations of a Heun step, in the denoised image; every step starts where theirs does
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn([4, 2, 3, 3], generator=generator, dtype=torch.float64)
    levels = torch.tensor([80.0, 20.0, 3.0, 0.7, 0.1, 0.0], dtype=torch.float64)
    options = {"apg_parallel": settings.parallel, "apg_norm": settings.norm, "apg_momentum": settings.momentum}
    guided = guide(Choice("autoguidance", settings.weight, options=options, rule="apg"), Parts(POS, NEG))
    run = for_images(guided, StackedGenerator("cpu", range(4)))
    buffer, x = MomentumBuffer(settings.momentum), noise * levels[0]
    for i in range(5):
        sigma, sigma_next = levels[i], levels[i + 1]

        def theirs(x, sigma):
            images = POS(x, sigma), NEG(x, sigma)
            return apg_as_published(*images, settings.weight, buffer, settings.parallel, settings.norm)

        ours = for_step(run, i, levels)
        ends = []
        for denoiser in (theirs, ours):
            d = (x - denoiser(x, sigma)) / sigma
            end = x + (sigma_next - sigma) * d
            if sigma_next > 0:
                end = x + (sigma_next - sigma) * (d + (end - denoiser(end, sigma_next)) / sigma_next) / 2
            ends.append(end - x)
        size = ends[0].abs().max()
        torch.testing.assert_close(ends[1] / size, ends[0] / size, atol=1e-6, rtol=0)
        x = x + ends[0]
    assert torch.equal(edm_sampler(run, noise, num_steps=4), edm_sampler(guided, noise, num_steps=4))


def test_updates_once_a_step_lead_elsewhere():
    ends = []
    for update in ("evaluation", "step"):
        choice = Choice("autoguidance", 4.0, options={"apg_update": update}, rule="apg")
        ends.append(edm_sampler(guide(choice, Parts(POS, NEG)), X, num_steps=8))
    assert (ends[0] - ends[1]).abs().max() > 0.1


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
    assert (rule.parallel, rule.norm, rule.momentum, rule.update) == (0.0, 2.5, -0.75, "evaluation")
    assert PUBLISHED["EDM2-S"] == (4.0, 0.0, 2.5, -0.75)


def test_pinned_value():
    options = {"apg_norm": 1.0, "apg_momentum": -0.5, "apg_update": "step"}
    guided = guide(Choice("autoguidance", 3.0, options=options, rule="apg"), Parts(POS, NEG))
    x = edm_sampler(guided, X, num_steps=4)
    plain = edm_sampler(Guided(POS, NEG, 3.0), X, num_steps=4)
    assert [x.mean().item(), x[1, 1, 2, 0].item(), plain.mean().item()] == pytest.approx(PINNED, abs=1e-4)


PINNED = [12.195007, -16.421469, 1.936894]
