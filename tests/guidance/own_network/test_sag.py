from dataclasses import dataclass

import pytest
import torch

from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.own_network.blur import blur
from edm2kit.guidance.own_network.sag import METHOD, SelfAttentionBlur, attended
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.solvers import euler
from tests.support import authors, golden
from tests.support.fakes import Constant, Flat, Gaussian, Mixture

X = torch.randn([3, 2, 16, 16], generator=torch.Generator().manual_seed(0))
V, SIGMA = 0.3, torch.tensor(0.7)
NET = Flat(Gaussian(0.2, V))
EVERYWHERE = torch.eye(64)[0].expand(3, 2, 64, 64)  # all queries look at pixel 0 alone
MAPS = (3 * torch.randn([3, 2, 64, 64], generator=torch.Generator().manual_seed(2), dtype=torch.float64)).softmax(3)


@dataclass(frozen=True)
class Attentive(Flat):
    """A network whose attention is the same for every x."""

    def __call__(self, x, sigma, labels=None, *, return_attention=(), **edits):
        D = self.inner(x, sigma, labels)
        return (D, dict.fromkeys(return_attention, MAPS)) if return_attention else D


def sag_step(net, x, sigma, sigma_next, guide_scale, blur_sigma, clamp):
    """A DDIM step as Hong et al. take it, with noise predictions at two inputs combined; `x` is not yet theirs."""
    x_vp = authors.to_vp(x, sigma)
    noise = authors.predicted_noise(net, x_vp, sigma)
    image = authors.predicted_image(x_vp, noise, sigma)
    if clamp:
        image = image.clamp(-1, 1)
    mask = (MAPS.mean(dim=1).sum(dim=1) > 1.0).double().reshape(-1, 1, 8, 8)
    mask = mask.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    soft = mask * blur(image, blur_sigma, 31) + (1 - mask) * image
    a = authors.alpha_bar(sigma)
    degraded = a.sqrt() * soft + (1 - a).sqrt() * noise
    noise_degraded = authors.predicted_noise(net, degraded, sigma)
    combined = noise_degraded + guide_scale * (noise - noise_degraded)
    return authors.ddim(x_vp, combined, sigma, sigma_next), authors.ddim(x_vp, noise, sigma, sigma_next)


@pytest.mark.parametrize("clamp", ["no", "yes"])
@pytest.mark.parametrize("blur_sigma", [1.0, 9.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_a_step_is_the_authors_own(sigma, sigma_next, blur_sigma, clamp):
    generator = torch.Generator().manual_seed(3)
    net = Attentive(Mixture(torch.randn([3, 2, 16, 16], generator=generator, dtype=torch.float64), 0.3))
    x = net.inner.means + sigma * X.double()
    choice = Choice("sag", 1.5, options={"sag_blur": blur_sigma, "sag_clamp": clamp})
    ours = euler(guide(choice, Parts(net)), x / sigma, torch.tensor([sigma, sigma_next], dtype=torch.float64))
    theirs, plain = sag_step(net.inner, x, sigma, sigma_next, 1.5, blur_sigma, clamp == "yes")
    authors.assert_same_displacement(ours, theirs, x, sigma_next)
    # and what guidance adds to the step, which is small, points their way
    unguided = authors.from_vp(plain, sigma_next)
    push, their_push = ours - unguided, authors.from_vp(theirs, sigma_next) - unguided
    assert their_push.norm() > 0
    torch.testing.assert_close(push / their_push.norm(), their_push / their_push.norm(), atol=1e-6, rtol=0)


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


@pytest.mark.parametrize(("image", "pixel", "rows", "columns"), [((32, 8), 5, 2, 2), ((8, 32), 18, 2, 4)])
def test_the_mask_of_an_image_that_is_not_square(image, pixel, rows, columns):
    # 16x4 tokens are as many as 8x8; token 5 is in row 1 and column 1 of 4, token 18 in row 1 and column 2 of 16
    mask = attended(torch.eye(64)[pixel].expand(3, 2, 64, 64), *image)
    assert mask.shape == (3, 1, *image)
    assert mask[:, :, rows : rows + 2, columns : columns + 2].min() == 1
    assert mask.sum() == 3 * 4


def test_of_a_linear_denoiser_it_is_a_blur():
    # D - D_neg = sigma^2 / (v + sigma^2) * (blurred D - D), where the mask is: with w > 1, guidance blurs
    D = NET(X, SIGMA)
    mask = attended(EVERYWHERE, 16, 16)
    blurred = torch.where(mask > 0, blur(D, 1.0, 31), D)
    D_neg = SelfAttentionBlur(NET, "dec.8x8_block0", 1.0).derive(
        D, {"dec.8x8_block0": EVERYWHERE}, Evaluation(X, SIGMA)
    )
    torch.testing.assert_close(D - D_neg, SIGMA**2 / (V + SIGMA**2) * (blurred - D), atol=1e-5, rtol=1e-5)
    assert (D_neg - D).abs().max() > 0.1


def test_attention_everywhere_makes_it_blur_guidance():
    D, everywhere = NET(X, SIGMA), torch.full([3, 2, 64, 64], 2 / 64)
    assert attended(everywhere, 16, 16).min() == 1
    D_neg = SelfAttentionBlur(NET, "b", 1.5).derive(D, {"b": everywhere}, Evaluation(X, SIGMA))
    change = blur(D, 1.5, 31) - D
    assert torch.equal(D_neg, NET(X + change, SIGMA) - change)


def test_the_blur_has_31_taps_or_as_many_as_fit():
    # the authors' 31 taps cut a deviation of 9 pixels off at 7.3
    impulse = torch.zeros([1, 1, 101, 101], dtype=torch.float64)
    impulse[..., 50, 50] = 1
    row = blur(impulse, 9.0, 31)[0, 0].sum(dim=0)
    offsets = torch.arange(101) - 50
    assert (row * offsets**2).sum().sqrt().item() == pytest.approx(7.3, abs=0.05)
    small = torch.randn([3, 2, 8, 8], generator=torch.Generator().manual_seed(4))
    for taps, limited in ((31, 15), (5, 5)):
        at = Evaluation(small, SIGMA)
        D_neg = SelfAttentionBlur(NET, "b", 1.5, taps).derive(small, {"b": EVERYWHERE}, at)
        assert torch.equal(D_neg, SelfAttentionBlur(NET, "b", 1.5, limited).derive(small, {"b": EVERYWHERE}, at))


@pytest.mark.parametrize("text", ["30", "0", "wide"])
def test_taps_are_odd_numbers(text):
    taps = {option.name: option for option in METHOD.options}["sag-taps"]
    assert taps.parse("9") == 9
    with pytest.raises(ValueError, match="number"):
        taps.parse(text)


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
