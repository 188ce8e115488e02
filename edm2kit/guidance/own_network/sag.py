"""Self-attention guidance (SAG): away from the answer to an image blurred where the network attends most.

The two predictions have different inputs: x, and xbar = soft + sigma eps(x), where soft is D blurred in part and
eps(x) = (x - D) / sigma. Hong et al. combine the noise that is predicted in them, eps(xbar) + w (eps(x) - eps(xbar)).
Since eps(xbar) = (xbar - D(xbar)) / sigma, the denoised image x - sigma eps of that is

    D + (w - 1) (soft - D(xbar)),  so for D_neg + w (D - D_neg) the negative is  D_neg = D(xbar) - (soft - D).

D(xbar) itself would be the negative if both predictions had the same input. As it is, it would push the other way: of
a linear denoiser D(xbar) - D = v / (v + sigma^2) (soft - D) is a blur, while D_neg - D = -sigma^2 / (v + sigma^2)
(soft - D) is a sharpening. It is guidance towards the blurred image.
"""

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
from edm2kit.guidance.option_types import count, number, one_of
from edm2kit.guidance.own_network.blur import blur

PUBLISHED_TAPS = 31  # whatever the deviation: at 9 pixels, the blur of the paper has in effect 7.3


def attended(attention: torch.Tensor, height: int, width: int, threshold: float = 1.0) -> torch.Tensor:
    """1 where an attention map [N, heads, n, n] gives a pixel more than its share, else 0: [N, 1, height, width].

    The attention that all queries together give a pixel is 1 on average; more than `threshold` counts. Enlarged by
    repetition.
    """
    grid = grid_size(attention.shape[3], height, width)
    mass = attention.float().mean(dim=1).sum(dim=1).reshape(-1, 1, *grid)
    return torch.nn.functional.interpolate((mass > threshold).float(), (height, width), mode="nearest")


@dataclass(frozen=True)
class SelfAttentionBlur(Wrapper):
    """The negative `net`(x + soft - D) - (soft - D), where soft is D blurred where `block` attends most.

    The blur has a standard deviation of `blur_sigma` pixels and `taps` taps (odd), or as many as the image allows,
    2 size - 1. With `clamp`, D is first limited to [-1, 1], which suits pixels and not latents. The attention map comes
    from the call that gave D.
    """

    net: Network
    block: str
    blur_sigma: float
    taps: int = PUBLISHED_TAPS
    clamp: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.block,)

    def derive(self, D: torch.Tensor, maps: Mapping[str, torch.Tensor], at: Evaluation) -> torch.Tensor:
        mask = attended(maps[self.block], *D.shape[2:]).to(D.dtype)
        clean = D.clamp(-1, 1) if self.clamp else D
        taps = min(self.taps, 2 * min(D.shape[2:]) - 1)  # reflection reaches no farther than the image
        soft = torch.where(mask > 0, blur(clean, self.blur_sigma, taps), clean)
        answer = self.net(at.x + (soft - D).to(at.x.dtype), at.sigma, at.condition)
        return answer - (soft - D).to(answer.dtype)


def parse_taps(text: str) -> int:
    """An odd number of taps."""
    taps = count()(text)
    if taps % 2 == 0:
        raise ValueError(f"{text!r:.60} is not an odd number of taps")
    return taps


def _negative(parts: Parts, *, sag_block: Blocks, sag_blur: float, sag_taps: int, sag_clamp: str) -> SelfAttentionBlur:
    net = require_attention(parts.net, "self-attention guidance", "return_attention")
    blocks = last_at_lowest_resolution(net) if sag_block is None else checked(net, sag_block)
    if len(blocks) != 1:
        raise ValueError(f"self-attention guidance reads exactly one attention block; {len(blocks)} were given")
    return SelfAttentionBlur(net, blocks[0], sag_blur, sag_taps, sag_clamp == "yes")


METHOD = Method(
    "self-attention guidance (SAG): away from the answer to an image blurred where the network attends most",
    "2 main",
    negative=_negative,
    weight=1.2,  # w = 1 + s; s = .2 at 256x256 and .1 at 128x128 with classes, .5 to .8 without, .75 for SD
    options=(
        Option(
            "sag-block",
            parse_blocks,
            None,
            "Attention block whose map is read  [default: the last one at the lowest resolution]",
        ),
        Option(
            "sag-blur",
            number(0.01, 100),
            1.0,
            "Standard deviation of the blur, in pixels of what the network generates; published: 9 for 256x256 pixels, "
            "3 for 128x128 pixels, 1 for 64x64 latents",
        ),
        Option(
            "sag-taps",
            parse_taps,
            PUBLISHED_TAPS,
            "Number of taps of the blur, odd; limited to what the image allows, 2 size - 1",
        ),
        Option(
            "sag-clamp",
            one_of("no", "yes"),
            "no",
            "yes: limit D to [-1, 1] before the blur, as published for networks on pixels; not for latents",
        ),
    ),
    term="D(x + soft - D; sigma, c) - (soft - D), soft = D blurred in part",
    source="Hong et al. 2023 (arXiv 2210.00939)",
    pick_when="you have a single network with attention, and small weights are enough: large ones smooth the image",
)
