import pytest
import torch

from edm2kit.guidance.combine import Guided
from edm2kit.guidance.own_network.truncation import truncated
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Gaussian


def points(num: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return StackedGenerator("cpu", range(num)).randn([num, 2, 1, 1]).to(dtype)


def test_weight_one_is_off_bit_for_bit():
    net = Gaussian(0.2, 0.25)
    plain = edm_sampler(net, points(4), num_steps=8)
    assert torch.equal(edm_sampler(guide(Choice("truncation", 1.0), Parts(net)), points(4), num_steps=8), plain)


def test_the_score_is_multiplied_by_the_weight():
    net, x, sigma = Gaussian(0.2, 0.25), points(4, torch.float64), torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(truncated(net, 1.4)(x, sigma) - x, 1.4 * (net(x, sigma) - x))


@pytest.mark.parametrize(("steps", "error"), [(32, 0.106), (256, 0.0012)])
def test_a_gaussian_shrinks_to_its_closed_form(steps, error):
    # specs: with the score times s, std = sqrt(v) * (v / (v + T^2))^((s - 1) / 2)
    v, T, s, m = 0.25, 80.0, 1.4, 0.2
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1) * (v + T**2) ** 0.5 / T + m / T
    x = edm_sampler(truncated(Gaussian(m, v), s), noise, num_steps=steps, sigma_max=T, dtype=torch.float64)
    std = (x[1] - x[0]).item() / 2
    assert x.mean().item() == pytest.approx(m, abs=1e-9)
    assert std / (v**0.5 * (v / (v + T**2)) ** ((s - 1) / 2)) == pytest.approx(1 + error, abs=0.05 * error)


def test_it_is_guidance_away_from_a_gaussian_as_wide_as_can_be():
    # specs section 5: C1 with v0 -> infinity, at the same T
    noise = points(4, torch.float64)
    wide = Guided(Gaussian(0.2, 0.25), Gaussian(0.2, 1e12), 1.4)
    x = edm_sampler(truncated(Gaussian(0.2, 0.25), 1.4), noise, num_steps=16, dtype=torch.float64)
    torch.testing.assert_close(edm_sampler(wide, noise, num_steps=16, dtype=torch.float64), x, rtol=1e-6, atol=1e-7)
