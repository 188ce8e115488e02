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
    seed_rng: StackedGenerator | None = None  # on the CPU, because reading seeds from a GPU would wait for it

    def for_images(self, rng: StackedGenerator) -> "StepGenerators":
        if rng.device.type == "cpu":
            return StepGenerators(rng, seed_rng=rng)
        return StepGenerators(rng, seed_rng=StackedGenerator("cpu", [g.initial_seed() for g in rng.generators]))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "StepGenerators":
        rng = self._known()
        seed_rng = self.seed_rng or rng
        seeds = tuple(seed_rng.randint(1 << 32, size=[len(rng)]).tolist())
        return StepGenerators(rng, seeds, seed_rng)

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
