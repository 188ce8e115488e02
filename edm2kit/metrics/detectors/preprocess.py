"""Preparing uint8 images for a detector: grey to RGB, and the three resizes that published metrics use."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Repeat grey to three channels: uint8 [N, 1 or 3, H, W] -> uint8 [N, 3, H, W].

    Raises ValueError for another dtype, rank or number of channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"a detector takes uint8 images [N, 1 or 3, H, W]; got {images.dtype} of shape {list(images.shape)}"
        )
    return images.expand(-1, 3, -1, -1)


def resize_bilinear_tf1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize as in TensorFlow 1, float32 [N, C, H, W] -> [N, C, size, size].

    Output pixel i is read at coordinate i * (in / size): no half-pixel shift, no antialiasing, edges clamped.
    """
    rows_from, rows_to, row_weight = _taps_tf1(images.shape[2], size, images.device)
    images = torch.lerp(images[:, :, rows_from], images[:, :, rows_to], row_weight[:, None])
    columns_from, columns_to, column_weight = _taps_tf1(images.shape[3], size, images.device)
    return torch.lerp(images[:, :, :, columns_from], images[:, :, :, columns_to], column_weight)


def _taps_tf1(source: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    position = torch.arange(size, dtype=torch.float32) * (source / size)
    low = position.floor()
    high = (low + 1).clamp(max=source - 1)
    return low.long().to(device), high.long().to(device), (position - low).to(device)


def resize_bicubic(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bicubic antialiased resize in PyTorch, uint8 [N, C, H, W] -> float32 [N, C, size, size]; overshoot is kept."""
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def resize_bicubic_pil(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bicubic resize in Pillow, image by image: uint8 [N, 3, H, W] -> float32 [N, 3, size, size], rounded to 0..255."""
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in pixels]
    stacked = np.stack(resized) if resized else np.empty((0, size, size, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(images.device, torch.float32)
