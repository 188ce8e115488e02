"""What a rule is told: a published rule that needs x, the noise level and the step, written outside the package."""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import for_step
from edm2kit.guidance import RULES, Choice, Parts, Rule, guide
from edm2kit.sampling.solvers import edm_sampler
from tests.support.fakes import Constant, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0])
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)


@dataclass(frozen=True)
class CFGZeroStar:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886) in its own coordinates: velocities u = n - y of a rectified flow.

    With sigma = t / (1 - t) and x = y + sigma n, D = x / (1 + sigma) - u / (1 + 1 / sigma).
    """

    zero_steps: int

    def __call__(self, D, negatives, weights, at):
        (negative,), (weight,) = negatives, weights
        u = self.velocity(D, at)
        u_neg = self.velocity(negative, at)
        if at.i is not None and at.i < self.zero_steps:
            return self.clean(torch.zeros_like(u), at)
        scale = (u * u_neg).flatten(1).sum(1) / u_neg.square().flatten(1).sum(1)
        u_neg = scale.reshape(-1, 1, 1, 1) * u_neg
        return self.clean(u_neg + weight * (u - u_neg), at)

    @staticmethod
    def velocity(D, at):
        sigma = torch.as_tensor(at.sigma).reshape(-1, 1, 1, 1)
        return (at.x - D) / sigma - D

    @staticmethod
    def clean(u, at):
        sigma = torch.as_tensor(at.sigma).reshape(-1, 1, 1, 1)
        return (at.x / sigma - u) / (1 + 1 / sigma)


def test_a_rule_knows_x_and_sigma_and_the_step(monkeypatch):
    monkeypatch.setitem(RULES, "cfg-zero-star", Rule("CFG-Zero*", lambda: CFGZeroStar(zero_steps=1)))
    negative = Gaussian(0.2, 0.3)
    guided = guide(Choice("cfg", 2.0, rule="cfg-zero-star"), Parts(MIXTURE, negative))
    sigmas = torch.tensor([3.0, 1.0, 0.5, 0.0])
    for i, sigma in enumerate(sigmas[:3]):
        D = for_step(guided, i, sigmas)(X, sigma, None)
        # the authors' formula on x_t = (1 - t) y + t n
        t = sigma / (1 + sigma)
        x_t = (1 - t) * X
        noise = [(X - clean(X, sigma)) / sigma for clean in (MIXTURE, negative)]
        u, u_neg = (n - clean(X, sigma) for n, clean in zip(noise, (MIXTURE, negative), strict=True))
        s = (u * u_neg).sum(dim=(1, 2, 3), keepdim=True) / (u_neg**2).sum(dim=(1, 2, 3), keepdim=True)
        u_guided = torch.zeros_like(u) if i == 0 else s * u_neg + 2.0 * (u - s * u_neg)
        torch.testing.assert_close(D, x_t - t * u_guided, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(edm_sampler(guided, X, num_steps=4)).all()
    # outside a run there is no step
    assert not torch.equal(guided(X, sigmas[0], None), for_step(guided, 0, sigmas)(X, sigmas[0], None))


def test_a_rule_hears_of_no_evaluation_at_weight_1(monkeypatch):
    def refusing(D, negatives, weights, at):
        raise AssertionError("called")

    monkeypatch.setitem(RULES, "refusing", Rule("never", lambda: refusing))
    off = guide(Choice("autoguidance", 1.0, rule="refusing"), Parts(MIXTURE, Constant(0.0)))
    assert torch.equal(off(X, SIGMA), MIXTURE(X, SIGMA))
