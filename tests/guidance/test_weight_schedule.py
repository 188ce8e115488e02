import dataclasses
import itertools
import math

import pytest
import torch

from edm2kit.denoiser import after_step, for_images, for_step
from edm2kit.guidance.combine import Combination, Guided, Negative
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.registry import METHODS, RULES, Choice, Parts, guide
from edm2kit.guidance.reuse import NO_REUSE, Reuse
from edm2kit.guidance.weight_schedule import (
    SCHEDULES,
    SHAPES,
    VP_TIME_SHAPES,
    CFGPlusPlus,
    WeightSchedule,
    level_of,
    vp_time,
)
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import edm_sampler, euler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Counting, Following, Gaussian
from tests.support.rule_spaces import MAIN, NOISE, WEAK, NoiseSpace, Point

X = torch.randn([3, 1, 2, 2], generator=torch.Generator().manual_seed(0))
POS, NEG = Gaussian(0.2, 0.25), Gaussian(-0.3, 0.25)
GUIDED = Guided(POS, NEG, 2.1)
SIGMAS = karras_sigmas(32, 0.002, 80, 7, torch.float64)


@pytest.mark.parametrize("guided", [GUIDED, Combination(POS, (Negative(NEG, 2.1), Negative(Gaussian(0.0, 0.5), 1.5)))])
def test_the_constant_schedule_is_none_bitwise(guided):
    scheduled = WeightSchedule(guided, SHAPES["constant"])
    assert torch.equal(edm_sampler(scheduled, X), edm_sampler(guided, X))


def test_no_weight_is_off_bitwise_and_calls_no_negative():
    negative = Counting(NEG)
    off = WeightSchedule(Guided(POS, negative, 2.1), lambda u: 0.0)
    assert torch.equal(edm_sampler(off, X), edm_sampler(POS, X))
    assert negative.calls == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_1_is_off_bitwise_with_every_rule_and_calls_no_negative(schedule):
    negative, plain = Counting(NEG), edm_sampler(POS, X, num_steps=4)
    for rule, reuse in itertools.product(RULES, (NO_REUSE, Reuse(every=2, stop=0.9, once=True))):
        choice = Choice("autoguidance", 1.0, rule=rule, schedule=schedule, reuse=reuse)
        off = for_images(guide(choice, Parts(POS, negative)), StackedGenerator("cpu", range(3)))
        assert torch.equal(edm_sampler(off, X, num_steps=4), plain), rule
    assert negative.calls == []


def test_a_window_is_an_interval():
    window = WeightSchedule(GUIDED, lambda u: float(level_of(0.28304, SIGMAS) + 1e-5 < u <= level_of(2.91, SIGMAS)))
    gated = GuidanceInterval(GUIDED, POS, 0.28, 2.90)
    assert torch.equal(edm_sampler(window, X), edm_sampler(gated, X))


def share_at(name, sigma, sigmas):
    time = vp_time(sigma) if SHAPES[name] in VP_TIME_SHAPES else level_of(sigma, sigmas)
    return SHAPES[name](time)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "constant"])
def test_c2_with_the_weight_of_each_step(name):
    # specs section 12: the shifts of the steps add up
    v, m1, m0, w, T = 0.25, 0.2, -0.3, 2.1, 80.0
    sigmas = karras_sigmas(256, 0.002, T, 7, torch.float64)
    levels = sigmas.tolist()
    shift = sum(
        (w - 1) * share_at(name, a, sigmas) * (math.sqrt(v / (v + b**2)) - math.sqrt(v / (v + a**2)))
        for a, b in itertools.pairwise(levels)
    )
    start = torch.full([1, 1, 1, 1], m1 / T, dtype=torch.float64)
    x = edm_sampler(WeightSchedule(GUIDED, SHAPES[name]), start, num_steps=256, dtype=torch.float64)
    assert x.item() - m1 == pytest.approx((m1 - m0) * shift, rel=2e-4)


def test_levels_run_from_0_to_1_in_logarithms():
    sigmas = torch.tensor([100.0, 1.0, 0.01, 0.0])
    assert [level_of(sigma, sigmas) for sigma in (100.0, 1.0, 0.01, 500.0)] == pytest.approx([1, 0.5, 0, 1], abs=1e-6)
    assert level_of(1.0, torch.tensor([1.0, 0.0])) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("increasing", [0, 0.5, 1]),
        ("decreasing", [1, 0.5, 0]),
        ("cosine", [1, 0.5, 0]),
        ("bump", [0, 1, 0]),
        ("clamped", [1, 0.5, 0.25]),
        ("c2fg", [2, math.sqrt(2), 1]),
        ("triangle", [0, 1, 0]),
        ("beta-density", [0, 1.5, 0]),
    ],
)
def test_shapes(name, values):
    assert [SHAPES[name](u) for u in (0.0, 0.5, 1.0)] == pytest.approx(values, abs=1e-12)


def test_one_weight_per_step_and_the_parts_follow_the_run():
    parts = [Following(POS), Following(NEG)]
    scheduled = WeightSchedule(Guided(*parts, 2.0), lambda u: u)  # nothing at the lowest noise level
    edm_sampler(scheduled.for_images(StackedGenerator("cpu", range(3))), X, num_steps=2)
    first = [("for_images", 3), ("for_step", 0), ("call", 0), ("call", 0), ("after_step", 0)]
    assert [part.heard for part in parts] == [[*first, ("for_step", 1), ("call", 1), ("after_step", 1)], first]


def test_by_name_and_only_in_a_run():
    scheduled = guide(Choice("autoguidance", 2.0, schedule="cosine"), Parts(POS, NEG))
    assert scheduled == WeightSchedule(Guided(POS, NEG, 2.0), SHAPES["cosine"])
    with pytest.raises(ValueError, match="whole steps"):
        scheduled(X, torch.tensor(1.0))


@pytest.mark.parametrize("rule", ["score", "dps", "tfg"])
def test_a_loss_follows_the_noise_level_too(rule):
    # "increasing" in a run of two steps: the whole strength in the first, none in the last
    options = {option.keyword: option.default for option in METHODS["loss"].options}
    options |= {"loss_kind": "colour", "loss_colour": (0.5, 0.5, 0.5), "loss_rule": rule}
    x, sigmas = torch.randn([2, 3, 8, 8], generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 0.5, 0.0])

    def step(i, schedule):
        guided = guide(Choice("loss", 2.0, options=options, schedule=schedule), Parts(POS))
        denoiser = for_step(for_images(guided, StackedGenerator("cpu", range(2))), i, sigmas)
        return after_step(denoiser, denoiser(x, sigmas[i]), i, sigmas)

    assert torch.equal(step(0, "increasing"), step(0, "constant"))
    assert torch.equal(step(1, "increasing"), POS(x, sigmas[1]))
    assert (step(1, "constant") - POS(x, sigmas[1])).abs().max() > 1e-4


def test_methods_that_go_around_others_are_scheduled_with_them():
    options = {option.keyword: option.default for option in METHODS["loss"].options}
    options |= {"loss_kind": "colour", "loss_colour": (0.5, 0.5, 0.5), "loss_rule": "score"}
    choice = Choice("autoguidance", 2.0, options=options, also=(("loss", 2.0),), schedule="increasing")
    x, sigmas = torch.randn([2, 3, 8, 8], generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 0.5, 0.0])
    assert torch.equal(for_step(guide(choice, Parts(POS, NEG)), 1, sigmas)(x, sigmas[1]), POS(x, sigmas[1]))


# ---- in the authors' variables, at five noise levels

LEVELS = torch.tensor([60.0, 5.0, 1.0, 0.3, 0.02, 0.0], dtype=torch.float64)


def ddpm_scales(t):
    """a and s of z = a y + s e at time t, with the integral of beta from 0.1 to 20 summed up numerically."""
    times = torch.linspace(0, t, 100_001, dtype=torch.float64)
    a = math.exp(-torch.trapezoid(0.1 + 19.9 * times, times).item() / 2)
    return a, math.sqrt(1 - a**2)


@pytest.mark.parametrize("sigma", LEVELS[:-1].tolist())
def test_the_time_of_a_ddpm(sigma):
    a, s = ddpm_scales(vp_time(sigma))
    assert s / a == pytest.approx(sigma, rel=1e-6)
    assert vp_time(1e4) == 1


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("c2fg", lambda t: math.exp(math.log(2) * (1 - t))),
        ("triangle", lambda t: 2 * min(t, 1 - t)),
        ("beta-density", lambda t: t * (1 - t) / (math.gamma(2) ** 2 / math.gamma(4))),
    ],
)
def test_the_authors_step_in_noise_predictions(name, formula):
    space, omega = NoiseSpace(), 1.5
    scheduled = guide(Choice("autoguidance", 1 + omega, schedule=name), Parts(MAIN, WEAK))
    for i, sigma in enumerate(LEVELS[:-1].tolist()):
        point = Point(sigma)
        e, e_neg = space.prediction(point.D, point), space.prediction(point.D_neg, point)
        theirs = space.step(e + omega * formula(vp_time(sigma)) * (e - e_neg), point)
        ours = point.our_step(for_step(scheduled, i, LEVELS)(point.x, LEVELS[i]))
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("method", ["autoguidance", "truncation"])
@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_cfg_plus_plus_is_the_authors_sampler(method, strength):
    z, a, s = NOISE, *NoiseSpace.scales(60.0)
    x = LEVELS[0] * NOISE
    negative = WEAK if method == "autoguidance" else lambda x, sigma: x
    z = a * x
    for sigma, sigma_next in itertools.pairwise(LEVELS.tolist()):
        level = torch.tensor(sigma, dtype=torch.float64)
        e, e_neg = ((z - a * denoise(z / a, level)) / s for denoise in (MAIN, negative))
        y = (z - s * (e_neg + strength * (e - e_neg))) / a
        a, s = NoiseSpace.scales(sigma_next)
        z = a * y + s * e_neg  # the negative's noise is put back
    parts = Parts(MAIN, WEAK if method == "autoguidance" else None)
    guided = guide(Choice(method, 1 + strength, schedule="cfg-plus-plus"), parts)
    torch.testing.assert_close(euler(guided, NOISE, LEVELS), z, rtol=1e-6, atol=1e-6)


# ---- CFG++


def test_cfg_plus_plus_weights_in_closed_form():
    # halving the noise level: lambda sigma / (sigma - sigma / 2) = 2 lambda; the last step has lambda itself
    sigmas = torch.tensor([4.0, 2.0, 0.0])
    for guided in (Guided(POS, NEG, 1.6), Combination(POS, (Negative(NEG, 1.6),))):
        steps = [CFGPlusPlus(guided).for_step(i, sigmas) for i in range(2)]
        weights = [getattr(step, "weight", None) or step.negatives[0].weight for step in steps]
        assert weights == pytest.approx([1.2, 0.6])


def test_cfg_plus_plus_at_weight_1_is_off_bitwise_and_calls_no_negative():
    negative = Counting(NEG)
    off = guide(Choice("autoguidance", 1.0, schedule="cfg-plus-plus"), Parts(POS, negative))
    assert torch.equal(edm_sampler(off, X), edm_sampler(POS, X))
    assert negative.calls == []


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [
        (Choice("autoguidance", 7.5), "takes weights 1 \\+ lambda from 1 \\(off\\) to 2, and the weight is 7.5"),
        (Choice("autoguidance", 0.6), "and the weight is 0.6; 1.6 is the published one"),
        (Choice("autoguidance", 1.6, also=(("truncation", 1.2),)), "puts the noise of one negative back, .* has 2"),
        (Choice("loss", 2.0, options={"loss_kind": "colour", "loss_colour": (0.4, 0.0, -0.3)}), "has 0"),
    ],
)
def test_cfg_plus_plus_refuses_before_any_work(choice, wrong):
    net, gnet = Counting(POS), Counting(NEG)
    takes_guide = choice.method == "autoguidance"
    with pytest.raises(ValueError, match=wrong):
        guide(dataclasses.replace(choice, schedule="cfg-plus-plus"), Parts(net, gnet if takes_guide else None))
    assert net.calls == gnet.calls == []


def test_schedules_by_name_are_all_shapes_and_cfg_plus_plus():
    assert (*SHAPES, "cfg-plus-plus") == SCHEDULES
    with pytest.raises(ValueError, match="whole steps"):
        guide(Choice("autoguidance", 1.6, schedule="cfg-plus-plus"), Parts(POS, NEG))(X, torch.tensor(1.0))
