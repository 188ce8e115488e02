"""Earlier evaluations of a sampling run, for methods that lead away from them at no further evaluation."""

from typing import Generic, TypeVar

import torch

from edm2kit.denoiser import levels_of

Kept = TypeVar("Kept")


class History(Generic[Kept]):
    """What a method keeps of the first evaluation of each step, as long as the steps follow one another.

    `latest` is what was kept at the next higher noise level: in the first evaluation of a step that of the step
    before, in later ones, such as Heun's second, that of the step's own first. If a step does not begin where the last
    one ended (another run, a repeated step, steps left out in between), everything is forgotten.

    Example: call `begin(i, sigmas)` in `for_step`; at each evaluation read `latest`, then `keep(...)` if `is_first`.
    """

    def __init__(self) -> None:
        self.latest: Kept | None = None
        self.is_first = True
        self._end: float | None = None  # the noise level at which the last step ended

    def begin(self, i: int, sigmas: torch.Tensor) -> None:
        """Begin step i, which goes from sigmas[i] to sigmas[i + 1]."""
        levels = levels_of(sigmas)
        if levels[i] != self._end:
            self.latest = None
        self._end, self.is_first = levels[i + 1], True

    def keep(self, evaluation: Kept) -> None:
        """Keep this of the first evaluation of the step."""
        self.latest, self.is_first = evaluation, False
