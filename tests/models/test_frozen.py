"""Frozen networks answer as before: compared with golden values, the plain path, and under every edit of a call."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.utils
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import PlainNetwork
from edm2kit.guidance.losses.gradient import slope
from edm2kit.guidance.losses.restoration import InpaintingOperator, Measurement
from edm2kit.guidance.network_call import NetworkCall, in_one_call
from edm2kit.models import compile_, freeze_, layers
from edm2kit.models.edm2 import Precond
from edm2kit.sampling.solvers import edm_sampler
from tests.support import golden
from tests.support.memory import PeakBytes

LEVELS = [0.002, 0.02, 0.3, 1.0, 7.0, 80.0]


def pair(name: str = "cond") -> tuple[Precond, Precond, torch.Tensor, torch.Tensor | None]:
    """The golden network as it was and frozen, with its input and labels."""
    arrays = golden.load(f"network_{name}.npz")
    state = golden.part(arrays, "state/")
    live = golden.network(name, state).requires_grad_(False)
    return live, freeze_(golden.network(name, state)), arrays["x"], arrays.get("labels")


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_frozen_outputs_equal_reference(name):
    arrays = golden.load(f"network_{name}.npz")
    _, net, x, labels = pair(name)
    with torch.no_grad():
        D, logvar = net(x, arrays["sigma"], labels, return_logvar=True)
        golden.assert_close(D, arrays["D"], 1e-5)
        golden.assert_close(logvar, arrays["logvar"], 1e-5)
        golden.assert_close(net(x, torch.tensor(1.7), labels), arrays["D_scalar_sigma"], 1e-5)
        if "D_no_label" in arrays:
            golden.assert_close(net(x, arrays["sigma"], None), arrays["D_no_label"], 1e-5)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_folded_constants_cost_no_exactness_at_any_noise_level(name, sigma):
    arrays = golden.load(f"network_{name}.npz")
    plain = PlainNetwork(golden.architecture(name), golden.part(arrays, "state/"))
    _, net, x, labels = pair(name)
    noisy = x * sigma
    with torch.no_grad():
        golden.assert_close(net(noisy, sigma, labels), plain(noisy, sigma, labels), 1e-5)


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_whole_images_equal_the_plain_path_s(name):
    arrays = golden.load(f"network_{name}.npz")
    plain = PlainNetwork(golden.architecture(name), golden.part(arrays, "state/"))
    _, net, x, labels = pair(name)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    images = [edm_sampler(denoiser, noise, labels, num_steps=8) for denoiser in (plain, net)]
    torch.testing.assert_close(images[1], images[0], atol=1e-4, rtol=1e-4)


EDITS = {
    "attention": {"attention": {"dec.8x8_in0": lambda q, k, v: v, "enc.8x8_block0": lambda q, k, v: 2 * v + q}},
    "embedding": {"embedding": lambda emb: emb * 1.3},
    "dropout": {"dropout": lambda name, y: y * (y > 0)},
    "all": {
        "attention": {"dec.8x8_in0": lambda q, k, v: k},
        "embedding": lambda emb: -emb,
        "dropout": lambda name, y: y / 2,
    },
}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_edits_do_the_same_to_a_frozen_network(edits):
    live, frozen, x, labels = pair()
    with torch.no_grad():
        expected = live(x, 1.0, labels, **edits)
        assert not torch.allclose(live(x, 1.0, labels), expected, atol=1e-3)
        golden.assert_close(frozen(x, 1.0, labels, **edits), expected, 1e-5)


def test_attention_maps_and_names_are_the_same():
    live, frozen, x, labels = pair()
    names = live.attention_blocks
    assert frozen.attention_blocks == names
    with torch.no_grad():
        expected, actual = (net(x, 1.0, labels, return_attention=names)[1] for net in (live, frozen))
    assert list(actual) == names
    for name in names:
        golden.assert_close(actual[name], expected[name], 1e-5)


def test_a_batch_of_guided_calls_is_as_good_as_one_by_one():
    _, net, x, labels = pair()
    sigma = torch.tensor(1.0)
    calls = [
        NetworkCall(x, sigma, labels),
        NetworkCall(x, sigma, labels, EDITS["attention"]),
        NetworkCall(x, sigma, labels, EDITS["all"]),
    ]
    with torch.no_grad():
        together = in_one_call(net, calls)
        for call, D in zip(calls, together, strict=True):
            golden.assert_close(D, net(call.x, call.sigma, call.condition, **call.edits), 1e-5)


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_by_the_input_are_the_same(recompute):
    live, frozen, x, labels = pair()
    live.unet.recompute = frozen.unet.recompute = recompute
    loss = Measurement(InpaintingOperator(torch.ones(1, 16, 16)), torch.zeros(3, 16, 16), 0.7)
    found = [slope(net, loss, x, torch.tensor(0.7), labels) for net in (live, frozen)]
    assert found[0].gradient.abs().max() > 0.1
    golden.assert_close(found[1].D, found[0].D, 1e-5)
    golden.assert_close(
        found[1].gradient / found[0].gradient.abs().max(), found[0].gradient / found[0].gradient.abs().max(), 1e-5
    )


def test_evaluation_writes_into_nothing_it_was_given():
    for net in pair()[:2]:
        _, _, x, labels = pair()
        held = x.clone()
        with torch.no_grad():
            first = net(x, 1.0, labels)
            again = net(x, 1.0, labels)
        assert torch.equal(x, held)
        assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_at_least_as_exact_as_autocast(dtype):
    arrays = golden.load("network_cond.npz")
    live, _, x, labels = pair()
    half = golden.network("cond", golden.part(arrays, "state/"))
    half.compute_dtype = dtype
    freeze_(half)
    with torch.no_grad():
        for sigma in LEVELS:
            exact, rough = live(x * sigma, sigma, labels), half(x * sigma, sigma, labels)
            with torch.autocast("cpu", dtype):
                autocast = live(x * sigma, sigma, labels)
            assert rough.dtype == torch.float32
            # the margin covers the scatter between two ways to round
            assert (rough - exact).norm() <= 1.2 * (autocast - exact).norm()


def test_freezing_never_holds_a_second_copy():
    with torch.random.fork_rng(devices=[]), PeakBytes() as memory:
        torch.manual_seed(0)
        net = Precond(16, 3, 4, model_channels=32, channels_per_head=32, num_blocks=2)
        sizes = [p.numel() * 4 for p in net.parameters()]
        freeze_(net)
    assert memory.peak < sum(sizes) + 6 * max(sizes) < 1.5 * sum(sizes)
    held = sum(tensor.untyped_storage().nbytes() for tensor in [*net.parameters(), *net.buffers()])
    assert held == pytest.approx(sum(sizes), rel=0.01)


def test_a_frozen_network_cannot_be_taken_for_a_live_one():
    live, frozen, _, _ = pair()
    assert not any(name.endswith("weight") for name in frozen.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key|unexpected"):
        frozen.load_state_dict(live.state_dict())
    with pytest.raises(ValueError, match="already frozen"):
        freeze_(frozen)


def test_compiled_calls_answer_the_same_and_edited_ones_are_not_compiled():
    _, net, x, labels = pair()
    with torch.no_grad():
        plain = net(x, 1.0, labels)
        edited = net(x, 1.0, labels, **EDITS["attention"])
        compile_(net, backend="eager")
        assert torch.equal(net(x, 1.0, labels), plain)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert counted > 0
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch.equal(net(x, 1.0, labels, **EDITS["attention"]), edited)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(net(leaf, 1.0, labels).sum(), leaf)[0].abs().max() > 0.1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


WITH_ONEDNN = pytest.mark.skipif(not layers._ONEDNN, reason="this torch or this processor has no oneDNN")
DTYPES = [torch.float32, torch.bfloat16]


def images_for(layer, count, size):
    rows = torch.randn(count, layer.effective.shape[1], size, size, generator=torch.Generator().manual_seed(count))
    return rows.to(layer.effective.dtype).contiguous(memory_format=torch.channels_last)


def frozen_convolution(kernel, dtype=torch.float32):
    weight = torch.randn(24, 16, kernel, kernel, generator=torch.Generator().manual_seed(1)) / 10
    return layers.FrozenConv(weight.to(dtype).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_frozen_convolutions_compute_the_same_as_others_for_each_shape_in_turn(kernel, dtype):
    layer = frozen_convolution(kernel, dtype)
    shapes = [(2, 8), (3, 16), (1, 8), (5, 32), (2, 8)]
    found = [layer(images_for(layer, *shape)) for shape in shapes]
    for shape, answer in zip(shapes, found, strict=True):
        expected = layers.convolve(images_for(layer, *shape), layer.effective)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(answer, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(found[0], found[-1])


@WITH_ONEDNN
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_kept_weights_change_no_bit(kernel, dtype, monkeypatch):
    if dtype not in layers._ONEDNN:
        pytest.skip("this processor has no instructions for bfloat16")
    layer = frozen_convolution(kernel, dtype)
    for shape, layout in itertools.product([(1, 8), (2, 8), (3, 16)], [torch.channels_last, torch.contiguous_format]):
        x = images_for(layer, *shape).contiguous(memory_format=layout)
        kept = layer(x)
        assert layer._packed[0] == x.shape
        with monkeypatch.context() as patch:
            patch.setattr(layers, "_PACKED_PIXELS", 0)
            assert torch.equal(layer(x), kept)
        if dtype == torch.bfloat16:  # and none to what torch computes by itself
            assert torch.equal(layers.convolve(x, layer.effective), kept)


@WITH_ONEDNN
def test_weights_are_kept_reordered_for_small_batches_and_layers_only(monkeypatch):
    layer = frozen_convolution(3)
    layer(images_for(layer, 5, 32))  # the convolution itself takes the time
    assert layer._packed is None
    layer(images_for(layer, 2, 8))
    assert layer._packed is not None
    assert layer.to(torch.float64)(images_for(layer, 2, 8)).dtype == torch.float64
    assert layer._packed is None  # of the weight in another precision
    monkeypatch.setattr(layers, "_PACKED_WEIGHTS", 24 * 16 * 9 - 1)
    other = frozen_convolution(3)
    other(images_for(other, 2, 8))
    assert other._packed is None


def test_gradients_copies_and_counts_of_a_layer_that_keeps_its_reordered_weight():
    layer = frozen_convolution(3)
    x = images_for(layer, 2, 8)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
    (plain,) = torch.autograd.grad(layers.convolve(leaf, layer.effective).square().sum(), leaf)
    assert torch.equal(found, plain)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 24 * 16 * 9 * 64


@pytest.mark.parametrize("count", [1, 3])
def test_a_compiled_network_answers_to_the_last_bit_as_an_eager_one(count):
    _, net, x, labels = pair()
    x, labels = x[:1].repeat(count, 1, 1, 1), labels[:1].repeat(count, 1)
    with torch.no_grad():
        eager = net(x, 1.0, labels)
        assert torch.equal(compile_(net, backend="eager")(x, 1.0, labels), eager)
