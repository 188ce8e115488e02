import pytest
import torch

from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.own_network.blur import blur, kernel_size
from edm2kit.guidance.own_network.sag import SelfAttentionBlur, attended
from edm2kit.guidance.registry import Choice, Parts, guide
from tests.support import golden
from tests.support.fakes import Constant, Flat, Gaussian

X = torch.randn([3, 2, 16, 16], generator=torch.Generator().manual_seed(0))
V, SIGMA = 0.3, torch.tensor(0.7)
NET = Flat(Gaussian(0.2, V))
EVERYWHERE = torch.eye(64)[0].expand(3, 2, 64, 64)  # all queries look at pixel 0 alone


def test_the_mass_of_a_map_is_its_number_of_pixels():
    attention = torch.randn([3, 2, 64, 64], generator=torch.Generator().manual_seed(1)).softmax(3)
    share = attended(attention, 8, 8)
    mass = attention.mean(1).sum(1)
    torch.testing.assert_close(mass.sum(1), torch.full([3], 64.0))
    assert torch.equal(share.flatten(1), (mass > 1).float())


def test_evenly_spread_attention_blurs_nothing():
    # strictly more than its share: a map of exact 1/64 gives none
    assert attended(torch.full([1, 2, 64, 64], 1 / 64), 16, 16).sum() == 0
    guided = guide(Choice("sag", 5.0), Parts(NET))
    assert torch.equal(guided(X, SIGMA), NET(X, SIGMA))


def test_masks_are_enlarged_by_repetition():
    mask = attended(EVERYWHERE, 16, 16)
    assert mask.shape == (3, 1, 16, 16)
    assert mask[:, :, :2, :2].min() == 1
    assert mask.sum() == 3 * 4


def test_of_a_linear_denoiser_it_is_an_unsharp_mask():
    # specs section 6: D_neg - D = v / (v + sigma^2) * (blurred D - D), where the mask is
    D = NET(X, SIGMA)
    mask = attended(EVERYWHERE, 16, 16)
    blurred = torch.where(mask > 0, blur(D, 1.0, 9), D)
    D_neg = SelfAttentionBlur(NET, "dec.8x8_block0", 1.0).derive(
        D, {"dec.8x8_block0": EVERYWHERE}, Evaluation(X, SIGMA)
    )
    torch.testing.assert_close(D_neg - D, V / (V + SIGMA**2) * (blurred - D), atol=1e-6, rtol=1e-5)
    assert (D_neg - D).abs().max() > 0.1


def test_attention_everywhere_makes_it_blur_guidance():
    D, everywhere = NET(X, SIGMA), torch.full([3, 2, 64, 64], 2 / 64)
    assert attended(everywhere, 16, 16).min() == 1
    D_neg = SelfAttentionBlur(NET, "b", 1.5).derive(D, {"b": everywhere}, Evaluation(X, SIGMA))
    assert torch.equal(D_neg, NET(X + (blur(D, 1.5, kernel_size(2.0)) - D), SIGMA))


def test_latents_are_blurred_with_nine_taps_at_sigma_1():
    assert kernel_size(4 / 3) == 9


def test_a_flat_image_is_left_alone():
    D_neg = SelfAttentionBlur(Flat(Constant(0.3)), "b", 1.0).derive(
        torch.full_like(X, 0.3), {"b": EVERYWHERE}, Evaluation(X, SIGMA)
    )
    torch.testing.assert_close(D_neg, torch.full_like(X, 0.3))


def test_the_block_is_the_last_of_the_decoder_at_the_lowest_resolution():
    net = golden.network("cond")
    assert guide(Choice("sag", 1.2), Parts(net)).negatives[0].source.block == "dec.8x8_block1"
    chosen = Choice("sag", 1.2, options={"sag_block": ("dec.8x8_in0",)})
    assert guide(chosen, Parts(net)).negatives[0].source.block == "dec.8x8_in0"
    with pytest.raises(ValueError, match="reads exactly one attention block; 0 were given"):
        guide(Choice("sag", 1.2, options={"sag_block": ()}), Parts(net))
    with pytest.raises(ValueError, match="not an attention block"):
        guide(Choice("sag", 1.2, options={"sag_block": ("dec.8x8_in1",)}), Parts(net))
