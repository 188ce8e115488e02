import pytest
import torch

from edm2kit.guidance.combine import linear
from edm2kit.guidance.registry import RULES, Choice, Parts, guide
from edm2kit.guidance.rules.renorm import Renorm
from tests.support.fakes import Constant
from tests.support.rule_spaces import DenoisedSpace, Point, VelocitySpace, check_authors_step, per_image

POINT = Point(0.7)


@pytest.mark.parametrize("when", ["always", "larger"])
@pytest.mark.parametrize("of", ["denoised", "velocity"])
@pytest.mark.parametrize("weight", [0.2, 4.0])
def test_the_authors_step(when, of, weight):
    def guided(prediction, negative):
        combined = negative + weight * (prediction - negative)
        factor = prediction.norm() / combined.norm()
        return combined * (factor if when == "always" or factor < 1 else 1)

    space = DenoisedSpace() if of == "denoised" else VelocitySpace()
    check_authors_step(Renorm(when, of), lambda p, n, point: per_image(guided, p, n), space, weight)


def test_constants_keep_their_length_in_closed_form():
    guided = guide(Choice("autoguidance", 4.0, rule="renorm"), Parts(Constant(3.0), Constant(1.0)))
    D = guided(torch.zeros(1, 1, 2, 2), torch.tensor(1.0))
    torch.testing.assert_close(D, torch.full_like(D, 3.0))


def test_shorter_results_stay_if_only_larger_ones_are_scaled():
    D = torch.ones(1, 1, 2, 2)
    assert torch.equal(Renorm("larger")(D, [0 * D], [0.5], POINT.at), 0.5 * D)
    assert torch.equal(Renorm("larger")(D, [0 * D], [2.0], POINT.at), D)
    assert torch.equal(Renorm("always")(D, [0 * D], [0.5], POINT.at), D)


def test_several_negatives_are_scaled_together():
    two = ([POINT.D_neg, POINT.x], [2.5, 0.5])
    D = Renorm()(POINT.D, *two, POINT.at)
    torch.testing.assert_close(D.flatten(1).norm(dim=1), POINT.D.flatten(1).norm(dim=1))
    direction = torch.nn.functional.cosine_similarity(D.flatten(1), linear(POINT.D, *two, POINT.at).flatten(1))
    torch.testing.assert_close(direction, torch.ones_like(direction))


def test_an_empty_result_stays_empty():
    D = torch.ones(1, 1, 2, 2)
    assert torch.equal(Renorm()(D, [2 * D], [2.0], POINT.at), 0 * D)


def test_wrong_settings_are_refused():
    for option in RULES["renorm"].options:
        with pytest.raises(ValueError, match="is not one of"):
            option.parse("sometimes")
