"""S2-guidance: away from the network with random blocks skipped.

D and its negative see the same x, so combining them is the same as combining predictions of noise.
"""

from dataclasses import dataclass, field

from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.attention_blocks import Blocks, checked, parse_blocks, require_attention, roles_of
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed
from edm2kit.guidance.option_types import number
from edm2kit.guidance.own_network.slg import skip
from edm2kit.guidance.step_generators import StepGenerators


@dataclass(frozen=True)
class RandomSkips(Wrapper):
    """The change that skips a share of `blocks`, other ones for each image and step.

    Their number is the share rounded to a whole number, at least 1 if the share is not 0.
    """

    blocks: tuple[str, ...]
    share: float
    random: StepGenerators = field(default_factory=StepGenerators)

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if self.share == 0:
            return call
        count = max(round(self.share * len(self.blocks)), 1)
        ranks = self.random.generators().rand([len(call.x), len(self.blocks)]).argsort(dim=1).argsort(dim=1)
        return skip(call, self.blocks, ranks < count)


def _negative(parts: Parts, *, s2_share: float, s2_blocks: Blocks) -> Denoiser:
    net = require_attention(parts.net, "S2-guidance", "skip")
    blocks = tuple(roles_of(net)) if s2_blocks is None else checked(net, s2_blocks)
    if not blocks:
        raise ValueError("S2-guidance skips some of several blocks, and none were given. Leave out --s2-blocks")
    return Perturbed(net, RandomSkips(blocks, s2_share))


METHOD = Method(
    "S2-guidance: away from the network with random blocks skipped",
    "2 main",
    negative=_negative,
    options=(
        Option("s2-share", number(0, 1), 0.1, "Share of the blocks that is skipped, drawn per image and step"),
        Option(
            "s2-blocks",
            parse_blocks,
            None,
            "Attention blocks to draw from, names separated by commas  [default: all]",
        ),
    ),
    term="D(x; sigma, c) with random blocks skipped",
    source="Chen et al. 2025 (arXiv 2508.12880); tested on SD3 and Wan",
    pick_when="as for slg, if you do not want to find out which blocks to skip",
)
