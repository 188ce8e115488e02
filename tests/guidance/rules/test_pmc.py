import math

import pytest
import torch

from edm2kit.guidance.combine import linear
from edm2kit.guidance.registry import RULES, Choice, Parts, guide
from edm2kit.guidance.rules.pmc import PowerLimit
from tests.support.fakes import Constant
from tests.support.rule_spaces import DenoisedSpace, Point, check_authors_step, per_image

POINT = Point(0.7)


@pytest.mark.parametrize("weight", [1.01, 2.0, 8.0])
def test_the_authors_step_in_denoised_images(weight):
    def guided(y, y_neg):
        delta = y - y_neg
        a, b, q = delta @ delta, y @ delta, y @ y
        beta = min(weight - 1, (-b + torch.sqrt(b**2 + (1.05**2 - 1) * a * q)) / a)
        return y + beta * delta

    check_authors_step(PowerLimit(1.05), lambda y, n, point: per_image(guided, y, n), DenoisedSpace(), weight)


@pytest.mark.parametrize(("weight", "expected"), [(1.1, 3.1), (2.0, 3.15), (50.0, 3.15), (0.5, 2.5)])
def test_constants_grow_by_5_percent_at_most(weight, expected):
    guided = guide(Choice("autoguidance", weight, rule="pmc"), Parts(Constant(3.0), Constant(2.0)))
    D = guided(torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.tensor(1.0))
    assert D.flatten().tolist() == pytest.approx([expected] * 4)


def test_a_perpendicular_change_in_closed_form():
    # |D|^2 + b^2 |d|^2 = 1.05^2 |D|^2
    D, change = (torch.tensor(v, dtype=torch.float64).reshape(1, 1, 1, 2) for v in ([2.0, 0.0], [0.0, 5.0]))
    limited = PowerLimit(1.05)(D, [D - change], [2.0], POINT.at)
    assert limited.flatten().tolist() == pytest.approx([2.0, 2 * math.sqrt(1.05**2 - 1)])


def test_the_norm_stays_within_the_limit_and_small_changes_are_the_linear_rule():
    two = ([POINT.D_neg, POINT.x], [2.5, -3.0])
    lengths = PowerLimit(1.05)(POINT.D, *two, POINT.at).flatten(1).norm(dim=1)
    assert (lengths <= 1.05 * POINT.D.flatten(1).norm(dim=1) * (1 + 1e-12)).all()
    torch.testing.assert_close(PowerLimit(100.0)(POINT.D, *two, POINT.at), linear(POINT.D, *two, POINT.at))


def test_equal_negatives_and_a_flat_zero_change_nothing():
    for D in (POINT.D, 0 * POINT.D):
        assert torch.equal(PowerLimit(1.05)(D, [D], [3.0], POINT.at), D)


def test_a_limit_below_1_is_refused():
    with pytest.raises(ValueError, match="not a number from 1"):
        RULES["pmc"].options[0].parse("0.9")
