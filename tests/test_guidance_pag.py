import pytest
import torch

from guidance.blocks import attend
from guidance.pag import identity_attention
from guidance.registry import Choice, Parts, guide
from tests import golden
from training.networks import Precond

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn([2, 3, 16, 8], generator=GENERATOR) for _ in range(3))


def test_it_is_attention_with_nothing_off_the_diagonal():
    mask = torch.full([16, 16], -torch.inf).fill_diagonal_(0)
    masked = torch.nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    torch.testing.assert_close(identity_attention(Q, K, V), masked)


def test_no_pixel_hears_of_another():
    jacobian = torch.autograd.functional.jacobian(lambda v: identity_attention(Q[:1, :1], K[:1, :1], v), V[:1, :1])
    between = jacobian[0, 0, :, :, 0, 0].abs().sum(dim=(1, 3))
    assert torch.equal(between, torch.eye(16) * between.diag())


def test_a_single_pixel_is_its_own_neighbourhood():
    q, k, v = (t[:, :, :1] for t in (Q, K, V))
    torch.testing.assert_close(identity_attention(q, k, v), attend(q, k, v))


@pytest.mark.parametrize(
    ("architecture", "blocks"),
    [
        # specs section 7: the last 16x16 and all 8x8 encoder blocks, and the middle, of a default network
        (
            {"img_resolution": 64, "img_channels": 4, "label_dim": 0, "model_channels": 64},
            ["enc.16x16_block2", "enc.8x8_block0", "enc.8x8_block1", "enc.8x8_block2", "dec.8x8_in0"],
        ),
        (golden.architecture("cond"), ["enc.8x8_block0", "dec.8x8_in0"]),
        ({**golden.architecture("cond"), "attn_resolutions": []}, ["dec.8x8_in0"]),
    ],
)
def test_default_blocks(architecture, blocks):
    with torch.device("meta"):
        net = Precond(**architecture)
    assert list(guide(Choice("pag", 4.0), Parts(net)).negs[0].change.blocks) == blocks


def test_one_block_or_several():
    arrays = golden.load("network_cond.npz")
    net = golden.network("cond", golden.part(arrays, "state/")).requires_grad_(False)
    choice = Choice("pag", 0.0, options={"pag_blocks": ("dec.8x8_in0", "dec.8x8_block1")})
    by_hand = dict.fromkeys(["dec.8x8_in0", "dec.8x8_block1"], lambda q, k, v: v)
    expected = net(arrays["x"], 1.0, arrays["labels"], attention=by_hand)
    D_neg = guide(choice, Parts(net))(arrays["x"], torch.tensor(1.0), arrays["labels"])
    torch.testing.assert_close(D_neg, expected, atol=1e-5, rtol=1e-5)
    assert (expected - net(arrays["x"], 1.0, arrays["labels"])).abs().max() > 1e-3


def test_a_guided_denoiser_has_no_inside():
    with pytest.raises(ValueError, match="changes the inside of a network"):
        guide(Choice("pag", 2.0), Parts(lambda x, sigma, labels=None: x))
