import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.network_call import NetworkCall, Perturbed
from edm2kit.guidance.own_network.dropout_and_noise import Dropout, InputNoise
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden
from tests.support.fakes import Gaussian

SIGMAS = karras_sigmas(8, 0.002, 80, 7)


def in_step(part, num=3, i=2):
    return for_step(for_images(part, StackedGenerator("cpu", range(num))), i, SIGMAS)


def test_input_noise_on_a_gaussian_has_the_mean_of_its_closed_form():
    # specs section 2: E[D_delta] = (v x + kappa sigma^2 m) / (v + kappa sigma^2), kappa = (1 + delta)^2
    m, v, delta, num = 0.3, 0.25, 0.2, 4000
    x, sigma = torch.full([num, 1, 4, 4], 1.7), torch.tensor(0.6)
    D = in_step(Perturbed(Gaussian(m, v), InputNoise(delta)), num)(x, sigma)
    kappa = (1 + delta) ** 2
    assert D.mean().item() == pytest.approx((v * 1.7 + kappa * 0.36 * m) / (v + kappa * 0.36), abs=0.002)
    # and spreads by the noise that was added
    spread = v / (v + kappa * 0.36) * 0.6 * (kappa - 1) ** 0.5
    assert D.std().item() == pytest.approx(spread, rel=0.02)


def test_weight_2_undoes_an_error_that_grows_with_delta():
    # specs section 2: led away from twice the error, the error itself is gone
    m, v, x, sigma = 0.3, 0.25, torch.full([1, 1, 1, 1], 1.7), torch.tensor(0.6)

    def without_its_noise(delta):
        return lambda x, sigma, labels=None: Gaussian(m, v)(x, sigma * (1 + delta))

    guided = Guided(without_its_noise(0.001), without_its_noise(0.002), 2.0)(x, sigma)
    exact = Gaussian(m, v)(x, sigma)
    assert (guided - exact).abs() < 0.01 * (without_its_noise(0.001)(x, sigma) - exact).abs()


def test_dropout_drops_its_share_and_keeps_the_mean():
    call = in_step(Dropout(0.3))(NetworkCall(torch.zeros(3, 1, 1, 1), torch.tensor(1.0), None))
    y = call.edits["dropout"]("enc.8x8_block0", torch.ones(3, 100, 10, 10))
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    # other blocks of the call lose other activations
    assert not torch.equal(y, call.edits["dropout"]("dec.8x8_in0", torch.ones(3, 100, 10, 10)))


@pytest.mark.parametrize("change", [Dropout(0.3), InputNoise(0.3)])
def test_predictor_and_corrector_meet_the_same_and_the_next_step_another(change):
    arrays = golden.load("network_cond.npz")
    net = golden.network("cond", golden.part(arrays, "state/")).requires_grad_(False)
    followed = for_images(Perturbed(net, change), StackedGenerator("cpu", range(3)))
    step, x = for_step(followed, 2, SIGMAS), arrays["x"]
    assert torch.equal(step(x, torch.tensor(1.0)), step(x, torch.tensor(1.0)))
    assert not torch.equal(step(x, torch.tensor(1.0)), for_step(followed, 3, SIGMAS)(x, torch.tensor(1.0)))


@pytest.mark.parametrize("change", [Dropout(0.0), InputNoise(0.0)])
def test_none_of_it_changes_nothing_and_draws_nothing(change):
    call = NetworkCall(torch.zeros(3, 1, 1, 1), torch.tensor(1.0), None)
    assert change(call) is call


@pytest.mark.parametrize("name", ["dropout", "input-noise"])
def test_random_methods_ask_for_generators(name):
    net = golden.network("cond")
    with pytest.raises(ValueError, match="no generators were given"):
        guide(Choice(name, 2.0), Parts(net))(torch.zeros(1, 3, 16, 16), torch.tensor(1.0))
