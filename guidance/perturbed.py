"""The main network itself, called with other arguments, as what it is led away from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_utils.denoiser import Denoiser, for_images, for_step
from torch_utils.rng import StackedGenerator


class Call(NamedTuple):
    """The arguments of one call of a network; `edits` by keyword (`torch_utils.denoiser.Network`)."""

    x: torch.Tensor
    sigma: torch.Tensor
    labels: torch.Tensor | None
    edits: Mapping[str, Any] = {}


Change = Callable[[Call], Call]


@dataclass(frozen=True)
class Perturbed:
    """`net` with the arguments that `change` makes of those given; the network itself is left alone.

    `change` may follow the run by `for_images` and `for_step`, as denoisers do.
    """

    net: Denoiser
    change: Change

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        call = self.change(Call(x, sigma, labels))
        return self.net(call.x, call.sigma, call.labels, **call.edits)

    def for_images(self, rng: StackedGenerator) -> "Perturbed":
        return Perturbed(for_images(self.net, rng), for_images(self.change, rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Perturbed":
        return Perturbed(for_step(self.net, i, sigmas), for_step(self.change, i, sigmas))


@dataclass(frozen=True)
class AttentionEdited:
    """The change that replaces the attention of `blocks` by `edit`; no blocks, no change."""

    blocks: tuple[str, ...]
    edit: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __call__(self, call: Call) -> Call:
        return call._replace(edits={**call.edits, "attention": dict.fromkeys(self.blocks, self.edit)})
