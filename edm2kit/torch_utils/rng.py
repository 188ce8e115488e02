"""Random numbers that depend on the image only, not on batch, rank or time."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and nothing else (BLAKE2b of their text).

    Example: `derive_seed(seed, "image", 1234)` is the seed for training image number 1234.
    """
    # int(part), so that a numpy integer gives the same seed as a Python one
    text = "\x1f".join(f"str:{part}" if isinstance(part, str) else f"int:{int(part)}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class RandomSource(Protocol):
    """A source of Gaussian random numbers: `torch` itself, or one generator per image."""

    def randn(self, size: list[int]) -> torch.Tensor: ...
    def randn_like(self, x: torch.Tensor) -> torch.Tensor: ...


class StackedGenerator:
    """One random generator per image of a batch; row k of every result depends on seed k alone.

    Seeds are taken modulo 2^32, as in EDM2. The generators live on `device`, since the same seed gives different
    numbers on a CPU and a CUDA device. Raises ValueError if the first dimension is not the number of generators.

    Example: `StackedGenerator("cpu", [0, 1]).randn([2, 3, 64, 64])` is the noise of images 0 and 1.
    """

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(s) % (1 << 32)) for s in seeds]

    def __len__(self) -> int:
        return len(self.generators)

    def __repr__(self) -> str:
        return f"StackedGenerator: generators of {len(self)} images, on {self.device}"

    def _check(self, size: Sequence[int]) -> None:
        if len(size) == 0 or size[0] != len(self.generators):
            raise ValueError(
                f"StackedGenerator has {len(self)} generators; got the shape {list(size)}, expected [{len(self)}, ...]"
            )

    def randn(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal numbers of shape `size`, size[0] being the number of images."""
        self._check(size)
        draws = [torch.randn(list(size[1:]), generator=g, device=self.device, dtype=dtype) for g in self.generators]
        return torch.stack(draws) if draws else torch.empty(list(size), device=self.device, dtype=dtype)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers with the shape, dtype and device of `x`."""
        return self.randn(x.shape, dtype=x.dtype).to(x.device)

    def rand(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uniform numbers in [0, 1) of shape `size`, size[0] being the number of images."""
        self._check(size)
        draws = [torch.rand(list(size[1:]), generator=g, device=self.device, dtype=dtype) for g in self.generators]
        return torch.stack(draws) if draws else torch.empty(list(size), device=self.device, dtype=dtype)

    def randint(self, low_or_high: int, high: int | None = None, *, size: Sequence[int]) -> torch.Tensor:
        """Random integers in [0, high) or [low, high), int64, of shape `size`."""
        self._check(size)
        low, high = (0, low_or_high) if high is None else (low_or_high, high)
        draws = [torch.randint(low, high, list(size[1:]), generator=g, device=self.device) for g in self.generators]
        return torch.stack(draws) if draws else torch.empty(list(size), device=self.device, dtype=torch.int64)
