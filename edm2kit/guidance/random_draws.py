"""Random numbers of a guidance method: each image has its own, and they stay the same through a step."""

from dataclasses import dataclass

import torch

from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class Draws:
    """Where a method draws from; it hands on `for_images` and `for_step`, and asks `source()` at each call.

    Within a step every source gives the same numbers again, so that predictor and corrector are led away from the
    same thing. `seeds` are the images' seeds for the step.
    """

    rng: StackedGenerator | None = None
    seeds: tuple[int, ...] | None = None

    def for_images(self, rng: StackedGenerator) -> "Draws":
        return Draws(rng)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Draws":
        rng = self._known()
        return Draws(rng, tuple(rng.randint(1 << 32, size=[len(rng)]).tolist()))

    def source(self) -> StackedGenerator:
        """One generator per image. Raises ValueError before `for_images` said which."""
        rng = self._known()
        return rng if self.seeds is None else StackedGenerator(rng.device, self.seeds)

    def _known(self) -> StackedGenerator:
        if self.rng is None:
            raise ValueError(
                "this guidance method draws random numbers, and no generators were given: call "
                "edm2kit.denoiser.for_images(denoiser, StackedGenerator(device, seeds)) first, as the engine does"
            )
        return self.rng
