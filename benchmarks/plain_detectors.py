"""The detectors in straightforward code: NCHW, normalisation after each convolution, attention written out."""

import torch
import torch.nn.functional as F

from edm2kit.metrics.detectors.dinov2 import DINOv2ViT, SelfAttention
from edm2kit.metrics.detectors.inception import MIXED, STEM, ConvNormRelu, InceptionV3, _run_branch
from edm2kit.metrics.detectors.preprocess import as_rgb, resize_bilinear_tf1


class _Conv(ConvNormRelu):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class PlainInception(InceptionV3):
    """Inception-v3 in NCHW with separate convolution, batch normalisation and ReLU."""

    def __init__(self):
        super().__init__()
        self.to(memory_format=torch.contiguous_format)
        for module in self.modules():
            if isinstance(module, ConvNormRelu):
                module.__class__ = _Conv

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = _run_branch(self, STEM, (resize_bilinear_tf1(as_rgb(images).float(), 299) - 128) / 128)
        for name in MIXED:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


class _Attention(SelfAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class PlainDINOv2(DINOv2ViT):
    """DINOv2 with attention as two products and a softmax."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.__class__ = _Attention
