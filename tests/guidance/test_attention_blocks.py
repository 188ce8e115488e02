import pytest
import torch

from edm2kit.denoiser import AttentionRole
from edm2kit.guidance.attention_blocks import (
    checked,
    deep_encoder,
    last_at_lowest_resolution,
    middle,
    parse_blocks,
    size_divisor,
)
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.snapshots.loading import load_snapshot
from tests.support.fakes import CountingNetwork, tiny_snapshot


class Interior:
    """A network with these roles and edits, given as "name: side resolution"."""

    label_dim = 0

    def __init__(self, *blocks, edits=("attention", "return_attention", "embedding", "dropout")):
        self.supported_edits = frozenset(edits)
        self.attention_roles = {}
        for depth, block in enumerate(blocks):
            name, side, resolution = block.split()
            self.attention_roles[name] = AttentionRole(side, int(resolution), depth)
        self.calls = 0

    def __call__(self, x, sigma, condition=None, /, **edits):
        self.calls += 1
        return x


U_NET = Interior(
    "e0 encoder 16", "e1 encoder 16", "e2 encoder 8", "e3 encoder 8", "m middle 8", "d0 decoder 8", "d1 decoder 16"
)
TRANSFORMER = Interior("b0 encoder 4", "b1 encoder 4", "b2 middle 4", "b3 decoder 4")


def test_blocks_are_found_by_their_role():
    assert deep_encoder(U_NET) == ("e1", "e2", "e3", "m")
    assert middle(U_NET) == ("m",)
    assert last_at_lowest_resolution(U_NET) == ("d0",)
    assert deep_encoder(TRANSFORMER) == ("b0", "b1", "b2")
    assert last_at_lowest_resolution(TRANSFORMER) == ("b3",)
    assert deep_encoder(Interior("d decoder 8")) == ()


def test_sizes_are_a_multiple_of_what_the_network_downsamples():
    assert size_divisor(U_NET, 64) == 8
    assert size_divisor(TRANSFORMER, 8) == 2
    made_for_64 = Interior("b middle 8")
    made_for_64.img_resolution = 64
    assert size_divisor(made_for_64, 32) == 8
    assert size_divisor(Interior(), 64) == 1
    assert size_divisor(lambda x, sigma: x, 64) == 1


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("auto", None),
        ("none", ()),
        ("dec.8x8_in0, enc.8x8_block0", ("dec.8x8_in0", "enc.8x8_block0")),
        ("block0,block11", ("block0", "block11")),
    ],
)
def test_lists_of_blocks(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["middle", "", "dec.8x8_in0,", "a b0"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="is not a list of blocks"):
        parse_blocks(text)


def test_a_block_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="'x' is not an attention block of this network; available: e0, e1"):
        checked(U_NET, ("e0", "x"))


@pytest.mark.parametrize(
    ("name", "net", "wrong"),
    [
        ("pag", Interior(), "acts on attention blocks, and this Interior has none"),
        ("seg", Interior(), "acts on attention blocks, and this Interior has none"),
        ("sag", Interior(), "acts on attention blocks, and this Interior has none"),
        ("pag", Interior("b middle 4", edits=()), "supports the edit attention; this one supports: none"),
        ("seg", Interior("b middle 4", edits=["dropout"]), "supports the edit attention; this one supports: dropout"),
        ("sag", Interior("b middle 4", edits=["attention"]), "supports the edit return_attention"),
        ("tsg", Interior("b middle 4", edits=["attention"]), "supports the edit embedding"),
        ("dropout", Interior("b middle 4", edits=["attention"]), "supports the edit dropout"),
        ("pag", Interior("b decoder 4"), "this one has none there. Name blocks with --pag-blocks"),
        ("seg", Interior("b decoder 4"), "this one has none there. Name blocks with --seg-blocks"),
    ],
)
def test_a_network_without_what_a_method_needs_is_refused_before_any_work(name, net, wrong):
    with pytest.raises(ValueError, match=wrong) as refused:
        guide(Choice(name, 2.0), Parts(net))
    assert net.calls == 0
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["pag", "seg", "sag", "tsg", "dropout"])
def test_a_plain_function_is_refused_before_any_work(name):
    calls = []

    def function(x, sigma, condition=None):
        calls.append(x)
        return x

    with pytest.raises(ValueError, match="changes the interior of a network, and a function is not a network"):
        guide(Choice(name, 2.0), Parts(function))
    assert calls == []


def test_a_network_without_attention_levels_still_has_its_middle(tmp_path):
    net = CountingNetwork(load_snapshot(tiny_snapshot(tmp_path / "net", attn_resolutions=[])).net)
    x = torch.randn([2, 3, 8, 8], generator=torch.Generator().manual_seed(0))
    labels = torch.eye(4)[:2]
    for name in ("pag", "seg", "sag"):
        guided = guide(Choice(name, 3.0), Parts(net))(x, torch.tensor(1.0), labels)
        assert not torch.equal(guided, net(x, torch.tensor(1.0), labels))
