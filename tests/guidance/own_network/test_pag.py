import pytest
import torch

from edm2kit.guidance.attention_blocks import attend
from edm2kit.guidance.own_network.pag import identity_attention, matched_identity_attention
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.models.edm2 import Precond
from tests.support import golden

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
    assert list(guide(Choice("pag", 4.0), Parts(net)).negatives[0].source.change.blocks) == blocks


def test_one_block_or_several():
    arrays = golden.load("network_cond.npz")
    net = golden.network("cond", golden.part(arrays, "state/")).requires_grad_(False)
    choice = Choice("pag", 0.0, options={"pag_blocks": ("dec.8x8_in0", "dec.8x8_block1")})
    by_hand = dict.fromkeys(["dec.8x8_in0", "dec.8x8_block1"], lambda q, k, v: v)
    expected = net(arrays["x"], 1.0, arrays["labels"], attention=by_hand)
    D_neg = guide(choice, Parts(net))(arrays["x"], torch.tensor(1.0), arrays["labels"])
    torch.testing.assert_close(D_neg, expected, atol=1e-5, rtol=1e-5)
    assert (expected - net(arrays["x"], 1.0, arrays["labels"])).abs().max() > 1e-3


def test_attention_that_does_not_count_can_be_changed_at_will():
    # the block's sum takes a share of 0 from its attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Precond(**{**golden.architecture("cond"), "attn_balance": 0.0}).eval().requires_grad_(False)
    net.unet.out_gain.fill_(1)
    arrays = golden.load("network_cond.npz")
    D_neg = guide(Choice("pag", 0.0), Parts(net))(arrays["x"], torch.tensor(1.0), arrays["labels"])
    torch.testing.assert_close(D_neg, net(arrays["x"], 1.0, arrays["labels"]), atol=1e-6, rtol=1e-6)


def test_matched_it_is_as_loud_as_the_attention_it_replaces():
    matched, usual = matched_identity_attention(Q, K, V), attend(Q, K, V)
    rms = [t.square().mean(dim=(2, 3)).sqrt() for t in (matched, usual, V)]
    torch.testing.assert_close(rms[0], rms[1])
    assert (rms[2] > 1.5 * rms[1]).all()
    torch.testing.assert_close(matched / matched[..., :1, :1], V / V[..., :1, :1])
    assert matched_identity_attention(Q, K, torch.zeros_like(V)).abs().max() == 0
    chosen = Choice("pag", 4.0, options={"pag_match": "yes"})
    assert guide(chosen, Parts(golden.network("cond"))).negatives[0].source.change.edit is matched_identity_attention
    assert (
        guide(Choice("pag", 4.0), Parts(golden.network("cond"))).negatives[0].source.change.edit is identity_attention
    )


def test_a_guided_denoiser_has_no_inside():
    with pytest.raises(ValueError, match="changes the interior of a network"):
        guide(Choice("pag", 2.0), Parts(lambda x, sigma, labels=None: x))
