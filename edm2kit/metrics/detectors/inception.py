"""The Inception-v3 network of the original FID code (TensorFlow, 2015): 2048 pool features."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from edm2kit.metrics.detectors.preprocess import as_rgb, resize_bilinear_tf1


class Conv(NamedTuple):
    """A convolution: its name, output channels, kernel (height, width), stride and padding."""

    name: str
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


class Fork(NamedTuple):
    """Convolutions with the same input; their outputs are concatenated."""

    convs: tuple[Conv, ...]


class Pool(NamedTuple):
    """A 3x3 pool: "average" (stride 1, without the padding), "max" (stride 1) or "shrink" (max, stride 2, unpadded)."""

    kind: str


_SPATIAL_CHANNELS = 7  # of sFID

AVERAGE, MAX, SHRINK = Pool("average"), Pool("max"), Pool("shrink")
Branch = list[Conv | Fork | Pool]

STEM: Branch = [
    Conv("Conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    SHRINK,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    SHRINK,
]


def _mixed_5(pool_channels: int) -> list[Branch]:
    return [
        [Conv("branch1x1", 64)],
        [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))],
        [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))],
        [AVERAGE, Conv("branch_pool", pool_channels)],
    ]


def _mixed_6(width: int) -> list[Branch]:
    return [
        [Conv("branch1x1", 192)],
        [Conv("branch7x7_1", width), Conv("branch7x7_2", width, (1, 7)), Conv("branch7x7_3", 192, (7, 1))],
        [
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ],
        [AVERAGE, Conv("branch_pool", 192)],
    ]


def _mixed_7(pool: Pool) -> list[Branch]:
    fork = Fork((Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))))
    fork_dbl = Fork((Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))))
    return [
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), fork],
        [Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), fork_dbl],
        [pool, Conv("branch_pool", 192)],
    ]


MIXED: dict[str, list[Branch]] = {
    "Mixed_5b": _mixed_5(32),
    "Mixed_5c": _mixed_5(64),
    "Mixed_5d": _mixed_5(64),
    "Mixed_6a": [
        [Conv("branch3x3", 384, (3, 3), stride=2, padded=False)],
        [
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), stride=2, padded=False),
        ],
        [SHRINK],
    ],
    "Mixed_6b": _mixed_6(128),
    "Mixed_6c": _mixed_6(160),
    "Mixed_6d": _mixed_6(160),
    "Mixed_6e": _mixed_6(192),
    "Mixed_7a": [
        [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), stride=2, padded=False)],
        [
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), stride=2, padded=False),
        ],
        [SHRINK],
    ],
    "Mixed_7b": _mixed_7(AVERAGE),
    "Mixed_7c": _mixed_7(MAX),  # an error in the graph of 2015 that every published FID contains
}


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch normalisation with running statistics, ReLU."""

    def __init__(self, in_channels: int, spec: Conv):
        super().__init__()
        padding = (spec.kernel[0] // 2, spec.kernel[1] // 2) if spec.padded else 0
        self.conv = nn.Conv2d(in_channels, spec.out_channels, spec.kernel, spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.out_channels, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # folding the normalisation into the weights at every call costs 1% and saves a pass over the activations
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None
        assert variance is not None
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.bn.bias - mean * scale
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding).relu_()


def _add_convs(owner: nn.Module, branch: Branch, channels: int) -> int:
    """Add the convolutions of `branch` to `owner`; returns the number of output channels of the branch."""
    for stage in branch:
        if isinstance(stage, Pool):
            continue
        convs = stage.convs if isinstance(stage, Fork) else (stage,)
        for spec in convs:
            owner.add_module(spec.name, ConvNormRelu(channels, spec))
        channels = sum(spec.out_channels for spec in convs)
    return channels


def _run_branch(owner: nn.Module, branch: Branch, x: torch.Tensor) -> torch.Tensor:
    for stage in branch:
        if isinstance(stage, Conv):
            x = owner.get_submodule(stage.name)(x)
        elif isinstance(stage, Fork):
            x = torch.cat([owner.get_submodule(spec.name)(x) for spec in stage.convs], dim=1)
        elif stage == SHRINK:
            x = F.max_pool2d(x, 3, stride=2)
        elif stage == MAX:
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return x


class InceptionBlock(nn.Module):
    """Branches with the same input; their outputs are concatenated in order."""

    def __init__(self, in_channels: int, branches: list[Branch]):
        super().__init__()
        self.branches = branches
        self.out_channels = sum(_add_convs(self, branch, in_channels) for branch in branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([_run_branch(self, branch, x) for branch in self.branches], dim=1)


class InceptionV3(nn.Module):
    """FID's Inception-v3: uint8 [N, 1 or 3, H, W] -> float32 [N, 2048], the global mean before the classifier.

    The weights are random until `load_state_dict` gets those of `pt_inception-2015-12-05-6726825d.pth`, whose names
    the modules have (including the classifier `fc`, which no feature uses); `load_detector("fid")` does both. Batch
    normalisation always uses its running statistics. Szegedy et al. 2015 (arXiv 1512.00567), Heusel et al. 2017
    (arXiv 1706.08500).

    Example: `InceptionV3()(torch.zeros(8, 3, 64, 64, dtype=torch.uint8)).shape` is [8, 2048].
    """

    num_spatial = 17 * 17 * 7

    def __init__(self) -> None:
        super().__init__()
        channels = _add_convs(self, STEM, 3)
        for name, branches in MIXED.items():
            block = InceptionBlock(channels, branches)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, 1008)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images)["features"]

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two outputs of one pass: `features` [N, 2048] as above, and `spatial` [N, 2023] for sFID.

        `spatial` are the first 7 channels of the 17x17 branch that TensorFlow calls mixed_6/conv, channels last as in
        the published references. Nash et al. 2021 (arXiv 2103.03841); Dhariwal and Nichol 2021 (arXiv 2105.05233).
        """
        x = (resize_bilinear_tf1(as_rgb(images).float(), 299) - 128) / 128
        x = _run_branch(self, STEM, x.contiguous(memory_format=torch.channels_last))
        spatial = x
        for name in MIXED:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :_SPATIAL_CHANNELS]  # branch1x1 is the first of the concatenated branches
        return {"features": x.mean(dim=(2, 3)), "spatial": spatial.permute(0, 2, 3, 1).flatten(1)}
