"""Skip-layer guidance (SLG, STG): away from the network with some of its blocks skipped.

D and its negative see the same x, so combining them is the same as combining predictions of noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from edm2kit.denoiser import Denoiser, Network
from edm2kit.guidance.attention_blocks import (
    Blocks,
    attend,
    checked,
    parse_blocks,
    require_attention,
    require_edits,
    roles_of,
)
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed

Mask = Callable[[str, torch.Tensor], torch.Tensor]


def _masked_attention(block: str, mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v) * mask(block, v)


def skip(call: NetworkCall, blocks: tuple[str, ...], kept: torch.Tensor) -> NetworkCall:
    """The call in which what block k adds to image n is multiplied by kept[n, k], 0 or 1: [N, len(blocks)].

    Both branches of a block are skipped, the convolutions and the attention, so that only its identity path remains.
    The constant factors of EDM2's magnitude-preserving sums stay.
    """

    def mask(block: str, y: torch.Tensor) -> torch.Tensor:
        return kept[:, blocks.index(block)].to(y).reshape(-1, 1, 1, 1)

    def convolutions(block: str, y: torch.Tensor) -> torch.Tensor:
        return y * mask(block, y) if block in blocks else y

    attention = {block: partial(_masked_attention, block, mask) for block in blocks}
    return call._replace(edits={**call.edits, "attention": attention, "dropout": convolutions})


@dataclass(frozen=True)
class SkippedBlocks:
    """The change that skips `blocks`. No blocks, no change."""

    blocks: tuple[str, ...]

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if not self.blocks:
            return call
        return skip(call, self.blocks, torch.zeros(len(call.x), len(self.blocks), device=call.x.device))


def published_depth(net: Network) -> tuple[str, ...]:
    """The attention blocks at the depth of those that are skipped in SD3.5: 7, 8 and 9 of 24; at least one."""
    names = list(roles_of(net))
    centres = {name: 24 * (k + 0.5) / len(names) for k, name in enumerate(names)}
    inside = tuple(name for name in names if 7 <= centres[name] <= 10)
    return inside or (min(names, key=lambda name: abs(centres[name] - 8.5)),)


def skippable(denoiser: Denoiser, method: str) -> Network:
    """`denoiser` as a network whose blocks `skip` can skip. Raises ValueError for any other."""
    require_edits(denoiser, method, "attention", "dropout")
    return require_attention(denoiser, method, "attention")


def _negative(parts: Parts, *, slg_blocks: Blocks) -> Denoiser:
    net = skippable(parts.net, "skip-layer guidance")
    blocks = published_depth(net) if slg_blocks is None else checked(net, slg_blocks)
    return Perturbed(net, SkippedBlocks(blocks))


METHOD = Method(
    "skip-layer guidance (SLG, STG): away from the network with chosen blocks skipped",
    "2 main",
    negative=_negative,
    weight=3.8,  # scale 2.8 for SD3.5, w = 1 + scale
    options=(
        Option(
            "slg-blocks",
            parse_blocks,
            None,
            "Attention blocks to skip, names separated by commas; unset: those about a third of the way through",
        ),
    ),
    term="D(x; sigma, c) with blocks skipped",
    source="Hyung et al. 2024 (STG, arXiv 2411.18664); SD3.5 (blocks 7-9 of 24, first fifth of the steps)",
    pick_when="you have a single network and want better structure; guide high noise levels only, with --interval",
)
