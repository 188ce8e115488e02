"""Entropy rectifying guidance (ERG): away from a network whose attention maps are flatter.

D and its negative see the same x, so combining them is the same as combining predictions of noise.
"""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import Blocks, attend, checked, deep_encoder, parse_blocks, require_attention
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import AttentionEdit, Perturbed
from edm2kit.guidance.option_types import number


@dataclass(frozen=True)
class FlattenedAttention:
    """Attention whose logits are divided by `temperature`, which raises the entropy of its maps if it is above 1.

    1 is plain attention, bit for bit; an infinite temperature is the mean of all values.
    """

    temperature: float

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q / self.temperature, k, v)


def _negative(parts: Parts, *, erg_temperature: float, erg_blocks: Blocks) -> Denoiser:
    net = require_attention(parts.net, "entropy rectifying guidance", "attention")
    blocks = deep_encoder(net) if erg_blocks is None else checked(net, erg_blocks)
    if erg_blocks is None and not blocks:
        raise ValueError(
            "entropy rectifying guidance acts on attention in the encoder and the middle of a network, and this one "
            "has none there. Name blocks with --erg-blocks"
        )
    return Perturbed(net, AttentionEdit(blocks, FlattenedAttention(erg_temperature)))


METHOD = Method(
    "entropy rectifying guidance (ERG): away from the network with flatter attention maps",
    "2 main",
    negative=_negative,
    options=(
        Option(
            "erg-temperature",
            number(0.01),
            2.0,
            "What logits of attention are divided by in the negative; 1: off, inf: the same attention everywhere",
        ),
        Option(
            "erg-blocks",
            parse_blocks,
            None,
            "Attention blocks to change, names separated by commas  [default: the deepest of the encoder and the "
            "middle]",
        ),
    ),
    term="D(x; sigma, c) with attention logits divided by a temperature",
    source="Ifriqi et al. 2025 (arXiv 2504.13987); tested on DiT and SD. Temperature and blocks are ours",
    pick_when="identity attention (pag) is too strong a change: how flat the maps become is adjustable",
)
