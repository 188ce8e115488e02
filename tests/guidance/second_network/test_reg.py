import pytest
import torch

from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.second_network.reg import RectifiedGradient, reaction
from edm2kit.sampling.solvers import edm_sampler, heun
from tests.support.fakes import Constant, Counting, Flat, Gaussian
from tests.support.rule_spaces import LEVELS, MAIN, NOISE, WEAK, Point

SIGMAS = torch.tensor([5.0, 1.0, 0.2, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("weight", [0.5, 1.8])
def test_the_authors_step(weight):
    # their EDM2 sampler: D + (w - 1) grad (D - D_neg), grad = jacobian^T 1, and dx = (x - D) / sigma dsigma
    guided = guide(Choice("reg", weight), Parts(MAIN, WEAK))
    for sigma in LEVELS:
        point = Point(sigma)
        level = torch.tensor(sigma, dtype=torch.float64)
        jacobians = [
            torch.autograd.functional.jacobian(lambda x: MAIN(x[None], level)[0], image)  # noqa: B023
            for image in point.x
        ]
        size = NOISE[0].numel()
        gradient = torch.stack([j.reshape(size, size).sum(dim=0).reshape(NOISE.shape[1:]) for j in jacobians])
        theirs = point.our_step(point.D + (weight - 1) * gradient * (point.D - point.D_neg))
        ours = point.our_step(guided(point.x, level))
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_a_gaussian_reacts_equally_everywhere():
    # D = (v x + sigma^2 m) / (v + sigma^2), so g = v / (v + sigma^2) and REG is guidance with a smaller weight
    v, sigma = 0.25, torch.tensor(0.5, dtype=torch.float64)
    pos, neg = Gaussian(0.2, v), Gaussian(-0.3, v)
    D, gradient = reaction(pos, NOISE, sigma, None)
    torch.testing.assert_close(gradient, torch.full_like(NOISE, 0.5))
    guided = RectifiedGradient(pos, neg, 3.0)(NOISE, sigma)
    torch.testing.assert_close(guided, D + 2 * 0.5 * (D - neg(NOISE, sigma)))


def test_weight_1_is_off_bitwise_without_gradients():
    negative = Counting(WEAK)
    off = guide(Choice("reg", 1.0), Parts(MAIN, negative))
    assert torch.equal(edm_sampler(off, NOISE, num_steps=4), edm_sampler(MAIN, NOISE, num_steps=4))
    assert negative.calls == []


def test_results_carry_no_gradient_and_a_flat_denoiser_is_not_guided():
    guided = RectifiedGradient(MAIN, WEAK, 2.0)
    assert not guided(NOISE, SIGMAS[1]).requires_grad
    flat = RectifiedGradient(Constant(0.5), Constant(0.0), 2.0)
    assert torch.equal(flat(NOISE, SIGMAS[1]), torch.full_like(NOISE, 0.5))


def test_without_a_guide_network_it_leaves_the_condition_out():
    net = Flat(Gaussian(0.2, 0.25), label_dim=3)
    assert guide(Choice("reg", 2.0), Parts(net)).neg.net is net
    with pytest.raises(ValueError, match="needs a conditional network"):
        guide(Choice("reg", 2.0), Parts(Flat(Gaussian(0.2, 0.25))))
    with pytest.raises(ValueError, match="weight is nan"):
        guide(Choice("reg", float("nan")), Parts(MAIN, WEAK))


def test_pinned_value():
    x = heun(guide(Choice("reg", 2.0), Parts(MAIN, WEAK)), NOISE, SIGMAS)
    assert [x.mean().item(), x.std().item(), x[1, 1, 3, 4].item()] == pytest.approx(PINNED, rel=1e-6)


PINNED = [-0.05103690624730699, 1.332597067367484, -0.28931603426317914]
