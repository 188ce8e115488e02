"""Perturbed-attention guidance: away from a network whose pixels do not look at each other."""

import torch

from guidance.blocks import Blocks, checked, deep_encoder, network_of, parse_blocks
from guidance.method import Method, Option, Parts
from guidance.perturbed import AttentionEdited, Perturbed
from torch_utils.denoiser import Denoiser


def identity_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention whose map is the identity: every pixel keeps its own value."""
    return v


def _negative(parts: Parts, *, pag_blocks: Blocks) -> Denoiser:
    net = network_of(parts.net)
    blocks = deep_encoder(net) if pag_blocks is None else checked(net, pag_blocks)
    return Perturbed(net, AttentionEdited(blocks, identity_attention))


METHOD = Method(
    "perturbed-attention guidance: attention maps become the identity",
    "2 main",
    negative=_negative,
    weight=4.0,  # scale s = 3 of the paper, w = 1 + s
    options=(
        Option("pag-blocks", parse_blocks, None, "blocks to change; unset, the deepest of the encoder, and the middle"),
    ),
    term="D(x; sigma, c) with attention output V",
    source="Ahn et al. 2024 (arXiv 2403.17377)",
)
