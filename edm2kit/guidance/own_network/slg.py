"""Skip-layer guidance (SLG, STG): away from the network with some of its blocks skipped.

D and its negative see the same x, so combining them is the same as combining predictions of noise.
"""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import Denoiser, Network
from edm2kit.guidance.attention_blocks import Blocks, checked, parse_blocks, require_attention, roles_of
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed


def skip(call: NetworkCall, blocks: tuple[str, ...], skipped: torch.Tensor) -> NetworkCall:
    """The call in which blocks[k] adds nothing to its input for image n if skipped[n, k]: bool [N, len(blocks)].

    Only the path around a block remains, without its convolutions, its attention or its MLP. The constant factors of
    EDM2's magnitude-preserving sums stay.
    """
    return call._replace(edits={**call.edits, "skip": {block: skipped[:, k] for k, block in enumerate(blocks)}})


@dataclass(frozen=True)
class SkippedBlocks:
    """The change that skips `blocks`. No blocks, no change."""

    blocks: tuple[str, ...]

    def __call__(self, call: NetworkCall) -> NetworkCall:
        skipped = torch.ones(len(call.x), len(self.blocks), dtype=torch.bool, device=call.x.device)
        return skip(call, self.blocks, skipped)


def published_depth(net: Network) -> tuple[str, ...]:
    """The attention blocks at the depth of those that are skipped in SD3.5: 7, 8 and 9 of 24; at least one."""
    names = list(roles_of(net))
    centres = {name: 24 * (k + 0.5) / len(names) for k, name in enumerate(names)}
    inside = tuple(name for name in names if 7 <= centres[name] <= 10)
    return inside or (min(names, key=lambda name: abs(centres[name] - 8.5)),)


def _negative(parts: Parts, *, slg_blocks: Blocks) -> Denoiser:
    net = require_attention(parts.net, "skip-layer guidance", "skip")
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
            "Attention blocks to skip, names separated by commas  [default: those about a third of the way through]",
        ),
    ),
    term="D(x; sigma, c) with blocks skipped",
    source="Hyung et al. 2024 (STG, arXiv 2411.18664); SD3.5 (blocks 7-9 of 24, first fifth of the steps)",
    pick_when="you have a single network and want better structure; guide high noise levels only, with --interval",
)
