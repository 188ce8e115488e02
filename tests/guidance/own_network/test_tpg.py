import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.attention_blocks import attend
from edm2kit.guidance.network_call import NetworkCall
from edm2kit.guidance.own_network.tpg import ShuffledTokens
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.models.edm2 import Precond
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn([2, 3, 16, 8], generator=GENERATOR) for _ in range(3))
SIGMAS = torch.tensor([5.0, 1.0, 0.0])


def shuffle_of(step=0, seeds=(0, 1)):
    change = for_step(for_images(ShuffledTokens(("block",)), StackedGenerator("cpu", seeds)), step, SIGMAS)
    return change(NetworkCall(torch.zeros(2, 1, 1, 1), torch.tensor(1.0), None)).edits["attention"]["block"]


def test_it_is_attention_of_shuffled_tokens():
    # the permutations, read off from attention that returns each token's number
    numbers = torch.arange(16.0).reshape(1, 1, 16, 1).expand(2, 3, 16, 8)
    onehot = 1e4 * torch.eye(16).expand(2, 3, 16, 16)
    orders = shuffle_of()(onehot, onehot, numbers)[:, 0, :, 0].round().long()
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(2, 16))
    shuffled = [torch.stack([t[n][:, orders[n]] for n in range(2)]) for t in (Q, K, V)]
    torch.testing.assert_close(shuffle_of()(Q, K, V), attend(*shuffled))
    assert not torch.equal(orders[0], orders[1])  # another one for each image


def test_the_permutation_is_the_same_for_all_blocks_of_a_call_and_changes_with_the_step():
    shuffle = shuffle_of()
    assert torch.equal(shuffle(Q, K, V), shuffle(Q, K, V))
    change = for_images(ShuffledTokens(("block",)), StackedGenerator("cpu", (0, 1)))
    call = NetworkCall(torch.zeros(2, 1, 1, 1), torch.tensor(1.0), None)
    first, second = (for_step(change, i, SIGMAS) for i in range(2))
    answers = [step(call).edits["attention"]["block"](Q, K, V) for step in (first, first, second)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_the_norm_stays_and_flat_attention_does_not_change():
    assert shuffle_of()(Q, K, V).norm() == pytest.approx(attend(Q, K, V).norm().item())
    flat = V[:, :, :1].expand_as(V)
    torch.testing.assert_close(shuffle_of()(Q, K, flat), attend(Q, K, flat))


def test_default_blocks_are_in_the_decoder_and_others_can_be_named():
    architecture = golden.architecture("cond")
    with torch.device("meta"):
        net = Precond(**architecture)
    blocks = guide(Choice("tpg", 4.0), Parts(net)).negatives[0].source.change.blocks
    assert blocks
    assert all(net.attention_roles[name].side == "decoder" for name in blocks)
    with torch.device("meta"):
        bare = Precond(**{**architecture, "attn_resolutions": []})
    with pytest.raises(ValueError, match="none there"):
        guide(Choice("tpg", 4.0), Parts(bare))
    named = guide(Choice("tpg", 4.0, options={"tpg_blocks": ("dec.8x8_in0",)}), Parts(bare))
    assert named.negatives[0].source.change.blocks == ("dec.8x8_in0",)
