import math

import pytest
import torch

from edm2kit.guidance.registry import RULES, Choice, Parts, guide
from edm2kit.guidance.rules.adg import AngleDomain
from tests.support.rule_spaces import DenoisedSpace, Point, check_authors_step, per_image

POINT = Point(0.7)


@pytest.mark.parametrize("weight", [1.2, 2.0, 8.0])
def test_the_authors_step_in_denoised_images(weight):
    def turned(y, y_neg):
        angle = torch.acos(y @ y_neg / (y.norm() * y_neg.norm()))
        turn = min((weight - 1) * angle, math.pi / 3)
        projection = (y @ y_neg) / (y_neg @ y_neg) * y_neg
        return math.cos(turn) * y + math.sin(turn) / math.sin(angle) * (y - projection)

    def authors(y, y_neg, point):
        return per_image(turned, y, y_neg)

    check_authors_step(AngleDomain(60.0), authors, DenoisedSpace(), weight)


def plane(degrees, length=1.0):
    angle = math.radians(degrees)
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64).reshape(1, 1, 1, 2) * length


def test_perpendicular_images_turn_by_the_limit_in_closed_form():
    # D is 90 degrees from the negative, so all of it is across: cos 60 + sin 60 times as long, in its own direction
    D = AngleDomain(60.0)(plane(90), [plane(0, 3.0)], [2.0], POINT.at)
    torch.testing.assert_close(D, plane(90) * (math.cos(math.pi / 3) + math.sin(math.pi / 3)))


@pytest.mark.parametrize(("angle", "weight"), [(10, 2.0), (40, 1.5), (40, 9.0), (90, 1.5), (130, 1.2)])
def test_how_much_longer_the_formula_makes_an_image(angle, weight):
    turn = min((weight - 1) * math.radians(angle), math.pi / 3)
    length = AngleDomain(60.0)(plane(angle), [plane(0)], [weight], POINT.at).norm().item()
    assert length == pytest.approx(math.sqrt(1 + math.sin(2 * turn) * math.sin(math.radians(angle))))
    assert length < math.sqrt(2) + 1e-9


@pytest.mark.parametrize("weight", [-30.0, 50.0])
def test_the_turn_is_limited_in_both_directions(weight):
    turn = math.copysign(math.radians(60), weight)
    across = plane(40) - math.cos(math.radians(40)) * plane(0)
    expected = math.cos(turn) * plane(40) + math.sin(turn) / math.sin(math.radians(40)) * across
    torch.testing.assert_close(AngleDomain(60.0)(plane(40), [plane(0)], [weight], POINT.at), expected)


def test_the_length_of_the_negative_does_not_count():
    rule = AngleDomain(60.0)
    results = [rule(POINT.D, [scale * POINT.D_neg], [2.0], POINT.at) for scale in (1.0, 4.0)]
    torch.testing.assert_close(*results)


def test_parallel_images_and_a_negative_of_zero_change_nothing():
    for negative in (2 * POINT.D, 0 * POINT.D):
        torch.testing.assert_close(AngleDomain(60.0)(POINT.D, [negative], [2.0], POINT.at), POINT.D)


def test_by_name_with_the_published_limit_and_wrong_limits_are_refused():
    guided = guide(Choice("autoguidance", 2.0, rule="adg"), Parts(lambda x, *_: x, lambda x, *_: 0 * x))
    assert guided.rule == AngleDomain(60.0)
    with pytest.raises(ValueError, match="not a number from 0 to 180"):
        RULES["adg"].options[0].parse("181")
