"""Earlier evaluations of a sampling run, for methods that lead away from them at no further evaluation."""

from typing import Generic, TypeVar

import torch

from edm2kit.denoiser import levels_of

Kept = TypeVar("Kept")


class Steps:
    """Whether the steps of a run follow one another.

    They do not if a step begins elsewhere than where the last one ended: in another run, when a step is repeated or
    noise was added in between, and when steps were left out. By noise levels and not by numbers of steps, since restart
    sampling has numbers of its own for the steps of an interval.
    """

    def __init__(self) -> None:
        self._end: float | None = None  # the noise level at which the last step ended

    def continues(self, i: int, sigmas: torch.Tensor) -> bool:
        """Whether step i, from sigmas[i] to sigmas[i + 1], begins where the last one ended; it begins now."""
        levels = levels_of(sigmas)
        does = levels[i] == self._end
        self._end = levels[i + 1]
        return does


class History(Generic[Kept]):
    """What a method keeps of the first evaluation of each step, as long as the steps follow one another (`Steps`).

    `latest` is what was kept at the next higher noise level: in the first evaluation of a step that of the step
    before, in later ones, such as Heun's second, that of the step's own first.

    Example: call `begin(i, sigmas)` in `for_step`; at each evaluation read `latest`, then `keep(...)` if `is_first`.
    """

    def __init__(self) -> None:
        self.latest: Kept | None = None
        self.is_first = True
        self._steps = Steps()

    def begin(self, i: int, sigmas: torch.Tensor) -> None:
        """Begin step i, which goes from sigmas[i] to sigmas[i + 1]."""
        if not self._steps.continues(i, sigmas):
            self.latest = None
        self.is_first = True

    def keep(self, evaluation: Kept) -> None:
        """Keep this of the first evaluation of the step."""
        self.latest, self.is_first = evaluation, False
