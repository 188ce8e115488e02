"""Self-attention guidance (SAG): away from the answer to an image blurred where the network attends most."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edm2kit.denoiser import Network, Wrapper
from edm2kit.guidance.attention_blocks import (
    Blocks,
    checked,
    grid_size,
    last_at_lowest_resolution,
    parse_blocks,
    require_attention,
)
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.option_types import number
from edm2kit.guidance.own_network.blur import blur, kernel_size


def attended(attention: torch.Tensor, height: int, width: int, threshold: float = 1.0) -> torch.Tensor:
    """1 where an attention map [N, heads, n, n] gives a pixel more than its share, else 0: [N, 1, height, width].

    The attention that all queries together give a pixel is 1 on average; more than `threshold` counts. Enlarged by
    repetition.
    """
    size = grid_size(attention.shape[3])
    mass = attention.float().mean(dim=1).sum(dim=1).reshape(-1, 1, size, size)
    return torch.nn.functional.interpolate((mass > threshold).float(), (height, width), mode="nearest")


@dataclass(frozen=True)
class SelfAttentionBlur(Wrapper):
    """The negative `net`(x + D' - D), D' being D blurred by `blur_sigma` pixels where `block` attends most.

    The noise in x stays as it is. The attention map comes from the call that gave D.
    """

    net: Network
    block: str
    blur_sigma: float

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.block,)

    def derive(self, D: torch.Tensor, maps: Mapping[str, torch.Tensor], at: Evaluation) -> torch.Tensor:
        mask = attended(maps[self.block], *D.shape[2:]).to(D.dtype)
        # reflection reaches no farther than the image; 9 taps at sigma 1, as for latents in the authors' code
        kernel = min(kernel_size(4 / 3 * self.blur_sigma), 2 * min(D.shape[2:]) - 1)
        softer = torch.where(mask > 0, blur(D, self.blur_sigma, kernel), D)
        return self.net(at.x + (softer - D).to(at.x.dtype), at.sigma, at.condition)


def _negative(parts: Parts, *, sag_block: Blocks, sag_blur: float) -> SelfAttentionBlur:
    net = require_attention(parts.net, "self-attention guidance", "return_attention")
    blocks = last_at_lowest_resolution(net) if sag_block is None else checked(net, sag_block)
    if len(blocks) != 1:
        raise ValueError(f"self-attention guidance reads exactly one attention block; {len(blocks)} were given")
    return SelfAttentionBlur(net, blocks[0], sag_blur)


METHOD = Method(
    "self-attention guidance (SAG): away from the image blurred where the network attends most",
    "2 main",
    negative=_negative,
    weight=1.2,  # scale s = .2 for conditional networks, w = 1 + s
    options=(
        Option(
            "sag-block",
            parse_blocks,
            None,
            "Attention block whose map is read; unset: the last one at the lowest resolution",
        ),
        Option(
            "sag-blur",
            number(0.01, 100),
            1.0,
            "Standard deviation of the blur, in pixels of what the network generates",
        ),
    ),
    term="D(x + blur_masked(D) - D; sigma, c)",
    source="Hong et al. 2023 (arXiv 2210.00939)",
    pick_when="you have a single network with attention and want sharper detail at small weights",
)
