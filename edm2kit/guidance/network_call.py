"""The main network itself, called with other arguments, as what it is led away from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from edm2kit.denoiser import Denoiser, for_images, for_step
from edm2kit.guidance.attention_blocks import attend
from edm2kit.torch_utils.rng import StackedGenerator


class Call(NamedTuple):
    """The arguments of one call of a network; `edits` by keyword (`edm2kit.denoiser.Network`)."""

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


def in_one_call(net: Denoiser, calls: Sequence[Call]) -> list[torch.Tensor]:
    """What `net` answers to each of `calls`, evaluated as one batch: faster than one by one, by up to 1.7 times.

    All at x of the same shape, all with labels or all without; each call's edits reach its own images alone.
    """
    x = torch.cat([call.x for call in calls])
    sigma = torch.cat([torch.as_tensor(call.sigma, device=x.device).expand(len(call.x)) for call in calls])
    labels = None if calls[0].labels is None else torch.cat([call.labels for call in calls])
    edits: dict[str, Any] = {}
    attention = [call.edits.get("attention", {}) for call in calls]
    if blocks := dict.fromkeys(block for edited in attention for block in edited):
        edits["attention"] = {block: _Each([edited.get(block, attend) for edited in attention]) for block in blocks}
    for name, unedited in (("embedding", _same_embedding), ("dropout", _no_dropout)):
        if any(name in call.edits for call in calls):
            edits[name] = _Each([call.edits.get(name, unedited) for call in calls])
    return list(net(x, sigma, labels, **edits).chunk(len(calls)))


@dataclass(frozen=True)
class _Each:
    """Of a batch in as many equal parts as there are functions, each applied to its own part."""

    functions: Sequence[Callable[..., torch.Tensor]]

    def __call__(self, *arguments: torch.Tensor | str) -> torch.Tensor:
        count = len(self.functions)
        split = [[a] * count if isinstance(a, str) else a.chunk(count) for a in arguments]
        return torch.cat([f(*parts) for f, *parts in zip(self.functions, *split, strict=True)])


def _same_embedding(emb: torch.Tensor) -> torch.Tensor:
    return emb


def _no_dropout(block: str, y: torch.Tensor) -> torch.Tensor:
    return y


@dataclass(frozen=True)
class AttentionEdited:
    """The change that replaces the attention of `blocks` by `edit`; no blocks, no change."""

    blocks: tuple[str, ...]
    edit: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __call__(self, call: Call) -> Call:
        return call._replace(edits={**call.edits, "attention": dict.fromkeys(self.blocks, self.edit)})
