"""What half precision costs on the machine at hand."""

import platform

import torch

# dtype -> the questions to torch.cpu, one of which must be answered with yes; older versions do not know all of them
_INSTRUCTIONS = {
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


def slow_precision(dtype: torch.dtype, device: torch.device | str = "cpu") -> str | None:
    """Why computing in `dtype` would be slower than in float32 on `device`; None where it is not, as far as known."""
    if (
        torch.device(device).type != "cpu"
        or dtype not in _INSTRUCTIONS
        or platform.machine() not in ("x86_64", "AMD64")
    ):
        return None
    if any(getattr(torch.cpu, name, lambda: False)() for name in _INSTRUCTIONS[dtype]):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {name} and takes many times as long as in float32; --precision fp32"
