"""What each rule made of the same two networks when it was written: it must not change unnoticed."""

import pytest
import torch

from edm2kit.guidance.registry import RULES, Choice, Parts, guide
from edm2kit.sampling.solvers import heun
from tests.support.rule_spaces import MAIN, NOISE, WEAK

SIGMAS = torch.tensor([5.0, 1.0, 0.2, 0.0], dtype=torch.float64)
PINNED = {
    "power-law": [-0.026298726, 1.6298899, -0.02552514],
    "cfg-zero-star": [-0.051770075, 0.96600499, -0.44159043],
    "fdg": [-0.036531036, 1.4236667, -0.24286669],
    "tcfg": [-0.0313663, 1.3337048, -0.2820093],
    "mambo-g": [-0.031384819, 1.2874438, -0.30388581],
    "adg": [-0.032062208, 1.2219827, -0.19766677],
    "renorm": [-0.044536072, 1.2064215, -0.23592942],
    "pmc": [-0.039527992, 1.3223563, -0.27996984],
    "fbg": [-0.070501393, 1.4560083, -0.061388916],
}


@pytest.mark.parametrize("rule", PINNED)
def test_pinned_values(rule):
    x = heun(guide(Choice("autoguidance", 2.0, rule=rule), Parts(MAIN, WEAK)), NOISE, SIGMAS)
    assert [x.mean().item(), x.std().item(), x[1, 1, 3, 4].item()] == pytest.approx(PINNED[rule], rel=1e-6)


def test_every_rule_is_pinned():
    assert {*PINNED, "linear", "apg", "rescale"} == set(RULES)  # these have pinned values in tests of their own
