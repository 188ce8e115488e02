"""A small classifier of noisy images, and the file it lives in."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.provenance import code_commit

FORMAT_VERSION = 1
_HEADER_KEY = "edm2_classifier"
_GROUPS = 8


class _ResidualBlock(nn.Module):
    """Two convolutions beside the way through, the second one's input scaled and shifted by the noise embedding."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int):
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(_GROUPS, in_channels), nn.GroupNorm(_GROUPS, out_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        y = self.conv0(nn.functional.silu(self.norm0(x)))
        y = self.conv1(nn.functional.silu(self.norm1(y) * (1 + scale) + shift))
        return (self.skip(x) + y) / math.sqrt(2)


class NoiseClassifier(nn.Module):
    """log p(class | x; sigma) up to a constant: x [N,C,R,R], sigma [N] or a scalar -> logits float32 [N,num_classes].

    Input scaling as for EDM denoisers (Karras et al. 2022, Table 1). `width` channels (a multiple of 8) at the first
    level, twice as many at each of the following `levels` - 1. Raises ValueError for sizes that do not divide, and for
    images of another shape.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        num_classes: int,
        width: int = 32,
        levels: int = 3,
        sigma_data: float = 0.5,
    ):
        super().__init__()
        if width % _GROUPS or img_resolution % (1 << (levels - 1)):
            raise ValueError(
                f"a classifier of {width} channels and {levels} levels for {img_resolution} pixels; the width must be "
                f"a multiple of {_GROUPS}, the resolution one of {1 << (levels - 1)}"
            )
        self.shape, self.sigma_data = (img_channels, img_resolution, img_resolution), sigma_data
        widths = [width << level for level in range(levels)]
        self.emb = nn.Sequential(nn.Linear(2 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU())
        self.stem = nn.Conv2d(img_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            _ResidualBlock(c_in, c_out, 4 * width) for c_in, c_out in zip([width, *widths], widths, strict=False)
        )
        self.norm = nn.GroupNorm(_GROUPS, widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"the classifier is one of images {list(self.shape)}, not {list(x.shape[1:])}")
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        emb = self.emb(self._fourier(sigma.log() / 4))
        y = self.stem(x.float() / (self.sigma_data**2 + sigma**2).sqrt()[:, None, None, None])
        for level, block in enumerate(self.blocks):
            y = block(nn.functional.avg_pool2d(y, 2) if level else y, emb)
        return self.head(nn.functional.silu(self.norm(y)).mean(dim=(2, 3)))

    def _fourier(self, c_noise: torch.Tensor) -> torch.Tensor:
        frequencies = torch.logspace(-1, 1.5, self.stem.out_channels, device=c_noise.device)
        angles = c_noise[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class ClassifierHeader:
    """What a classifier's file says of it: `architecture` are the arguments of `NoiseClassifier`."""

    architecture: Mapping[str, Any]
    nimg: int
    label_names: tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    commit: str = field(default_factory=code_commit)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier ready to use (eval mode, weights without gradients) and its header."""

    net: NoiseClassifier
    header: ClassifierHeader


def save_classifier(path: str | Path, net: NoiseClassifier, header: ClassifierHeader) -> None:
    """Write weights and header as one safetensors file, whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    data = save(state, metadata={_HEADER_KEY: json.dumps(dataclasses.asdict(header))})
    with atomic_write(path) as file:
        file.write(data)


def load_classifier(path: str | Path) -> LoadedClassifier:
    """Read a classifier; ValueError where the file is missing, damaged, newer than this code, or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole classifier ({error})") from error
    if text is None:
        raise ValueError(f"{path} is a safetensors file but no classifier; make one with scripts/train_classifier.py")
    try:
        values = json.loads(text)
        if values["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{path}: format {values['format_version']} is newer than {FORMAT_VERSION}; update this code"
            )
        header = ClassifierHeader(**{**values, "label_names": values["label_names"] and tuple(values["label_names"])})
        net = NoiseClassifier(**header.architecture)
        net.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the classifier's header does not fit this code or its weights ({error})") from error
    return LoadedClassifier(net.eval().requires_grad_(False), header)
