"""Self-attention guidance: away from what the network makes of an image blurred where it attends most."""

from dataclasses import dataclass

import torch

from edm2kit.denoiser import Network, for_images, for_step
from edm2kit.guidance.attention_blocks import Blocks, checked, grid_size, last_at_depth, network_of, parse_blocks
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.option_types import number
from edm2kit.guidance.own_network.blur import blur, kernel_size
from edm2kit.torch_utils.rng import StackedGenerator


def attended(attention: torch.Tensor, height: int, width: int, threshold: float = 1.0) -> torch.Tensor:
    """Where an attention map [N, heads, n, n] gives a pixel more than its share, as 0 or 1: [N,1,height,width].

    What all queries together pay a pixel is 1 on average; more than `threshold` counts. Enlarged by repetition.
    """
    size = grid_size(attention.shape[3])
    mass = attention.float().mean(dim=1).sum(dim=1).reshape(-1, 1, size, size)
    return torch.nn.functional.interpolate((mass > threshold).float(), (height, width), mode="nearest")


@dataclass(frozen=True)
class Blurred:
    """The answer of `net` to x + D' - D, D' being D blurred by `blur_sigma` pixels where `block` attends most.

    The noise in x stays the model's own. The map comes from the call that gave D.
    """

    net: Network
    block: str
    blur_sigma: float

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.block,)

    def beside(
        self,
        D: torch.Tensor,
        maps: dict[str, torch.Tensor],
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        mask = attended(maps[self.block], *D.shape[2:]).to(D.dtype)
        # reflection reaches no farther than the image; 9 taps at sigma 1, as for latents in the authors' code
        kernel = min(kernel_size(4 / 3 * self.blur_sigma), 2 * min(D.shape[2:]) - 1)
        softer = torch.where(mask > 0, blur(D, self.blur_sigma, kernel), D)
        return self.net(x + (softer - D).to(x.dtype), sigma, labels)

    def for_images(self, rng: StackedGenerator) -> "Blurred":
        return Blurred(for_images(self.net, rng), self.block, self.blur_sigma)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Blurred":
        return Blurred(for_step(self.net, i, sigmas), self.block, self.blur_sigma)


def _negative(parts: Parts, *, sag_block: Blocks, sag_blur: float) -> Blurred:
    net = network_of(parts.net)
    blocks = last_at_depth(net) if sag_block is None else checked(net, sag_block)
    if len(blocks) != 1:
        raise ValueError(f"self-attention guidance reads one block; {len(blocks)} were given")
    return Blurred(net, blocks[0], sag_blur)


METHOD = Method(
    "self-attention guidance: what the network attends to is blurred",
    "2 main",
    negative=_negative,
    weight=1.2,  # scale s = .2 for conditional networks, w = 1 + s
    options=(
        Option(
            "sag-block", parse_blocks, None, "block whose map is read; unset, the decoder's last at the lowest level"
        ),
        Option("sag-blur", number(0.01, 100), 1.0, "deviation of the blur in latent pixels"),
    ),
    term="D(x + blur_masked(D) - D; sigma, c)",
    source="Hong et al. 2023 (arXiv 2210.00939)",
)
