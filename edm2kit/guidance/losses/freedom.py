"""FreeDoM: Yu et al. 2023 (arXiv 2303.09833). Its time travel is a solver, `edm2kit.sampling.solvers.time_travel`.

The paper's x is variance-preserving, x' = x / sqrt(1 + sigma^2), and its losses are norms ||r||, not squares. Its rule
for parsing maps and sketches moves x' by -step * sqrt(a) times the gradient by x', a = 1 / (1 + sigma^2). The gradient
by x' is sqrt(1 + sigma^2) times that by x, which cancels sqrt(a); at the end of the step x = sqrt(1 + sigma_next^2) x'.
What remains is step * sqrt(1 + sigma_next^2) * (gradient of ||r|| by x). Its rule for text fixes the length of the
step, so neither the norm nor the variables matter.
"""

from dataclasses import dataclass

import torch

from edm2kit.guidance.losses.gradient_step import StepStart, image_norm, norm_slope, zero_where_flat


@dataclass(frozen=True)
class FreeDoMStep:
    """Along g, with an RMS of `share` * (1 - sigma_next^2 / sigma^2) * RMS(x - D): the rule for text (CLIP).

    A rule of `GradientStep`.
    """

    share: float = 0.02

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        length = self.share * (1 - sigma_next**2 / at.sigma**2) * image_norm(at.x - at.D)
        return zero_where_flat(length * (at.gradient / image_norm(at.gradient)), at.gradient)


@dataclass(frozen=True)
class FreeDoMLevelStep:
    """`step` * sqrt(1 + sigma_next^2) * (gradient of ||r||), the loss being ||r||^2. A rule of `GradientStep`.

    The authors use steps of 0.2 for parsing maps and 20 for sketches, and none in the last steps of a run, which a
    `GuidanceInterval` (`--interval`) leaves out.
    """

    step: float = 0.2

    def __call__(self, at: StepStart, sigma_next: torch.Tensor) -> torch.Tensor:
        return self.step * (1 + sigma_next**2).sqrt() * norm_slope(at)
