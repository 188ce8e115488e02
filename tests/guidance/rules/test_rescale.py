import pytest
import torch

from edm2kit.guidance.combine import Evaluation, linear
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.rules.rescale import StdRescale
from edm2kit.sampling.solvers import edm_sampler, euler
from tests.support import authors
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
    before, after, now = (t.flatten(1).std(dim=1) for t in (D, plain, StdRescale(share, "D")(D, [D_NEG], [4.0], AT)))
    torch.testing.assert_close(now, share * before + (1 - share) * after)
    assert (after > 1.2 * before).any()


def test_an_answer_without_contrast_stays_finite():
    flat = torch.ones_like(X)
    assert torch.equal(StdRescale(0.7)(D, [D - flat], [0.0], AT), StdRescale(0.7)(D, [D - flat], [0.0], AT))
    assert torch.equal(StdRescale(1.0, "D")(flat, [flat], [3.0], AT), flat)


@pytest.mark.parametrize("space", ["v", "eps"])
@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_a_step_is_the_authors_own(space, sigma, sigma_next):
    # their network predicts eps or v of a variance-preserving x, of data of unit deviation; the paper's Eq. 14 to 16
    unit = 0.5 if space == "v" else 1.0  # data of deviation 0.5 in EDM2's networks
    x = (sigma * X + 0.3).double()
    level = torch.tensor(sigma, dtype=torch.float64)
    nets = [Gaussian(0.2, 0.3), Gaussian(-0.4, 0.05)]
    cos, sin = authors.alpha_bar(sigma / unit).sqrt(), (1 - authors.alpha_bar(sigma / unit)).sqrt()
    x_vp = cos * x / unit
    images = [net(x, level) / unit for net in nets]
    noises = [(x_vp - cos * image) / sin for image in images]
    if space == "eps":
        pos, neg = noises
    else:
        pos, neg = (cos * noise - sin * image for noise, image in zip(noises, images, strict=True))
    cfg = neg + 4.0 * (pos - neg)
    rescaled = cfg * pos.std(dim=(1, 2, 3), keepdim=True) / cfg.std(dim=(1, 2, 3), keepdim=True)
    final = 0.7 * rescaled + 0.3 * cfg
    noise = final if space == "eps" else cos * final + sin * x_vp
    theirs = unit * authors.ddim(x_vp, noise, sigma / unit, sigma_next / unit)
    options = {"rescale_space": space}
    guided = guide(Choice("autoguidance", 4.0, options=options, rule="rescale"), Parts(nets[0], nets[1]))
    ours = euler(guided, x / sigma, torch.tensor([sigma, sigma_next], dtype=torch.float64))
    end = authors.from_vp(theirs, sigma_next / unit)
    authors.assert_same_displacement(ours, authors.to_vp(end, sigma_next), x, sigma_next)


def test_the_space_matters():
    at = Evaluation(X, torch.tensor(0.5))
    results = [StdRescale(0.7, space)(D, [D_NEG], [4.0], at) for space in ("v", "eps", "D")]
    assert (results[0] - results[1]).abs().max() > 0.01
    assert (results[0] - results[2]).abs().max() > 0.01


def test_by_name():
    guided = guide(Choice("autoguidance", 2.0, rule="rescale"), Parts(Gaussian(0.2, 0.3), Constant(0.0)))
    assert guided.rule == StdRescale(0.7, "v", 0.5)


def test_pinned_value():
    # std 1, guided 2: halfway between halved and left alone
    D = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    assert StdRescale(0.5, "D")(D, [torch.zeros_like(D)], [2.0], AT).flatten().tolist() == [-1.5, 0.0, 1.5]
