import math

import pytest
import torch

from edm2kit.guidance.attention_blocks import attend
from edm2kit.guidance.own_network.erg import FlattenedAttention
from edm2kit.guidance.registry import Choice, Parts, guide
from tests.support import golden

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn([2, 3, 16, 8], generator=GENERATOR) for _ in range(3))
ARRAYS = golden.load("network_cond.npz")


def entropy(maps):
    return -(maps * maps.log()).sum(dim=3).mean()


def maps_of(temperature):
    """The attention maps, read off by attending to unit vectors."""
    values = torch.eye(16).expand(2, 3, 16, 16)
    return FlattenedAttention(temperature)(Q, K, values)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_it_is_softmax_with_a_temperature(temperature):
    expected = (Q @ K.transpose(2, 3) / math.sqrt(8) / temperature).softmax(dim=3) @ V
    torch.testing.assert_close(FlattenedAttention(temperature)(Q, K, V), expected, atol=2e-6, rtol=1e-5)


def test_temperature_1_is_plain_attention_bitwise():
    assert torch.equal(FlattenedAttention(1.0)(Q, K, V), attend(Q, K, V))


def test_the_entropy_of_maps_grows_with_the_temperature_up_to_that_of_even_ones():
    found = [entropy(maps_of(temperature)).item() for temperature in (0.5, 1.0, 2.0, 10.0, math.inf)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(math.log(16))
    assert found[0] < 0.8 * found[-1]


def test_an_infinite_temperature_is_the_mean_of_all_values():
    mean = V.mean(dim=2, keepdim=True).expand_as(V)
    torch.testing.assert_close(FlattenedAttention(math.inf)(Q, K, V), mean, atol=1e-6, rtol=1e-5)


def test_a_network_at_temperature_1_is_led_away_from_itself():
    net = golden.network("cond", golden.part(ARRAYS, "state/")).requires_grad_(False)
    guided = guide(Choice("erg", 3.0, options={"erg_temperature": 1.0}), Parts(net))
    plain = net(ARRAYS["x"], torch.tensor(1.0), ARRAYS["labels"])
    torch.testing.assert_close(guided(ARRAYS["x"], torch.tensor(1.0), ARRAYS["labels"]), plain, atol=1e-5, rtol=1e-5)


def test_an_unknown_block_is_refused():
    net = golden.network("cond", golden.part(ARRAYS, "state/")).requires_grad_(False)
    with pytest.raises(ValueError, match="is not an attention block of this network; available"):
        guide(Choice("erg", 2.0, options={"erg_blocks": ("block7",)}), Parts(net))
