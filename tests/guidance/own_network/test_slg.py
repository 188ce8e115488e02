import pytest
import torch

from edm2kit.denoiser import AttentionRole
from edm2kit.guidance.own_network.slg import published_depth
from edm2kit.guidance.registry import Choice, Parts, guide
from tests.support import golden
from tests.support.rule_spaces import LEVELS, NoiseSpace, Point

ARRAYS = golden.load("network_cond.npz")
X, LABELS = ARRAYS["x"], ARRAYS["labels"]


@pytest.fixture(scope="module")
def net():
    return golden.network("cond", golden.part(ARRAYS, "state/")).requires_grad_(False)


def without_branches(net, name):
    """The same network with a block whose convolutions and attention add nothing, made by changing its weights."""
    copy = golden.network("cond", golden.part(ARRAYS, "state/")).requires_grad_(False)
    side, block = name.split(".")
    module = getattr(copy.unet, side)[block]
    for convolution in (module.conv_res1, module.attn_proj):
        # an MPConv normalises its weights, so zero weights stay zero
        convolution.weight.zero_()
    return copy


@pytest.mark.parametrize("block", ["enc.8x8_block0", "dec.8x8_in0"])
def test_the_authors_step_with_a_network_that_lacks_the_block(net, block):
    # noise predictions: e + s (e - e_skip), s = 2.8
    lacking = without_branches(net, block)
    guided = guide(Choice("slg", 3.8, options={"slg_blocks": (block,)}), Parts(net))
    space = NoiseSpace()
    for sigma in LEVELS:
        point = at(sigma)
        e, e_skip = (
            space.prediction(f(point.x.float(), torch.tensor(sigma), LABELS).double(), point) for f in (net, lacking)
        )
        theirs = space.step(e + 2.8 * (e - e_skip), point)
        ours = point.our_step(guided(point.x.float(), torch.tensor(sigma), LABELS).double())
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()  # one batch or two, in float32


def at(sigma):
    class ImagePoint(Point):
        x = X.double() * sigma

    return ImagePoint(sigma)


def roles(count):
    return type("Net", (), {"attention_roles": {f"block{k}": AttentionRole("middle", 8, k) for k in range(count)}})()


@pytest.mark.parametrize(("count", "expected"), [(24, [7, 8, 9]), (12, [3, 4]), (3, [1]), (1, [0])])
def test_default_blocks_are_as_deep_as_published(count, expected):
    assert published_depth(roles(count)) == tuple(f"block{k}" for k in expected)


def test_an_unknown_block_is_refused(net):
    with pytest.raises(ValueError, match="is not an attention block of this network; available"):
        guide(Choice("slg", 2.0, options={"slg_blocks": ("block7",)}), Parts(net))
