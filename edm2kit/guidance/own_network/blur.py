"""Gaussian blur with reflected borders, as SAG and SEG use it."""

import math

import torch


def kernel_size(sigma: float) -> int:
    """Taps of the kernel of a Gaussian with standard deviation `sigma` pixels: about six deviations, odd."""
    size = math.ceil(6 * sigma)
    return size + 1 - size % 2


def blur(maps: torch.Tensor, sigma: float, kernel: int) -> torch.Tensor:
    """`maps` [N, C, H, W] blurred by a separable Gaussian of `kernel` taps (odd) that sum to 1, reflected at the edges.

    Raises ValueError if the kernel is even, or reaches farther than the reflection.
    """
    if kernel % 2 == 0 or kernel // 2 >= min(maps.shape[2:]):
        raise ValueError(
            f"a blur of {kernel} taps on {maps.shape[2]}x{maps.shape[3]} pixels; expected an odd number of taps, "
            "less than twice the image"
        )
    offsets = torch.arange(kernel, dtype=maps.dtype, device=maps.device) - kernel // 2
    taps = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    padded = torch.nn.functional.pad(maps, [kernel // 2] * 4, mode="reflect")
    rows = torch.nn.functional.conv2d(padded.flatten(0, 1)[:, None], taps.reshape(1, 1, 1, -1))
    return torch.nn.functional.conv2d(rows, taps.reshape(1, 1, -1, 1)).reshape(maps.shape)
