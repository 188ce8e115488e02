"""Perturbed-attention guidance (PAG): away from a network whose attention maps are the identity."""

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import Blocks, attend, checked, deep_encoder, parse_blocks, require_attention
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import AttentionEdit, Perturbed
from edm2kit.guidance.option_types import one_of


def identity_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention whose map is the identity: every pixel keeps its own value."""
    return v


def matched_identity_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same, rescaled to the RMS of plain attention per head: single values are several times their averages."""
    loudness = [t.float().square().mean(dim=(2, 3), keepdim=True).sqrt() for t in (attend(q, k, v), v)]
    return v * (loudness[0] / loudness[1].clamp_min(torch.finfo(torch.float32).tiny)).to(v.dtype)


def _negative(parts: Parts, *, pag_blocks: Blocks, pag_match: str) -> Denoiser:
    net = require_attention(parts.net, "perturbed-attention guidance", "attention")
    blocks = deep_encoder(net) if pag_blocks is None else checked(net, pag_blocks)
    if pag_blocks is None and not blocks:
        raise ValueError(
            "perturbed-attention guidance acts on attention in the encoder and the middle of a network, and this one "
            "has none there. Name blocks with --pag-blocks"
        )
    edit = matched_identity_attention if pag_match == "yes" else identity_attention
    return Perturbed(net, AttentionEdit(blocks, edit))


METHOD = Method(
    "perturbed-attention guidance (PAG): away from the network with identity attention maps",
    "2 main",
    negative=_negative,
    weight=4.0,  # scale s = 3 of the paper, w = 1 + s
    options=(
        Option(
            "pag-blocks",
            parse_blocks,
            None,
            "Attention blocks to change, names separated by commas  [default: the deepest of the encoder and the "
            "middle]",
        ),
        Option("pag-match", one_of("no", "yes"), "no", "yes: rescale V to the RMS of the attention output it replaces"),
    ),
    term="D(x; sigma, c) with attention output V",
    source="Ahn et al. 2024 (arXiv 2403.17377)",
    pick_when="you have a single network with several attention blocks, conditional or not",
)
