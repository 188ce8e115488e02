"""Features of a fixed random convolutional network: a metric without downloads, for any kind of image."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edm2kit.metrics.detectors.preprocess import as_rgb

# SHA-256 of the weights below, as little-endian float32, one stage after the other
WEIGHTS_SHA256 = "a43f1aa948dc25e5637f5435bbc02c2f4fafa755ab109ca84eb3eac8c4d6facd"
_SEED = 20151205
_WIDTHS = (32, 64, 64, 64)
_MAX_SIDE = 64
_EPSILON = 0.01


def random_weights() -> list[torch.Tensor]:
    """The convolution kernels of all stages, float32 [out, in, 3, 3], bitwise the same on every machine.

    They are uniform random numbers with the variance of He et al., made from the raw stream of PCG64: numpy guarantees
    that stream, while its distributions and torch's generators may change between versions. The kernels of the first
    stage sum to zero in each colour channel, so that they respond to edges and texture and not to brightness.
    """
    source, channels, weights = np.random.PCG64(_SEED), 3, []
    for stage, width in enumerate(_WIDTHS):
        raw = source.random_raw(width * channels * 9) >> np.uint64(40)
        # integers up to here, so that no machine rounds a sum differently
        kernels = raw.astype(np.int64).reshape(width, channels, 3, 3) - (1 << 23)
        if stage == 0:
            kernels = 9 * kernels - kernels.sum(axis=(2, 3), keepdims=True)
        scale = math.sqrt(6 / (9 * channels)) / (1 << 23) / (9 if stage == 0 else 1)
        weights.append(torch.from_numpy((kernels * scale).astype(np.float32)))
        channels = width
    return weights


class RandomFeatures(nn.Module):
    """The features of fd_random: uint8 [N, 1 or 3, H, W] -> float32 [N, 236].

    They are the mean colours of the four quarters of the image, and the mean activations of four stages: 3x3
    convolution, ReLU, division by the root mean square over channels, 2x2 average pooling. Sides above 64 pixels are
    reduced to 64. With about a thousand images or more, the distance rises with blur, noise, missing classes, missing
    variety, displaced parts and low contrast. Naeem et al. 2020 (arXiv 2002.09797) show that random networks rank sets
    of images sensibly. Compare values only with each other, at the same resolution and number of images, never with
    published FIDs.

    Example: `RandomFeatures()(torch.zeros(8, 3, 64, 64, dtype=torch.uint8)).shape` is [8, 236].
    """

    num_features = 12 + sum(_WIDTHS)
    preprocessing = f"random network {_SEED}, bilinear antialiased to at most {_MAX_SIDE}x{_MAX_SIDE}, x / 127.5 - 1"

    def __init__(self) -> None:
        super().__init__()
        for stage, weight in enumerate(random_weights()):
            self.register_buffer(f"stage{stage}", weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = as_rgb(images).float() / 127.5 - 1
        size = [min(side, _MAX_SIDE) for side in x.shape[2:]]
        if size != list(x.shape[2:]):
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        features = [F.adaptive_avg_pool2d(x, 2).flatten(1)]
        for stage in range(len(_WIDTHS)):
            if stage > 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.get_buffer(f"stage{stage}")).relu_()
            x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + _EPSILON)
            features.append(x.mean(dim=(2, 3)))
        return torch.cat(features, dim=1)
