"""One block of the EDM2 U-Net (config G), and what a call may change or read inside it (Karras et al. 2023)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from edm2kit.models.layers import SILU_GAIN, MPConv, balance, downsample, normalize, upsample

# (q, k, v), each [N, heads, H*W, C/heads], q and k normalised -> what attention puts out, same shape
AttentionEdit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (block name, activations [N, C, H, W]) -> activations: dropout of the caller's own making
DropoutEdit = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class Edits:
    """What one call changes or reads inside the network; `maps` receives the attention maps asked for."""

    attention: Mapping[str, AttentionEdit] = field(default_factory=dict)
    embedding: Callable[[torch.Tensor], torch.Tensor] | None = None
    dropout: DropoutEdit | None = None
    return_attention: Sequence[str] = ()
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.attention or self.embedding or self.dropout or self.return_attention)


class Block(nn.Module):
    """One encoder or decoder block: optional resampling, residual branch, optional cosine-like attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        decoder: bool,
        resample: str = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ):
        super().__init__()
        self.decoder, self.resample = decoder, {"keep": nn.Identity(), "down": downsample, "up": upsample}[resample]
        self.dropout, self.clip_act = dropout, clip_act
        # sums and SiLUs without their constants, which the weights of the convolutions around them take up
        self.res_keep, res_add = balance(res_balance)
        self.attn_keep, attn_add = balance(attn_balance)
        self.num_heads = _num_heads(out_channels, channels_per_head) if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, [3, 3], SILU_GAIN)
        self.emb_linear = MPConv(emb_channels, out_channels, [])
        self.conv_res1 = MPConv(out_channels, out_channels, [3, 3], SILU_GAIN * res_add)
        skip = partial(MPConv, in_channels, out_channels, [1, 1], self.res_keep if decoder else 1.0)
        self.conv_skip = skip() if in_channels != out_channels else None
        self.attn_qkv = QKV(out_channels, self.num_heads) if attention else None
        self.attn_proj = MPConv(out_channels, out_channels, [1, 1], attn_add) if attention else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor, name: str, edits: Edits) -> torch.Tensor:
        x = self.resample(x)
        if not self.decoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dims=[1])
        y = self.conv_res0(nn.functional.silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = _silu(_times(y, scale[:, :, None, None].to(y.dtype)))
        if edits.dropout is not None:
            y = edits.dropout(name, y)
        elif self.training and self.dropout:
            y = nn.functional.dropout(y, p=self.dropout)
        y = self.conv_res1(y)
        if self.decoder and self.conv_skip is not None:
            x = _plus(y, self.conv_skip(x))
        else:
            x = _plus(y, x, self.res_keep)
        if self.num_heads:
            x = _plus(self.attn_proj(self._attend(x, name, edits)), x, self.attn_keep)
        return x if self.clip_act is None else _clamp(x, self.clip_act)

    def _attend(self, x: torch.Tensor, name: str, edits: Edits) -> torch.Tensor:
        n, c, h, w = x.shape
        qkv = self.attn_qkv(x).permute(0, 2, 3, 1).contiguous()  # nothing to do where channels are last
        qkv = qkv.reshape(n, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = normalize(qkv, dims=[4]).permute(2, 0, 3, 1, 4)  # each [N, heads, H*W, C/heads]
        if name in edits.attention:
            y = edits.attention[name](q, k, v)
        elif name in edits.return_attention:
            edits.maps[name] = (q.float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)
            y = edits.maps[name].to(v.dtype) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)


# y is a result that nobody else holds: overwritten, which saves fresh memory, unless a gradient may ask for it


def _times(y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return y * factor if torch.is_grad_enabled() else y.mul_(factor)


def _plus(y: torch.Tensor, x: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    return torch.add(y, x, alpha=share) if torch.is_grad_enabled() else y.add_(x, alpha=share)


def _silu(y: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(y, inplace=not torch.is_grad_enabled())


def _clamp(y: torch.Tensor, limit: float) -> torch.Tensor:
    return y.clamp(-limit, limit) if torch.is_grad_enabled() else y.clamp_(-limit, limit)


class QKV(MPConv):
    """The 1x1 convolution to queries, keys and values, whose outputs come as [3, heads, C/heads].

    Published weights interleave the three inside each head, [heads, C/heads, 3], and stay so in `weight`: attention
    is up to twice as fast over channels that lie together.
    """

    def __init__(self, channels: int, num_heads: int):
        super().__init__(channels, channels * 3, [1, 1])
        self.num_heads = num_heads

    def effective_weight(self, gain: torch.Tensor | None = None) -> torch.Tensor:
        weight = super().effective_weight(gain)
        interleaved = weight.reshape(self.num_heads, -1, 3, weight.shape[1])
        return interleaved.permute(2, 0, 1, 3).reshape(weight.shape)


def _num_heads(channels: int, channels_per_head: int) -> int:
    if not 1 <= channels_per_head <= channels or channels % channels_per_head:
        raise ValueError(
            f"attention over {channels} channels with channels_per_head={channels_per_head}: the channels must be a "
            f"multiple of it; set channels_per_head to a divisor of {channels}"
        )
    return channels // channels_per_head
