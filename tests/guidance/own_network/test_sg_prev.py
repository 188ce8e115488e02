import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.reuse import Reuse
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.restart import Restart, restart
from edm2kit.sampling.solvers import euler, heun
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Gaussian
from tests.support.rule_spaces import LEVELS, MAIN, NOISE, SHRINK, DenoisedSpace, NoiseSpace, Point, VelocitySpace

SPACES = {"noise": NoiseSpace(), "velocity": VelocitySpace(), "denoised": DenoisedSpace()}
SIGMAS = karras_sigmas(8, 0.01, 20, 7, torch.float64)


def previous(weight=3.0, net=MAIN, start=0.0, **options):
    options = {f"sg_prev_{name}": value for name, value in {"start": start, **options}.items()}
    return for_images(guide(Choice("sg-prev", weight, options=options), Parts(net)), StackedGenerator("cpu", range(4)))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_authors_step_leads_away_from_the_last_prediction(space, weight):
    for sigma in LEVELS:
        before, now = Point(sigma / SHRINK), Point(sigma)
        sigmas = torch.tensor([before.sigma, sigma, now.sigma_next, 0.0], dtype=torch.float64)
        run = previous(weight, space=space)
        assert torch.equal(for_step(run, 0, sigmas)(before.x, sigmas[0]), before.D)  # nothing to lead away from
        ours = now.our_step(for_step(run, 1, sigmas)(now.x, sigmas[1]))
        theirs_before, theirs = (SPACES[space].prediction(point.D, point) for point in (before, now))
        expected = SPACES[space].step(theirs_before + weight * (theirs - theirs_before), now)
        assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()
        assert (ours - now.our_step(now.D)).abs().max() > 1e-6 * expected.abs().max()


def test_after_an_unguided_euler_step_every_space_is_the_same():
    sigmas = torch.tensor([5.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    x = 5 * NOISE
    following = x + (2 - 5) * (x - MAIN(x, sigmas[0])) / 5
    results = []
    for space in SPACES:
        run = previous(space=space)
        for_step(run, 0, sigmas)(x, sigmas[0])
        results.append(for_step(run, 1, sigmas)(following, sigmas[1]))
    torch.testing.assert_close(results[0], MAIN(x, sigmas[0]) + 3 * (MAIN(following, sigmas[1]) - MAIN(x, sigmas[0])))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("solver", [euler, heun])
@pytest.mark.parametrize("space", SPACES)
def test_a_constant_denoiser_is_reached_whatever_the_weight(solver, space):
    x = solver(previous(net=Constant(0.3), space=space), NOISE, SIGMAS)
    torch.testing.assert_close(x, torch.full_like(x, 0.3))


def test_heuns_second_evaluation_leads_away_from_the_first_of_its_step():
    net = Gaussian(0.2, 0.5)
    x, sigmas = 3 * NOISE, torch.tensor([3.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    step = for_step(previous(net=net), 0, sigmas)
    D = step(x, sigmas[0])
    assert torch.equal(D, net(x, sigmas[0]))
    y = x + (1 - 3) * (x - D) / 3
    D_y = net(y, sigmas[1])
    torch.testing.assert_close(step(y, sigmas[1]), D + 3 * (D_y - D))


def acting_steps(denoiser, sigmas=SIGMAS):
    """The steps of a run, each from the same x, in which the result differs from that of MAIN."""
    acting = []
    for i, sigma in enumerate(sigmas[:-1]):
        x = sigma * NOISE
        if not torch.equal(for_step(denoiser, i, sigmas)(x, sigma), MAIN(x, sigma)):
            acting.append(i)
    return acting


def test_it_acts_in_the_half_of_the_steps_with_less_noise():
    assert acting_steps(previous(start=0.5)) == [4, 5, 6, 7]
    assert acting_steps(previous(start=0.0)) == [1, 2, 3, 4, 5, 6, 7]
    assert acting_steps(previous(start=1.0)) == []


def test_nothing_is_remembered_across_runs_gaps_or_added_noise():
    run = previous()
    assert acting_steps(run) == acting_steps(run)  # a second run on the same images
    for_step(run, 2, SIGMAS)(SIGMAS[2] * NOISE, SIGMAS[2])
    x = SIGMAS[4] * NOISE
    assert torch.equal(for_step(run, 4, SIGMAS)(x, SIGMAS[4]), MAIN(x, SIGMAS[4]))  # step 3 was left out


def test_a_restart_begins_without_a_previous_step():
    asked = []

    class Noting:
        def __call__(self, x, sigma, condition=None):
            asked.append((float(sigma), MAIN(x, sigma)))
            return asked[-1][1]

    seen = []

    class Spy:
        """Passes on to the guided denoiser, and notes where it differs from the network."""

        def __init__(self, guided):
            self.guided = guided

        def __call__(self, x, sigma, condition=None):
            D = self.guided(x, sigma, condition)
            seen.append((float(sigma), torch.equal(D, asked[-1][1])))
            return D

        def for_step(self, i, sigmas):
            return Spy(for_step(self.guided, i, sigmas))

    restart(Spy(previous(net=Noting())), NOISE, SIGMAS, None, torch.zeros_like, settings=Restart(((3, 1, 0.5, 3.0),)))
    unguided = [sigma for sigma, is_plain in seen if is_plain]
    assert unguided == pytest.approx([SIGMAS[0].item(), 3.0])


def test_reuse_is_refused_because_there_is_nothing_to_save():
    with pytest.raises(ValueError, match="sg-prev evaluates nothing that could be saved"):
        guide(Choice("sg-prev", 3.0, reuse=Reuse(every=2)), Parts(MAIN))
