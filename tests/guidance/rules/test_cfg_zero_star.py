import pytest
import torch

from edm2kit.denoiser import for_step
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.rules.cfg_zero_star import CFGZeroStar
from edm2kit.sampling.solvers import euler
from tests.support.rule_spaces import MAIN, NOISE, WEAK, Point, VelocitySpace, check_authors_step

POINT = Point(0.7, i=3)


def authors(v, v_neg, point):
    scale = (v * v_neg).flatten(1).sum(1) / v_neg.flatten(1).square().sum(1)
    scaled = scale.reshape(-1, 1, 1, 1) * v_neg
    return scaled + 3.5 * (v - scaled)


def test_the_authors_step_in_velocities():
    check_authors_step(CFGZeroStar(1), authors, VelocitySpace(), weight=3.5, i=1)


def test_the_first_step_stands_still_in_the_flows_variables():
    check_authors_step(CFGZeroStar(1), lambda v, v_neg, point: 0 * v, VelocitySpace(), weight=3.5, i=0)
    sigmas = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    seen = []
    guided = guide(Choice("autoguidance", 3.5, rule="cfg-zero-star"), Parts(MAIN, WEAK))

    def first_of(x, sigma, condition=None):
        seen.append(x)
        return for_step(guided, len(seen) - 1, sigmas)(x, sigma, condition)

    euler(first_of, NOISE, sigmas)
    torch.testing.assert_close(seen[1] / (1 + 1.0), seen[0] / (1 + 4.0))


@pytest.mark.parametrize("steps", [0, 1])
def test_outside_a_run_no_step_stands_still(steps):
    outside = Point(0.7)
    results = [CFGZeroStar(n)(outside.D, [outside.D_neg], [2.0], outside.at) for n in (0, steps)]
    assert torch.equal(*results)


def test_a_negative_velocity_in_the_same_direction_does_not_count():
    v = VelocitySpace().prediction(POINT.D, POINT)
    t = POINT.sigma / (1 + POINT.sigma)
    D_neg = (1 - t) * POINT.x - t * 5 * v
    torch.testing.assert_close(CFGZeroStar(1)(POINT.D, [D_neg], [4.0], POINT.at), POINT.D)


def test_a_negative_that_stands_still_is_taken_as_it_is():
    resting = POINT.x / (1 + POINT.sigma)
    D = CFGZeroStar(0)(POINT.D, [resting], [2.0], POINT.at)
    torch.testing.assert_close(D, 2 * POINT.D - resting)


def test_a_wrong_number_of_steps_is_refused():
    from edm2kit.guidance.registry import RULES

    for text in ("-1", "1.5", "x"):
        with pytest.raises(ValueError, match="is not a whole number of at least 0"):
            RULES["cfg-zero-star"].options[0].parse(text)
