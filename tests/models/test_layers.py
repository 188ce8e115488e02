"""The magnitude-preserving layers."""

import pytest
import torch

from edm2kit.models import layers
from edm2kit.models.layers import convolve, mp_cat, mp_silu, mp_sum, normalize


def test_primitives_preserve_magnitude():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, n, 16, 16, generator=generator) for n in (32, 96))
    for y in (mp_silu(a), mp_sum(a, b[:, :32], 0.3), mp_cat(a, b, 0.3), normalize(a * 7)):
        assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.01)
    # both inputs of a concatenation contribute by their balance, whatever their width
    y = mp_cat(a, b, 0.5)
    assert (y[:, :32].square().sum() / y[:, 32:].square().sum()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("side", [8, 64])
def test_convolutions_have_the_gradients_of_torch_whatever_the_size(side):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, side, side, requires_grad=True), torch.randn(4, 5, 3, 3, requires_grad=True)
    factor = torch.randn(2, 4, side, side)
    last = [part.detach().to(memory_format=torch.channels_last).requires_grad_() for part in (x, weight)]
    (torch.nn.functional.conv2d(x, weight, padding=1) * factor).sum().backward()
    (convolve(*last) * factor).sum().backward()
    for found, expected in zip(last, (x, weight), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-4 * float(expected.grad.abs().max()))
    assert convolve(last[0][:0], last[1]).shape == (0, 4, side, side)
    frozen = last[0].detach().requires_grad_()
    (convolve(frozen, weight.detach()) * factor).sum().backward()  # a loss that guides asks for this
    assert torch.allclose(frozen.grad, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "dims", "magnitude"), [([6, 4, 3, 3], None, 0.2), ([2, 5, 3, 2, 8], [4], 1.0)])
def test_the_form_of_normalize_for_gpus_is_the_same_function(shape, dims, magnitude):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[0] = 0  # a zero vector stays zero, and its gradient is finite
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = []
    for compute in (layers.normalize, lambda *args: layers._Normalized.apply(*args)[0]):
        leaf = x.clone().requires_grad_()
        y = compute(leaf, dims or [1, 2, 3], 1e-4, magnitude)
        y.backward(grad)
        found += [y.detach(), leaf.grad]
    assert torch.allclose(found[0], found[2], rtol=1e-6, atol=1e-7)
    assert torch.allclose(found[1], found[3], rtol=1e-5, atol=1e-5 * found[1].abs().max().item())


def test_the_form_of_normalize_for_gpus_compiles_as_one_graph():
    x = torch.ones(4, 8, requires_grad=True)
    compiled = torch.compile(lambda x: layers._Normalized.apply(x, [1], 1e-4, 1.0)[0], backend="eager", fullgraph=True)
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("limit", [256.0, 255.7, 255.999, 1.0, 0.3])
def test_clipping_and_its_gradient_are_those_of_torch_to_the_last_bit(dtype, limit):
    generator = torch.Generator().manual_seed(0)
    at = torch.tensor(limit, dtype=dtype)
    number = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    around = torch.stack([(at.view(number) + k).view(dtype) for k in range(-3, 4)])  # the next ones on either side
    x = torch.cat([around, -around, torch.tensor([0, torch.inf, -torch.inf], dtype=dtype)])
    x = torch.cat([x, (limit * torch.randn(200, generator=generator)).to(dtype)])
    grad, found = torch.randn(len(x), generator=generator).to(dtype), []
    for compute in (layers.clip, lambda x, limit: x.clamp(-limit, limit)):
        leaf = x.clone().requires_grad_()
        y = compute(leaf, limit)
        y.backward(grad)
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert 0 < (found[0][1] == 0).sum() < len(x)


def test_clipping_compiles_as_one_graph():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    torch.compile(lambda x: layers.clip(x, 2.0), backend="eager", fullgraph=True)(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0]
