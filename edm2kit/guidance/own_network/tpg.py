"""Token-perturbation guidance (TPG): away from a network whose attention has its tokens shuffled.

D and its negative see the same x, so combining them is the same as combining predictions of noise.
"""

from dataclasses import dataclass, field

import torch

from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.attention_blocks import Blocks, attend, checked, parse_blocks, require_attention, roles_of
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed
from edm2kit.guidance.step_generators import StepGenerators


@dataclass(frozen=True)
class ShuffledTokens(Wrapper):
    """The change that shuffles the tokens of attention in `blocks`, by one permutation per image and step.

    Attention does not depend on the order of its tokens, so shuffling what goes in shuffles what comes out. The path
    around the attention keeps its order. Blocks of the same size share a permutation; every norm stays as it is. No
    blocks, no change.
    """

    blocks: tuple[str, ...]
    random: StepGenerators = field(default_factory=StepGenerators)

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if not self.blocks:
            return call
        generators = self.random.generators()
        orders: dict[int, torch.Tensor] = {}  # by number of tokens

        def shuffle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            n, _, tokens, _ = q.shape
            if tokens not in orders:
                orders[tokens] = generators.rand([n, tokens]).argsort(dim=1).to(q.device)
            answer = attend(q, k, v)
            return answer.gather(2, orders[tokens][:, None, :, None].expand_as(answer))

        return call._replace(edits={**call.edits, "attention": dict.fromkeys(self.blocks, shuffle)})


def _negative(parts: Parts, *, tpg_blocks: Blocks) -> Denoiser:
    net = require_attention(parts.net, "token-perturbation guidance", "attention")
    decoder = tuple(name for name, role in roles_of(net).items() if role.side == "decoder")
    blocks = decoder if tpg_blocks is None else checked(net, tpg_blocks)
    if tpg_blocks is None and not blocks:
        raise ValueError(
            "token-perturbation guidance acts on the attention in the decoder of a network, and this one has none "
            "there. Name blocks with --tpg-blocks"
        )
    return Perturbed(net, ShuffledTokens(blocks))


METHOD = Method(
    "token-perturbation guidance (TPG): away from the network with shuffled tokens",
    "2 main",
    negative=_negative,
    weight=4.0,  # scale 3 in the authors' code, w = 1 + scale
    options=(
        Option(
            "tpg-blocks",
            parse_blocks,
            None,
            "Attention blocks to shuffle, names separated by commas  [default: those in the decoder]",
        ),
    ),
    term="D(x; sigma, c) with attention outputs shuffled over the pixels",
    source="Rajabi et al. 2025 (arXiv 2506.10036); tested on SDXL and SD2.1",
    pick_when="you have a single network with attention, conditional or not, and want better structure",
)
