import math

import pytest
import torch

from edm2kit.guidance.combine import linear
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.rules.power_law import PowerLaw
from tests.support.fakes import Constant
from tests.support.rule_spaces import Point, ScoreSpace, check_authors_step

POINT = Point(0.7)


@pytest.mark.parametrize("power", [-0.5, 0.4, 0.9])
def test_the_authors_step_in_scores(power):
    def authors(score, score_neg, point):
        apart = (score - score_neg).flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return score + 0.5 * apart**power * (score - score_neg)  # their omega

    check_authors_step(PowerLaw(power), authors, ScoreSpace(), weight=1.5)


def test_power_0_is_the_linear_rule():
    two = ([POINT.D_neg, POINT.x], [2.5, 0.5])
    torch.testing.assert_close(PowerLaw(0.0)(POINT.D, *two, POINT.at), linear(POINT.D, *two, POINT.at))


def test_constants_in_closed_form():
    # 4 values, 3 apart: the scores are 3 * sqrt(4) / 2^2 = 1.5 apart
    guided = guide(Choice("autoguidance", 2.0, rule="power-law"), Parts(Constant(3.0), Constant(0.0)))
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    assert guided(x, torch.tensor(2.0)).flatten().tolist() == pytest.approx([3 + 3 * 1.5**0.9] * 4)
    assert guided(x, torch.tensor(math.sqrt(6.0))).flatten().tolist() == pytest.approx([6.0] * 4)  # scores 1 apart


@pytest.mark.parametrize("power", [-0.5, 0.9])
def test_an_equal_negative_changes_nothing(power):
    assert torch.equal(PowerLaw(power)(POINT.D, [POINT.D], [3.0], POINT.at), POINT.D)


def test_several_negatives_add_their_changes():
    rule = PowerLaw(0.9)
    both = rule(POINT.D, [POINT.D_neg, POINT.x], [2.0, 1.3], POINT.at)
    single = [rule(POINT.D, [POINT.D_neg], [2.0], POINT.at), rule(POINT.D, [POINT.x], [1.3], POINT.at)]
    torch.testing.assert_close(both - POINT.D, sum(single) - 2 * POINT.D)
