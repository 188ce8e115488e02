"""Preparing uint8 images for a detector: grey to RGB, the resizes that published metrics use, and normalisation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from edm2kit.torch_utils.files import short

_MAX_FLOAT32 = float(np.finfo(np.float32).max)


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


def resize_pil(images: torch.Tensor, size: int, filter: Image.Resampling) -> torch.Tensor:
    """Resize in Pillow, image by image: uint8 [N, 3, H, W] -> float32 [N, 3, size, size], rounded to 0..255."""
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(p).resize((size, size), filter)) for p in pixels]
    stacked = np.stack(resized) if resized else np.empty((0, size, size, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(images.device, torch.float32)


resize_bicubic_pil = partial(resize_pil, filter=Image.Resampling.BICUBIC)


def _resize_torch(images: torch.Tensor, size: int, mode: str, antialias: bool) -> torch.Tensor:
    return F.interpolate(images.float(), size=(size, size), mode=mode, antialias=antialias, align_corners=False)


# how uint8 [N, 3, H, W] becomes float32 [N, 3, size, size] in 0..255; only Pillow rounds
RESIZES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "bicubic": resize_bicubic,
    "bilinear": partial(_resize_torch, mode="bilinear", antialias=True),
    "bicubic-no-antialias": partial(_resize_torch, mode="bicubic", antialias=False),
    "bicubic-pil": resize_bicubic_pil,
    "bilinear-pil": partial(resize_pil, filter=Image.Resampling.BILINEAR),
    "bilinear-tf1": lambda images, size: resize_bilinear_tf1(images.float(), size),
}


@dataclass(frozen=True)
class Preprocessing:
    """What happens to images before a network sees them: uint8 [N, 1 or 3, H, W] -> float32 [N, 3, size, size].

    `resize` is a key of RESIZES. Then 0..255 becomes `value_range`, and every channel (x - mean) / std. Raises
    ValueError if a value cannot be used.

    Example: `Preprocessing(224, "bicubic", (0, 1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))`
    """

    size: int
    resize: str
    value_range: tuple[float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= 4096:
            raise ValueError(f"size is {short(self.size)}; expected a side in pixels from 1 to 4096")
        if not isinstance(self.resize, str) or self.resize not in RESIZES:
            raise ValueError(f"resize is {short(self.resize)}; expected one of {', '.join(RESIZES)}")
        for name, count in {"value_range": 2, "mean": 3, "std": 3}.items():
            object.__setattr__(self, name, _numbers(name, getattr(self, name), count))
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"value_range is {list(self.value_range)}; expected the lower end first")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}; expected positive numbers")

    @classmethod
    def from_mapping(cls, content: Any) -> "Preprocessing":
        """From the content of a JSON or YAML file. Raises ValueError unless it has exactly the fields of this class."""
        names = [field.name for field in fields(cls)]
        if not isinstance(content, Mapping) or set(content) != set(names):
            found = ", ".join(f"{key!s:.60}" for key in content) if isinstance(content, Mapping) else short(content)
            raise ValueError(f"the preprocessing has {found or 'nothing'}; expected exactly {', '.join(names)}")
        return cls(**content)

    def __str__(self) -> str:
        low, high = self.value_range
        channels = f"mean {list(self.mean)}, std {list(self.std)}"
        return f"{self.resize} to {self.size}x{self.size}, values from {low:g} to {high:g}, {channels}"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        low, high = self.value_range
        scaled = RESIZES[self.resize](as_rgb(images), self.size) * ((high - low) / 255) + low
        mean, std = (torch.tensor(values, device=scaled.device)[:, None, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


def _numbers(name: str, value: Any, count: int) -> tuple[float, ...]:
    """`value` as finite floats. Raises ValueError if it is anything but a list of `count` numbers."""
    is_list = isinstance(value, list | tuple) and len(value) == count
    if not is_list or not all(isinstance(one, int | float) and abs(one) <= _MAX_FLOAT32 for one in value):
        raise ValueError(f"{name} is {short(value)}; expected a list of {count} numbers")
    return tuple(float(one) for one in value)
