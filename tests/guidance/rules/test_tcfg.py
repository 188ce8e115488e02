import pytest
import torch

from edm2kit.guidance.combine import linear
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.rules.tcfg import TangentialDamping
from tests.support.fakes import Constant
from tests.support.rule_spaces import NoiseSpace, Point, check_authors_step, per_image

POINT = Point(0.7)
RULE = TangentialDamping()


@pytest.mark.parametrize("weight", [0.5, 2.0, 7.5])
def test_the_authors_step_with_a_singular_value_decomposition(weight):
    def damped(e, e_neg):
        v = torch.linalg.svd(torch.stack([e_neg, e]), full_matrices=False)[2][0]
        return (e_neg @ v) * v

    def authors(e, e_neg, point):
        e_neg = per_image(damped, e, e_neg)
        return e_neg + weight * (e - e_neg)

    check_authors_step(RULE, authors, NoiseSpace(), weight)


def test_two_values_in_closed_form():
    # noise predictions (1, 0) and (0, 2): the larger one is the first singular vector, nothing is left of the other
    x = torch.zeros(1, 1, 1, 2)
    at = Point(0.7).at._replace(x=x)
    D, D_neg = torch.tensor([[[[0.0, -2.0]]]]), torch.tensor([[[[-1.0, 0.0]]]])
    torch.testing.assert_close(RULE(D, [D_neg], [3.0], at), 3 * D, atol=1e-6, rtol=0)


def test_parallel_predictions_are_the_linear_rule():
    D_neg = POINT.x - 0.4 * (POINT.x - POINT.D)
    two = ([D_neg, POINT.D], [3.0, 2.0])
    torch.testing.assert_close(RULE(POINT.D, *two, POINT.at), linear(POINT.D, *two, POINT.at))


def test_predictions_without_noise_change_nothing():
    guided = guide(Choice("autoguidance", 3.0, rule="tcfg"), Parts(Constant(0.5), Constant(0.5)))
    x = torch.full([2, 1, 2, 2], 0.5)
    assert torch.equal(guided(x, torch.tensor(1.0)), x)
