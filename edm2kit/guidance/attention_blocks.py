"""The interior of a network as guidance sees it: which edits it supports, and its attention blocks by role."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from edm2kit.denoiser import AttentionRole, Network

Blocks = tuple[str, ...] | None  # None: the method's usual blocks


def parse_blocks(text: str) -> Blocks:
    """Names of attention blocks separated by commas; "auto" for the method's usual blocks, "none" for none."""
    if text == "auto":
        return None
    if text == "none":
        return ()
    names = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"(?=.*\d)[\w.\-]+", name) for name in names):  # names of blocks hold a number
        raise ValueError(
            f"{text!r:.60} is not a list of blocks; write for example dec.8x8_in0,enc.8x8_block0, auto or none"
        )
    return names


def is_network(denoiser: object) -> bool:
    """Whether `denoiser` is a single network with an interior (`edm2kit.denoiser.Network`), not any callable."""
    return hasattr(denoiser, "supported_edits")


def require_edits(denoiser: Any, method: str, *edits: str) -> Network:
    """`denoiser` as a network that supports all of `edits`. Raises ValueError naming those it lacks.

    Edits are "attention", "embedding", "dropout", "skip" and "return_attention", as in `edm2kit.denoiser.Network`.
    """
    if not is_network(denoiser):
        raise ValueError(
            f"{method} changes the interior of a network, and a {type(denoiser).__name__} is not a network. Use a "
            "method that only changes the condition or the input (autoguidance, cfg, icg, sliding-window, truncation, "
            "input-noise), or guide the network first and wrap it afterwards"
        )
    missing = [edit for edit in edits if edit not in denoiser.supported_edits]
    if missing:
        supported = ", ".join(sorted(denoiser.supported_edits)) or "none"
        raise ValueError(
            f"{method} needs a network that supports the edit {' and '.join(missing)}; this one supports: {supported}. "
            "Choose another guidance method"
        )
    return denoiser


def require_attention(denoiser: Any, method: str, edit: Literal["attention", "skip", "return_attention"]) -> Network:
    """`denoiser` as a network with attention blocks that supports `edit`. Raises ValueError for any other."""
    net = require_edits(denoiser, method, edit)
    if not roles_of(net):
        raise ValueError(
            f"{method} acts on attention blocks, and this {type(denoiser).__name__} has none. "
            "Choose another guidance method"
        )
    return net


def checked(net: Network, blocks: Sequence[str]) -> tuple[str, ...]:
    """`blocks`, all of which are attention blocks of `net`. Raises ValueError naming one that is not."""
    known = roles_of(net)
    for name in blocks:
        if name not in known:
            raise ValueError(f"{name!r} is not an attention block of this network; available: {', '.join(known)}")
    return tuple(blocks)


def roles_of(denoiser: object) -> Mapping[str, AttentionRole]:
    """The role of each attention block by name, in the order of computation; empty if there are none."""
    return getattr(denoiser, "attention_roles", {})


def middle(net: Network) -> tuple[str, ...]:
    """The attention blocks in the middle, where the network is deepest."""
    return tuple(name for name, role in roles_of(net).items() if role.side == "middle")


def deep_encoder(net: Network) -> tuple[str, ...]:
    """The encoder's last block at the second lowest resolution, all its blocks at the lowest, and the middle."""
    by_resolution: dict[int, list[str]] = {}
    for name, role in roles_of(net).items():
        if role.side == "encoder":
            by_resolution.setdefault(role.resolution, []).append(name)
    lowest, second = [*sorted(by_resolution), None, None][:2]
    blocks: list[str] = []
    if second is not None:
        blocks += by_resolution[second][-1:]
    if lowest is not None:
        blocks += by_resolution[lowest]
    return (*blocks, *middle(net))


def last_at_lowest_resolution(net: Network) -> tuple[str, ...]:
    """The last block computed at the network's lowest resolution."""
    roles = roles_of(net)
    lowest = min(role.resolution for role in roles.values())
    return tuple(name for name, role in roles.items() if role.resolution == lowest)[-1:]


def size_divisor(denoiser: object, height: int) -> int:
    """What image sizes must be a multiple of: how much the network downsamples; 1 if unknown.

    The resolutions of its blocks are those for the images that it was made for; a network that does not say how large
    they are (`img_resolution`) is taken to be made for `height` pixels.
    """
    roles = roles_of(denoiser)
    if not roles:
        return 1
    made_for = int(getattr(denoiser, "img_resolution", height))
    return max(made_for // min(role.resolution for role in roles.values()), 1)


def grid_size(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the map of `tokens` that a network makes of an image of these pixels.

    Raises ValueError if no reduction of the image, the same in both directions, has so many tokens.
    """
    for factor in range(1, max(height, width) + 1):
        rows, columns = math.ceil(height / factor), math.ceil(width / factor)
        if rows * columns == tokens:
            return rows, columns
    raise ValueError(f"an attention map over {tokens} tokens is not a smaller version of {height}x{width} pixels")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain attention."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
