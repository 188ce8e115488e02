"""The networks against reference outputs, and what their arguments promise."""

import copy

import pytest
import torch

from edm2kit.models import Precond, normalize_weights_
from edm2kit.models.layers import MPConv
from tests.support import golden
from tests.support.memory import PeakBytes


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_outputs_equal_reference(name):
    arrays = golden.load(f"network_{name}.npz")
    net = golden.network(name, golden.part(arrays, "state/"))
    labels = arrays.get("labels")
    with torch.no_grad():
        D, logvar = net(arrays["x"], arrays["sigma"], labels, return_logvar=True)
        golden.assert_close(D, arrays["D"], 1e-5)
        golden.assert_close(logvar, arrays["logvar"], 1e-5)
        golden.assert_close(net(arrays["x"], torch.tensor(1.7), labels), arrays["D_scalar_sigma"], 1e-5)
        if "D_no_label" in arrays:
            golden.assert_close(net(arrays["x"], arrays["sigma"], None), arrays["D_no_label"], 1e-5)


def test_unconditional_net_ignores_labels():
    arrays = golden.load("network_uncond.npz")
    net = golden.network("uncond", golden.part(arrays, "state/"))
    with torch.no_grad():
        assert torch.equal(net(arrays["x"], 1.0, torch.ones(3, 7)), net(arrays["x"], 1.0))


def conditional_net() -> tuple[Precond, torch.Tensor, torch.Tensor]:
    arrays = golden.load("network_cond.npz")
    return golden.network("cond", golden.part(arrays, "state/")), arrays["x"], arrays["labels"]


def test_forward_writes_no_parameter_even_in_training():
    net, x, labels = conditional_net()
    before = copy.deepcopy(net.state_dict())
    net.train()(x, torch.ones(3), labels)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32_and_returns_float32(dtype):
    net, x, labels = conditional_net()
    with torch.no_grad():
        exact = net(x, 1.0, labels)
        net.compute_dtype = dtype
        rough = net(x, 1.0, labels)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


def test_attention_maps_are_returned_and_do_not_change_the_output():
    net, x, labels = conditional_net()
    roles = {name: (role.side, role.resolution, role.depth) for name, role in net.attention_roles.items()}
    assert roles == {
        "enc.8x8_block0": ("encoder", 8, 0),
        "dec.8x8_in0": ("middle", 8, 1),
        "dec.8x8_block0": ("decoder", 8, 2),
        "dec.8x8_block1": ("decoder", 8, 3),
    }
    names = net.attention_blocks
    assert names == ["enc.8x8_block0", "dec.8x8_in0", "dec.8x8_block0", "dec.8x8_block1"]
    with torch.no_grad():
        plain = net(x, 1.0, labels)
        D, maps = net(x, 1.0, labels, return_attention=names)
    torch.testing.assert_close(D, plain, atol=1e-5, rtol=1e-5)
    assert {name: list(m.shape) for name, m in maps.items()} == {key: [3, 2, 64, 64] for key in names}
    torch.testing.assert_close(maps[names[0]].sum(dim=3), torch.ones(3, 2, 64))


def test_attention_edit_replaces_what_it_names_only():
    net, x, labels = conditional_net()
    softmax = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        plain = net(x, 1.0, labels)
        assert torch.equal(net(x, 1.0, labels, attention={"dec.8x8_in0": softmax}), plain)
        assert torch.equal(net(x, 1.0, labels, attention={}), plain)
        assert not torch.equal(net(x, 1.0, labels, attention={"dec.8x8_in0": lambda q, k, v: v}), plain)
        assert torch.equal(net(x, 1.0, labels, embedding=lambda emb: emb), plain)
        assert not torch.equal(net(x, 1.0, labels, embedding=lambda emb: emb * 1.1), plain)


@pytest.mark.parametrize("name", ["dec.8x8_in1", "8x8_in0", "enc.16x16_block0"])
def test_edit_of_a_block_without_attention_is_refused(name):
    net, x, labels = conditional_net()
    with pytest.raises(ValueError, match=r"no attention.*dec\.8x8_in0"):
        net(x, 1.0, labels, return_attention=[name])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="channels_per_head"):
        Precond(16, 3, 0, model_channels=48, channel_mult=[1, 2])
    with pytest.raises(ValueError, match="cannot be halved 3 times"):
        Precond(20, 3, 0, model_channels=64)
    with pytest.raises(ValueError, match="channel_mult is empty; it needs one number for each level"):
        Precond(16, 3, 0, model_channels=64, channel_mult=[])
    with pytest.raises(TypeError, match="model_chanels"):
        Precond(16, 3, 0, model_chanels=64)
    net, x, labels = conditional_net()
    with pytest.raises(ValueError, match=r"expected \[3, 4\]"):
        net(x, 1.0, labels[:, :2])


def test_published_parameter_counts():
    # specs: parameters of the ImageNet-512 networks, in millions
    with torch.device("meta"):
        sizes = {c: Precond(64, 4, 1000, model_channels=c) for c in (64, 128, 192)}
    millions = {c: sum(p.numel() for p in net.parameters()) / 1e6 for c, net in sizes.items()}
    assert millions == pytest.approx({64: 31.3, 128: 124.7, 192: 280.2}, abs=0.06)


def test_dropout_of_the_caller_s_own_making_takes_the_place_of_the_block_s():
    net, x, labels = conditional_net()
    seen = []

    def half(name, y):
        seen.append((name, list(y.shape)))
        return y / 2

    with torch.no_grad():
        plain = net(x, 1.0, labels)
        assert torch.equal(net(x, 1.0, labels, dropout=lambda name, y: y), plain)
        assert not torch.equal(net(x, 1.0, labels, dropout=half), plain)
    blocks = [f"{side}.{name}" for side in ("enc", "dec") for name in getattr(net.unet, side) if "conv" not in name]
    assert [name for name, _ in seen] == blocks
    assert seen[0] == ("enc.16x16_block0", [3, 8, 16, 16])


def gradient_by_input(net, x, labels, **edits):
    leaf = x.clone().requires_grad_()
    D = net(leaf, torch.tensor(0.7), labels, **edits)
    return torch.autograd.grad(D.square().sum(), leaf)[0]


@pytest.mark.parametrize("block", ["enc.8x8_block0", "dec.8x8_in0"])
def test_a_skipped_block_adds_nothing_to_its_input(block):
    net, x, labels = conditional_net()
    without = copy.deepcopy(net)
    side, name = block.split(".")
    module = getattr(without.unet, side)[name]
    with torch.no_grad():
        for convolution in (module.conv_res1, module.attn_proj):
            convolution.weight.zero_()  # its weights are normalised, so zero stays zero
        plain, skipped = net(x, 1.0, labels), without(x, 1.0, labels)
        D = net(x, 1.0, labels, skip={block: torch.tensor([True, False, True])})
        assert torch.equal(D[1], plain[1])
        torch.testing.assert_close(D[[0, 2]], skipped[[0, 2]])
        assert not torch.allclose(D, plain, atol=1e-4)
        with pytest.raises(ValueError, match="no attention in a block called 'block9'"):
            net(x, 1.0, labels, skip={"block9": torch.tensor([True])})


def test_recomputing_blocks_changes_no_gradient():
    net, x, labels = conditional_net()
    net.eval().requires_grad_(False)
    block = net.attention_blocks[0]
    for edits in ({}, {"attention": {block: lambda q, k, v: v}}, {"embedding": lambda emb: 2 * emb}):
        net.unet.recompute = False
        held = gradient_by_input(net, x, labels, **edits)
        net.unet.recompute = True
        assert torch.equal(gradient_by_input(net, x, labels, **edits), held)


def test_what_an_edit_draws_is_not_drawn_again():
    net, x, labels = conditional_net()
    net.eval().requires_grad_(False)
    calls = []

    def noted(name, y):
        calls.append(name)
        return y

    gradient_by_input(net, x, labels, dropout=noted)
    assert len(calls) == len(set(calls))


def test_a_gradient_by_one_image_fits_where_four_images_are_sampled():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Precond(32, 3, 0, model_channels=16, channels_per_head=16, num_blocks=3).eval().requires_grad_(False)
    with torch.no_grad(), PeakBytes() as plain:
        net(torch.randn(4, 3, 32, 32), torch.tensor(1.0))
    with PeakBytes() as guided:
        gradient_by_input(net, torch.randn(1, 3, 32, 32), None)
    net.unet.recompute = False
    with PeakBytes() as held:
        gradient_by_input(net, torch.randn(1, 3, 32, 32), None)
    assert guided.peak < plain.peak < held.peak


def test_the_account_of_memory_is_right():
    with PeakBytes() as memory:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b.reshape(10, 100) * 2
        del b
        torch.ones(500)
    assert memory.peak == 8000
    assert c.numel() == 1000


def test_normalize_weights_gives_unit_filters_and_the_same_outputs():
    net, x, labels = conditional_net()
    with torch.no_grad():
        before = net(x, 1.0, labels)
        normalize_weights_(net)
        torch.testing.assert_close(net(x, 1.0, labels), before, atol=2e-3, rtol=0)
    for module in net.modules():
        if isinstance(module, MPConv):
            rms = module.weight.square().mean(dim=list(range(1, module.weight.ndim))).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-3, rtol=0)
