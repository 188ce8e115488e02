import math

import pytest
import torch

from edm2kit.guidance.combine import linear
from edm2kit.guidance.registry import RULES, Choice, Parts, guide
from edm2kit.guidance.rules.mambo_g import MagnitudeAware
from tests.support.fakes import Constant
from tests.support.rule_spaces import DenoisedSpace, Point, VelocitySpace, check_authors_step, per_image

POINT = Point(0.7)


@pytest.mark.parametrize(
    ("relative_to", "space"),
    [("denoised", DenoisedSpace()), ("velocity", VelocitySpace())],
    ids=["denoised", "velocity"],
)
def test_the_authors_step(relative_to, space):
    def guided(prediction, negative):
        relative = (prediction - negative).norm() / negative.norm()
        return prediction + (6.0 - 1) * math.exp(-2 * relative) * (prediction - negative)

    rule = MagnitudeAware(2.0, relative_to)
    check_authors_step(rule, lambda p, n, point: per_image(guided, p, n), space, weight=6.0)


def test_constants_in_closed_form():
    guided = guide(Choice("autoguidance", 3.0, rule="mambo-g"), Parts(Constant(5.0), Constant(4.0)))
    D = guided(torch.zeros(1, 1, 2, 2), torch.tensor(1.0))
    assert D.flatten().tolist() == pytest.approx([5 + 2 * math.exp(-8 / 4)] * 4)


def test_damping_0_is_the_linear_rule():
    two = ([POINT.D_neg, POINT.x], [2.5, 0.5])
    torch.testing.assert_close(MagnitudeAware(0.0)(POINT.D, *two, POINT.at), linear(POINT.D, *two, POINT.at))


def test_a_negative_of_zero_guides_nothing():
    assert torch.equal(MagnitudeAware(8.0)(POINT.D, [0 * POINT.D], [3.0], POINT.at), POINT.D)


def test_wrong_settings_are_refused():
    damping, relative_to = RULES["mambo-g"].options
    with pytest.raises(ValueError, match="not a number from 0"):
        damping.parse("-1")
    with pytest.raises(ValueError, match="not one of denoised, velocity"):
        relative_to.parse("noise")
