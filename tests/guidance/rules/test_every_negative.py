"""Each rule with each method that has a negative: autoguidance, CFG, attention, blocks, noise."""

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.registry import METHODS, RULES, Choice, Parts, guide
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden

ARRAYS = golden.load("network_cond.npz")
X, LABELS = ARRAYS["x"], ARRAYS["labels"]
NET = golden.network("cond", golden.part(ARRAYS, "state/")).requires_grad_(False)
WEAK = golden.network("cond", golden.part(golden.load("sampler.npz"), "gstate/")).requires_grad_(False)
SIGMAS = torch.tensor([5.0, 1.0, 0.2, 0.0])


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_guides_with_every_negative(rule):
    plain = NET(X, SIGMAS[1], LABELS)
    for name, method in METHODS.items():
        if method.negative is None:
            continue
        options = {"sg_prev_start": 0.0} if name == "sg-prev" else {}
        guided = guide(Choice(name, 2.0, rule=rule, options=options), Parts(NET, WEAK if method.needs_gnet else None))
        run = for_images(guided, StackedGenerator("cpu", range(len(X))))
        if method.remembers:
            for_step(run, 0, SIGMAS)(X, SIGMAS[0], LABELS)
        step = for_step(run, 1, SIGMAS)
        D = step(X, SIGMAS[1], LABELS)
        assert D.isfinite().all(), name
        assert D.dtype == torch.float32, name
        assert (D - plain).abs().max() > 1e-6, name
