"""Perturbed-attention guidance: away from a network whose pixels do not look at each other."""

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import Blocks, attend, checked, deep_encoder, network_of, parse_blocks
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import AttentionEdited, Perturbed
from edm2kit.guidance.option_types import one_of


def identity_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention whose map is the identity: every pixel keeps its own value."""
    return v


def matched_identity_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same, each head as loud as before: single values are several times as large as averages of them."""
    loudness = [t.float().square().mean(dim=(2, 3), keepdim=True).sqrt() for t in (attend(q, k, v), v)]
    return v * (loudness[0] / loudness[1].clamp_min(torch.finfo(torch.float32).tiny)).to(v.dtype)


def _negative(parts: Parts, *, pag_blocks: Blocks, pag_match: str) -> Denoiser:
    net = network_of(parts.net)
    blocks = deep_encoder(net) if pag_blocks is None else checked(net, pag_blocks)
    return Perturbed(
        net, AttentionEdited(blocks, matched_identity_attention if pag_match == "yes" else identity_attention)
    )


METHOD = Method(
    "perturbed-attention guidance: attention maps become the identity",
    "2 main",
    negative=_negative,
    weight=4.0,  # scale s = 3 of the paper, w = 1 + s
    options=(
        Option("pag-blocks", parse_blocks, None, "blocks to change; unset, the deepest of the encoder, and the middle"),
        Option("pag-match", one_of("no", "yes"), "no", "bring V to the RMS of the attention output it replaces"),
    ),
    term="D(x; sigma, c) with attention output V",
    source="Ahn et al. 2024 (arXiv 2403.17377)",
)
