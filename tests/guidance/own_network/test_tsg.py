import math

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.network_call import NetworkCall
from edm2kit.guidance.own_network.tsg import NoisyEmbedding
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden

SIGMAS = karras_sigmas(32, 0.002, 80, 7)
X = torch.zeros(3, 1, 1, 1)


def in_step(part, i=3):
    return for_step(for_images(part, StackedGenerator("cpu", range(3))), i, SIGMAS)


def added(change, sigma, width=4000):
    edits = change(NetworkCall(X, torch.tensor(sigma), None)).edits
    return edits["embedding"](torch.zeros(3, width))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_noise_has_the_stated_size_at_each_noise_level(power):
    for sigma, t in ((80.0, 1.0), (0.002, 0.0), (math.sqrt(80 * 0.002), 0.5), (500.0, 1.0)):
        rms = added(in_step(NoisyEmbedding(0.3, power)), sigma).square().mean().sqrt().item()
        assert rms == pytest.approx(0.3 * t**power, rel=0.03, abs=1e-5)


def test_predictor_and_corrector_meet_the_same_noise_and_the_next_step_another():
    followed = for_images(NoisyEmbedding(0.3, 0.0), StackedGenerator("cpu", range(3)))
    step = for_step(followed, 3, SIGMAS)
    assert torch.equal(added(step, 5.0), added(step, 4.0))
    assert not torch.equal(added(step, 5.0), added(for_step(followed, 4, SIGMAS), 5.0))


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_to_first_order_it_is_the_derivative_by_the_embedding(name):
    # specs section 9: D(noisy) - D = s J n + O(s^2), the derivative taken by differences in the other direction
    arrays = golden.load(f"network_{name}.npz")
    net = golden.network(name, golden.part(arrays, "state/")).requires_grad_(False)
    x, sigma, labels, steps = arrays["x"], torch.tensor(1.0), arrays.get("labels"), (1e-2, -1e-2)
    noise = added(in_step(NoisyEmbedding(1.0, 0.0)), 1.0, net.unet.emb_noise.weight.shape[0])
    forward, backward = (net(x, sigma, labels, embedding=lambda emb, s=s: emb + s * noise) for s in steps)
    slope = (forward - backward) / 0.02
    choice = Choice("tsg", 0.0, options={"tsg_scale": 0.01, "tsg_power": 0.0})
    D_neg = in_step(guide(choice, Parts(net)))(x, sigma, labels)
    difference = D_neg - net(x, sigma, labels)
    assert (difference - 0.01 * slope).norm() < 0.05 * difference.norm()
    assert difference.norm() > 1e-4


def test_no_noise_changes_nothing_and_draws_nothing():
    call = NetworkCall(X, torch.tensor(1.0), None)
    assert NoisyEmbedding(0.0, 1.0)(call) is call
