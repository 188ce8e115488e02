"""The EDM2 U-Net (config G) and its preconditioner (Karras et al. 2023; preconditioning of Karras et al. 2022)."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edm2kit.models.edm2_blocks import AttentionEdit, Block, DropoutEdit, Edits
from edm2kit.models.layers import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize_weights_

__all__ = ["AttentionEdit", "Precond", "UNet", "full_architecture", "normalize_weights_"]


class UNet(nn.Module):
    """The raw network F: x [N, C, H, W], c_noise [N], labels [N, label_dim] -> [N, C, H, W], all unit magnitude.

    Half-precision `x` computes in half precision; the embedding path stays float32. With `recompute` (an attribute) a
    gradient by `x` outside of training holds no block's activations: they are computed again on the way back. With
    `recompute_in_training` neither does training, dropout included, to the same bits.
    """

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
    ):
        super().__init__()
        _check_resolution(img_resolution, len(channel_mult))
        widths = [model_channels * mult for mult in channel_mult]
        noise_width = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_width = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.recompute, self.recompute_in_training = True, False
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_width)
        self.emb_noise = MPConv(noise_width, emb_width, [])
        self.emb_label = MPConv(label_dim, emb_width, []) if label_dim else None
        self.emb_shared = nn.Identity()  # what all blocks' emb_linear have in common: nothing, unless frozen

        def block(c_in: int, c_out: int, decoder: bool, resample: str = "keep", attention: bool = False) -> Block:
            return Block(
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
        c, skips = img_channels + 1, []  # one more channel, of ones, stands in for biases
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
    def attention_blocks(self) -> list[str]:
        """Names of the blocks that have attention, such as "enc.8x8_block0", in the order they are computed."""
        blocks = [(f"{side}.{name}", b) for side in ("enc", "dec") for name, b in getattr(self, side).items()]
        return [name for name, b in blocks if isinstance(b, Block) and b.num_heads]

    def embed(self, c_noise: torch.Tensor, labels: torch.Tensor | None, edits: Edits) -> torch.Tensor:
        """The embedding that modulates every block: c_noise [N], labels [N, label_dim] -> [N, emb_width]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if edits.embedding is not None:
            emb = edits.embedding(emb)
        if self.emb_label is not None:
            # one-hot labels have RMS 1/sqrt(label_dim)
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(labels.shape[1])), self.label_balance)
        return self.emb_shared(mp_silu(emb))

    def forward(
        self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None, edits: Edits
    ) -> torch.Tensor:
        emb = self.embed(c_noise, labels, edits)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        run = Block.__call__
        again = self.recompute_in_training if self.training else self.recompute and x.requires_grad
        # what an edit draws or reads, it may not draw or read again
        if again and torch.is_grad_enabled() and not (edits.dropout or edits.return_attention):
            run = partial(checkpoint, use_reentrant=False, preserve_rng_state=self.training)
        skips = []
        for name, module in self.enc.items():
            x = run(module, x, emb, f"enc.{name}", edits) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = run(module, x, emb, f"dec.{name}", edits)
        return self.out_conv(x, gain=self.out_gain)


def _check_resolution(img_resolution: int, num_levels: int) -> None:
    if img_resolution % (1 << (num_levels - 1)) or img_resolution < 1:
        raise ValueError(
            f"img_resolution={img_resolution} cannot be halved {num_levels - 1} times; use a multiple of "
            f"{1 << (num_levels - 1)} or fewer levels in channel_mult"
        )


class Precond(nn.Module):
    """The denoiser D(x; sigma, labels) around the U-Net (EDM Table 1), with the uncertainty head of EDM2 Eq. 21.

    Arguments: `img_resolution` pixels, `img_channels`, `label_dim` classes (0: unconditional), `sigma_data` the
    standard deviation of the data, `logvar_channels` width of the uncertainty head, `unet_kwargs` as `UNet`.
    `compute_dtype` (an attribute) is the dtype inside the U-Net; everything outside stays float32.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs: object,
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data = sigma_data
        self.compute_dtype = torch.float32
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, [])

    @property
    def attention_blocks(self) -> list[str]:
        """Names that `attention` and `return_attention` take."""
        return self.unet.attention_blocks

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: torch.Tensor | None = None,
        return_logvar: bool = False,
        *,
        attention: Mapping[str, AttentionEdit] | None = None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dropout: DropoutEdit | None = None,
        return_attention: Sequence[str] = (),
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Estimate the clean image.

        `x` [N, C, H, W]; `sigma` [N] or a scalar; `labels` [N, label_dim], or None for the zero vector; ignored by
        an unconditional net. `attention` maps block names ("enc.8x8_block0") to replacements of their attention;
        `embedding` replaces the noise embedding [N, emb] before labels join it; `dropout` takes the place of dropout
        in every block, also in eval mode. Returns D, float32, shaped as x; then, where asked for, the log-variance
        [N, 1, 1, 1] and a dict of softmax attention maps [N, heads, H*W, H*W] of the blocks in `return_attention`.
        Raises ValueError for a name without attention.
        """
        edits = Edits(attention or {}, embedding, dropout, return_attention)
        self._check_blocks([*edits.attention, *return_attention])
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        s = sigma.reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (s**2 + self.sigma_data**2)
        c_out = s * self.sigma_data / (s**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + s**2).sqrt()
        c_noise = sigma.log() / 4
        # what is compiled (`edm2kit.models.frozen.compile_`) knows neither edits nor gradients
        unet = self.unet.forward if edits or x.requires_grad else self.unet
        f = unet((c_in * x).to(self.compute_dtype), c_noise, self._labels(x, labels), edits)
        outputs = [c_skip * x + c_out * f.float()]
        if return_logvar:
            outputs.append(self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1))
        if return_attention:
            outputs.append(edits.maps)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _labels(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        if not self.label_dim:
            return None
        if labels is None:
            return torch.zeros(x.shape[0], self.label_dim, device=x.device)
        if labels.shape != (x.shape[0], self.label_dim):
            raise ValueError(f"labels have shape {list(labels.shape)}; expected [{x.shape[0]}, {self.label_dim}]")
        return labels.float()

    def _check_blocks(self, names: Sequence[str]) -> None:
        there = self.unet.attention_blocks if names else []
        for name in names:
            if name not in there:
                raise ValueError(f"no attention in a block called {name!r}; there is: {', '.join(there)}")


def full_architecture(
    img_resolution: int, img_channels: int, label_dim: int, sigma_data: float, network: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of `Precond`, today's defaults written out, as lists and numbers: a later default changes nothing.

    `network` holds the U-Net arguments that differ from their defaults; ValueError for one it does not know.
    """
    given = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, sigma_data=sigma_data)
    defaults = {}
    for owner in (Precond, UNet):
        parameters = inspect.signature(owner).parameters.values()
        defaults.update({p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty})
    if unknown := [name for name in network if name not in defaults or name in given]:
        raise ValueError(f"unknown network argument {unknown[0]!r}; there is: {', '.join(defaults)}")
    merged = {**given, **{name: value for name, value in defaults.items() if name not in given}, **network}
    return {name: list(value) if isinstance(value, tuple | list) else value for name, value in merged.items()}
