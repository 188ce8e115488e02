import pytest
import torch

from edm2kit.guidance.combine import Guided
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.solvers import edm_sampler
from tests.support import golden
from tests.support.fakes import ByLabel, Constant, Counting, Gaussian

X = torch.randn([4, 2, 3, 3], generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor(0.7)


def test_it_is_the_plain_formula():
    net, gnet = Gaussian(0.2, 0.25), Gaussian(-0.3, 0.36)
    assert guide(Choice("autoguidance", 2.1), Parts(net, gnet)) == Guided(net, gnet, 2.1)


def test_the_guide_network_receives_the_labels():
    guided = guide(Choice("autoguidance", 0.0), Parts(Constant(0.0), ByLabel((1.0, 2.0))))
    assert guided(X, SIGMA, torch.tensor([[0.0, 1.0]] * 4)).unique().tolist() == [2.0]


def test_weight_1_is_off_bitwise_and_calls_no_negative():
    negative, net = Counting(Constant(0.0)), Gaussian(0.2, 0.25)
    off = guide(Choice("autoguidance", 1.0), Parts(net, negative))
    assert torch.equal(edm_sampler(off, X, num_steps=3), edm_sampler(net, X, num_steps=3))
    assert negative.calls == []


@pytest.mark.parametrize("name", ["steps8_w1_float32", "steps8_w2.1_float32"])
def test_by_name_it_equals_the_reference(name):
    arrays = golden.load("sampler.npz")
    net = golden.network("cond", golden.part(golden.load("network_cond.npz"), "state/"))
    gnet = golden.network("cond", golden.part(arrays, "gstate/"))
    guided = guide(Choice("autoguidance", 2.1 if "2.1" in name else 1.0), Parts(net, gnet))
    golden.assert_close(
        edm_sampler(guided, arrays["noise"], arrays["labels"], num_steps=8), arrays[f"out/{name}"], 1e-4
    )
