import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.combine import Combination, Guided, Negative
from edm2kit.guidance.network_call import NetworkCall, Perturbed, in_one_call
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden
from tests.support.fakes import CountingNetwork


@pytest.fixture(scope="module")
def net():
    arrays = golden.load("network_cond.npz")
    return golden.network("cond", golden.part(arrays, "state/")).requires_grad_(False), arrays


def half_attention(q, k, v):
    return v / 2


EDITS = [
    {},
    {"attention": {"dec.8x8_in0": half_attention}},
    {"attention": {"enc.8x8_block0": half_attention}, "embedding": lambda emb: emb * 1.1},
    {"dropout": lambda block, y: y * (0.5 if block.startswith("dec") else 1.0)},
]


def test_calls_in_one_batch_answer_as_they_do_one_by_one(net):
    net, arrays = net
    labels = [arrays["labels"], torch.zeros_like(arrays["labels"]), arrays["labels"], arrays["labels"].flip(1)]
    sigmas = [torch.tensor(1.0), torch.tensor(1.0), arrays["sigma"], torch.tensor(0.3)]
    calls = [
        NetworkCall(arrays["x"] + k, sigma, label, edits)
        for k, (sigma, label, edits) in enumerate(zip(sigmas, labels, EDITS, strict=True))
    ]
    together = in_one_call(net, calls)
    for k, call in enumerate(calls):
        alone = net(call.x, call.sigma, call.condition, **call.edits)
        torch.testing.assert_close(together[k], alone, atol=1e-5, rtol=1e-5)
        if k:
            assert (alone - net(call.x, call.sigma, arrays["labels"])).abs().max() > 1e-3


def test_without_labels(net):
    net, arrays = net
    D, halved = in_one_call(net, [NetworkCall(arrays["x"], torch.tensor(1.0), None, edits) for edits in EDITS[:2]])
    torch.testing.assert_close(D, net(arrays["x"], 1.0), atol=1e-5, rtol=1e-5)
    assert (halved - D).abs().max() > 1e-3


def test_methods_of_one_network_share_a_call(net):
    net, arrays = net
    counting = CountingNetwork(net)
    choice = Choice("cfg", 2.0, also=(("pag", 3.0), ("icg", 1.5)))
    guided = for_images(guide(choice, Parts(counting)), StackedGenerator("cpu", range(3)))
    sigmas = torch.tensor([5.0, 1.0, 0.0])
    D = for_step(guided, 1, sigmas)(arrays["x"], torch.tensor(1.0), arrays["labels"])
    assert counting.images == [12]
    # and the sum is that of the methods alone
    parts = []
    for name, weight in (("cfg", 2.0), ("pag", 3.0), ("icg", 1.5)):
        alone = for_images(guide(Choice(name, weight), Parts(net)), StackedGenerator("cpu", range(3)))
        parts.append(for_step(alone, 1, sigmas)(arrays["x"], torch.tensor(1.0), arrays["labels"]))
    plain = net(arrays["x"], 1.0, arrays["labels"])
    torch.testing.assert_close(D - plain, sum(part - plain for part in parts), atol=2e-5, rtol=1e-4)


def test_beside_a_method_that_reads_attention_the_others_still_share(net):
    net, arrays = net
    counting = CountingNetwork(net)
    choice = Choice("sag", 1.2, also=(("cfg", 2.0), ("pag", 3.0)))
    guide(choice, Parts(counting))(arrays["x"], torch.tensor(1.0), arrays["labels"])
    assert sorted(counting.images) == [3, 3, 6]


def test_a_changed_call_of_another_network_is_its_own(net):
    net, arrays = net
    other = CountingNetwork(net)
    neg = Perturbed(other, lambda call: call._replace(condition=call.condition.flip(1)))
    x, sigma, labels = arrays["x"], torch.tensor(1.0), arrays["labels"]
    assert torch.equal(
        Combination(net, (Negative(neg, 2.0),))(x, sigma, labels), Guided(net, neg, 2.0)(x, sigma, labels)
    )
    assert other.images == [3, 3]
