import pytest
import torch

from edm2kit.guidance.combine import Evaluation, linear
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.rules.rescale import StdRescale
from edm2kit.sampling.solvers import edm_sampler
from tests.support.fakes import Constant, Counting, Gaussian

X = torch.randn([4, 2, 3, 3], generator=torch.Generator().manual_seed(0))
D, D_NEG = 0.5 * X + 0.2, 0.3 * X.flip(0)
AT = Evaluation(X, torch.tensor(1.0))


def test_weight_1_is_off_bitwise_and_calls_no_negative():
    negative, net = Counting(Constant(0.0)), Gaussian(0.2, 0.3)
    off = guide(Choice("autoguidance", 1.0, rule="rescale"), Parts(net, negative))
    assert torch.equal(edm_sampler(off, X, num_steps=4), edm_sampler(net, X, num_steps=4))
    assert negative.calls == []


def test_share_0_is_the_linear_rule_bitwise():
    assert torch.equal(StdRescale(0.0)(D, [D_NEG], [2.0], AT), linear(D, [D_NEG], [2.0], AT))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_contrast_moves_to_that_of_the_unguided_answer(share):
    plain = linear(D, [D_NEG], [4.0], AT)
    before, after, now = (t.flatten(1).std(dim=1) for t in (D, plain, StdRescale(share)(D, [D_NEG], [4.0], AT)))
    torch.testing.assert_close(now, share * before + (1 - share) * after)
    assert (after > 1.2 * before).any()


def test_an_answer_without_contrast_stays_finite():
    flat = torch.ones_like(X)
    assert torch.equal(StdRescale(0.7)(D, [D - flat], [0.0], AT), StdRescale(0.7)(D, [D - flat], [0.0], AT))
    assert torch.equal(StdRescale(1.0)(flat, [flat], [3.0], AT), flat)


def test_by_name():
    guided = guide(Choice("autoguidance", 2.0, rule="rescale"), Parts(Gaussian(0.2, 0.3), Constant(0.0)))
    assert guided.rule == StdRescale(0.7)


def test_pinned_value():
    # std 1, guided 2: halfway between halved and left alone
    D = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    assert StdRescale(0.5)(D, [torch.zeros_like(D)], [2.0], AT).flatten().tolist() == [-1.5, 0.0, 1.5]
