"""Which attention blocks of a network a method changes: by name, or the usual ones of its architecture."""

import math
import re
from collections.abc import Sequence

import torch

from edm2kit.denoiser import Denoiser, Network

Blocks = tuple[str, ...] | None  # None: the method's usual ones


def parse_blocks(text: str) -> Blocks:
    """Names separated by commas, "auto" for the method's usual blocks, "none" for none."""
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    names = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"(enc|dec)\.\d+x\d+_\w+", name) for name in names):
        raise ValueError(
            f"{text!r} is not a list of blocks; write for example dec.8x8_in0,enc.8x8_block0, auto or none"
        )
    return names


def network_of(denoiser: Denoiser) -> Network:
    """`denoiser`, known to be one network that can be changed inside. Raises ValueError for anything else."""
    if not hasattr(denoiser, "attention_blocks") or not hasattr(denoiser, "label_dim"):
        raise ValueError(
            f"this guidance method changes the inside of a network; a {type(denoiser).__name__} is not one. Guide the "
            "network itself, and combine methods by their names"
        )
    return denoiser


def checked(net: Network, blocks: Sequence[str]) -> tuple[str, ...]:
    """`blocks`, all of which have attention. Raises ValueError naming one that is not there or has none."""
    for name in blocks:
        if name not in net.attention_blocks:
            raise ValueError(f"no attention in a block called {name!r}; there is: {', '.join(net.attention_blocks)}")
    return tuple(blocks)


def middle(net: Network) -> tuple[str, ...]:
    """The middle block, where the network is deepest."""
    return tuple(name for name in net.attention_blocks if name.endswith("_in0"))


def deep_encoder(net: Network) -> tuple[str, ...]:
    """The encoder's blocks at the lowest resolution with attention, the last one at the next, and the middle block."""
    levels: dict[int, list[str]] = {}
    for name in net.attention_blocks:
        if name.startswith("enc."):
            levels.setdefault(resolution(name), []).append(name)
    deepest, *above = sorted(levels) or [0]
    before = [levels[res][-1] for res in above[:1]]
    return (*before, *levels.get(deepest, []), *middle(net))


def last_at_depth(net: Network) -> tuple[str, ...]:
    """The decoder's last block at the lowest resolution; the middle block where it has no attention."""
    (mid,) = middle(net)
    return tuple(name for name in net.attention_blocks if resolution(name) == resolution(mid))[-1:]


def resolution(name: str) -> int:
    """Height and width that a block works at: 8 of "dec.8x8_in0"."""
    return int(re.match(r"\w+\.(\d+)x", name)[1])


def grid_size(tokens: int) -> int:
    """Height and width of a square map of `tokens` pixels. Raises ValueError where it is not square."""
    size = math.isqrt(tokens)
    if size * size != tokens:
        raise ValueError(f"an attention map over {tokens} pixels is not square")
    return size


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What attention puts out unchanged."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
