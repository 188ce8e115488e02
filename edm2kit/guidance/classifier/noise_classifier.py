"""A small classifier of noisy images, and its file format."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edm2kit.torch_utils.files import atomic_write, check_fields, check_type, code_commit
from edm2kit.torch_utils.safetensors_files import damaged_part, safetensors_bytes

FORMAT_VERSION = 1
_HEADER_KEY = "edm2_classifier"
_GROUPS = 8
_MAX_LEVELS = 16
_MAX_WIDTH = 4096


class _ResidualBlock(nn.Module):
    """Two convolutions with a skip connection; the input of the second is modulated by the noise embedding."""

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
    """log p(class | x; sigma) up to a constant: x [N, C, R, R], sigma [N] or a scalar -> logits float32 [N, K].

    Input scaling as for EDM denoisers (Karras et al. 2022, Table 1). `width` channels (a multiple of 8) at the first
    of `levels` resolutions, twice as many at each further one. Raises ValueError if the width or the resolution cannot
    be divided accordingly, and for images of another shape.
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
        if not 1 <= levels <= _MAX_LEVELS:
            raise ValueError(f"a classifier of {levels} levels; expected 1 to {_MAX_LEVELS}")
        if not 0 < width <= _MAX_WIDTH or width % _GROUPS or img_resolution % (1 << (levels - 1)):
            raise ValueError(
                f"a classifier of {width} channels and {levels} levels for {img_resolution} pixels; the width must be "
                f"a multiple of {_GROUPS} up to {_MAX_WIDTH}, the resolution a multiple of {1 << (levels - 1)}"
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
            raise ValueError(f"the classifier takes images of shape {list(self.shape)}, not {list(x.shape[1:])}")
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        frequencies = torch.logspace(-1, 1.5, self.stem.out_channels, device=x.device)
        angles = (sigma.log() / 4)[:, None] * frequencies
        emb = self.emb(torch.cat([angles.cos(), angles.sin()], dim=1))
        y = self.stem(x.float() / (self.sigma_data**2 + sigma**2).sqrt()[:, None, None, None])
        for level, block in enumerate(self.blocks):
            y = block(nn.functional.avg_pool2d(y, 2) if level else y, emb)
        return self.head(nn.functional.silu(self.norm(y)).mean(dim=(2, 3)))


@dataclass(frozen=True)
class ClassifierHeader:
    """The header of a classifier file; `architecture` holds the arguments of `NoiseClassifier`."""

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
    """Write weights and header to one safetensors file, atomically. Raises ValueError for weights not finite."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    if wrong := next((name for name, tensor in state.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{path}: not written, as the weights {wrong} are not finite; try a smaller --lr")
    data = safetensors_bytes(state, {_HEADER_KEY: json.dumps(dataclasses.asdict(header))})
    with atomic_write(path) as file:
        file.write(data)


def load_classifier(path: str | Path) -> LoadedClassifier:
    """Read a classifier. Raises ValueError if the file is missing, damaged, newer than this code or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete classifier file ({error})") from error
    text = metadata.get(_HEADER_KEY)
    if text is None:
        raise ValueError(
            f"{path} is a safetensors file, but not a classifier; make one with scripts/train_classifier.py"
        )
    if part := damaged_part(state, metadata):
        raise ValueError(f"{path} is damaged: its {part} do not match their checksums; copy or write it again")
    try:
        values = json.loads(text)
        version = values["format_version"]
        if version > FORMAT_VERSION:
            raise ValueError(f"{path}: format {version} is newer than {FORMAT_VERSION}; update this code")
        if values["label_names"] is not None:
            values["label_names"] = tuple(values["label_names"])
        header = ClassifierHeader(**values)
        check_fields(values, ClassifierHeader)
        for name, value in header.architecture.items():
            check_type(value, float if name == "sigma_data" else int, name)
        if not 1 <= header.architecture.get("levels", 3) <= _MAX_LEVELS:
            raise ValueError(f"{path}: it has {header.architecture['levels']} levels")
        # a small file may ask for a large network: nothing is allocated until its weights are seen to fit
        with torch.device("meta"):
            net = NoiseClassifier(**header.architecture)
        net.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise ValueError(f"{path}: the classifier's header does not fit this code or its weights ({reason})") from error
    return LoadedClassifier(net.eval().requires_grad_(False), header)
