"""The EDM2 U-Net (config G) and the denoiser around it (Karras et al. 2023)."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edm2kit.denoiser import AttentionRole
from edm2kit.models.layers import (
    SILU_GAIN,
    Columns,
    FrozenConv,
    MPConv,
    MPFourier,
    balance,
    clip,
    downsample,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    upsample,
)
from edm2kit.models.preconditioning import Edits, Preconditioner, RawNetwork

# which of a module's gains belongs to which of its layers
_GAINS = {"emb_linear": "emb_gain", "out_conv": "out_gain"}
# the ends of the names of weights that only a network trained with augmentation has
AUGMENTATION_WEIGHTS = (".emb_augment.weight", ".augment_gain")


class UNetBlock(nn.Module):
    """One encoder or decoder block: optional resampling, a residual branch, optional cosine attention."""

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
        self.decoder, self.dropout, self.clip_act = decoder, dropout, clip_act
        resamplers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "keep": nn.Identity(),
            "down": downsample,
            "up": upsample,
        }
        self.resample = resamplers[resample]
        # the constants of sums and SiLUs are folded into the weights of the convolutions around them
        self.res_keep, res_add = balance(res_balance)
        self.attn_keep, attn_add = balance(attn_balance)
        self.num_heads = 0
        if attention:
            if not 1 <= channels_per_head <= out_channels or out_channels % channels_per_head:
                raise ValueError(
                    f"attention over {out_channels} channels needs channels_per_head to be a divisor of "
                    f"{out_channels}; got {channels_per_head}"
                )
            self.num_heads = out_channels // channels_per_head
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
        scale = (self.emb_linear(emb, gain=self.emb_gain) + 1)[:, :, None, None].to(y.dtype)
        # y is a temporary result: without gradients it is overwritten, which saves memory
        overwrite = not torch.is_grad_enabled()
        y = y.mul_(scale) if overwrite else y * scale
        y = nn.functional.silu(y, inplace=overwrite)
        if edits.dropout is not None:
            y = edits.dropout(name, y)
        elif self.training and self.dropout:
            y = nn.functional.dropout(y, p=self.dropout)
        y = edits.unless_skipped(name, self.conv_res1(y))
        if self.decoder and self.conv_skip is not None:
            x = _plus(y, self.conv_skip(x))
        else:
            x = _plus(y, x, self.res_keep)
        if self.attn_qkv is not None and self.attn_proj is not None:
            n, c, h, w = x.shape
            qkv = self.attn_qkv(x).permute(0, 2, 3, 1).contiguous()  # free if channels are last
            qkv = qkv.reshape(n, h * w, 3, self.num_heads, c // self.num_heads)
            q, k, v = normalize(qkv, dims=[4]).permute(2, 0, 3, 1, 4)  # each [N, heads, H*W, C/heads]
            y = edits.attend(name, q, k, v).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)
            x = _plus(edits.unless_skipped(name, self.attn_proj(y)), x, self.attn_keep)
        if self.clip_act is None:
            return x
        return x.clamp_(-self.clip_act, self.clip_act) if overwrite else clip(x, self.clip_act)


def _plus(y: torch.Tensor, x: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """y + weight * x; overwrites y, a temporary result, unless a gradient may need it."""
    return torch.add(y, x, alpha=weight) if torch.is_grad_enabled() else y.add_(x, alpha=weight)


class QKV(MPConv):
    """The 1x1 convolution to queries, keys and values; its output channels are [3, heads, C/heads].

    `weight` interleaves the three inside each head, [heads, C/heads, 3], as published weights do. Attention is up to
    twice as fast if the channels of each are contiguous.
    """

    def __init__(self, channels: int, num_heads: int):
        super().__init__(channels, channels * 3, [1, 1])
        self.num_heads = num_heads

    def effective_weight(self, gain: torch.Tensor | None = None) -> torch.Tensor:
        weight = super().effective_weight(gain)
        interleaved = weight.reshape(self.num_heads, -1, 3, weight.shape[1])
        return interleaved.permute(2, 0, 1, 3).reshape(weight.shape)


class UNet(RawNetwork):
    """EDM2's raw network F: x [N, C, H, W], c_noise [N], labels [N, label_dim] -> [N, C, H, W], all unit magnitude.

    With a half-precision `x`, it computes in half precision, except for the embedding. `model_channels` is the width of
    the first level, `channel_mult` the widths of all levels in units of it, `num_blocks` the encoder blocks per level;
    `channel_mult_noise` and `channel_mult_emb` are the widths of the noise features and the embedding, in the same
    unit (defaults: the narrowest and the widest level). Levels in `attn_resolutions` have attention. `augment_dim` is
    the length of augmentation labels (Karras et al. 2022, Appendix F.2); 0 for a network trained without augmentation.
    """

    supported_edits = frozenset(("attention", "embedding", "dropout", "skip", "return_attention"))

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        *,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        augment_dim: int = 0,
    ):
        super().__init__()
        if not channel_mult:
            raise ValueError("channel_mult is empty; it needs one number for each level, such as 1,2,3,4")
        halvings = len(channel_mult) - 1
        if img_resolution < 1 or img_resolution % (1 << halvings):
            raise ValueError(
                f"img_resolution={img_resolution} cannot be halved {halvings} times; use a multiple of "
                f"{1 << halvings} or fewer levels in channel_mult"
            )
        widths = self.widths = [model_channels * mult for mult in channel_mult]
        noise_width = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_width = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_width)
        self.emb_noise = MPConv(noise_width, emb_width, [])
        self.emb_label = MPConv(label_dim, emb_width, []) if label_dim else None
        self.emb_augment = MPConv(augment_dim, emb_width, []) if augment_dim else None
        if augment_dim:
            self.augment_gain = nn.Parameter(torch.zeros([]))
            self.supported_edits = self.supported_edits | {"augment"}
        self.emb_shared = nn.Identity()  # a frozen network computes all blocks' emb_linear here

        def block(c_in: int, c_out: int, decoder: bool, resample: str = "keep", attention: bool = False) -> UNetBlock:
            return UNetBlock(
                c_in,
                c_out,
                emb_width,
                decoder=decoder,
                resample=resample,
                attention=attention,
                channels_per_head=channels_per_head,
                dropout=dropout,
                res_balance=res_balance,
                attn_balance=attn_balance,
                clip_act=clip_act,
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, skips = img_channels + 1, []  # an extra channel of ones replaces biases
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(c, width, [3, 3])
                c = width
            else:
                self.enc[f"{res}x{res}_down"] = block(c, c, decoder=False, resample="down")
            skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(c, width, False, attention=res in attn_resolutions)
                c = width
                skips.append(c)
        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(c, c, decoder=True, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(c, c, decoder=True)
            else:
                self.dec[f"{res}x{res}_up"] = block(c, c, decoder=True, resample="up")
            for i in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(
                    c + skips.pop(), width, True, attention=res in attn_resolutions
                )
                c = width
        self.out_conv = MPConv(c, img_channels, [3, 3])

    @property
    def attention_roles(self) -> dict[str, AttentionRole]:
        """Role of each block that has attention, by names such as "enc.8x8_block0", in the order of computation."""
        names = [name for name, block in self._named_blocks() if block.num_heads]
        roles = {}
        for depth, name in enumerate(names):
            side: Literal["encoder", "middle", "decoder"] = "encoder" if name.startswith("enc.") else "decoder"
            if name.endswith("_in0"):
                side = "middle"
            resolution = int(re.findall(r"\d+", name)[0])  # "dec.8x8_in0" -> 8
            roles[name] = AttentionRole(side, resolution, depth)
        return roles

    @property
    def summary(self) -> str:
        return f"{super().summary} (channels {', '.join(map(str, self.widths))})"

    @property
    def blocks(self) -> list[nn.Module]:
        """Encoder and decoder blocks, in the order of computation."""
        return [block for _, block in self._named_blocks()]

    def _named_blocks(self) -> list[tuple[str, UNetBlock]]:
        modules = [(f"{side}.{name}", m) for side in ("enc", "dec") for name, m in getattr(self, side).items()]
        return [(name, module) for name, module in modules if isinstance(module, UNetBlock)]

    def embed(self, c_noise: torch.Tensor, labels: torch.Tensor | None, edits: Edits) -> torch.Tensor:
        """The embedding that modulates every block: c_noise [N], labels [N, label_dim] -> float32 [N, emb_width]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if edits.embedding is not None:
            emb = edits.embedding(emb)
        if self.emb_label is not None:
            assert labels is not None
            # one-hot labels have RMS 1/sqrt(label_dim)
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(labels.shape[1])), self.label_balance)
        if self.emb_augment is not None and edits.augment is not None:
            # added with a learned gain instead of mp_sum, so that zeros, most of the labels, change nothing at all
            emb = emb + self.augment_gain * self.emb_augment(edits.augment)
        return self.emb_shared(mp_silu(emb))

    def forward(
        self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None, edits: Edits
    ) -> torch.Tensor:
        emb = self.embed(c_noise, labels, edits)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        run: Callable[..., torch.Tensor] = UNetBlock.__call__
        if self.recomputes(x, edits):
            run = partial(checkpoint, UNetBlock.__call__, use_reentrant=False, preserve_rng_state=self.training)
        skips = []
        for name, module in self.enc.items():
            x = run(module, x, emb, f"enc.{name}", edits) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = run(module, x, emb, f"dec.{name}", edits)
        return self.out_conv(x, gain=self.out_gain)


def count_blocks(architecture: Mapping[str, Any]) -> int:
    """A lower bound on the number of blocks that `Precond(**architecture)` makes."""
    return architecture["num_blocks"] * len(architecture["channel_mult"])


class Precond(Preconditioner):
    """EDM2's denoiser: the preconditioning around a U-Net. Karras et al. 2023, config G.

    `unet_kwargs` are the arguments of `UNet`; the others, and the call, are those of `Preconditioner`.

    Example: `Precond(64, 4, 1000, model_channels=128)` is EDM2-XS for ImageNet-512 latents.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs: Any,
    ):
        unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        super().__init__(unet, img_resolution, img_channels, label_dim, sigma_data, logvar_channels, raw_name="unet")


@torch.no_grad()
def freeze_(net: Precond) -> Precond:
    """Prepare an EDM2 network for evaluation only: the same outputs in less time; returns it.

    Weights are normalised and scaled once and kept in `net.compute_dtype` (which cannot change any more), channels
    last; those of the embedding in float32. This goes layer by layer, so there is never a second copy of the network.
    Edits and gradients by the input work as before. The state dict no longer holds weights of a snapshot.

    Raises ValueError for a network that is already frozen.
    """
    if isinstance(net.raw.emb_shared, FrozenConv):
        raise ValueError("the network is already frozen: its weights and its precision cannot change any more")
    _join_embeddings_(net)
    # a list of the layers themselves would keep them all in memory
    parents = [module for module in net.modules() if not isinstance(module, MPConv)]
    for parent in parents:
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, MPConv):
                continue
            gain = getattr(parent, _GAINS[name]) if name in _GAINS else None
            weight = layer.effective_weight(gain)
            if weight.ndim == 4:
                weight = weight.to(net.compute_dtype).contiguous(memory_format=torch.channels_last)
            parent.add_module(name, FrozenConv(weight))
    return net.eval().requires_grad_(False)


def _join_embeddings_(net: Precond) -> None:
    """Compute the embedding layers of all blocks as a single matrix product."""
    weights: list[torch.Tensor] = []
    start = 0
    for block in net.raw.blocks:
        weights.append(block.emb_linear.effective_weight(block.emb_gain))
        block.emb_linear = Columns(start, start + len(weights[-1]))
        start += len(weights[-1])
    net.raw.emb_shared = FrozenConv(torch.cat(weights))
