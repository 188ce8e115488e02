"""Random numbers of a guidance method: one generator per image, and the same numbers throughout a step."""

from dataclasses import dataclass

import torch

from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class StepGenerators:
    """Random generators of the images of a batch, for a method that asks `generators()` at each evaluation.

    A field of a `Wrapper`, so that it follows the sampling run. Within a step `generators()` starts over each time, so
    that the predictor and the corrector of a solver use the same numbers. `seeds` are the images' seeds for the step.

    Example: `self.random.generators().randn_like(x)`.
    """

    rng: StackedGenerator | None = None
    seeds: tuple[int, ...] | None = None

    def for_images(self, rng: StackedGenerator) -> "StepGenerators":
        return StepGenerators(rng)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "StepGenerators":
        rng = self._known()
        return StepGenerators(rng, tuple(rng.randint(1 << 32, size=[len(rng)]).tolist()))

    def generators(self) -> StackedGenerator:
        """One generator per image. Raises ValueError if `for_images` was not called."""
        rng = self._known()
        return rng if self.seeds is None else StackedGenerator(rng.device, self.seeds)

    def _known(self) -> StackedGenerator:
        if self.rng is None:
            raise ValueError(
                "this guidance method needs random numbers, and no generators were given. Call "
                "edm2kit.denoiser.for_images(denoiser, StackedGenerator(device, seeds)) first, as the engine does"
            )
        return self.rng
