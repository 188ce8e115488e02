"""Precisions inside a network by name, and a warning if one is slow on this machine."""

import platform

import torch

# the names that command lines, configs and records use
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# dtype -> functions of torch.cpu that report fast instructions for it; older versions of torch lack some of them
_FAST_IF = {
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


def resolve_precision(name: str, device: torch.device) -> str:
    """The key of PRECISIONS that `name` means on `device`: "auto" is fp16 on a CUDA device and fp32 elsewhere."""
    if name != "auto":
        return name
    return "fp16" if device.type == "cuda" else "fp32"


def slow_precision(dtype: torch.dtype, device: torch.device | str = "cpu") -> str | None:
    """Why `dtype` is slower than float32 on `device`, or None if it is not (as far as is known)."""
    if torch.device(device).type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if dtype not in _FAST_IF:
        return None
    for function in _FAST_IF[dtype]:
        if getattr(torch.cpu, function, lambda: False)():
            return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {name}, which makes it many times slower than float32; use fp32"
