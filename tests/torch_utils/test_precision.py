"""Half precision is warned of where it makes things slower, and there only."""

import platform

import pytest
import torch

from edm2kit.torch_utils.precision import resolve_precision, slow_precision


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
