import pytest
import torch

from edm2kit.guidance.combine import Combination, Guided, Negative
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.guidance.second_network.cfg_plus_autoguidance import Interpolation
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting, Following, Gaussian

X = torch.randn([4, 2, 3, 3], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIGMA = torch.tensor(0.7, dtype=torch.float64)
NET, WEAK, UNCOND = Gaussian(0.2, 0.25), Gaussian(0.1, 0.4), Gaussian(-0.3, 0.9)


def guided(share, weight=2.1, parts=None):
    choice = Choice("cfg-plus-autoguidance", weight, options={"cfg_plus_autoguidance_share": share})
    return guide(choice, parts or Parts(NET, WEAK, UNCOND))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_it_is_both_with_weights_of_their_own(share):
    # Karras et al. 2024, App. B.2
    w = 2.1
    both = (Negative(UNCOND, (1 - share) * (w - 1) + 1), Negative(WEAK, share * (w - 1) + 1))
    torch.testing.assert_close(guided(share)(X, SIGMA), Combination(NET, both)(X, SIGMA))


@pytest.mark.parametrize(("share", "alone", "unused"), [(0.0, UNCOND, "gnet"), (1.0, WEAK, "uncond")])
def test_at_either_end_the_other_network_is_never_called(share, alone, unused):
    counting = Counting(Constant(0.0))
    parts = Parts(NET, **{"gnet": WEAK, "uncond": UNCOND, unused: counting})
    x = edm_sampler(guided(share, parts=parts), X.float(), num_steps=4)
    assert torch.equal(x, edm_sampler(Guided(NET, alone, 2.1), X.float(), num_steps=4))
    assert counting.calls == []


def test_it_is_affine_in_the_share():
    D = [guided(share)(X, SIGMA) for share in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(D[0] - 2 * D[1] + D[2], torch.zeros_like(D[0]), atol=1e-12, rtol=0)


def test_weight_1_is_off_bitwise_and_calls_neither():
    counting = Counting(Constant(0.0))
    off = guided(0.5, 1.0, Parts(NET, counting, counting))
    assert torch.equal(edm_sampler(off, X, num_steps=3), edm_sampler(NET, X, num_steps=3))
    assert counting.calls == []


def test_its_parts_follow_the_run():
    parts = [Following(UNCOND), Following(WEAK)]
    edm_sampler(Interpolation(*parts, 0.5).for_images(StackedGenerator("cpu", range(4))), X, num_steps=1)
    assert [part.heard for part in parts] == [[("for_images", 4), ("for_step", 0), ("call", 0), ("after_step", 0)]] * 2


def test_pinned_value():
    x = edm_sampler(guided(0.3), X[:1, :1, :1, :1], num_steps=4, dtype=torch.float64)
    assert x.item() == pytest.approx(-3.717876634, abs=1e-8)
