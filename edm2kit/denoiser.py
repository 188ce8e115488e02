"""The one interface that networks, guidance and solvers share, and how to call its optional part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from edm2kit.torch_utils.rng import StackedGenerator


@runtime_checkable
class Denoiser(Protocol):
    """An estimate of the clean image behind a noisy one.

    Called as `denoiser(x, sigma, labels)`: `x` float32 [N, C, H, W]; `sigma` float32 [N] or a scalar tensor,
    the standard deviation of the noise in `x`; `labels` float32 [N, K] or None. Returns D, float32, the shape
    of `x`. A float64 `x` (a float64 solver) is answered in float64 where the denoiser can.

    Three optional methods let a denoiser follow the sampling run without any solver knowing why. Each returns
    what to use next, so that nothing is left behind in the denoiser:

    - `for_images(rng) -> Denoiser`, called by whoever draws the noise, once per batch. `rng` is a
      `edm2kit.torch_utils.rng.StackedGenerator` with one generator per image, for methods that draw at random.
    - `for_step(i, sigmas) -> Denoiser`, called by the solver at the start of step i (from sigmas[i] to
      sigmas[i + 1]); its answer serves every evaluation of that step.
    - `after_step(x, i, sigmas) -> x`, called by the solver on the answer of `for_step` at the end of step i.
    """

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor: ...


class Network(Denoiser, Protocol):
    """A denoiser that is one network, and whose inside a call can change.

    `attention` maps names out of `attention_blocks` to (q, k, v) -> output, each [N, heads, H*W, C/heads];
    `embedding` takes and returns the noise embedding [N, E]; `dropout(block, y)` returns what replaces the
    activations y [N, C, H, W] where the block has its dropout. With `return_attention` the call returns
    (D, maps), softmax attention maps [N, heads, H*W, H*W] by block. `label_dim` is the number of classes, 0 for none.
    """

    label_dim: int

    @property
    def attention_blocks(self) -> Sequence[str]: ...

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        attention: Mapping[str, Callable[..., torch.Tensor]] | None = None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dropout: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        return_attention: Sequence[str] = (),
    ) -> Any: ...


def for_images(denoiser: Denoiser, rng: StackedGenerator) -> Denoiser:
    """`denoiser.for_images(rng)`, or the denoiser itself where it has no such method."""
    follow = getattr(denoiser, "for_images", None)
    return denoiser if follow is None else follow(rng)


def for_step(denoiser: Denoiser, i: int, sigmas: torch.Tensor) -> Denoiser:
    """`denoiser.for_step(i, sigmas)`, or the denoiser itself where it has no such method."""
    follow = getattr(denoiser, "for_step", None)
    return denoiser if follow is None else follow(i, sigmas)


def after_step(denoiser: Denoiser, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
    """`denoiser.after_step(x, i, sigmas)`, or `x` where the denoiser has no such method."""
    follow = getattr(denoiser, "after_step", None)
    return x if follow is None else follow(x, i, sigmas)
