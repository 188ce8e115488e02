from dataclasses import dataclass

import pytest
import torch

from edm2kit.conditions import ClassLabels, FloatVectors
from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.combine import Combination, Guided, Negative
from edm2kit.guidance.network_call import NetworkCall, Perturbed, in_one_call
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden
from tests.support.fakes import CountingNetwork, Following


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


# ---- any callable


@dataclass(frozen=True)
class Prompts:
    """A condition that is not a tensor: one word per image."""

    words: tuple[str, ...]

    def __len__(self):
        return len(self.words)

    def __getitem__(self, rows):
        return Prompts(self.words[rows])

    def null(self):
        return Prompts(("",) * len(self))

    def others(self, rng, include_own=False):
        drawn = rng.randint(2, size=[len(self)]).tolist()
        return Prompts(tuple(("elephant", "ox")[k] for k in drawn))

    def cat(self, *more):
        return Prompts(sum((prompts.words for prompts in more), self.words))

    def repeat(self, times):
        return Prompts(self.words * times)

    def to(self, device):
        return self


class ByLength:
    """A foreign denoiser: the length of each image's word everywhere; `sizes` notes the batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, sigma, condition=None, /):
        self.sizes.append(len(x))
        assert len(condition) == len(x)
        lengths = torch.tensor([float(len(word)) for word in condition.words])
        return torch.zeros_like(x) + lengths.reshape(-1, 1, 1, 1)


X, SIGMA, PROMPTS = torch.zeros(2, 3, 8, 8), torch.tensor(1.0), Prompts(("cat", "horse"))


@pytest.mark.parametrize(
    ("name", "negative", "sizes"),
    [
        ("cfg", [0.0, 0.0], [4]),
        ("icg", None, [4]),
        ("sliding-window", [3.0, 5.0], [2, 8]),
        ("input-noise", [3.0, 5.0], [4]),
    ],
)
def test_methods_of_condition_and_input_work_on_any_denoiser_and_condition(name, negative, sizes):
    foreign = ByLength()
    guided = for_images(guide(Choice(name, 3.0), Parts(foreign)), StackedGenerator("cpu", range(2)))
    D = for_step(guided, 0, torch.tensor([1.0, 0.0]))(X, SIGMA, PROMPTS)
    assert foreign.sizes == sizes
    positive = torch.tensor([3.0, 5.0])
    found = (3 * positive - D[:, 0, 4, 4]) / 2  # D_neg of D = D_neg + 3 (D_pos - D_neg)
    if negative is None:
        assert set(found.tolist()) <= {8.0, 2.0}
    else:
        assert found.tolist() == negative


def test_conditions_that_do_not_fit_one_batch_are_evaluated_one_by_one():
    sizes = []

    def foreign(x, sigma, condition=None):
        sizes.append(len(x))
        return x

    def calls(*conditions, x=X):
        return [NetworkCall(x, SIGMA, condition) for condition in conditions]

    in_one_call(foreign, calls(None, None))
    in_one_call(foreign, calls(torch.eye(2), torch.eye(2)))
    assert sizes == [4, 4]
    in_one_call(foreign, calls(torch.eye(2), None))
    in_one_call(foreign, calls(torch.eye(2), torch.zeros(2, 3)))
    in_one_call(foreign, calls("cat", "dog"))
    in_one_call(foreign, [*calls(None), NetworkCall(torch.zeros(2, 3, 4, 4), SIGMA, None)])
    assert sizes[2:] == [2] * 8


def test_a_denoiser_that_follows_the_run_keeps_its_batch():
    following = Following(lambda x, sigma, condition=None: x)
    in_one_call(following, [NetworkCall(X, SIGMA, None)] * 2)
    assert following.heard == [("call", None)] * 2


def test_without_a_condition_to_leave_out_cfg_and_icg_say_so():
    for name in ("cfg", "icg"):
        guided = for_images(guide(Choice(name, 2.0), Parts(ByLength())), StackedGenerator("cpu", range(2)))
        with pytest.raises(ValueError, match="the images have none"):
            guided(X, SIGMA)


@pytest.mark.parametrize("kind", [ClassLabels, FloatVectors])
def test_icg_and_cfg_keep_the_kind_of_a_condition(kind):
    seen = []

    def foreign(x, sigma, condition=None):
        seen.append(condition)
        return x

    pool = {"pool": torch.eye(4)} if kind is FloatVectors else {}
    condition = kind(torch.eye(4)[:2], **pool)
    for choice in (Choice("cfg", 2.0), Choice("icg", 2.0), Choice("icg", 2.0, options={"icg_kind": "gaussian"})):
        guided = for_images(guide(choice, Parts(foreign)), StackedGenerator("cpu", range(2)))
        for_step(guided, 0, torch.tensor([1.0, 0.0]))(X, SIGMA, condition)
    assert [(type(condition), len(condition)) for condition in seen] == [(kind, 4)] * 3
