"""The DINOv2 vision transformer (without registers): class-token features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from edm2kit.metrics.detectors.preprocess import as_rgb, resize_bicubic, resize_bicubic_pil

IMAGE_SIZE = 224
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_RESIZE: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {"torch": resize_bicubic, "pil": resize_bicubic_pil}


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens: [N, 3, H, W] -> [N, tokens, embed_dim]."""

    def __init__(self, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are first all queries, then all keys, then all values."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class TransformerBlock(nn.Module):
    """Pre-norm transformer block with LayerScale on both residual branches."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_hidden)
        self.ls2 = LayerScale(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2ViT(nn.Module):
    """DINOv2 features: uint8 [N, 1 or 3, H, W] -> float32 [N, embed_dim], the class token after the last norm.

    Images are resized to 224x224, in PyTorch (`resize_mode="torch"`, as in the published FD-DINOv2 values of EDM2) or
    image by image in Pillow (`"pil"`, as in the paper of the metric). The weights are random until `load_state_dict`
    gets published ones; `load_detector("fd_dinov2")` does both. Raises ValueError for another `resize_mode`, and for
    an image size or width that the patches or heads do not divide. Oquab et al. 2023 (arXiv 2304.07193), Stein et al.
    2023 (arXiv 2306.04675).

    Example: `DINOv2ViT(embed_dim=384, depth=12, num_heads=6)` is the ViT-S/14.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4,
        patch_size: int = 14,
        pretrain_image_size: int = 518,
        resize_mode: str = "torch",
    ) -> None:
        super().__init__()
        if resize_mode not in _RESIZE:
            raise ValueError(f"resize_mode {resize_mode!r} is unknown; use one of {', '.join(_RESIZE)}")
        if embed_dim % num_heads or IMAGE_SIZE % patch_size or pretrain_image_size % patch_size:
            raise ValueError(
                f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads}), and {IMAGE_SIZE} and "
                f"pretrain_image_size ({pretrain_image_size}) multiples of patch_size ({patch_size})"
            )
        self.resize_mode = resize_mode
        self.pretrain_grid = pretrain_image_size // patch_size
        self.grid = IMAGE_SIZE // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.pretrain_grid**2, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))  # in the published file; only used in training
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, num_heads, int(embed_dim * mlp_ratio)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def _position_embedding(self) -> torch.Tensor:
        """Embeddings of the class and patch positions of a 224x224 image, [1, 1 + grid^2, embed_dim]."""
        if self.grid == self.pretrain_grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.pretrain_grid, self.pretrain_grid)).permute(0, 3, 1, 2)
        # DINOv2 adds 0.1, so that the output size rounds correctly, and passes the scale factor, which shifts every
        # sample point. Published features depend on this.
        factor = (self.grid + 0.1) / self.pretrain_grid
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", antialias=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        resized = _RESIZE[self.resize_mode](as_rgb(images), IMAGE_SIZE)
        tokens = self.patch_embed((resized / 255 - self.mean) / self.std)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self._position_embedding()
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]
