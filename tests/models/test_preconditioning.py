"""EDM2's preconditioning around a raw network of one's own."""

import platform

import pytest
import torch

from edm2kit.conditions import FloatVectors
from edm2kit.models import Edits, Preconditioner, RawNetwork
from edm2kit.models.preconditioning import attention, resolve_precision, slow_precision


class Shifted(RawNetwork):
    """F = x plus the sum of the labels; has no attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, c_noise, labels, edits):
        self.seen.append((c_noise, labels))
        return x if labels is None else x + labels.sum(dim=1)[:, None, None, None]


def test_the_coefficients_are_those_of_edm():
    raw = Shifted()
    net = Preconditioner(raw, 2, 1, 0, sigma_data=0.5)
    x = torch.randn(3, 1, 2, 2)
    sigma = torch.tensor([0.1, 0.5, 20.0])
    s = sigma[:, None, None, None]
    # Karras et al. 2022, Table 1
    expected = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * (x / (s**2 + 0.25).sqrt())
    torch.testing.assert_close(net(x, sigma), expected)
    torch.testing.assert_close(raw.seen[0][0], sigma.log() / 4)
    assert net.raw is raw
    D, logvar = net(x, sigma, return_logvar=True)
    assert (list(D.shape), list(logvar.shape)) == ([3, 1, 2, 2], [3, 1, 1, 1])


def test_labels_may_be_a_tensor_a_condition_or_none():
    net = Preconditioner(Shifted(), 2, 1, 3)
    x, vectors = torch.randn(2, 1, 2, 2), torch.randn(2, 3)
    assert torch.equal(net(x, 1.0, FloatVectors(vectors)), net(x, 1.0, vectors))
    assert torch.equal(net(x, 1.0, None), net(x, 1.0, torch.zeros(2, 3)))
    with pytest.raises(ValueError, match=r"labels have shape \[2, 2\]; expected \[2, 3\]"):
        net(x, 1.0, vectors[:, :2])


def test_a_network_without_an_interior_refuses_edits():
    net = Preconditioner(Shifted(), 2, 1, 0)
    assert (net.attention_blocks, net.attention_roles, net.supported_edits) == ([], {}, frozenset())
    x = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="a Shifted network does not support the edit 'embedding'; it supports: none"):
        net(x, 1.0, embedding=lambda emb: emb)
    with pytest.raises(ValueError, match="'return_attention'"):
        net(x, 1.0, return_attention=["block0"])
    with pytest.raises(ValueError, match="a Shifted network cannot recompute activations; train without --recompute"):
        net.recompute_in_training_()


def test_edits_are_false_if_there_are_none():
    assert not Edits()
    assert Edits(return_attention=["a"])
    assert Edits(embedding=lambda emb: emb)


# ---- precision inside the network


@pytest.fixture
def cpu(monkeypatch):
    """A CPU of the x86 kind with the instruction sets named."""

    def pretend(*sets):
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in sets, raising=False)

    return pretend


def test_a_cpu_without_the_instructions_is_warned_of(cpu):
    cpu()
    assert "no instructions for bfloat16" in slow_precision(torch.bfloat16)
    assert "no instructions for float16" in slow_precision(torch.float16)
    assert slow_precision(torch.float32) is None


@pytest.mark.parametrize("name", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_a_cpu_with_them_is_not(cpu, name):
    cpu(name)
    assert slow_precision(torch.bfloat16) is None
    assert slow_precision(torch.float16) is not None


def test_accelerators_and_unknown_machines_are_not(cpu, monkeypatch):
    cpu()
    assert slow_precision(torch.float16, "cuda") is None
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert slow_precision(torch.float16) is None


def test_auto_is_half_precision_on_a_gpu_only():
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_bfloat16_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Tesla T4 has no instructions for bfloat16" in slow_precision(torch.bfloat16, "cuda:0")
    assert slow_precision(torch.float16, "cuda:0") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert slow_precision(torch.bfloat16, "cuda:0") is None


@pytest.mark.parametrize("tokens", [16, 256, 600])
def test_attention_in_bfloat16_is_that_of_float32_up_to_rounding(tokens):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 2, tokens, 8, generator=generator, requires_grad=True) for _ in range(3)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected, found = attention(*exact), attention(*half)
    assert found.dtype == torch.bfloat16
    expected.square().sum().backward()
    found.float().square().sum().backward()
    for one, other in zip((expected, *[x.grad for x in exact]), (found, *[x.grad for x in half]), strict=True):
        assert (other.float() - one).norm() < 0.02 * one.norm()
    assert torch.equal(expected, torch.nn.functional.scaled_dot_product_attention(*exact))
