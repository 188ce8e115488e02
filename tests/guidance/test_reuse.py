"""Guidance that is evaluated less often: exact costs, and what is guided by what."""

import dataclasses
import itertools

import pytest
import torch

from edm2kit.denoiser import for_images
from edm2kit.guidance import Choice, Parts, guide
from edm2kit.guidance.combine import Combination, Negative
from edm2kit.guidance.reuse import NO_REUSE, Reuse, Reusing
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.restart import Restart, restart
from edm2kit.sampling.solvers import TimeTravel, euler, heun, time_travel
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
MAIN = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
GUIDE = Mixture(MAIN.means, 0.6)
SIGMAS = karras_sigmas(12, 0.002, 80, 7, torch.float64)


def start(denoiser, count=4):
    return for_images(denoiser, StackedGenerator("cpu", range(count)))


def reusing(reuse, main=MAIN, neg=GUIDE, weight=2.0, **settings):
    return guide(Choice("autoguidance", weight, reuse=reuse, **settings), Parts(main, neg))


def run(reuse, solver=heun, sigmas=SIGMAS, **settings):
    """(x0, evaluations of the main network, of the guide by noise level)."""
    main, neg = Counting(MAIN), Counting(GUIDE)
    x = solver(start(reusing(reuse, main, neg, **settings)), NOISE, sigmas)
    return x, len(main.calls), [sigma for sigma, _ in neg.calls]


# ---- off is off, bit for bit


@pytest.mark.parametrize("solver", [heun, euler])
@pytest.mark.parametrize("rule", ["linear", "apg", "rescale"])
def test_with_the_default_it_is_a_combination_bitwise(solver, rule):
    expected = solver(start(guide(Choice("autoguidance", 2.0, rule=rule), Parts(MAIN, GUIDE))), NOISE, SIGMAS)
    # guide() leaves reuse out if it is off; the wrapper itself must not differ either
    always = reusing(Reuse(every=2), rule=rule)
    always = dataclasses.replace(always, reuse=NO_REUSE)
    assert torch.equal(solver(start(always), NOISE, SIGMAS), expected)
    assert torch.equal(solver(start(reusing(Reuse(every=1), rule=rule)), NOISE, SIGMAS), expected)


def test_at_weight_1_the_guide_is_not_evaluated():
    x, main, neg = run(Reuse(every=2, stop=0.9, once=True), weight=1.0)
    assert torch.equal(x, heun(MAIN, NOISE, SIGMAS))
    assert (main, neg) == (23, [])


def test_without_reuse_there_is_no_wrapper():
    assert not isinstance(reusing(NO_REUSE), Reusing)


# ---- costs


@pytest.mark.parametrize("every", [1, 2, 3, 5, 12, 50])
def test_the_guide_is_evaluated_in_every_kth_step(every):
    levels = SIGMAS.tolist()
    steps = range(0, 12, every)
    _, main, neg = run(Reuse(every=every), euler)
    assert (main, neg) == (12, [levels[i] for i in steps])
    _, main, neg = run(Reuse(every=every))
    expected = [level for i in steps for level in levels[i : i + 2] if level > 0]
    assert (main, neg) == (23, expected)
    _, main, neg = run(Reuse(every=every, once=True))
    assert (main, neg) == (23, [levels[i] for i in steps])


def test_in_an_interval_the_first_guided_step_is_evaluated():
    levels = SIGMAS.tolist()
    _, _, neg = run(Reuse(every=3), euler, interval=(levels[10], levels[3]))
    assert neg == [levels[3], levels[6], levels[9]]


def test_repeated_steps_count_as_steps():
    levels, travel = SIGMAS.tolist(), TimeTravel(3, levels_lo := SIGMAS[3].item() - 1e-9, SIGMAS[2].item())
    assert levels_lo < levels[3]

    def solver(denoiser, noise, sigmas):
        return time_travel(denoiser, noise, sigmas, None, torch.zeros_like, travel=travel)

    visits = [0, 1, 2, 2, 2, 3, 3, 3, *range(4, 12)]
    assert run(Reuse(every=2), solver)[2] == [levels[i] for i in visits[::2]]
    assert run(Reuse(every=1, once=True), solver)[2] == [levels[i] for i in visits]


@pytest.mark.parametrize(
    ("every", "evaluated"),
    [
        (1, [80, 47.8, 27.4, 15.0, 7.75, 3.74, 1.65, 2.0, 1.17, 2.0, 1.17, 0.658, 0.227, 0.065, 0.0141, 0.002]),
        (2, [80, 27.4, 7.75, 1.65, 2.0, 2.0, 0.658, 0.065, 0.002]),  # at 2.0 that of 1.65 would do, but for its level
        (4, [80, 7.75, 1.17, 2.0, 0.065]),  # the first restart uses that of 7.75
    ],
)
def test_a_difference_does_not_serve_a_restart_at_a_higher_noise_level(every, evaluated):
    def solver(denoiser, noise, sigmas):
        settings = Restart(((3, 2, 0.5, 2.0),))
        return restart(denoiser, noise, sigmas, None, torch.zeros_like, settings=settings)

    _, main, neg = run(Reuse(every=every, once=True), solver)
    assert main == 23 + 2 * 4
    assert neg == pytest.approx(evaluated, rel=5e-3)


def test_a_second_run_starts_afresh():
    main, neg = Counting(MAIN), Counting(GUIDE)
    denoiser = reusing(Reuse(every=50, once=True), main, neg)
    first = heun(start(denoiser), NOISE, SIGMAS)
    assert torch.equal(first, heun(start(denoiser), NOISE, SIGMAS))
    assert len(neg.calls) == 2


# ---- what is reused


def test_between_evaluations_the_last_difference_is_added():
    main, neg = Gaussian(0.5, 1.0), Gaussian(0.0, 2.0)
    x = expected = NOISE * SIGMAS[0]
    for i, (sigma, following) in enumerate(itertools.pairwise(SIGMAS)):
        D = main(expected, sigma)
        if i % 3 == 0:
            difference = D - neg(expected, sigma)
        D = D + (2.5 - 1) * difference
        expected = expected + (following - sigma) * (expected - D) / sigma
    x = euler(start(reusing(Reuse(every=3), main, neg, 2.5)), NOISE, SIGMAS)
    torch.testing.assert_close(x, expected)


def test_the_corrector_uses_the_difference_of_the_predictor():
    main, neg = Gaussian(0.5, 1.0), Gaussian(0.0, 2.0)
    sigma, following = torch.tensor(3.0).double(), torch.tensor(1.0).double()
    x = NOISE * 3
    difference = main(x, sigma) - neg(x, sigma)
    d = (x - main(x, sigma) - difference) / sigma
    predicted = x + (following - sigma) * d
    d_next = (predicted - main(predicted, following) - difference) / following
    ends = []

    class Trace(Gaussian):
        def after_step(self, x, i, sigmas):
            ends.append(x)
            return x

    heun(start(reusing(Reuse(once=True), Trace(0.5, 1.0), neg)), NOISE, torch.tensor([3.0, 1.0, 0.0]).double())
    torch.testing.assert_close(ends[0], x + (following - sigma) * (d + d_next) / 2)


def test_a_schedule_acts_on_reused_differences_too():
    weights = []

    def noting(D, negatives, weights_now, at):
        weights.append(weights_now[0])
        return D

    denoiser = Reusing(MAIN, (Negative(GUIDE, 3.0),), noting, reuse=Reuse(every=4))
    for share in (1.0, 0.5, 0.25):
        start(denoiser).scaled(share).for_step(0, SIGMAS)(NOISE, SIGMAS[0])
    assert weights == [3.0, 2.0, 1.5]


@pytest.mark.parametrize("reuse", [Reuse(once=True), Reuse(every=2)])
def test_with_more_steps_the_guided_run_is_approached(reuse):
    off = []
    for num_steps in (32, 128):
        sigmas = karras_sigmas(num_steps, 0.002, 80, 7, torch.float64)
        off.append((run(reuse, sigmas=sigmas)[0] - run(NO_REUSE, sigmas=sigmas)[0]).norm())
    assert off[1] < 0.4 * off[0]


# ---- stopping


def cosines(x, sigma):
    return torch.nn.functional.cosine_similarity(MAIN(x, sigma).flatten(1), GUIDE(x, sigma).flatten(1))


def test_an_image_is_not_guided_after_the_step_in_which_the_cosine_rises_above_tau():
    x, stopped, tau = NOISE * SIGMAS[0], torch.zeros(4, dtype=torch.bool), 0.99
    below = stopped
    evaluations, when = 0, []
    for sigma, following in itertools.pairwise(SIGMAS):
        D, D_neg = MAIN(x, sigma), GUIDE(x, sigma)
        guided = torch.where(stopped.reshape(-1, 1, 1, 1), D, D_neg + 2 * (D - D_neg))
        evaluations += not bool(stopped.all())
        when.append(int(stopped.sum()))
        above = cosines(x, sigma) > tau
        stopped = stopped | (above & below)
        below = below | ~above
        x = x + (following - sigma) * (x - guided) / sigma
    made, main, neg = run(Reuse(stop=tau), euler)
    torch.testing.assert_close(made, x)
    assert (main, len(neg)) == (12, evaluations)
    assert 0 < evaluations < 12  # the setting is one in which something stops
    assert len(set(when)) > 2  # and images stop at different times


CLOSE, APART = SIGMAS[3], SIGMAS[6]  # noise levels with cosines above .99 and below


def after_passing(denoiser, x=NOISE):
    """A denoiser in the step that follows one with a low cosine and one with a high cosine."""
    denoiser = start(denoiser)
    denoiser.for_step(0, SIGMAS)(x * APART, APART)
    denoiser.for_step(1, SIGMAS)(x * CLOSE, CLOSE)
    return denoiser.for_step(2, SIGMAS)


def test_an_image_that_has_stopped_is_the_main_network_alone_bitwise():
    stopped = after_passing(Reusing(MAIN, (Negative(GUIDE, 2.0),), reuse=Reuse(stop=0.995)))
    assert bool(stopped.stopped.all())
    assert torch.equal(stopped(NOISE, APART), MAIN(NOISE, APART))


def test_a_high_cosine_at_the_beginning_does_not_stop_guidance():
    denoiser = start(Reusing(MAIN, (Negative(GUIDE, 2.0),), reuse=Reuse(stop=0.99)))
    denoiser.for_step(0, SIGMAS)(NOISE * CLOSE, CLOSE)
    denoiser.for_step(1, SIGMAS)(NOISE * CLOSE, CLOSE)
    assert not bool(denoiser.for_step(2, SIGMAS).stopped.any())


def test_one_that_never_passes_is_guided_throughout_bitwise():
    exact, _, _ = run(NO_REUSE)
    made, _, neg = run(Reuse(stop=1.0))
    assert torch.equal(made, exact)
    assert len(neg) == 23


def test_both_evaluations_of_a_step_are_guided_alike():
    neg = Counting(GUIDE)
    heun(start(reusing(Reuse(stop=0.99), neg=neg), 1), NOISE[:1], SIGMAS)
    assert len(neg.calls) % 2 == 0
    assert 0 < len(neg.calls) < 23


def test_with_several_negatives_the_least_similar_one_decides():
    far = Constant(-5.0)
    for negatives, stops in (((GUIDE, GUIDE), True), ((GUIDE, far), False)):
        pairs = tuple(Negative(negative, 2.0) for negative in negatives)
        assert bool(after_passing(Reusing(MAIN, pairs, reuse=Reuse(stop=0.995))).stopped.all()) == stops


@pytest.mark.parametrize("reuse", [Reuse(stop=0.99), Reuse(every=3), Reuse(once=True, every=2, stop=0.99)])
def test_an_image_does_not_depend_on_its_batch(reuse):
    together = run(reuse)[0]
    for row in range(4):
        alone = heun(start(reusing(reuse), 1), NOISE[row : row + 1], SIGMAS)
        torch.testing.assert_close(alone, together[row : row + 1])


# ---- refusals


def test_outside_a_run_it_says_what_to_call():
    with pytest.raises(ValueError, match="needs to know where a run begins"):
        heun(reusing(Reuse(every=2)), NOISE, SIGMAS)


def test_without_a_weighted_difference_there_is_nothing_to_reuse():
    with pytest.raises(ValueError, match="only a weighted difference can be reused; guidance method none has none"):
        guide(Choice("none", 1.0, reuse=Reuse(every=2)), Parts(MAIN))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [({"every": 0}, "every 0 steps"), ({"stop": 1.5}, "cosine of 1.5"), ({"stop": float("nan")}, "cosine of nan")],
)
def test_wrong_settings_are_refused(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        Reuse(**settings)


def test_it_is_a_combination():
    assert issubclass(Reusing, Combination)
